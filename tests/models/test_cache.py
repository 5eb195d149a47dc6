"""The KV cache: rows land in their slots, what does not fit is dropped, growing keeps what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.models import cache
from hdlm_jax.models.attention import KV
from hdlm_jax.models.transformer import TransformerConfig

CONFIG = TransformerConfig(num_tokens=5, length=9, hidden=12, blocks=2, heads=3)
B, S, H, D = 2, 6, 3, 4


def new_rows(count, dtype=np.float32, seed=0):
    """Random keys and values of that many rows, as a call returns them."""
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=(B, H, count, D)), dtype)
    return tuple(KV(draw(), draw()) for _ in range(CONFIG.blocks))


def turned(rows):
    """Rows as they lie in a cache, and back."""
    return tuple(KV(jnp.swapaxes(kv.k, 2, 3), kv.v) for kv in rows)


def filled(rows):
    """A cache of random keys and values with that many rows."""
    return turned(new_rows(rows))


def test_an_empty_cache_holds_zeros_for_every_block():
    empty = cache.empty(CONFIG, B, S, jnp.bfloat16)
    assert len(empty) == CONFIG.blocks
    assert cache.num_slots(empty) == S
    for x in jax.tree.leaves(turned(empty)):
        assert (x.shape, x.dtype) == ((B, H, S, D), jnp.bfloat16)
        assert not x.any()


@pytest.mark.parametrize("under_jit", [False, True])
def test_rows_land_in_their_slots_and_those_outside_are_dropped(under_jit):
    """Each text has its own slots; a negative slot is outside, not counted from the end."""
    old, new = filled(S), new_rows(4, seed=1)
    slot_BxR = jnp.array([[-1, 0, 3, 6], [4, 5, 2**30, -(2**30)]])
    write = jax.jit(cache.write) if under_jit else cache.write
    written = write(old, new, slot_BxR)
    for before, rows, after in zip(*map(jax.tree.leaves, (turned(old), new, turned(written))), strict=True):
        expected = np.array(before)
        expected[0, :, [0, 3]], expected[1, :, [4, 5]] = rows[0, :, [1, 2]], rows[1, :, [0, 1]]
        np.testing.assert_array_equal(after, expected)


def test_rows_are_stored_in_the_dtype_of_the_cache():
    old, new = cache.empty(CONFIG, B, S, jnp.bfloat16), new_rows(1)
    written = cache.write(old, new, jnp.zeros((B, 1), jnp.int32))
    for rows, after in zip(*map(jax.tree.leaves, (new, turned(written))), strict=True):
        assert after.dtype == jnp.bfloat16
        np.testing.assert_array_equal(after[:, :, :1], rows.astype(jnp.bfloat16))


def test_growing_keeps_the_contents():
    old = filled(S)
    grown = cache.grow(old, S + 3)
    for before, after in zip(*map(jax.tree.leaves, (turned(old), turned(grown))), strict=True):
        np.testing.assert_array_equal(after[:, :, :S], before)
        assert after.shape == (B, H, S + 3, D)
        assert not after[:, :, S:].any()
    for before, after in zip(*map(jax.tree.leaves, (old, cache.grow(old, S))), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_num_bytes_is_what_a_cache_takes(dtype):
    taken = sum(x.nbytes for x in jax.tree.leaves(cache.empty(CONFIG, B, S, dtype)))
    assert cache.num_bytes(CONFIG, B, S, dtype) == taken
