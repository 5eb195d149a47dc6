"""GIDD beyond what test_noising.py asks of every process: the way back out of the mask, its ends, its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from hdlm_jax.diffusion import bounds, noise_schedules, noising, reverse
from tests.diffusion.kernels import check_bound, check_step, time_of
from tests.oracle import hdlm_oracle as oracle

N = 5
PAIRS = [
    (0.7, 0.2),
    (1 - 1e-6, 1 - 3e-6),
    (1 - 1e-5, 0.5),
    (1.0, 1 - 1e-6),
    (0.5, 0.5 - 1e-6),
    (3e-6, 1e-6),
    (0.5, 1e-6),
]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_transitions_keep_their_relative_accuracy_in_float32(share):
    """The shares that leave a state are small differences of the marginals; the oracle takes them in float64."""
    process, chain = noising.gidd(N, share), oracle.gidd_hybrid(N, share)
    pairs = np.array(PAIRS, np.float32).astype(float)
    ours = jax.jit(jax.vmap(jax.vmap(process.transition, (0, None, None)), (None, 0, 0)))(np.arange(N + 1), *pairs.T)
    theirs = [oracle.transition_matrix(chain, time_of(process, a), time_of(process, b)) for a, b in pairs]
    np.testing.assert_allclose(ours, theirs, rtol=3e-6)


def test_the_mask_lets_tokens_out_and_the_uniform_share_is_the_most_random_tokens_there_are():
    process = noising.gidd(N, 0.2)
    assert not process.frozen and process.mask == N and process.reading == "cavity"
    from_mask = jax.jit(process.transition)(N, 0.5, 0.2)
    assert (np.asarray(from_mask)[:N] > 0.01).all()
    alpha_A = jnp.linspace(0.0, 1.0, 21)
    others_A = N * jax.jit(jax.vmap(process.marginal, (None, 0)))(0, alpha_A)[:, 1]
    assert others_A.argmax() == 10
    np.testing.assert_allclose(others_A[10], 0.2, rtol=1e-6)


def test_posteriors_of_a_large_vocabulary_in_float32():
    many, alpha_t, alpha_s = 4000, np.float32(0.3), np.float32(0.31)
    process, chain = noising.gidd(many, 0.2), oracle.gidd_hybrid(many, 0.2)
    probs_N = np.random.default_rng(0).dirichlet(np.full(many, 0.1))
    t, s = time_of(process, float(alpha_t)), time_of(process, float(alpha_s))
    tables = jax.jit(
        lambda z: (process.posterior(z, 7, alpha_t, alpha_s), process.reverse(z, probs_N, alpha_t, alpha_s))
    )
    for z in (7, 8, many):
        posterior_V, reverse_V = tables(z)
        np.testing.assert_allclose(posterior_V, oracle.posterior(chain, s, t, z, 7), rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(reverse_V, oracle.reverse_kernel(chain, s, t, z, probs_N), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "tolerance"), [(8, 1e-6), (50257, 1e-5)])
def test_the_bound_at_continuous_times_in_float32(num_tokens, tolerance):
    """At masks, clean and random tokens, relative to the oracle's sum."""
    process, chain = noising.gidd(num_tokens, 0.2), oracle.gidd_hybrid(num_tokens, 0.2)
    rng, R = np.random.default_rng(1), 12
    scores = (2 * rng.normal(size=(R, num_tokens))).astype(np.float32)
    x0, alpha = rng.integers(0, num_tokens, R), np.linspace(0.02, 0.98, R, dtype=np.float32)
    zt = np.choose(np.arange(R) % 3, [x0, np.full(R, num_tokens), rng.integers(0, num_tokens, R)])
    ours = jax.jit(lambda *rows: bounds.integrand(process, "cavity", *rows))
    ours = ours(np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf), x0, zt, alpha)
    theirs = []
    for a, z, x, xbar in zip(alpha.astype(float), zt, x0, softmax(scores.astype(float), -1), strict=True):
        keep, other = chain.marg(1 - a)  # the oracle's own sum makes a one-hot table of N x N
        true, model = other.copy(), other + keep * np.append(xbar, 0)
        true[x] += keep
        ratio = true[z] / model[z]
        theirs.append(chain.rate(1 - a)[0][z] / true[z] * (oracle.kl(true, model) + ratio - np.log(ratio) - 1))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)


def test_the_ancestral_step_draws_from_the_kernel():
    process = noising.gidd(N, 0.3)
    zt, alpha_t, alpha_s = jnp.array([N, 1, N, 2]), jnp.array([0.0, 0.3, 0.3, 0.6]), jnp.array([0.3, 0.5, 0.5, 1.0])
    check_step(process, reverse.ancestral(process).step, zt, jnp.array([0.4, 0.1, 0.05, 0.25, 0.2]), alpha_t, alpha_s)


@pytest.mark.parametrize("reading", ["cavity", "posterior"])
def test_the_bound_is_never_violated(reading):
    check_bound(noising.gidd(3, 0.3), noise_schedules.linear(), reading)
