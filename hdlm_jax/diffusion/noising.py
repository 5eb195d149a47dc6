"""Noising processes: how clean tokens turn to noise, and the exact laws of the way back.

N ordinary tokens are 0 .. N-1; the mask is token N; tables run over V = N + 1 states. alpha in [0, 1] is the
survival at a noise level: 1 is clean, 0 is pure noise. With u_N the uniform law on ordinary tokens and e_m
the mask, the law of a noised token is (D3PM, SEDD and MDLM for the first two; Fathi et al. 2025, HDLM)

  absorb           alpha 1[x] + (1 - alpha) e_m
  uniform          alpha 1[x] + (1 - alpha) u_N
  gamma_hybrid     alpha 1[x] + (A - alpha) u_N + (1 - A) e_m,  A = alpha^(1 - gamma)
  epsilon_hybrid   alpha ((1 - epsilon) 1[x] + epsilon u_N) + (1 - alpha) e_m for alpha < 1, and 1[x] at 1

Kernels hold for one position (scalar tokens and alphas) and cost O(V); callers vmap them.

Three ways to read the network's x0 probabilities at an unmasked token z (at masks they agree):

  posterior   p(x | z), its own observation included
  cavity      xbar(x), from the other positions only: p(x | z) ∝ xbar(x) q(z | x)
  hybrid      what the published epsilon cross-entropy teaches, xbar(x) (1[x = z] + 1/N): it weighs shuffled
              tokens (1 - epsilon) / epsilon times as much as clean ones
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hdlm_jax.diffusion import chains
from hdlm_jax.diffusion.chains import READINGS, Chain, Shares
from hdlm_jax.diffusion.fields import arguments, number, whole
from hdlm_jax.errors import choose


class NoisingProcess(NamedTuple):
    """A noising process: its constants, and pure functions for one position.

    Attributes:
      name: as in `noising.kind`.
      num_tokens: N, ordinary tokens.
      num_states: V = N + 1, the length of every table; where there is no mask its entry is 0.
      mask: the mask's id N, or None.
      alpha_max: the alpha of the least noise there is. Below 1 it marks an atom: alpha in [alpha_max, 1) is
        noise after the atom and before anything else (epsilon's shuffle, no mask yet).
      reading: how a network of this process is read unless its loss says otherwise.
      readings: every reading that makes sense here.
      epsilon: share of shuffled tokens among the unmasked ones, 0 where they have no fixed share.
      frozen: whether an unmasked token of the reverse chain stays until its last step.
      log_odds: reading -> log of the factor by which p(x | z) exceeds the network's probability at x = z
        relative to every other x, at an unmasked token z and alpha < 1; inf where z is certainly clean. None
        where it depends on alpha (`to_posterior` serves every process).
      marginal: (x0, alpha) -> [V] q(z | x0).
      transition: (z, alpha_from, alpha_to) -> [V] q(z_to | z_from = z), alpha_from >= alpha_to.
      likelihood: (zt, alpha_t) -> [N] q(zt | x) for every x.
      posterior: (zt, x0, alpha_t, alpha_s) -> [V] q(z_s | zt, x0), alpha_s >= alpha_t.
      reverse: (zt, x0_probs_N, alpha_t, alpha_s, reading="posterior") -> [V] the model's kernel
        sum_x p(x | zt) q(z_s | zt, x), p read from x0_probs; p itself at alpha_s = 1.
      sample: (rng, x0, alpha) -> zt of x0's shape and dtype, for any shape; O(1) per position.
      prior: (rng, shape, alpha=0) -> int32 noise: q(z | x) at the noisiest alpha, x uniform.
    """

    name: str
    num_tokens: int
    num_states: int
    mask: int | None
    alpha_max: float
    reading: str
    readings: tuple[str, ...]
    epsilon: float
    frozen: bool
    log_odds: Callable[[str], float] | None
    marginal: Callable[..., Array]
    transition: Callable[..., Array]
    likelihood: Callable[..., Array]
    posterior: Callable[..., Array]
    reverse: Callable[..., Array]
    sample: Callable[..., Array]
    prior: Callable[..., Array]


def absorb(num_tokens: int) -> NoisingProcess:
    """Masked diffusion: tokens turn into the mask and nothing else.

    >>> absorb(num_tokens=2).marginal(0, 0.75).tolist()
    [0.75, 0.0, 0.25]
    >>> absorb(num_tokens=2).reverse(2, jnp.array([0.5, 0.5]), 0.0, 0.5).tolist()
    [0.25, 0.25, 0.5]
    """
    clock = lambda survival, lost: Shares(survival, jnp.zeros_like(lost), lost)
    log_odds = partial(_log_odds, num_tokens, 0.0)
    return _process("absorb", chains.homogeneous(num_tokens, clock), "posterior", log_odds=log_odds)


def uniform(num_tokens: int) -> NoisingProcess:
    """Uniform diffusion: tokens turn into random tokens; there is no mask.

    >>> uniform(num_tokens=2).marginal(0, 0.5).tolist()
    [0.75, 0.25, 0.0]
    """
    clock = lambda survival, lost: Shares(survival, lost, jnp.zeros_like(lost))
    return _process("uniform", chains.homogeneous(num_tokens, clock), "cavity", has_mask=False)


def gamma_hybrid(num_tokens: int, gamma: float) -> NoisingProcess:
    """Two clocks: with sigma = -log alpha, uniform diffusion for gamma sigma, then absorption for the rest.

    gamma 0 is `absorb`.

    Raises:
      UserError: gamma outside [0, 1).

    >>> gamma_hybrid(num_tokens=2, gamma=0.5).marginal(0, 0.25).tolist()
    [0.375, 0.125, 0.5]
    """
    gamma = number("noising.gamma", gamma, "a number in [0, 1)", lambda value: 0 <= value < 1)

    def clock(survival: Array, lost: Array) -> Shares:
        unmasked, masked = chains.power(survival, lost, 1 - gamma)
        return Shares(survival, unmasked * chains.power(survival, lost, gamma)[1], masked)

    log_odds = partial(_log_odds, num_tokens, 0.0) if gamma == 0 else None
    return _process("gamma_hybrid", chains.homogeneous(num_tokens, clock), "cavity", log_odds=log_odds)


def epsilon_hybrid(num_tokens: int, epsilon: float) -> NoisingProcess:
    """A share `epsilon` of the tokens is shuffled at once, then all are absorbed.

    The shuffle is an atom at alpha = 1: alpha = 1 is clean, every alpha < 1 includes it, and `alpha_max`,
    the largest float32 below 1, stands for shuffled but not yet masked. epsilon 0 is `absorb`.

    Raises:
      UserError: epsilon outside [0, 1).

    >>> p = epsilon_hybrid(num_tokens=2, epsilon=0.5)
    >>> [p.marginal(0, alpha).tolist() for alpha in (1.0, p.alpha_max, 0.5)]
    [[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.375, 0.125, 0.5]]
    """
    epsilon = number("noising.epsilon", epsilon, "a number in [0, 1)", lambda value: 0 <= value < 1)
    alpha_max = 1 - 2.0**-24 if epsilon > 0 else 1.0

    def shares(alpha: Array) -> Shares:
        survival = unmasked_share(alpha, alpha_max)
        shuffled = jnp.where(alpha < 1, epsilon, 0.0).astype(survival.dtype)
        return Shares(survival * (1 - shuffled), survival * shuffled, 1 - survival)

    def between(alpha_from: Array, alpha_to: Array) -> Shares:
        survival, lost = chains.ratio(*(unmasked_share(alpha, alpha_max) for alpha in (alpha_from, alpha_to)))
        shuffle, later = shares(alpha_to), Shares(survival, jnp.zeros_like(lost), lost)
        return Shares(*(jnp.where(alpha_from < 1, b, a) for a, b in zip(shuffle, later, strict=True)))

    return _process(
        "epsilon_hybrid",
        Chain(num_tokens, shares, between),
        "hybrid",
        alpha_max=alpha_max,
        epsilon=epsilon,
        log_odds=partial(_log_odds, num_tokens, epsilon),
    )


PROCESSES: Mapping[str, Callable[..., NoisingProcess]] = {
    "absorb": absorb,
    "uniform": uniform,
    "gamma_hybrid": gamma_hybrid,
    "epsilon_hybrid": epsilon_hybrid,
}


def build(kind: str, num_tokens: int, **fields: Any) -> NoisingProcess:
    """The process named `kind`, from the fields of the experiment's `noising` block; None means not given.

    Raises:
      UserError: an unknown kind, a field that this kind does not have or misses, a value out of range.

    >>> build("gamma_hybrid", 10, gamma=0.1, epsilon=None).name
    'gamma_hybrid'
    >>> build("epsilon_hybrid", 10, epsilon=1.0)
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: noising.epsilon: got 1.0; allowed: a number in [0, 1)
    """
    factory = choose("noising.kind", kind, PROCESSES)
    return factory(num_tokens, **arguments("noising", kind, factory, fields, skip=1))


def to_posterior(process: NoisingProcess, zt: ArrayLike, x0_probs_N: Array, alpha_t: ArrayLike, reading: str) -> Array:
    """p(x | zt) [N] for one position, from the network's x0 probabilities [N] under a reading.

    posterior: restricted to where q(zt | x) > 0; cavity: p ∝ xbar(x) q(zt | x); hybrid: p ∝
    p_w(x) q(zt | x) / (1[x = zt] + 1/N). For an absorb token all give that token.

    Raises:
      UserError: an unknown reading.

    >>> p = epsilon_hybrid(num_tokens=2, epsilon=0.5)
    >>> to_posterior(p, 0, jnp.array([0.5, 0.5]), 0.9, "cavity").round(3).tolist()
    [0.75, 0.25]
    """
    return chains.read(process.likelihood(zt, alpha_t), zt, x0_probs_N, reading)


def unmasked_share(alpha: Array, alpha_max: float) -> Array:
    """Share of the tokens that are not masked yet: alpha, and exactly 1 from `alpha_max` on."""
    return jnp.where(alpha >= alpha_max, jnp.ones_like(alpha), alpha)


def _process(
    name: str,
    chain: Chain,
    reading: str,
    has_mask: bool = True,
    alpha_max: float = 1.0,
    epsilon: float = 0.0,
    log_odds: Callable[[str], float] | None = None,
) -> NoisingProcess:
    N = whole("noising.num_tokens", chain.num_tokens, 1)
    return NoisingProcess(
        name=name,
        num_tokens=N,
        num_states=N + 1,
        mask=N if has_mask else None,
        alpha_max=alpha_max,
        reading=reading,
        readings=tuple(READINGS) if log_odds else ("posterior", "cavity"),
        epsilon=epsilon,
        frozen=log_odds is not None,
        log_odds=log_odds,
        marginal=partial(chains.marginal, chain),
        transition=partial(chains.transition, chain),
        likelihood=partial(chains.likelihood, chain),
        posterior=partial(chains.posterior, chain),
        reverse=partial(chains.reverse, chain),
        sample=partial(chains.sample, chain),
        prior=partial(chains.prior, chain),
    )


def _log_odds(num_tokens: int, epsilon: float, reading: str) -> float:
    """Where q(z | x) ∝ (1 - epsilon) 1[x = z] + epsilon/N at every alpha < 1."""
    choose("noising.reading", reading, READINGS)
    if epsilon == 0:
        return math.inf
    cavity = math.log1p((1 - epsilon) * num_tokens / epsilon)
    return {"posterior": 0.0, "cavity": cavity, "hybrid": cavity - math.log1p(num_tokens)}[reading]
