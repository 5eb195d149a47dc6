"""A generation in the terminal."""

import io

import numpy as np

from hdlm_jax.data.tokenizers import bytes_tokenizer
from hdlm_jax.generation.streaming import Snapshot
from hdlm_jax.visual import terminal

TOKENIZER = bytes_tokenizer()
MASK, END = TOKENIZER.mask_id, TOKENIZER.end_of_text
GIVEN = np.array([True, False, False, False, False])


def shots():
    tokens = ["a", MASK, MASK, MASK, MASK], ["a", "b", "\x1b", MASK, MASK], ["a", "c", "\x1b", END, "\u00e9"[0:1]]
    levels = [0, 2, 2, 2, 2], [0, 1, 1, 2, 2], [0, 0, 0, 0, 0]
    for step, (row, level) in enumerate(zip(tokens, levels, strict=True)):
        ids = np.array([ord(t) if isinstance(t, str) else t for t in row])
        yield Snapshot(step, 2, ids, np.array(level), 2, GIVEN, step == 2, 5)


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_than_on_a_terminal_frames_are_plain_lines():
    out = io.StringIO()
    last = terminal.play(shots(), TOKENIZER, out)
    assert last.finished
    assert out.getvalue().splitlines() == [
        "step 0/2: 4 masks, 0 corrections so far",
        "a····",
        "step 1/2: 2 masks, 0 corrections so far",
        "ab\ufffd··",
        "step 2/2: 0 masks, 1 corrections so far",
        "a[c]\ufffd↵\ufffd",  # neither a control character nor half a character reaches the screen
    ]


def test_on_a_terminal_each_frame_takes_the_place_of_the_one_before():
    out = Screen()
    terminal.play(shots(), TOKENIZER, out)
    text = out.getvalue()
    assert text.count("\x1b[2F\x1b[J") == 2  # a head and a line
    assert "\x1b[4;33mc\x1b[0m" in text and "\x1b[1ma\x1b[0m" in text and "\x1b[2m····\x1b[0m" in text


def test_a_line_is_no_longer_than_the_screen():
    shot = Snapshot(0, 1, np.full(50, ord("x")), np.zeros(50, int), 1, np.zeros(50, bool), False, 50)
    rows = terminal.lines(shot, terminal.states(shot, None, MASK), TOKENIZER, 20, color=False)
    assert [len(row) for row in rows] == [20, 20, 10]
