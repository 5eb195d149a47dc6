"""Markov chains whose laws are shares: a token stays, spreads evenly over the ordinary tokens, or is masked.

Every table costs O(V) and holds for one position (scalar tokens and alphas); noising.py turns chains into
noising processes. N ordinary tokens are 0 .. N-1, the mask is state N, V = N + 1; alpha in [0, 1] is the
survival. What cannot happen (an absorb token other than x0, a mask at alpha = 1) keeps its token, never NaN.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hdlm_jax.errors import choose


class Shares(NamedTuple):
    """Where a token goes: it stays, spreads evenly over the ordinary tokens, or is masked; the sum is 1."""

    keep: Array
    spread: Array
    mask: Array


def absorbed(alpha_from: Array, alpha_to: Array) -> Shares:
    """Shares of a mask that stays a mask."""
    return Shares(jnp.ones_like(alpha_to), jnp.zeros_like(alpha_to), jnp.zeros_like(alpha_to))


class Chain(NamedTuple):
    """A chain by its shares.

    Attributes:
      num_tokens: N.
      shares: alpha -> shares of a clean token.
      between: (alpha_from, alpha_to) -> shares of an unmasked token at alpha_from.
      masked: (alpha_from, alpha_to) -> shares of a mask at alpha_from; what it keeps is the mask.
    """

    num_tokens: int
    shares: Callable[[Array], Shares]
    between: Callable[[Array, Array], Shares]
    masked: Callable[[Array, Array], Shares] = absorbed


def homogeneous(num_tokens: int, clock: Callable[[Array, Array], Shares]) -> Chain:
    """A chain that knows only the time between two alphas: `clock(survival, 1 - survival)`."""
    return Chain(num_tokens, lambda alpha: clock(alpha, 1 - alpha), lambda a, b: clock(*ratio(a, b)))


def interpolating(num_tokens: int, uniform_share: float) -> Chain:
    """GIDD's chain: masks and random tokens in turns, with a mask that may turn into a token again.

    At t = 1 - alpha and g = 2 p / (1 - p) sqrt(t (1 - t)), p the uniform share, a clean token's shares are
    (1 - t, g, t) / (1 + g). From s to t every state, the mask too, stays with the share keep_t / keep_s; the
    other two are what the marginals leave, spread_t - spread_s keep_t / keep_s and mask_t - mask_s keep_t / keep_s,
    here free of cancellation.
    """
    rate = 2 * uniform_share / (1 - uniform_share)

    def shares(alpha: Array) -> Shares:
        token = rate * _sqrt(alpha * (1 - alpha))
        return Shares(*(part / (1 + token) for part in (alpha, token, 1 - alpha)))

    def between(alpha_from: Array, alpha_to: Array) -> Shares:
        before, after = (rate * _sqrt(alpha * (1 - alpha)) for alpha in (alpha_from, alpha_to))
        survival, lost = ratio(alpha_from, alpha_to)
        roots = _sqrt(1 - alpha_to) + _sqrt(survival * (1 - alpha_from))
        token = rate * _sqrt(alpha_to) * lost / jnp.where(roots > 0, roots, 1)
        return Shares(*(part / (1 + after) for part in (survival * (1 + before), token, lost)))

    return Chain(num_tokens, shares, between, absorbed if uniform_share == 0 else between)


def marginal(chain: Chain, x0: ArrayLike, alpha: ArrayLike) -> Array:
    """q(z | x0) [V]."""
    return _law(chain.num_tokens, chain.shares(as_float(alpha)), x0)


def transition(chain: Chain, z: ArrayLike, alpha_from: ArrayLike, alpha_to: ArrayLike) -> Array:
    """q(z_to | z_from = z) [V], alpha_from >= alpha_to."""
    alphas = as_float(alpha_from), as_float(alpha_to)
    is_mask = jnp.equal(z, chain.num_tokens)
    shares = (jnp.where(is_mask, m, t) for m, t in zip(chain.masked(*alphas), chain.between(*alphas), strict=True))
    return _law(chain.num_tokens, Shares(*shares), z)


def likelihood(chain: Chain, zt: ArrayLike, alpha_t: ArrayLike) -> Array:
    """q(zt | x) [N] for every x."""
    return _from_tokens(chain.num_tokens, chain.shares(as_float(alpha_t)), zt)


def posterior(chain: Chain, zt: ArrayLike, x0: ArrayLike, alpha_t: ArrayLike, alpha_s: ArrayLike) -> Array:
    """q(z_s | zt, x0) [V] = q(z_s | x0) q(zt | z_s) / q(zt | x0), alpha_s >= alpha_t."""
    alpha_t, alpha_s = as_float(alpha_t), as_float(alpha_s)
    before_V = _law(chain.num_tokens, chain.shares(alpha_s), x0)
    back_V = _backward(chain, alpha_s, alpha_t, zt)
    evidence = _law(chain.num_tokens, chain.shares(alpha_t), x0)[zt]
    table_V = before_V * back_V / jnp.where(evidence > 0, evidence, 1)
    return jnp.where((evidence > 0) & (alpha_s > alpha_t), table_V, one_hot(zt, table_V))


def reverse(
    chain: Chain,
    zt: ArrayLike,
    x0_probs_N: Array,
    alpha_t: ArrayLike,
    alpha_s: ArrayLike,
    reading: str = "posterior",
) -> Array:
    """sum_x p(x | zt) q(z_s | zt, x) [V] with p read from x0_probs, in O(V).

    q(zt | y) (keep w_y + b_y sum_x w_x) for z_s = y, where w_x = p(x | zt) / q(zt | x), w_mask = 0 and
    q(y | x) = keep 1[y = x] + b_y at alpha_s.
    """
    alpha_t, alpha_s = as_float(alpha_t), as_float(alpha_s)
    likelihood_N = likelihood(chain, zt, alpha_t)
    p_N = read(likelihood_N, zt, x0_probs_N, reading)
    possible_N = likelihood_N > 0
    w_N = jnp.where(possible_N, p_N / jnp.where(possible_N, likelihood_N, 1), 0)
    shares = chain.shares(alpha_s)
    before_V = _arrivals(chain.num_tokens, shares) * w_N.sum() + jnp.append(shares.keep * w_N, 0)
    table_V = before_V * _backward(chain, alpha_s, alpha_t, zt)
    return jnp.where(jnp.any(possible_N) & (alpha_s > alpha_t), table_V, one_hot(zt, table_V))


def sample(chain: Chain, rng: Array, x0: ArrayLike, alpha: ArrayLike) -> Array:
    """Draws of q(z | x0), of x0's shape and dtype: one uniform and one random token per position."""
    stay_rng, token_rng = jax.random.split(rng)
    x0, alpha = jnp.asarray(x0), as_float(alpha)
    alpha = jnp.broadcast_to(alpha.astype(jnp.promote_types(alpha.dtype, jnp.float32)), x0.shape)
    shares = chain.shares(alpha)
    u = jax.random.uniform(stay_rng, x0.shape, alpha.dtype)
    token = jax.random.randint(token_rng, x0.shape, 0, chain.num_tokens, x0.dtype)
    noise = jnp.where(u < shares.keep + shares.spread, token, chain.num_tokens)
    return jnp.where(u < shares.keep, x0, noise)


def prior(chain: Chain, rng: Array, shape: tuple[int, ...], alpha: ArrayLike = 0.0) -> Array:
    """Draws of the noise, int32: q(z | x) at the noisiest alpha, x uniform."""
    x0_rng, noise_rng = jax.random.split(rng)
    return sample(chain, noise_rng, jax.random.randint(x0_rng, shape, 0, chain.num_tokens, jnp.int32), alpha)


# (q(zt | x) [N], 1[x = zt] + 1/N [N]) -> the factor [N] by which p(x | zt) differs from the network's output.
READINGS: Mapping[str, Callable[[Array, Array], Array]] = {
    "posterior": lambda likelihood_N, shuffle_N: (likelihood_N > 0).astype(likelihood_N.dtype),
    "cavity": lambda likelihood_N, shuffle_N: likelihood_N,
    "hybrid": lambda likelihood_N, shuffle_N: likelihood_N / shuffle_N,
}


def read(likelihood_N: Array, zt: ArrayLike, x0_probs_N: Array, reading: str) -> Array:
    """p(x | zt) [N] from a network's x0 probabilities [N]; where it gives what is possible no mass, uniform.

    The largest entry is scaled to 1 first: tiny probabilities neither vanish nor blow up a gradient.
    """
    N = likelihood_N.shape[-1]
    shuffle_N = one_hot(zt, likelihood_N) + 1 / N
    factor_N = choose("noising.reading", reading, READINGS)(likelihood_N, shuffle_N)
    factor_N = jnp.where(jnp.any(likelihood_N > 0), factor_N, jnp.ones_like(factor_N))
    weight_N = x0_probs_N * factor_N
    top = jax.lax.stop_gradient(weight_N.max())
    scaled_N = jnp.where(top > 0, weight_N / jnp.where(top > 0, top, 1), factor_N / factor_N.max())
    return scaled_N / scaled_N.sum()


def ratio(alpha_from: Array, alpha_to: Array) -> tuple[Array, Array]:
    """Survival between two alphas and 1 minus it, without cancellation; 1 and 0 between two zeros."""
    some = alpha_from > 0
    scale = jnp.where(some, alpha_from, 1)
    return jnp.where(some, alpha_to / scale, 1), jnp.where(some, (alpha_from - alpha_to) / scale, 0)


def power(survival: Array, lost: Array, exponent: float) -> tuple[Array, Array]:
    """survival^exponent and 1 - survival^exponent, given lost = 1 - survival; exact for exponents 0 and 1."""
    if exponent == 0:
        return jnp.ones_like(survival), jnp.zeros_like(survival)
    if exponent == 1:
        return survival, lost
    some, log_power = survival > 0, exponent * log_survival(survival, lost)
    return jnp.where(some, jnp.exp(log_power), 0), jnp.where(some, -jnp.expm1(log_power), 1)


def log_survival(survival: Array, lost: Array) -> Array:
    """log survival, given lost = 1 - survival, as exact near 1 as near 0; 0 where survival is 0."""
    near_1 = survival > 0.5
    far = jnp.log(jnp.where((survival > 0) & ~near_1, survival, 1))
    return jnp.where(near_1, jnp.log1p(-jnp.where(near_1, lost, 0)), far)


def _law(num_tokens: int, shares: Shares, z: ArrayLike) -> Array:
    """[V]: the law of the noisier state given `z`, whose shares these are."""
    arrivals_V = _arrivals(num_tokens, shares)
    return arrivals_V + shares.keep * one_hot(z, arrivals_V)


def _arrivals(num_tokens: int, shares: Shares) -> Array:
    """[V]: the part of the law that does not depend on the token."""
    return jnp.where(jnp.arange(num_tokens + 1) < num_tokens, shares.spread / num_tokens, shares.mask)


def _from_tokens(num_tokens: int, shares: Shares, zt: ArrayLike) -> Array:
    """[N]: probability that each ordinary token becomes `zt`."""
    arrives = jnp.where(jnp.equal(zt, num_tokens), shares.mask, shares.spread / num_tokens)
    table_N = jnp.broadcast_to(arrives, (num_tokens,))
    return table_N + shares.keep * one_hot(zt, table_N)


def _backward(chain: Chain, alpha_s: Array, alpha_t: Array, zt: ArrayLike) -> Array:
    """[V]: q(zt | z_s) for every state z_s."""
    N, masked = chain.num_tokens, chain.masked(alpha_s, alpha_t)
    from_mask = jnp.where(jnp.equal(zt, N), masked.keep + masked.mask, masked.spread / N)
    return jnp.append(_from_tokens(N, chain.between(alpha_s, alpha_t), zt), from_mask)


def one_hot(z: ArrayLike, like_V: Array) -> Array:
    """1[state = z] [V], of the length and dtype of `like_V`."""
    return (jnp.arange(like_V.shape[-1]) == z).astype(like_V.dtype)


def as_float(alpha: ArrayLike) -> Array:
    """`alpha` as a floating array of its own, or the default, dtype."""
    return jnp.asarray(alpha, jnp.result_type(alpha, float))


def _sqrt(x: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
