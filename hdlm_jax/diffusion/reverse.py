"""One reverse step per position: from the noised token at alpha_t to the one at alpha_s >= alpha_t.

Each sampler is a factory that returns a `ReverseStep`: the exact table of one position, and the fast draw for
whole windows, where every position has its own alphas and those with alpha_s = alpha_t stay as they are. With
p = p(x | z) read from the network, p~ = (1 - epsilon) p + epsilon/N and pt = (alpha_s - alpha_t)/(1 - alpha_t):

  ancestral       the model's own reverse chain; absorb and epsilon: a mask becomes a token of p~ with
                  probability pt, an unmasked token stays
  analytic        ancestral by its name for scores (SEDD's Tweedie step): absorb, uniform and gamma_hybrid
  euler           the reverse rates of learned scores for the time between, to first order; last step analytic
  acs             masks as above; an unmasked token is drawn again from p~ with probability eta (1 - pt). For
                  every eta this keeps the epsilon-hybrid marginals exactly (Fathi et al. 2025 propose it
                  with p in place of p~, which drifts by O(epsilon))
  acs_published   the published form: the raw network output in place of p~, and no exact last step

The step to alpha_s = 1 is a position's last and exact: x ~ p, masked or not, without the smoothing; what is
still wrong is repaired there. Temperature and other filters belong on the logits before the step.

A network that learned concrete scores has a reading of diffusion/scores.py, which turns its logits to log-scores;
filters of probabilities do not apply to them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import scores
from hdlm_jax.diffusion.categorical import Uniforms, categorical, categorical_of, uniforms
from hdlm_jax.diffusion.fields import number
from hdlm_jax.diffusion.noising import NoisingProcess, to_posterior, unmasked_share
from hdlm_jax.errors import UserError, choose


class Proposal(NamedTuple):
    """What a draw from the network's prediction takes from chance, every leaf of the tokens' shape.

    Attributes:
      uniforms: of the draw.
      other: int32, the token that smoothing puts in its place, -1 where none; None without smoothing.
    """

    uniforms: Uniforms
    other: Array | None


class Chance(NamedTuple):
    """What a step takes from chance before the network is asked.

    Attributes:
      draws: bool, the positions that draw a token; the others keep theirs.
      proposal: of every position; None where it is drawn later.
    """

    draws: Array
    proposal: Proposal | None = None


class ReverseStep(NamedTuple):
    """A sampler's reverse step.

    Attributes:
      name: as in `sampler.kind`.
      kernel: (zt, x0_probs_N, alpha_t, alpha_s) -> [V], the law of the next token of one position; for learned
        scores (zt, logits_N, alpha_t, alpha_s), alpha_t > 0.
      step: (rng, zt_BxW, logits_BxWxN, alpha_t_BxW, alpha_s_BxW) -> zs_BxW, one draw of every position; any
        leading shape will do, and logits may have V columns (the mask's is left out).
      chance: (rng, zt, alpha_t, alpha_s) -> `Chance`, where chance alone says which positions draw a token: the
        others need no scores. None where the scores have a say.
      draw: (chance, zt, logits, alpha_t, alpha_s) -> zs, at all of the positions or some; `step` is both together.
    """

    name: str
    kernel: Callable[[Array, Array, Array, Array], Array]
    step: Callable[[Array, Array, Array, Array, Array], Array]
    chance: Callable[[Array, Array, Array, Array], Chance] | None = None
    draw: Callable[[Chance, Array, Array, Array, Array], Array] | None = None


class Resampling(NamedTuple):
    """The steps that leave a token or draw it again from the network's prediction.

    Attributes:
      process: absorb, epsilon_hybrid, or another whose unmasked tokens are frozen.
      eta: strength of the correction of unmasked tokens.
      reading: how the network is read; None takes its raw output for p(x | z).
      smoothing: share of uniform tokens mixed into the prediction.
      exact_last: whether the last step draws every token from p(x | z).
    """

    process: NoisingProcess
    eta: float
    reading: str | None
    smoothing: float
    exact_last: bool


def ancestral(process: NoisingProcess, reading: str | None = None) -> ReverseStep:
    """The model's own reverse chain, for every process. `reading` None is the process's own.

    For learned scores this is the analytic step.

    Raises:
      UserError: a reading that the process does not know.

    >>> from hdlm_jax.diffusion.noising import absorb
    >>> step = ancestral(absorb(num_tokens=2)).step
    >>> zt_W, logits_WxN = jnp.array([2, 0]), jnp.array([[0.0, 99.0], [0.0, 99.0]])
    >>> step(jax.random.key(0), zt_W, logits_WxN, jnp.zeros(2), jnp.ones(2)).tolist()
    [1, 0]
    """
    if reading in scores.READINGS:
        return _of_scores("ancestral", process, reading, scores.tweedie)
    reading = reading_of(process, reading)
    kernel = partial(process.reverse, reading=reading)
    if not process.frozen:
        return ReverseStep("ancestral", kernel, partial(_table_step, kernel, process.num_tokens))
    return _resampling("ancestral", Resampling(process, 0.0, reading, process.epsilon, exact_last=True), kernel)


def analytic(process: NoisingProcess, reading: str | None = None) -> ReverseStep:
    """The exact step from scores, learned or of the x0 probabilities; for these it is `ancestral`.

    Raises:
      UserError: a process without scores, a reading that it does not know.
    """
    scores.clocks(process)
    return ancestral(process, reading)._replace(name="analytic")


def euler(process: NoisingProcess, reading: str | None = None) -> ReverseStep:
    """The Euler step on learned scores; analytic in a position's last step, which ends in a clean token.

    Raises:
      UserError: a network that learned no scores, a process without them.
    """
    if reading not in scores.READINGS:
        raise UserError(
            "sampler.kind: got 'euler' for a network that predicts tokens; allowed: 'ancestral', or 'euler' after"
            " training on scores (loss.kind 'score_entropy')"
        )
    return _of_scores("euler", process, reading, scores.euler)


def acs(process: NoisingProcess, eta: float, reading: str | None = None) -> ReverseStep:
    """Adaptive correction: unmasked tokens are drawn again with probability eta (1 - pt).

    Raises:
      UserError: not an epsilon-hybrid process, eta outside [0, 1], an unknown reading.
    """
    _require_epsilon_hybrid("acs", process)
    eta, reading = checked_eta(eta), reading_of(process, reading)
    return _resampling("acs", Resampling(process, eta, reading, process.epsilon, exact_last=True))


def acs_published(process: NoisingProcess, eta: float, reading: str | None = None) -> ReverseStep:
    """The correction as published: the network's raw output at masks and tokens, no exact last step.

    For comparison with the paper's tables. `reading` is checked and has no effect.

    Raises:
      UserError: not an epsilon-hybrid process, eta outside [0, 1], an unknown reading.
    """
    _require_epsilon_hybrid("acs_published", process)
    reading_of(process, reading)
    return _resampling("acs_published", Resampling(process, checked_eta(eta), None, 0.0, exact_last=False))


# the samplers that move every position on its own; all there are: diffusion/samplers.py
SAMPLERS: Mapping[str, Callable[..., ReverseStep]] = {
    "ancestral": ancestral,
    "analytic": analytic,
    "euler": euler,
    "acs": acs,
    "acs_published": acs_published,
}


def _resampling(name: str, rule: Resampling, kernel: Callable[..., Array] | None = None) -> ReverseStep:
    chance, draw = partial(_chance, rule), partial(_draw, rule)

    def step(rng, zt, logits, alpha_t, alpha_s):
        return draw(chance(rng, zt, alpha_t, alpha_s), zt, logits, alpha_t, alpha_s)

    return ReverseStep(name, kernel or partial(_resampling_kernel, rule), step, chance, draw)


def _resampling_kernel(rule: Resampling, zt: Array, x0_probs_N: Array, alpha_t: Array, alpha_s: Array) -> Array:
    process = rule.process
    change, last = _change(rule, jnp.asarray(zt), jnp.asarray(alpha_t), jnp.asarray(alpha_s))
    if rule.reading is not None:
        x0_probs_N = to_posterior(process, zt, x0_probs_N, alpha_t, rule.reading)
    smoothing = jnp.where(last, 0.0, rule.smoothing).astype(x0_probs_N.dtype)
    smooth_N = (1 - smoothing) * x0_probs_N + smoothing / process.num_tokens
    stay_V = (jnp.arange(process.num_states) == zt).astype(x0_probs_N.dtype)
    return (1 - change) * stay_V + change * jnp.append(smooth_N, 0)


def _chance(rule: Resampling, rng: Array, zt: Array, alpha_t: Array, alpha_s: Array) -> Chance:
    alpha_t, alpha_s = jnp.broadcast_to(alpha_t, zt.shape), jnp.broadcast_to(alpha_s, zt.shape)
    change, last = _change(rule, zt, alpha_t, alpha_s)
    u, proposal = decide(rule, rng, zt, last)
    return Chance(u < change, proposal)


def _draw(rule: Resampling, chance: Chance, zt: Array, logits: Array, alpha_t: Array, alpha_s: Array) -> Array:
    return jnp.where(chance.draws, proposed(rule, chance.proposal, zt, logits), zt)


def decide(rule: Resampling, rng: Array, zt: Array, last: Array) -> tuple[Array, Proposal]:
    """Uniforms of zt's shape to decide by, and proposals; nothing is smoothed where `last`."""
    x0_rng, token_rng, decision_rng = jax.random.split(rng, 3)
    decision_u, smooth_u = jax.random.uniform(decision_rng, (2, *zt.shape))
    other = None
    if rule.smoothing > 0:
        random = jax.random.randint(token_rng, zt.shape, 0, rule.process.num_tokens, zt.dtype)
        other = jnp.where((smooth_u < rule.smoothing) & ~last, random, -1)
    return decision_u, Proposal(uniforms(x0_rng, zt.shape), other)


def proposed(rule: Resampling, proposal: Proposal, zt: Array, logits: Array) -> Array:
    """The tokens of proposals from the smoothed p(x | zt), of zt's shape."""
    logits = posterior_logits(rule.process, rule.reading, zt, logits[..., : rule.process.num_tokens])
    x0 = categorical_of(proposal.uniforms, logits).astype(zt.dtype)
    return x0 if proposal.other is None else jnp.where(proposal.other < 0, x0, proposal.other)


def transfer(process: NoisingProcess, alpha_t: Array, alpha_s: Array) -> Array:
    """pt, the probability that a mask at alpha_t is a token at alpha_s; 1 where nothing is masked any more.

    >>> from hdlm_jax.diffusion.noising import absorb
    >>> transfer(absorb(num_tokens=2), jnp.array([0.0, 0.5, 0.5]), jnp.array([0.25, 0.75, 1.0])).tolist()
    [0.25, 0.5, 1.0]
    """
    before, after = (unmasked_share(alpha, process.alpha_max) for alpha in (alpha_t, alpha_s))
    masked = 1 - before
    return jnp.where(masked > 0, (after - before) / jnp.where(masked > 0, masked, 1), 1)


def _change(rule: Resampling, zt: Array, alpha_t: Array, alpha_s: Array) -> tuple[Array, Array]:
    """Probability that a position draws its token again, and whether this is its exact last step."""
    pt = transfer(rule.process, alpha_t, alpha_s)
    last = (alpha_s >= 1) & rule.exact_last
    token = jnp.where(last, 1, rule.eta * (1 - pt)).astype(pt.dtype)
    if math.isinf(_odds(rule.process, rule.reading)):  # an unmasked token is clean: drawing again would give it back
        token = jnp.zeros_like(token)
    change = jnp.where(zt == rule.process.mask, pt, token)
    return jnp.where(alpha_s > alpha_t, change, 0), last


def posterior_logits(process: NoisingProcess, reading: str | None, zt: Array, logits: Array) -> Array:
    """Logits of p(x | zt) [..., N]: the network's, raised by the log odds at x = zt; at masks as they are.

    The tokens of a process without shuffled ones are certain, and their logits are left as they are too.
    """
    odds = _odds(process, reading)
    if odds == 0 or math.isinf(odds):
        return logits
    ids = jax.lax.broadcasted_iota(zt.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(ids == zt[..., None], logits + odds, logits)


def _odds(process: NoisingProcess, reading: str | None) -> float:
    return 0.0 if reading is None else process.log_odds(reading)


def _of_scores(name: str, process: NoisingProcess, reading: str, rule: Callable[..., Array]) -> ReverseStep:
    kernel = partial(_score_table, scores.clocks(process), reading, rule)

    def step(rng, zt, logits, alpha_t, alpha_s):
        alpha_t, alpha_s = jnp.broadcast_to(alpha_t, zt.shape), jnp.broadcast_to(alpha_s, zt.shape)
        return categorical(rng, jnp.log(kernel(zt, logits, alpha_t, alpha_s))).astype(zt.dtype)

    return ReverseStep(name, kernel, step)


def _score_table(
    of: scores.Clocks,
    reading: str,
    rule: Callable[..., Array],
    zt: Array,
    logits: Array,
    alpha_t: Array,
    alpha_s: Array,
) -> Array:
    """The law of the next token [..., V] from a network's outputs [..., >= N]."""
    zt, alpha_t, alpha_s = jnp.asarray(zt), jnp.asarray(alpha_t), jnp.asarray(alpha_s)
    outputs = jnp.concatenate([logits[..., : of.num_tokens], jnp.zeros_like(logits[..., :1])], -1)
    score = jnp.exp(scores.log_scores(of, outputs, zt, scores.noise_level(alpha_t), reading))
    d, last = scores.elapsed(alpha_s, alpha_t), alpha_s >= 1
    table = scores.tweedie(of, zt, score, d, last)
    return table if rule is scores.tweedie else jnp.where(last[..., None], table, rule(of, zt, score, d))


def _table_step(
    kernel: Callable[..., Array],
    num_tokens: int,
    rng: Array,
    zt: Array,
    logits: Array,
    alpha_t: Array,
    alpha_s: Array,
) -> Array:
    """Draws from the kernel's tables, for processes in which every token may change."""
    alpha_t, alpha_s = jnp.broadcast_to(alpha_t, zt.shape), jnp.broadcast_to(alpha_s, zt.shape)
    x0_probs = jax.nn.softmax(logits[..., :num_tokens], axis=-1)
    tables = jnp.vectorize(kernel, signature="(),(n),(),()->(v)")(zt, x0_probs, alpha_t, alpha_s)
    return categorical(rng, jnp.log(tables)).astype(zt.dtype)


def reading_of(process: NoisingProcess, reading: str | None) -> str:
    """The reading, the process's own for None; `UserError` for one that it does not know."""
    reading = process.reading if reading is None else reading
    return choose("noising.reading", reading, {name: name for name in process.readings})


def checked_eta(eta: Any) -> float:
    """The strength of corrections, in [0, 1]."""
    return number("sampler.eta", eta, "a number in [0, 1]", lambda value: 0 <= value <= 1)


def _require_epsilon_hybrid(kind: str, process: NoisingProcess) -> None:
    if process.name != "epsilon_hybrid":
        raise UserError(
            f"sampler.kind: got {kind!r} with noising.kind {process.name!r}; allowed: 'ancestral' (only an"
            " epsilon_hybrid network learns to correct the tokens that it sees)"
        )
