"""Noising processes against the oracle, against brute force, and against their own law."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import chisquare

from hdlm_jax.diffusion import noising
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

N = 5
CASES = {
    "absorb": (lambda: noising.absorb(N), oracle.Absorb(N)),
    "uniform": (lambda: noising.uniform(N), oracle.Uniform(N)),
    "gamma": (lambda: noising.gamma_hybrid(N, 0.3), oracle.Gamma(N, 0.3)),
    "epsilon": (lambda: noising.epsilon_hybrid(N, 0.1), oracle.Epsilon(N, 0.1)),
}
SMALL = {
    "small gamma": (lambda: noising.gamma_hybrid(N, 0.01), oracle.Gamma(N, 0.01)),
    "small epsilon": (lambda: noising.epsilon_hybrid(N, 0.01), oracle.Epsilon(N, 0.01)),
}
FLOATS = {"float32": 2e-6, "float64": 1e-12}


def time_of(process, alpha):
    """The oracle's time at a survival: sigma, and its 0+ for the atom."""
    if process.alpha_max <= alpha < 1:
        return oracle.ZERO_PLUS
    return np.inf if alpha == 0 else 0.0 - math.log(alpha)


def alpha_pairs(process, rng, count=24):
    """(alpha_t, alpha_s) as exact float32 values: all over (0, 1), near its ends, at them and at the atom."""
    low, high = np.sort(rng.uniform(0, 1, (2, count)), axis=0)
    near = 10.0 ** rng.uniform(-6, -2, (2, count // 4))
    ends = [
        (0.0, 1.0),
        (0.0, 0.4),
        (0.6, 1.0),
        (0.0, 1e-6),
        (0.3, process.alpha_max),
        (process.alpha_max, 1.0),
    ]
    pairs = [*zip(low, high, strict=True), *zip(1 - near[0] - near[1], 1 - near[0], strict=True), *ends]
    return np.array([pair for pair in pairs if pair[0] < pair[1]], np.float32).astype(float)


def grid(process, chain, rng):
    """Every (alpha pair, zt, x0) that can happen, with random x0 probabilities."""
    rows = []
    for alpha_t, alpha_s in alpha_pairs(process, rng):
        possible = oracle.marginal_table(chain, time_of(process, alpha_t)).T > 0
        rows += [(alpha_t, alpha_s, zt, x0) for zt, x0 in zip(*np.nonzero(possible), strict=True)]
    alpha_t, alpha_s, zt, x0 = (np.array(column) for column in zip(*rows, strict=True))
    return alpha_t, alpha_s, zt, x0, rng.dirichlet(np.full(N, 0.5), len(zt))


def our_tables(process, dtype, alpha_t, alpha_s, zt, x0, probs):
    """All tables of the grid's rows, in float `dtype`."""

    def tables(at, a_s, z, x, p):
        of_reading = {r: process.reverse(z, p, at, a_s, r) for r in process.readings}
        posteriors = {f"p({r})": noising.to_posterior(process, z, p, at, r) for r in process.readings}
        return {
            "marginal": process.marginal(x, at),
            "transition": process.transition(z, a_s, at),
            "likelihood": process.likelihood(z, at),
            "posterior": process.posterior(z, x, at, a_s),
            **{f"reverse({r})": table for r, table in of_reading.items()},
            **posteriors,
        }

    floats = (jnp.asarray(v, dtype) for v in (alpha_t, alpha_s))
    out = jax.jit(jax.vmap(tables))(*floats, jnp.asarray(zt), jnp.asarray(x0), jnp.asarray(probs, dtype))
    assert {table.dtype for table in out.values()} == {jnp.dtype(dtype)}
    return {name: np.asarray(table, float) for name, table in out.items()}


def their_tables(process, chain, alpha_t, alpha_s, zt, x0, probs):
    """The same tables from the oracle, with V columns."""
    rows = []
    for at, a_s, z, x, p in zip(alpha_t, alpha_s, zt, x0, probs, strict=True):
        t, s = time_of(process, at), time_of(process, a_s)
        of_reading = {
            "posterior": oracle.restrict(chain, t, z, p),
            "cavity": oracle.cavity_to_posterior(chain, t, z, p),
            "hybrid": oracle.cavity_to_posterior(chain, t, z, p / ((np.arange(N) == z) + 1 / N)),
        }
        states = chain.K
        row = {
            "marginal": oracle.marginal_table(chain, t)[x],
            "transition": oracle.transition_matrix(chain, s, t)[z] if z < states else np.eye(N + 1)[z],
            "likelihood": oracle.evidence(chain, t, np.asarray(z)),
            "posterior": oracle.posterior(chain, s, t, z, x),
        }
        for reading in process.readings:
            row[f"p({reading})"] = of_reading[reading]
            row[f"reverse({reading})"] = oracle.reverse_kernel(chain, s, t, z, of_reading[reading])
        row["reverse(cavity)"] = oracle.reverse_kernel_plugin(chain, s, t, z, p)
        rows.append(row)
    width = {name: N if name.startswith("p(") or name == "likelihood" else N + 1 for name in rows[0]}
    padded = lambda table, V: np.pad(table, (0, V - len(table)))
    return {name: np.array([padded(row[name], V) for row in rows]) for name, V in width.items()}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in CASES for dtype in FLOATS), *((c, "float32") for c in SMALL)],
)
def test_every_table_agrees_with_the_oracle(case, dtype):
    make, chain = (CASES | SMALL)[case]
    with jax.enable_x64(dtype == "float64"):
        process = make()
        rows = grid(process, chain, np.random.default_rng(7))
        ours = our_tables(process, dtype, *rows)
    theirs = their_tables(process, chain, *rows)
    assert ours.keys() == theirs.keys()
    errors = {name: np.abs(ours[name] - theirs[name]).max() for name in ours}
    assert max(errors.values()) < FLOATS[dtype], errors


@pytest.mark.parametrize("case", CASES)
def test_transitions_compose(case):
    """Chapman-Kolmogorov: clean -> a -> b -> c passes through the same laws as clean -> c and a -> c."""
    process = CASES[case][0]()
    transitions = jax.jit(jax.vmap(process.transition, (0, None, None)))
    marginals = jax.jit(jax.vmap(process.marginal, (0, None)))
    states = np.arange(N + 1)
    T = lambda alpha_from, alpha_to: np.asarray(transitions(states, alpha_from, alpha_to))
    q = lambda alpha: np.asarray(marginals(states[:N], alpha))
    for a, b, c in [(1.0, 0.9, 0.5), (0.8, 0.5, 0.2), (process.alpha_max, 0.6, 0.6), (0.7, 0.1, 0.0)]:
        np.testing.assert_allclose(T(a, b) @ T(b, c), T(a, c), atol=1e-6)
        np.testing.assert_allclose(q(a) @ T(a, c), q(c), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda: noising.gamma_hybrid(N, 0.0), lambda: noising.epsilon_hybrid(N, 0)],
    ids=["gamma", "epsilon"],
)
def test_without_their_share_the_hybrids_are_absorb_exactly(make):
    hybrid, absorb = make(), noising.absorb(N)
    rows = grid(absorb, oracle.Absorb(N), np.random.default_rng(3))
    ours, theirs = (our_tables(process, "float32", *rows) for process in (hybrid, absorb))
    assert {name: np.array_equal(ours[name], theirs[name]) for name in ours} == dict.fromkeys(ours, True)
    x0, alpha = np.arange(5 * 40, dtype=np.int32).reshape(5, 40) % N, np.linspace(0, 1, 40, dtype=np.float32)
    draws = [jax.jit(process.sample)(jax.random.key(1), x0, alpha[None]) for process in (hybrid, absorb)]
    np.testing.assert_array_equal(*draws)
    assert (hybrid.frozen, hybrid.alpha_max, hybrid.mask) == (absorb.frozen, absorb.alpha_max, absorb.mask)


@pytest.mark.parametrize("case", CASES)
def test_ends_are_exact(case):
    process = CASES[case][0]()
    clean, mask = np.eye(N + 1)[2], np.eye(N + 1)[N]
    noise = mask if process.mask is not None else np.append(np.full(N, np.float32(1 / N)), 0)
    q, T = jax.jit(process.marginal), jax.jit(process.transition)
    assert np.array_equal(q(2, 1.0), clean)
    assert np.array_equal(q(2, 0.0), noise)
    assert np.array_equal(T(2, 0.4, 0.4), clean)
    assert np.array_equal(T(N, 0.9, 0.2), mask)
    after_atom = np.append(np.full(N, process.epsilon / N), 0) + (1 - process.epsilon) * clean
    np.testing.assert_allclose(q(2, process.alpha_max), after_atom, atol=1e-7)
    assert np.asarray(q(2, process.alpha_max))[N] == 0


@pytest.mark.parametrize("case", CASES)
def test_no_nan_whatever_is_asked_and_gradients_are_finite(case):
    """Also for pairs that cannot happen, probabilities of 0 or 1e-30, and every pair of ends."""
    process = CASES[case][0]()
    alphas = [0.0, 1e-6, 0.5, 1 - 2.0**-24, 1.0]
    pairs = [(at, a_s) for at in alphas for a_s in alphas if at <= a_s]
    spiked = np.eye(N)[1] * (1 - 1e-30) + 1e-30 * np.eye(N)[3]
    vectors = np.array([np.full(N, 1 / N), spiked, np.eye(N)[0]])
    rows = [(*pair, z, x, p) for pair in pairs for z in range(N + 1) for x in (0, 3) for p in vectors]
    columns = [np.array(column) for column in zip(*rows, strict=True)]

    def table_sum(alpha_t, alpha_s, p, z, x, seed_V):
        tables = [process.marginal(x, alpha_t), process.transition(z, alpha_s, alpha_t)]
        tables += [process.posterior(z, x, alpha_t, alpha_s)]
        tables += [process.reverse(z, p, alpha_t, alpha_s, reading) for reading in process.readings]
        return (jnp.stack(tables) * seed_V).sum(), jnp.stack(tables)

    function = jax.jit(jax.vmap(jax.value_and_grad(table_sum, (0, 1, 2), has_aux=True), (0, 0, 0, 0, 0, None)))
    alpha_t, alpha_s, z, x, p = columns
    (_, tables), gradients = function(alpha_t, alpha_s, p, z, x, np.arange(1.0, N + 2)[None])
    tables = np.asarray(tables)
    np.testing.assert_allclose(tables.sum(-1), 1, atol=2e-6)
    assert (tables >= 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    stays = alpha_t == alpha_s
    np.testing.assert_array_equal(tables[stays][:, 2:].argmax(-1), np.repeat(z[stays][:, None], tables.shape[1] - 2, 1))
    np.testing.assert_array_equal(tables[stays][:, 2:].max(-1), 1)


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_marginals(case):
    make, chain = CASES[case]
    process, draws = make(), 50_000
    alpha_A = jnp.array([1.0, process.alpha_max, 0.7, 0.2, 0.0])
    x0 = jnp.broadcast_to(jnp.arange(5)[:, None] % N, (5, draws))
    zt = jax.jit(process.sample)(jax.random.key(11), x0, alpha_A[:, None])
    assert (zt.shape, zt.dtype) == (x0.shape, x0.dtype)
    for z_draws, x, alpha in zip(np.asarray(zt), range(5), alpha_A.tolist(), strict=True):
        law = oracle.marginal_table(chain, time_of(process, alpha))[x]
        assert_follows(np.bincount(z_draws, minlength=N + 1), np.pad(law, (0, N + 1 - len(law))))


@pytest.mark.parametrize("case", CASES)
def test_the_prior_is_the_noisiest_marginal(case):
    make, chain = CASES[case]
    process = make()
    prior = jax.jit(process.prior, static_argnums=1)
    for alpha in (0.0, 0.3):
        z = prior(jax.random.key(5), (200, 100), alpha)
        assert (z.shape, z.dtype) == ((200, 100), jnp.int32)
        law = oracle.default_prior(chain, time_of(process, alpha))
        counts = np.bincount(np.asarray(z).ravel(), minlength=N + 1)
        assert_follows(counts, np.pad(law, (0, N + 1 - len(law))))
    assert process.mask is None or (prior(jax.random.key(5), (200, 100)) == N).all()


def assert_follows(counts, law, level=1e-4):
    """Chi-square of counts against a law; what has probability 0 must not occur at all."""
    assert counts[law < 1e-9].sum() == 0
    seen = law >= 1e-9
    if seen.sum() > 1:
        expected = law[seen] / law[seen].sum() * counts.sum()
        assert chisquare(counts[seen], expected).pvalue > level


def published_minimiser(prior_N, epsilon, z):
    """The network output at token z that minimises the published epsilon cross-entropy, found numerically.

    Weights: 1 - epsilon where the token was shuffled (onto z with probability 1/N), epsilon where it was not.
    """
    shuffled = prior_N * epsilon / N * (1 - epsilon)
    clean = prior_N * (1 - epsilon) * (np.arange(N) == z) * epsilon
    weight = (shuffled + clean) / (shuffled + clean).sum()
    return minimise(lambda logits: -weight @ log_softmax(logits))


def read_by(process, z, network_N, alpha, reading):
    """p(x | z) as float64."""
    posterior = jax.jit(partial(noising.to_posterior, process, reading=reading))
    return np.asarray(posterior(z, network_N, alpha), float)


def minimise(loss):
    best = minimize(loss, np.zeros(N), method="BFGS", options={"gtol": 1e-9})
    return np.exp(log_softmax(best.x))


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_the_hybrid_reading_recovers_the_posterior_from_the_published_loss(epsilon):
    process = noising.epsilon_hybrid(N, epsilon)
    prior_N = np.random.default_rng(0).dirichlet(np.ones(N))
    for z in (0, 3):
        joint = prior_N * ((1 - epsilon) * (np.arange(N) == z) + epsilon / N)
        exact = joint / joint.sum()
        network = published_minimiser(prior_N, epsilon, z)
        read = {reading: read_by(process, z, network, 0.6, reading) for reading in process.readings}
        error = {reading: np.abs(p - exact).max() for reading, p in read.items()}
        assert error["hybrid"] < 2e-5
        assert min(error["posterior"], error["cavity"]) > 1e-3


def test_plain_cross_entropy_teaches_the_posterior_and_a_cavity_is_read_through_the_noise():
    process, z, alpha = noising.gamma_hybrid(N, 0.3), 2, 0.5
    prior_N = np.random.default_rng(1).dirichlet(np.ones(N))
    likelihood_N = np.asarray(process.likelihood(z, alpha), float)
    exact = prior_N * likelihood_N / (prior_N @ likelihood_N)
    through_noise = lambda logits: log_softmax(logits + np.log(likelihood_N))
    for reading, loss in {
        "posterior": lambda logits: -exact @ log_softmax(logits),
        "cavity": lambda logits: -exact @ through_noise(logits),
    }.items():
        np.testing.assert_allclose(read_by(process, z, minimise(loss), alpha, reading), exact, atol=2e-5)


@pytest.mark.parametrize("reading", noising.READINGS)
def test_log_odds_are_the_conversion_at_the_own_token(reading):
    process = noising.epsilon_hybrid(N, 0.1)
    network_N = np.random.default_rng(2).dirichlet(np.ones(N))
    raised = network_N * np.exp(process.log_odds(reading) * (np.arange(N) == 1))
    np.testing.assert_allclose(read_by(process, 1, network_N, 0.4, reading), raised / raised.sum(), atol=1e-6)
    np.testing.assert_allclose(read_by(process, N, network_N, 0.4, reading), network_N, atol=1e-6)
    assert noising.absorb(N).log_odds(reading) == math.inf


def test_an_absorb_token_is_certain_even_where_the_network_gives_it_nothing():
    p_N = read_by(noising.absorb(N), 2, np.eye(N)[0], 0.5, "posterior")
    np.testing.assert_array_equal(p_N, np.eye(N)[2])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: noising.build("absorbing", 8), "noising.kind: got 'absorbing'"),
        (lambda: noising.build("epsilon_hybrid", 8, epsilon=1.0), "noising.epsilon"),
        (lambda: noising.build("epsilon_hybrid", 8, epsilon=-0.1), "noising.epsilon"),
        (lambda: noising.build("epsilon_hybrid", 8, epsilon=math.nan), "noising.epsilon"),
        (lambda: noising.build("epsilon_hybrid", 8), "noising.epsilon"),
        (lambda: noising.build("gamma_hybrid", 8, gamma=1), "noising.gamma"),
        (lambda: noising.build("gamma_hybrid", 8, gamma="0.1"), "noising.gamma"),
        (lambda: noising.build("gamma_hybrid", 8, gamma=0.1, epsilon=0.1), "noising.epsilon"),
        (lambda: noising.build("absorb", 8, gamma=0.1), "noising.gamma"),
        (lambda: noising.build("absorb", 0), "noising.num_tokens"),
        (lambda: noising.to_posterior(noising.absorb(N), 0, jnp.ones(N), 0.5, "mean"), "noising.reading"),
    ],
)
def test_bad_input_names_its_field(call, field):
    with pytest.raises(UserError, match=field):
        call()
