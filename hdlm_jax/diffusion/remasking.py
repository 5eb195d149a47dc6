"""ReMDM: unmasked tokens are masked again with probability sigma, and masks are unmasked the faster for it.

With survival alpha_t before a call and alpha_s after it, each position's own (Wang et al. 2025, "Remasking Discrete
Diffusion Models with Inference-Time Scaling"),

  token   stays with probability 1 - sigma, else becomes the mask
  mask    becomes a token of p~ with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

which keeps the marginals for every 0 <= sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t) that does not depend on
the tokens (so for all but conf, which leaves some more masks on the way). sigma = 0 is `ancestral`.
For epsilon_hybrid the same holds with p~ = (1 - epsilon) p + epsilon/N, p read as a posterior; its last step is exact,
x ~ p at masks and tokens, as in diffusion/reverse.py. The rules differ in sigma:

  remdm_cap       min(eta, sigma_max)
  remdm_rescale   eta sigma_max
  remdm_conf      sigma_max times the softmax of -p over the window's unmasked tokens that may change, p the network's
                  probability of the token when it was placed
  remdm_switch    as cap from the noise fraction 1 - alpha_t < t_switch on, 0 before
  remdm_loop      as cap while alpha rests at alpha_on, 0 before and after: with `noise_schedules.plateau`

At a position's last call sigma_max is 0: no mask is left.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import noise_schedules
from hdlm_jax.diffusion.fields import number
from hdlm_jax.diffusion.noising import NoisingProcess, unmasked_share
from hdlm_jax.diffusion.reverse import Proposal, Resampling, checked_eta, decide, proposed, reading_of
from hdlm_jax.diffusion.rules import Move, Rule, probability, require_frozen

Sigma = Callable[[Array, Move, Array, Array | None], Array]
"""(zt_W, move, sigma_max_W, memory_W) -> sigma_W."""


def remdm_cap(process: NoisingProcess, eta: float = 0.02, reading: str | None = None) -> Rule:
    """sigma = min(eta, sigma_max).

    Raises:
      UserError: eta outside [0, 1], a process whose tokens are not frozen, a reading that it does not know.
    """
    return _rule("remdm_cap", process, reading, partial(_cap, checked_eta(eta)))


def remdm_rescale(process: NoisingProcess, eta: float = 0.015, reading: str | None = None) -> Rule:
    """sigma = eta sigma_max; errors as `remdm_cap`."""
    eta = checked_eta(eta)
    return _rule("remdm_rescale", process, reading, lambda zt_W, move, most_W, memory_W: eta * most_W)


def remdm_conf(process: NoisingProcess, reading: str | None = None) -> Rule:
    """sigma_max shared out among tokens, more to those placed with less confidence; errors as `remdm_cap`."""
    return _rule("remdm_conf", process, reading, partial(_by_confidence, process.mask), memory=0.0)


def remdm_switch(
    process: NoisingProcess, eta: float = 0.02, t_switch: float = 0.55, reading: str | None = None
) -> Rule:
    """As cap from the noise fraction t_switch in (0, 1] on; errors as `remdm_cap`."""
    eta = checked_eta(eta)
    t_switch = number("sampler.t_switch", t_switch, "a number in (0, 1]", lambda value: 0 < value <= 1)

    def sigma(zt_W, move, most_W, memory_W):
        return jnp.where(1 - move.alpha_t < t_switch, _cap(eta, zt_W, move, most_W, memory_W), 0)

    return _rule("remdm_switch", process, reading, sigma)


def remdm_loop(
    process: NoisingProcess,
    eta: float = 0.02,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    reading: str | None = None,
) -> Rule:
    """alpha rises to alpha_on at t_on, rests until t_off while tokens are masked again and again, then rises to 1.

    Errors as `remdm_cap`, and those of `noise_schedules.plateau`.
    """
    eta = checked_eta(eta)
    warp = partial(noise_schedules.plateau, t_on=t_on, t_off=t_off, alpha_on=alpha_on)
    warp(noise_schedules.linear())  # refuses dials out of range

    def sigma(zt_W, move, most_W, memory_W):
        return jnp.where(move.alpha_s == move.alpha_t, _cap(eta, zt_W, move, most_W, memory_W), 0)

    return _rule("remdm_loop", process, reading, sigma)._replace(warp=warp)


RULES: Mapping[str, Callable[..., Rule]] = {
    "remdm_cap": remdm_cap,
    "remdm_rescale": remdm_rescale,
    "remdm_conf": remdm_conf,
    "remdm_switch": remdm_switch,
    "remdm_loop": remdm_loop,
}


def largest_sigma(process: NoisingProcess, move: Move) -> Array:
    """sigma_max [W] = min(1, (1 - alpha_s) / alpha_t)."""
    before, after = (unmasked_share(alpha, process.alpha_max) for alpha in (move.alpha_t, move.alpha_s))
    return jnp.minimum(1, (1 - after) / jnp.where(before > 0, before, 1e-30))


def unmasking(process: NoisingProcess, move: Move, sigma_W: Array) -> Array:
    """Probability [W] that a mask becomes a token: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)."""
    before, after = (unmasked_share(alpha, process.alpha_max) for alpha in (move.alpha_t, move.alpha_s))
    share = (after - before + sigma_W * before) / jnp.where(before < 1, 1 - before, 1)
    return jnp.where(move.alpha_s >= 1, 1, jnp.clip(share, 0, 1))


class _Chance(NamedTuple):
    """A `Chance` with the positions that become the mask, which are among those that draw."""

    draws: Array
    again: Array
    proposal: Proposal


def _rule(name: str, process: NoisingProcess, reading: str | None, sigma: Sigma, memory: float | None = None) -> Rule:
    require_frozen(name, process, reading)
    draws = Resampling(process, 0.0, reading_of(process, reading), process.epsilon, exact_last=True)
    step = partial(_step, draws, sigma, memory)
    if memory is not None:
        return Rule(name, step, memory)
    return Rule(name, step, chance=partial(_chance, draws, sigma), draw=partial(_draw, draws))


def _chance(
    draws: Resampling, sigma: Sigma, rng: Array, zt_W: Array, move: Move, memory_W: Array | None = None
) -> _Chance:
    process, last_W, masked_W = draws.process, move.alpha_s >= 1, zt_W == draws.process.mask
    sigma_W = sigma(zt_W, move, largest_sigma(process, move), memory_W)
    u_W, proposal = decide(draws, rng, zt_W, last_W)
    placed_W = masked_W & (u_W < unmasking(process, move, sigma_W))
    redrawn_W = ~masked_W & last_W & (process.epsilon > 0)
    again_W = ~masked_W & ~redrawn_W & (u_W < sigma_W) & move.changes
    return _Chance(move.changes & (placed_W | redrawn_W | again_W), again_W, proposal)


def _draw(draws: Resampling, chance: _Chance, zt_W: Array, logits_WxV: Array, move: Move) -> Array:
    return _moved(draws, chance, zt_W, proposed(draws, chance.proposal, zt_W, logits_WxV))


def _moved(draws: Resampling, chance: _Chance, zt_W: Array, x0_W: Array) -> Array:
    return jnp.where(chance.again, draws.process.mask, jnp.where(chance.draws, x0_W, zt_W))


def _step(
    draws: Resampling,
    sigma: Sigma,
    fresh: float | None,
    rng: Array,
    zt_W: Array,
    logits_WxV: Array,
    move: Move,
    memory_W: Array | None,
    scores_WxV: Array | None = None,
) -> tuple[Array, Any]:
    process = draws.process
    chance = _chance(draws, sigma, rng, zt_W, move, memory_W)
    x0_W = proposed(draws, chance.proposal, zt_W, logits_WxV)
    zs_W = _moved(draws, chance, zt_W, x0_W)
    if fresh is None:
        return zs_W, memory_W
    p_W = probability(logits_WxV if scores_WxV is None else scores_WxV, x0_W, process.num_tokens)
    remembered_W = jnp.where(zt_W == process.mask, p_W, memory_W)
    remembered_W = jnp.where(zs_W == process.mask, fresh, remembered_W)
    return zs_W, jnp.where(move.changes, remembered_W, memory_W)


def _cap(eta: float, zt_W: Array, move: Move, most_W: Array, memory_W: Array | None) -> Array:
    return jnp.minimum(eta, most_W)


def _by_confidence(mask: int, zt_W: Array, move: Move, most_W: Array, memory_W: Array) -> Array:
    weight_W = jnp.where(move.changes & (zt_W != mask), jnp.exp(-memory_W), 0)
    return weight_W / jnp.maximum(weight_W.sum(), 1e-30) * most_W
