"""What chance says before the network is asked: calls that are left out and rows that are not scored change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noising, reverse, samplers
from hdlm_jax.diffusion.rules import Move
from hdlm_jax.generation import moving, network
from hdlm_jax.generation.shaping import Shaping, shaper
from tests.generation.chains import (
    ABSORB,
    EPSILON_HYBRID,
    L,
    N,
    chain_of,
    generated,
    random_params,
)

FULL = {"visibility": "full"}
FLAT, SLOW_BLOCK = hyperschedules.flat(L, 18), hyperschedules.block(L, 6, "1/2")
PENALTY = shaper(Shaping(repetition_penalty=2.0), N)
CASES = {
    "acs, cached blocks": chain_of(SLOW_BLOCK, "shifted"),
    "ancestral, all rows": chain_of(FLAT, process=ABSORB, sampler=reverse.ancestral(ABSORB), **FULL),
    "guided, with a penalty": chain_of(FLAT, process=ABSORB, sampler=reverse.ancestral(ABSORB), **FULL)._replace(
        guidance=1.5, shape_logits=PENALTY
    ),
    "remdm, cached slide": chain_of(
        hyperschedules.slide(L, 6, 1), process=ABSORB, sampler=samplers.build("remdm_cap", ABSORB, eta=0.3)
    ),
}


def scored_at_once(chain):
    """The chain whose every call is made, and all of whose rows are scored."""
    return chain._replace(rule=chain.rule._replace(chance=None, draw=None))


@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_a_chain_that_makes_every_call_and_scores_every_row(name, monkeypatch):
    """In float64, where rounding does not decide a draw; rows of few texts and of all are scored on the way."""
    monkeypatch.setattr(moving, "SMALL_VOCABULARY", 1)
    chain, scored = CASES[name], set()
    monkeypatch.setattr(
        moving, "scores", lambda *of: scored.add(jax.tree.leaves(of[2])[0].shape[1]) or network.scores(*of)
    )
    with jax.enable_x64():
        params = random_params(chain.config, jnp.float64)
        run = functools.partial(generated, params=params, cached=chain.has_cache, frames=0)
        few = run(chain)
        counts = moving.row_counts(chain, chain.hs.width)
        assert scored == set(counts) and len(counts) > 1
        every = run(scored_at_once(chain))
    np.testing.assert_array_equal(few.x, every.x)
    assert int(every.calls) == chain.hs.num_steps
    assert int(few.calls) <= chain.hs.num_steps


def test_calls_in_which_no_text_draws_are_left_out():
    """A lone mask is drawn in one of many calls; a network that counts its calls is asked in that one."""
    hs = hyperschedules.flat(L, 64)
    chain = chain_of(hs, process=ABSORB, sampler=reverse.ancestral(ABSORB), **FULL)
    params, origins = random_params(chain.config), (L - 1,) * 3
    state = generated(chain, params, origins, cached=False, frames=0)
    assert (np.asarray(state.x) < N).all()
    frames = generated(scored_at_once(chain), params, origins, cached=False).frames.tokens
    steps = np.argwhere((np.diff(frames, axis=0) != 0).any(2))  # (step, text): when each text changed
    assert len(steps) == 3
    assert int(state.calls) == len(set(steps[:, 0]))


def test_a_record_holds_what_the_network_thinks_so_that_its_calls_are_made():
    chain = CASES["ancestral, all rows"]
    params = random_params(chain.config)
    state = generated(chain, params, cached=False)
    assert int(state.calls) == chain.hs.num_steps
    np.testing.assert_array_equal(state.x, generated(chain, params, cached=False, frames=0).x)


def test_how_many_rows_are_scored():
    """Twice and four times as many as a call settles, and so on; all of them for a small vocabulary or a hook."""
    large = chain_of(hyperschedules.flat(256, 128), process=noising.absorb(8192), sampler=reverse.ancestral(ABSORB))
    assert moving.row_counts(large, 256) == (4, 8, 32, 128, 256)
    assert moving.row_counts(large._replace(hs=hyperschedules.flat(256, 1024)), 256) == (1, 2, 8, 32, 128, 256)
    assert moving.row_counts(large._replace(hs=hyperschedules.block(256, 16, 8)), 16) == (16,)
    assert moving.row_counts(large._replace(every_row=True), 256) == (256,)
    assert moving.row_counts(chain_of(hyperschedules.flat(256, 128)), 256) == (256,)


@pytest.mark.parametrize(
    ("rule", "process"),
    [
        (samplers.build("ancestral", ABSORB), ABSORB),
        (samplers.build("ancestral", EPSILON_HYBRID), EPSILON_HYBRID),
        (samplers.build("acs", EPSILON_HYBRID, eta=0.5), EPSILON_HYBRID),
        (samplers.build("acs_published", EPSILON_HYBRID, eta=0.5), EPSILON_HYBRID),
        (samplers.build("remdm_rescale", ABSORB, eta=0.5), ABSORB),
        (samplers.build("remdm_switch", EPSILON_HYBRID, eta=0.5), EPSILON_HYBRID),
    ],
    ids=lambda of: of.name,
)
def test_a_step_is_its_chance_and_then_its_draw_at_any_of_the_positions(rule, process):
    """Positions that do not draw keep their tokens; those that do need no scores of the others."""
    W = 400
    rng = np.random.default_rng(0)
    alpha_t = jnp.asarray(rng.choice([0.2, 0.5, 0.8], W), jnp.float32)
    alpha_s = jnp.where(jnp.asarray(rng.random(W) < 0.2), 1.0, alpha_t + 0.1)
    move = Move(alpha_t, jnp.asarray(np.where(rng.random(W) < 0.2, alpha_t, alpha_s)), jnp.ones(W, bool))
    move = move._replace(changes=move.alpha_s > move.alpha_t)
    zt_W = jnp.asarray(rng.integers(0, N + 1, W), jnp.int32)
    logits_WxN = jnp.asarray(rng.normal(size=(W, N)), jnp.float32)
    zs_W, _ = rule.step(jax.random.key(5), zt_W, logits_WxN, move, None)
    chance = rule.chance(jax.random.key(5), zt_W, move)
    np.testing.assert_array_equal(zs_W[~chance.draws], zt_W[~chance.draws])
    some_K = np.flatnonzero(chance.draws)
    assert 20 < len(some_K) < W and not np.asarray(chance.draws)[~np.asarray(move.changes)].any()
    pick = lambda of: jax.tree.map(lambda y_W: y_W[some_K], of)
    np.testing.assert_array_equal(rule.draw(*map(pick, (chance, zt_W, logits_WxN, move))), zs_W[some_K])
