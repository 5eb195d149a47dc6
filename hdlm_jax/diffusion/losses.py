"""Training losses and bounds, per position, from the network's scores and the phase of the pass.

Letters: R rows (positions of all texts in a row), V scores over N ordinary tokens, the mask and perhaps
padding (both -inf).
Each loss returns its terms, already weighted, in nats; their sum over positions is the loss of the
pass, and its expectation over phases is the bound where the loss is one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import xlogy
from jax.typing import ArrayLike

from hdlm_jax.diffusion import bounds, score_losses, scores
from hdlm_jax.diffusion.noising import PROCESSES, NoisingProcess
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import UserError, choose, one_of, require


class Loss(NamedTuple):
    """A loss.

    Attributes:
      name: as in the experiment's `loss.kind`.
      reading: how a network trained on it is to be read at unmasked tokens (diffusion/noising.py).
      is_bound: whether the expectation of the sum of its terms is an upper bound of -log p(x).
      terms: (logits_RxV, x0_R, zt_R, phase of [R] fields) -> {name: [R] nats}.
    """

    name: str
    reading: str
    is_bound: bool
    terms: Callable[[Array, Array, Array, Phase], dict[str, Array]]


def cross_entropy(logits_RxV: Array, x0_R: Array) -> Array:
    """-log softmax(logits)[x0], nats [R].

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4).tolist()
    [1.3863]
    """
    return jax.nn.logsumexp(logits_RxV, axis=-1) - _at(logits_RxV, x0_R)


def smoothed_kl(logits_RxV: Array, x0_R: Array, num_tokens: int, epsilon: float) -> Array:
    """KL(x~ || p~) with v~ = (1 - epsilon) v + epsilon / N on ordinary tokens, nats [R], O(N).

    (c + h) log(c + h) + (N - 1) h log h - c log p~_x - h sum_y log p~_y, c = 1 - epsilon, h = epsilon / N.
    """
    if epsilon == 0:
        return cross_entropy(logits_RxV, x0_R)
    N = num_tokens
    c, h = 1 - epsilon, epsilon / N
    log_p = jax.nn.log_softmax(logits_RxV, axis=-1)[..., :N]
    log_smooth = jnp.log(c * jnp.exp(log_p) + h)
    constant = xlogy(c + h, c + h) + (N - 1) * xlogy(h, h)
    return constant - c * _at(log_smooth, x0_R) - h * log_smooth.sum(-1)


def posterior_cross_entropy(logits_RxV: Array, x0_R: Array, zt_R: Array, num_tokens: int, log_odds: float) -> Array:
    """-log p(x0 | z) nats [R], when p(x | z) is softmax(logits) times e^log_odds at x = z.

    At a mask (zt = N) and for log_odds = 0 this is `cross_entropy`.
    """
    if log_odds == 0:
        return cross_entropy(logits_RxV, x0_R)
    N = num_tokens
    normaliser = jax.nn.logsumexp(logits_RxV, axis=-1)
    log_p_z = _at(logits_RxV, jnp.minimum(zt_R, N - 1)) - normaliser
    boosted = jnp.log1p(jnp.expm1(log_odds) * jnp.exp(log_p_z))
    shift = jnp.where(zt_R == x0_R, log_odds, 0.0) - jnp.where(zt_R < N, boosted, 0.0)
    return normaliser - _at(logits_RxV, x0_R) - shift


def hybrid_cross_entropy(process: NoisingProcess, token_weight: float = 1.0, inverse_survival: bool = True) -> Loss:
    """The published epsilon-hybrid loss: cross-entropy at every position.

    Weights: the mask weight of the phase (1/p for the linear schedule) at masks; with s = 1/(1 - p), or
    1 where `inverse_survival` is off, lambda (1 - eps) s at shuffled and lambda eps s at clean tokens. A
    token counts as shuffled when it was drawn anew, which gives it back with probability 1/N: a token that
    equals x0 takes the mean of both weights, eps (1 - eps) (1 + 1/N) / (1 - eps + eps/N) lambda s.
    """
    epsilon, N = process.epsilon, process.num_tokens
    unchanged = epsilon * (1 - epsilon) * (1 + 1 / N) / (1 - epsilon + epsilon / N)

    def terms(logits_RxV, x0_R, zt_R, phase):
        nats_R = cross_entropy(logits_RxV, x0_R)
        masked, clean = zt_R == process.mask, zt_R == x0_R
        survival = jnp.where(masked, 1.0, phase.alpha_t) if inverse_survival else 1.0
        active = phase.mask_weight > 0
        token = jnp.where(active & ~masked, token_weight / survival, 0.0) * nats_R
        return {
            "mask": jnp.where(masked, phase.mask_weight, 0.0) * nats_R,
            "shuffled": jnp.where(clean, 0.0, (1 - epsilon) * token),
            "clean": jnp.where(clean, unchanged * token, 0.0),
        }

    return Loss("hybrid_cross_entropy", "hybrid" if epsilon else "posterior", False, terms)


def epsilon_nelbo(process: NoisingProcess, reading: str = "cavity") -> Loss:
    """The exact negative ELBO of the epsilon-hybrid chain (Fathi et al. 2025; absorb for epsilon = 0).

    Terms: `diffusion`, the smoothed KL at masks; `reconstruction`, -log p(x0 | z) at masks and tokens
    where the step is the position's last.
    """
    certain = process.epsilon == 0  # an absorb token is clean for sure: nothing to predict
    log_odds = 0.0 if certain else process.log_odds(reading)

    def terms(logits_RxV, x0_R, zt_R, phase):
        masked, last = zt_R == process.mask, phase.last_weight > 0
        kl_R = smoothed_kl(logits_RxV, x0_R, process.num_tokens, process.epsilon)
        nats_R = posterior_cross_entropy(logits_RxV, x0_R, zt_R, process.num_tokens, log_odds)
        return {
            "diffusion": jnp.where(masked & ~last, phase.mask_weight, 0.0) * kl_R,
            "reconstruction": jnp.where(masked | (not certain), phase.last_weight, 0.0) * nats_R,
        }

    return Loss("epsilon_nelbo", reading, True, terms)


def acs_nelbo(process: NoisingProcess, eta: float, reading: str = "cavity") -> Loss:
    """The negative ELBO of the chain that the Adaptive Correction Sampler runs, for discrete steps.

    At each step an unmasked token z is drawn again with probability h = eta (1 - pt), pt = (alpha_s -
    alpha_t) / (1 - alpha_t), so tokens are trained at every level; eta = 0 is `epsilon_nelbo`. With v~ =
    (1 - epsilon) v + epsilon / N the terms are `diffusion`, pt KL(x~ || p~) at masks; `correction`,
    KL((1 - h) 1_z + h x~ || (1 - h) 1_z + h p~) at tokens; and `reconstruction` as there.
    """
    N, e = process.num_tokens, process.epsilon
    own, other, log_odds = 1 - e + e / N, e / N, process.log_odds(reading)

    def terms(logits_RxV, x0_R, zt_R, phase):
        masked, last = zt_R == process.mask, phase.last_weight > 0
        transfer = jnp.where(masked | last, 1.0, (phase.alpha_s - phase.alpha_t) / jnp.maximum(1 - phase.alpha_t, 1e-7))
        ids = jax.lax.broadcasted_iota(zt_R.dtype, logits_RxV.shape, logits_RxV.ndim - 1)
        log_p = jax.nn.log_softmax(jnp.where(ids == zt_R[..., None], logits_RxV + log_odds, logits_RxV), axis=-1)
        log_smooth = jnp.log((1 - e) * jnp.exp(log_p[..., :N]) + other)
        at_x0, at_z = _at(log_smooth, x0_R), _at(log_smooth, jnp.minimum(zt_R, N - 1))
        total = log_smooth.sum(-1)
        whole = own * math.log(own) + (N - 1) * other * math.log(other) - (1 - e) * at_x0 - other * total
        clean = zt_R == x0_R
        rest_x = jnp.where(clean, 0.0, own * math.log(own)) + (N - 2 + clean) * other * math.log(other)
        rest = rest_x - jnp.where(clean, 0.0, (1 - e) * at_x0) - other * (total - at_z)
        h = eta * (1 - transfer)
        before, after = 1 - h + h * jnp.where(clean, own, other), 1 - h + h * jnp.exp(at_z)
        correction = h * rest + before * (jnp.log(before) - jnp.log(after))
        return {
            "diffusion": jnp.where(masked & ~last, phase.mask_weight, 0.0) * whole,
            "correction": jnp.where(masked | last, 0.0, phase.steps) * correction,
            "reconstruction": phase.last_weight * -_at(log_p, x0_R),
        }

    return Loss("acs_nelbo", reading, True, terms)


def absorb_nelbo(process: NoisingProcess) -> Loss:
    """The exact negative ELBO of masked diffusion (MDLM, MD4): weighted cross-entropy at masks.

    Terms: `diffusion`, and `reconstruction` where the step is the position's last.
    """

    def terms(logits_RxV, x0_R, zt_R, phase):
        masked, last = zt_R == process.mask, phase.last_weight > 0
        nats_R = cross_entropy(logits_RxV, x0_R)
        return {
            "diffusion": jnp.where(masked & ~last, phase.mask_weight, 0.0) * nats_R,
            "reconstruction": jnp.where(masked, phase.last_weight, 0.0) * nats_R,
        }

    return Loss("absorb_nelbo", "posterior", True, terms)


LOSSES = {
    "hybrid_cross_entropy": ("absorb", "epsilon_hybrid"),
    "epsilon_nelbo": ("absorb", "epsilon_hybrid"),
    "acs_nelbo": ("epsilon_hybrid",),
    "absorb_nelbo": ("absorb",),
    "nelbo": tuple(PROCESSES),
    "score_entropy": ("absorb", "uniform", "gamma_hybrid"),
    "published_score_entropy": ("gamma_hybrid",),
}


def build(
    kind: str,
    process: NoisingProcess,
    token_weight: float = 1.0,
    inverse_survival: bool = True,
    eta: float = 0.0,
    reading: str = "cavity",
    continuous: bool = False,
    settled_weight: float = 0.0,
    completes: bool = True,
) -> Loss:
    """The loss named `kind` for a process; refuses pairs that do not belong together.

    Args:
      kind: a name in `LOSSES`.
      process: the noising process.
      token_weight, inverse_survival: of hybrid_cross_entropy.
      eta: of acs_nelbo, the sampler's.
      reading: of nelbo, how the network is to be read at unmasked tokens.
      continuous: whether the phases are of continuous times.
      settled_weight: of the cross-entropy of settled tokens, which is added (`with_settled`).
      completes: of score_entropy, whether texts may be shown at 0+ among continuous times.
    """
    if settled_weight:
        require(0 <= settled_weight < math.inf, "loss.settled_weight", settled_weight, "a number >= 0")
        loss = build(kind, process, token_weight, inverse_survival, eta, reading, continuous, 0.0, completes)
        return with_settled(loss, settled_weight, mean_by_text=kind == "published_score_entropy")
    processes = choose("loss.kind", kind, LOSSES)
    require(0 <= token_weight < math.inf, "loss.token_weight", token_weight, "a number >= 0")
    if process.name not in processes:
        fitting = [name for name, allowed in LOSSES.items() if process.name in allowed]
        raise UserError(
            f"loss.kind: got {kind!r} with noising.kind {process.name!r}; allowed for this process:"
            f" {', '.join(map(repr, fitting))}"
        )
    if kind == "hybrid_cross_entropy":
        return hybrid_cross_entropy(process, token_weight, inverse_survival)
    if kind == "acs_nelbo":
        return acs_bound(process, eta, "cavity")
    if kind == "nelbo":
        one_of("loss.reading", reading, process.readings)
        return bound(process, reading, continuous)._replace(name="nelbo")
    if kind == "score_entropy":
        return Loss(kind, "score", continuous, score_losses.score_entropy(process, continuous, completes=completes))
    if kind == "published_score_entropy":
        return Loss(kind, "published_score", False, score_losses.published_score_entropy(process, continuous))
    return epsilon_nelbo(process) if kind == "epsilon_nelbo" else absorb_nelbo(process)


def with_settled(loss: Loss, weight: float, mean_by_text: bool = False) -> Loss:
    """A loss and, in the term `settled`, the cross-entropy of the tokens that are settled in the pass.

    Each weighs `weight`; with `mean_by_text`, as published for the gamma-hybrid, all of a text do together. The
    published weights of blocks, which leave the first block out, are not applied.
    """

    def terms(logits_RxV, x0_R, zt_R, phase):
        settled = (phase.alpha_t >= 1) & (phase.steps == 0)
        share = weight / jnp.maximum(phase.start, 1) if mean_by_text else weight
        nats_R = cross_entropy(logits_RxV, x0_R)
        return loss.terms(logits_RxV, x0_R, zt_R, phase) | {"settled": jnp.where(settled, share, 0.0) * nats_R}

    return loss._replace(terms=terms)


def prior_kl(process: NoisingProcess, alpha: float, x0: ArrayLike = 0) -> Array:
    """KL(q_T(. | x0) || prior) of each position, nats, of x0's shape, where pure noise is of survival `alpha`.

    The prior is q_T averaged over a uniform x. 0 for alpha = 0, where a chain has forgotten everything.
    """
    return bounds.prior_divergence(process, alpha, jnp.asarray(x0))


def bound(process: NoisingProcess, reading: str, continuous: bool = False) -> Loss:
    """The loss whose expectation is the process's negative ELBO, for a network read by `reading`.

    Args:
      process: any noising process.
      reading: how the network is read at unmasked tokens, or its scores (diffusion/scores.py).
      continuous: whether the phases are of continuous times.
    """
    if reading in scores.READINGS:
        steps, flow = score_losses.score_nelbo, score_losses.score_entropy
        terms = flow(process, True, reading) if continuous else steps(process, reading)
        return Loss("score_nelbo", reading, True, terms)
    if process.frozen and process.epsilon == 0:  # absorb, or a hybrid of nothing else
        return absorb_nelbo(process)
    if process.name == "epsilon_hybrid":
        return epsilon_nelbo(process, reading)
    return Loss("nelbo", reading, True, bounds.terms(process, reading, continuous))


def acs_bound(process: NoisingProcess, eta: float, reading: str) -> Loss:
    """`acs_nelbo`, its arguments checked.

    Raises:
      UserError: a process without shuffled tokens, eta outside [0, 1].
    """
    require(process.name == "epsilon_hybrid", "noising.kind", process.name, "'epsilon_hybrid' for a correction (eta)")
    require(process.epsilon > 0, "noising.epsilon", process.epsilon, "a positive share for loss.kind 'acs_nelbo'")
    require(0 <= eta <= 1, "sampler.eta", eta, "a number in [0, 1]")
    return acs_nelbo(process, eta, reading)


def _at(scores_RxV: Array, index_R: Array) -> Array:
    # a masked sum fuses with its neighbours, and so does its gradient; a gather's is a scatter
    ids = jax.lax.broadcasted_iota(index_R.dtype, scores_RxV.shape, scores_RxV.ndim - 1)
    here = ids == index_R[..., None]
    return jnp.where(here, scores_RxV, 0.0).sum(-1)
