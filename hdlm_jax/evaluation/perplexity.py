"""The negative ELBO of texts, estimated with a standard error, as nats/token, perplexity and bits/byte."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion import losses
from hdlm_jax.errors import require
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts


class Bound(NamedTuple):
    """An upper bound of -log p of a text, estimated.

    Attributes:
      nats_per_token: the estimate.
      standard_error: of it, from the draws of noise (nats per token); the text is taken as given.
      terms: its parts, nats per token.
      tokens: how many were counted.
      num_bytes: of the text that they cover.
      draws: passes over every window.
      hyperschedule: what the bound is of.
    """

    nats_per_token: float
    standard_error: float
    terms: dict[str, float]
    tokens: int
    num_bytes: float
    draws: int
    hyperschedule: str

    @property
    def perplexity(self) -> float:
        """exp of the nats per token (a bound of the perplexity per token)."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats_per_token * self.tokens / self.num_bytes / math.log(2)

    @property
    def bits_per_byte_error(self) -> float:
        """Standard error of `bits_per_byte`."""
        return self.standard_error * self.tokens / self.num_bytes / math.log(2)

    def to_json(self) -> dict:
        """Plain numbers by name."""
        derived = {name: getattr(self, name) for name in ("perplexity", "bits_per_byte", "bits_per_byte_error")}
        return {**self._asdict(), **derived}

    def __str__(self) -> str:
        return (
            f"bound: {self.bits_per_byte:.4f} +- {self.bits_per_byte_error:.4f} bits/byte,"
            f" {self.nats_per_token:.4f} +- {self.standard_error:.4f} nats/token,"
            f" perplexity {self.perplexity:.3f} ({self.tokens:,} tokens, {self.draws} draws, {self.hyperschedule})"
        )


def name_of(parts: Parts) -> str:
    """The hyperschedule that a bound is of, in words."""
    return "flat, continuous times" if parts.layout == "continuous" else parts.hs.describe()


@functools.lru_cache(maxsize=32)
def estimator(parts: Parts, reading: str):
    """A jitted (params, tokens_BxL, valid_BxL, rng) -> {term: [B] nats}: one unbiased draw of each window's bound.

    Args:
      parts: the experiment's parts; times are stratified over the batch.
      reading: how the network is read at tokens (`parts.loss.reading`).
    """
    per_position = losses.bound(parts.process, reading).terms
    with jax.ensure_compile_time_eval():
        least, most = parts.schedule.alpha(jnp.array([0.0, 1.0])).tolist()
    completes = parts.layout == "continuous" and (parts.process.epsilon > 0 or least < 1)
    prior = losses.prior_kl(parts.process, most)

    @jax.jit
    def draw(params: dict, tokens_BxL: Array, valid_BxL: Array, rng: Array) -> dict[str, Array]:
        noise_rng, zero_rng = jax.random.split(rng)
        terms = passes.terms(parts, params, tokens_BxL, passes.noise(parts, noise_rng, tokens_BxL, False), per_position)
        if completes:
            noised = passes.at_zero_plus(parts, zero_rng, tokens_BxL)
            rest = passes.terms(parts, params, tokens_BxL, noised, per_position)
            terms = {name: terms[name] + rest[name] for name in terms}
        terms["prior"] = jnp.full(tokens_BxL.shape, prior, jnp.float32)
        return {name: jnp.where(valid_BxL, x, 0.0).sum(1) for name, x in terms.items()}

    return draw


def estimate(
    draw,
    params: dict,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    bytes_per_token: float,
    draws: int,
    seed: int,
    hyperschedule: str,
) -> Bound:
    """Averages `draws` draws of every window.

    The standard error pools the variance between the draws of each window; stratified times make the
    true one smaller.

    Args:
      draw: from `estimator`.
      params: network parameters.
      batches: (tokens int32 [B, L], valid bool [B, L]) pairs; rows without a valid token do not count.
      bytes_per_token: of the text, to convert.
      draws: at least 2.
      seed: of the noise.
      hyperschedule: its name, for the report.

    Raises:
      UserError: fewer than two draws, nothing to count.
    """
    require(draws >= 2, "--draws", draws, "at least 2 (the standard error comes from their spread)")
    rng = jax.random.key(seed)
    means, variance, tokens = {}, 0.0, 0
    for i, (tokens_BxL, valid_BxL) in enumerate(batches):
        batch_rng = jax.random.fold_in(rng, i)
        rows = [draw(params, tokens_BxL, valid_BxL, jax.random.fold_in(batch_rng, d)) for d in range(draws)]
        rows = jax.tree.map(lambda *x: np.stack([np.asarray(v, np.float64) for v in x]), *rows)
        for name, x_DxB in rows.items():
            means[name] = means.get(name, 0.0) + float(x_DxB.mean(0).sum())
        variance += float(sum(rows.values()).var(0, ddof=1).sum()) / draws
        tokens += int(valid_BxL.sum())
    require(tokens > 0, "text", "no tokens", "at least one token to evaluate")
    terms = {name: x / tokens for name, x in means.items()}
    error = math.sqrt(variance) / tokens
    return Bound(sum(terms.values()), error, terms, tokens, tokens * bytes_per_token, draws, hyperschedule)
