"""The KV cache: keys and values of settled rows, one pair of arrays per block.

Slot r of the cache belongs to row r, the row that predicts token r (diffusion/visibility.py). Settled
rows never see active ones, so what is stored stays exact.
"""

import jax.numpy as jnp
from jax import Array

from hdlm_jax.models.attention import KV
from hdlm_jax.models.transformer import TransformerConfig

Cache = tuple[KV, ...]  # one KV of [B, H, S, D] per block


def empty(config: TransformerConfig, batch: int, slots: int, dtype) -> Cache:
    """A cache of zeros with `slots` rows."""
    shape = (batch, config.heads, slots, config.head_size)
    return tuple(KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.blocks))


def write(cache: Cache, new: Cache, slot_BxR: Array) -> Cache:
    """Stores rows at their slots; rows whose slot lies outside the cache are dropped."""
    rows_B = jnp.arange(slot_BxR.shape[0])[:, None]
    slots = cache[0].k.shape[2]
    slot_BxR = jnp.where(slot_BxR < 0, slots, slot_BxR)  # negative indices would wrap around

    def store(old, rows):
        return old.at[rows_B, :, slot_BxR].set(jnp.swapaxes(rows, 1, 2).astype(old.dtype), mode="drop")

    return tuple(KV(store(old.k, rows.k), store(old.v, rows.v)) for old, rows in zip(cache, new, strict=True))


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` rows."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))
    return tuple(KV(pad(kv.k), pad(kv.v)) for kv in cache)


def num_bytes(config: TransformerConfig, batch: int, slots: int, dtype) -> int:
    """Bytes of a cache of that size."""
    return 2 * config.blocks * batch * slots * config.hidden * jnp.dtype(dtype).itemsize
