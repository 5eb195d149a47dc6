"""What is done to the network's scores before a rule draws from them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion.categorical import filter_logits
from hdlm_jax.diffusion.fields import number
from hdlm_jax.errors import require


class Shaping(NamedTuple):
    """Settings of `shaper`; the defaults change nothing.

    Attributes:
      temperature, top_k, top_p: see `diffusion.categorical.filter_logits`.
      repetition_penalty: the probability of every token that the text holds already is divided by it, at least 1.
      forbidden: ids of tokens that are never drawn.
      hook: (logits_BxWxN, x_BxL) -> logits_BxWxN, a pure JAX function, applied first; None: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    forbidden: tuple[int, ...] = ()
    hook: Callable[[Array, Array], Array] | None = None


def shaper(shaping: Shaping, num_tokens: int) -> Callable[[Array, Array], Array]:
    """The function (scores_BxWxV, x_BxL) -> scores_BxWxV of some settings.

    Raises:
      UserError: a value out of range, a forbidden token that is no ordinary one, or all of them forbidden.

    >>> shape = shaper(Shaping(forbidden=(0,), repetition_penalty=np.e), num_tokens=3)
    >>> shape(jnp.zeros((1, 1, 4)), jnp.array([[2, 3]])).tolist()
    [[[-inf, 0.0, -1.0, 0.0]]]
    """
    s = shaping
    number("sampler.repetition_penalty", s.repetition_penalty, "a number >= 1 (1 is off)", lambda value: value >= 1)
    for token in s.forbidden:
        require(0 <= token < num_tokens, "forbid", token, f"token ids in 0 .. {num_tokens - 1}")
    some_left = len(set(s.forbidden)) < num_tokens
    require(some_left, "forbid", f"{len(s.forbidden)} tokens", "not all of them")
    filter_logits(jnp.zeros(2), s.temperature, s.top_k, s.top_p)  # refuses what is out of range
    return partial(_shape, shaping, num_tokens)


def _shape(s: Shaping, num_tokens: int, scores_BxWxV: Array, x_BxL: Array) -> Array:
    if s.hook is not None:
        shaped_BxWxN = s.hook(scores_BxWxV[..., :num_tokens], x_BxL)
        scores_BxWxV = jnp.concatenate([shaped_BxWxN, scores_BxWxV[..., num_tokens:]], -1)
    V = scores_BxWxV.shape[-1]
    if s.forbidden:
        allowed_V = ~np.isin(np.arange(V), s.forbidden)
        scores_BxWxV = jnp.where(allowed_V[None, None, :], scores_BxWxV, -jnp.inf)
    if s.repetition_penalty > 1:
        penalty = jnp.log(jnp.asarray(s.repetition_penalty, scores_BxWxV.dtype))
        scores_BxWxV = scores_BxWxV - penalty * _held(x_BxL, V, num_tokens)[:, None, :]
    return filter_logits(scores_BxWxV, s.temperature, s.top_k, s.top_p)


def _held(x_BxL: Array, V: int, num_tokens: int) -> Array:
    """bool [B, V], the ordinary tokens that each text holds."""
    rows_Bx1 = jnp.arange(x_BxL.shape[0])[:, None]
    tokens_BxL = jnp.where(x_BxL < num_tokens, x_BxL, V)
    return jnp.zeros((x_BxL.shape[0], V), bool).at[rows_Bx1, tokens_BxL].set(True, mode="drop")
