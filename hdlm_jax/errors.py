"""One clear error for bad input: it names the field, what was given and what is allowed.

The command line prints a `UserError` as one line and exits with 2; any other exception is a
defect of this package and keeps its traceback.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input: the message names the field, what was given and what is allowed."""


def require(condition: bool, field: str, given: Any, allowed: str) -> None:
    """Raises `UserError` naming `field`, what was `given` and what is `allowed` unless `condition`.

    >>> require(0 <= 0.5 < 1, "noising.epsilon", 0.5, "a number in [0, 1)")
    >>> require(False, "noising.epsilon", 2, "a number in [0, 1)")
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: noising.epsilon: got 2; allowed: a number in [0, 1)
    """
    if not condition:
        raise UserError(f"{field}: got {given!r}; allowed: {allowed}")


def choose(field: str, name: str, table: Mapping[str, T]) -> T:
    """Returns `table[name]`; an unknown name raises `UserError` that lists the choices.

    >>> choose("sampler.kind", "acs", {"acs": 1, "ancestral": 2})
    1
    >>> choose("sampler.kind", "asc", {"acs": 1, "ancestral": 2})
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: sampler.kind: got 'asc' (did you mean 'acs'?); allowed: 'acs', 'ancestral'
    """
    if name in table:
        return table[name]
    raise unknown(field, name, table)


def one_of(field: str, name: str, choices: Iterable[str]) -> str:
    """Returns `name`, one of `choices`; else raises as `choose`.

    >>> one_of("weights", "ema", ("ema", "raw"))
    'ema'
    """
    return choose(field, name, {choice: choice for choice in choices})


def unknown(field: str, name: Any, choices: Iterable[str]) -> UserError:
    """The error for a `name` that is none of `choices`, with the nearest one suggested."""
    choices = sorted(choices)
    near = get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"{field}: got {name!r}{hint}; allowed: {', '.join(map(repr, choices))}")
