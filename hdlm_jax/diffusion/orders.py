"""Orders of unmasking: which masks of a window become tokens in a call, and which tokens masks again.

A call proposes a token for every mask, drawn from the network's (filtered) prediction, and commits some of them. With
pt = (alpha_s - alpha_t) / (1 - alpha_t), the probability that the ancestral chain unmasks a position in this call, an
even pace commits the sum of pt over the masks that may change: for a linear noise schedule, masks left / calls left.

  confidence     the most probable proposals (LLaDA, Nie et al. 2025)
  margin         the largest gap between the likeliest token and the next (Dream, Ye et al. 2025)
  entropy        the predictions of least entropy (Dream)
  threshold      every proposal with probability >= threshold (Fast-dLLM, Wu et al. 2025), and the even pace at least
  factor         the r most probable proposals, as long as the r-th has probability >= 1 - factor / (r + 1) (Fast-dLLM),
                 and the even pace at least
  first_hitting  one mask, drawn uniformly (Zheng et al. 2024): the ancestral chain's law in the limit of many calls,
                 for a network that does not see the noise level; one call for each position
  mask_predict   all of them, then the least probable tokens are masked again, as many as the noise level asks for
                 (Ghazvininejad et al. 2019); a token keeps the probability that it had when it was predicted

Probabilities are the network's own, before temperature and filters. A position's last call (alpha_s = 1) always commits
it; for epsilon_hybrid it draws every token once more, exactly, as in diffusion/reverse.py, and the tokens before it are
proposals without smoothing. Only `first_hitting` (and `margin` and `entropy` at one token a call, whose order does not
look at the proposal) keep the law of the network's chain: the others trade it for likelier texts.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.fields import number
from hdlm_jax.diffusion.noising import NoisingProcess, unmasked_share
from hdlm_jax.diffusion.reverse import Chance, Resampling, decide, proposed, reading_of, transfer
from hdlm_jax.diffusion.rules import Move, Rule, probability, rank, require_frozen
from hdlm_jax.errors import UserError, one_of

SLACK = 1e-3  # of a sum of float32 shares that stands for a whole number


class Pace(NamedTuple):
    """How many of n sorted proposals a call commits.

    Attributes:
      least: sum of pt, a scalar -> the even pace as a whole number.
      extra: confidences of the masks that may change, sorted downwards, [W], -1 behind them -> how many of the first
        may be committed together; None: only the even pace.
    """

    least: Callable[[Array], Array]
    extra: Callable[[Array], Array] | None = None


def confidence(
    process: NoisingProcess, rounding: str = "up", order_temperature: float = 0.0, reading: str | None = None
) -> Rule:
    """Commits the most probable proposals, as many as the even pace rounded 'up' or 'down' to a whole number.

    Args:
      order_temperature: Gumbel noise on the order: positions are drawn without replacement from the softmax of their
        scores divided by this; 0 takes the best ones.

    Raises:
      UserError: a dial out of range, a process whose tokens are not frozen, a reading that it does not know.
    """
    return _ranked("confidence", process, reading, _proposal, _even(rounding), order_temperature)


def margin(
    process: NoisingProcess, rounding: str = "down", order_temperature: float = 0.0, reading: str | None = None
) -> Rule:
    """Commits where the likeliest token leads the next by most; arguments and errors as `confidence`."""
    return _ranked("margin", process, reading, _margin, _even(rounding), order_temperature)


def entropy(
    process: NoisingProcess, rounding: str = "down", order_temperature: float = 0.0, reading: str | None = None
) -> Rule:
    """Commits where the prediction has the least entropy; arguments and errors as `confidence`."""
    return _ranked("entropy", process, reading, _negative_entropy, _even(rounding), order_temperature)


def threshold(process: NoisingProcess, threshold: float = 0.9, reading: str | None = None) -> Rule:
    """Commits every proposal that is probable enough, at least the even pace; saves the calls left without a mask.

    Raises:
      UserError: a threshold outside (0, 1], a process whose tokens are not frozen, a reading that it does not know.
    """
    least = number("sampler.threshold", threshold, "a number in (0, 1]", lambda value: 0 < value <= 1)
    pace = Pace(_up, lambda sorted_W: (sorted_W >= least).sum())
    return _ranked("threshold", process, reading, _proposal, pace)


def factor(process: NoisingProcess, factor: float = 1.0, reading: str | None = None) -> Rule:
    """Commits the most proposals n with (n + 1) (1 - p_n) <= factor, at least the even pace; saves calls.

    At factor 1, greedy tokens committed together are those that one after another would be.

    Raises:
      UserError: a factor that is not positive, a process whose tokens are not frozen, a reading that it does not know.
    """
    factor = number("sampler.factor", factor, "a number above 0", lambda value: value > 0)

    def extra(sorted_W: Array) -> Array:
        place_W = jnp.arange(1, sorted_W.shape[0] + 1)
        fits_W = (sorted_W >= 0) & ((place_W + 1) * (1 - sorted_W) <= factor)
        return jnp.cumprod(fits_W.astype(jnp.int32)).sum()

    return _ranked("factor", process, reading, _proposal, Pace(_up, extra))


def first_hitting(process: NoisingProcess, reading: str | None = None) -> Rule:
    """Commits one mask, drawn uniformly; for one call a position (`samplers.check`).

    Raises:
      UserError: a process other than absorb, a reading that it does not know.
    """
    if process.epsilon > 0:
        raise UserError(
            f"sampler.kind: got 'first_hitting' with noising.kind {process.name!r}; allowed: 'confidence' and others"
            " (its law is that of a process without shuffled tokens: absorb)"
        )
    one = Pace(lambda shares: jnp.ones((), jnp.int32))
    nothing = lambda scores_WxN, x0_W: jnp.zeros(x0_W.shape)
    return _ranked("first_hitting", process, reading, nothing, one, 1.0)


def mask_predict(process: NoisingProcess, reading: str | None = None) -> Rule:
    """Predicts every mask, then masks the floor(sum of 1 - alpha_s) tokens that were predicted with least probability.

    Raises:
      UserError: a process whose tokens are not frozen, a reading that it does not know.
    """
    require_frozen("mask_predict", process, reading)
    draws = Resampling(process, 0.0, reading_of(process, reading), 0.0, exact_last=True)
    return Rule("mask_predict", partial(_mask_predict, draws), memory=0.0)


RULES: Mapping[str, Callable[..., Rule]] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "mask_predict": mask_predict,
    "threshold": threshold,
    "factor": factor,
    "first_hitting": first_hitting,
}


def _up(shares: Array) -> Array:
    return jnp.maximum(jnp.ceil(shares - SLACK), 1).astype(jnp.int32)


def _down(shares: Array) -> Array:
    return jnp.floor(shares + SLACK).astype(jnp.int32)


def _even(rounding: str) -> Pace:
    return Pace({"up": _up, "down": _down}[one_of("sampler.rounding", rounding, ("up", "down"))])


def _proposal(scores_WxN: Array, x0_W: Array) -> Array:
    return probability(scores_WxN, x0_W, scores_WxN.shape[-1])


def _margin(scores_WxN: Array, x0_W: Array) -> Array:
    if scores_WxN.shape[-1] == 1:
        return jnp.ones(x0_W.shape)
    best_Wx2 = jax.lax.top_k(jax.nn.softmax(scores_WxN, -1), 2)[0]
    return best_Wx2[..., 0] - best_Wx2[..., 1]


def _negative_entropy(scores_WxN: Array, x0_W: Array) -> Array:
    log_p_WxN = jax.nn.log_softmax(scores_WxN, -1)
    p_WxN = jnp.exp(log_p_WxN)
    return jnp.where(p_WxN > 0, p_WxN * log_p_WxN, 0).sum(-1)


def _ranked(
    name: str,
    process: NoisingProcess,
    reading: str | None,
    score: Callable[[Array, Array], Array],
    pace: Pace,
    order_temperature: float = 0.0,
) -> Rule:
    require_frozen(name, process, reading)
    allowed = "a number >= 0 (0: no noise on the order)"
    heat = number("sampler.order_temperature", order_temperature, allowed, lambda value: value >= 0)
    draws = Resampling(process, 0.0, reading_of(process, reading), 0.0, exact_last=True)
    return Rule(name, partial(_commit, draws, score, pace, heat), chance=partial(_may_draw, process))


def _may_draw(process: NoisingProcess, rng: Array, zt_W: Array, move: Move) -> Chance:
    """Masks, and tokens at their exact last call."""
    return Chance(move.changes & (zt_W == process.mask) | _exactly_last(process, zt_W, move))


def _commit(
    draws: Resampling,
    score: Callable[[Array, Array], Array],
    pace: Pace,
    heat: float,
    rng: Array,
    zt_W: Array,
    logits_WxV: Array,
    move: Move,
    memory_W: Array | None,
    scores_WxV: Array | None = None,
) -> tuple[Array, Any]:
    x0_rng, order_rng = jax.random.split(rng)
    process, last_W = draws.process, move.alpha_s >= 1
    x0_W = proposed(draws, decide(draws, x0_rng, zt_W, last_W)[1], zt_W, logits_WxV)
    scores_WxN = (logits_WxV if scores_WxV is None else scores_WxV)[..., : process.num_tokens].astype(jnp.float32)
    may_W = move.changes & (zt_W == process.mask)
    score_W = score(scores_WxN, x0_W)
    order_W = score_W if heat == 0 else score_W / heat + jax.random.gumbel(order_rng, score_W.shape)
    order_W = jnp.where(may_W, jnp.where(last_W, jnp.inf, order_W), -jnp.inf)
    shares = jnp.where(may_W, transfer(process, move.alpha_t, move.alpha_s), 0).sum()
    commit_W = rank(order_W) < pace.least(shares)
    if pace.extra is not None:
        sure_W = jnp.where(may_W, score_W, -1)
        commit_W |= rank(sure_W) < pace.extra(-jnp.sort(-sure_W))
    redraw_W = (may_W & (commit_W | last_W)) | _exactly_last(process, zt_W, move)
    return jnp.where(redraw_W, x0_W, zt_W), memory_W


def _mask_predict(
    draws: Resampling,
    rng: Array,
    zt_W: Array,
    logits_WxV: Array,
    move: Move,
    memory_W: Array,
    scores_WxV: Array | None = None,
) -> tuple[Array, Array]:
    process, last_W = draws.process, move.alpha_s >= 1
    x0_W = proposed(draws, decide(draws, rng, zt_W, last_W)[1], zt_W, logits_WxV)
    p_W = probability(logits_WxV if scores_WxV is None else scores_WxV, x0_W, process.num_tokens)
    drawn_W = move.changes & ((zt_W == process.mask) | _exactly_last(process, zt_W, move))
    token_W, memory_W = jnp.where(drawn_W, x0_W, zt_W), jnp.where(drawn_W, p_W, memory_W)
    masks = jnp.where(move.changes, 1 - unmasked_share(move.alpha_s, process.alpha_max), 0).sum()
    doubt_W = jnp.where(move.changes & ~last_W, -memory_W, -jnp.inf)
    again_W = move.changes & ~last_W & (rank(doubt_W) < _down(masks))
    return jnp.where(again_W, process.mask, token_W), memory_W


def _exactly_last(process: NoisingProcess, zt_W: Array, move: Move) -> Array:
    """Where a token of a process with shuffled tokens is drawn once more: at its last call."""
    shuffled = process.epsilon > 0
    return move.changes & (move.alpha_s >= 1) & (zt_W != process.mask) & shuffled
