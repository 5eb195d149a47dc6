"""The transformer of the published models, of any size, as a thin Flax Linen parameter container.

Pre-LayerNorm (weight only, eps 1e-5), rotary positions in halves on q and k, bias-free attention
projections, a GELU (tanh) MLP with bias, an untied head with bias, zero at the start. With
`conditioning > 0` each block is modulated per position by the noise level (adaLN) and the input
embedding is drawn toward the mask's, as in the published gamma models.

Letters: B batch, R rows, D width, H heads, F MLP width, N ordinary tokens, V = N + 1, C conditioning.
Only `params` are variables: dropout keys, caches and noise levels are arguments.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from hdlm_jax.errors import require
from hdlm_jax.models.attention import KV, Attention, dense
from hdlm_jax.models.devices import by_text, lookup, product

SINUSOIDS = 256  # features of the noise-level embedding
MAX_PERIOD = 10_000.0


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of the network (the experiment's `model` block plus the vocabulary)."""

    num_tokens: int  # N, ordinary tokens; the mask is token N
    length: int  # L, the longest text
    hidden: int  # D
    blocks: int
    heads: int
    mlp_ratio: int = 4  # F / D
    dropout: float = 0.1  # of attention probabilities and of both residual branches
    prediction: str = "aligned"  # 'aligned' | 'shifted'
    visibility: str = "full"  # 'full' | 'prefix'
    context_group: int = 1  # settled rows see whole groups of so many; 1 is causal
    inexact_context: bool = False  # allow groups that no cache holds exactly: generation then feeds all rows
    bos_id: int | None = None  # token before position 0 of a shifted model
    conditioning: int = 0  # C; 0: the network does not see the noise level
    interpolation: float = 0.0  # gamma of the embedding's drift to the mask, e^{-gamma sigma}
    rotary_base: float = 10_000.0
    vocabulary_multiple: int = 128  # embedding and head rows are padded to a multiple of this
    remat: str = "full"  # what the backward pass computes anew: 'none' | 'dots' (all but products) | 'full' (blocks)
    attention: str = "auto"  # 'xla' | 'splash' (TPU) | 'cudnn' (GPU) | 'auto' (models/fused_attention.py)
    dtype: str = "float32"  # of activations; params, norms, softmax and logits stay float32

    def __post_init__(self):
        for field in (
            "num_tokens",
            "length",
            "hidden",
            "blocks",
            "heads",
            "mlp_ratio",
            "vocabulary_multiple",
            "context_group",
        ):
            require(getattr(self, field) >= 1, f"model.{field}", getattr(self, field), "a positive integer")
        require(
            self.hidden % self.heads == 0,
            "model.heads",
            self.heads,
            f"a divisor of model.hidden = {self.hidden}",
        )
        even = (self.hidden // self.heads) % 2 == 0
        require(even, "model.heads", self.heads, "an even head size (rotary positions turn pairs)")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a number in [0, 1)")
        require(self.conditioning >= 0, "model.conditioning", self.conditioning, "0 (off) or a positive integer")
        for field, allowed in CHOICES.items():
            given = getattr(self, field)
            require(given in allowed, f"model.{field}", given, ", ".join(map(repr, allowed)))
        bos = self.prediction == "aligned" or self.bos_id is not None
        require(bos, "model.bos_id", self.bos_id, "a token id: a shifted model needs BOS before position 0")

    @property
    def head_size(self) -> int:
        """Dh = D / H."""
        return self.hidden // self.heads

    @property
    def vocabulary(self) -> int:
        """V, ordinary tokens and the mask."""
        return self.num_tokens + 1

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding and columns of the head, a multiple of `vocabulary_multiple`."""
        return -(-self.vocabulary // self.vocabulary_multiple) * self.vocabulary_multiple


CHOICES = {
    "prediction": ("aligned", "shifted"),
    "visibility": ("full", "prefix"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "xla", "splash", "cudnn"),
    "dtype": ("float32", "bfloat16", "float64"),
}


WIDER, NARROWER = P(None, "tensor"), P("tensor", None)  # how kernels [D, wide] and [wide, D] are cut in a product
KERNELS = {"qkv": WIDER, "mlp_in": WIDER, "out": NARROWER, "mlp_out": NARROWER}
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}  # what is kept


def rotary_angles(config: TransformerConfig, positions_BxR: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and sin, each [B, 1, R, Dh/2], of position / base^(2 j / Dh)."""
    frequencies = config.rotary_base ** (-jnp.arange(0, config.head_size, 2, dtype=dtype) / config.head_size)
    angles = positions_BxR[:, None, :, None].astype(dtype) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_rows(config: TransformerConfig, params: dict, length: int, positions_BxR: Array) -> tuple[Array, Array]:
    """`rotary_angles` of positions in -1..length-1, read from a constant table (others take the nearest).

    Where the angles follow from other numbers, XLA's CPU compiler computes cosines anew in every block.
    """
    dtype = jnp.promote_types(_activation_dtype(config, params["embedding"]), jnp.float32)
    with jax.ensure_compile_time_eval():
        table = rotary_angles(config, jnp.arange(-1, length)[None], dtype)
    place_BxR = jnp.clip(positions_BxR, -1, length - 1) + 1
    return tuple(x[0, 0][place_BxR][:, None] for x in table)


def rotate(x_BxHxRxD: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions in halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = jnp.split(x_BxHxRxD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxHxRxD.dtype)


def sigma_features(sigma_BxR: Array) -> Array:
    """[B, R, 256]: cos then sin of sigma * 10000^(-i/128), i = 0..127."""
    half = SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=sigma_BxR.dtype) / half)
    angles = sigma_BxR[..., None] * frequencies[None, None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


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
    """Attention and MLP, each on a normalised input and added to the stream."""

    config: TransformerConfig
    attention: Attention
    return_kv: bool

    @nn.compact
    def __call__(self, x_BxRxD, per_block, rotary, condition_BxRxC):
        c, (past, rng) = self.config, per_block
        B, R, D = x_BxRxD.shape
        rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_BxRxC)

        h = _modulate(Norm(name="norm_attention")(x_BxRxD), shift_a, scale_a)
        qkv = self.dense("qkv", h, 3 * D, use_bias=False).reshape(B, R, 3, c.heads, c.head_size)
        q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        out = self.attention(q, k, v, past, self.probability_dropout(rngs[0]))
        out = jnp.swapaxes(out, 1, 2).reshape(B, R, D).astype(x_BxRxD.dtype)
        x_BxRxD = x_BxRxD + self.residual(rngs[1], self.dense("out", out, D, use_bias=False), gate_a)

        h = _modulate(Norm(name="norm_mlp")(x_BxRxD), shift_m, scale_m)
        h = nn.gelu(self.dense("mlp_in", h, c.mlp_ratio * D), approximate=True)
        x_BxRxD = by_text(x_BxRxD + self.residual(rngs[2], self.dense("mlp_out", h, D), gate_m))
        return x_BxRxD, (KV(k, v) if self.return_kv else None)

    def dense(self, name: str, x_BxRxD: Array, features: int, use_bias: bool = True) -> Array:
        """A Dense layer on rows laid flat: its gradient is then one plain product, with nothing transposed."""
        layer = nn.Dense(
            features,
            use_bias,
            dtype=x_BxRxD.dtype,
            kernel_init=nn.initializers.lecun_normal(),
            dot_general=lambda x, kernel, *_, **__: product(x, kernel, KERNELS[name]),
            name=name,
        )
        return layer(x_BxRxD.reshape(-1, x_BxRxD.shape[-1])).reshape(*x_BxRxD.shape[:-1], features)

    def modulation(self, condition_BxRxC):
        """Shift, scale and gate for attention, then for the MLP (all None without conditioning)."""
        if condition_BxRxC is None:
            return (None,) * 6
        zeros = nn.initializers.zeros
        rows = nn.Dense(6 * self.config.hidden, kernel_init=zeros, name="modulation")(condition_BxRxC)
        return jnp.split(rows, 6, axis=-1)

    def probability_dropout(self, rng):
        """What drops attention probabilities, with a key of its own per group of keys (None without a key)."""
        if rng is None:
            return None
        return lambda p, group: drop(jax.random.fold_in(rng, group), p, self.config.dropout)

    def residual(self, rng, branch, gate):
        """A branch as it is added to the stream: dropped out, then gated by the noise level."""
        branch = branch if rng is None else drop(rng, branch, self.config.dropout)
        return branch if gate is None else (gate * branch).astype(branch.dtype)


def _modulate(x, shift, scale):
    return x if shift is None else (x * (1 + scale) + shift).astype(x.dtype)


class Transformer(nn.Module):
    """The parameters and the pieces of the network; `forward` and `logits` below run them."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        zeros = nn.initializers.zeros
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.padded_vocabulary, c.hidden))
        self.norm = Norm()
        self.head_kernel = self.param("head_kernel", zeros, (c.hidden, c.padded_vocabulary))
        self.head_bias = self.param("head_bias", zeros, (c.padded_vocabulary,))
        if c.conditioning:
            self.sigma_in = nn.Dense(c.conditioning)
            self.sigma_out = nn.Dense(c.conditioning)

    def enter(self, tokens_BxR: Array, sigma_BxR: Array | None):
        """What the blocks need: input rows and noise-level features (or None)."""
        x_BxRxD = self.embed(tokens_BxR, sigma_BxR)
        return x_BxRxD, nn.silu(self.condition(sigma_BxR)) if self.config.conditioning else None

    @nn.compact
    def blocks(self, x_BxRxD, rotary, condition, attention, past, rngs, return_kv):
        """All blocks by one scan over their stacked parameters."""
        c = self.config
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.blocks,
        )
        return scan(c, attention, return_kv, name="blocks")(x_BxRxD, (past, rngs), rotary, condition)

    def leave(self, x_BxRxD: Array) -> Array:
        """The last norm."""
        return self.norm(x_BxRxD)

    def embed(self, tokens_BxR: Array, sigma_BxR: Array | None = None) -> Array:
        """Input rows [B, R, D]; with interpolation g: e^{-g sigma} E[token] + (1 - e^{-g sigma}) E[mask]."""
        c = self.config
        x_BxRxD = lookup(self.embedding, tokens_BxR)
        if c.interpolation:
            stay = jnp.exp(-c.interpolation * sigma_BxR)[..., None]
            x_BxRxD = stay * x_BxRxD + (1 - stay) * self.embedding[c.num_tokens][None, None, :]
        return x_BxRxD.astype(_activation_dtype(c, self.embedding))

    def condition(self, sigma_BxR: Array) -> Array:
        """The noise-level embedding [B, R, C] before the blocks' SiLU."""
        return self.sigma_out(nn.silu(self.sigma_in(sigma_features(sigma_BxR))))

    def scores(self, hidden_BxRxD: Array) -> Array:
        """`logits`, padded, of the model's own head."""
        head = {"head_kernel": self.head_kernel, "head_bias": self.head_bias}
        return logits(self.config, head, hidden_BxRxD, padded=True)


def _activation_dtype(config: TransformerConfig, params: Array) -> jnp.dtype:
    return params.dtype if config.dtype == "float32" else jnp.dtype(config.dtype)


def forward(
    config: TransformerConfig,
    params: dict,
    tokens_BxR: Array,
    positions_BxR: Array,
    attention: Attention,
    *,
    sigma_BxR: Array | None = None,
    rotary: tuple[Array, Array] | None = None,
    past: KV | tuple[KV, ...] | None = None,
    dropout_rng: Array | None = None,
    return_kv: bool = False,
) -> tuple[Array, KV | tuple[KV, ...] | None]:
    """Runs the network up to the head.

    Args:
      config: sizes.
      params: as `init` returns them, or `unstacked`.
      tokens_BxR: int32, ordinary tokens or the mask N.
      positions_BxR: int32, rotary positions (a shifted model's BOS stands at -1).
      attention: who sees whom (models/attention.py).
      sigma_BxR: float, noise level of the token each row holds; needed iff the network is conditioned.
      rotary: `rotary_angles` of the positions, where a loop has them at hand.
      past: keys and values of earlier calls, [blocks, B, H, S, D] each (a tuple of [B, H, S, D] per
        block for `unstacked` parameters).
      dropout_rng: PRNG key; None switches dropout off.
      return_kv: also return the keys and values of these rows, laid out like `past`.

    Returns:
      hidden rows [B, R, D] after the last norm, and the keys and values or None.
    """
    model, variables = Transformer(config), {"params": params}
    x_BxRxD, condition = model.apply(variables, tokens_BxR, sigma_BxR, method="enter")
    if rotary is None:
        rotary = rotary_angles(config, positions_BxR, jnp.promote_types(x_BxRxD.dtype, jnp.float32))
    rngs = None
    if dropout_rng is not None and config.dropout > 0:
        rngs = jax.random.split(dropout_rng, config.blocks)
    if isinstance(params["blocks"], tuple):
        kv = []
        for i, layer in enumerate(params["blocks"]):
            inputs = (None if past is None else past[i], None if rngs is None else rngs[i])
            block = Block(config, attention, return_kv)
            x_BxRxD, new = block.apply({"params": layer}, x_BxRxD, inputs, rotary, condition)
            kv.append(new)
        kv = tuple(kv) if return_kv else None
    else:
        x_BxRxD, kv = model.apply(
            variables, x_BxRxD, rotary, condition, attention, past, rngs, return_kv, method="blocks"
        )
    return model.apply(variables, x_BxRxD, method="leave"), kv


def logits(config: TransformerConfig, params: dict, hidden_BxRxD: Array, padded: bool = False) -> Array:
    """Float32 scores [B, R, V] over ordinary tokens; -inf at the mask, which is never predicted.

    Of `params` only `head_kernel` and `head_bias` are read. With `padded` the head's own columns, [B, R, >= V]: more
    of -inf, and one copy less.
    """
    kernel_DxV = params["head_kernel"].astype(hidden_BxRxD.dtype)
    wide = jnp.promote_types(hidden_BxRxD.dtype, jnp.float32)
    scores_BxRxV = jnp.einsum("brd,dv->brv", hidden_BxRxD, kernel_DxV, preferred_element_type=wide)
    ordinary_V = jnp.arange(config.padded_vocabulary) < config.num_tokens
    scores_BxRxV += jnp.where(ordinary_V, params["head_bias"], -jnp.inf)[None, None, :]
    return scores_BxRxV if padded else scores_BxRxV[..., : config.vocabulary]


def unstacked(config: TransformerConfig, params: dict) -> dict:
    """The same parameters with one dict per block: a generation loop then copies no weights per call."""
    blocks = tuple(jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.blocks))
    return {**params, "blocks": blocks}


def init(config: TransformerConfig, rng: Array) -> dict:
    """Fresh parameters: a nested dict of float32 arrays, blocks stacked on the leading axis.

    >>> config = TransformerConfig(num_tokens=5, length=4, hidden=8, blocks=2, heads=2)
    >>> params = init(config, jax.random.key(0))
    >>> params["blocks"]["qkv"]["kernel"].shape
    (2, 8, 24)
    """

    def everything(model, tokens, sigma):
        x, condition = model.enter(tokens, sigma)
        rotary = rotary_angles(config, tokens, x.dtype)
        x, _ = model.blocks(x, rotary, condition, dense(), None, None, False)
        return model.scores(model.leave(x))

    tokens, sigma = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    return Transformer(config).init(rng, tokens, sigma, method=everything)["params"]


def num_parameters(params: dict) -> int:
    """How many numbers the parameters hold."""
    return sum(x.size for x in jax.tree.leaves(params))
