"""Concrete scores of the two-clock processes: what they are, and the laws of the way back that they give.

The score of a text's position in state z is the vector of ratios s_y = p_t(y) / p_t(z), given the rest (SEDD,
Lou et al. 2024). The processes are exp(sigma Q), sigma = -log alpha, with rates gamma/N from any token into each
ordinary token and 1 - gamma into the mask, which keeps what it has: absorb at gamma = 0, uniform at gamma = 1,
gamma_hybrid between. With the kept share of each clock,

  A = e^{-(1-gamma) sigma} (not masked),  f = e^{-gamma sigma} (not shuffled),  h = (1 - f)/N,

q(y | x) = A (f 1[y = x] + h), q(mask | x) = 1 - A, and the score of a single x, r_y = q(y | x) / q(z | x), is

  z masked   A (f 1[y = x] + h) / (1 - A)
  z = x      1/(1 + k), k = N f/(1 - f);  (1 - A) / (A (f + h)) at the mask
  else       1 + k at y = x, 1 at the other ordinary tokens, (1 - A) / (A h) at the mask

A network gives log-scores in two ways (`READINGS`, beside the readings of x0 probabilities in noising.py):

  score            its outputs less log(N (1 - A)/A) at masks, as they are at tokens: an output of 0 is the score of a
                   text that nothing is known of, as in SEDD's absorb and uniform networks
  published_score  less log(N (e^sigma - 1)) everywhere, as in the authors' gamma-hybrid: at a token and small sigma far
                   above the truth until the network has learned otherwise

Tables cost O(N) a position, for any leading shape [...]. They have V = N + 1 columns, the mask's last; scores
have the own token's entry 1. The mask's entry of an unmasked position is never used: nothing leaves the mask.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.noise_schedules import SIGMA_MARGIN
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.errors import UserError, choose

FLOOR = 1e-6  # least staggered score beside the mean one: what a network rules out stays possible


class Clocks(NamedTuple):
    """A process of two clocks: N ordinary tokens, and the share gamma in [0, 1] of the uniform clock."""

    num_tokens: int
    gamma: float


class Kept(NamedTuple):
    """What each clock leaves after a time, and what it takes: A, 1 - A, f, 1 - f."""

    unmasked: Array
    masked: Array
    own: Array
    shuffled: Array


class Targets(NamedTuple):
    """The score that the score entropy measures against, on the channels into z; each [...].

    Attributes:
      rate: of every channel y -> z, y ordinary and not z, per unit of sigma.
      at_x0: r_y at y = x0 (nothing where z = x0: that is no channel).
      other: r_y at every other ordinary y.
    """

    rate: Array
    at_x0: Array
    other: Array


def clocks(process: NoisingProcess) -> Clocks:
    """The clocks of absorb, uniform or gamma_hybrid.

    Raises:
      UserError: a process that has no scores here.
    """
    if process.gamma is None:
        raise UserError(
            f"noising.kind: got {process.name!r} for a network that learns scores; allowed: 'absorb', 'uniform',"
            " 'gamma_hybrid'"
        )
    return Clocks(process.num_tokens, process.gamma)


def elapsed(alpha_from: Array, alpha_to: Array) -> Array:
    """Time log(alpha_from / alpha_to) between two survivals, alpha_from >= alpha_to, without cancellation.

    >>> elapsed(jnp.array([1.0, 0.5]), jnp.array([0.25, 0.5])).round(4).tolist()
    [1.3863, 0.0]
    """
    lost = (alpha_from - alpha_to) / alpha_from
    near = lost < 0.5
    return jnp.where(near, -jnp.log1p(-jnp.where(near, lost, 0)), -jnp.log(alpha_to / alpha_from))


def noise_level(alpha: Array) -> Array:
    """sigma = -log alpha, without cancellation."""
    return elapsed(jnp.ones_like(alpha), alpha)


def kept(of: Clocks, sigma: Array) -> Kept:
    """The shares of both clocks after `sigma`, by expm1 of each."""
    absorbing, shuffling = (1 - of.gamma) * sigma, of.gamma * sigma
    return Kept(jnp.exp(-absorbing), -jnp.expm1(-absorbing), jnp.exp(-shuffling), -jnp.expm1(-shuffling))


def log_scores(of: Clocks, outputs: Array, zt: Array, sigma: Array, reading: str = "score") -> Array:
    """Log-scores [..., V] of a network's outputs [..., V]: outputs - `log_scale`, and 0 at the own token.

    >>> log_scores(Clocks(2, 0.0), jnp.zeros(3), jnp.array(2), jnp.log(2.0)).round(4).tolist()
    [-0.6931, -0.6931, 0.0]
    """
    return jnp.where(_is(zt, outputs), 0.0, outputs - log_scale(of, zt, sigma, reading)[..., None])


def log_scale(of: Clocks, zt: Array, sigma: Array, reading: str = "score") -> Array:
    """What outputs exceed log-scores by, [...]; sigma is clipped from below at 1e-4, about as where a network sees it.

    Raises:
      UserError: a reading that is not of scores.
    """
    return choose("reading (of scores)", reading, READINGS)(of, zt, jnp.maximum(sigma, SIGMA_MARGIN))


def _plain_scale(of: Clocks, zt: Array, sigma: Array) -> Array:
    part = kept(of, sigma)
    known = zt != of.num_tokens
    return jnp.where(known, 0, jnp.log(_safe(part.masked) / part.unmasked) + math.log(of.num_tokens))


def _published_scale(of: Clocks, zt: Array, sigma: Array) -> Array:
    return sigma + jnp.log(-jnp.expm1(-sigma)) + math.log(of.num_tokens)


# How outputs of a network that learned scores are read; 0 everywhere at unmasked tokens, and at masks log(N (1 - A)/A),
# or log(N (e^sigma - 1)) everywhere.
READINGS = {"score": _plain_scale, "published_score": _published_scale}


def targets(of: Clocks, zt: Array, x0: Array, sigma: Array) -> Targets:
    """The exact score r of x0 on the channels into zt (module docstring).

    >>> at_mask = targets(Clocks(2, 0.5), jnp.array(2), jnp.array(0), 2 * jnp.log(2.0))
    >>> [round(float(x), 4) for x in at_mask]
    [0.5, 0.75, 0.25]
    """
    N, part = of.num_tokens, kept(of, sigma)
    masked = zt == N
    odds = part.unmasked / _safe(part.masked)
    ratio = N * part.own / _safe(part.shuffled)
    same = part.shuffled / (part.shuffled + N * part.own)
    rate = jnp.where(masked, 1 - of.gamma, of.gamma / N)
    spread = part.shuffled / N
    return Targets(
        rate,
        jnp.where(masked, odds * (part.own + spread), 1 + ratio),
        jnp.where(masked, odds * spread, jnp.where(zt == x0, same, 1.0)),
    )


def exact(of: Clocks, zt: Array, x0: Array, sigma: Array) -> Array:
    """The score r [..., V] of a single x0; inf where zt cannot come from x0."""
    N, part, to = of.num_tokens, kept(of, sigma), targets(of, zt, x0, sigma)
    like = jnp.zeros((*jnp.broadcast_shapes(zt.shape, x0.shape, sigma.shape), N + 1), sigma.dtype)
    from_token = part.unmasked * (jnp.where(zt == x0, part.own, 0.0) + part.shuffled / N)
    r = jnp.where(_is(x0, like), to.at_x0[..., None], to.other[..., None])
    r = jnp.where(_ids(like) == N, (part.masked / from_token)[..., None], r)
    return jnp.where(_is(zt, like), 1.0, r)


def from_posterior(of: Clocks, zt: Array, p: Array, sigma: Array) -> Array:
    """Scores [..., V] of the posterior p(x | zt) [..., N]: s_y = sum_x p(x | zt) r_y(x).

    zt masked: A (f p_y + h) / (1 - A); else k p_y + 1 - p_z k/(1 + k), and at the mask
    (1 - A)/(A h) (1 - p_z k/(1 + k)).
    """
    N, part = of.num_tokens, kept(of, sigma)
    columns = jnp.concatenate([p, jnp.zeros_like(p[..., :1])], -1)
    own, others = (jnp.where(_is(zt, columns) == here, columns, 0.0).sum(-1) for here in (True, False))
    possible = part.shuffled > 0  # else an unmasked token is clean: every other score is 0
    ratio = jnp.where(possible, N * part.own / _safe(part.shuffled), 0.0)
    total = part.shuffled + N * part.own
    rest = others + own * part.shuffled / total  # 1 - p_z k/(1 + k)
    token = ratio[..., None] * columns + rest[..., None]
    odds = part.unmasked / _safe(part.masked)
    at_mask = odds[..., None] * (part.own[..., None] * columns + (part.shuffled / N)[..., None])
    leaves = N * part.masked / part.unmasked
    to_mask = leaves * jnp.where(possible, rest / _safe(part.shuffled), own / total)
    score = jnp.where((zt == N)[..., None], at_mask, token)
    score = jnp.where(_ids(columns) == N, to_mask[..., None], score)
    return jnp.where(_is(zt, columns), 1.0, score)


def to_posterior(of: Clocks, zt: Array, scores: Array, sigma: Array) -> Array:
    """p(x | zt) [..., N] of scores [..., V]: the step of length sigma to the clean text.

    `staggered` times q(zt | x), raised to `FLOOR` and normalised as there: scores that no posterior has would turn
    negative.
    """
    return tweedie(of, zt, scores, sigma, last=True)[..., : of.num_tokens]


def staggered(of: Clocks, scores: Array, d: Array) -> Array:
    """Scores [..., V] times exp(-d Q), exactly (SEDD's staggered score); only of true scores surely >= 0.

    e^d (s_y - h S) at ordinary tokens, s_mask + (1 - e^{(1-gamma) d}) S at the mask, S the sum over ordinary ones.
    """
    part, total = kept(of, d), _total(of, scores)
    ordinary = jnp.exp(d)[..., None] * (scores - (part.shuffled / of.num_tokens * total)[..., None])
    mask = scores - (part.masked / part.unmasked * total)[..., None]
    return jnp.where(_ids(scores) < of.num_tokens, ordinary, mask)


def tweedie(of: Clocks, zt: Array, scores: Array, d: Array, last: bool | Array = False) -> Array:
    """The analytic step: p(z_s | zt) [..., V] a time d earlier; exact for true scores.

    `staggered` times q(zt | z_s). Staggered scores are raised to `FLOOR` of the ordinary tokens' mean (of 1 at most
    where zt is a token), then all is normalised: of any positive scores the table is a law, and of finite
    divergence. In the last step the mask's entry is 0.

    Args:
      of: the clocks.
      zt: int [...].
      scores: [..., V], 1 at zt.
      d: [...] >= 0.
      last: bool [...], whether the step ends in the clean text.
    """
    table = step_weights(of, zt, scores, d, last)
    return table / _safe(table.sum(-1, keepdims=True))


def step_weights(of: Clocks, zt: Array, scores: Array, d: Array, last: bool | Array = False) -> Array:
    """`tweedie` before it is normalised; the columns may go on after the mask's, with weights of 0."""
    N, part, total = of.num_tokens, kept(of, d), _total(of, scores)
    masked, is_own = (zt == N)[..., None], _is(zt, scores)
    spread = part.shuffled / N
    mean = part.own * total / N
    least = FLOOR * jnp.where(zt == N, mean, jnp.minimum(mean, 1))[..., None]
    ordinary = jnp.maximum(scores - (spread * total)[..., None], least)
    arrives = jnp.where(masked, (part.masked / part.unmasked)[..., None], spread[..., None])
    weight = ordinary * (arrives + jnp.where(is_own, part.own[..., None], 0.0)) / part.own[..., None]
    stay = jnp.maximum(1 - part.masked / part.unmasked * total, FLOOR)
    stay = jnp.where(last, 0.0, stay)[..., None]
    return jnp.where(_ids(scores) < N, weight, jnp.where(masked & (_ids(scores) == N), stay, 0.0))


def euler(of: Clocks, zt: Array, scores: Array, d: Array) -> Array:
    """The Euler step: p(z_s | zt) [..., V] a time d earlier, correct to first order in d.

    d times the reverse rate Q(y -> zt) s_y at y != zt, the rest at zt; where that is negative the rates alone,
    normalised.
    """
    N = of.num_tokens
    is_own = _is(zt, scores)
    rate = jnp.where(zt == N, 1 - of.gamma, of.gamma / N)[..., None]
    moves = jnp.where(is_own | (_ids(scores) >= N), 0.0, d[..., None] * rate * scores)
    stay = jnp.maximum(1 - moves.sum(-1, keepdims=True), 0.0)
    table = jnp.where(is_own, stay, moves)
    return table / table.sum(-1, keepdims=True)


def true_step(of: Clocks, zt: Array, x0: Array, sigma_s: Array, d: Array) -> Array:
    """q(z_s | zt, x0) [..., V] a time d before zt, at sigma_s: what `tweedie` gives for the score of x0 alone."""
    N, before, between, after = of.num_tokens, kept(of, sigma_s), kept(of, d), kept(of, sigma_s + d)
    like = jnp.zeros((*jnp.broadcast_shapes(zt.shape, x0.shape, d.shape), N + 1), d.dtype)
    spread = lambda part: (part.shuffled / N)[..., None]
    masked, clean = (zt == N)[..., None], (zt == x0)[..., None]
    law = spread(before) + jnp.where(_is(x0, like), before.own[..., None], 0.0)
    arrives = spread(between) + jnp.where(_is(zt, like), between.own[..., None], 0.0)
    evidence = spread(after) + jnp.where(clean, after.own[..., None], 0.0)
    unmasking = (before.unmasked * between.masked / _safe(after.masked))[..., None]
    table = law * jnp.where(masked, unmasking, arrives / _safe(evidence))
    stay = jnp.where(masked, (before.masked / _safe(after.masked))[..., None], 0.0)
    return jnp.where(_ids(like) < N, table, stay)


def _total(of: Clocks, scores: Array) -> Array:
    """Sum over the ordinary tokens."""
    return jnp.where(_ids(scores) < of.num_tokens, scores, 0.0).sum(-1)


def _ids(like: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, like.ndim - 1)


def _is(z: Array, like: Array) -> Array:
    return _ids(like) == z[..., None]


def _safe(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
