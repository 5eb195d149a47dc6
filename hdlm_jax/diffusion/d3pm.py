"""Random walks over token ids: the structured processes of D3PM (Austin et al. 2021), without a mask.

A token jumps at rate 1, to each of the `2 width` ids at distance 1 .. width with equal probability. The ids form a
cycle, or a line with reflecting ends, which is a walk of width 1 on the cycle of 2N folded in the middle. The
clock is sigma = -log alpha, the mean number of jumps; alpha is the probability of none, and 0 is the limit of
endless jumps, the uniform law. An alpha below 2^-126, the least that float32 holds, counts as 0.

A displacement d after the time sigma has the law k_sigma(d) = sum_n e^-sigma sigma^n / n! P_n(d), P_n the law
after n jumps. It equals the spectral form, the inverse FFT of exp(sigma lam_q) with lam_q = sum_{d=1..width}
cos(2 pi q d / M) / width - 1 on the cycle of M; but every term is positive, so rare displacements, of which an
FFT leaves rounding noise of either sign, keep their relative accuracy, and divergences stay finite.
Displacements rarer than 1e-18 are impossible here: quotients of what is left fit float32, and so do their
gradients. A posterior between such tokens keeps its token.

Kernels are symmetric, hold for one position, and have V = N + 1 entries, 0 for the mask. With D = min(M, 512 width
+ 1) displacements, a row costs O(D), after 257 D products for k_sigma; the reverse kernel O(N D) time but O(N + D)
memory, so that a batch of positions needs no table of V x V. `sample` draws the displacement from its law, O(D).
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hdlm_jax.diffusion import chains
from hdlm_jax.diffusion.categorical import categorical
from hdlm_jax.diffusion.chains import as_float, one_hot
from hdlm_jax.errors import choose

JUMPS = 256  # at most; sigma <= 87 makes more with a probability below 1e-48
ALPHA_MIN = 2.0**-126
IMPOSSIBLE = 1e-18
NO_GRADIENT = 1e-30  # entries below it pass none: that of their logarithm would overflow on its way


class Walk(NamedTuple):
    """A random walk of N ids.

    Attributes:
      num_tokens: N.
      width: the longest jump; less than half the cycle.
      reflects: whether the ids are a line with reflecting ends (width 1) rather than a cycle.
    """

    num_tokens: int
    width: int
    reflects: bool

    @property
    def cycle(self) -> int:
        """M, the states of the cycle that is walked."""
        return 2 * self.num_tokens if self.reflects else self.num_tokens

    @property
    def reach(self) -> tuple[int, int]:
        """How far the walk gets to the left and to the right."""
        displacements = min(2 * JUMPS * self.width + 1, self.cycle)
        return (displacements - 1) // 2, displacements // 2


def marginal(walk: Walk, x0: ArrayLike, alpha: ArrayLike) -> Array:
    """q(z | x0) [V]."""
    alpha = as_float(alpha)
    return jnp.append(_row(walk, jnp.ones_like(alpha), alpha, x0), 0)


def transition(walk: Walk, z: ArrayLike, alpha_from: ArrayLike, alpha_to: ArrayLike) -> Array:
    """q(z_to | z_from = z) [V], alpha_from >= alpha_to."""
    row_V = jnp.append(_row(walk, as_float(alpha_from), as_float(alpha_to), z), 0)
    return jnp.where(jnp.equal(z, walk.num_tokens), one_hot(z, row_V), row_V)


def likelihood(walk: Walk, zt: ArrayLike, alpha_t: ArrayLike) -> Array:
    """q(zt | x) [N] for every x."""
    alpha_t = as_float(alpha_t)
    return _row(walk, jnp.ones_like(alpha_t), alpha_t, zt)


def posterior(walk: Walk, zt: ArrayLike, x0: ArrayLike, alpha_t: ArrayLike, alpha_s: ArrayLike) -> Array:
    """q(z_s | zt, x0) [V] ∝ q(z_s | x0) q(zt | z_s), alpha_s >= alpha_t."""
    alpha_t, alpha_s = as_float(alpha_t), as_float(alpha_s)
    before_N = _row(walk, jnp.ones_like(alpha_s), alpha_s, x0)
    return _normalised(zt, before_N * _row(walk, alpha_s, alpha_t, zt), alpha_s > alpha_t)


def reverse(
    walk: Walk,
    zt: ArrayLike,
    x0_probs_N: Array,
    alpha_t: ArrayLike,
    alpha_s: ArrayLike,
    reading: str = "posterior",
) -> Array:
    """sum_x p(x | zt) q(z_s | zt, x) [V] with p read from x0_probs.

    That is ∝ q(zt | y) sum_x q(y | x) w_x for z_s = y, where w_x = p(x | zt) / q(zt | x).
    """
    alpha_t, alpha_s = as_float(alpha_t), as_float(alpha_s)
    likelihood_N = likelihood(walk, zt, alpha_t)
    w_N = _quotients(likelihood_N, zt, x0_probs_N, reading)
    before_N = _walked(walk, jnp.ones_like(alpha_s), alpha_s, w_N)
    return _normalised(zt, before_N * _row(walk, alpha_s, alpha_t, zt), alpha_s > alpha_t)


def sample(walk: Walk, rng: Array, x0: ArrayLike, alpha: ArrayLike) -> Array:
    """Draws of q(z | x0), of x0's shape and dtype; D numbers per position."""
    walk_rng, token_rng = jax.random.split(rng)
    x0, alpha = jnp.asarray(x0), as_float(alpha)
    alpha = alpha.astype(jnp.promote_types(alpha.dtype, jnp.float32))
    law = jnp.vectorize(lambda a: displacements(walk, jnp.ones_like(a), a), signature="()->(d)")(alpha)
    law = jnp.broadcast_to(law, (*x0.shape, law.shape[-1]))
    place = jnp.mod(x0 + categorical(walk_rng, jnp.log(law)) - walk.reach[0], walk.cycle)
    walked = jnp.minimum(place, walk.cycle - 1 - place) if walk.reflects else place
    token = jax.random.randint(token_rng, x0.shape, 0, walk.num_tokens, x0.dtype)
    return jnp.where(jnp.broadcast_to(alpha, x0.shape) < ALPHA_MIN, token, walked.astype(x0.dtype))


def prior(walk: Walk, rng: Array, shape: tuple[int, ...], alpha: ArrayLike = 0.0) -> Array:
    """Draws of the noise, int32: uniform tokens, at every alpha."""
    return jax.random.randint(rng, shape, 0, walk.num_tokens, jnp.int32)


def displacements(walk: Walk, alpha_from: Array, alpha_to: Array) -> Array:
    """k [D]: the law of the displacement between two alphas >= 2^-126, from `reach[0]` to the left on.

    >>> displacements(Walk(num_tokens=4, width=1, reflects=False), jnp.ones(()), jnp.array(0.5)).round(3).tolist()
    [0.188, 0.562, 0.188, 0.062]
    """
    survival, lost = chains.ratio(alpha_from, alpha_to)
    sigma = -chains.log_survival(survival, lost)
    terms = jnp.where(alpha_to < ALPHA_MIN, 0, sigma) / jnp.arange(1, JUMPS + 1, dtype=sigma.dtype)
    weight_J = jnp.append(jnp.ones_like(sigma), jnp.cumprod(terms))  # of n jumps: sigma^n / n!
    after_JxD = jnp.asarray(after_jumps(walk), sigma.dtype)
    law_D = jnp.matmul(weight_J / weight_J.sum(), after_JxD, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(law_D < IMPOSSIBLE, 0, law_D)


@lru_cache(maxsize=8)
def after_jumps(walk: Walk) -> np.ndarray:
    """[JUMPS + 1, D] float64: the law of the displacement after 0, 1, .. jumps.

    >>> after_jumps(Walk(num_tokens=4, width=1, reflects=False))[:3].tolist()
    [[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]]
    """
    left, right = walk.reach
    law_M = (np.arange(walk.cycle) == left).astype(float)
    laws = [law_M]
    for _ in range(JUMPS):
        padded = np.pad(laws[-1], walk.width, mode="wrap")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * walk.width + 1)
        jumped = windows[:, : walk.width].sum(-1) + windows[:, walk.width + 1 :].sum(-1)
        laws.append(jumped / (2 * walk.width))
    return np.stack(laws)[:, : left + right + 1]


def _row(walk: Walk, alpha_from: Array, alpha_to: Array, z: ArrayLike) -> Array:
    """[N]: the law of the noisier token given `z`, or the probability that each token becomes `z`."""
    N, M, left = walk.num_tokens, walk.cycle, walk.reach[0]
    law_D = displacements(walk, alpha_from, alpha_to)
    law_M = jnp.pad(law_D, (0, M - law_D.shape[0]))
    arrives = lambda place_N: law_M[jnp.mod(place_N - z + left, M)]
    ids_N = jnp.arange(N)
    row_N = arrives(ids_N) + (arrives(M - 1 - ids_N) if walk.reflects else 0)
    row_N = jnp.where(_forgets(alpha_from, alpha_to), jnp.full_like(row_N, 1 / N), row_N)
    return jnp.where(jnp.equal(z, N), 0, row_N)


def _walked(walk: Walk, alpha_from: Array, alpha_to: Array, w_N: Array) -> Array:
    """[N]: sum_x w_x q(y | x) for every y, one y at a time."""
    law_D = displacements(walk, alpha_from, alpha_to)
    padded = jnp.pad(w_N, walk.reach, mode="symmetric" if walk.reflects else "wrap")
    at = lambda y: (law_D * jax.lax.dynamic_slice(padded, (y,), law_D.shape)).sum()
    walked_N = jax.lax.map(at, jnp.arange(walk.num_tokens))
    return jnp.where(_forgets(alpha_from, alpha_to), jnp.full_like(walked_N, w_N.mean()), walked_N)


def _quotients(likelihood_N: Array, zt: ArrayLike, x0_probs_N: Array, reading: str) -> Array:
    """p(x | zt) / q(zt | x) [N], 0 for an impossible x; uniform probabilities where none is given to a possible one.

    The reading's factor is divided by q before it meets the network's probabilities: theirs are as small as q, and
    the gradient of p / q would overflow.
    """
    shuffle_N = one_hot(zt, likelihood_N) + 1 / likelihood_N.shape[0]
    factor_N = choose("noising.reading", reading, chains.READINGS)(likelihood_N, shuffle_N)
    possible_N = likelihood_N > 0
    w_N = jnp.where(possible_N, factor_N / jnp.where(possible_N, likelihood_N, 1), 0)
    given = (x0_probs_N * w_N * likelihood_N).sum() > 0
    w_N = w_N * jnp.where(given, x0_probs_N, jnp.ones_like(x0_probs_N))
    total = jax.lax.stop_gradient((w_N * likelihood_N).sum())
    return w_N / jnp.where(total > 0, total, 1)


def _forgets(alpha_from: Array, alpha_to: Array) -> Array:
    return (alpha_to < ALPHA_MIN) & (alpha_to < alpha_from)


def _normalised(zt: ArrayLike, table_N: Array, falls: Array) -> Array:
    """The table normalised [V]; `zt` itself where nothing is possible or the noise does not fall."""
    table_N = jnp.where(table_N < NO_GRADIENT, jax.lax.stop_gradient(table_N), table_N)
    total = table_N.sum()
    table_V = jnp.append(table_N / jnp.where(total > 0, total, 1), 0)
    return jnp.where((total > 0) & falls, table_V, one_hot(zt, table_V))
