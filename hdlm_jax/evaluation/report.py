"""What the diagnostics share: reports, numbers over windows with their standard errors, the network's scores.

Standard errors and z come from the spread between windows: positions of one window are not independent.
Letters: W windows, B of them at a time, D draws of the noise, L positions, N ordinary tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from hdlm_jax.diffusion import fields
from hdlm_jax.errors import require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.passes import Noised


class Report(NamedTuple):
    """What a diagnostic found.

    Attributes:
      rows: lines of a table, all with the same names.
      summary: the numbers over all lines.
      settings: what they were measured with.
    """

    rows: list[dict]
    summary: dict
    settings: dict


def mean_and_error(sums_W: np.ndarray, counts_W: np.ndarray) -> tuple[float, float]:
    """The mean of all that is counted, and its standard error from the spread between windows.

    >>> mean_and_error(np.array([2.0, 4.0]), np.array([2, 2]))
    (1.5, 0.5)
    """
    W, count = len(sums_W), counts_W.sum()
    mean = sums_W.sum() / count
    spread = ((sums_W - mean * counts_W) ** 2).sum() * W / (W - 1)
    return float(mean), float(math.sqrt(spread) / count)


def z_of(mean: float, error: float) -> float:
    """Mean over standard error; 0 without any spread, where nothing moved."""
    return mean / error if error > 0 else 0.0


def over_windows(one: Callable, tokens_WxL: np.ndarray, draws: int, seed: int, batch: int):
    """The results of `one(tokens_BxL, rng)`, a tree of [B, ...] arrays, over all windows and draws: [D, W, ...]."""
    W = len(tokens_WxL)
    require(W >= 2, "--windows", W, "at least 2 (the standard error comes from their spread)")
    batch, draws = min(fields.whole("--batch", batch, 1), W), fields.whole("--draws", draws, 1)
    root, found = jax.random.key(fields.seed("--seed", seed)), []
    for draw in range(draws):
        for first in range(0, W, batch):
            rows = np.arange(first, first + batch) % W  # the last batch is filled with windows that do not count
            rng = jax.random.fold_in(jax.random.fold_in(root, draw), first)
            found.append(jax.tree.map(lambda x, n=W - first: np.asarray(x)[:n], one(tokens_WxL[rows], rng)))
    return jax.tree.map(lambda *x: np.concatenate(x).reshape(draws, W, *x[0].shape[1:]), *found)


def scores_of(parts: Parts, params: dict, x0_BxL: Array, noised: Noised) -> Array:
    """The network's scores of ordinary tokens [B, L, N]."""
    of_tokens = lambda scores_RxV, *_: {"scores": scores_RxV[..., : parts.model.num_tokens]}
    return passes.terms(parts, params, x0_BxL, noised, of_tokens)["scores"]


def settings_of(name: str, parts: Parts, tokens_WxL: np.ndarray, seed: int, **more) -> dict:
    """What a diagnostic was run with."""
    windows, length = tokens_WxL.shape
    chain = {"noising": parts.process.name, "hyperschedule": perplexity.name_of(parts), "reading": parts.loss.reading}
    return {"diagnostic": name, **chain, "windows": windows, "length": length, "seed": seed, **more}
