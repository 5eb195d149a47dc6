"""Texts as rows of letters: every token in its place, in the colour of its state."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hdlm_jax.errors import UserError
from hdlm_jax.visual import letters

WORDS = ["intact", "another token", "mask"]


def test_every_token_has_its_sign_and_the_colour_of_its_state():
    texts, state_RxL = ["ab↵d", "a··x", "····"], np.array([[0, 0, 0, 0], [0, 2, 2, 1], [2, 2, 2, 2]])
    figure = letters.letters(texts, state_RxL, WORDS, labels=["0", "1", "2"], title="noised")
    panel = figure.axes[0]
    found = {text.get_position(): text.get_text() for text in panel.texts}
    assert found == {(i, r): sign for r, text in enumerate(texts) for i, sign in enumerate(text)}
    image = panel.images[0]
    assert np.array_equal(image.get_array(), state_RxL)
    shown = {state: to_hex(image.cmap(image.norm(state))) for state in range(len(WORDS))}
    legend = figure.legends[0]
    told = {
        text.get_text(): to_hex(patch.get_facecolor())
        for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert told == {word: shown[state] for state, word in enumerate(WORDS)}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "2"]
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("texts", "states", "message"),
    [
        (["ab"], [[0, 0, 0]], r"states: got \[1, 3\]; allowed: one for each token of the texts \[1, 2\]"),
        (["ab", "a"], [[0, 0], [0, 0]], r"states: got \[2, 2\]"),
        ([], np.zeros((0, 0), int), r"states: got \[0, 0\]"),
        (["ab"], [[0, 3]], "states: got '0 .. 3'; allowed: those that words name"),
        (["ab"], [[-1, 0]], "states: got '-1 .. 0'"),
    ],
)
def test_states_that_do_not_fit_are_refused(texts, states, message):
    with pytest.raises(UserError, match=f"^{message}"):
        letters.letters(texts, states, WORDS)
