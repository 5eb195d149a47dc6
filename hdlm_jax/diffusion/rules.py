"""Rules: one call's step of a whole window, where positions may depend on each other and on earlier calls.

A reverse step (diffusion/reverse.py) moves every position on its own. The samplers that choose positions by the
network's confidence, or that remember how sure it was when it placed a token, need the window at once and a number
per position from call to call. Generation runs rules; `positionwise` makes one of any reverse step. By name:
diffusion/samplers.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import scores
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.reverse import Chance, ReverseStep
from hdlm_jax.errors import UserError


class Move(NamedTuple):
    """From where to where one call takes the positions of a window.

    Attributes:
      alpha_t: [W], survival before the call.
      alpha_s: [W], survival after it, at least alpha_t; 1 in a position's last call.
      changes: bool [W], the positions whose level falls in this call; the others keep their tokens.
    """

    alpha_t: Array
    alpha_s: Array
    changes: Array


class Rule(NamedTuple):
    """How a call moves a window.

    Attributes:
      name: as in `sampler.kind`.
      step: (rng, zt_W, logits_WxV, move, memory_W, scores_WxV=None) -> (zs_W, memory_W) of one text's window. Tokens
        are drawn from the logits, which have been filtered; confidence is judged by the scores, the network's own
        (None: the logits). Both may have the mask's column, which is left out. Positions that do not change keep
        token and memory.
      memory: what every position remembers at first; None for rules without memory, whose memory_W is None.
      chance: (rng, zt_W, move) -> `Chance`, what may draw a token, before the network is asked; a call in which nothing
        does is left out. None: every call is made.
      draw: (chance, zt_W, logits_WxV, move) -> zs_W, for rules that move every position on its own: the rest of
        `step`, of all positions or some. None: `step` is one.
      warp: the noise schedule that it runs under, from the one trained under; None: the same.
    """

    name: str
    step: Callable[..., tuple[Array, Array | None]]
    memory: float | None = None
    chance: Callable[[Array, Array, Move], Chance] | None = None
    draw: Callable[[Chance, Array, Array, Move], Array] | None = None
    warp: Callable[[NoiseSchedule], NoiseSchedule] | None = None


def positionwise(reverse: ReverseStep) -> Rule:
    """The rule that moves every position on its own by a reverse step."""

    def step(rng, zt_W, logits_WxV, move, memory_W, scores_WxV=None):
        return reverse.step(rng, zt_W, logits_WxV, move.alpha_t, move.alpha_s), memory_W

    if reverse.draw is None:
        return Rule(reverse.name, step)

    def chance(rng, zt_W, move):
        return reverse.chance(rng, zt_W, move.alpha_t, move.alpha_s)

    def draw(chance_W, zt_W, logits_WxV, move):
        return reverse.draw(chance_W, zt_W, logits_WxV, move.alpha_t, move.alpha_s)

    return Rule(reverse.name, step, chance=chance, draw=draw)


def probability(scores_WxV: Array, tokens_W: Array, num_tokens: int) -> Array:
    """The network's probability [W] of one ordinary token per row, float32.

    >>> probability(jnp.log(jnp.array([[1.0, 3.0, 9.0]])), jnp.array([1]), num_tokens=2).tolist()
    [0.75]
    """
    p_WxN = jax.nn.softmax(scores_WxV[..., :num_tokens].astype(jnp.float32), -1)
    return jnp.take_along_axis(p_WxN, tokens_W[..., None], -1, mode="clip")[..., 0]


def rank(score_W: Array) -> Array:
    """int32 [W]: 0 for the largest score, 1 for the next; equal ones from left to right.

    >>> rank(jnp.array([0.1, 0.9, 0.1])).tolist()
    [1, 0, 2]
    """
    return jnp.argsort(jnp.argsort(-score_W, stable=True), stable=True).astype(jnp.int32)


def require_frozen(kind: str, process: NoisingProcess, reading: str | None) -> None:
    """Refuses processes whose unmasked tokens change on their own, and networks that learned scores."""
    if not process.frozen:
        raise UserError(
            f"sampler.kind: got {kind!r} with noising.kind {process.name!r}; allowed: 'ancestral' ({kind} chooses among"
            " masks, and needs a process in which a token only ever turns into the mask: absorb or epsilon_hybrid)"
        )
    if reading in scores.READINGS:
        raise UserError(
            f"sampler.kind: got {kind!r} for a network that learned scores; allowed: 'ancestral', 'analytic', 'euler'"
        )
