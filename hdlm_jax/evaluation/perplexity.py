"""The negative ELBO of texts, estimated with a standard error, as nats/token, perplexity and bits/byte."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion import losses, phases
from hdlm_jax.errors import require
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts, reconstructs
from hdlm_jax.models.passes import Noised

MAX_TEXTS = 4096  # noised texts per step that an exact bound enumerates at most
ORDER = ("prior", "diffusion", "correction", "reconstruction")  # of the terms in the report


class Bound(NamedTuple):
    """An upper bound of -log p of a text, estimated.

    Attributes:
      nats_per_token: the estimate.
      standard_error: of it, from the draws of noise (nats per token); the text is taken as given.
      terms: its parts, nats per token.
      errors: standard error of each of them.
      tokens: how many were counted.
      num_bytes: of the text that they cover.
      draws: of the noise of every window.
      hyperschedule: what the bound is of.
      enumerated: what was not drawn but taken in full; '' for nothing.
    """

    nats_per_token: float
    standard_error: float
    terms: dict[str, float]
    errors: dict[str, float]
    tokens: int
    num_bytes: float
    draws: int
    hyperschedule: str
    enumerated: str = ""

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
        what = f"{self.hyperschedule}; {self.enumerated}" if self.enumerated else self.hyperschedule
        return (
            f"bound: {self.bits_per_byte:.4f} +- {self.bits_per_byte_error:.4f} bits/byte,"
            f" {self.nats_per_token:.4f} +- {self.standard_error:.4f} nats/token,"
            f" perplexity {self.perplexity:.3f} ({self.tokens:,} tokens, {self.draws} draws, {what})"
        )


class Enumerated(NamedTuple):
    """What a bound takes in full.

    Attributes:
      words: for the report; '' for nothing.
      complete: whether nothing is left to draw.
    """

    words: str
    complete: bool


NOTHING = Enumerated("", False)


def name_of(parts: Parts, eta: float | None = None) -> str:
    """The chain that a bound is of, in words: the hyperschedule, and the correction if there is one."""
    name = "flat, continuous times" if parts.layout == "continuous" else parts.hs.describe()
    return name if eta is None else f"{name}, corrected at eta {eta:g}"


def in_steps(parts: Parts) -> Parts:
    """The parts with flat in discrete steps, `sampler.steps` of them as generation takes them, not continuous times."""
    return parts._replace(layout="plain") if parts.layout == "continuous" else parts


def every_step(parts: Parts) -> Enumerated:
    """What `estimator` with `exact` takes in full: every step, and all noise where there is none or little.

    Raises:
      UserError: continuous times, which cannot be enumerated.
    """
    steps = parts.layout != "continuous"
    allowed = "not for hyperschedule.kind 'flat' with model.visibility 'full', whose times are continuous, unless --eta"
    require(steps, "--exact", True, f"{allowed} takes it in sampler.steps steps")
    count = passes.num_passes(parts)
    words = f"every step enumerated by {count} pass{'' if count == 1 else 'es'}"
    if _is_silent(parts):
        return Enumerated(f"{words}, no noise to draw", True)
    if _takes_all_noise(parts):
        return Enumerated(f"{words} over all {_noised_texts(parts):,} noised texts", True)
    return Enumerated(f"{words}, noise drawn", False)


@functools.lru_cache(maxsize=32)
def estimator(parts: Parts, reading: str, eta: float | None = None, exact: bool = False):
    """A jitted (params, tokens_BxL, valid_BxL, rng) -> {term: [B] nats}: one unbiased draw of each window's bound.

    Args:
      parts: the experiment's parts; how noise is drawn follows `parts.variance`, and a draw of 'antithetic' is a
        pair of passes.
      reading: how the network is read at tokens (`parts.loss.reading`).
      eta: of the chain that adaptive correction runs; None for the model's own reverse chain.
      exact: take every step once instead of drawing them, see `every_step`.
    """
    continuous = parts.layout == "continuous"
    bound = (
        losses.bound(parts.process, reading, continuous)
        if eta is None
        else losses.acs_bound(parts.process, eta, reading)
    )
    one_pass = functools.partial(_one_pass, parts, bound.terms)
    draw_all = functools.partial(_every_step, parts, bound.terms) if exact else one_pass
    with jax.ensure_compile_time_eval():
        most = float(parts.schedule.alpha(jnp.ones(())))
        prior_N = np.asarray(losses.prior_kl(parts.process, most, np.arange(parts.model.num_tokens)))

    @jax.jit
    def draw(params: dict, tokens_BxL: Array, valid_BxL: Array, rng: Array) -> dict[str, Array]:
        prior_BxL = jnp.asarray(prior_N, jnp.float32)[tokens_BxL]
        terms = {"prior": prior_BxL, **draw_all(params, tokens_BxL, rng)}
        return {name: jnp.where(valid_BxL, x, 0.0).sum(1) for name, x in terms.items()}

    return draw


def _one_pass(parts: Parts, per_position, params: dict, tokens_BxL: Array, rng: Array) -> dict[str, Array]:
    """Terms [B, L] of one pass over drawn noise, or the mean of a pair; with the reconstruction where there is one."""
    noise_rng, zero_rng = jax.random.split(rng)
    run = functools.partial(passes.terms, parts, params, tokens_BxL, per_position=per_position)
    noise = functools.partial(passes.noise, parts, noise_rng, tokens_BxL, training=False)
    terms = run(noise())
    if parts.variance == "antithetic":
        terms = jax.tree.map(lambda a, b: (a + b) / 2, terms, run(noise(mirrored=True)))
    if reconstructs(parts.layout, parts.schedule, parts.process):
        rest = run(passes.at_zero_plus(parts, zero_rng, tokens_BxL))
        terms = jax.tree.map(jnp.add, terms, rest)
    return terms


def _every_step(parts: Parts, per_position, params: dict, tokens_BxL: Array, rng: Array) -> dict[str, Array]:
    """Terms [B, L] over every pass; the noise of each is drawn once, or is every noised text with its probability."""
    shape, count = tokens_BxL.shape, passes.num_passes(parts)
    run = functools.partial(passes.terms, parts, params, tokens_BxL, per_position=per_position)

    def drawn(number):
        phase = passes.numbered(parts, number, shape)
        return run(Noised(parts.process.sample(jax.random.fold_in(rng, number), tokens_BxL, phase.alpha_t), phase))

    def whole(place):
        number, text = place // _noised_texts(parts), place % _noised_texts(parts)
        phase = passes.numbered(parts, number, shape)
        states = parts.process.num_states
        zt_BxL = jnp.broadcast_to(text // states ** jnp.arange(shape[1])[None, :] % states, shape)
        law_BxLxV = jax.vmap(jax.vmap(parts.process.marginal))(tokens_BxL, phase.alpha_t)
        chance_Bx1 = jnp.take_along_axis(law_BxLxV, zt_BxL[..., None], -1)[..., 0].prod(1, keepdims=True)
        terms = run(Noised(zt_BxL, phase))
        return {name: jnp.where(chance_Bx1 > 0, chance_Bx1 * x, 0.0) for name, x in terms.items()}

    one, passes_in_all = (whole, count * _noised_texts(parts)) if _takes_all_noise(parts) else (drawn, count)
    shapes = jax.eval_shape(one, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, place: (jax.tree.map(jnp.add, total, one(place)), None)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(passes_in_all, dtype=jnp.int32))
    return {name: x / count for name, x in total.items()}


def _is_silent(parts: Parts) -> bool:
    """Whether the step decides the noise: clean text, or masks and nothing else."""
    mask, alpha_max = parts.process.mask, parts.process.alpha_max
    if mask is None or not phases.is_silent(parts.hs, parts.schedule, alpha_max):
        return False
    with jax.ensure_compile_time_eval():
        return float(parts.process.marginal(0, 0.0)[mask]) == 1


def _takes_all_noise(parts: Parts) -> bool:
    return not _is_silent(parts) and _noised_texts(parts) <= MAX_TEXTS


def _noised_texts(parts: Parts) -> int:
    return parts.process.num_states**parts.model.length


def estimate(
    draw,
    params: dict,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    bytes_per_token: float,
    draws: int,
    seed: int,
    hyperschedule: str,
    enumerated: Enumerated = NOTHING,
) -> Bound:
    """Averages `draws` draws of every window.

    The standard error pools the variance between the draws of each window; stratified times make the
    true one smaller.

    Args:
      draw: from `estimator`.
      params: network parameters.
      batches: (tokens int32 [B, L], valid bool [B, L]) pairs; rows without a valid token do not count.
      bytes_per_token: of the text, to convert.
      draws: at least 2; 1 is taken where nothing is left to draw, and the error is 0.
      seed: of the noise.
      hyperschedule: its name, for the report.
      enumerated: what the draws take in full.

    Raises:
      UserError: fewer than two draws, nothing to count.
    """
    require(draws >= 2, "--draws", draws, "at least 2 (the standard error comes from their spread)")
    draws = 1 if enumerated.complete else draws
    rng = jax.random.key(seed)
    means, variances, variance, tokens = {}, {}, 0.0, 0
    for i, (tokens_BxL, valid_BxL) in enumerate(batches):
        batch_rng = jax.random.fold_in(rng, i)
        rows = [draw(params, tokens_BxL, valid_BxL, jax.random.fold_in(batch_rng, d)) for d in range(draws)]
        rows = jax.tree.map(lambda *x: np.stack([np.asarray(v, np.float64) for v in x]), *rows)
        for name, x_DxB in rows.items():
            means[name] = means.get(name, 0.0) + float(x_DxB.mean(0).sum())
            variances[name] = variances.get(name, 0.0) + _variance_of_mean(x_DxB)
        variance += _variance_of_mean(sum(rows.values()))
        tokens += int(valid_BxL.sum())
    require(tokens > 0, "text", "no tokens", "at least one token to evaluate")
    names = sorted(means, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    terms = {name: means[name] / tokens for name in names}
    errors = {name: math.sqrt(variances[name]) / tokens for name in names}
    error, num_bytes = math.sqrt(variance) / tokens, tokens * bytes_per_token
    return Bound(sum(terms.values()), error, terms, errors, tokens, num_bytes, draws, hyperschedule, enumerated.words)


def _variance_of_mean(x_DxB: np.ndarray) -> float:
    """Variance of the mean over draws of the sum over windows, from each window's spread."""
    return float(x_DxB.var(0, ddof=1).sum()) / len(x_DxB) if len(x_DxB) > 1 else 0.0
