"""Where every array lies: the device mesh, and ordered rules from parameter paths to partitions.

The model knows nothing of devices. Three mesh axes: `data` (each holds other rows), `fsdp` (other rows
too, and the parameters are cut over it), `tensor` (the same rows, wide layers cut).
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax.errors import UserError, require
from hdlm_jax.models.devices import ROWS
from hdlm_jax.training.distributed import everywhere

AXES = ("data", "fsdp", "tensor")

Rules = Sequence[tuple[str, P]]

# The first pattern that matches a whole parameter path decides. Leaves under `blocks` carry a leading axis
# of stacked blocks. What is small (norms, most biases, the noise-level embedding) lies on every device.
RULES: Rules = (
    (r"embedding", P(None, "fsdp")),  # [V, D]: rows stay whole, so that a look-up needs no collective
    (r"head_kernel", P("fsdp", "tensor")),  # [D, V]
    (r"head_bias", P("tensor")),
    (r"norm/scale", P()),
    (r"sigma_(in|out)/(kernel|bias)", P()),
    (r"blocks/norm_\w+/scale", P()),
    (r"blocks/(qkv|mlp_in)/kernel", P(None, "fsdp", "tensor")),  # [blocks, D, 3D or F]
    (r"blocks/(out|mlp_out)/kernel", P(None, ("tensor", "fsdp"))),  # [blocks, D or F, D]
    (r"blocks/mlp_in/bias", P(None, "tensor")),
    (r"blocks/mlp_out/bias", P()),
    (r"blocks/modulation/kernel", P(None, None, "fsdp")),  # [blocks, C, 6D]
    (r"blocks/modulation/bias", P()),
)


def mesh(block: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of an experiment, axes (data, fsdp, tensor), all of type Auto.

    Args:
      block: the experiment's `mesh` block; one size may be -1, the devices that are left.
      devices: all devices of the run by default.

    Raises:
      UserError: a size that is neither -1 nor positive, two that are -1, sizes that do not multiply to the
        number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = [getattr(block, axis) for axis in AXES]
    for axis, size in zip(AXES, given, strict=True):
        require(size == -1 or size >= 1, f"mesh.{axis}", size, "a positive integer, or -1: the devices left")
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, given, strict=True))
    require(given.count(-1) <= 1, "mesh", text, "one size of -1 at most")
    known = math.prod(size for size in given if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in given]
    fits = math.prod(sizes) == len(devices)
    require(fits, "mesh", text, f"sizes that multiply to the {len(devices)} devices")
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in the tree's order.

    >>> named_leaves({"blocks": {"qkv": {"kernel": 1}}, "norm": (2, 3)})
    {'blocks/qkv/kernel': 1, 'norm/0': 2, 'norm/1': 3}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def partition(name: str, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> P:
    """The partition of one leaf: that of the first rule that matches the end of its path.

    A path may have a head before the parameter's (`params/`, `ema/`, `optimizer/adam/mu/`): copies of a
    parameter lie as the parameter does. Numbers without axes lie on every device.

    Raises:
      UserError: no rule matches; an axis of the leaf does not divide by its mesh axes.
    """
    if not shape:
        return P()
    spec = next((spec for pattern, spec in rules if re.search(f"(?:^|/)(?:{pattern})$", name)), None)
    found = spec is not None and len(spec) <= len(shape)
    require(found, f"parameter {name}", tuple(shape), "a path and rank that a sharding rule matches")
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(mesh.shape[n] for n in names)
        if shape[axis] % parts:
            allowed = f"a size divisible by {parts} (mesh.{', mesh.'.join(names)})"
            raise UserError(f"parameter {name}: axis {axis} of {tuple(shape)}; allowed: {allowed}")
    return spec


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A `NamedSharding` for every leaf of a state or parameter tree (arrays or their abstract shapes)."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) cut over `data` and `fsdp`; every other axis whole."""
    return NamedSharding(mesh, P(ROWS))


def under(mesh: Mesh, function: Callable) -> Callable:
    """The same function, traced for a mesh: what each device runs on its own rows finds it (models/devices.py)."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order.

    >>> from ml_collections import ConfigDict
    >>> local_rows(mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})), 8)
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in held for row in range(*part.indices(batch))})


def place_rows(mesh: Mesh, batch: int, rows_RxL: np.ndarray) -> jax.Array:
    """The global array of a batch from the rows that are here, `local_rows` of it."""
    first = {row: i for i, row in enumerate(local_rows(mesh, batch))}

    def of_device(index):
        start, stop, _ = index[0].indices(batch)
        return rows_RxL[first[start] : first[start] + stop - start]

    return jax.make_array_from_callback((batch, *rows_RxL.shape[1:]), batch_sharding(mesh), of_device)


def whole_rows(mesh: Mesh, rows: int) -> int:
    """The next number of rows that divides over the devices."""
    parts = row_parts(mesh)
    return -(-rows // parts) * parts


def over_rows(mesh: Mesh, draw: Callable) -> Callable:
    """A draw of a bound (`perplexity.estimator`), its windows cut over the devices, its terms known to every process.

    Takes what `draw` takes, tokens and validity as host arrays of the whole batch, `whole_rows` of them.
    """
    run = jax.jit(under(mesh, draw), out_shardings=replicated(mesh))

    def place(x: np.ndarray) -> jax.Array:
        return place_rows(mesh, len(x), x[local_rows(mesh, len(x))])

    return lambda params, tokens_BxL, valid_BxL, rng: run(params, place(tokens_BxL), place(valid_BxL), rng)


def placed(mesh: Mesh, abstract: Any, rules: Rules = RULES) -> Any:
    """Abstract arrays with the shardings of a state or parameter tree."""
    places = shardings(abstract, mesh, rules)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def on_one_device(mesh: Mesh, weights: Any) -> Any:
    """Weights on the first device of each process, if every device has twice the room for them; else as they lie.

    For generation, whose many small calls would wait for the network at every parameter that is cut.
    """
    if mesh.size == 1:
        return weights
    size = sum(x.nbytes for x in jax.tree.leaves(weights))
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]  # a CPU does not tell
    if not everywhere(all(2 * size < room for room in free)):
        return weights
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(weights)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def check_batch(batch: int, accumulation: int, mesh: Mesh) -> None:
    """Raises `UserError` unless the rows of each pass divide evenly over the devices that hold rows."""
    require(accumulation >= 1, "training.accumulation", accumulation, "a positive integer")
    parts = accumulation * row_parts(mesh)
    allowed = f"a positive multiple of {parts} (training.accumulation x mesh.data x mesh.fsdp)"
    require(batch >= 1 and batch % parts == 0, "training.batch", batch, allowed)
