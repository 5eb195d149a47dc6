"""The discrete negative ELBO of a hyperschedule, summed over every one of its steps.

For a text x whose position i stands at the survival alpha of its own level at every step,

    NELBO = sum_i KL(q(z_i | x_i) at the first step || prior)
          + sum_step sum_{i: the level falls} E_z KL(q(z'_i | z_i, x_i) || p(z'_i | z))

bounds -log p(x) (Fathi et al. 2025; D3PM for flat). All positions of z are noised independently, z' is one
step cleaner, and p is the model's reverse kernel at the position's own two levels. Positions that wait cost
nothing; the step to level 0 costs -log p(x_i | z). The expectation over z is exact for tiny models (`nelbo`),
or taken from one draw of z per step (`sampled_nelbo`). Any noising process will do.

The network comes in as a `Denoiser`, (step, zt [B, L]) -> x0 probabilities [B, L, N]; step is a traced int32
scalar, from which the levels (`hs.levels_at(step)`) and the window (`hs.window(step)`) follow.

Letters: B texts, L positions, N ordinary tokens, V states.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import xlogy

from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.phases import survival
from hdlm_jax.errors import require

MAX_TEXTS = 2**20  # noised texts that `nelbo` enumerates at most

Denoiser = Callable[[Array, Array], Array]


class ReverseChain(NamedTuple):
    """What defines the bound beside the network.

    Attributes:
      hs: levels by step and position.
      schedule: noise fraction -> survival.
      process: the noising process.
      reading: how the denoiser's probabilities are read at unmasked tokens (diffusion/noising.py).
    """

    hs: Hyperschedule
    schedule: NoiseSchedule
    process: NoisingProcess
    reading: str

    def alpha(self, step: Any) -> Array:
        """[L], survival of every position at a step."""
        return survival(self.hs.levels_at(step), self.hs.tau_max, self.schedule, self.process.alpha_max)


class Terms(NamedTuple):
    """Parts of the negative ELBO by position, nats, each [L] or [B, L].

    Attributes:
      prior: KL of the first noise to the prior, q averaged over a uniform x.
      diffusion: the steps of a position before its last.
      last: its last step, -log p(x | z).
    """

    prior: Array
    diffusion: Array
    last: Array

    @property
    def total(self) -> Array:
        """Their sum by position."""
        return self.prior + self.diffusion + self.last


def nelbo(chain: ReverseChain, denoiser: Denoiser, x0_L: Array) -> Terms:
    """The negative ELBO of one text, exactly: every step, and every noised text with its probability.

    Costs T calls of V^L texts each.

    Raises:
      UserError: a text that is not as long as the hyperschedule, or too long to enumerate.

    >>> from hdlm_jax.diffusion import hyperschedules, noise_schedules, noising
    >>> chain = ReverseChain(hyperschedules.quenched(2), noise_schedules.linear(), noising.absorb(2), "posterior")
    >>> knows_nothing = lambda step, zt_BxL: jnp.full((*zt_BxL.shape, 2), 0.5)
    >>> nelbo(chain, knows_nothing, jnp.array([0, 1])).total.round(4).tolist()
    [0.6931, 0.6931]
    """
    zt_ZxL = every_text(chain, x0_L.shape[-1])
    x0_ZxL = jnp.broadcast_to(x0_L[None], zt_ZxL.shape)

    def at(step):
        terms = step_terms(chain, denoiser, step, x0_ZxL, zt_ZxL)
        probability_Z = _probability(chain.process, x0_L, zt_ZxL, chain.alpha(step))
        # what cannot happen has no finite divergence
        mean = lambda x_ZxL: jnp.where(probability_Z[:, None] > 0, probability_Z[:, None] * x_ZxL, 0.0).sum(0)
        return jax.tree.map(mean, terms)

    return _over_steps(chain, at, x0_L)


def sampled_nelbo(rng: Array, chain: ReverseChain, denoiser: Denoiser, x0_BxL: Array) -> Terms:
    """An unbiased estimate for each text: every step, with one draw of the noised text per step.

    Raises:
      UserError: texts that are not as long as the hyperschedule.
    """
    _check_length(chain, x0_BxL.shape[-1])

    def at(step):
        alpha_BxL = jnp.broadcast_to(chain.alpha(step)[None], x0_BxL.shape)
        zt_BxL = chain.process.sample(jax.random.fold_in(rng, step), x0_BxL, alpha_BxL)
        return step_terms(chain, denoiser, step, x0_BxL, zt_BxL)

    return _over_steps(chain, at, x0_BxL)


def step_terms(
    chain: ReverseChain, denoiser: Denoiser, step: Array, x0_BxL: Array, zt_BxL: Array
) -> tuple[Array, Array]:
    """KL of the call step -> step+1, given what it is fed: (diffusion, last), nats [B, L] each.

    `last` holds the positions that settle in this call, `diffusion` the others. Where the level does not fall
    both kernels keep the token, and both terms are 0.
    """
    alpha_t, alpha_s = (jnp.broadcast_to(chain.alpha(s)[None], x0_BxL.shape) for s in (step, step + 1))
    divergence = jnp.vectorize(partial(_divergence, chain), signature="(),(),(n),(),()->()")
    kl_BxL = divergence(zt_BxL, x0_BxL, denoiser(step, zt_BxL), alpha_t, alpha_s)
    settles = chain.hs.levels_at(step + 1)[None] == 0
    return jnp.where(settles, 0.0, kl_BxL), jnp.where(settles, kl_BxL, 0.0)


def prior_terms(chain: ReverseChain, x0_L: Array) -> Array:
    """KL(q(z | x) at the first step || prior) by position, nats [..., L]; 0 where it is given, or keeps nothing."""
    process = chain.process

    def one(x0, alpha):
        q_NxV = jax.vmap(process.marginal, (0, None))(jnp.arange(process.num_tokens), alpha)
        return _kl(q_NxV[x0], q_NxV.mean(0))

    alpha = jnp.broadcast_to(chain.alpha(0), x0_L.shape)
    given = jnp.broadcast_to(chain.hs.levels_at(0) == 0, x0_L.shape)
    return jnp.where(given, 0.0, jnp.vectorize(one)(x0_L, alpha))


def every_text(chain: ReverseChain, length: int) -> Array:
    """All noised texts of `length` positions, int32 [V^L, L].

    Raises:
      UserError: a length that is not the hyperschedule's, or more than `MAX_TEXTS` texts.
    """
    _check_length(chain, length)
    V = chain.process.num_states
    allowed = f"at most {MAX_TEXTS:,} noised texts to enumerate, here {V} ** {length}"
    require(V**length <= MAX_TEXTS, "text", f"{length} tokens", allowed)
    return jnp.asarray(np.indices((V,) * length).reshape(length, -1).T, jnp.int32)


def _over_steps(chain: ReverseChain, at: Callable, x0: Array) -> Terms:
    """Sums (diffusion, last) over the steps and adds the prior."""

    def add(total, step):
        return jax.tree.map(jnp.add, total, at(step)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at, jnp.int32(0)))
    (diffusion, last), _ = jax.lax.scan(add, zeros, jnp.arange(chain.hs.num_steps, dtype=jnp.int32))
    return Terms(prior_terms(chain, x0), diffusion, last)


def _divergence(chain: ReverseChain, zt: Array, x0: Array, x0_probs_N: Array, alpha_t: Array, alpha_s: Array) -> Array:
    """KL(q(z_s | zt, x0) || p(z_s | zt)) of one position."""
    target_V = chain.process.posterior(zt, x0, alpha_t, alpha_s)
    return _kl(target_V, chain.process.reverse(zt, x0_probs_N, alpha_t, alpha_s, chain.reading))


def _kl(p_V: Array, q_V: Array) -> Array:
    return (xlogy(p_V, p_V) - xlogy(p_V, q_V)).sum()


def _probability(process: NoisingProcess, x0_L: Array, zt_ZxL: Array, alpha_L: Array) -> Array:
    """[Z]: the probability of each noised text."""
    q_LxV = jax.vmap(process.marginal)(x0_L, alpha_L)
    return jnp.take_along_axis(q_LxV[None], zt_ZxL[..., None], axis=-1)[..., 0].prod(-1)


def _check_length(chain: ReverseChain, length: int) -> None:
    allowed = f"the hyperschedule's {chain.hs.length} positions"
    require(length == chain.hs.length, "text", f"{length} tokens", allowed)
