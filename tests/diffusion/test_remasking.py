"""Re-masking: draws against the oracle's tables, marginals against the noising process, and what is remembered."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import noising, remasking
from hdlm_jax.diffusion.rules import Move
from tests.oracle import hdlm_oracle as oracle

N, EPSILON, DRAWS = 3, 0.2, 4_000
V = N + 1
ABSORB, EPSILON_HYBRID = noising.absorb(N), noising.epsilon_hybrid(N, EPSILON)
RULES = {
    "remdm_cap": (functools.partial(remasking.remdm_cap, eta=0.2), ("cap", 0.2)),
    "remdm_rescale": (functools.partial(remasking.remdm_rescale, eta=0.3), ("rescale", 0.3)),
    "remdm_conf": (remasking.remdm_conf, None),
    "remdm_switch": (functools.partial(remasking.remdm_switch, eta=0.2, t_switch=0.55), ("cap", 0.2)),
    "remdm_loop": (functools.partial(remasking.remdm_loop, eta=0.05), ("cap", 0.05)),
}
# a window in which every position has its own alphas: masks and tokens, a first call, a rest, a last call, and
# one that does not change
ZT_W = np.array([N, N, 0, 1, N, 2, N, 1, 2, N], np.int32)
ALPHA_T = np.array([0.0, 0.3, 0.3, 0.6, 0.9, 0.9, 0.7, 0.7, 0.5, 0.5], np.float32)
ALPHA_S = np.array([0.2, 0.5, 0.5, 0.95, 0.9, 0.9, 1.0, 1.0, 0.8, 0.8], np.float32)
CHANGES = np.array([True] * 8 + [False] * 2)
MEMORY_W = np.array([0, 0, 0.9, 0.2, 0, 0.5, 0, 0.4, 0.7, 0], np.float32)
MOVE = Move(ALPHA_T, ALPHA_S, CHANGES)


@functools.cache
def stepper(name, process):
    """(seed, zt [DRAWS, W], logits [DRAWS, W, V], move, memory) -> next tokens and memory; compiled once a rule."""
    rule = RULES[name][0](process)
    axes = (0, 0, 0, None, None if rule.memory is None else 0)
    run = lambda rng, *row: jax.vmap(rule.step, axes)(jax.random.split(rng, DRAWS), *row)
    run = jax.jit(run)
    return lambda seed, *row: jax.tree.map(np.asarray, run(jax.random.key(seed), *row))


def wide(row):
    return np.broadcast_to(row, (DRAWS, *row.shape))


@functools.cache
def drawn(name, process):
    """Next tokens and memory [DRAWS, W] of the window, and the probabilities that the network gives [W, N]."""
    probs_WxN = np.random.default_rng(0).dirichlet(np.ones(N), len(ZT_W)).astype(np.float32)
    logits_WxV = np.concatenate([np.log(probs_WxN), np.full((len(ZT_W), 1), np.inf, np.float32)], 1)
    memory = wide(MEMORY_W) if name == "remdm_conf" else None
    return *stepper(name, process)(1, wide(ZT_W), wide(logits_WxV), MOVE, memory), probs_WxN


def expected_sigma(name):
    """[W] by the oracle, one position at a time, as if its alphas were the window's."""
    at, a_s = ALPHA_T.astype(float), ALPHA_S.astype(float)
    sigma_W = np.zeros(len(ZT_W))
    for i in range(len(ZT_W)):
        if name == "remdm_conf":
            psi_W = np.where(CHANGES, MEMORY_W, np.inf)
            seen_W = np.where(CHANGES, ZT_W, N)
            sigma_W[i] = oracle.remdm_sigma(a_s[i], at[i], "conf", psi=psi_W, z=seen_W, N=N, base="max")[i]
        else:
            sigma_W[i] = oracle.remdm_sigma(a_s[i], at[i], *RULES[name][1])
    on = {"remdm_switch": 1 - at < 0.55, "remdm_loop": at == a_s}.get(name, np.ones(len(ZT_W), bool))
    return np.where(on, sigma_W, 0)


def expected_law(name, process, probs_WxN):
    """[W, V] by the oracle."""
    smooth = probs_WxN.astype(float) * (1 - process.epsilon) + process.epsilon / N
    rows = []
    for i, sigma in enumerate(expected_sigma(name)):
        row = oracle.remdm_step(ZT_W[i], smooth[i], float(ALPHA_S[i]), float(ALPHA_T[i]), sigma)
        if ALPHA_S[i] == 1 and (ZT_W[i] == N or process.epsilon > 0):  # exact: the posterior, without smoothing
            read = probs_WxN[i].astype(float)
            if ZT_W[i] < N:  # the default reading, hybrid: p ∝ p_w ((1 - eps) 1[z] + eps / N) / (1[z] + 1 / N)
                own = np.arange(N) == ZT_W[i]
                read = read * ((1 - EPSILON) * own + EPSILON / N) / (own + 1 / N)
            row = np.append(read / read.sum(), 0)
        rows.append(row if CHANGES[i] else np.eye(V)[ZT_W[i]])
    return np.array(rows)


# the rules differ in sigma alone: under epsilon_hybrid one of them stands for all in the first tier
CASES = [
    *(pytest.param(name, ABSORB) for name in RULES),
    pytest.param("remdm_loop", EPSILON_HYBRID),
    *(pytest.param(name, EPSILON_HYBRID, marks=pytest.mark.slow) for name in RULES if name != "remdm_loop"),
]
CASES_OF_MARGINALS = [case for case in CASES if case.values[0] != "remdm_conf"]  # its sigma depends on the tokens


@pytest.mark.parametrize(("name", "process"), CASES, ids=lambda x: getattr(x, "name", x))
def test_draws_follow_the_oracles_table_at_every_positions_own_alphas(name, process):
    zs, _, probs_WxN = drawn(name, process)
    assert zs.dtype == ZT_W.dtype
    for column, law in zip(zs.T, expected_law(name, process, probs_WxN), strict=True):
        counts, possible = np.bincount(column, minlength=V), law > 1e-7
        assert counts[~possible].sum() == 0
        if possible.sum() > 1:
            assert chisquare(counts[possible], law[possible] / law[possible].sum() * DRAWS).pvalue > 1e-5


def test_confidence_is_remembered_where_a_token_is_placed_and_forgotten_where_it_is_masked():
    zs, memory, probs_WxN = drawn("remdm_conf", ABSORB)
    placed = CHANGES & (ZT_W == N) & (zs < N)
    own = np.take_along_axis(wide(probs_WxN), np.minimum(zs, N - 1)[..., None], 2)
    np.testing.assert_allclose(memory[placed], own[..., 0][placed], rtol=1e-5)
    assert (memory[CHANGES & (zs == N)] == 0).all()
    stays = np.broadcast_to(~CHANGES | (ZT_W < N), zs.shape) & (zs < N)
    np.testing.assert_array_equal(memory[stays], np.broadcast_to(MEMORY_W, zs.shape)[stays])
    assert placed[:, :2].any() and (CHANGES & (ZT_W < N) & (zs == N)).any()


def test_confidence_is_the_networks_own_and_not_that_of_filtered_logits():
    rule = remasking.remdm_conf(ABSORB)
    scores_WxN = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    greedy_WxN = jnp.where(jnp.arange(N)[None] == 0, 0.0, -jnp.inf)
    move = Move(jnp.zeros(1), jnp.ones(1), jnp.ones(1, bool))
    z_W, memory_W = rule.step(jax.random.key(0), jnp.array([N]), greedy_WxN, move, jnp.zeros(1), scores_WxN)
    assert (z_W.tolist(), memory_W.tolist()) == ([0], pytest.approx([0.5]))


@pytest.mark.parametrize(("name", "process"), CASES_OF_MARGINALS, ids=lambda x: getattr(x, "name", x))
def test_the_marginals_are_kept(name, process):
    """Eight steps from pure noise to 0.9, a rest there, two more; independent positions and their exact network."""
    data_N, epsilon = np.array([0.7, 0.25, 0.05]), process.epsilon
    hybrid = [data_N * ((np.arange(N) == z) + 1 / N) if epsilon and z < N else data_N for z in range(V)]
    logits_VxV = np.log(np.array([np.append(row / row.sum(), 1) for row in hybrid])).astype(np.float32)
    z, alphas = np.full((DRAWS, len(ZT_W)), N, np.int32), [*np.linspace(0, 0.9, 9), 0.9, 0.9, 0.92, 0.96]
    for k, (at, a_s) in enumerate(itertools.pairwise(alphas)):
        full = lambda alpha: np.full(len(ZT_W), alpha, np.float32)
        z, _ = stepper(name, process)(k, z, logits_VxV[z], Move(full(at), full(a_s), full(1) > 0), None)
    share = (1 - epsilon) * data_N + epsilon / N
    law = np.append(alphas[-1] * share, 1 - alphas[-1])
    assert chisquare(np.bincount(z.ravel(), minlength=V), law * z.size).pvalue > 1e-4


def test_without_masking_again_it_is_the_ancestral_chain():
    move = Move(ALPHA_T, ALPHA_S, CHANGES & (ALPHA_S > ALPHA_T))
    nothing = jnp.zeros(len(ZT_W))
    expected = np.where(ALPHA_S == 1, 1, (ALPHA_S - ALPHA_T) / (1 - ALPHA_T))
    np.testing.assert_allclose(remasking.unmasking(ABSORB, move, nothing), expected, rtol=1e-6)


def test_sigma_is_at_most_what_the_marginals_allow():
    ours = remasking.largest_sigma(ABSORB, MOVE)
    theirs = [oracle.remdm_sigma(float(a_s), float(at), "max") for a_s, at in zip(ALPHA_S, ALPHA_T, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
