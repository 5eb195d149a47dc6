"""Noising processes: how clean tokens turn to noise, and the exact laws of the way back.

N ordinary tokens are 0 .. N-1; the mask is token N; tables run over V = N + 1 states. alpha in [0, 1] is the
survival at a noise level: 1 is clean, 0 is pure noise. With u_N the uniform law on ordinary tokens and e_m
the mask, the law of a noised token is (D3PM, SEDD and MDLM for the first two; Fathi et al. 2025, HDLM; von
Rütte et al. 2025 for GIDD)

  absorb           alpha 1[x] + (1 - alpha) e_m
  uniform          alpha 1[x] + (1 - alpha) u_N
  gamma_hybrid     alpha 1[x] + (A - alpha) u_N + (1 - A) e_m,  A = alpha^(1 - gamma)
  epsilon_hybrid   alpha ((1 - epsilon) 1[x] + epsilon u_N) + (1 - alpha) e_m for alpha < 1, and 1[x] at 1
  gidd             (alpha 1[x] + g u_N + (1 - alpha) e_m) / (1 + g),  g = 2 p / (1 - p) sqrt(alpha (1 - alpha))
  d3pm_band        a random walk on the cycle of ids: -log alpha jumps on average, of up to `width` ids
  d3pm_nearest     a random walk on the line of ids, to the next id or the one before

Kernels hold for one position (scalar tokens and alphas); callers vmap them. They cost O(V), D3PM's reverse O(V^2).

Three ways to read the network's x0 probabilities at an unmasked token z (at masks they agree):

  posterior   p(x | z), its own observation included
  cavity      xbar(x), from the other positions only: p(x | z) ∝ xbar(x) q(z | x)
  hybrid      what the published epsilon cross-entropy teaches, xbar(x) (1[x = z] + 1/N): it weighs shuffled
              tokens (1 - epsilon) / epsilon times as much as clean ones
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hdlm_jax.diffusion import chains, d3pm
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
      gamma: share of the uniform clock (absorb 0, uniform 1); None where the rates are not those of two clocks.
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
      sample: (rng, x0, alpha) -> zt of x0's shape and dtype, for any shape; O(1) per position (D3PM: O(N)).
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
    gamma: float | None
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
    return _process("absorb", chains.homogeneous(num_tokens, clock), "posterior", gamma=0.0, log_odds=log_odds)


def uniform(num_tokens: int) -> NoisingProcess:
    """Uniform diffusion: tokens turn into random tokens; there is no mask.

    >>> uniform(num_tokens=2).marginal(0, 0.5).tolist()
    [0.75, 0.25, 0.0]
    """
    clock = lambda survival, lost: Shares(survival, lost, jnp.zeros_like(lost))
    return _process("uniform", chains.homogeneous(num_tokens, clock), "cavity", has_mask=False, gamma=1.0)


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
    return _process("gamma_hybrid", chains.homogeneous(num_tokens, clock), "cavity", gamma=gamma, log_odds=log_odds)


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


def gidd(num_tokens: int, uniform_share: float) -> NoisingProcess:
    """GIDD's hybrid of masks and random tokens, in which a mask may also turn into a random token.

    At alpha = 1 - t, t the time of its paper, a token is intact, random or masked with the odds 1 - t, g and t,
    g = 2 p / (1 - p) sqrt(t (1 - t)). p = `uniform_share` is the share of random tokens at t = 1/2, its
    maximum; alpha = 0 is all masks. uniform_share 0 is `absorb`.

    Raises:
      UserError: uniform_share outside [0, 1).

    >>> gidd(num_tokens=2, uniform_share=0.5).marginal(0, 0.5).tolist()
    [0.5, 0.25, 0.25]
    >>> gidd(num_tokens=2, uniform_share=0.5).transition(2, 0.5, 0.2).round(3).tolist()
    [0.111, 0.111, 0.778]
    """
    allowed = "a number in [0, 1)"
    uniform_share = number("noising.uniform_share", uniform_share, allowed, lambda value: 0 <= value < 1)
    log_odds = partial(_log_odds, num_tokens, 0.0) if uniform_share == 0 else None
    return _process("gidd", chains.interpolating(num_tokens, uniform_share), "cavity", log_odds=log_odds)


def d3pm_band(num_tokens: int, width: int) -> NoisingProcess:
    """D3PM's banded process on a cycle: a token jumps at rate 1, to each of the 2 `width` ids next to it alike.

    alpha is the probability of no jump, and sigma = -log alpha their mean number; alpha = 0 is the uniform law.
    It takes about 0.5 (num_tokens / width)^2 jumps to get near that law, and alpha = 1e-4 is 9 of them: where the
    band is narrower than a quarter of the tokens, small alphas still tell the neighbourhood of the token.

    Raises:
      UserError: fewer than 3 tokens, a width that is not below half of them.

    >>> d3pm_band(num_tokens=5, width=1).marginal(0, 0.5).round(3).tolist()
    [0.562, 0.184, 0.035, 0.035, 0.184, 0.0]
    """
    num_tokens = whole("noising.num_tokens", num_tokens, 3)
    width = whole("noising.width", width, 1, (num_tokens - 1) // 2, "less than half the tokens")
    return _process("d3pm_band", d3pm.Walk(num_tokens, width, reflects=False), "cavity", has_mask=False, laws=d3pm)


def d3pm_nearest(num_tokens: int) -> NoisingProcess:
    """D3PM's nearest-neighbour process: a token jumps at rate 1/2 to either neighbouring id, but not over the ends.

    alpha = exp(-sigma) at the time sigma; alpha = 0 is the uniform law, which takes sigma of about
    0.6 num_tokens^2 to get near to, so that small alphas still tell the neighbourhood of the token.

    Raises:
      UserError: fewer than 2 tokens.

    >>> d3pm_nearest(num_tokens=3).marginal(0, 0.5).round(3).tolist()
    [0.746, 0.215, 0.039, 0.0]
    """
    num_tokens = whole("noising.num_tokens", num_tokens, 2)
    return _process("d3pm_nearest", d3pm.Walk(num_tokens, 1, reflects=True), "cavity", has_mask=False, laws=d3pm)


PROCESSES: Mapping[str, Callable[..., NoisingProcess]] = {
    "absorb": absorb,
    "uniform": uniform,
    "gamma_hybrid": gamma_hybrid,
    "epsilon_hybrid": epsilon_hybrid,
    "gidd": gidd,
    "d3pm_band": d3pm_band,
    "d3pm_nearest": d3pm_nearest,
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
    chain: Chain | d3pm.Walk,
    reading: str,
    has_mask: bool = True,
    alpha_max: float = 1.0,
    epsilon: float = 0.0,
    gamma: float | None = None,
    log_odds: Callable[[str], float] | None = None,
    laws: ModuleType = chains,
) -> NoisingProcess:
    """A process whose pure functions are those of the module `laws` for its `chain`."""
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
        gamma=gamma,
        frozen=log_odds is not None,
        log_odds=log_odds,
        marginal=partial(laws.marginal, chain),
        transition=partial(laws.transition, chain),
        likelihood=partial(laws.likelihood, chain),
        posterior=partial(laws.posterior, chain),
        reverse=partial(laws.reverse, chain),
        sample=partial(laws.sample, chain),
        prior=partial(laws.prior, chain),
    )


def _log_odds(num_tokens: int, epsilon: float, reading: str) -> float:
    """Where q(z | x) ∝ (1 - epsilon) 1[x = z] + epsilon/N at every alpha < 1."""
    choose("noising.reading", reading, READINGS)
    if epsilon == 0:
        return math.inf
    cavity = math.log1p((1 - epsilon) * num_tokens / epsilon)
    return {"posterior": 0.0, "cavity": cavity, "hybrid": cavity - math.log1p(num_tokens)}[reading]
