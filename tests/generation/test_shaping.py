"""Forbidden tokens, the repetition penalty, hooks and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion.categorical import filter_logits
from hdlm_jax.errors import UserError
from hdlm_jax.generation.shaping import Shaping, shaper

N = 5
SCORES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, N + 1)), jnp.float32).at[..., N].set(-jnp.inf)
TEXTS = jnp.array([[0, N, 3, N], [N, N, N, N]])


def test_by_default_nothing_changes():
    np.testing.assert_array_equal(shaper(Shaping(), N)(SCORES, TEXTS), SCORES)


def test_a_penalty_divides_the_probability_of_what_the_text_holds():
    p = lambda scores: np.asarray(jax.nn.softmax(scores[..., :N], -1))
    before, after = p(SCORES), p(shaper(Shaping(repetition_penalty=2.0), N)(SCORES, TEXTS))
    expected = before[0].copy()
    expected[:, [0, 3]] /= 2
    np.testing.assert_allclose(after[0], expected / expected.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])  # a text of masks holds no token


def test_forbidden_tokens_and_the_mask_are_never_drawn():
    shaped = shaper(Shaping(temperature=0.0, forbidden=(1, 4)), N)(SCORES, TEXTS)
    assert not np.isin(np.argmax(shaped, -1), [1, 4, N]).any()
    assert (np.isfinite(shaped).sum(-1) == 1).all()  # greedy


def test_a_hook_sees_ordinary_tokens_and_texts_and_comes_before_the_filters():
    def hook(logits_BxWxN, x_BxL):
        assert logits_BxWxN.shape == (2, 3, N) and x_BxL.shape == (2, 4)
        return logits_BxWxN - 3.0 * (jnp.arange(N) == 2)[None, None]

    shaped = shaper(Shaping(top_k=2, hook=hook), N)(SCORES, TEXTS)
    np.testing.assert_allclose(shaped, filter_logits(SCORES.at[..., 2].add(-3.0), top_k=2))


@pytest.mark.parametrize(
    ("shaping", "field"),
    [
        (Shaping(repetition_penalty=0.9), "sampler.repetition_penalty: got 0.9; allowed: a number >= 1"),
        (Shaping(forbidden=(N,)), f"forbid: got {N}; allowed: token ids in 0 .. {N - 1}"),
        (Shaping(forbidden=tuple(range(N))), "forbid: got '5 tokens'; allowed: not all of them"),
        (Shaping(top_p=0.0), "sampler.top_p: got 0.0"),
    ],
)
def test_bad_input_names_its_field(shaping, field):
    with pytest.raises(UserError, match=field):
        shaper(shaping, N)
