"""What samplers do to wrong tokens of held-out windows.

  one_call  one call on noised text: wrong -> right, right -> wrong, wrong -> another wrong
  repair    the last calls on text of which a share of the tokens was replaced at random

Letters: W windows, B of them at a time, D draws of the noise, C calls, L positions, N ordinary tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion import fields, reverse, scores
from hdlm_jax.diffusion.categorical import with_temperature
from hdlm_jax.diffusion.rules import Move, Rule
from hdlm_jax.errors import require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.report import Report, mean_and_error, over_windows, scores_of, settings_of, z_of
from hdlm_jax.models import passes
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.passes import Noised

CHANGES = ("tokens", "wrong", "wrong -> right", "right -> wrong", "wrong -> other wrong")


def one_call(
    parts: Parts,
    params: dict,
    tokens_WxL: np.ndarray,
    rule: Rule,
    temperature: float = 1.0,
    draws: int = 4,
    seed: int = 0,
    batch: int = 32,
) -> Report:
    """One call of a sampler on noised windows, at the steps that the bound draws: what becomes of their tokens.

    Rows count the unmasked tokens of changing positions, apart for the exact last call of a position and for the
    earlier ones; flat is taken in `sampler.steps` steps. A token that is masked again is wrong. z is that of restored
    minus damaged per window.

    Args:
      rule: the sampler's (`diffusion.samplers.build`).
      temperature: that divides the network's scores first.
      parts, params, tokens_WxL, draws, seed, batch: as in `diagnostics.context`.

    Raises:
      UserError: a sampler that weighs positions against each other, where several windows lie side by side; a
        temperature for a network that learned scores, which are no probabilities.
    """
    parts = _in_steps(parts, rule, temperature)
    one = functools.partial(_called, parts, rule, temperature, params)
    counts = over_windows(one, tokens_WxL, draws, seed, batch)
    rows = [{"call": name, **_changes(counts[name])} for name in ("earlier", "last")]
    dials = {"sampler": rule.name, "temperature": temperature, "draws": draws}
    return Report(rows, {}, settings_of("corrections", parts, tokens_WxL, seed, **dials))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _called(
    parts: Parts, rule: Rule, temperature: float, params: dict, x0_BxL: Array, rng: Array
) -> dict[str, dict[str, Array]]:
    """Counts [B] of each text, by call and by change."""
    noise_rng, step_rng = jax.random.split(rng)
    zt_BxL, phase = noised = passes.noise(parts, noise_rng, x0_BxL, training=False)
    zs_BxL, _ = _moved(parts, rule, temperature, step_rng, params, x0_BxL, noised, _memory(rule, x0_BxL))
    token_BxL = (phase.steps > 0) & (zt_BxL < parts.process.num_tokens)
    last_BxL = phase.alpha_s >= 1
    places = {"earlier": token_BxL & ~last_BxL, "last": token_BxL & last_BxL}
    return {name: changes(x0_BxL, zt_BxL, zs_BxL, here) for name, here in places.items()}


def repair(
    parts: Parts,
    params: dict,
    tokens_WxL: np.ndarray,
    rule: Rule,
    temperature: float = 1.0,
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
      rule, temperature: as in `one_call`.
      share: probability that a token is replaced.
      calls: of the sampler, at most the levels of the hyperschedule.
      parts, params, tokens_WxL, seed, batch: as in `diagnostics.context`.

    Raises:
      UserError: a share outside (0, 1), too many calls, another hyperschedule than flat and block, a sampler that
        `one_call` refuses.
    """
    parts = _in_steps(parts, rule, temperature)
    fields.number("--share", share, "a number in (0, 1)", lambda value: 0 < value < 1)
    kinds = "'flat' or 'block' (all positions at one level)"
    require(parts.hs.kind in ("flat", "block"), "hyperschedule.kind", parts.hs.kind, kinds)
    fields.whole("--calls", calls, 1, parts.hs.tau_max, "the levels of the hyperschedule")
    one = functools.partial(_repaired, parts, rule, temperature, share, calls, params)
    found = over_windows(one, tokens_WxL, 1, seed, batch)
    rows = []
    for i in range(calls):
        after = {name: x_DxWxC[..., i] for name, x_DxWxC in found.items()}
        rows.append({"call": i + 1, "level after": calls - i - 1, **_changes(after)})
    summary = {name: rows[-1][name] for name in ("wrong", "wrong -> right", "right -> wrong", "z")}
    dials = {"sampler": rule.name, "temperature": temperature, "share": share, "calls": calls}
    settings = settings_of("repair", parts, tokens_WxL, seed, **dials)
    return Report(rows, summary, settings)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _repaired(
    parts: Parts,
    rule: Rule,
    temperature: float,
    share: float,
    calls: int,
    params: dict,
    x0_BxL: Array,
    rng: Array,
) -> dict[str, Array]:
    """Counts [B, C] of each text after each call."""
    place_rng, token_rng, rng = jax.random.split(rng, 3)
    random_BxL = jax.random.randint(token_rng, x0_BxL.shape, 0, parts.process.num_tokens, x0_BxL.dtype)
    start_BxL = jnp.where(jax.random.bernoulli(place_rng, share, x0_BxL.shape), random_BxL, x0_BxL)
    everywhere = jnp.ones(x0_BxL.shape, bool)

    def call(carry, number):
        noised = Noised(carry[0], passes.numbered(parts, number, x0_BxL.shape))
        carry = _moved(parts, rule, temperature, jax.random.fold_in(rng, number), params, x0_BxL, noised, carry[1])
        return carry, changes(x0_BxL, start_BxL, carry[0], everywhere)

    count = passes.num_passes(parts)
    _, counts = jax.lax.scan(call, (start_BxL, _memory(rule, x0_BxL)), jnp.arange(count - calls, count))
    return jax.tree.map(jnp.transpose, counts)


def _in_steps(parts: Parts, rule: Rule, temperature: float) -> Parts:
    """The parts in discrete steps, under the noise schedule that the sampler runs under."""
    probabilities = temperature == 1 or parts.loss.reading not in scores.READINGS
    require(probabilities, "--temperature", temperature, "1 for a network that learned scores")
    parts = perplexity.in_steps(parts)
    alone = rule.name in reverse.SAMPLERS or parts.hs.kind == "flat"
    allowed = f"{', '.join(map(repr, reverse.SAMPLERS))} (each position on its own), or a run of hyperschedule 'flat'"
    require(alone, "--sampler", rule.name, allowed)
    return parts if rule.warp is None else parts._replace(schedule=rule.warp(parts.schedule))


def _memory(rule: Rule, x_BxL: Array) -> Array | None:
    return None if rule.memory is None else jnp.full(x_BxL.shape, rule.memory)


def _moved(
    parts: Parts, rule: Rule, temperature: float, rng: Array, params: dict, x0_BxL: Array, noised: Noised, memory
) -> tuple[Array, Array | None]:
    """Tokens and memory [B, L] after one call of a sampler on every text."""
    zt_BxL, phase = noised
    scores_BxLxN = scores_of(parts, params, x0_BxL, noised)
    logits_BxLxN = with_temperature(scores_BxLxN, temperature)
    move = Move(phase.alpha_t, phase.alpha_s, phase.alpha_s > phase.alpha_t)
    rng_B = jax.random.split(rng, len(zt_BxL))
    return jax.vmap(rule.step)(rng_B, zt_BxL, logits_BxLxN, move, memory, scores_BxLxN)


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
    return {name: int(counts[name].sum()) for name in CHANGES} | {"z": z_of(mean, error)}
