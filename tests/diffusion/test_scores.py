"""Scores, their posteriors and their steps, against the oracle: both clocks, their limits, small and large N."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import noising, scores
from hdlm_jax.diffusion.scores import Clocks
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

N = 8
GAMMAS = (0.0, 0.01, 0.3, 0.9, 1.0)
SIGMAS = (1e-4, 0.03, 0.7, 3.0, 8.0)
STEP = 0.4  # of sigma, the part of the way that a step goes


def possible(gamma, z, x):
    """Whether x can turn to z: no masks without the first clock, no wrong tokens without the second."""
    return (gamma < 1 or z < N) and (gamma > 0 or z in (x, N))


def rows():
    """Every (gamma, sigma, z, x) that can be, as columns; gammas and sigmas are float32 numbers."""
    grid = [(g, s, z, x) for g in GAMMAS for s in SIGMAS for z in range(N + 1) for x in range(N) if possible(g, z, x)]
    gamma, sigma, z, x = (np.array(column) for column in zip(*grid, strict=True))
    return gamma.astype(np.float32), sigma.astype(np.float32), z, x


GAMMA, SIGMA, Z, X = rows()


def by_chain(function, *columns):
    """`function(chain, sigma, *rows)` of the oracle over the rows of each gamma and sigma, float64."""
    out = None
    for g, s in {(g, s) for g, s in zip(GAMMA.tolist(), SIGMA.tolist(), strict=True)}:
        here = (g == GAMMA) & (s == SIGMA)
        values = function(oracle.Gamma(N, g), s, *(column[here] for column in columns))
        out = np.zeros((len(here), *values.shape[1:])) if out is None else out
        out[here] = values
    return out


def random_posteriors(rng):
    """p(x | z) [rows, N] where q(z | x) allows it."""
    p = rng.dirichlet(np.full(N, 0.5), len(Z))
    return by_chain(lambda chain, s, z, p: oracle.restrict(chain, s, z, p), Z, p)


def ours(function, *columns, dtype=np.float32):
    """`function(clocks of every row, ...)` of this package, compiled once for all gammas."""
    cast = lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else np.int32)
    run = jax.jit(lambda gamma, *rest: function(Clocks(N, gamma), *rest))
    return np.asarray(run(cast(GAMMA), *map(cast, columns)), float)


def assert_close(given, expected, tolerance):
    """Each row relative to its largest entry."""
    size = np.abs(np.where(np.isfinite(expected), expected, 0)).max(-1, keepdims=True)
    np.testing.assert_allclose(given / size, expected / size, atol=tolerance, rtol=0)


def test_scores_of_one_token_are_the_oracles():
    with np.errstate(divide="ignore"):
        theirs = by_chain(oracle.true_score, Z, X)
    given = ours(scores.exact, Z, X, SIGMA)
    np.testing.assert_allclose(given, theirs, rtol=1e-6)
    np.testing.assert_array_equal(given[np.arange(len(Z)), Z], 1)


def test_scores_of_a_posterior_are_the_oracles():
    p = random_posteriors(np.random.default_rng(0))
    theirs = by_chain(oracle.score_from_mean, Z, p)
    assert_close(ours(scores.from_posterior, Z, p, SIGMA)[:, :N], theirs[:, :N], 1e-6)
    tokens = Z < N
    np.testing.assert_allclose(ours(scores.from_posterior, Z, p, SIGMA)[tokens, N], theirs[tokens, N], rtol=1e-5)


def test_scores_and_posteriors_invert_each_other():
    """In float64 at every sigma; in float32 the posterior's rounding grows as e^{gamma sigma}."""
    p = random_posteriors(np.random.default_rng(1)) + 1e-4 * (by_chain(lambda c, s, z: oracle.evidence(c, s, z), Z) > 0)
    p /= p.sum(-1, keepdims=True)
    back = lambda of, z, p, sigma: scores.to_posterior(of, z, scores.from_posterior(of, z, p, sigma), sigma)
    np.testing.assert_allclose(ours(back, Z, p, SIGMA), p, atol=3e-3)
    near = (GAMMA * SIGMA < 1) & (SIGMA < 1)
    np.testing.assert_allclose(ours(back, Z, p, SIGMA)[near], p[near], atol=2e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(back, Z, p, SIGMA, dtype=np.float64), p, atol=1e-10)


def test_the_posterior_of_a_score_is_the_oracles():
    score = by_chain(oracle.score_from_mean, Z, 0.9 * random_posteriors(np.random.default_rng(2)) + 0.1 * np.eye(N)[X])
    theirs = by_chain(lambda c, s, z, score: oracle.gamma_mean_from_score(score, z, c.g, s), Z, score)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(scores.to_posterior, Z, score, SIGMA, dtype=np.float64), theirs, atol=1e-6)


def test_the_staggered_score_is_the_oracles_for_any_score():
    """Relative to the sum of its absolute terms."""
    score = np.random.default_rng(3).exponential(size=(len(Z), N + 1)).astype(np.float32).astype(float)
    theirs = by_chain(lambda c, d, score: oracle.gamma_staggered(score, c.g, d), score)
    gamma, d, total = GAMMA.astype(float)[:, None], SIGMA.astype(float)[:, None], score[:, :N].sum(1, keepdims=True)
    size = np.exp(d) * score + (np.exp(d) - np.exp((1 - gamma) * d)) / N * total
    size[:, N:] = score[:, N:] + np.expm1((1 - gamma) * d) * total
    np.testing.assert_allclose(ours(scores.staggered, score, SIGMA) / size, theirs / size, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_the_analytic_step_is_the_oracles_and_the_kernel_of_the_posterior(last):
    """p(z_s | z_t) of true scores; sums of q(z_s | z_t, x) over the posterior, by the noising process too."""
    p = random_posteriors(np.random.default_rng(4))
    step = SIGMA if last else (STEP * SIGMA).astype(np.float32)
    score = by_chain(oracle.score_from_mean, Z, p)
    given = ours(lambda *a: scores.tweedie(*a, last=last), Z, score, step)
    share = 1 if last else STEP
    theirs = by_chain(lambda c, t, z, s: oracle.gamma_analytic_step(s, z, c.g, share * t, forbid_mask=last), Z, score)
    # scores are rounded to float32: at the mask as good as it gets is e^{gamma sigma} 1e-7
    np.testing.assert_allclose(given, theirs, atol=3e-3 if last else 1e-4)
    near = GAMMA * SIGMA < 1
    np.testing.assert_allclose(given[near], theirs[near], atol=5e-6)
    with jax.enable_x64(True):
        given = ours(lambda *a: scores.tweedie(*a, last=last), Z, score, share * SIGMA.astype(float), dtype=np.float64)
    np.testing.assert_allclose(given, theirs, atol=2e-6)
    kernel = by_chain(lambda c, t, z, p: oracle.reverse_kernel(c, (1 - share) * t, t, z, p), Z, p)
    np.testing.assert_allclose(given, kernel, atol=2e-6)


def test_the_analytic_step_is_the_reverse_kernel_of_every_process():
    """Of noising.py, from the posterior reading: at real alphas, in float32."""
    rng = np.random.default_rng(5)
    for process in (noising.absorb(N), noising.uniform(N), noising.gamma_hybrid(N, 0.2)):
        of = scores.clocks(process)
        z = np.array([N, N, 0, 3] if process.mask else [1, 5, 0, 3])
        p = rng.dirichlet(np.ones(N), len(z)).astype(np.float32)
        if of.gamma == 0:
            p[2:] = np.eye(N)[z[2:]]

        @jax.jit
        def both(z, p, alpha_t, alpha_s, of=of, process=process):
            score = scores.from_posterior(of, z, p, scores.noise_level(alpha_t))
            step = scores.tweedie(of, z, score, scores.elapsed(alpha_s, alpha_t), alpha_s == 1)
            return step, jax.vmap(process.reverse)(z, p, alpha_t, alpha_s)

        for alpha_t, alpha_s in [(0.1, 0.4), (0.6, 1.0), (0.3, 0.3)]:
            step, kernel = both(z, p, *(np.full(len(z), a, np.float32) for a in (alpha_t, alpha_s)))
            np.testing.assert_allclose(step, kernel, atol=3e-6)


def test_the_step_of_any_scores_is_a_law_that_rules_nothing_out():
    score = np.exp(3 * np.random.default_rng(6).normal(size=(len(Z), N + 1)))
    score[np.arange(len(Z)), Z] = 1
    for function in (scores.tweedie, scores.euler):
        table = ours(function, Z, score, SIGMA)
        np.testing.assert_allclose(table.sum(-1), 1, rtol=1e-5)
        assert (table >= 0).all()
    reachable = by_chain(lambda c, d, z: oracle.lik_column(c, 0.0, d, z), Z) > 1e-6
    assert (ours(scores.tweedie, Z, score, SIGMA)[reachable] > 0).all()


def test_the_euler_step_is_first_order():
    """Its distance to the analytic step falls with the square of the time; its entries are rates by time."""
    p = random_posteriors(np.random.default_rng(7))
    score = by_chain(oracle.score_from_mean, Z, p)
    small = (SIGMA > 0.5) & (SIGMA < 5)  # else scores, and with them the second order, are large

    def error(d):
        time = np.full(len(Z), d)
        pair = (ours(f, Z, score, time, dtype=np.float64) for f in (scores.euler, scores.tweedie))
        return np.abs(np.subtract(*pair))[small].sum()

    with jax.enable_x64(True):
        assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.02)
        table = ours(scores.euler, Z, score, np.full(len(Z), 1e-3), dtype=np.float64)
    rate = by_chain(lambda c, s, z: np.where((z == N)[:, None], 1 - c.g, c.g / N) * np.ones(N), Z)
    for i in np.nonzero(small)[0][::7]:
        others = np.arange(N) != Z[i]
        np.testing.assert_allclose(table[i, :N][others], 1e-3 * rate[i][others] * score[i, :N][others], rtol=1e-6)


def test_true_steps_are_the_oracles():
    theirs = by_chain(lambda c, s, z, x: oracle.posterior(c, s, (1 + STEP) * s, z, x), Z, X)
    given = ours(scores.true_step, Z, X, SIGMA, (STEP * SIGMA).astype(np.float32))
    np.testing.assert_allclose(given, theirs, atol=2e-6)
    at_once = ours(scores.true_step, Z, X, 0 * SIGMA, SIGMA)
    np.testing.assert_allclose(at_once, np.eye(N + 1)[X], atol=2e-6)


def test_the_whole_vocabulary_of_gpt_2():
    """Closed forms at N = 50257 in float32, from sigma 1e-4 to 8."""
    large, x = 50257, 17
    sigma = np.array([1e-4, 1e-2, 1.0, 8.0], np.float32)
    times = list(zip(sigma.astype(float), (0.1 * sigma).astype(float), strict=True))
    for g in (0.01, 0.5):
        of = Clocks(large, g)
        for z in (large, x, 3):
            zs, xs = np.full(4, z), np.full(4, x)
            given = jax.jit(functools.partial(scores.exact, of))(zs, xs, sigma)
            theirs = [oracle.gamma_scores_closed(large, g, s, z, x) for s in sigma.astype(float)]
            np.testing.assert_allclose(given, theirs, rtol=1e-5)
            table = jax.jit(functools.partial(scores.tweedie, of))(zs, np.array(theirs, np.float32), 0.1 * sigma)
            posterior = [true_step(large, g, t - d, d, z, x) for t, d in times]
            np.testing.assert_allclose(table, posterior, atol=1e-5)


def true_step(n, g, s, d, z, x):
    """The oracle's posterior q(z_s | z_t, x) without its N x N one-hot table."""
    chain, one = oracle.Gamma(n, g), lambda i: (np.arange(n + 1) == i).astype(float)
    (a_s, b_s), (a_d, b_d), (a_t, b_t) = (chain.marg(t) for t in (s, d, s + d))
    likelihood = np.where(np.arange(n + 1) < n, a_d * one(z) + b_d[z], z == n)
    return (a_s * one(x) + b_s) * likelihood / (a_t * (z == x) + b_t[z])


def test_the_ends_are_the_limits_of_gamma():
    """No entry is undefined at gamma 0 and 1, and both are what gammas nearby tend to."""
    rng, R = np.random.default_rng(8), 12
    z, sigma, d = rng.integers(0, N, R), rng.uniform(0.1, 3, R), rng.uniform(0.01, 0.1, R)
    score = np.exp(rng.normal(size=(R, N + 1)))
    score[np.arange(R), z] = 1

    def everything(gamma, z, score):
        of, x = Clocks(N, gamma), jnp.where(z == N, 0, z)
        tables = scores.tweedie(of, z, score, d), scores.euler(of, z, score, d), scores.staggered(of, score, d)
        to = scores.targets(of, z, x, sigma)
        at_x0 = jnp.where(z == x, 0, to.at_x0)  # no channel
        return tables, to._replace(at_x0=at_x0), scores.true_step(of, z, x, sigma, d)

    masked = score.copy()
    masked[:, N] = 1
    with jax.enable_x64(True):
        run = jax.jit(everything)
        for end, near, at, of_z in ((0.0, 1e-9, z, score), (1.0, 1 - 1e-9, z, score), (0.0, 1e-9, 0 * z + N, masked)):
            for a, b in zip(jax.tree.leaves(run(end, at, of_z)), jax.tree.leaves(run(near, at, of_z)), strict=True):
                assert np.isfinite(a).all() and np.isfinite(b).all()
                np.testing.assert_allclose(a, b, atol=1e-6)


def test_outputs_become_log_scores():
    """As published, in the published reading; by default only masks are scaled, by the absorbing clock."""
    outputs = np.random.default_rng(9).normal(size=(4, N + 1)).astype(np.float32)
    outputs[:, N] = -np.inf  # as the network's head gives it
    z, sigma = np.array([0, 4, N, N]), np.array([1e-4, 0.5, 0.5, 5.0], np.float32)
    wide = sigma.astype(float)[:, None]
    scales = {
        "published_score": np.log(np.expm1(wide) * N),
        "score": np.where((z == N)[:, None], np.log(np.expm1(0.9 * wide) * N), 0),
    }
    for reading, scale in scales.items():
        given = scores.log_scores(Clocks(N, 0.1), outputs, z, sigma, reading)
        expected = outputs - scale
        expected[np.arange(4), z] = 0
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
        for gamma in (0.0, 0.1, 1.0):  # clean rows are as those at 1e-4
            at = lambda sigma, reading=reading, gamma=gamma: scores.log_scale(Clocks(N, gamma), z, sigma, reading)
            np.testing.assert_array_equal(at(0 * sigma), at(0 * sigma + 1e-4))
            assert np.isfinite(at(0 * sigma)).all()
    with pytest.raises(UserError, match=r"reading \(of scores\): got 'cavity'; allowed: 'published_score', 'score'"):
        scores.log_scale(Clocks(N, 0.1), z, sigma, "cavity")


def test_an_output_of_0_knows_nothing():
    """It is the score of even odds: p(x | z) of a mask, and of a token from the other positions."""
    even = np.full(len(Z), 1 / N)[:, None] * np.ones(N)
    p = by_chain(lambda c, s, z, p: oracle.cavity_to_posterior(c, s, z, p), Z, even)
    theirs = np.log(np.maximum(by_chain(oracle.score_from_mean, Z, p)[:, :N], 1e-30))
    given = ours(lambda of, z, sigma: scores.log_scores(of, jnp.zeros((len(Z), N + 1)), z, sigma), Z, SIGMA)[:, :N]
    known = (GAMMA == 0) & (Z < N)  # certain
    np.testing.assert_allclose(given[~known], theirs[~known], atol=2e-4)


def test_times_between_close_survivals_do_not_cancel():
    alpha_s = np.float32(0.5) + np.float32(2.0**-20) * np.arange(4, dtype=np.float32)
    d = np.asarray(scores.elapsed(alpha_s, np.full(4, 0.5, np.float32)), float)
    np.testing.assert_allclose(d, np.log(alpha_s.astype(float) / 0.5), rtol=1e-6)
    sigma = scores.noise_level(np.array([1.0, 1 - 2.0**-24, 1e-30], np.float32))
    np.testing.assert_allclose(sigma, [0, 2.0**-24, 30 * np.log(10)], rtol=1e-6)


def test_processes_and_their_clocks():
    of = {p.name: scores.clocks(p) for p in (noising.absorb(N), noising.uniform(N), noising.gamma_hybrid(N, 0.25))}
    assert of == {"absorb": (N, 0.0), "uniform": (N, 1.0), "gamma_hybrid": (N, 0.25)}
    with pytest.raises(UserError, match=r"noising.kind: got 'epsilon_hybrid'.*'absorb', 'uniform', 'gamma_hybrid'"):
        scores.clocks(noising.epsilon_hybrid(N, 0.1))
