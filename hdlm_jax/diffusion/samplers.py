"""Every sampler by name: the reverse steps, the rules that mask again, and the orders of unmasking."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hdlm_jax.diffusion import orders, remasking, reverse
from hdlm_jax.diffusion.fields import arguments
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.rules import Rule, positionwise
from hdlm_jax.errors import choose, require

SAMPLERS: Mapping[str, Callable[..., Any]] = {**reverse.SAMPLERS, **remasking.RULES, **orders.RULES}


def build(kind: str, process: NoisingProcess, reading: str | None = None, **dials: Any) -> Rule:
    """The rule of the sampler named `kind` for a process and a reading; a dial that is None is not given.

    Raises:
      UserError: an unknown kind, a dial that it does not have or misses, a value out of range.

    >>> from hdlm_jax.diffusion.noising import epsilon_hybrid
    >>> build("acs", epsilon_hybrid(num_tokens=10, epsilon=0.1), eta=2)
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: sampler.eta: got 2; allowed: a number in [0, 1]
    """
    factory, own = choose("sampler.kind", kind, SAMPLERS), dials_of(kind)
    for name, value in dials.items():
        allowed = f"nothing: {kind!r} has {'the dials ' + ', '.join(own) if own else 'no dials'}"
        require(value is None or name in own, f"sampler.{name}", value, allowed)
    made = factory(process, **arguments("sampler", kind, factory, {"reading": reading, **dials}, skip=1))
    return positionwise(made) if kind in reverse.SAMPLERS else made


def dials_of(kind: str) -> tuple[str, ...]:
    """The names of a sampler's dials.

    >>> dials_of("acs"), dials_of("ancestral"), dials_of("remdm_switch")
    (('eta',), (), ('eta', 't_switch'))
    """
    factory = choose("sampler.kind", kind, SAMPLERS)
    return tuple(name for name in inspect.signature(factory).parameters if name not in ("process", "reading"))


DIALS = tuple(dict.fromkeys(name for kind in SAMPLERS for name in dials_of(kind)))


def check(kind: str, hs: Hyperschedule, conditioned: bool) -> None:
    """Refuses hyperschedules under which a sampler is not what its name says.

    Args:
      conditioned: whether the network sees the noise level.

    Raises:
      UserError: masking again in a position's only call; `first_hitting` at another pace than one token a call, or
        where positions differ in noise, or with a network that sees it.

    >>> from hdlm_jax.diffusion.hyperschedules import flat
    >>> check("first_hitting", flat(length=8, steps=4), conditioned=False)
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: hyperschedule: got 'flat: L=8, width 8, rate 2, tau_max 4, T=4 calls, 4 window rows per
    token'; allowed: quenched, flat or block at rate 1 for sampler.kind 'first_hitting', which unmasks one token a call
    """
    if kind in (*remasking.RULES, "mask_predict"):
        allowed = f"tau_max of 2 or more for sampler.kind {kind!r}: nothing is masked again in a position's only call"
        require(hs.tau_max > 1, "hyperschedule", hs.describe(), allowed)
    if kind == "first_hitting":
        even = hs.kind in ("quenched", "flat", "block") and hs.rate == 1
        allowed = f"quenched, flat or block at rate 1 for sampler.kind {kind!r}, which unmasks one token a call"
        require(even, "hyperschedule", hs.describe(), allowed)
        seen = "another sampler for a network that sees the noise level (model.conditioning): its times are not drawn"
        require(not conditioned, "sampler.kind", kind, seen)
