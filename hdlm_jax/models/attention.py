"""Attention over one or several groups of keys under one softmax.

Letters: B batch, Q query rows, K key rows, H heads, D head size (here), R rows fed to the network.

An `Attention` is a function `(q, k, v, past, dropout) -> out` on the rows of one call, all of shape
[B, H, R, D] (heads before rows: each product is then a batch of plain matrix products); `past` holds
keys and values of earlier calls (or None). Who may attend to whom is closed over: the layouts of a
call (one text, a window over a cache, a clean and a noised copy) are factories here, and the
transformer never sees a mask.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a row with nothing to see stays free of NaN; exp(MASKED - max) is exactly 0


class KV(NamedTuple):
    """Keys (rotated) and values, each [..., B, H, S, D]."""

    k: Array
    v: Array


Dropout = Callable[[Array, int], Array]  # (probabilities, which group of keys) -> probabilities
Contraction = Callable[[Array], Array]  # weights of one group -> weighted sums of its values
Attention = Callable[[Array, Array, Array, KV | None, Dropout | None], Array]


def scores(q_BxHxQxD: Array, k_BxHxKxD: Array, visible: Array | None) -> Array:
    """Scaled scores float32 [B, H, Q, K], `MASKED` where `visible` (bool, [B|1, Q, K]) is False."""
    wide = _accumulator(q_BxHxQxD)
    q = q_BxHxQxD * q_BxHxQxD.shape[-1] ** -0.5
    s_BxHxQxK = jnp.einsum("bhqd,bhkd->bhqk", q, k_BxHxKxD, preferred_element_type=wide)
    if visible is None:
        return s_BxHxQxK
    return jnp.where(visible[:, None], s_BxHxQxK, jnp.asarray(MASKED, s_BxHxQxK.dtype))


def over(v_BxHxKxD: Array) -> Contraction:
    """Weights [B, H, Q, K] -> weighted sums of the values, [B, H, Q, D]."""

    def contract(weight_BxHxQxK):
        weight = weight_BxHxQxK.astype(v_BxHxKxD.dtype)
        return jnp.einsum("bhqk,bhkd->bhqd", weight, v_BxHxKxD, preferred_element_type=_accumulator(v_BxHxKxD))

    return contract


def join(
    scores_BxHxQxK: Sequence[Array],
    contractions: Sequence[Contraction],
    dropout: Dropout | None = None,
) -> Array:
    """One softmax over several groups of keys, without concatenating them: out float32 [B, H, Q, D].

    Args:
      scores_BxHxQxK: per group, scores with its own K.
      contractions: per group, what turns weights into weighted sums of values.
      dropout: applied to the weights of each group.
    """
    top = scores_BxHxQxK[0].max(-1, keepdims=True)
    for s in scores_BxHxQxK[1:]:
        top = jnp.maximum(top, s.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    total, out = 0.0, 0.0
    for group, (s, contract) in enumerate(zip(scores_BxHxQxK, contractions, strict=True)):
        weight = jnp.exp(s - top)
        total = total + weight.sum(-1, keepdims=True)
        out = out + contract(weight if dropout is None else dropout(weight, group))
    return out / total


def chunks(x_BxHxLxD: Array, chunk: int) -> Array:
    """[B, H, L, D] -> [B, H, M, chunk, D], the last chunk filled with zeros."""
    B, H, L, D = x_BxHxLxD.shape
    count = -(-L // chunk)
    filled = jnp.pad(x_BxHxLxD, ((0, 0), (0, 0), (0, count * chunk - L), (0, 0)))
    return filled.reshape(B, H, count, chunk, D)


def band(x_BxHxLxD: Array, chunk: int) -> Array:
    """Cuts rows into chunks, each with its two neighbours: [B, H, M, 3 chunk, D] (zeros past the ends)."""
    middle = chunks(x_BxHxLxD, chunk)
    padded = jnp.pad(middle, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)))
    return jnp.concatenate([padded[:, :, :-2], middle, padded[:, :, 2:]], axis=3)


def band_scores(q_BxHxLxD: Array, k_BxHxLxD: Array, group_BxL: Array, chunk: int) -> Array:
    """Scores [B, H, L, 3 chunk] of rows against the rows of their own group (int >= 0) near by.

    Exact when no group reaches past the neighbouring chunk: groups are runs of at most `chunk` rows.
    """
    B, H, L, D = q_BxHxLxD.shape
    q, k = chunks(q_BxHxLxD * D**-0.5, chunk), band(k_BxHxLxD, chunk)
    group = (group_BxL + 1)[:, None, :, None]
    mine, theirs = chunks(group, chunk), band(group, chunk)
    s = jnp.einsum("bhmqd,bhmkd->bhmqk", q, k, preferred_element_type=_accumulator(q))
    s = jnp.where(mine == jnp.swapaxes(theirs, -1, -2), s, jnp.asarray(MASKED, s.dtype))
    return s.reshape(B, H, -1, 3 * chunk)[:, :, :L]


def over_band(v_BxHxLxD: Array, chunk: int) -> Contraction:
    """The contraction that goes with `band_scores`."""
    v = band(v_BxHxLxD, chunk)

    def contract(weight_BxHxLxK):
        B, H, L, K = weight_BxHxLxK.shape
        rows = v.shape[2] * chunk
        weight = jnp.pad(weight_BxHxLxK, ((0, 0), (0, 0), (0, rows - L), (0, 0))).astype(v.dtype)
        weight = weight.reshape(B, H, v.shape[2], chunk, K)
        out = jnp.einsum("bhmqk,bhmkd->bhmqd", weight, v, preferred_element_type=_accumulator(v))
        return out.reshape(B, H, rows, -1)[:, :, :L]

    return contract


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def dense(visible: Array | None = None) -> Attention:
    """All rows of the call attend to all rows, except where `visible` (bool [B|1, R, R]) is False."""

    def attend(q, k, v, past, dropout):
        del past
        return join([scores(q, k, visible)], [over(v)], dropout)

    return attend


def cached(visible_past: Array | None, visible: Array | None) -> Attention:
    """Rows attend to the cache and to one another under one softmax.

    Args:
      visible_past: bool [B|1, R, S], which slots of `past` each row sees (its keys are [B, H, D, S]).
      visible: bool [B|1, R, R], which rows of this call each row sees.
    """

    def attend(q, k, v, past, dropout):
        groups = [scores(q, jnp.swapaxes(past.k, 2, 3), visible_past), scores(q, k, visible)]
        return join(groups, [over(past.v), over(v)], dropout)

    return attend
