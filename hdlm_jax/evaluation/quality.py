"""What generated texts are like: the spread of their tokens, how many were corrected, what a judge makes of them."""

import jax
import numpy as np

from hdlm_jax.errors import require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.models.parts import Parts


def entropy(tokens_BxL: np.ndarray) -> float:
    """Entropy of the tokens within a text, nats, averaged over texts; low where texts repeat themselves.

    >>> round(entropy(np.array([[0, 0, 0, 0], [0, 1, 0, 1]])), 4)
    0.3466
    """
    return float(np.mean([_entropy(np.unique(text_L, return_counts=True)[1]) for text_L in tokens_BxL]))


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def corrected_share(history_TxBxL: np.ndarray, mask: int | None) -> float:
    """Share of the positions whose token changed after it first was none of the mask.

    Args:
      history_TxBxL: tokens after every step.
      mask: the mask's id; None where every state is a token.

    >>> history = np.array([[[5, 5, 1]], [[2, 5, 1]], [[2, 3, 0]]])
    >>> round(corrected_share(history, mask=5), 4)
    0.3333
    """
    before, after = history_TxBxL[:-1], history_TxBxL[1:]
    return float(((before != after) & (before != mask)).any(0).mean())


def judged(judge: Parts, params: dict, tokens_BxL: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """A judge's bound of -log p of each text, nats per token [B]; exact for an autoregressive judge.

    Args:
      judge: parts of a model of the same vocabulary.
      params: its weights.
      tokens_BxL: finished texts, of the judge's length.
      draws: of the noise of each text; 1 is enough where there is none to draw.
      seed: of the noise.

    Raises:
      UserError: texts of another length or vocabulary than the judge's.
    """
    length, top = tokens_BxL.shape[1], int(tokens_BxL.max())
    require(length == judge.model.length, "length", length, f"the judge's {judge.model.length}")
    require(top < judge.model.num_tokens, "tokens", top, f"below the judge's {judge.model.num_tokens}")
    draw = perplexity.estimator(judge, judge.loss.reading)
    valid = np.ones(tokens_BxL.shape, bool)
    rngs = jax.random.split(jax.random.key(seed), draws)
    nats_DxB = [sum(np.asarray(x, np.float64) for x in draw(params, tokens_BxL, valid, rng).values()) for rng in rngs]
    return np.mean(nats_DxB, axis=0) / tokens_BxL.shape[1]
