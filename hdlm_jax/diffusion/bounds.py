"""The exact negative ELBO of any noising process, position by position, from the network's scores.

For discrete steps it is the divergence of the posterior from the model's reverse kernel (D3PM),

    steps KL(q(z_s | z_t, x) || p(z_s | z_t)),    and steps (-log p(x | z_t)) in a position's last step.

For continuous times it is the limit of that divergence. Where the marginals are q(z | x) = keep 1[z = x] + b_z and
Q(y -> z) is the rate per unit by which alpha falls, the limit costs O(N) (SEDD and UDLM for the uniform chain, GIDD
for its own; the gamma hybrid in the same form):

    sum_{y != z} Q(y -> z) r_y (e^rho_y - 1 - rho_y),    r_y = q(y | x) / q(z | x),    rho_y = log(s_y / r_y),

with the model's scores s_y = q(y | xbar) / q(z | xbar) for the `cavity` reading of the network, where
q(. | xbar) = keep xbar + b, and s_y = sum_x p(x) q(y | x) / q(z | x) for the `posterior` reading. Every
term of either sum is >= 0, so nothing cancels in float32.

Letters: R rows, V scores over N ordinary tokens, the mask and perhaps padding (both -inf).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hdlm_jax.diffusion.chains import READINGS
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import choose, one_of, require

# Processes whose integrand at continuous times is known; the others are trained and evaluated in discrete steps.
CONTINUOUS = ("absorb", "epsilon_hybrid", "uniform", "gamma_hybrid", "gidd")
TERMS = ("diffusion", "reconstruction")


class Law(NamedTuple):
    """The marginals at one alpha, and the rates at which states turn into others as alpha falls by one unit.

    Attributes:
      keep, other, mask: q(z | x) = keep 1[z = x] + other for an ordinary z, and `mask` for the mask.
      token_token: Q(y -> z) of two ordinary tokens.
      token_mask: Q(y -> mask).
      mask_token: Q(mask -> z); 0 where masks stay.
    """

    keep: Array
    other: Array
    mask: Array
    token_token: Array
    token_mask: Array
    mask_token: Array


def excess(r: Array) -> Array:
    """e^r - 1 - r >= 0, without cancellation at small r.

    >>> [f"{x:.5g}" for x in excess(jnp.array([0.0, 0.01, 1.0]))]
    ['0', '5.0167e-05', '0.71828']
    """
    series = jnp.zeros_like(r)
    for n in range(9, 1, -1):  # the sum of r^n / n! from n = 2 on
        series = r * series + 1 / math.factorial(n)
    return jnp.where(jnp.abs(r) < 0.25, jnp.square(r) * series, jnp.expm1(r) - r)


def divergence(p_xV: Array, q_xV: Array) -> Array:
    """KL(p || q) of two laws over the last axis, nats: the sum of p (e^r - 1 - r), r = log(q / p).

    Entries below the smallest normal number count as 0 in p and as that number in q.

    >>> divergence(jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.25, 0.5])).round(4).tolist()
    0.6931
    """
    tiny = jnp.finfo(p_xV.dtype).tiny
    possible = p_xV > tiny
    p = jnp.where(possible, p_xV, 1)
    r = _log_quotient(jnp.maximum(q_xV, tiny), p)
    return jnp.where(possible, p * excess(r), jnp.maximum(q_xV, 0)).sum(-1)


@jax.custom_jvp
def _log_quotient(q: Array, p: Array) -> Array:
    """log(q / p) of positive numbers, the divided form: close laws keep their digits."""
    return jnp.log(q / p)


@_log_quotient.defjvp
def _log_quotient_jvp(at: tuple[Array, Array], along: tuple[Array, Array]) -> tuple[Array, Array]:
    """dq/q - dp/p. Through the quotient a compiler may form 1 / (q p), which overflows where both are rare."""
    return _log_quotient(*at), along[0] / at[0] - along[1] / at[1]


def step_divergence(
    process: NoisingProcess, reading: str, logits_RxV: Array, x0_R: Array, zt_R: Array, alpha_t_R: Array, alpha_s_R
) -> Array:
    """KL(q(z_s | z_t, x) || p(z_s | z_t)), nats [R]; 0 where alpha_s = alpha_t. For any process, O(V) per row.

    The network is read in log space: on its way through probabilities far below those of the process, which an
    over-confident network gives, a gradient would overflow.
    """
    posterior_RxN = jax.nn.softmax(_read(process, reading, logits_RxV, zt_R, alpha_t_R), axis=-1)

    def one(zt, x0, posterior_N, alpha_t, alpha_s):
        target_V = process.posterior(zt, x0, alpha_t, alpha_s)
        return divergence(target_V, process.reverse(zt, posterior_N, alpha_t, alpha_s, "posterior"))

    return jax.vmap(one)(zt_R, x0_R, posterior_RxN, alpha_t_R, alpha_s_R)


def posterior_nats(
    process: NoisingProcess, reading: str, logits_RxV: Array, x0_R: Array, zt_R: Array, alpha_R: Array
) -> Array:
    """-log p(x0 | z_t) with the posterior read from the network, nats [R], in log space. For any process."""
    scores_RxN = _read(process, reading, logits_RxV, zt_R, alpha_R)
    ids = jax.lax.broadcasted_iota(zt_R.dtype, scores_RxN.shape, 1)
    return jax.nn.logsumexp(scores_RxN, axis=-1) - jnp.where(ids == x0_R[:, None], scores_RxN, 0).sum(-1)


def _read(process: NoisingProcess, reading: str, logits_RxV: Array, zt_R: Array, alpha_R: Array) -> Array:
    """Scores [R, N] of p(x | z_t), -inf where impossible; the network's own where all is impossible."""
    likelihood_RxN = jax.vmap(process.likelihood)(zt_R, alpha_R)
    ids = jax.lax.broadcasted_iota(zt_R.dtype, likelihood_RxN.shape, 1)
    shuffle_RxN = (ids == zt_R[:, None]).astype(likelihood_RxN.dtype) + 1 / process.num_tokens
    factor_RxN = choose("noising.reading", reading, READINGS)(likelihood_RxN, shuffle_RxN)
    factor_RxN = jnp.where((factor_RxN > 0).any(-1, keepdims=True), factor_RxN, 1)
    return logits_RxV[:, : process.num_tokens] + jnp.log(factor_RxN)


def law(process: NoisingProcess, alpha: ArrayLike) -> Law:
    """The marginals and the rates of a process at one alpha < 1 (a scalar); rates by differentiation of the kernel.

    >>> from hdlm_jax.diffusion.noising import gamma_hybrid
    >>> [round(float(x), 4) for x in law(gamma_hybrid(num_tokens=2, gamma=0.5), 0.25)]
    [0.25, 0.125, 0.5, 1.0, 2.0, 0.0]
    """
    N, alpha = process.num_tokens, jnp.asarray(alpha)
    marginal_V = process.marginal(0, alpha)

    def kernel(alpha_to):
        of_token, of_mask = (process.transition(z, alpha, alpha_to) for z in (0, N))
        return jnp.stack([of_token[1], of_token[N], of_mask[0]])

    _, rates = jax.jvp(kernel, (alpha,), (-jnp.ones_like(alpha),))
    return Law(marginal_V[0] - marginal_V[1], marginal_V[1], marginal_V[N], *rates)


def integrand(
    process: NoisingProcess, reading: str, logits_RxV: Array, x0_R: Array, zt_R: Array, alpha_R: Array
) -> Array:
    """The limit of KL / (alpha_s - alpha_t) for close alphas below 1, nats per unit of alpha [R]."""
    N = process.num_tokens
    at = Law(*(x[:, None] for x in jax.vmap(partial(law, process))(alpha_R)))
    x0, zt = x0_R[:, None], zt_R[:, None]
    masked, clean = zt == N, zt == x0
    probs_RxN = jax.nn.softmax(logits_RxV, axis=-1)[:, :N]
    ids = jax.lax.broadcasted_iota(zt_R.dtype, probs_RxN.shape, 1)
    p_z = jnp.where(ids == zt, probs_RxN, 0).sum(-1, keepdims=True)
    other = jnp.maximum(at.other, jnp.finfo(at.other.dtype).tiny ** 0.5)  # 0 at alpha = 0 alone, where its rate is 0
    kappa = at.keep / other
    own = jnp.log1p(kappa)  # log q(x | x) / other
    evidence = jnp.where(clean, own, 0)  # log q(z | x) / other, where z is no mask
    if reading == "cavity":
        scale, offset = kappa, evidence - jnp.log1p(kappa * p_z)
    else:
        rest = jnp.where(ids == zt, 0, probs_RxN).sum(-1, keepdims=True)  # 1 - p_z would cancel
        total = jnp.log1p(kappa * rest) - own  # log of other times sum_x p(x) / q(z | x)
        scale, offset = kappa * jnp.exp(jnp.where(masked, 0, -total)), evidence + total
    offset = jnp.where(masked, 0, offset)  # rho of the mask, and of every y with neither x = y nor xbar_y > 0
    rho_RxN = jnp.log1p(scale * probs_RxN) - jnp.where(ids == x0, own, 0) + offset
    weight_RxN = jnp.where(ids == zt, 0, jnp.where(ids == x0, 1 + kappa, 1))
    tokens = (weight_RxN * excess(rho_RxN)).sum(-1, keepdims=True)
    at_mask = at.token_mask * other / jnp.where(masked, at.mask, 1) * tokens
    at_token = (at.token_token * tokens + at.mask_token * at.mask / other * excess(offset)) * jnp.exp(-evidence)
    return jnp.where(masked, at_mask, at_token)[:, 0]


def prior_divergence(process: NoisingProcess, alpha: float, x0: Array) -> Array:
    """KL(q(. | x0) at alpha || its mean over a uniform x), nats, of x0's shape; 0 at alpha = 0.

    O(V) where the divergence is the same for every token (`CONTINUOUS`), else O(N V) once.

    >>> from hdlm_jax.diffusion.noising import absorb
    >>> prior_divergence(absorb(num_tokens=4), 0.5, jnp.array([0, 3])).round(4).tolist()
    [0.6931, 0.6931]
    """
    if alpha == 0:
        return jnp.zeros(x0.shape)
    marginal = lambda x: process.marginal(x, alpha)
    token_N = jnp.arange(process.num_tokens)
    if process.name in CONTINUOUS:
        at, ordinary_V = marginal(0), jnp.arange(process.num_states) < process.num_tokens
        mean_V = jnp.where(ordinary_V, at[:-1].mean(), at)
        return jnp.full(x0.shape, divergence(at, mean_V))
    zeros_V = jnp.zeros_like(marginal(0))
    mean_V = jax.lax.scan(lambda total_V, x: (total_V + marginal(x), None), zeros_V, token_N)[0] / process.num_tokens
    return jax.lax.map(lambda x: divergence(marginal(x), mean_V), token_N)[x0]


def terms(process: NoisingProcess, reading: str, continuous: bool) -> Callable[..., dict[str, Array]]:
    """(logits_RxV, x0_R, zt_R, phase of [R] fields) -> {"diffusion", "reconstruction"}: nats [R] each.

    Args:
      process: any noising process; for continuous times one of `CONTINUOUS`.
      reading: 'cavity', 'posterior', or another that the process knows.
      continuous: whether the phases are of continuous times.

    Raises:
      UserError: a reading that the process does not know; one ordinary token only.
    """
    one_of("noising.reading", reading, process.readings)
    require(process.num_tokens > 1, "noising.num_tokens", process.num_tokens, "at least 2")

    def of(logits_RxV: Array, x0_R: Array, zt_R: Array, phase: Phase) -> dict[str, Array]:
        falls, last = (phase.steps > 0) & (phase.last_weight == 0), phase.last_weight > 0
        if continuous:
            alpha = jnp.where(falls, phase.alpha_t, 0.5)  # no rate at alpha = 1
            nats_R = integrand(process, reading, logits_RxV, x0_R, zt_R, alpha)
        else:
            alpha_s = jnp.where(falls, phase.alpha_s, phase.alpha_t)
            nats_R = step_divergence(process, reading, logits_RxV, x0_R, zt_R, phase.alpha_t, alpha_s)
        rest_R = posterior_nats(process, reading, logits_RxV, x0_R, zt_R, phase.alpha_t)
        parts = jnp.where(falls, phase.steps, 0) * nats_R, jnp.where(last, phase.last_weight * rest_R, 0)
        return dict(zip(TERMS, parts, strict=True))

    return of
