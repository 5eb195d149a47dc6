"""Noising processes against the oracle, against brute force, and against their own law."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from hdlm_jax.diffusion import noising
from hdlm_jax.errors import UserError
from tests.diffusion.kernels import (
    check_agreement,
    check_every_table_is_a_law,
    check_prior,
    check_samples,
    grid,
    our_tables,
    their_tables,
    time_of,
)
from tests.oracle import hdlm_oracle as oracle

N = 5
CASES = {
    "absorb": (lambda: noising.absorb(N), oracle.Absorb(N)),
    "uniform": (lambda: noising.uniform(N), oracle.Uniform(N)),
    "gamma": (lambda: noising.gamma_hybrid(N, 0.3), oracle.Gamma(N, 0.3)),
    "epsilon": (lambda: noising.epsilon_hybrid(N, 0.1), oracle.Epsilon(N, 0.1)),
    "gidd": (lambda: noising.gidd(N, 0.2), oracle.gidd_hybrid(N, 0.2)),
}
SMALL = {
    "small gamma": (lambda: noising.gamma_hybrid(N, 0.01), oracle.Gamma(N, 0.01)),
    "small epsilon": (lambda: noising.epsilon_hybrid(N, 0.01), oracle.Epsilon(N, 0.01)),
}
FLOATS = {"float32": 2e-6, "float64": 1e-12}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in CASES for dtype in FLOATS), *((c, "float32") for c in SMALL)],
)
def test_every_table_agrees_with_the_oracle(case, dtype):
    make, chain = (CASES | SMALL)[case]
    with jax.enable_x64(dtype == "float64"):
        process = make()
        rows = grid(
            process, lambda alpha: oracle.marginal_table(chain, time_of(process, alpha)), np.random.default_rng(7)
        )
        ours = our_tables(process, dtype, *rows)
    check_agreement(ours, their_tables(process, chain, *rows), FLOATS[dtype])


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
    [lambda: noising.gamma_hybrid(N, 0.0), lambda: noising.epsilon_hybrid(N, 0), lambda: noising.gidd(N, 0)],
    ids=["gamma", "epsilon", "gidd"],
)
def test_without_their_share_the_hybrids_are_absorb_exactly(make):
    hybrid, absorb = make(), noising.absorb(N)
    marginal_table = lambda alpha: oracle.marginal_table(oracle.Absorb(N), time_of(absorb, alpha))
    rows = grid(absorb, marginal_table, np.random.default_rng(3))
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
    assert case == "gidd" or np.array_equal(T(N, 0.9, 0.2), mask)
    after_atom = np.append(np.full(N, process.epsilon / N), 0) + (1 - process.epsilon) * clean
    np.testing.assert_allclose(q(2, process.alpha_max), after_atom, atol=1e-7)
    assert np.asarray(q(2, process.alpha_max))[N] == 0


@pytest.mark.parametrize("case", CASES)
def test_no_nan_whatever_is_asked_and_gradients_are_finite(case):
    check_every_table_is_a_law(CASES[case][0]())


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_marginals(case):
    make, chain = CASES[case]
    process = make()
    check_samples(process, lambda alpha: oracle.marginal_table(chain, time_of(process, alpha)))


@pytest.mark.parametrize("case", CASES)
def test_the_prior_is_the_noisiest_marginal(case):
    make, chain = CASES[case]
    process = make()
    check_prior(process, lambda alpha: oracle.default_prior(chain, time_of(process, alpha)))
    noise = jax.jit(process.prior, static_argnums=1)(jax.random.key(5), (200, 100))
    assert process.mask is None or (noise == N).all()


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
        (lambda: noising.build("gidd", 8, uniform_share=1.0), "noising.uniform_share: got 1.0; allowed: a number in"),
        (lambda: noising.build("gidd", 8), "noising.uniform_share: got None"),
        (lambda: noising.build("d3pm_band", 8, width=4), r"noising.width: got 4; allowed: a whole number from 1 to 3"),
        (lambda: noising.build("d3pm_band", 8), "noising.width: got None"),
        (lambda: noising.build("d3pm_band", 2, width=1), "noising.num_tokens: got 2"),
        (lambda: noising.build("d3pm_nearest", 8, width=1), "noising.width: got 1; allowed: nothing"),
        (lambda: noising.build("d3pm_nearest", 1), "noising.num_tokens: got 1"),
        (lambda: noising.build("absorb", 0), "noising.num_tokens"),
        (lambda: noising.to_posterior(noising.absorb(N), 0, jnp.ones(N), 0.5, "mean"), "noising.reading"),
    ],
)
def test_bad_input_names_its_field(call, field):
    with pytest.raises(UserError, match=field):
        call()
