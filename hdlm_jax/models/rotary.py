"""Rotary positions: every pair (a, b) of a head's halves is turned by an angle that grows with the position.

Letters as in models/transformer.py; Dh = D / H.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.models.transformer_config import TransformerConfig


def rotary_angles(config: TransformerConfig, positions_BxR: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and sin, each [B, 1, R, Dh/2], of position / base^(2 j / Dh)."""
    frequencies = config.rotary_base ** (-jnp.arange(0, config.head_size, 2, dtype=dtype) / config.head_size)
    angles = positions_BxR[:, None, :, None].astype(dtype) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_rows(config: TransformerConfig, params: dict, length: int, positions_BxR: Array) -> tuple[Array, Array]:
    """`rotary_angles` of positions in -1..length-1, read from a constant table (others take the nearest).

    Where the angles follow from other numbers, XLA's CPU compiler computes cosines anew in every block.
    """
    dtype = jnp.promote_types(config.activations(params["embedding"].dtype), jnp.float32)
    with jax.ensure_compile_time_eval():
        table = rotary_angles(config, jnp.arange(-1, length)[None], dtype)
    place_BxR = jnp.clip(positions_BxR, -1, length - 1) + 1
    return tuple(x[0, 0][place_BxR][:, None] for x in table)


def rotate(x_BxHxRxD: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions in halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = jnp.split(x_BxHxRxD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxHxRxD.dtype)
