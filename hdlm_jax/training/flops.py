"""Floating-point operations of a program, counted from its jaxpr, and peak rates of known devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from hdlm_jax.training.step import Update, train_step

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def count(function: Callable, *args) -> float:
    """FLOPs of the matrix products of one call, loops included (recomputation too); of a choice, the dearest.

    >>> import jax.numpy as jnp
    >>> count(lambda a, b: a @ b, jnp.zeros((2, 3)), jnp.zeros((3, 4)))
    48.0
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def of_step(update: Update, state: Any, batch: Any, rng: Any, remat: str = "none") -> float:
    """FLOPs of one training step, by default without what a backward pass only computes anew.

    Counted with the reference attention, for kernels hide their products. Takes what `train_step` takes, or shapes.
    """
    model = dataclasses.replace(update.parts.model, attention="xla", remat=remat)
    step = functools.partial(train_step, update._replace(parts=update.parts._replace(model=model)))
    return count(step, state, batch, rng)


def peak(devices: list[jax.Device]) -> float | None:
    """Peak bfloat16 FLOP/s of all devices together, or None where it is not known (a CPU, say)."""
    rate = PEAK_FLOPS.get(devices[0].device_kind)
    return None if rate is None else rate * len(devices)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        inside = [_count(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        total += repeats * (max(inside) if equation.primitive.name == "cond" else sum(inside))
    return total
