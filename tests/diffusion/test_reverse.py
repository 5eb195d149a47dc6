"""Reverse steps: tables against the oracle, draws against tables, and finished texts against the data law."""

import functools
import itertools

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import noising, reverse
from tests.oracle import hdlm_oracle as oracle

N, EPSILON = 3, 0.2
V = N + 1
ETAS = (0.0, 0.3, 1.0)
EPSILON_HYBRID = noising.epsilon_hybrid(N, EPSILON)
SAMPLERS = {
    "ancestral absorb": lambda: reverse.ancestral(noising.absorb(N)),
    "ancestral uniform": lambda: reverse.ancestral(noising.uniform(N)),
    "ancestral gamma": lambda: reverse.ancestral(noising.gamma_hybrid(N, 0.3)),
    "ancestral epsilon": lambda: reverse.ancestral(EPSILON_HYBRID),
    "acs 0.3": lambda: reverse.acs(EPSILON_HYBRID, 0.3),
    "acs 1 cavity": lambda: reverse.acs(EPSILON_HYBRID, 1.0, "cavity"),
    "acs_published": lambda: reverse.acs_published(EPSILON_HYBRID, 0.3),
}
PAIRS = [
    (0.0, 0.3),
    (0.3, 0.8),
    (0.8, 0.8),
    (0.5, 1.0),
    (0.0, 1.0),
    (EPSILON_HYBRID.alpha_max, 1.0),
    (1.0, 1.0),
]


def rows(rng, dtype=np.float32):
    """Every token that can happen under every alpha pair, with random x0 probabilities."""
    happens = lambda z, alpha_t: alpha_t < 0.9 if z == N else alpha_t > 0
    table = [(z, at, a_s) for at, a_s in PAIRS for z in range(V) if happens(z, at)]
    zt, alpha_t, alpha_s = (np.array(column) for column in zip(*table, strict=True))
    probs = rng.dirichlet(np.ones(N), len(zt)).astype(dtype)
    return zt.astype(np.int32), probs, alpha_t.astype(dtype), alpha_s.astype(dtype)


def tables(sampler, zt, probs, alpha_t, alpha_s):
    """The kernel's tables [R, V], float64; padded to 32 rows, so that a sampler is compiled once."""
    pad = lambda column: np.concatenate([column, np.repeat(column[:1], 32 - len(column), 0)])
    columns = (pad(np.asarray(column)) for column in (zt, probs, alpha_t, alpha_s))
    table_RxV = vmapped(sampler.kernel)(*columns)
    assert table_RxV.dtype == jax.dtypes.canonicalize_dtype(probs.dtype)
    return np.asarray(table_RxV, float)[: len(zt)]


vmapped = functools.cache(lambda kernel: jax.jit(jax.vmap(kernel)))
jitted = functools.cache(jax.jit)
acs = functools.cache(functools.partial(reverse.acs, EPSILON_HYBRID))
# Every eta under the default reading, and every reading.
ACS = [*((eta, "hybrid") for eta in ETAS), (0.3, "cavity"), (0.3, "posterior")]


def published_table(z, p, alpha_t, alpha_s, eta):
    """The oracle's step from alpha_t to alpha_s."""
    return oracle.acs_step(z, p, (alpha_s - alpha_t) / (1 - alpha_t), eta)


def expected_acs(reading, eta, z, p, alpha_t, alpha_s):
    """The exact table [V]: the oracle's step from the smoothed posterior, or the posterior at the end."""
    if alpha_t == alpha_s:
        return np.eye(V)[z]
    t = oracle.ZERO_PLUS if alpha_t > 0.9 else -np.log(max(alpha_t, 1e-300))
    network = p if reading != "hybrid" else p / ((np.arange(N) == z) + 1 / N)
    read = oracle.restrict if reading == "posterior" else oracle.cavity_to_posterior
    posterior = read(oracle.Epsilon(N, EPSILON), t, z, network)
    smooth = (1 - EPSILON) * posterior + EPSILON / N
    return np.append(posterior, 0) if alpha_s == 1 else published_table(z, smooth, alpha_t, alpha_s, eta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("eta", "reading"), ACS)
def test_acs_tables_are_the_oracles_on_the_smoothed_posterior(eta, reading, dtype):
    columns = rows(np.random.default_rng(0), dtype)
    with jax.enable_x64(dtype == np.float64):
        ours = tables(acs(eta, reading), *columns)
    theirs = [
        expected_acs(reading, eta, z, *row)
        for z, *row in zip(columns[0], *(c.astype(float) for c in columns[1:]), strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, atol=2e-6 if dtype == np.float32 else 1e-12)


def test_published_acs_is_the_oracles_on_the_raw_output():
    columns = rows(np.random.default_rng(1))
    ours = tables(reverse.acs_published(EPSILON_HYBRID, 0.3), *columns)
    for row, z, p, alpha_t, alpha_s in zip(ours, columns[0], *(c.astype(float) for c in columns[1:]), strict=True):
        if alpha_t < 0.9:
            still = alpha_t == alpha_s
            expected = np.eye(V)[z] if still else published_table(z, p, alpha_t, alpha_s, 0.3)
            np.testing.assert_allclose(row, expected, atol=2e-6)


@pytest.mark.parametrize("reading", noising.READINGS)
def test_without_correction_acs_is_ancestral(reading):
    columns = rows(np.random.default_rng(2))
    ancestral = tables(reverse.ancestral(EPSILON_HYBRID, reading), *columns)
    np.testing.assert_allclose(ancestral, tables(acs(0.0, reading), *columns), atol=2e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_follow_the_table(name):
    """Also: positions with equal alphas keep their token; what the table excludes never happens."""
    sampler, draws = SAMPLERS[name](), 10_000
    columns = zt, probs, alpha_t, alpha_s = rows(np.random.default_rng(3))
    law_RxV = tables(sampler, *columns)
    logits_RxV = np.concatenate([np.log(probs), np.full((len(zt), 1), -np.inf)], -1, dtype=np.float32)
    wide = lambda x: np.broadcast_to(x, (draws, *x.shape))
    zs = jax.jit(sampler.step)(jax.random.key(4), wide(zt), wide(logits_RxV), wide(alpha_t), wide(alpha_s))
    assert zs.dtype == zt.dtype
    zs, still = np.asarray(zs), alpha_t == alpha_s
    np.testing.assert_array_equal(zs[:, still], wide(zt)[:, still])
    for draws_of_row, law in zip(zs.T, law_RxV, strict=True):
        assert_follows(np.bincount(draws_of_row, minlength=V), law)


def assert_follows(counts, law, level=1e-5):
    """Chi-square of counts against a law; what has probability 0 must not occur at all."""
    possible = law > 1e-6
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = law[possible] / law[possible].sum() * counts.sum()
        assert chisquare(counts[possible], expected).pvalue > level


def test_a_row_is_the_same_alone_and_in_a_batch_of_keys_and_with_or_without_the_masks_column():
    step = reverse.acs(EPSILON_HYBRID, 0.5).step
    zt, alpha_t, alpha_s = (
        np.arange(8, dtype=np.int32).reshape(2, 4) % V,
        np.full((2, 4), 0.3),
        np.full((2, 4), 0.6),
    )
    logits = np.random.default_rng(0).normal(size=(2, 4, N)).astype(np.float32)
    rngs = jax.random.split(jax.random.key(1), 2)
    batch = jax.jit(jax.vmap(step))(rngs, zt, logits, alpha_t, alpha_s)
    with_mask = np.concatenate([logits, np.full((2, 4, 1), -np.inf, np.float32)], -1)
    alone = jax.jit(step)(rngs[1], zt[1], with_mask[1], alpha_t[1], alpha_s[1])
    np.testing.assert_array_equal(batch[1], alone)


# ---- the laws that make the samplers exact


@pytest.mark.parametrize(("eta", "reading"), ACS)
def test_acs_keeps_the_marginals_by_algebra(eta, reading):
    """From q(z_t) of a random data law and the network that is exact under the reading, to q(z_s)."""
    data_N = np.random.default_rng(8).dirichlet(np.ones(N))
    for at, a_s in [(0.0, 0.2), (0.2, 0.7), (0.7, EPSILON_HYBRID.alpha_max), (0.4, 1.0)]:
        network_VxN = np.array([network_output(data_N, z, reading) for z in range(V)])
        full = lambda alpha: np.full(V, alpha, np.float32)
        table_VxV = tables(acs(eta, reading), np.arange(V, dtype=np.int32), network_VxN, full(at), full(a_s))
        np.testing.assert_allclose(data_law(data_N, at) @ table_VxV, data_law(data_N, a_s), atol=1e-6)


def data_law(data_N, alpha):
    """q(z) [V] for one position with this data law."""
    share = (1 - EPSILON) * data_N + EPSILON / N if alpha < 1 else data_N
    return np.append(alpha * share, 1 - alpha)


def network_output(xbar_N, z, reading):
    """The exact network under a reading, for a position whose law given the others is `xbar`."""
    own = (1 - EPSILON) * (np.arange(N) == z) + EPSILON / N
    factor = {"cavity": np.ones(N), "posterior": own, "hybrid": (np.arange(N) == z) + 1 / N}[reading]
    network = xbar_N * (factor if z < N else 1)
    return (network / network.sum()).astype(np.float32)


def run(step, steps, logits_of):
    """Draws the chain of pairs int32 [20000, 2] from pure noise; `logits_of(k, z)` is the network."""
    z = np.full((20_000, 2), N, np.int32)
    for k, levels in enumerate(itertools.pairwise(steps)):
        alpha_t, alpha_s = (np.broadcast_to(np.array(level, np.float32), (1, 2)) for level in levels)
        z = np.asarray(jitted(step)(jax.random.key(k), z, logits_of(k, z).astype(np.float32), alpha_t, alpha_s))
    return z


def test_acs_keeps_the_marginals_by_sampling_and_the_published_form_does_not():
    """Twelve steps from pure noise, the exact network of single positions; short of the last step."""
    data_N = np.array([0.7, 0.25, 0.05])
    log_network = np.log([network_output(data_N, z, "hybrid") for z in range(V)])

    def p_value(sampler):
        z = run(sampler.step, np.linspace(0, 0.95, 13), lambda k, z: log_network[z])
        return chisquare(np.bincount(z.ravel(), minlength=V), data_law(data_N, 0.95) * z.size).pvalue

    assert min(p_value(acs(eta, "hybrid")) for eta in ETAS) > 1e-4
    assert p_value(reverse.acs_published(EPSILON_HYBRID, 0.3)) < 1e-9


# Two tokens with a joint law; the true posterior of each, given the other at its level.
JOINT = np.random.default_rng(12).dirichlet(np.full(N * N, 0.6)).reshape(N, N)
ONE_AFTER_ANOTHER = [(0, 0), (0.4, 0), (0.8, 0), (1, 0), (1, 0.2), (1, 0.2), (1, 0.9), (1, 1)]


def true_network(alpha_0, alpha_1, reading):
    """[V * V, 2, N]: the exact network's output for every pair of tokens at these alphas."""
    noised = lambda alpha: np.array([data_law(np.eye(N)[x], alpha) for x in range(N)])  # [x, z]
    q0, q1 = noised(alpha_0), noised(alpha_1)
    out = np.zeros((V, V, 2, N), np.float32)
    for z0, z1 in itertools.product(range(V), range(V)):
        for place, xbar, z in ((0, JOINT @ q1[:, z1], z0), (1, q0[:, z0] @ JOINT, z1)):
            xbar = xbar if xbar.sum() > 0 else np.ones(N)
            out[z0, z1, place] = network_output(xbar / xbar.sum(), z, reading)
    return out.reshape(V * V, 2, N)


def exact_final_law(sampler, steps, reading):
    """[N * N]: the law of the finished pairs, by multiplying the tables of all steps."""
    z0, z1 = (x.ravel().astype(np.int32) for x in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
    law, full = np.eye(V * V)[-1], lambda alpha: np.full(V * V, alpha, np.float32)
    for before, after in itertools.pairwise(steps):
        network = true_network(*before, reading)
        t0, t1 = (tables(sampler, z, network[:, i], full(before[i]), full(after[i])) for i, z in enumerate((z0, z1)))
        law = np.einsum("r,ra,rb->ab", law, t0, t1).ravel()
    return law.reshape(V, V)[:N, :N].ravel()


@pytest.mark.parametrize(("eta", "reading"), ACS)
def test_finished_tokens_follow_the_data_law_exactly_when_one_position_changes_at_a_time(eta, reading):
    law = exact_final_law(acs(eta, reading), ONE_AFTER_ANOTHER, reading)
    np.testing.assert_allclose(law, JOINT.ravel(), atol=2e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_finished_tokens_of_drawn_steps_follow_the_data_law(eta):
    networks = [np.log(true_network(*level, "hybrid")) for level in ONE_AFTER_ANOTHER]
    z = run(acs(eta, "hybrid").step, ONE_AFTER_ANOTHER, lambda k, z: networks[k][z[:, 0] * V + z[:, 1]])
    assert_follows(np.bincount(z[:, 0] * N + z[:, 1], minlength=N * N), JOINT.ravel())


def test_together_they_approach_the_data_law_as_steps_grow_and_the_published_form_does_not():
    """Both positions at once: the error falls with the number of steps to the order of epsilon squared."""

    def error(sampler, steps):
        levels = [(alpha, alpha) for alpha in np.linspace(0, 1, steps + 1)]
        return np.abs(exact_final_law(sampler, levels, "hybrid") - JOINT.ravel()).sum() / 2

    coarse, fine = error(acs(0.3, "hybrid"), 2), error(acs(0.3, "hybrid"), 40)
    assert fine < 0.5 * coarse
    assert fine < 0.5 * error(reverse.acs_published(EPSILON_HYBRID, 0.3), 40)


def test_an_absorb_network_is_finished_by_its_own_chain():
    """Two steps a position, absorb: with the exact network at masks the texts follow the data law."""
    first, second = np.log(JOINT.sum(1)), np.log(JOINT)

    def logits_of(k, z):
        given_first = second[np.minimum(z[:, 0], N - 1)]
        return np.stack([np.broadcast_to(first, given_first.shape), given_first], 1)

    step = reverse.ancestral(noising.absorb(N)).step
    z = run(step, [(0, 0), (0.3, 0), (1, 0), (1, 0.6), (1, 1)], logits_of)
    assert_follows(np.bincount(z[:, 0] * N + z[:, 1], minlength=N * N), JOINT.ravel())
