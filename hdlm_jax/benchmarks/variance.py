"""Variance of the bound's estimate, per forward pass, for each way to draw the noise."""

import jax
import numpy as np

from hdlm_jax.evaluation import perplexity
from hdlm_jax.models.parts import Parts, variances


def measure(parts: Parts, params: dict, tokens_BxL: np.ndarray, draws: int, seed: int) -> list[dict]:
    """Draws the noise of one batch `draws` times in each way that the experiment allows.

    Returns:
      a row for each way: passes per draw, the mean over the draws (nats per token) with its standard error, the
      variance of one draw of the whole batch times its passes, and that relative to independent draws.
    """
    valid_BxL = np.ones(tokens_BxL.shape, bool)
    rngs = jax.random.split(jax.random.key(seed), draws)
    rows = []
    for way in variances(parts):
        draw = perplexity.estimator(parts._replace(variance=way), parts.loss.reading)
        terms = [draw(params, tokens_BxL, valid_BxL, rng) for rng in rngs]
        nats_D = np.array([sum(np.asarray(x, np.float64).sum() for x in t.values()) for t in terms]) / tokens_BxL.size
        passes = 2 if way == "antithetic" else 1
        row = {
            "variance": way,
            "passes": passes,
            "nats/token": float(nats_D.mean()),
            "standard error": float(nats_D.std(ddof=1) / draws**0.5),
            "variance x passes": float(nats_D.var(ddof=1) * passes),
        }
        rows.append(row | {"x independent": row["variance x passes"] / (rows or [row])[0]["variance x passes"]})
    return rows
