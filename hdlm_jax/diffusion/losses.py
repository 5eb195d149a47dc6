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

from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import UserError, choose, require, unknown


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
        steps = phase.mask_weight / jnp.maximum(transfer, 1e-7)
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
            "correction": jnp.where(masked | last, 0.0, steps) * correction,
            "reconstruction": phase.last_weight * -_at(log_p, x0_R),
        }

    return Loss("acs_nelbo", reading, True, terms)


def absorb_nelbo(process: NoisingProcess) -> Loss:
    """The exact negative ELBO of masked diffusion (MDLM, MD4): weighted cross-entropy at masks."""

    def terms(logits_RxV, x0_R, zt_R, phase):
        weight = jnp.maximum(phase.mask_weight, phase.last_weight)  # equal in a last step
        return {"mask": jnp.where(zt_R == process.mask, weight, 0.0) * cross_entropy(logits_RxV, x0_R)}

    return Loss("absorb_nelbo", "posterior", True, terms)


LOSSES = {
    "hybrid_cross_entropy": ("absorb", "epsilon_hybrid"),
    "epsilon_nelbo": ("absorb", "epsilon_hybrid"),
    "acs_nelbo": ("epsilon_hybrid",),
    "absorb_nelbo": ("absorb",),
}


def build(
    kind: str, process: NoisingProcess, token_weight: float = 1.0, inverse_survival: bool = True, eta: float = 0.0
) -> Loss:
    """The loss named `kind` for a process; refuses pairs that do not belong together.

    Args:
      kind: a name in `LOSSES`.
      process: the noising process.
      token_weight, inverse_survival: of hybrid_cross_entropy.
      eta: of acs_nelbo, the sampler's.
    """
    processes = choose("loss.kind", kind, LOSSES)
    require(0 <= token_weight < math.inf, "loss.token_weight", token_weight, "a number >= 0")
    if process.name not in processes:
        fitting = [name for name, allowed in LOSSES.items() if process.name in allowed]
        raise UserError(
            f"loss.kind: got {kind!r} with noising.kind {process.name!r}; allowed for this process:"
            f" {', '.join(map(repr, fitting)) or 'none yet'}"
        )
    if kind == "hybrid_cross_entropy":
        return hybrid_cross_entropy(process, token_weight, inverse_survival)
    if kind == "acs_nelbo":
        require(process.epsilon > 0, "noising.epsilon", process.epsilon, "a positive share for loss.kind 'acs_nelbo'")
        require(0 <= eta <= 1, "sampler.eta", eta, "a number in [0, 1]")
        return acs_nelbo(process, eta)
    return epsilon_nelbo(process) if kind == "epsilon_nelbo" else absorb_nelbo(process)


def prior_kl(process: NoisingProcess, alpha: float) -> float:
    """KL(q_T(. | x) || prior) of one position, nats, where pure noise keeps `alpha` of the tokens.

    The prior is q_T averaged over a uniform x; 0 for alpha = 0.
    """
    N, e = process.num_tokens, process.epsilon
    own, other = 1 - e + e / N, e / N
    return alpha * float(own * math.log(own * N) + (N - 1) * xlogy(other, other * N))


def bound(process: NoisingProcess, reading: str) -> Loss:
    """The loss whose expectation is the process's negative ELBO, for a network read by `reading`."""
    if process.name == "absorb":
        return absorb_nelbo(process)
    if process.name == "epsilon_hybrid":
        return epsilon_nelbo(process, reading)
    raise unknown("noising.kind (likelihood)", process.name, ("absorb", "epsilon_hybrid"))


def _at(scores_RxV: Array, index_R: Array) -> Array:
    # a masked sum fuses with its neighbours, and so does its gradient; a gather's is a scatter
    ids = jax.lax.broadcasted_iota(index_R.dtype, scores_RxV.shape, scores_RxV.ndim - 1)
    here = ids == index_R[..., None]
    return jnp.where(here, scores_RxV, 0.0).sum(-1)
