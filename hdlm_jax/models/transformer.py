"""The transformer of the published models, of any size, as a thin Flax Linen parameter container.

Pre-LayerNorm (weight only, eps 1e-5), rotary positions in halves on q and k, bias-free attention
projections, a GELU (tanh) MLP with bias, an untied head with bias, zero at the start. With
`conditioning > 0` each block is modulated per position by the noise level (adaLN) and the input
embedding is drawn toward the mask's, as in the published gamma models.

Letters: B batch, R rows, D width, H heads, F MLP width, N ordinary tokens, V = N + 1, C conditioning.
Only `params` are variables: dropout keys, caches and noise levels are arguments.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.models.attention import KV, Attention, dense
from hdlm_jax.models.block import Block, Norm
from hdlm_jax.models.devices import lookup
from hdlm_jax.models.rotary import rotary_angles
from hdlm_jax.models.transformer_config import TransformerConfig

SINUSOIDS = 256  # features of the noise-level embedding
MAX_PERIOD = 10_000.0
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}  # what is kept


def sigma_features(sigma_BxR: Array) -> Array:
    """[B, R, 256]: cos then sin of sigma * 10000^(-i/128), i = 0..127."""
    half = SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=sigma_BxR.dtype) / half)
    angles = sigma_BxR[..., None] * frequencies[None, None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


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
        return x_BxRxD.astype(c.activations(self.embedding.dtype))

    def condition(self, sigma_BxR: Array) -> Array:
        """The noise-level embedding [B, R, C] before the blocks' SiLU."""
        return self.sigma_out(nn.silu(self.sigma_in(sigma_features(sigma_BxR))))

    def scores(self, hidden_BxRxD: Array) -> Array:
        """`logits`, padded, of the model's own head."""
        head = {"head_kernel": self.head_kernel, "head_bias": self.head_bias}
        return logits(self.config, head, hidden_BxRxD, padded=True)


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
    x_BxRxD, condition, rotary = _entered(config, params, tokens_BxR, positions_BxR, sigma_BxR, rotary)
    rngs = None
    if dropout_rng is not None and config.dropout > 0:
        rngs = jax.random.split(dropout_rng, config.blocks)
    if isinstance(params["blocks"], tuple):
        x_BxRxD, kv = _through(config, params["blocks"], attention, x_BxRxD, past, rngs, rotary, condition, return_kv)
    else:
        inputs = (x_BxRxD, rotary, condition, attention, past, rngs, return_kv)
        x_BxRxD, kv = _apply(config, params, *inputs, method="blocks")
    return _apply(config, params, x_BxRxD, method="leave"), kv


def forward_to_few(
    config: TransformerConfig,
    params: dict,
    tokens_BxR: Array,
    positions_BxR: Array,
    attention: Attention,
    leaving: slice,
    attention_of: Callable[[Array | None], Attention],
    *,
    sigma_BxR: Array | None = None,
    rotary: tuple[Array, Array] | None = None,
    past: tuple[KV, ...] | None = None,
) -> tuple[Callable[[Array | None], Array], tuple[KV, ...]]:
    """`forward` where few rows leave the network, which may be named later: the last block turns to these alone.

    Args (the others are those of `forward`):
      params: `unstacked`.
      leaving: W rows of each text among which those few will be.
      attention_of: the attention of rows at places int32 [B, K] among the W (None: of all W).

    Returns:
      the same places -> rows [B, K, D] after the last norm; and the keys and values of all rows.
    """
    x_BxRxD, condition, rotary = _entered(config, params, tokens_BxR, positions_BxR, sigma_BxR, rotary)
    *others, last = params["blocks"]
    x_BxRxD, kv = _through(config, others, attention, x_BxRxD, past, None, rotary, condition, True)
    block = functools.partial(Block(config).apply, {"params": last})
    modulation = block(condition, method="modulate")
    q, k, v = block(x_BxRxD, rotary, modulation, method="project")
    stream = jax.tree.map(lambda x: x[:, leaving], (x_BxRxD, jnp.swapaxes(q, 1, 2), modulation))

    def rows(place_BxK: Array | None) -> Array:
        x_BxKxD, q, modulation = jax.tree.map(lambda x: rows_at(x, place_BxK), stream)
        out = attention_of(place_BxK)(jnp.swapaxes(q, 1, 2), k, v, None if past is None else past[-1], None)
        return _apply(config, params, block(x_BxKxD, out, modulation, method="finish"), method="leave")

    return rows, (*kv, KV(k, v))


def rows_at(x_BxRxD: Array, place_BxK: Array | None) -> Array:
    """The rows of each text at its own places, [B, K, ..]; None: all of them."""
    if place_BxK is None:
        return x_BxRxD
    return jax.vmap(lambda x_RxD, place_K: x_RxD[place_K])(x_BxRxD, place_BxK)


def _apply(config: TransformerConfig, params: dict, *args, method: str):
    return Transformer(config).apply({"params": params}, *args, method=method)


def _entered(config, params, tokens_BxR, positions_BxR, sigma_BxR, rotary):
    """What enters the blocks: rows, noise-level features (or None), rotary angles."""
    x_BxRxD, condition = _apply(config, params, tokens_BxR, sigma_BxR, method="enter")
    if rotary is None:
        rotary = rotary_angles(config, positions_BxR, jnp.promote_types(x_BxRxD.dtype, jnp.float32))
    return x_BxRxD, condition, rotary


def _through(config, layers, attention, x_BxRxD, past, rngs, rotary, condition, return_kv):
    """Rows after some blocks, one by one, and their keys and values."""
    kv = []
    for i, layer in enumerate(layers):
        inputs = (None if past is None else past[i], None if rngs is None else rngs[i])
        x_BxRxD, new = Block(config, attention, return_kv).apply({"params": layer}, x_BxRxD, inputs, rotary, condition)
        kv.append(new)
    return x_BxRxD, tuple(kv) if return_kv else None


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
