"""Texts past the trained length: every part is a generation after the last half of what there was."""

import jax
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.generation import continuation, sampling
from hdlm_jax.models.transformer import init
from tests.generation.test_sampling import TOKENIZER, L, _compiled_fast, experiment  # noqa: F401


def test_every_part_is_generated_after_the_last_half_of_the_text():
    parts, sampler = experiment()
    params = init(parts.model, jax.random.key(0))
    first = sampling.chain(parts, hyperschedules.slide(L, 4, 2), sampler)
    further = sampling.chain(parts, hyperschedules.slide(continuation.stride(L), 4, 2), sampler)
    out = continuation.draw(first, further, params, TOKENIZER, ["ab", ""], 18, seed=3)
    assert out.tokens.shape == (2, 18)
    assert out.texts[0].startswith("ab")
    plain = sampling.draw(first, params, TOKENIZER, ["ab", ""], L, seed=3)
    np.testing.assert_array_equal(out.tokens[:, :L], plain.tokens)
    rng_B = jax.vmap(lambda rng: jax.random.fold_in(rng, 1))(sampling.keys(3, 2))
    given = np.broadcast_to(np.arange(L)[None] < 5, (2, L))
    after = sampling.complete(further, params, np.pad(plain.tokens[:, 5:], ((0, 0), (0, 5))), given, 5, rng_B)
    np.testing.assert_array_equal(out.tokens[:, L : L + 5], after.x[:, 5:])
    assert out.calls == first.hs.num_steps + 2 * further.hs.num_steps


def test_no_part_is_added_to_texts_that_have_ended():
    parts, sampler = experiment()
    params = init(parts.model, jax.random.key(0))
    plain = sampling.draw(sampling.chain(parts, hyperschedules.slide(L, 4, 2), sampler), params, TOKENIZER, [""], L)
    first, further = (
        sampling.chain(parts, hyperschedules.slide(length, 4, 2), sampler, end=int(plain.tokens[0, 4]))
        for length in (L, continuation.stride(L))
    )
    out = continuation.draw(first, further, params, TOKENIZER, [""], 40)
    assert out.lengths[0] <= 5 and out.tokens.shape == (1, L)


@pytest.mark.parametrize(
    ("overrides", "hs", "field"),
    [
        ({}, hyperschedules.flat(L, 4), "length: got 12; allowed: 1 .. 10"),
        (
            {"model__visibility": "full", "hyperschedule__kind": "flat", "hyperschedule__width": None}
            | {"hyperschedule__rate": None},
            hyperschedules.block(L, 2, 1),
            "length: got 12",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(overrides, hs, field):
    parts, _ = experiment(**overrides)
    with pytest.raises(UserError, match=field):
        continuation.check(parts, hs, L + 2, None, False)
