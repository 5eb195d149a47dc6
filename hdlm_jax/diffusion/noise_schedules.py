"""Noise schedules: the survival alpha of a token as a function of the noise fraction u.

u = level / tau_max runs from 0 (clean) to 1 (pure noise), alpha from 1 to 0 unless the schedule says
otherwise; sigma = -log alpha. A schedule is a pair of functions on arrays of any shape, the result in the
dtype of u: `alpha` and its `derivative`. Schedules are hashable values, equal if built from equal arguments.

>>> schedule = cosine()
>>> schedule.alpha(jnp.array([0.0, 0.5, 1.0])).round(4).tolist()
[1.0, 0.2929, 0.0]
>>> schedule.derivative(jnp.array([0.0, 0.5, 1.0])).round(4).tolist()
[-1.5708, -1.1107, 0.0]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion.fields import arguments, number
from hdlm_jax.errors import choose, require

SIGMA_MARGIN = 1e-4


class NoiseSchedule(NamedTuple):
    """A noise schedule; called like a function it is its `alpha`.

    Attributes:
      name: the builder and its arguments.
      alpha: u -> survival in [0, 1], never rising.
      derivative: u -> d alpha / du.
      shown: the schedule whose range of sigma a network knows, where it was trained under another; None: this one.
    """

    name: str
    alpha: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    shown: "NoiseSchedule | None" = None

    def __call__(self, u: Array) -> Array:
        """alpha(u)."""
        return self.alpha(u)

    def sigma(self, alpha: Array, margin: float = SIGMA_MARGIN) -> Array:
        """-log alpha clipped to `sigma_range(margin)`: finite at every alpha, in alpha's dtype.

        >>> linear().sigma(jnp.array([1.0, 0.5, 0.0])).round(4).tolist()
        [0.0001, 0.6931, 9.2103]
        """
        alpha = _floating(alpha)
        of = self if self.shown is None else self.shown
        return jnp.clip(-jnp.log(alpha), *sigma_range(of, margin)).astype(alpha.dtype)


@cache
def sigma_range(schedule: NoiseSchedule, margin: float = SIGMA_MARGIN) -> tuple[float, float]:
    """(sigma(u = margin), sigma(u = 1 - margin)), computed in float64, inside `jit` too."""
    with jax.enable_x64(), jax.ensure_compile_time_eval():
        low, high = -np.log(np.asarray(schedule.alpha(np.array([margin, 1 - margin]))))
    return float(low), float(high)


@dataclass(frozen=True)
class Bound:
    """A function of u with its parameters: called with u, equal to others of the same function and values."""

    function: Callable[..., Array]
    parameters: tuple[Any, ...] = ()

    def __call__(self, u: Array) -> Array:
        """The function at u, in u's dtype (float32, or float64 in x64 mode, for integers)."""
        return self.function(_floating(u), *self.parameters)


def _linear_alpha(u: Array, eps: float) -> Array:
    return (1 - u) + eps * u


def _linear_derivative(u: Array, eps: float) -> Array:
    return jnp.full_like(u, eps - 1)


def linear(eps: float = 0.0) -> NoiseSchedule:
    """alpha = 1 - (1 - eps) u with eps in [0, 1) left at u = 1: log-linear in sigma (MDLM, SEDD)."""
    eps = number("noise_schedule.eps", eps, "a number in [0, 1)", lambda x: 0 <= x < 1)
    return _schedule(f"linear(eps={eps:g})", _linear_alpha, _linear_derivative, eps)


def _cosine_alpha(u: Array) -> Array:
    # two equal forms, each free of cancellation and exact at its own end
    noisy = 2 * jnp.square(jnp.sin(math.pi / 4 * (1 - u)))
    return jnp.where(u < 0.5, 1 - jnp.sin(math.pi / 2 * u), noisy)


def _cosine_derivative(u: Array) -> Array:
    return -math.pi / 2 * jnp.sin(math.pi / 2 * (1 - u))


def cosine() -> NoiseSchedule:
    """alpha = 1 - cos(pi/2 (1 - u))."""
    return _schedule("cosine()", _cosine_alpha, _cosine_derivative)


def _polynomial_alpha(u: Array, w: float) -> Array:
    return jnp.abs(jnp.expm1(w * jnp.log(u)))  # 1 - u^w without cancellation at u = 1


def _polynomial_derivative(u: Array, w: float) -> Array:
    return -w * u ** (w - 1)


def polynomial(w: float) -> NoiseSchedule:
    """alpha = 1 - u^w, w > 0. Below w = 1 the derivative at u = 0 is -inf."""
    w = number("noise_schedule.w", w, "a number above 0", lambda x: x > 0)
    return _schedule(f"polynomial(w={w:g})", _polynomial_alpha, _polynomial_derivative, w)


def _geometric_sigma(u: Array, smin: float, smax: float) -> Array:
    return jnp.exp((1 - u) * math.log(smin) + u * math.log(smax))


def _geometric_alpha(u: Array, smin: float, smax: float) -> Array:
    return jnp.exp(-_geometric_sigma(u, smin, smax))


def _geometric_derivative(u: Array, smin: float, smax: float) -> Array:
    sigma = _geometric_sigma(u, smin, smax)
    return -math.log(smax / smin) * sigma * jnp.exp(-sigma)


def geometric(smin: float, smax: float) -> NoiseSchedule:
    """alpha = exp(-sigma), sigma = smin^(1-u) smax^u, 0 < smin < smax (SEDD).

    alpha(0) = exp(-smin) and alpha(1) = exp(-smax) are neither 1 nor 0: a bound under it has a
    reconstruction and a prior term.
    """
    smin = number("noise_schedule.smin", smin, "a number above 0", lambda x: x > 0)
    smax = number("noise_schedule.smax", smax, f"a number above smin ({smin:g})", lambda x: x > smin)
    name = f"geometric(smin={smin:g}, smax={smax:g})"
    return _schedule(name, _geometric_alpha, _geometric_derivative, smin, smax)


def _clipped_alpha(u: Array, base: NoiseSchedule, eps: float) -> Array:
    return (1 - 2 * eps) * base.alpha(u) + eps


def _clipped_derivative(u: Array, base: NoiseSchedule, eps: float) -> Array:
    return (1 - 2 * eps) * base.derivative(u)


def clipped(base: NoiseSchedule, eps: float) -> NoiseSchedule:
    """alpha = (1 - 2 eps) base + eps, eps in [0, 1/2): from 1 - eps down to eps for a base from 1 to 0."""
    allowed = "a noise schedule (in a config, its name)"
    require(isinstance(base, NoiseSchedule), "noise_schedule.base", base, allowed)
    eps = number("noise_schedule.eps", eps, "a number in [0, 1/2)", lambda x: 0 <= x < 0.5)
    return _schedule(f"clipped({base.name}, eps={eps:g})", _clipped_alpha, _clipped_derivative, base, eps)


def _plateau_alpha(u: Array, base: NoiseSchedule, t_on: float, t_off: float, alpha_on: float) -> Array:
    before, after = base.alpha(jnp.clip((u - t_on) / (1 - t_on), 0, 1)), base.alpha(jnp.clip(u / t_off, 0, 1))
    falling, rest = alpha_on * before, jnp.full_like(u, alpha_on)
    return jnp.where(u > t_on, falling, jnp.where(u >= t_off, rest, alpha_on + (1 - alpha_on) * after))


def _plateau_derivative(u: Array, base: NoiseSchedule, t_on: float, t_off: float, alpha_on: float) -> Array:
    before = base.derivative(jnp.clip((u - t_on) / (1 - t_on), 0, 1)) * alpha_on / (1 - t_on)
    after = base.derivative(jnp.clip(u / t_off, 0, 1)) * (1 - alpha_on) / t_off
    return jnp.where(u > t_on, before, jnp.where(u >= t_off, 0, after))


def plateau(base: NoiseSchedule, t_on: float, t_off: float, alpha_on: float) -> NoiseSchedule:
    """A schedule for sampling that rests: alpha rises to alpha_on at u = t_on, stays until t_off, then rises to 1.

    It rises as `base` does, each time over the whole of its range. A network trained under `base` runs under it, for
    only the pace of the calls is another (ReMDM's loop).

    Args:
      base: from alpha 1 to 0.
      t_on, t_off: noise fractions, 0 < t_off < t_on < 1, between which alpha is alpha_on.
      alpha_on: in (0, 1).

    >>> plateau(linear(), t_on=0.5, t_off=0.1, alpha_on=0.9).alpha(jnp.array([1.0, 0.75, 0.5, 0.1, 0.05, 0.0])).tolist()
    [0.0, 0.45, 0.9, 0.9, 0.95, 1.0]
    """
    inside = lambda low, high: lambda x: low < x < high
    t_on = number("sampler.t_on", t_on, "a number in (0, 1)", inside(0, 1))
    t_off = number("sampler.t_off", t_off, f"a number in (0, {t_on:g}), below t_on", inside(0, t_on))
    alpha_on = number("sampler.alpha_on", alpha_on, "a number in (0, 1)", inside(0, 1))
    name = f"plateau({base.name}, t_on={t_on:g}, t_off={t_off:g}, alpha_on={alpha_on:g})"
    made = _schedule(name, _plateau_alpha, _plateau_derivative, base, t_on, t_off, alpha_on)
    return made._replace(shown=base)


def _schedule(name: str, alpha: Callable, derivative: Callable, *parameters: Any) -> NoiseSchedule:
    return NoiseSchedule(name, Bound(alpha, parameters), Bound(derivative, parameters))


BUILDERS: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "geometric": geometric,
    "clipped": clipped,
}


def build(kind: str, **fields: Any) -> NoiseSchedule:
    """The schedule that a config names: `BUILDERS[kind](**fields)`; None counts as not given.

    For 'clipped', `base` is a kind too, and the fields other than eps are the base's.

    Raises:
      UserError: for an unknown kind, and for fields that are unknown, missing or out of range, by name
        ('noise_schedule.eps').

    >>> build("clipped", base="polynomial", w=2, eps=0.01).name
    'clipped(polynomial(w=2), eps=0.01)'
    """
    builder = choose("noise_schedule.kind", kind, BUILDERS)
    if kind == "clipped" and isinstance(fields.get("base"), str):
        choose("noise_schedule.base", fields["base"], {k: b for k, b in BUILDERS.items() if k != "clipped"})
        of_base = {name: value for name, value in fields.items() if name not in ("base", "eps")}
        fields = {"base": build(fields["base"], **of_base), "eps": fields.get("eps")}
    return builder(**arguments("noise_schedule", kind, builder, fields))


def _floating(u: Any) -> Array:
    """u as a floating array, its own dtype kept where it is floating already."""
    u = jnp.asarray(u)
    return u if jnp.issubdtype(u.dtype, jnp.floating) else u.astype(jnp.result_type(float))
