"""D3PM's random walks against matrix exponentials, spectral forms, Bayes, and their own law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import gammaln, xlogy

from hdlm_jax.diffusion import d3pm, noise_schedules, noising, reverse
from tests.diffusion.kernels import (
    alpha_pairs,
    check_agreement,
    check_bound,
    check_every_table_is_a_law,
    check_prior,
    check_samples,
    check_step,
    our_tables,
    stacked,
)
from tests.oracle import hdlm_oracle as oracle

N = 8
CASES = {
    "band": (lambda: noising.d3pm_band(N, 2), oracle.band_rate(N, 2, cyclic=True)),
    "widest band": (lambda: noising.d3pm_band(N - 1, 3), oracle.band_rate(N - 1, 3, cyclic=True)),
    "nearest": (lambda: noising.d3pm_nearest(N), oracle.band_rate(N, 1)),
}
FLOATS = {"float32": 1e-6, "float64": 1e-12}


def walked(rate, sigma):
    """exp(sigma rate) [N, N] as a sum of positive terms: a Poisson number of jumps."""
    if sigma == np.inf:
        return np.full(rate.shape, 1 / len(rate))
    jump, power, total = rate + np.eye(len(rate)), np.eye(len(rate)), np.zeros(rate.shape)
    for n in range(400):
        total += np.exp(xlogy(n, sigma) - sigma - gammaln(n + 1)) * power
        power = power @ jump
    return total


def possible(case, sigma):
    """The same matrix without displacements that are too rare: a line is the cycle of 2N, folded."""
    rate = CASES[case][1] if case != "nearest" else oracle.band_rate(2 * N, 1, cyclic=True)
    kernel = walked(rate, sigma)
    kernel = np.where(kernel < d3pm.IMPOSSIBLE, 0, kernel)
    return kernel if case != "nearest" else kernel[:N, :N] + kernel[:N, : N - 1 : -1]


def sigma_of(alpha):
    return np.inf if alpha == 0 else 0.0 - np.log(alpha)


def bayes_tables(kernels, zt, x0, probs):
    """One row's tables from the matrices of the walk (to t, to s, from s to t)."""
    to_t, to_s, step = kernels
    z, x, p, e = zt, x0, probs, to_t[:, zt]
    of_reading = {"posterior": p * (e > 0), "cavity": p * e}
    of_reading = {reading: q / q.sum() for reading, q in of_reading.items()}
    row = {"marginal": to_t[x], "transition": step[z], "likelihood": e, "posterior": to_s[x] * step[:, z]}
    row["posterior"] = row["posterior"] / row["posterior"].sum()
    for reading, q in of_reading.items():
        w = np.divide(q, e, out=np.zeros_like(q), where=e > 0)
        table = step[:, z] * (w @ to_s)
        row |= {f"p({reading})": q, f"reverse({reading})": table / table.sum()}
    return row


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_every_table_agrees_with_the_matrices(case, dtype):
    make, rate = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        process, rng = make(), np.random.default_rng(7)
        states, rows, theirs = process.num_tokens, [], []
        for alpha_t, alpha_s in alpha_pairs(process, rng, count=12):
            s, t = sigma_of(alpha_s), sigma_of(alpha_t)
            sigmas = (t, s, t if s == 0 else t - s)
            exact, likely = [walked(rate, sigma) for sigma in sigmas], [possible(case, sigma) for sigma in sigmas]
            for z, x in zip(*np.nonzero(exact[0].T > 1e-12), strict=True):
                rows.append((alpha_t, alpha_s, z, x, rng.dirichlet(np.full(states, 0.5))))
                theirs.append(bayes_tables(likely, *rows[-1][2:]))
                if alpha_t < 0.5:  # what is too rare does not matter there
                    whole = bayes_tables(exact, *rows[-1][2:])
                    assert max(np.abs(whole[name] - theirs[-1][name]).max() for name in whole) < 1e-9
        ours = our_tables(process, dtype, *(np.array(column) for column in zip(*rows, strict=True)))
    check_agreement(ours, stacked(theirs, states), FLOATS[dtype])


@pytest.mark.parametrize("case", CASES)
def test_the_walk_is_the_exponential_of_its_rates_and_has_the_spectral_form(case):
    make, rate = CASES[case]
    with jax.enable_x64(True):
        process = make()
        marginals = jax.jit(jax.vmap(process.marginal, (0, None)))
        for sigma in (1e-4, 0.7, 9.0, 60.0):
            ours = np.asarray(marginals(np.arange(process.num_tokens), np.exp(-sigma)))[:, :-1]
            spectral = oracle.path_kernel(N, sigma)
            if case != "nearest":
                spectral = oracle.cyclic_band_kernel(process.num_tokens, process.marginal.args[0].width, sigma)
            for theirs in (expm(sigma * rate), spectral, walked(rate, sigma)):
                np.testing.assert_allclose(ours, theirs, atol=2e-14)


@pytest.mark.parametrize("case", ["band", "nearest"])
def test_rare_displacements_keep_their_relative_accuracy_in_float32(case):
    process = CASES[case][0]()
    alphas = np.array([0.5, 0.999, 1 - 1e-5, 1e-4, 1e-30], np.float32)
    ours = jax.jit(jax.vmap(process.marginal, (None, 0)))(0, alphas)[:, :-1]
    theirs = np.stack([possible(case, sigma_of(alpha))[0] for alpha in alphas.astype(float)])
    assert theirs[theirs > 0].min() < 1e-10
    np.testing.assert_allclose(ours, theirs, rtol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_transitions_compose(case):
    process = CASES[case][0]()
    transitions = jax.jit(jax.vmap(process.transition, (0, None, None)))
    T = lambda alpha_from, alpha_to: np.asarray(transitions(np.arange(process.num_states), alpha_from, alpha_to))
    for a, b, c in [(1.0, 0.9, 0.5), (0.8, 0.5, 1e-20), (1.0, 0.6, 0.6), (0.7, 0.1, 0.0)]:
        np.testing.assert_allclose(T(a, b) @ T(b, c), T(a, c), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ends_are_exact_and_there_is_no_mask(case):
    process = CASES[case][0]()
    states = process.num_tokens
    clean, flat = np.eye(states + 1)[2], np.append(np.full(states, np.float32(1 / states)), 0)
    q, T = jax.jit(process.marginal), jax.jit(process.transition)
    assert process.mask is None and process.log_odds is None and not process.frozen
    assert (process.reading, process.readings) == ("cavity", ("posterior", "cavity"))
    for table, expected in [(q(2, 1.0), clean), (q(2, 0.0), flat), (q(2, 1e-42), flat), (T(2, 0.4, 0.4), clean)]:
        assert np.array_equal(table, expected)
    assert np.array_equal(T(2, 0.4, 0.0), flat)
    assert np.array_equal(T(2, 0.0, 0.0), clean)
    assert np.array_equal(T(states, 0.9, 0.2), np.eye(states + 1)[states])


@pytest.mark.parametrize("case", [pytest.param("widest band", marks=pytest.mark.slow), "nearest"])
def test_no_nan_whatever_is_asked_and_gradients_are_finite(case):
    check_every_table_is_a_law(CASES[case][0]())


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_marginals(case):
    make, rate = CASES[case]
    check_samples(make(), lambda alpha: walked(rate, sigma_of(alpha)), draws=20_000)


@pytest.mark.parametrize("case", ["band", "nearest"])
def test_the_prior_is_uniform(case):
    check_prior(CASES[case][0](), lambda alpha: np.full(N, 1 / N))


@pytest.mark.parametrize(
    ("make", "spectral"),
    [
        (lambda n: noising.d3pm_band(n, 40), lambda n, sigma: oracle.cyclic_band_kernel(n, 40, sigma)),
        (noising.d3pm_nearest, oracle.path_kernel),
    ],
    ids=["band", "nearest"],
)
def test_a_large_vocabulary_in_float32(make, spectral):
    many, z, x = 2000, 20, 15
    process, probs_N = make(many), np.random.default_rng(0).dirichlet(np.full(many, 0.1))
    alpha_t, alpha_s = np.float32(1e-6), np.float32(0.01)
    t, s = sigma_of(float(alpha_t)), sigma_of(float(alpha_s))
    to_t, to_s, step = (np.maximum(spectral(many, sigma), 0) for sigma in (t, s, t - s))
    theirs = bayes_tables((to_t, to_s, step), z, x, probs_N)

    def tables(z, x, p):
        return {
            "marginal": process.marginal(x, alpha_t),
            "posterior": process.posterior(z, x, alpha_t, alpha_s),
            "reverse(cavity)": process.reverse(z, p, alpha_t, alpha_s, "cavity"),
        }

    for name, table in jax.jit(tables)(z, x, probs_N).items():
        np.testing.assert_allclose(table[:-1], theirs[name], atol=1e-5 * theirs[name].max())


def test_a_batch_of_reverse_kernels_needs_no_table_per_pair_of_states():
    process, (B, W, many) = noising.d3pm_nearest(300), (4, 16, 300)
    kernel = jnp.vectorize(lambda z, p, a, b: process.reverse(z, p, a, b, "cavity"), signature="(),(n),(),()->(v)")

    def loss(p_BxWxN, zt_BxW, alpha_t_BxW, alpha_s_BxW):
        return jnp.square(kernel(zt_BxW, p_BxWxN, alpha_t_BxW, alpha_s_BxW)).sum()

    floats, ids = (jnp.zeros((B, W), dtype) for dtype in (jnp.float32, jnp.int32))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones((B, W, many)), ids, floats, floats).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * W * many * many / 10


def test_the_ancestral_step_draws_from_the_kernel():
    process = noising.d3pm_nearest(5)
    zt, alpha_t, alpha_s = jnp.array([4, 1, 3, 2]), jnp.array([0.0, 0.3, 1e-3, 0.6]), jnp.array([0.3, 0.5, 0.1, 1.0])
    check_step(process, reverse.ancestral(process).step, zt, jnp.array([0.4, 0.1, 0.05, 0.25, 0.2]), alpha_t, alpha_s)


def test_the_bound_is_never_violated():
    check_bound(noising.d3pm_nearest(3), noise_schedules.linear(), "cavity")
