"""One block of the transformer: attention and MLP, each on a normalised input and added to the stream.

Letters as in models/transformer.py; Dh = D / H.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from hdlm_jax.models.attention import KV, Attention
from hdlm_jax.models.devices import by_text, product
from hdlm_jax.models.rotary import rotate
from hdlm_jax.models.transformer_config import TransformerConfig

WIDER, NARROWER = P(None, "tensor"), P("tensor", None)  # how kernels [D, wide] and [wide, D] are cut in a product


def drop(rng: Array, x: Array, rate: float) -> Array:
    """Inverted dropout with 16 random bits per element (the rate is rounded to k/65536, 0 < k < 65536)."""
    kept = min(max(round((1 - rate) * 65536), 1), 65535)
    keep = jax.random.bits(rng, x.shape, jnp.uint16) < kept
    return jnp.where(keep, x * jnp.asarray(65536 / kept, x.dtype), jnp.zeros((), x.dtype))


class Norm(nn.Module):
    """LayerNorm with weight only, computed in float32, eps 1e-5."""

    @nn.compact
    def __call__(self, x_BxRxD: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_BxRxD.shape[-1],))
        x = x_BxRxD.astype(jnp.promote_types(x_BxRxD.dtype, jnp.float32))
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return (x * scale_D[None, None, :]).astype(x_BxRxD.dtype)


class Block(nn.Module):
    """The block; `project` and `finish` are its halves before and after attention, for who needs them apart."""

    config: TransformerConfig
    attention: Attention | None = None  # of `__call__`
    return_kv: bool = False

    def setup(self):
        c = self.config
        self.norm_attention, self.norm_mlp = Norm(), Norm()
        self.qkv = self.dense(WIDER, 3 * c.hidden, use_bias=False)
        self.out = self.dense(NARROWER, c.hidden, use_bias=False)
        self.mlp_in = self.dense(WIDER, c.mlp_ratio * c.hidden)
        self.mlp_out = self.dense(NARROWER, c.hidden)
        if c.conditioning:
            self.modulation = nn.Dense(6 * c.hidden, kernel_init=nn.initializers.zeros)

    def __call__(self, x_BxRxD, per_block, rotary, condition_BxRxC):
        past, rng = per_block
        rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        modulation = self.modulate(condition_BxRxC)
        q, k, v = self.project(x_BxRxD, rotary, modulation)
        out = self.attention(q, k, v, past, self.probability_dropout(rngs[0]))
        x_BxRxD = by_text(self.finish(x_BxRxD, out, modulation, rngs[1:]))
        return x_BxRxD, (KV(k, v) if self.return_kv else None)

    def project(self, x_BxRxD, rotary, modulation):
        """Queries, keys and values, each [B, H, R, Dh]."""
        c, (B, R, _) = self.config, x_BxRxD.shape
        shift, scale, *_ = modulation
        h = _modulate(self.norm_attention(x_BxRxD), shift, scale)
        qkv = _flat(self.qkv, h).reshape(B, R, 3, c.heads, c.head_size)
        q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
        return rotate(q, *rotary), rotate(k, *rotary), v

    def finish(self, x_BxRxD, out_BxHxRxD, modulation, rngs=(None, None)):
        """The stream after what rows saw, and after the MLP, each row on its own."""
        _, _, gate_a, shift, scale, gate_m = modulation
        out = jnp.swapaxes(out_BxHxRxD, 1, 2).reshape(x_BxRxD.shape).astype(x_BxRxD.dtype)
        x_BxRxD = x_BxRxD + self.residual(rngs[0], _flat(self.out, out), gate_a)
        h = _modulate(self.norm_mlp(x_BxRxD), shift, scale)
        h = nn.gelu(_flat(self.mlp_in, h), approximate=True)
        return x_BxRxD + self.residual(rngs[1], _flat(self.mlp_out, h), gate_m)

    def dense(self, cut: P, features: int, use_bias: bool = True) -> nn.Dense:
        """A layer whose kernel is cut over devices."""
        dtype = None if self.config.dtype == "float32" else self.config.dtype
        return nn.Dense(features, use_bias, dtype=dtype, dot_general=lambda x, w, *_, **__: product(x, w, cut))

    def modulate(self, condition_BxRxC):
        """Shift, scale and gate for attention, then for the MLP (all None without conditioning)."""
        if condition_BxRxC is None:
            return (None,) * 6
        return tuple(jnp.split(self.modulation(condition_BxRxC), 6, axis=-1))

    def probability_dropout(self, rng):
        """What drops attention probabilities, with a key of its own per group of keys (None without a key)."""
        if rng is None:
            return None
        return lambda p, group: drop(jax.random.fold_in(rng, group), p, self.config.dropout)

    def residual(self, rng, branch, gate):
        """A branch as it is added to the stream: dropped out, then gated by the noise level."""
        branch = branch if rng is None else drop(rng, branch, self.config.dropout)
        return branch if gate is None else (gate * branch).astype(branch.dtype)


def _flat(layer: nn.Dense, x_BxRxD: Array) -> Array:
    """A layer on rows laid flat: its gradient is then one plain product, with nothing transposed."""
    return layer(x_BxRxD.reshape(-1, x_BxRxD.shape[-1])).reshape(*x_BxRxD.shape[:-1], -1)


def _modulate(x, shift, scale):
    return x if shift is None else (x * (1 + scale) + shift).astype(x.dtype)
