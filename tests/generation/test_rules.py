"""The samplers' rules through generation: under every loop no mask is left, what is given stays, calls are saved."""

import jax
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noise_schedules, samplers
from tests.generation.chains import ABSORB, ORIGINS, L, N, chain_of, generated, given, prior_texts, random_params

FLAT, BLOCK, SLIDE = hyperschedules.flat(L, 6), hyperschedules.block(L, 4, 1), hyperschedules.slide(L, 4, 1)
FULL = {"visibility": "full"}
CASES = {
    "confidence, all rows": ("confidence", {"order_temperature": 0.5}, FLAT, FULL),
    "threshold, blocks of all rows": ("threshold", {"threshold": 0.3}, BLOCK, FULL),
    "factor, cached blocks": ("factor", {"factor": 3.0}, BLOCK, {}),
    "remdm_conf, cached slide": ("remdm_conf", {}, SLIDE, {}),
    "remdm_loop, all rows": ("remdm_loop", {"eta": 0.5, "t_on": 0.8, "t_off": 0.2}, FLAT, FULL),
    "mask_predict, cached slide": ("mask_predict", {}, SLIDE, {}),
    "first_hitting, cached blocks": ("first_hitting", {}, BLOCK, {}),
}
FIRST = {"confidence, all rows", "factor, cached blocks", "remdm_conf, cached slide"}


def chain(kind, dials, hs, model):
    rule = samplers.build(kind, ABSORB, **dials)
    schedule = noise_schedules.linear() if rule.warp is None else rule.warp(noise_schedules.linear())
    return chain_of(hs, process=ABSORB, sampler=rule, schedule=schedule, hidden=8, blocks=1, **model)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in CASES])
def test_texts_are_finished(name):
    made = chain(*CASES[name])
    state = generated(made, random_params(made.config), cached=made.has_cache)
    state = jax.tree.map(np.asarray, state)
    assert state.x.min() >= 0 and state.x.max() < N
    given_BxL = np.asarray(given())
    np.testing.assert_array_equal(state.x[given_BxL], np.asarray(prior_texts(ABSORB))[given_BxL])
    before, after = state.frames.tokens[:-1], state.frames.tokens[1:]
    masked_again = (before != N) & (after == N)
    assert masked_again.any() == (made.rule.name.startswith("remdm") or made.rule.name == "mask_predict")
    assert (state.calls < made.hs.num_steps) == (made.rule.name in ("threshold", "factor"))
    if made.rule.memory is not None:
        active = np.arange(L) >= np.array(ORIGINS)[:, None]
        assert (state.memory[active] > 0).all(), "every token was placed with some probability"
