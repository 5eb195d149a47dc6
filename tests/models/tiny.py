"""Experiments small enough to enumerate: 2 or 3 tokens, a few positions, one or two blocks of 8."""

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax import config
from hdlm_jax.diffusion import phases
from hdlm_jax.models import layouts, parts, transformer

BOS = 1


def build(num_tokens, length, **fields):
    """Parts of an experiment with dotted fields changed, `__` for the dot: `noising__epsilon=0.2`."""
    small = {
        "data.length": length,
        "model.hidden": 8,
        "model.blocks": 1,
        "model.heads": 2,
        "model.remat": "none",
        "model.vocabulary_multiple": 1,
        "loss.rows_per_chunk": 1 << 20,
    }
    given = {name.replace("__", "."): value for name, value in fields.items()}
    return parts.build(config.override(config.default(), small | given), num_tokens, BOS)


def random_params(model, seed=0, scale=0.6, dtype=np.float32):
    """Parameters of which none is zero, numpy arrays."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * scale).astype(dtype), shapes)


def plain_denoiser(made, params, trailing):
    """(step, zt [B, L]) -> x0 probabilities [B, L, N]: the network in the plain layout of a generation step."""

    def denoiser(step, zt_BxL):
        B, L = zt_BxL.shape
        step_B, origin_B = jnp.broadcast_to(step, B), jnp.zeros(B, jnp.int32)
        phase = phases.at_step(step_B, origin_B, L, made.hs, made.schedule, made.process.alpha_max)
        rows = layouts.plain(made.model, zt_BxL, phase, trailing)
        hidden, _ = transformer.forward(made.model, params, rows.tokens, rows.positions, rows.attention)
        first, end = rows.predicting
        scores = transformer.logits(made.model, params, hidden[:, first:end])
        return jax.nn.softmax(scores, axis=-1)[..., : made.model.num_tokens]

    return denoiser
