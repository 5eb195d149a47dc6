"""One optimizer step: noise the batch, accumulate gradients over passes, update, average the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hdlm_jax.models import passes
from hdlm_jax.models.devices import by_text
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import optimizer as optimizers
from hdlm_jax.training.state import TrainState


class Update(NamedTuple):
    """What a step needs beside the state and the batch; all static."""

    parts: Parts
    tx: optax.GradientTransformation
    optimizer_block: Any
    accumulation: int


def train_step(update: Update, state: TrainState, x0_BxL: Array, rng: Array) -> tuple[TrainState, dict[str, Array]]:
    """One step of training.

    The noise is drawn for the whole batch at once, so it depends on (seed, step, row) alone and is the
    same for every mesh and every accumulation. A step whose loss or gradient is not finite changes
    nothing but the step count.

    Args:
      update: static parts.
      state: the training state.
      x0_BxL: int32, the global batch.
      rng: the run's PRNG key; the step is folded in here.

    Returns:
      the next state, and float32 scalars: `loss` (nats per token), its terms, `gradient_norm`, `skipped`.
    """
    noise_rng, dropout_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    noised = passes.noise(update.parts, noise_rng, x0_BxL)
    loss = _mean_loss(update.parts)
    (total, terms), gradient = _accumulated(loss, update.accumulation, state.params, (x0_BxL, noised), dropout_rng)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    step = state.step + 1

    def apply():
        updates, optimizer = update.tx.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step, params, optimizer, optimizers.ema(update.optimizer_block, state.ema, params, step))

    state = jax.lax.cond(finite, apply, lambda: state._replace(step=step))
    metrics = {"loss": total, **terms, "gradient_norm": norm, "skipped": 1.0 - finite}
    return state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)


def _mean_loss(parts: Parts) -> Callable:
    """(params, (x0, noised), dropout rng) -> loss in nats per token, and its terms."""

    def loss(params, batch, rng):
        return passes.mean_loss(parts, params, *batch, rng if parts.model.dropout else None)

    return loss


def _accumulated(loss: Callable, passes_per_step: int, params, batch, rng):
    """Value, terms and gradient of the mean over `passes_per_step` equal parts of the batch."""
    grad = jax.value_and_grad(loss, has_aux=True)
    if passes_per_step == 1:
        return grad(params, batch, rng)
    cut = lambda x: x.reshape(passes_per_step, -1, *x.shape[1:])

    def add(total, piece):
        i, part = piece
        part = jax.tree.map(by_text, part)  # every pass on all devices
        return jax.tree.map(jnp.add, total, grad(params, part, jax.random.fold_in(rng, i))), None

    pieces = (jnp.arange(passes_per_step), jax.tree.map(cut, batch))
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], pieces[1]), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / passes_per_step, total)
