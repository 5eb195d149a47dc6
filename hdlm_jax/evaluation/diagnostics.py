"""What a model makes of its context and of its own confidence, on held-out windows; the knee of a curve.

  context      does the loss move when what stands right of a position, or left of it, is hidden or shuffled?
  calibration  how often a token is right against the probability that the network gives it
  knee         where more calls stop paying

What samplers do to wrong tokens is in evaluation/corrections.py.
Letters: W windows, B of them at a time, D draws of the noise, L positions, V scores, N ordinary tokens, K predictions.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion import fields, reverse, scores
from hdlm_jax.diffusion.categorical import categorical
from hdlm_jax.diffusion.losses import cross_entropy
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import one_of, require
from hdlm_jax.evaluation.report import Report, mean_and_error, over_windows, scores_of, settings_of, z_of
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.passes import Noised

ABLATIONS = ("right hidden", "right shuffled", "left hidden")
TOKENS = ("top", "sampled")  # whose confidence is compared: the likeliest token's, or a draw's


def context(
    parts: Parts, params: dict, tokens_WxL: np.ndarray, draws: int = 4, seed: int = 0, batch: int = 32
) -> Report:
    """Hides and shuffles what stands right of a predicted position inside its window, and takes the loss again.

    Each draw noises a window of text and predicts one position of it that is masked (any that changes, where the
    process has no mask) and has an unmasked token right of it in its window. Rows: `right hidden` turns all right of it
    in the window to noise of the prior, `right shuffled` permutes it, `left hidden` is for comparison; `difference`
    is the mean rise of -log p of the true token, nats. All of them are draws that the noising could have made, so
    levels stay as they are. A model whose right rows do not differ from 0 predicts from left to right, whatever it is
    shown. Of a `prefix` model all this is inside the window: the settled text before it stays.

    Args:
      parts, params: the model.
      tokens_WxL: held-out windows, at least two.
      draws: of the noise of every window, one prediction each.
      seed: of the draws.
      batch: windows at a time.

    Raises:
      UserError: windows without a token right of a masked position, such as those of quenched.
    """
    nats = over_windows(functools.partial(_context_nats, parts, params), tokens_WxL, draws, seed, batch)
    counted_DxW, intact_DxW = nats["counted"], nats["intact"]
    counts_W, predictions = counted_DxW.sum(0), int(counted_DxW.sum())
    allowed = "one whose windows hold tokens right of masked positions; here nothing to the right is ever seen"
    require(predictions > 1, "hyperschedule", parts.hs.describe(), allowed)
    rows, total = [], lambda x_DxW: np.where(counted_DxW, x_DxW, 0.0).sum(0, dtype=np.float64)
    for name in ABLATIONS:
        difference, error = mean_and_error(total(nats[name] - intact_DxW), counts_W)
        found = {"intact nats": intact_DxW, "nats": nats[name]}
        found = {which: float(total(x_DxW).sum() / predictions) for which, x_DxW in found.items()}
        rows.append({"ablation": name, **found, "difference": difference, "standard error": error})
        rows[-1]["z"] = z_of(difference, error)
    settings = settings_of("context", parts, tokens_WxL, seed, draws=draws)
    return Report(rows, {"predictions": predictions}, settings)


@functools.partial(jax.jit, static_argnums=0)
def _context_nats(parts: Parts, params: dict, x0_BxL: Array, rng: Array) -> dict[str, Array]:
    """[B] nats of one position of every text under each ablation, and whether the text has such a position."""
    shown, phase, place_B, counted_B = ablations(parts, x0_BxL, rng)
    of_tokens = lambda scores_RxV, x0_R, *_: {"nats": cross_entropy(scores_RxV, x0_R)}
    nats = lambda z_BxL: passes.terms(parts, params, x0_BxL, Noised(z_BxL, phase), of_tokens)["nats"]
    at_place = {name: _at(nats(z_BxL), place_B) for name, z_BxL in shown.items()}
    return at_place | {"counted": counted_B}


@functools.partial(jax.jit, static_argnums=0)
def ablations(parts: Parts, x0_BxL: Array, rng: Array) -> tuple[dict[str, Array], Phase, Array, Array]:
    """Noised texts [B, L] intact and under each of `ABLATIONS`, by name.

    Returns:
      them, their phase, the position that is predicted, int [B], and whether there is one, bool [B].
    """
    noise_rng, place_rng, prior_rng, order_rng = jax.random.split(rng, 4)
    zt_BxL, phase = passes.noise(parts, noise_rng, x0_BxL, training=False)
    noise_BxL = parts.process.prior(prior_rng, x0_BxL.shape)
    place_B, counted_B = _position(place_rng, zt_BxL, phase, parts.process.mask)
    position_1xL, place_Bx1 = jnp.arange(x0_BxL.shape[1])[None, :], place_B[:, None]
    right_BxL = (position_1xL > place_Bx1) & (position_1xL < _at(phase.stop, place_B)[:, None])
    left_BxL = (position_1xL < place_Bx1) & (position_1xL >= _at(phase.start, place_B)[:, None])
    hidden = lambda side_BxL: jnp.where(side_BxL, noise_BxL, zt_BxL)
    mixed_BxL = jax.vmap(shuffled)(jax.random.split(order_rng, len(zt_BxL)), zt_BxL, right_BxL)
    found = (hidden(right_BxL), mixed_BxL, hidden(left_BxL))
    return {"intact": zt_BxL, **dict(zip(ABLATIONS, found, strict=True))}, phase, place_B, counted_B


def _position(rng: Array, zt_BxL: Array, phase: Phase, mask: int | None) -> tuple[Array, Array]:
    """A random changing and masked position of each text with a token right of it in its window; whether it has one."""
    hidden_BxL = zt_BxL == mask if mask is not None else jnp.ones(zt_BxL.shape, bool)
    token_BxL = ~hidden_BxL if mask is not None else hidden_BxL
    before_BxL1 = jnp.pad(jnp.cumsum(token_BxL, 1), ((0, 0), (1, 0)))  # tokens left of each position
    right_BxL = jnp.take_along_axis(before_BxL1, phase.stop, 1) - before_BxL1[:, 1:]
    fits_BxL = hidden_BxL & (phase.steps > 0) & (right_BxL > 0)
    lot_BxL = jnp.where(fits_BxL, jax.random.uniform(rng, zt_BxL.shape), -1.0)
    return jnp.argmax(lot_BxL, 1), fits_BxL.any(1)


def shuffled(rng: Array, z_L: Array, moves_L: Array) -> Array:
    """The tokens where `moves_L` in a random order, each order alike; the others stay.

    >>> z_L = jnp.arange(5)
    >>> shuffled(jax.random.key(0), z_L, (z_L > 1) & (z_L < 4)).tolist() in ([0, 1, 2, 3, 4], [0, 1, 3, 2, 4])
    True
    """
    stay_L = 1.0 + jnp.arange(len(z_L))
    target_L = jnp.argsort(jnp.where(moves_L, 0.0, stay_L), stable=True)
    source_L = jnp.argsort(jnp.where(moves_L, jax.random.uniform(rng, z_L.shape), stay_L), stable=True)
    return z_L.at[target_L].set(z_L[source_L])


def calibration(
    parts: Parts,
    params: dict,
    tokens_WxL: np.ndarray,
    token: str = "top",
    bins: int = 10,
    draws: int = 4,
    seed: int = 0,
    batch: int = 32,
) -> Report:
    """How often a token is right against the probability p(x | z) that the network gives it, on noised windows.

    Rows: bins of that probability, apart for positions that hold the mask and for those that hold a token (where
    these may be wrong), all noise levels together as the bound draws them. Summary: the expected calibration error
    at each, sum over bins of their share of the predictions times |accuracy - mean probability|.

    Args:
      token: 'top', the likeliest token, or 'sampled', one drawn from p.
      bins: of equal width over [0, 1].
      parts, params, tokens_WxL, draws, seed, batch: as in `context`.

    Raises:
      UserError: an unknown kind of token, no bins.
    """
    one_of("--token", token, TOKENS)
    fields.whole("--bins", bins, 1)
    found = over_windows(functools.partial(_confidences, parts, token, params), tokens_WxL, draws, seed, batch)
    certain = parts.process.frozen and parts.process.epsilon == 0  # an unmasked token is clean
    places = {"masks": found["masked"]} | ({} if certain else {"tokens": ~found["masked"]})
    rows, summary = [], {}
    for place, here in places.items():
        here = here & found["counted"]
        if here.any():
            lines, error = binned(found["confidence"][here], found["right"][here], bins)
            rows += [{"at": place, **line} for line in lines]
            summary |= {f"{place}: predictions": int(here.sum()), f"{place}: expected calibration error": error}
    return Report(
        rows, summary, settings_of("calibration", parts, tokens_WxL, seed, draws=draws, token=token, bins=bins)
    )


def binned(confidence_K: np.ndarray, right_K: np.ndarray, bins: int) -> tuple[list[dict], float]:
    """Bins of confidence that are not empty, and the expected calibration error (Guo et al. 2017).

    A bin's standard error is that of independent predictions.

    >>> rows, error = binned(np.array([0.9, 0.7, 0.2, 0.4]), np.array([True, False, False, False]), bins=2)
    >>> [(row["count"], round(row["confidence"], 3), row["accuracy"]) for row in rows], round(error, 3)
    ([(2, 0.3, 0.0), (2, 0.8, 0.5)], 0.3)
    """
    bin_K, rows, error = np.minimum((confidence_K * bins).astype(int), bins - 1), [], 0.0
    for i in np.unique(bin_K):
        here = bin_K == i
        count, confidence, accuracy = int(here.sum()), float(confidence_K[here].mean()), float(right_K[here].mean())
        error += count / len(bin_K) * abs(accuracy - confidence)
        line = {"from": i / bins, "to": (i + 1) / bins, "count": count, "confidence": confidence, "accuracy": accuracy}
        rows.append({**line, "standard error": math.sqrt(accuracy * (1 - accuracy) / count)})
    return rows, error


@functools.partial(jax.jit, static_argnums=(0, 1))
def _confidences(parts: Parts, token: str, params: dict, x0_BxL: Array, rng: Array) -> dict[str, Array]:
    noise_rng, token_rng = jax.random.split(rng)
    noised = passes.noise(parts, noise_rng, x0_BxL, training=False)
    p_BxLxV = _posterior(parts, scores_of(parts, params, x0_BxL, noised), noised)
    chosen_BxL = jnp.argmax(p_BxLxV, -1) if token == "top" else categorical(token_rng, jnp.log(p_BxLxV))
    return {
        "confidence": jnp.take_along_axis(p_BxLxV, chosen_BxL[..., None], -1)[..., 0],
        "right": chosen_BxL == x0_BxL,
        "masked": noised.zt == (-1 if parts.process.mask is None else parts.process.mask),
        "counted": noised.phase.steps > 0,
    }


def _posterior(parts: Parts, scores_BxLxN: Array, noised: Noised) -> Array:
    """p(x | z) [B, L, V] as the model's last step draws from it: the reverse kernel to a clean token."""
    reading = parts.loss.reading
    outputs = scores_BxLxN if reading in scores.READINGS else jax.nn.softmax(scores_BxLxN, -1)
    kernel = jnp.vectorize(reverse.ancestral(parts.process, reading).kernel, signature="(),(n),(),()->(v)")
    return kernel(noised.zt, outputs, noised.phase.alpha_t, jnp.ones(noised.zt.shape))


def _at(x_BxL: Array, place_B: Array) -> Array:
    return jnp.take_along_axis(x_BxL, place_B[:, None], 1)[:, 0]


def knee(calls: Sequence[float], nats: Sequence[float]) -> int | None:
    """Which point of a curve that falls with the calls is its knee: from there on more calls buy less.

    It is the point farthest below the chord from the fewest to the most calls, with log(calls) and nats each scaled to
    [0, 1]. None where no point lies below it, as among fewer than three: calls pay to the end.

    >>> knee([8, 16, 32, 64], [4.0, 3.2, 3.0, 2.9]), knee([8, 16, 32], [4.0, 3.9, 3.0])
    (1, None)
    """
    x, y = np.log(np.asarray(calls, float)), np.asarray(nats, float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    first, last = np.argmin(x), np.argmax(x)
    chord = y[first] + (y[last] - y[first]) * (x - x[first]) / (x[last] - x[first])
    below = (chord - y) / np.ptp(y)
    return int(np.argmax(below)) if below.max() > 1e-6 else None
