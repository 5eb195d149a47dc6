"""Checks of the fields of a config block, by their dotted names.

Every function raises `UserError` that names the field, what was given and what is allowed.
"""

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Real
from typing import Any

from hdlm_jax.errors import require, unknown

INT32_MAX = 2**31 - 1
MAX_DENOMINATOR = 10**6  # of the fractions that a float stands for


def arguments(block: str, kind: str, builder: Callable, fields: Mapping[str, Any], skip: int = 0) -> dict[str, Any]:
    """The fields that are given (not None) for the parameters of `builder`, the first `skip` left out.

    Unknown and missing ones are refused.

    >>> arguments("noise_schedule", "linear", lambda eps=0.0: eps, {"eps": 0.5, "w": None})
    {'eps': 0.5}
    """
    parameters = list(inspect.signature(builder).parameters.values())[skip:]
    names = [parameter.name for parameter in parameters]
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in names and not names:
            require(False, f"{block}.{name}", value, f"nothing, {kind!r} has no fields")
        if name not in names:
            raise unknown(f"{block}.{name}", name, names)
    for parameter in parameters:
        needed = parameter.default is inspect.Parameter.empty
        allowed = f"a value, since {kind!r} needs one"
        require(parameter.name in given or not needed, f"{block}.{parameter.name}", None, allowed)
    return given


def whole(field: str, value: Any, low: int, high: int = INT32_MAX, high_is: str = "") -> int:
    """`value` as an int in low..high; bools and floats are refused. `high_is` says what the limit is.

    >>> whole("hyperschedule.width", 65, 1, 64, "the length")
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: hyperschedule.width: got 65; allowed: a whole number from 1 to 64 (the length)
    """
    allowed = f"a whole number from {low} to {high}" + (f" ({high_is})" if high_is else "")
    is_whole = hasattr(type(value), "__index__") and not isinstance(value, bool)
    require(is_whole and low <= value <= high, field, value, allowed)
    return operator.index(value)


def seed(field: str, value: Any) -> int:
    """`value` as the seed of random numbers, 0..2^32 - 1."""
    return whole(field, value, 0, 2**32 - 1)


def number(field: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> float:
    """`value` as a finite float for which `holds`; `allowed` says in words what that is."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    require(is_number and holds(float(value)), field, value, allowed)
    return float(value)


def fraction(field: str, value: Any) -> Fraction:
    """`value` as an exact fraction; a float is the simplest fraction that rounds to it.

    >>> [str(fraction("hyperschedule.rate", value)) for value in (2, 1.5, 1 / 3, "3/2", "0.5")]
    ['2', '3/2', '1/3', '3/2', '1/2']
    """
    exact = None
    if isinstance(value, Real | str) and not isinstance(value, bool):
        try:
            exact = Fraction(value)
        except (ValueError, OverflowError, ZeroDivisionError):
            exact = None
    if exact is not None and isinstance(value, float):
        simple = exact.limit_denominator(MAX_DENOMINATOR)
        exact = simple if float(simple) == value else None
    require(exact is not None, field, value, "a whole number or a fraction such as 1.5 or '3/2'")
    return exact


def width_and_rate(width: Any, rate: Any, limit: int, limit_is: str) -> tuple[int, Fraction, int]:
    """(width, rate, tau_max = width / rate), or `UserError` that names the nearest values that work.

    >>> width_and_rate(6, "3/2", 64, "the length")
    (6, Fraction(3, 2), 4)
    >>> width_and_rate(16, 3, 64, "the length")
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: hyperschedule.rate: got '3'; allowed: width / rate a whole number of calls:
    with width 16, rate 16/5 or 8/3; with rate 3, width 15 or 18
    """
    width, rate = (
        whole("hyperschedule.width", width, 1, limit, limit_is),
        fraction("hyperschedule.rate", rate),
    )
    require(0 < rate <= width, "hyperschedule.rate", str(rate), f"above 0 and at most the width ({width})")
    calls = width / rate
    rates = [str(Fraction(width, whole_calls)) for whole_calls in (int(calls), int(calls) + 1)]
    below = width // rate.numerator * rate.numerator
    widths = [str(near) for near in (below, below + rate.numerator) if rate <= near <= limit and near > 0]
    nearest = f"with width {width}, rate {' or '.join(rates)}"
    nearest += f"; with rate {rate}, width {' or '.join(widths)}" if widths else ""
    allowed = f"width / rate a whole number of calls: {nearest}"
    require(calls.denominator == 1, "hyperschedule.rate", str(rate), allowed)
    return width, rate, int(calls)


def within_int32(field: str, value: Any, largest: int) -> None:
    """Refuses a schedule whose largest step or product overflows int32."""
    require(largest <= INT32_MAX, field, value, f"steps, levels and their products up to {INT32_MAX}")
