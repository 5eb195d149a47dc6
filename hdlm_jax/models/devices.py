"""The device mesh as the network sees it: the one its caller traces under (`sharding.under`), or none.

Most of the network needs no mesh: its compiler cuts the products. What it would cut badly (a loop over
rows) or cannot cut (a kernel) is run here by each device on its own rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")  # the mesh axes over which the texts of a batch are cut
HEADS = "tensor"  # the mesh axis over which heads and wide layers are cut


def mesh() -> AbstractMesh | None:
    """The mesh of this trace, or None on one device."""
    found = jax.sharding.get_abstract_mesh()
    return None if found.empty or found.size == 1 else found


def platform() -> str:
    """'tpu', 'gpu' or 'cpu': what this trace is for (a mesh may be of devices that are not here)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def by_text(x: Array) -> Array:
    """The same array [B, ...], texts cut over the mesh and all else whole, where the texts divide.

    Without this a compiler may cut the stream of activations as the weights are cut, over their width, and
    then sums whole batches of activations over the devices in every product.
    """
    return jax.lax.with_sharding_constraint(x, P(ROWS)) if _divides(x.shape[0]) else x


def over_texts(function: Callable, whole: Any, texts: Any) -> tuple[Any, Any]:
    """Runs `function(whole, texts) -> (sums, by_text)` on every device's own texts.

    Args:
      function: sees the texts of one device; its products may still be cut over `tensor`.
      whole: arrays that every device gets whole.
      texts: arrays [B, ...].

    Returns:
      `sums`, added up over the devices (matrices stay cut over `fsdp`, rows first); `by_text` [B, ...].
    """
    if not _divides(jax.tree.leaves(texts)[0].shape[0]):
        return function(whole, texts)
    size = mesh().shape["fsdp"]
    cut = lambda x: x.ndim >= 2 and x.shape[0] % size == 0

    def apart(whole, texts):
        sums, by_text = function(whole, texts)
        return jax.tree.map(total, sums), by_text

    def total(x):
        # XLA's CPU compiler stops at sums of half precision here
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if platform() == "cpu" else x
        part = jax.lax.psum_scatter(wide, "fsdp", tiled=True) if cut(x) else jax.lax.psum(wide, "fsdp")
        return jax.lax.psum(part, "data").astype(x.dtype)

    shapes, _ = jax.eval_shape(function, whole, texts)
    outs = jax.tree.map(lambda x: P("fsdp") if cut(x) else P(), shapes), P(ROWS)
    return jax.shard_map(apart, in_specs=(P(), P(ROWS)), out_specs=outs, axis_names=frozenset(ROWS), check_vma=False)(
        whole, texts
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_RxD: Array, kernel_DxF: Array, whole: P) -> Array:
    """x @ kernel, for rows of a batch and a kernel whose rows are stored cut over `fsdp`.

    The kernel is made `whole` over `fsdp` first; its gradient is summed and cut again in one collective, where the
    compiler alone would sum it whole on every device: twice the traffic.
    """
    return x_RxD @ _as(kernel_DxF, whole)


def _product_forward(x, kernel, whole):
    return product(x, kernel, whole), (x, kernel)


def _product_backward(whole, saved, gradient):
    x, kernel = saved
    to_kernel = lambda _, rows: (rows[0].T @ rows[1], ())
    return gradient @ _as(kernel, whole).T, over_texts(to_kernel, (), (x, gradient))[0]


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def lookup(table_VxD: Array, tokens_BxR: Array) -> Array:
    """table[tokens]; the table's gradient is summed over the devices in one collective that cuts it, as `product`'s."""
    return by_text(table_VxD[tokens_BxR])


def _lookup_forward(table, tokens):
    return lookup(table, tokens), (table, tokens)


def _lookup_backward(saved, gradient):
    table, tokens = saved

    def to_table(_, texts):
        tokens, rows = texts
        return jnp.zeros(table.shape, rows.dtype).at[tokens].add(rows), ()

    return over_texts(to_table, (), (tokens, gradient))[0].astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def _as(x: Array, spec: P) -> Array:
    return x if mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def _divides(count: int) -> bool:
    """Whether there is a mesh that cuts `count` texts evenly."""
    here = mesh()
    return here is not None and count % math.prod(here.shape[axis] for axis in ROWS) == 0
