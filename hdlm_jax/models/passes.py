"""One pass over a batch of texts: draw the noise, lay out the rows, run the network, take the terms.

Training and likelihood share it: a pass with a loss that is a bound is an unbiased estimate of the
negative ELBO, summed over positions. Letters: B texts, L positions, V scores.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import noising, phases, visibility
from hdlm_jax.diffusion.losses import cross_entropy
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.models import layouts
from hdlm_jax.models.devices import over_texts
from hdlm_jax.models.layouts import Rows
from hdlm_jax.models.parts import Parts, counts_masks
from hdlm_jax.models.transformer import forward, logits


class Noised(NamedTuple):
    """A noised batch: tokens int32 [B, L] and what the pass asks of each position."""

    zt: Array
    phase: Phase


def noise(parts: Parts, rng: Array, x0_BxL: Array, training: bool = True, mirrored: bool = False) -> Noised:
    """Draws phases, origins and noise; in evaluation the whole noise range, and every text from its start.

    Args:
      mirrored: the other pass of the 'antithetic' pair that `rng` stands for.
    """
    B, L = x0_BxL.shape
    phase_rng, origin_rng, noise_rng = jax.random.split(rng, 3)
    noise_range = parts.noise_range if training else (0.0, 1.0)
    alpha_max, variance = parts.process.alpha_max, variance_of(parts, training)
    if parts.layout == "continuous":
        u_B = phases.uniforms(phase_rng, B, variance)
        u_B = 1 - u_B if mirrored else u_B
        share = parts.reconstruction_share if training else 0.0
        if variance == "counts":
            phase, masks_B = phases.counted(u_B, L, alpha_max, share)
            return Noised(_exactly(parts, noise_rng, x0_BxL, masks_B), phase)
        phase = phases.continuous(u_B, L, parts.schedule, alpha_max, share, noise_range)
        if variance == "antithetic" and not training:
            return Noised(_either(parts, noise_rng, x0_BxL, phase.alpha_t, mirrored), phase)
    else:
        origin_B = _origins(origin_rng, B, L, parts.origin_share if training else 0.0)
        origin_B = origin_B // parts.model.context_group * parts.model.context_group
        law = parts.hs, parts.schedule, alpha_max
        if parts.layout == "tiled":
            phase = phases.tiled(phase_rng, origin_B, *law, noise_range, variance)
        else:
            u_B = phases.uniforms(phase_rng, B, variance)
            step_B = jnp.floor(u_B * parts.hs.num_steps).astype(jnp.int32)
            phase = phases.at_step(step_B, origin_B, L, *law)
    return Noised(parts.process.sample(noise_rng, x0_BxL, phase.alpha_t), phase)


def variance_of(parts: Parts, training: bool) -> str:
    """How the noise of a pass is drawn: `parts.variance`, 'auto' resolved.

    'auto' is 'counts' where that is exact: noise of masks in continuous times from 1 to 0, a network that does not
    see the noise level, and, in training, a bound over all of them; else 'stratified'.
    """
    bound = not training or (parts.loss.is_bound and parts.noise_range == (0, 1))
    if parts.variance == "auto":
        return "counts" if bound and counts_masks(parts) else "stratified"
    return parts.variance


def _exactly(parts: Parts, rng: Array, x0_BxL: Array, masks_B: Array) -> Array:
    """Masks at exactly so many positions of each text, any of them with equal chance."""
    order_rng, token_rng = jax.random.split(rng)
    order_BxL = jax.random.uniform(order_rng, x0_BxL.shape)
    rank_BxL = jnp.argsort(jnp.argsort(order_BxL, axis=1), axis=1)
    return _with_masks(parts, token_rng, x0_BxL, rank_BxL < masks_B[:, None])


def _either(parts: Parts, rng: Array, x0_BxL: Array, alpha_BxL: Array, mirrored: bool) -> Array:
    """Masks where a uniform, or 1 minus it, exceeds the share of unmasked tokens."""
    mask_rng, token_rng = jax.random.split(rng)
    u_BxL = jax.random.uniform(mask_rng, x0_BxL.shape)
    unmasked = noising.unmasked_share(alpha_BxL, parts.process.alpha_max)
    return _with_masks(parts, token_rng, x0_BxL, (1 - u_BxL if mirrored else u_BxL) >= unmasked)


def _with_masks(parts: Parts, rng: Array, x0_BxL: Array, masked_BxL: Array) -> Array:
    tokens = parts.process.sample(rng, x0_BxL, jnp.full(x0_BxL.shape, parts.process.alpha_max))
    return jnp.where(masked_BxL, parts.process.mask, tokens)


def num_passes(parts: Parts) -> int:
    """How many passes show every step of the hyperschedule once: its period where tiled, its steps where plain."""
    return parts.hs.period if parts.layout == "tiled" else parts.hs.num_steps


def numbered(parts: Parts, number: Array, shape: tuple[int, int]) -> Phase:
    """The phase of pass 0..num_passes-1 over [B, L] texts, each from its start; their mean is the whole bound."""
    B, L = shape
    origin_B = jnp.zeros(B, jnp.int32)
    law = parts.hs, parts.schedule, parts.process.alpha_max
    if parts.layout == "tiled":
        return phases.at_phase(jnp.broadcast_to(number, (B, 2 * parts.hs.num_groups)), origin_B, *law)
    return phases.at_step(jnp.broadcast_to(number, (B,)), origin_B, L, *law)


def at_zero_plus(parts: Parts, rng: Array, x0_BxL: Array) -> Noised:
    """The batch at the least noise there is, each position with its reconstruction term.

    With the passes of `noise` it completes the bound for continuous times, where alpha at 0+ is below 1.
    """
    phase = phases.at_zero_plus(x0_BxL.shape, parts.schedule, parts.process.alpha_max)
    return Noised(parts.process.sample(rng, x0_BxL, phase.alpha_t), phase)


def rows(parts: Parts, x0_BxL: Array, noised: Noised) -> Rows:
    """What the network is fed for a noised batch."""
    shifted = parts.model.prediction == "shifted"
    trailing = shifted and visibility.trailing_row_matters(parts.hs, parts.schedule)
    if parts.layout != "tiled":
        return layouts.plain(parts.model, noised.zt, noised.phase, trailing)
    if shifted and parts.hs.width == 1 and not trailing:
        return layouts.causal(parts.model, x0_BxL)
    windows = layouts.most_windows(parts.hs) if trailing else 0
    return layouts.tiled(parts.model, x0_BxL, noised.zt, noised.phase, parts.hs.width, windows)


def terms(parts: Parts, params: dict, x0_BxL: Array, noised: Noised, per_position: Callable) -> dict[str, Array]:
    """Runs the network on a noised batch and takes per-position terms.

    Args:
      per_position: (scores_RxV, x0_R, zt_R, phase of [R]) -> {name: [R]}, such as a loss's `terms`.

    Returns:
      {name: float [B, L]}.
    """
    hidden, fed = _run(parts, params, x0_BxL, noised, None)
    first, end = fed.predicting

    def of_device(head, texts):
        hidden_BxLxD, columns = texts
        take = lambda piece: per_position(_scores(parts, head, piece[0]), *piece[1])
        out = jax.lax.map(take, _pieces(parts, hidden_BxLxD, columns))
        return (), {name: _whole(x, hidden_BxLxD.shape[:2]) for name, x in out.items()}

    return over_texts(of_device, _small(_head(params), hidden), (hidden[:, first:end], (x0_BxL, *noised)))[1]


def mean_loss(
    parts: Parts, params: dict, x0_BxL: Array, noised: Noised, dropout_rng: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The training loss of a noised batch, nats per token, and its terms (which carry no gradient).

    Scores exist for `rows_per_chunk` rows at a time on each device; where a gradient is asked for it is taken
    chunk by chunk on the way forward, so that no scores are kept or computed twice.

    Args:
      dropout_rng: PRNG key; None switches dropout off.
    """
    hidden, fed = _run(parts, params, x0_BxL, noised, dropout_rng)
    first, end = fed.predicting
    head, columns = _head(params), (x0_BxL, *noised)
    total, sums = _head_loss(parts, parts.loss.terms, head, hidden[:, first:end], columns)
    if parts.context_weight and first:  # the clean copy's rows are those of a GPT
        clean = (*columns, jnp.ones(x0_BxL.shape))
        extra, more = _head_loss(parts, _next_token, head, hidden[:, : x0_BxL.shape[1]], clean)
        total, sums = total + parts.context_weight * extra, sums | more
    means = {name: jax.lax.stop_gradient(x) / x0_BxL.size for name, x in sums.items()}
    return total / x0_BxL.size, means


def _next_token(scores_RxV: Array, x0_R: Array, zt_R: Array, phase: Phase, counts_R: Array) -> dict[str, Array]:
    return {"context": counts_R * cross_entropy(scores_RxV, x0_R)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_loss(
    parts: Parts, per_position: Callable, head: dict, hidden_BxLxD: Array, columns
) -> tuple[Array, dict[str, Array]]:
    """Sum of the terms over all rows, and of each of them."""

    def of_device(head, texts):
        chunks = jax.lax.map(lambda piece: _chunk_loss(parts, per_position, head, *piece), _pieces(parts, *texts))
        return jax.tree.map(jnp.sum, chunks), ()

    return over_texts(of_device, _small(head, hidden_BxLxD), (hidden_BxLxD, columns))[0]


def _head_loss_forward(parts, per_position, head, hidden_BxLxD, columns):
    grad = jax.value_and_grad(functools.partial(_chunk_loss, parts, per_position), argnums=(0, 1), has_aux=True)

    def of_device(head, texts):
        def add(head_gradient, piece):
            sums, (to_head, to_hidden) = grad(head, *piece)
            wider = jax.tree.map(lambda total, x: total + x.astype(total.dtype), head_gradient, to_head)
            return wider, (sums, to_hidden)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), head)
        head_gradient, (sums, to_hidden) = jax.lax.scan(add, zeros, _pieces(parts, *texts))
        return (head_gradient, jax.tree.map(jnp.sum, sums)), _whole(to_hidden, texts[0].shape[:2])

    outs, to_hidden = over_texts(of_device, _small(head, hidden_BxLxD), (hidden_BxLxD, columns))
    return outs[1], (outs[0], to_hidden)


def _head_loss_backward(parts, per_position, gradients, cotangent):
    scaled = jax.tree.map(lambda x: x * cotangent[0].astype(x.dtype), gradients)
    return *scaled, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _chunk_loss(parts: Parts, per_position: Callable, head: dict, hidden_RxD: Array, columns):
    sums = {name: x.sum() for name, x in per_position(_scores(parts, head, hidden_RxD), *columns).items()}
    return sum(sums.values()), sums


def _run(parts: Parts, params: dict, x0_BxL: Array, noised: Noised, dropout_rng: Array | None) -> tuple[Array, Rows]:
    """The final hidden rows [B, R, D] of a pass, and what was fed."""
    fed = rows(parts, x0_BxL, noised)
    level = parts.schedule.sigma(fed.alpha) if parts.model.conditioning else None
    hidden, _ = forward(
        parts.model, params, fed.tokens, fed.positions, fed.attention, sigma_BxR=level, dropout_rng=dropout_rng
    )
    return hidden, fed


def _head(params: dict) -> dict:
    return {name: params[name] for name in ("head_kernel", "head_bias")}


def _small(head: dict, hidden: Array) -> dict:
    """The head as its product reads it: a kernel that goes to every device goes in the activations' dtype."""
    return head | {"head_kernel": head["head_kernel"].astype(hidden.dtype)}


def _scores(parts: Parts, head: dict, hidden_RxD: Array) -> Array:
    return logits(parts.model, head, hidden_RxD[None], padded=True)[0]


def _whole(x_CxR: Array, shape: tuple[int, int]) -> Array:
    """`_pieces` of one array put together again: [C, R, ...] -> [B, L, ...], without what filled the last chunk."""
    rows = x_CxR.reshape(-1, *x_CxR.shape[2:])
    return rows[: math.prod(shape)].reshape(*shape, *rows.shape[1:])


def _pieces(parts: Parts, hidden_BxLxD: Array, columns):
    """All rows in chunks of `rows_per_chunk`, [C, R, ...] each; what fills the last one weighs 0."""
    count = hidden_BxLxD.shape[0] * hidden_BxLxD.shape[1]
    size = min(parts.rows_per_chunk, count)
    fill = -count % size

    def cut(x):
        flat = x.reshape(count, *x.shape[2:])
        return jnp.pad(flat, ((0, fill),) + ((0, 0),) * (flat.ndim - 1)).reshape(-1, size, *flat.shape[1:])

    return cut(hidden_BxLxD), jax.tree.map(cut, columns)


def _origins(rng: Array, B: int, L: int, share: float) -> Array:
    """int32 [B]: 0, or with probability `share` uniform over 1..L-1."""
    if share == 0 or L == 1:
        return jnp.zeros(B, jnp.int32)
    chosen_rng, place_rng = jax.random.split(rng)
    place_B = jax.random.randint(place_rng, (B,), 1, L)
    return jnp.where(jax.random.bernoulli(chosen_rng, share, (B,)), place_B, 0)
