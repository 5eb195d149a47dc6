"""Reverse steps of networks that learned scores: tables, draws, and finished texts against the data law."""

import functools
import itertools

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import noising, reverse
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

N, GAMMA = 3, 0.3
V = N + 1
PROCESSES = {"absorb": noising.absorb(N), "uniform": noising.uniform(N), "gamma": noising.gamma_hybrid(N, GAMMA)}
PAIRS = [(0.01, 0.3), (0.3, 0.8), (0.8, 0.8), (0.5, 1.0), (1.0, 1.0)]
KINDS = ("analytic", "euler")


def chain_of(process):
    return oracle.Gamma(N, process.gamma)


def log_scale(process, alpha, z, reading):
    """What a network's outputs exceed its log-scores by."""
    time = {"score": 1 - process.gamma, "published_score": 1.0}[reading] * -np.log(min(alpha, np.exp(-1e-4)))
    return np.log(np.expm1(time) * N) if z == N or reading == "published_score" else 0.0


def rows(process, reading="score"):
    """Every token that can be under every pair of alphas: zt, scores of a random posterior, outputs, alphas."""
    rng, out = np.random.default_rng(0), []
    for (alpha_t, alpha_s), z in itertools.product(PAIRS, range(V)):
        if (z == N and (alpha_t == 1 or process.mask is None)) or (alpha_t == 1 and z == N):
            continue
        if alpha_t == 1 or (process.gamma == 0 and z < N):
            score = np.where(np.arange(V) == z, 1, 1e-30)
        else:
            p = oracle.restrict(chain_of(process), -np.log(alpha_t), np.array(z), rng.dirichlet(np.ones(N)))
            score = oracle.score_from_mean(chain_of(process), -np.log(alpha_t), np.array(z), p)
        outputs = np.log(np.maximum(score, 1e-30)) + log_scale(process, alpha_t, z, reading)
        outputs[[N, min(z, N)]] = -np.inf, 7.0  # neither is read
        out.append((z, score, outputs, alpha_t, alpha_s))
    z, *rest = (np.array(column) for column in zip(*out, strict=True))
    return z.astype(np.int32), *(column.astype(np.float32) for column in rest)


def expected(kind, process, z, score, alpha_t, alpha_s):
    """The law of the next token [V] by the oracle."""
    chain, d = chain_of(process), np.log(alpha_s / alpha_t)
    if alpha_t == alpha_s:
        return np.eye(V)[z]
    if kind == "analytic" or alpha_s == 1:
        return oracle.gamma_analytic_step(score.astype(float), z, chain.g, d, forbid_mask=alpha_s == 1)
    rate = np.where(np.arange(V) < N, 1 - chain.g if z == N else chain.g / N, 0)
    move = np.where(np.arange(V) == z, 0, d * rate * score)
    table = move + max(1 - move.sum(), 0) * np.eye(V)[z]
    return table / table.sum()


@functools.cache
def jitted(kind, name, reading, part):
    return jax.jit(getattr(reverse.SAMPLERS[kind](PROCESSES[name], reading), part))


@pytest.mark.parametrize("reading", ["score", "published_score"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_tables_are_the_oracles(name, kind, reading):
    z, score, outputs, alpha_t, alpha_s = rows(PROCESSES[name], reading)
    ours = jitted(kind, name, reading, "kernel")(z, outputs, alpha_t, alpha_s)
    theirs = [expected(kind, PROCESSES[name], *row) for row in zip(z, score, alpha_t, alpha_s, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not np.asarray(ours)[alpha_s == 1, N].any()


@pytest.mark.parametrize(("name", "kind"), [("absorb", "euler"), ("uniform", "analytic"), ("gamma", "analytic")])
def test_draws_follow_the_table(name, kind):
    draws, (z, _, outputs, alpha_t, alpha_s) = 10_000, rows(PROCESSES[name])
    law_RxV = np.asarray(jitted(kind, name, "score", "kernel")(z, outputs, alpha_t, alpha_s), float)
    wide = lambda x: np.broadcast_to(x, (draws, *x.shape))
    step = jitted(kind, name, "score", "step")
    zs = np.asarray(step(jax.random.key(1), wide(z), wide(outputs), wide(alpha_t), wide(alpha_s)))
    assert zs.dtype == z.dtype
    still = alpha_t == alpha_s
    np.testing.assert_array_equal(zs[:, still], wide(z)[:, still])
    for row, law in zip(zs.T, law_RxV, strict=True):
        counts, possible = np.bincount(row, minlength=V), law > 1e-4
        assert counts[~possible].sum() <= 10
        if possible.sum() > 1:
            share = law[possible] / law[possible].sum()
            assert chisquare(counts[possible], share * counts[possible].sum()).pvalue > 1e-5


def test_ancestral_is_analytic_and_analytic_is_ancestral_for_predictions_of_tokens():
    process = PROCESSES["gamma"]
    z, score, outputs, alpha_t, alpha_s = rows(process)
    by_name = [
        jitted(kind, "gamma", "score", "kernel")(z, outputs, alpha_t, alpha_s) for kind in ("ancestral", "analytic")
    ]
    np.testing.assert_array_equal(*by_name)
    probs = np.random.default_rng(2).dirichlet(np.ones(N), len(z)).astype(np.float32)
    kernels = [
        jax.jit(jax.vmap(reverse.SAMPLERS[kind](process, "cavity").kernel)) for kind in ("ancestral", "analytic")
    ]
    np.testing.assert_array_equal(*(kernel(z, probs, alpha_t, alpha_s) for kernel in kernels))
    assert [reverse.SAMPLERS[kind](process, "score").name for kind in ("ancestral", *KINDS)] == ["ancestral", *KINDS]


# ---- two tokens with a joint law, both changing at once, and the network that knows their scores
JOINT = np.random.default_rng(12).dirichlet(np.full(N * N, 0.6)).reshape(N, N)


def true_scores(process, alpha):
    """[V, V, 2, V]: the scores of both positions at every pair of tokens."""
    q = oracle.marginal_table(chain_of(process), -np.log(alpha))
    law = q.T @ JOINT @ q
    safe = np.where(law > 0, law, 1)
    first, second = np.swapaxes(law, 0, 1)[None], law[:, None]
    return np.stack([np.broadcast_to(x, (V, V, V)) / safe[..., None] for x in (first, second)], 2)


def final_law(name, kind, steps):
    """[N, N]: the law of the finished pairs, by the tables of all steps."""
    process, kernel = PROCESSES[name], jitted(kind, name, "score", "kernel")
    z = np.indices((V, V)).reshape(2, -1).T.astype(np.int32)
    alphas = 1 - (1 - 1e-3) * np.arange(steps, -1, -1) / steps
    noise = oracle.marginal_table(chain_of(process), -np.log(1e-3)).mean(0)
    law = np.outer(noise, noise).ravel()
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        score = true_scores(process, alpha_t).reshape(V * V, 2, V)
        scale = np.array([log_scale(process, alpha_t, i, "score") if i < N or process.mask else 0 for i in range(V)])
        outputs = np.log(np.maximum(score, 1e-30)) + scale[z][..., None]
        full = np.full(z.shape, 1, np.float32)
        tables = np.asarray(kernel(z, outputs.astype(np.float32), alpha_t * full, alpha_s * full), float)
        law = np.einsum("r,ra,rb->ab", law, tables[:, 0], tables[:, 1]).ravel()
    return law.reshape(V, V)[:N, :N]


@pytest.mark.parametrize("name", PROCESSES)
def test_finished_texts_tend_to_the_data_law_and_analytic_steps_are_better(name):
    error = {(kind, t): np.abs(final_law(name, kind, t) - JOINT).sum() / 2 for kind in KINDS for t in (16, 128)}
    assert error["analytic", 128] < 0.01 and error["analytic", 128] < 0.3 * error["analytic", 16]
    assert error["euler", 128] < 0.5 * error["euler", 16]
    assert all(error["analytic", steps] < error["euler", steps] for steps in (16, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reverse.euler(PROCESSES["gamma"], "cavity"), "sampler.kind: got 'euler'.*score_entropy"),
        (lambda: reverse.euler(PROCESSES["gamma"]), "sampler.kind: got 'euler'"),
        (lambda: reverse.analytic(noising.epsilon_hybrid(N, 0.1)), "noising.kind: got 'epsilon_hybrid'"),
        (lambda: reverse.ancestral(noising.epsilon_hybrid(N, 0.1), "score"), "noising.kind: got"),
        (lambda: reverse.acs(PROCESSES["gamma"], 0.1, "score"), "sampler.kind: got 'acs'"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
