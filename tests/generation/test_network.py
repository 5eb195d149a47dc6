"""Classifier-free guidance: two passes, of what is given and of masks in its place."""

import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import phases
from hdlm_jax.diffusion.hyperschedules import flat
from hdlm_jax.generation import network
from tests.generation.chains import (
    ABSORB,
    ORIGINS,
    L,
    N,
    chain_of,
    given,
    jit,
    noised_texts,
    random_params,
    recomputed_scores,
)

STEP = jnp.int32(1)


def scores(chain, params, x_BxL, given_BxL):
    run = jit(lambda p, x, g: recomputed_scores(chain, p, x, g, STEP)[1])
    scores_BxLxV = np.asarray(run(params, x_BxL, given_BxL))
    assert (scores_BxLxV[..., N:] == -np.inf).all()
    return scores_BxLxV[..., :N]


@pytest.mark.parametrize("conditioning", [0, 8])
def test_guidance_weighs_scores_with_and_without_what_is_given(conditioning):
    plain = chain_of(flat(L, 4), process=ABSORB, visibility="full", conditioning=conditioning)
    params, x_BxL, given_BxL = random_params(plain.config), noised_texts(plain.hs)[1], given(ORIGINS)
    with_it = scores(plain, params, x_BxL, given_BxL)
    masked_BxL = jnp.where(given_BxL, ABSORB.mask, x_BxL)
    if conditioning:  # of what is given, the network then sees the noise level of a mask
        level = lambda step: jnp.where(given_BxL, plain.hs.tau_max, plain.hs.levels_at(step)[None])
        phase = phases.at_step(jnp.full(3, STEP), jnp.zeros(3, int), L, plain.hs, plain.schedule, 1.0)
        phase = phase._replace(alpha_t=plain.alpha(level(STEP)))
        rows = lambda p: network.scores(plain, p, network.all_rows(plain, p, masked_BxL, phase))
        without = np.asarray(jit(rows)(params))[..., :N]
    else:
        without = scores(plain, params, masked_BxL, jnp.zeros_like(given_BxL))
    guided = scores(plain._replace(guidance=1.5), params, x_BxL, given_BxL)
    np.testing.assert_allclose(guided, without + 2.5 * (with_it - without), rtol=1e-4, atol=1e-4)
    assert np.abs(guided - with_it)[1:].max() > 0.1


def test_without_a_prompt_guidance_changes_nothing():
    plain = chain_of(flat(L, 4), process=ABSORB, visibility="full")
    params, x_BxL, nothing = random_params(plain.config), noised_texts(plain.hs)[1], jnp.zeros((3, L), bool)
    guided = scores(plain._replace(guidance=2.0), params, x_BxL, nothing)
    np.testing.assert_allclose(guided, scores(plain, params, x_BxL, nothing), atol=1e-5)
