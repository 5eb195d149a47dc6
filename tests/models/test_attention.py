"""Attention: one softmax over groups of keys, and the band against a dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.models.attention import KV, band_scores, cached, dense, join, over, over_band, scores

B, H, D = 2, 3, 4


def normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def plain_attention(q, k, v, visible=None):
    """softmax(q k / sqrt(D)) v in numpy, [B, H, R, D]."""
    s = np.einsum("bhqd,bhkd->bhqk", *(np.asarray(x, float) for x in (q, k))) / q.shape[-1] ** 0.5
    s = s if visible is None else np.where(np.asarray(visible)[:, None], s, -np.inf)
    weight = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weight / weight.sum(-1, keepdims=True), np.asarray(v, float))


def runs(length, longest, seed):
    """Group numbers [B, L] in runs of 1..longest rows; each run is named by its first row."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(B):
        opens = np.zeros(length, int)
        place = 0
        while place < length:
            size = rng.integers(1, longest + 1)
            opens[place : place + size] = place
            place += size
        rows.append(opens)
    return jnp.asarray(np.array(rows), jnp.int32)


def test_join_over_groups_is_one_softmax_over_all_keys():
    q, sizes = normal(0, B, H, 5, D) * 3, (1, 4, 2)
    k, v = normal(1, B, H, sum(sizes), D), normal(2, B, H, sum(sizes), D)
    visible = jnp.asarray(np.random.default_rng(3).random((B, 5, sum(sizes))) < 0.6).at[:, :, 2].set(True)
    cut = lambda x, axis: jnp.split(x, np.cumsum(sizes)[:-1], axis)

    def grouped(q, k, v):
        groups = zip(cut(k, 2), cut(visible, 2), strict=True)
        return join([scores(q, *group) for group in groups], [over(x) for x in cut(v, 2)])

    def whole(q, k, v):
        weight = jax.nn.softmax(scores(q, k, visible), axis=-1)
        return jnp.einsum("bhqk,bhkd->bhqd", weight, v)

    np.testing.assert_allclose(jax.jit(grouped)(q, k, v), plain_attention(q, k, v, visible), atol=1e-6)
    tangents = normal(4, B, H, 5, D)
    both = jax.jit(lambda *x: [jax.vjp(f, *x)[1](tangents) for f in (grouped, whole)])
    ours, theirs = both(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(("length", "chunk", "longest"), [(23, 5, 5), (20, 5, 5), (20, 5, 3), (7, 5, 5), (4, 6, 4)])
def test_the_band_is_dense_attention_inside_groups(length, chunk, longest):
    """Lengths that are a multiple of the chunk and not; texts shorter than one chunk."""
    q, k, v = (normal(i, B, H, length, D) for i in range(3))
    start = runs(length, longest, length)
    same = start[:, :, None] == start[:, None, :]
    ours = jax.jit(lambda q, k, v: join([band_scores(q, k, start, chunk)], [over_band(v, chunk)]))(q, k, v)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, same), atol=1e-6)


def test_a_band_and_its_context_share_one_softmax():
    length, chunk = 13, 4
    q, k, v, kc, vc = (normal(i, B, H, length, D) for i in range(5))
    start = runs(length, chunk, 1)
    before = jnp.arange(length)[None, None, :] < start[:, :, None]

    @jax.jit
    def attend(q, k, v, kc, vc):
        return join([scores(q, kc, before), band_scores(q, k, start, chunk)], [over(vc), over_band(v, chunk)])

    ours = attend(q, k, v, kc, vc)
    visible = jnp.concatenate([before, start[:, :, None] == start[:, None, :]], 2)
    theirs = plain_attention(q, jnp.concatenate([kc, k], 2), jnp.concatenate([vc, v], 2), visible)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_keys_and_values_out_of_sight_change_nothing_exactly():
    q, k, v = (normal(i, B, H, 9, D) for i in range(3))
    visible = jnp.asarray(np.random.default_rng(5).random((1, 9, 9)) < 0.5).at[:, :, 0].set(True).at[:, :, 4].set(False)
    attend = jax.jit(lambda q, k, v: dense(visible)(q, k, v, None, None))
    one, far = attend(q, k, v), lambda x: np.where(np.arange(9)[:, None] == 4, np.float32(1e6), x)
    np.testing.assert_array_equal(one, attend(q, far(k), far(v)))
    assert not np.array_equal(one, attend(q, k + (np.arange(9)[:, None] == 0), v))


def test_a_row_with_nothing_to_see_is_finite_and_so_is_its_gradient():
    q, k, v = (normal(i, B, H, 3, D) for i in range(3))
    visible = jnp.ones((1, 3, 3), bool).at[:, 1].set(False)
    total = lambda q, k, v: (dense(visible)(q, k, v, None, None) ** 2).sum()
    out, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(out) and all(np.isfinite(x).all() for x in gradient)


def test_a_cache_is_more_keys():
    q, k, v = (normal(i, B, H, 4, D) for i in range(3))
    past = KV(normal(3, B, H, 6, D), normal(4, B, H, 6, D))
    sees_past = jnp.arange(6)[None, None, :] < jnp.array([2, 5])[:, None, None] + jnp.arange(4)[None, :, None] % 2
    sees = jnp.tril(jnp.ones((1, 4, 4), bool))
    visible = jnp.concatenate([sees_past, jnp.broadcast_to(sees, (B, 4, 4))], 2)
    theirs = plain_attention(q, jnp.concatenate([past.k, k], 2), jnp.concatenate([past.v, v], 2), visible)
    turned = KV(jnp.swapaxes(past.k, 2, 3), past.v)  # as it lies in a cache
    ours = jax.jit(lambda *x: cached(sees_past, sees)(*x, None))(q, k, v, turned)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_sixteen_bit_rows_are_summed_in_float32():
    q, k, v = (normal(i, B, H, 8, D, dtype=jnp.bfloat16) for i in range(3))
    assert jax.eval_shape(scores, q, k, None).dtype == jnp.float32
    out = jax.jit(lambda *x: dense()(*x, None, None))(q, k, v)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, plain_attention(*(x.astype(jnp.float32) for x in (q, k, v))), atol=0.03)


def test_dropped_weights_are_those_after_the_softmax():
    """The normaliser is that of all weights; each group is told which one it is."""
    q, k, v = (normal(i, B, H, 6, D) for i in range(3))

    @jax.jit
    def second_group_only(q, k, v):
        groups = [scores(q, x, None) for x in jnp.split(k, 2, 2)], [over(x) for x in jnp.split(v, 2, 2)]
        return join(*groups, lambda weight, group: weight * (group == 1))

    first_gone = np.where(np.arange(6)[:, None] < 3, 0, v)
    np.testing.assert_allclose(second_group_only(q, k, v), plain_attention(q, k, first_gone), atol=1e-6)
