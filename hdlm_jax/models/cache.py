"""The KV cache: keys and values of settled rows, one pair of arrays per block.

Slot r of the cache belongs to row r, the row that predicts token r (diffusion/visibility.py). Settled
rows never see active ones, so what is stored stays exact. Keys lie transposed, slots last: a product of a few
queries with many keys then turns nothing around.
"""

import jax.numpy as jnp
from jax import Array

from hdlm_jax.models.attention import KV
from hdlm_jax.models.transformer import TransformerConfig

Cache = tuple[KV, ...]  # per block: keys [B, H, D, S], values [B, H, S, D]


def empty(config: TransformerConfig, batch: int, slots: int, dtype) -> Cache:
    """A cache of zeros with `slots` rows."""
    keys = jnp.zeros((batch, config.heads, config.head_size, slots), dtype)
    return tuple(KV(keys, keys.mT) for _ in range(config.blocks))


def num_slots(cache: Cache) -> int:
    """S, the rows that a cache has room for."""
    return cache[0].v.shape[2]


def write(cache: Cache, new: Cache, slot_BxR: Array, after_B: Array | None = None) -> Cache:
    """Stores rows ([B, H, R, D] keys and values) at their slots; rows whose slot lies outside are dropped.

    Args:
      after_B: int32, a number >= 0 per text that follows from every reading of the old cache. The writing then has
        to wait for it, and XLA writes in place; else it may put a row into a later block before it has read an
        earlier one, and copies the cache. A text whose number is below 0 keeps its old rows.
    """
    rows_B = jnp.arange(slot_BxR.shape[0])[:, None]
    dropped_BxR = slot_BxR < 0  # negative indices would wrap around
    if after_B is not None:
        dropped_BxR |= (after_B < 0)[:, None]
    slot_BxR = jnp.where(dropped_BxR, num_slots(cache), slot_BxR)

    def store(old, rows):
        keys, values = (jnp.swapaxes(x, 1, 2) for x in rows)
        keys = old.k.at[rows_B, :, :, slot_BxR].set(keys.astype(old.k.dtype), mode="drop")
        return KV(keys, old.v.at[rows_B, :, slot_BxR].set(values.astype(old.v.dtype), mode="drop"))

    return tuple(store(old, rows) for old, rows in zip(cache, new, strict=True))


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` rows."""
    more, none = (0, slots - num_slots(cache)), (0, 0)
    return tuple(KV(jnp.pad(kv.k, (none, none, none, more)), jnp.pad(kv.v, (none, none, more, none))) for kv in cache)


def num_bytes(config: TransformerConfig, batch: int, slots: int, dtype) -> int:
    """Bytes of a cache of that size."""
    return 2 * config.blocks * batch * slots * config.hidden * jnp.dtype(dtype).itemsize
