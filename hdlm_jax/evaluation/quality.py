"""What a judge makes of texts, and how many of their tokens were corrected on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.models import layouts
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.transformer import forward

BATCH = 32  # texts whose features are taken at a time


def corrected_share(trajectory: Trajectory) -> float:
    """Share of the generated positions whose token changed after it first was none of the mask."""
    return float(trajectory.corrected().any(0)[~trajectory.given].mean())


def judged(judge: Parts, params: dict, tokens_BxL: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """A judge's bound of -log p of each text, nats per token [B]; exact for an autoregressive judge.

    Args:
      judge: parts of a model of the same vocabulary.
      params: its weights.
      tokens_BxL: finished texts, of the judge's length.
      draws: of the noise of each text; 1 is enough where there is none to draw.
      seed: of the noise.

    Raises:
      UserError: texts of another length or vocabulary than the judge's, nats that are not finite.
    """
    _check(judge, tokens_BxL)
    draw = perplexity.estimator(judge, judge.loss.reading)
    valid = np.ones(tokens_BxL.shape, bool)
    rngs = jax.random.split(jax.random.key(seed), draws)
    nats_DxB = [sum(np.asarray(x, np.float64) for x in draw(params, tokens_BxL, valid, rng).values()) for rng in rngs]
    nats_B = np.mean(nats_DxB, axis=0) / tokens_BxL.shape[1]
    finite = bool(np.isfinite(nats_B).all())
    require(finite, "--judge", "nats that are not finite", "a model that gives every text some probability")
    return nats_B


def features(judge: Parts, params: dict, tokens_BxL: np.ndarray) -> np.ndarray:
    """A judge's last hidden rows of finished texts, averaged over each text: float32 [B, D].

    Of a `prefix` judge the rows see what is before them, as settled rows do; of a `full` one they see all.

    Raises:
      UserError: texts of another length or vocabulary than the judge's.
    """
    _check(judge, tokens_BxL)
    return np.asarray(_features(judge, params, jnp.asarray(tokens_BxL)))


@functools.partial(jax.jit, static_argnums=0)
def _features(judge: Parts, params: dict, tokens_BxL: Array) -> Array:
    L = tokens_BxL.shape[1]
    one, zero, end = jnp.ones((1, L)), jnp.zeros((1, L)), jnp.full((1, L), L)
    settled = Phase(one, one, zero, zero, end, end, zero)

    def of_text(tokens_L):
        fed = layouts.plain(judge.model, tokens_L[None], settled)
        level = judge.schedule.sigma(fed.alpha) if judge.model.conditioning else None
        hidden, _ = forward(judge.model, params, fed.tokens, fed.positions, fed.attention, sigma_BxR=level)
        return hidden[0].astype(jnp.float32).mean(0)

    return jax.lax.map(of_text, tokens_BxL, batch_size=BATCH)


def _check(judge: Parts, tokens_BxL: np.ndarray) -> None:
    length, top = tokens_BxL.shape[1], int(tokens_BxL.max())
    require(length == judge.model.length, "length", length, f"the judge's {judge.model.length}")
    require(top < judge.model.num_tokens, "tokens", top, f"below the judge's {judge.model.num_tokens}")
