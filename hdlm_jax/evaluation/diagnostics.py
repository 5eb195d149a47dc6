"""What a model makes of its context, of its own confidence and of wrong tokens, on held-out windows.

  context      does the loss move when what stands right of a position, or left of it, is hidden or shuffled?
  calibration  how often a token is right against the probability that the network gives it
  corrections  one call of a sampler on noised text: wrong -> right, right -> wrong, wrong -> another wrong
  repair       a sampler's last calls on text of which a share of the tokens was replaced at random
  knee         where more calls stop paying

Standard errors and z come from the spread between windows: positions of one window are not independent.
Letters: W windows, B of them at a time, D draws of the noise, L positions, V scores, N ordinary tokens, K predictions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion import fields, reverse, scores
from hdlm_jax.diffusion.categorical import categorical
from hdlm_jax.diffusion.losses import cross_entropy
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.diffusion.reverse import ReverseStep
from hdlm_jax.errors import one_of, require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.passes import Noised

ABLATIONS = ("right hidden", "right shuffled", "left hidden")
CHANGES = ("tokens", "wrong", "wrong -> right", "right -> wrong", "wrong -> other wrong")
TOKENS = ("top", "sampled")  # whose confidence is compared: the likeliest token's, or a draw's


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
    nats = _over_windows(functools.partial(_context_nats, parts, params), tokens_WxL, draws, seed, batch)
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
        rows[-1]["z"] = _z(difference, error)
    settings = _settings("context", parts, tokens_WxL, seed, draws=draws)
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
    at each, sum over bins of their share of the predictions times |share right - mean probability|.

    Args:
      token: 'top', the likeliest token, or 'sampled', one drawn from p.
      bins: of equal width over [0, 1].
      parts, params, tokens_WxL, draws, seed, batch: as in `context`.

    Raises:
      UserError: an unknown kind of token, no bins.
    """
    one_of("--token", token, TOKENS)
    fields.whole("--bins", bins, 1)
    found = _over_windows(functools.partial(_confidences, parts, token, params), tokens_WxL, draws, seed, batch)
    certain = parts.process.frozen and parts.process.epsilon == 0  # an unmasked token is clean
    places = {"masks": found["masked"]} | ({} if certain else {"tokens": ~found["masked"]})
    rows, summary = [], {}
    for place, here in places.items():
        here = here & found["counted"]
        if here.any():
            lines, error = binned(found["confidence"][here], found["right"][here], bins)
            rows += [{"at": place, **line} for line in lines]
            summary |= {f"{place}: predictions": int(here.sum()), f"{place}: expected calibration error": error}
    return Report(rows, summary, _settings("calibration", parts, tokens_WxL, seed, draws=draws, token=token, bins=bins))


def binned(confidence_K: np.ndarray, right_K: np.ndarray, bins: int) -> tuple[list[dict], float]:
    """Bins of confidence that are not empty, and the expected calibration error (Guo et al. 2017).

    A bin's standard error is that of independent predictions.

    >>> rows, error = binned(np.array([0.9, 0.7, 0.2, 0.4]), np.array([True, False, False, False]), bins=2)
    >>> [(row["predictions"], round(row["confidence"], 3), row["right"]) for row in rows], round(error, 3)
    ([(2, 0.3, 0.0), (2, 0.8, 0.5)], 0.3)
    """
    bin_K, rows, error = np.minimum((confidence_K * bins).astype(int), bins - 1), [], 0.0
    for i in np.unique(bin_K):
        here = bin_K == i
        count, confidence, right = int(here.sum()), float(confidence_K[here].mean()), float(right_K[here].mean())
        error += count / len(bin_K) * abs(right - confidence)
        line = {"from": i / bins, "to": (i + 1) / bins, "predictions": count, "confidence": confidence, "right": right}
        rows.append({**line, "standard error": math.sqrt(right * (1 - right) / count)})
    return rows, error


@functools.partial(jax.jit, static_argnums=(0, 1))
def _confidences(parts: Parts, token: str, params: dict, x0_BxL: Array, rng: Array) -> dict[str, Array]:
    noise_rng, token_rng = jax.random.split(rng)
    noised = passes.noise(parts, noise_rng, x0_BxL, training=False)
    p_BxLxV = _posterior(parts, _scores(parts, params, x0_BxL, noised), noised)
    chosen_BxL = jnp.argmax(p_BxLxV, -1) if token == "top" else categorical(token_rng, jnp.log(p_BxLxV))
    return {
        "confidence": jnp.take_along_axis(p_BxLxV, chosen_BxL[..., None], -1)[..., 0],
        "right": chosen_BxL == x0_BxL,
        "masked": noised.zt == (-1 if parts.process.mask is None else parts.process.mask),
        "counted": noised.phase.steps > 0,
    }


def corrections(
    parts: Parts,
    params: dict,
    tokens_WxL: np.ndarray,
    step: ReverseStep,
    draws: int = 4,
    seed: int = 0,
    batch: int = 32,
) -> Report:
    """One call of a sampler on noised windows, at the steps that the bound draws: what becomes of their tokens.

    Rows count the unmasked tokens of changing positions, apart for the exact last call of a position and for the
    earlier ones; flat is taken in `sampler.steps` steps. z is that of restored minus damaged per window.

    Args:
      step: the sampler's (`diffusion.reverse.build`).
      parts, params, tokens_WxL, draws, seed, batch: as in `context`.
    """
    parts = perplexity.in_steps(parts)
    counts = _over_windows(functools.partial(_one_call, parts, step, params), tokens_WxL, draws, seed, batch)
    rows = [{"call": name, **_changes(counts[name])} for name in ("earlier", "last")]
    return Report(rows, {}, _settings("corrections", parts, tokens_WxL, seed, draws=draws, sampler=step.name))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_call(parts: Parts, step: ReverseStep, params: dict, x0_BxL: Array, rng: Array) -> dict[str, dict]:
    noise_rng, step_rng = jax.random.split(rng)
    zt_BxL, phase = noised = passes.noise(parts, noise_rng, x0_BxL, training=False)
    zs_BxL = step.step(step_rng, zt_BxL, _scores(parts, params, x0_BxL, noised), phase.alpha_t, phase.alpha_s)
    token_BxL = (phase.steps > 0) & (zt_BxL < parts.process.num_tokens)
    last_BxL = phase.alpha_s >= 1
    places = {"earlier": token_BxL & ~last_BxL, "last": token_BxL & last_BxL}
    return {name: changes(x0_BxL, zt_BxL, zs_BxL, here) for name, here in places.items()}


def repair(
    parts: Parts,
    params: dict,
    tokens_WxL: np.ndarray,
    step: ReverseStep,
    share: float = 0.1,
    calls: int = 1,
    seed: int = 0,
    batch: int = 32,
) -> Report:
    """Replaces a share of the tokens by uniform ones and lets a sampler's last calls work on the text.

    With the process's epsilon for a share this is the law of the noise at 0+: no masks yet. The calls are those from
    level `calls` of the hyperschedule down to 0, on all positions together: of flat in `sampler.steps` steps, or of
    all blocks at once, each after the true text. So the last call draws every token from p(x | z), and ACS before it
    draws a token again with probability eta (1 - pt), pt = 1 / level for the linear noise schedule.

    Rows: after each call, what became of the tokens since the replacement; z is that of restored minus damaged per
    window. A replaced token that came out the same is not wrong.

    Args:
      step: the sampler's (`diffusion.reverse.build`).
      share: probability that a token is replaced.
      calls: of the sampler, at most the levels of the hyperschedule.
      parts, params, tokens_WxL, seed, batch: as in `context`.

    Raises:
      UserError: a share outside (0, 1), too many calls, another hyperschedule than flat and block.
    """
    parts = perplexity.in_steps(parts)
    fields.number("--share", share, "a number in (0, 1)", lambda value: 0 < value < 1)
    kinds = "'flat' or 'block' (all positions at one level)"
    require(parts.hs.kind in ("flat", "block"), "hyperschedule.kind", parts.hs.kind, kinds)
    fields.whole("--calls", calls, 1, parts.hs.tau_max, "the levels of the hyperschedule")
    one = functools.partial(_repaired, parts, step, share, calls, params)
    found = _over_windows(one, tokens_WxL, 1, seed, batch)
    rows = []
    for i in range(calls):
        after = {name: x_DxWxC[..., i] for name, x_DxWxC in found.items()}
        rows.append({"call": i + 1, "level after": calls - i - 1, **_changes(after)})
    summary = {name: rows[-1][name] for name in ("wrong", "wrong -> right", "right -> wrong", "z")}
    settings = _settings("repair", parts, tokens_WxL, seed, sampler=step.name, share=share, calls=calls)
    return Report(rows, summary, settings)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _repaired(
    parts: Parts, step: ReverseStep, share: float, calls: int, params: dict, x0_BxL: Array, rng: Array
) -> dict[str, Array]:
    """Counts [B, C] of each text after each call."""
    place_rng, token_rng, rng = jax.random.split(rng, 3)
    random_BxL = jax.random.randint(token_rng, x0_BxL.shape, 0, parts.process.num_tokens, x0_BxL.dtype)
    start_BxL = jnp.where(jax.random.bernoulli(place_rng, share, x0_BxL.shape), random_BxL, x0_BxL)
    everywhere = jnp.ones(x0_BxL.shape, bool)

    def call(z_BxL, number):
        phase = passes.numbered(parts, number, x0_BxL.shape)
        scores_BxLxN = _scores(parts, params, x0_BxL, Noised(z_BxL, phase))
        z_BxL = step.step(jax.random.fold_in(rng, number), z_BxL, scores_BxLxN, phase.alpha_t, phase.alpha_s)
        return z_BxL, changes(x0_BxL, start_BxL, z_BxL, everywhere)

    count = passes.num_passes(parts)
    _, counts = jax.lax.scan(call, start_BxL, jnp.arange(count - calls, count))
    return jax.tree.map(jnp.transpose, counts)


def changes(x0_BxL: Array, before_BxL: Array, after_BxL: Array, here_BxL: Array) -> dict[str, Array]:
    """How many tokens of each text became right, became wrong, or another wrong one, int [B] each; `here` counts.

    >>> x0, before, after = jnp.array([[1, 1, 1, 1, 1]]), jnp.array([[1, 1, 2, 2, 2]]), jnp.array([[1, 3, 1, 3, 2]])
    >>> {name: int(x[0]) for name, x in changes(x0, before, after, jnp.ones((1, 5), bool)).items()}
    {'tokens': 5, 'wrong': 3, 'wrong -> right': 1, 'right -> wrong': 1, 'wrong -> other wrong': 1}
    """
    wrong, wrong_after = before_BxL != x0_BxL, after_BxL != x0_BxL
    restored, damaged = wrong & ~wrong_after, ~wrong & wrong_after
    other = wrong & wrong_after & (before_BxL != after_BxL)
    found = zip(CHANGES, (here_BxL, wrong, restored, damaged, other), strict=True)
    return {name: (x & here_BxL).sum(1) for name, x in found}


def _changes(counts: dict[str, np.ndarray]) -> dict:
    """Totals of counts [D, W], and the z of restored minus damaged."""
    net_W = (counts["wrong -> right"] - counts["right -> wrong"]).sum(0)
    mean, error = mean_and_error(net_W, np.ones(len(net_W)))
    return {name: int(counts[name].sum()) for name in CHANGES} | {"z": _z(mean, error)}


def knee(calls: Sequence[float], nats: Sequence[float]) -> int | None:
    """Which point of a falling curve is its knee: the farthest below the line from its first point to its last.

    Calls count on a log scale, ascending; both axes are scaled to [0, 1]. None where no point lies below the line:
    calls pay to the end.

    Raises:
      UserError: fewer than three points, calls that do not ascend.

    >>> knee([8, 16, 32, 64], [4.0, 3.2, 3.0, 2.9]), knee([8, 16, 32], [4.0, 3.9, 3.0])
    (1, None)
    """
    x, y = np.log(np.asarray(calls, float)), np.asarray(nats, float)
    allowed = "at least three numbers of calls, ascending"
    require(len(x) == len(y) > 2 and bool((np.diff(x) > 0).all()), "calls", list(calls), allowed)
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    below = (line - y) / max(np.ptp(y), 1e-12)
    return int(np.argmax(below)) if below.max() > 1e-9 else None


def _at(x_BxL: Array, place_B: Array) -> Array:
    return jnp.take_along_axis(x_BxL, place_B[:, None], 1)[:, 0]


def mean_and_error(sums_W: np.ndarray, counts_W: np.ndarray) -> tuple[float, float]:
    """The mean of all that is counted, and its standard error from the spread between windows.

    >>> mean_and_error(np.array([2.0, 4.0]), np.array([2, 2]))
    (1.5, 0.5)
    """
    W, count = len(sums_W), counts_W.sum()
    mean = sums_W.sum() / count
    spread = ((sums_W - mean * counts_W) ** 2).sum() * W / (W - 1)
    return float(mean), float(math.sqrt(spread) / count)


def _z(mean: float, error: float) -> float:
    return mean / error if error > 0 else 0.0  # without any spread nothing moved


def _over_windows(one: Callable, tokens_WxL: np.ndarray, draws: int, seed: int, batch: int):
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


def _scores(parts: Parts, params: dict, x0_BxL: Array, noised: Noised) -> Array:
    """The network's scores of ordinary tokens [B, L, N]."""
    of_tokens = lambda scores_RxV, *_: {"scores": scores_RxV[..., : parts.model.num_tokens]}
    return passes.terms(parts, params, x0_BxL, noised, of_tokens)["scores"]


def _posterior(parts: Parts, scores_BxLxN: Array, noised: Noised) -> Array:
    """p(x | z) [B, L, V] as the model's last step draws from it: the reverse kernel to a clean token."""
    reading = parts.loss.reading
    outputs = scores_BxLxN if reading in scores.READINGS else jax.nn.softmax(scores_BxLxN, -1)
    kernel = jnp.vectorize(reverse.ancestral(parts.process, reading).kernel, signature="(),(n),(),()->(v)")
    return kernel(noised.zt, outputs, noised.phase.alpha_t, jnp.ones(noised.zt.shape))


def _settings(name: str, parts: Parts, tokens_WxL: np.ndarray, seed: int, **more) -> dict:
    windows, length = tokens_WxL.shape
    chain = {"noising": parts.process.name, "hyperschedule": perplexity.name_of(parts), "reading": parts.loss.reading}
    return {"diagnostic": name, **chain, "windows": windows, "length": length, "seed": seed, **more}
