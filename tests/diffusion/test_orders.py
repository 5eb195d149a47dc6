"""Orders of unmasking against plain numpy, with greedy proposals; their pace, their last calls, and their laws."""

import functools

import jax
import numpy as np
import pytest

from hdlm_jax.diffusion import noising, orders
from hdlm_jax.diffusion.rules import Move
from tests.oracle import hdlm_oracle as oracle

N, W = 4, 12
ABSORB, EPSILON_HYBRID = noising.absorb(N), noising.epsilon_hybrid(N, 0.2)


@functools.cache
def stepper(kind, process=ABSORB, **dials):
    rule = orders.RULES[kind](process, **dials)
    return jax.jit(rule.step), rule.memory


def stepped(rule, seed, zt_W, probs_WxN, move, memory_W=None, greedy=True):
    """Next tokens and memory; proposals are the likeliest tokens, or drawn."""
    step, _ = rule
    scores_WxV = np.concatenate([np.log(probs_WxN), np.full((len(zt_W), 1), 9.0)], 1).astype(np.float32)
    best = np.arange(N + 1) == probs_WxN.argmax(1)[:, None]
    logits_WxV = np.where(best, 0, -np.inf).astype(np.float32) if greedy else scores_WxV
    z_W, memory_W = step(jax.random.key(seed), zt_W.astype(np.int32), logits_WxV, move, memory_W, scores_WxV)
    return np.asarray(z_W), None if memory_W is None else np.asarray(memory_W)


def window(seed):
    """A random window: tokens and masks, each position its own alphas, some in their last call, some at rest."""
    rng = np.random.default_rng(seed)
    zt_W = np.where(rng.random(W) < 0.7, N, rng.integers(0, N, W))
    probs_WxN = rng.dirichlet(np.full(N, 0.5), W) * 0.99 + 0.0025
    alpha_t = rng.uniform(0, 0.8, W).astype(np.float32)
    alpha_s = np.where(rng.random(W) < 0.1, 1, alpha_t + rng.uniform(0, 0.2, W)).astype(np.float32)
    return zt_W, probs_WxN, Move(alpha_t, alpha_s, rng.random(W) < 0.85)


def shares(zt_W, move):
    return np.where(move.changes & (zt_W == N), (move.alpha_s - move.alpha_t) / (1 - move.alpha_t), 0)


SCORES = {
    "confidence": lambda p: p.max(1),
    "margin": lambda p: np.sort(p, 1)[:, -1] - np.sort(p, 1)[:, -2],
    "entropy": lambda p: (p * np.log(p)).sum(1),
}


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("kind", SCORES)
def test_the_best_are_committed_at_an_even_pace_and_last_calls_in_any_case(kind, rounding):
    for seed in range(40):
        zt_W, probs_WxN, move = window(seed)
        z_W, _ = stepped(stepper(kind, rounding=rounding), seed, zt_W, probs_WxN, move)
        may_W = move.changes & (zt_W == N)
        pace = shares(zt_W, move).sum()
        count = max(np.ceil(pace), 1) if rounding == "up" else np.floor(pace)
        order = sorted(np.flatnonzero(may_W), key=lambda i: (move.alpha_s[i] < 1, -SCORES[kind](probs_WxN)[i]))
        expected = zt_W.copy()
        expected[order[: int(count)]] = probs_WxN.argmax(1)[order[: int(count)]]
        np.testing.assert_array_equal(z_W, expected)


@pytest.mark.parametrize("kind", ["threshold", "factor"])
def test_what_is_sure_is_committed_together(kind):
    rule = stepper(kind, **{kind: {"threshold": 0.7, "factor": 1.5}[kind]})
    committed = 0
    for seed in range(40):
        zt_W, probs_WxN, move = window(seed)
        z_W, _ = stepped(rule, seed, zt_W, probs_WxN, move)
        may = np.flatnonzero(move.changes & (zt_W == N))
        sure = sorted(may, key=lambda i: -probs_WxN[i].max())
        if kind == "threshold":
            together = [i for i in sure if probs_WxN[i].max() >= 0.7]
        else:
            fits = [r for r, i in enumerate(sure, 1) if probs_WxN[i].max() >= 1 - 1.5 / (r + 1)]
            together = sure[: max(fits, default=0)]
        least = sorted(may, key=lambda i: (move.alpha_s[i] < 1, -probs_WxN[i].max()))
        least = least[: int(max(np.ceil(shares(zt_W, move).sum()), 1))]
        committed += len(set(together) - set(least))
        chosen, expected = sorted(set(together) | set(least)), zt_W.copy()
        expected[chosen] = probs_WxN.argmax(1)[chosen]
        np.testing.assert_array_equal(z_W, expected)
    assert committed > 20, "more than the even pace"


def flat_run(rule, probs_WxN, steps, process=ABSORB, greedy=True, seed=0):
    """Windows [steps + 1, W] of a flat linear run from all masks, and the last memory."""
    z_W, history = np.full(len(probs_WxN), N), []
    memory_W = None if rule[1] is None else np.full(len(probs_WxN), rule[1], np.float32)
    for k in range(steps):
        history.append(z_W)
        alpha = np.minimum(np.array([k, k + 1]) / steps, process.alpha_max if k + 1 < steps else 1)
        full = lambda alpha: np.full(len(probs_WxN), alpha, np.float32)
        move = Move(full(alpha[0]), full(alpha[1]), full(1) > 0)
        z_W, memory_W = stepped(rule, seed * 1000 + k, z_W, probs_WxN, move, memory_W, greedy)
    return np.array([*history, z_W]), memory_W


PROBS_WxN = np.random.default_rng(5).dirichlet(np.full(N, 0.5), W) * 0.99 + 0.0025


@pytest.mark.parametrize("steps", [1, 5, 7, 12, 30])
def test_the_even_split_of_llada(steps):
    """Every call commits W // steps masks, and the first W % steps calls one more."""
    windows, _ = flat_run(stepper("confidence", rounding="up"), PROBS_WxN, steps)
    expected = [W // steps + (k < W % steps) for k in range(steps)]
    np.testing.assert_array_equal(-np.diff((windows == N).sum(1)), expected)


@pytest.mark.parametrize("steps", [1, 5, 7, 30])
def test_the_split_of_dream(steps):
    """A call at t commits int(masks (1 - s / t)), and the last one the rest."""
    windows, _ = flat_run(stepper("entropy", rounding="down"), PROBS_WxN, steps)
    left, expected = W, []
    for k in range(steps):
        expected.append(left * 1 // (steps - k))
        left -= expected[-1]
    np.testing.assert_array_equal(-np.diff((windows == N).sum(1)), expected)


@pytest.mark.parametrize("kind", ["confidence", "margin", "entropy", "mask_predict", "threshold", "factor"])
def test_no_mask_is_left(kind):
    for steps in (1, 3, 20):
        assert (flat_run(stepper(kind), PROBS_WxN, steps)[0][-1] < N).all()


def test_mask_predict_masks_the_least_probable_again_as_many_as_the_level_says():
    steps, rule = 4, stepper("mask_predict")
    windows, memory_W = flat_run(rule, PROBS_WxN, steps)
    best_W = PROBS_WxN.max(1)
    for k in range(1, steps + 1):
        again = np.argsort(best_W, kind="stable")[: W * (steps - k) // steps]
        expected = PROBS_WxN.argmax(1)
        expected[again] = N
        np.testing.assert_array_equal(windows[k], expected)
    np.testing.assert_allclose(memory_W, best_W, rtol=1e-5)


def test_mask_predict_remembers_how_probable_a_token_was_when_it_was_predicted():
    zt_W, probs_WxN, move = window(3)
    old_W = np.linspace(0, 1, W).astype(np.float32)
    _, memory_W = stepped(stepper("mask_predict"), 0, zt_W, probs_WxN, move, old_W)
    predicted_W = move.changes & (zt_W == N)
    np.testing.assert_allclose(memory_W, np.where(predicted_W, probs_WxN.max(1), old_W), rtol=1e-5)


def test_noise_on_the_order_draws_positions_from_the_softmax_of_their_scores():
    """One of W positions a call: the first committed one follows softmax(confidence / order_temperature)."""
    step, _ = stepper("confidence", rounding="up", order_temperature=0.2)
    scores_WxN = np.log(PROBS_WxN).astype(np.float32)
    greedy = np.where(np.arange(N) == PROBS_WxN.argmax(1)[:, None], 0, -np.inf).astype(np.float32)
    move = Move(np.zeros(W, np.float32), np.full(W, 1 / W, np.float32), np.ones(W, bool))
    run = jax.vmap(lambda rng: step(rng, np.full(W, N, np.int32), greedy, move, None, scores_WxN)[0])
    z_SxW = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), 4000)))
    counts = (z_SxW < N).sum(0)
    law = np.exp(PROBS_WxN.max(1) / 0.2)
    law /= law.sum()
    assert counts.sum() == 4000
    assert ((counts - 4000 * law) ** 2 / (4000 * law)).sum() < 40  # chi-square, 11 degrees of freedom


def test_first_hitting_unmasks_one_position_a_call_each_as_often_as_any_other():
    step, _ = stepper("first_hitting")
    scores_WxN = np.log(PROBS_WxN).astype(np.float32)
    zt_W = np.where(np.arange(W) < 4, 0, N).astype(np.int32)
    move = Move(np.full(W, 0.3, np.float32), np.full(W, 0.4, np.float32), np.arange(W) != 11)
    run = jax.vmap(lambda rng: step(rng, zt_W, scores_WxN, move, None)[0])
    z_SxW = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), 4000)))
    counts = (z_SxW != zt_W).sum(0)
    assert (counts[:4].sum(), counts[11], counts.sum()) == (0, 0, 4000)
    assert ((counts[4:11] - 4000 / 7) ** 2 / (4000 / 7)).sum() < 25  # 6 degrees of freedom
    own = np.bincount(z_SxW[:, 5][z_SxW[:, 5] < N], minlength=N) / counts[5]
    np.testing.assert_allclose(own, PROBS_WxN[5], atol=0.08)


@pytest.mark.parametrize("kind", ["confidence", "mask_predict"])
def test_the_last_call_draws_shuffled_tokens_once_more_from_the_posterior(kind):
    """With epsilon, tokens at their last call follow p(x | z); those that do not change stay."""
    step, memory = stepper(kind, EPSILON_HYBRID, reading="cavity")
    zt_W = np.arange(W, dtype=np.int32) % N
    move = Move(np.full(W, 0.9, np.float32), np.ones(W, np.float32), np.arange(W) < 8)
    memory_W = None if memory is None else np.zeros(W, np.float32)
    scores_WxN = np.log(PROBS_WxN).astype(np.float32)
    run = jax.vmap(lambda rng: step(rng, zt_W, scores_WxN, move, memory_W)[0])
    z_SxW = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_array_equal(z_SxW[:, 8:], np.broadcast_to(zt_W[8:], (4000, 4)))
    for i in range(8):
        law = oracle.cavity_to_posterior(oracle.Epsilon(N, 0.2), -np.log(0.9), zt_W[i], PROBS_WxN[i])
        np.testing.assert_allclose(np.bincount(z_SxW[:, i], minlength=N) / 4000, law, atol=0.04)
