"""Speed of a training step, against the rate of its matrix products measured in the same run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hdlm_jax.benchmarks.timing import seconds
from hdlm_jax.models import parts as builders
from hdlm_jax.models import transformer
from hdlm_jax.training import flops, optimizer, sharding, state
from hdlm_jax.training.step import Update, train_step


def measure(config: ConfigDict, num_tokens: int, repeats: int) -> list[dict]:
    """Times the whole step (forward, backward, optimizer, running mean) on random tokens.

    The matrix products' rate is that of the step's forward products, run alone at the same shapes and
    dtype; on devices without a known peak it stands in for one in `of products`.

    Returns:
      one row: seconds per step, tokens/s, FLOP/s, products' FLOP/s, the ratio, and MFU where the peak is known;
      after that of a tiled layout, the row of the same network in the plain one, which trains one window per text.
    """
    parts = builders.build(config, num_tokens, bos_id=num_tokens - 1)
    rows = [_measure(parts, config, num_tokens, repeats)]
    if parts.layout == "tiled":
        rows.append(_measure(parts._replace(layout="plain"), config, num_tokens, repeats))
        rows = [row | {"x plain": row["seconds/step"] / rows[1]["seconds/step"]} for row in rows]
    return rows


def _measure(parts: builders.Parts, config: ConfigDict, num_tokens: int, repeats: int) -> dict:
    mesh = sharding.mesh(config.mesh)
    batch, length = config.training.batch, config.data.length
    sharding.check_batch(batch, config.training.accumulation, mesh)
    tx = optimizer.build(config.optimizer, config.training.steps)
    fresh = lambda: transformer.init(parts.model, jax.random.key(0))
    held = [state.create(fresh, tx, mesh, ema=config.optimizer.ema > 0)]
    update = Update(parts, tx, config.optimizer, config.training.accumulation)
    tokens = np.random.default_rng(0).integers(0, num_tokens, (batch, length), np.int32)
    x0_BxL = jax.device_put(tokens, sharding.batch_sharding(mesh))
    rng = jax.random.key(1)
    step = jax.jit(functools.partial(train_step, update), donate_argnums=0)
    work = flops.of_step(update, held[0], x0_BxL, rng)

    def once():
        held[0], metrics = step(held[0], x0_BxL, rng)
        return metrics

    time, products = seconds(once, repeats), products_rate(parts.model, batch * length, repeats)
    peak = flops.peak(list(mesh.devices.flat))
    return {
        "layout": parts.layout,
        "hyperschedule": parts.hs.kind,
        "L": length,
        "parameters": transformer.num_parameters(held[0].params),
        "seconds/step": time,
        "tokens/s": batch * length / time,
        "FLOP/step": work,
        "FLOP/s": work / time,
        "products FLOP/s": products,
        "of products": work / time / products,
        "mfu": "peak not known" if peak is None else work / time / peak,
    }


def products_rate(model: transformer.TransformerConfig, rows: int, repeats: int) -> float:
    """FLOP/s of a block's and the head's products alone, at `rows` rows."""
    D, F, V = model.hidden, model.hidden * model.mlp_ratio, model.padded_vocabulary
    shapes = [(D, 3 * D), (D, D), (D, F), (F, D)] * model.blocks + [(D, V)]
    dtype = jnp.dtype(model.dtype)
    inputs = {d: jnp.ones((rows, d), dtype) for d in (D, F)}
    weights = [jnp.ones(shape, dtype) for shape in shapes]
    multiply = jax.jit(lambda x, w: x @ w)

    def all_products():
        return [multiply(inputs[w.shape[0]], w) for w in weights]

    return sum(2.0 * rows * a * b for a, b in shapes) / seconds(all_products, repeats)
