"""Figure of texts as rows of letters, one cell for each token, coloured by what became of it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from hdlm_jax.errors import require
from hdlm_jax.visual.figures import DARK

STATE_COLORS = ("#ffffff", "#f2b48c", "#d0d0d0", "#bcd6ea", "#c9dfc4")  # pale, so that letters are read on all of them
_CELL = 0.155, 0.24  # inches


def letters(
    texts: Sequence[Sequence[str]],
    state_RxL: ArrayLike,
    words: Sequence[str],
    labels: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draws R texts of L tokens below each other.

    Args:
      texts: [R, L], the sign of each token, of one character or two.
      state_RxL: integers, what became of each token.
      words: what states 0, 1, .. mean, at most 5; the legend.
      labels: of the rows, on the left.
      title: of the figure.

    Raises:
      UserError: states that do not fit the texts, or that have no word.

    >>> figure = letters(["abc", "a?c"], [[0, 0, 0], [0, 1, 0]], ["intact", "another token"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['a', 'b', 'c', 'a', '?', 'c']
    """
    state_RxL = np.asarray(state_RxL)
    R, L = len(texts), len(texts[0]) if len(texts) else 0
    fits = state_RxL.shape == (R, L) and all(len(text) == L for text in texts) and R * L > 0
    require(fits, "states", list(state_RxL.shape), f"one for each token of the texts [{R}, {L}]")
    known = state_RxL.min() >= 0 and state_RxL.max() < len(words) <= len(STATE_COLORS)
    require(
        known,
        "states",
        f"{state_RxL.min()} .. {state_RxL.max()}",
        f"those that words name, {len(STATE_COLORS)} at most",
    )
    wide, high = _CELL
    figure = Figure(figsize=(1.6 + wide * L, 0.9 + high * R), layout="constrained")
    panel = figure.subplots()
    panel.imshow(state_RxL, cmap=ListedColormap(STATE_COLORS), vmin=0, vmax=len(STATE_COLORS) - 1, aspect="auto")
    style = {"ha": "center", "va": "center", "fontsize": 9, "family": "monospace", "color": DARK}
    for row, text in enumerate(texts):
        for place, sign in enumerate(text):
            panel.text(place, row, sign, **style)
    panel.set_yticks(range(R), [*labels] or [""] * R, fontsize=9)
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.set_title(title, fontsize=10, loc="left")
    patches = [
        Patch(facecolor=color, edgecolor="#aaaaaa", label=word)
        for word, color in zip(words, STATE_COLORS, strict=False)
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(words), frameon=False, fontsize=9)
    return figure
