"""TPU generations and their slices as compile-only devices.

Figures per chip from the makers' pages (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x; read in
2026-11): dense bfloat16 peak, HBM, its bandwidth, and the chip's interconnect bandwidth in both directions.
Clocks are derived from the peaks; those of v6e and tpu7x are assumptions.
"""

import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hdlm_jax.errors import UserError, require, unknown
from hdlm_jax.training.sharding import AXES


class Chip(NamedTuple):
    """One generation.

    Attributes:
      flops: dense bfloat16 peak of a chip, FLOP/s.
      hbm: bytes of a chip.
      hbm_rate, ici_rate: bytes/s of a chip, the latter both directions together.
      clock: Hz.
      devices: of JAX per chip.
      shapes: slices to name in an error.
      options: of the compile-only topology.
    """

    flops: float
    hbm: float
    hbm_rate: float
    ici_rate: float
    clock: float
    devices: int
    shapes: tuple[str, ...]
    options: dict[str, Any]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
GIB = 2.0**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, 1, CUBES, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 1.5e9, 1, FLAT, {}),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9, 1.75e9, 1, CUBES, {}),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 800e9, 1.75e9, 1, FLAT, {}),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 2.2e9, 2, CUBES, {}),
}


class Slice(NamedTuple):
    """A topology by name: `v5p:4x4x8`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]


def parse(name: str) -> Slice:
    """Reads a topology.

    >>> parse("v5p:4x4x8").shape
    (4, 4, 8)

    Raises:
      UserError: an unknown generation or shape, with the choices.
    """
    generation, _, text = name.partition(":")
    if generation not in CHIPS:
        raise unknown("--topology", name, [f"{known}:{chip.shapes[3]}" for known, chip in CHIPS.items()])
    chip = CHIPS[generation]
    right = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text) and text.count("x") == chip.shapes[0].count("x")
    known = ", ".join(f"{generation}:{shape}" for shape in chip.shapes)
    require(bool(right), "--topology", name, f"{known}, and larger slices of that form")
    return Slice(name, chip, tuple(int(size) for size in text.split("x")))


def devices(wanted: Slice, slices: int = 1) -> list[jax.Device]:
    """The compile-only devices of a slice, or of several.

    Raises:
      UserError: no libtpu; a shape that the generation does not have.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process per machine may compile
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server: the slice is not here
    require_libtpu()
    from jax.experimental import topologies

    options = dict(wanted.chip.options)
    if len(wanted.shape) == 3 and all(size % 4 == 0 for size in wanted.shape):
        options["wrap"] = (True, True, True)  # whole cubes close to a torus
    if slices > 1:
        options["num_slices"] = slices
    try:
        return list(topologies.get_topology_desc(wanted.name, platform="tpu", **options).devices)
    except Exception as error:  # libtpu says in its own words that it does not know the shape
        known = ", ".join(wanted.chip.shapes)
        raise UserError(f"--topology: got {wanted.name!r}; allowed: one that libtpu knows, as {known}") from error


def require_libtpu() -> None:
    """Raises `UserError` unless TPU programs can be compiled here."""
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError("hdlm plan: needs libtpu, the TPU compiler; pip install 'hdlm_jax[launch]'") from error


def mesh(wanted: Slice, sizes: tuple[int, int, int], slices: int = 1) -> Mesh:
    """The mesh (data, fsdp, tensor) over the slices; several of them lie along `data`.

    Raises:
      UserError: sizes that do not multiply to the devices, `data` that does not divide over the slices.
    """
    held = devices(wanted, slices)
    given = " x ".join(str(size) for size in sizes)
    text = f"{len(held)} devices of {slices} x {wanted.name}"
    free = sizes.count(-1)
    require(all(size >= 1 or size == -1 for size in sizes) and free <= 1, "--mesh", given, "positive sizes, one -1")
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    shape = tuple(len(held) // known if size == -1 else size for size in sizes)
    require(shape[0] * shape[1] * shape[2] == len(held), "--mesh", given, f"sizes that multiply to the {text}")
    require(shape[0] % slices == 0, "--mesh", given, f"a data axis that divides over the {slices} slices")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, held, allow_split_physical_axes=True)
    else:
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), held, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
