"""Exact categorical draws from large vocabularies, and the filters that shape their logits.

A draw is an inverse CDF in two levels: one uniform picks a block of 64 tokens, another the token inside it.
The CDF and the uniforms are kept in two float32 parts, 46 bits together, because a single float32 cannot tell
apart tokens deep in the tail (2^-24 of the mass is hundreds of tokens there). One Gumbel per logit would need
as many bits for each and costs ten times as much on a CPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.fields import number, whole

BLOCK = 64  # tokens
UNITS = 2.0**23  # whole parts of the CDF; float32 counts them exactly


class Uniforms(NamedTuple):
    """What one draw takes from chance: uniforms float32, each of the draws' shape."""

    block: Array
    token: Array
    block_part: Array
    token_part: Array


def uniforms(rng: Array, shape: tuple[int, ...]) -> Uniforms:
    """The chance of draws of a shape."""
    return Uniforms(*jax.random.uniform(rng, (4, *shape), jnp.float32))


def categorical(rng: Array, logits_V: Array) -> Array:
    """Draws from softmax(logits): [..., V] -> int32 [...]. Logits of -inf are never drawn.

    Computes in float32 (float64 for float64 logits); at least one logit must be finite.

    >>> logits_BxV = jnp.full((2, 100), -jnp.inf).at[:, 70].set(0.0)
    >>> categorical(jax.random.key(0), logits_BxV).tolist()
    [70, 70]
    """
    return categorical_of(uniforms(rng, logits_V.shape[:-1]), logits_V)


@jax.jit
def categorical_of(u: Uniforms, logits_V: Array) -> Array:
    """`categorical` of uniforms that have been drawn."""
    logits_V = logits_V.astype(jnp.promote_types(logits_V.dtype, jnp.float32))
    *batch, V = logits_V.shape
    blocks = -(-V // BLOCK)
    padding = [(0, 0)] * len(batch) + [(0, blocks * BLOCK - V)]
    logits_GxK = jnp.pad(logits_V, padding, constant_values=-jnp.inf).reshape(*batch, blocks, BLOCK)
    top = logits_GxK.max((-2, -1), keepdims=True)
    block = invert(jnp.exp(logits_GxK - top).sum(-1), jnp.floor(u.block * UNITS), u.block_part)
    chosen_K = jnp.take_along_axis(logits_GxK, block[..., None, None], -2)[..., 0, :]
    weights_K = jnp.exp(chosen_K - chosen_K.max(-1, keepdims=True))
    return block * BLOCK + invert(weights_K, jnp.floor(u.token * UNITS), u.token_part)


@jax.jit
def invert(weights_K: Array, unit: Array, part: Array) -> Array:
    """The index where the normalised CDF of the weights passes (unit + part) / 2^23: [..., K] -> int32 [...].

    Args:
      weights_K: [..., K] or [K], non-negative, some positive; an index of weight 0 is never returned.
      unit: [...], whole numbers in 0 .. 2^23 - 1, and part: [...] in [0, 1); uniform for exact draws.

    >>> invert(jnp.array([1.0, 0.0, 3.0]), jnp.array([0.0, 2.0**21]), jnp.array([0.0, 0.5])).tolist()
    [0, 2]
    """
    weights_K = jnp.broadcast_to(weights_K, (*unit.shape, weights_K.shape[-1]))
    scaled_K = weights_K * (UNITS / weights_K.sum(-1, keepdims=True))
    whole_K = jnp.round(scaled_K)
    cdf_whole_K, cdf_part_K = jnp.cumsum(whole_K, -1), jnp.cumsum(scaled_K - whole_K, -1)
    unit, part = unit[..., None], part[..., None]
    # Rounding moves the end of the CDF off 2^23 by more than a tail may weigh, so the uniform is stretched.
    excess = (cdf_whole_K[..., -1:] - UNITS) + cdf_part_K[..., -1:]
    passed_K = (cdf_whole_K - unit) + (cdf_part_K - part - unit * (excess / UNITS)) > 0
    # A backend may round each entry of a cumulative sum on its own: weight 0 must be excluded by itself.
    index = jnp.argmax(passed_K & (weights_K > 0), -1)
    return jnp.where(passed_K[..., -1], index, jnp.argmax(weights_K, -1)).astype(jnp.int32)


def filter_logits(logits_V: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """Temperature, then top-k, then top-p, on logits [..., V]; the defaults change nothing.

    Raises:
      UserError: sampler.temperature below 0, sampler.top_k below 0, sampler.top_p outside (0, 1].

    >>> filter_logits(jnp.array([0.0, 2.0, 1.0]), temperature=0.5, top_k=2).tolist()
    [-inf, 4.0, 2.0]
    """
    return keep_top_p(keep_top_k(with_temperature(logits_V, temperature), top_k), top_p)


def with_temperature(logits_V: Array, temperature: float) -> Array:
    """Logits [..., V] divided by the temperature; 0 is greedy: all but the first largest are -inf.

    >>> with_temperature(jnp.array([1.0, 3.0, 3.0]), 0).tolist()
    [-inf, 0.0, -inf]
    """
    number("sampler.temperature", temperature, "a number >= 0 (0 is greedy)", lambda value: value >= 0)
    if temperature == 1:
        return logits_V
    if temperature > 0:
        return logits_V / temperature
    ids_V = jax.lax.broadcasted_iota(jnp.int32, logits_V.shape, logits_V.ndim - 1)
    best = ids_V == jnp.argmax(logits_V, -1, keepdims=True)
    return jnp.where(best, 0.0, -jnp.inf).astype(logits_V.dtype)


def keep_top_k(logits_V: Array, top_k: int) -> Array:
    """Logits [..., V] with all but the `top_k` largest at -inf (ties with the last stay); 0 keeps all.

    >>> keep_top_k(jnp.array([0.0, 2.0, 1.0]), 2).tolist()
    [-inf, 2.0, 1.0]
    """
    top_k = whole("sampler.top_k", top_k, 0)
    if top_k == 0 or top_k >= logits_V.shape[-1]:
        return logits_V
    least = jax.lax.top_k(logits_V, top_k)[0][..., -1:]
    return jnp.where(logits_V >= least, logits_V, -jnp.inf)


def keep_top_p(logits_V: Array, top_p: float) -> Array:
    """Logits [..., V] with all at -inf but the fewest largest whose mass reaches `top_p`; 1 keeps all.

    >>> keep_top_p(jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.6).round(2).tolist()
    [-inf, -0.69, -1.2]
    """
    number("sampler.top_p", top_p, "a number in (0, 1] (1 keeps all)", lambda value: 0 < value <= 1)
    if top_p == 1:
        return logits_V
    sorted_V = jnp.sort(logits_V, axis=-1, descending=True)
    p_V = jax.nn.softmax(sorted_V, axis=-1)
    before_V = jnp.cumsum(p_V, -1) - p_V
    least = jnp.where(before_V < top_p, sorted_V, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_V >= least, logits_V, -jnp.inf)
