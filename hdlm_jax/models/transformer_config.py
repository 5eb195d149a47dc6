"""Sizes and switches of the network."""

import dataclasses

import jax.numpy as jnp

from hdlm_jax.errors import require


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

    def activations(self, params: jnp.dtype) -> jnp.dtype:
        """The dtype of activations; with 'float32' that of the parameters, so that float64 ones are not rounded."""
        return params if self.dtype == "float32" else jnp.dtype(self.dtype)


CHOICES = {
    "prediction": ("aligned", "shifted"),
    "visibility": ("full", "prefix"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "xla", "splash", "cudnn"),
    "dtype": ("float32", "bfloat16", "float64"),
}
