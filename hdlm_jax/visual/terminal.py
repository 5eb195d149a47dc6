"""A generation in the terminal: settled, active, masked and given tokens told apart, corrections marked."""

import itertools
import shutil
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.generation.streaming import Snapshot

GIVEN, SETTLED, ACTIVE, MASKED, CORRECTED = range(5)
# SGR codes: bold, plain, cyan, dim, and yellow underlined: told apart by more than their hue.
STYLES = ("1", "0", "36", "2", "4;33")
WORDS = ("given", "settled", "active", "mask", "corrected")
HOLE, NEW_LINE = "·", "↵"


def states(shot: Snapshot, before: np.ndarray | None, mask: int | None) -> np.ndarray:
    """The state of every token, int [L]; corrected: another token than before, where that was none of the mask.

    >>> given = np.array([True, False, False, False])
    >>> shot = Snapshot(1, 2, np.array([7, 1, 2, 9]), np.array([0, 0, 1, 1]), 2, given, False, 4)
    >>> states(shot, np.array([7, 9, 3, 9]), mask=9).tolist() == [GIVEN, SETTLED, CORRECTED, MASKED]
    True
    """
    state_L = np.where(shot.levels == 0, SETTLED, ACTIVE)
    state_L = np.where(shot.tokens == mask, MASKED, state_L)
    if before is not None:
        state_L = np.where((shot.tokens != before) & (before != mask), CORRECTED, state_L)
    return np.where(shot.given, GIVEN, state_L)


def lines(shot: Snapshot, state_L: np.ndarray, tokenizer: Tokenizer, width: int, color: bool) -> list[str]:
    """The text as lines of `width` characters; without colour, corrected tokens stand in brackets."""
    cells: list[tuple[str, int]] = []
    for state, group in itertools.groupby(range(len(shot.tokens)), key=lambda i: int(state_L[i])):
        text = tokenizer.decode(shot.tokens[list(group)], mask=HOLE, end_of_text="\n").replace("\n", NEW_LINE)
        text = "".join(c if c.isprintable() else "\ufffd" for c in text)
        cells += [(c, state) for c in (f"[{text}]" if state == CORRECTED and not color else text)]
    rows = [cells[first : first + width] for first in range(0, len(cells), width)]
    return ["".join(_painted(row, color)) for row in rows]


def _painted(row: list[tuple[str, int]], color: bool) -> Iterator[str]:
    for state, group in itertools.groupby(row, key=lambda cell: cell[1]):
        text = "".join(c for c, _ in group)
        yield f"\x1b[{STYLES[state]}m{text}\x1b[0m" if color else text


def play(shots: Iterable[Snapshot], tokenizer: Tokenizer, stream: TextIO, delay: float = 0.0) -> Snapshot:
    """Shows a generation as it goes on, and returns its last snapshot.

    On a terminal each snapshot takes the place of the one before; elsewhere they follow each other, plain.

    Args:
      delay: seconds to wait after each.
    """
    live = stream.isatty()
    width = max(20, shutil.get_terminal_size().columns - 1)
    before, drawn, corrections, shot = None, 0, 0, None
    if live:
        legend = "  ".join(f"\x1b[{style}m{word}\x1b[0m" for style, word in zip(STYLES, WORDS, strict=True))
        stream.write(legend + "\n")
    for shot in shots:
        state_L = states(shot, before, tokenizer.mask_id)
        corrections += int((state_L == CORRECTED).sum())
        masks = int((state_L == MASKED).sum())
        head = f"step {shot.step}/{shot.num_steps}: {masks} masks, {corrections} corrections so far"
        frame = [*textwrap.wrap(head, width), *lines(shot, state_L, tokenizer, width, live)]
        back = f"\x1b[{drawn}F\x1b[J" if live and drawn else ""
        stream.write(back + "\n".join(frame) + "\n")
        stream.flush()
        before, drawn = shot.tokens, len(frame)
        time.sleep(delay)
    return shot
