"""What a checkpoint holds: name, shape, dtype and checksum of each array, as a JSON object with a digest."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.errors import UserError

LISTED = 8  # names printed of each kind when a checkpoint does not fit


class Damaged(Exception):
    """A checkpoint is not what was written."""


def checksum(x: Array) -> Array:
    """uint32 sum of bits_i (2 i + 1) modulo 2^32 over the array's flat index i; the same on every mesh.

    bits_i is the element's pattern as an unsigned integer (8-byte elements count as two). The odd factors
    catch every single flipped bit, and elements that changed places.

    >>> int(checksum(jnp.array([5, 7], jnp.int32)))  # 5 * 1 + 7 * 3
    26
    """
    bits = _bits(x)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += jnp.uint32(stride % 2**32) * along
        stride *= bits.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def checksums(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Starts the checksums of all arrays in one program, which does not wait for them."""
    return dict(zip(leaves, _program(_kinds(leaves.values()))(list(leaves.values())), strict=True))


def compile_ahead(leaves: Iterable[Any]) -> None:
    """Compiles what the first save would have to wait for; takes arrays or their abstract shapes."""
    _program(_kinds(leaves))


@functools.cache
def _program(kinds: tuple[tuple, ...]) -> Callable[[list[Array]], list[Array]]:
    leaves = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in kinds]
    return jax.jit(lambda leaves: [checksum(x) for x in leaves]).lower(leaves).compile()


def _kinds(leaves: Iterable[Any]) -> tuple[tuple, ...]:
    return tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


def begin(leaves: Mapping[str, Array], metrics: Mapping[str, float]) -> Callable[[], dict[str, Any]]:
    """Starts the checksums on the devices; what it returns waits for them and gives the manifest.

    Args:
      leaves: arrays by name; they may be donated as soon as this returns.
      metrics: numbers to store beside them; those that are not finite are left out.
    """
    sums = checksums(leaves)
    described = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}

    def finish():
        totals = jax.device_get(sums)
        entries = {name: leaf | {"checksum": int(totals[name])} for name, leaf in described.items()}
        body = {"leaves": entries, "metrics": finite}
        return body | {"digest": _digest(body)}

    return finish


def read(text: str) -> dict[str, Any]:
    """The manifest from its JSON; raises `Damaged` unless it is what `begin` made."""
    try:
        manifest = json.loads(text)
        body = {name: part for name, part in manifest.items() if name != "digest"}
    except (ValueError, AttributeError) as error:
        raise Damaged("its manifest is not a JSON object") from error
    if manifest.get("digest") != _digest(body):
        raise Damaged("its manifest does not match its digest")
    return body


def verify(leaves: Mapping[str, Array], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `Damaged` naming the arrays whose checksum is not the saved one."""
    sums = jax.device_get(checksums(leaves))
    wrong = [name for name, total in sums.items() if int(total) != saved[name]["checksum"]]
    if wrong:
        raise Damaged(f"checksums differ: {_some(wrong)}")


def compare(place: Any, saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Raises `UserError` listing the arrays that are missing, unexpected, or of another shape or dtype.

    Args:
      place: names the checkpoint in the message.
      saved: the manifest's `leaves`.
      wanted: arrays or abstract shapes by name.
    """
    other = []
    for name in sorted(wanted.keys() & saved.keys()):
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if there != here:
            other.append(f"{name} ({there} there, {here} here)")
    lists = {
        "missing in it": sorted(wanted.keys() - saved.keys()),
        "unexpected in it": sorted(saved.keys() - wanted.keys()),
        "of other shape or dtype": other,
    }
    text = "; ".join(f"{what}: {_some(names)}" for what, names in lists.items() if names)
    if text:
        raise UserError(f"checkpoint {place} is of another model or optimizer than this one. {text}")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _some(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
