"""What each device runs on its own rows gives what one device gives: losses, gradients, products, look-ups."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax.config import default
from hdlm_jax.models import devices, passes
from hdlm_jax.training import sharding
from tests.models import tiny

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 2, 1)]


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def relative(a, b):
    return max(
        float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-9))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("shape", [pytest.param(m, marks=[pytest.mark.slow] * (m != (2, 2, 2))) for m in MESHES])
def test_the_loss_and_its_gradient_are_those_of_one_device(shape):
    """Tiled and shifted with every term, several chunks of rows with a filled one on each device."""
    made = tiny.build(
        7, 16, noising__epsilon=0.2, hyperschedule__kind="slide", hyperschedule__width=4, hyperschedule__rate="1",
        model__visibility="prefix", model__prediction="shifted", model__hidden=16, model__remat="full",
        loss__context_weight=0.5, loss__rows_per_chunk=11,
    )  # fmt: skip
    params = tiny.random_params(made.model)
    x0_BxL = jax.random.randint(jax.random.key(2), (8, 16), 0, 7)
    noised = passes.noise(made, jax.random.key(3), x0_BxL)
    loss = jax.value_and_grad(lambda params, x0, noised: passes.mean_loss(made, params, x0, noised, None), has_aux=True)
    mesh = mesh_of(shape)
    rows = NamedSharding(mesh, P(devices.ROWS))
    places = sharding.shardings(jax.eval_shape(lambda: params), mesh)
    args = jax.device_put(params, places), jax.device_put(x0_BxL, rows), jax.device_put(noised, rows)
    theirs = jax.jit(loss)(params, x0_BxL, noised)
    ours = jax.jit(sharding.under(mesh, loss))(*args)
    assert relative(ours, theirs) < 2e-5
    terms = lambda params, x0, noised: passes.terms(made, params, x0, noised, made.loss.terms)
    assert relative(jax.jit(sharding.under(mesh, terms))(*args), jax.jit(terms)(params, x0_BxL, noised)) < 2e-5


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("whole", [P(None, "tensor"), P("tensor", None)])
def test_products_and_look_ups(shape, whole):
    rng = np.random.default_rng(0)
    x, kernel, table = (rng.normal(size=size).astype(np.float32) for size in ((32, 16), (16, 24), (11, 16)))
    tokens = rng.integers(0, 11, (8, 4)).astype(np.int32)

    def ours(x, kernel, table):
        out = devices.product(x, kernel, whole).sum(1) ** 2
        return out.sum() + (devices.lookup(table, tokens) ** 3).sum()

    def theirs(x, kernel, table):
        return ((x @ kernel).sum(1) ** 2).sum() + (table[tokens] ** 3).sum()

    grad = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2)))
    mesh = mesh_of(shape)
    placed = jax.device_put((x, kernel, table), NamedSharding(mesh, P()))
    assert relative(grad(sharding.under(mesh, ours))(*placed), grad(theirs)(x, kernel, table)) < 1e-5
    assert relative(grad(ours)(x, kernel, table), grad(theirs)(x, kernel, table)) < 1e-6, "without a mesh"


def test_gradients_of_weights_are_scattered_not_summed_whole():
    """In the CPU's program as in a TPU's: no sum over the devices as large as a weight."""
    mesh = mesh_of((1, 8, 1))
    rows, cut = NamedSharding(mesh, P(devices.ROWS)), NamedSharding(mesh, P("fsdp"))
    grad = jax.grad(lambda kernel, x: (devices.product(x, kernel, P(None, "tensor")) ** 2).sum())
    shapes = (jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=cut),
              jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=rows))  # fmt: skip
    text = jax.jit(sharding.under(mesh, grad), out_shardings=cut).lower(*shapes).compile().as_text()
    sums = re.findall(r"= f32\[(\d+),32\].*? all-reduce\(", text)
    assert "reduce-scatter" in text and "64" not in sums


def test_texts_that_do_not_divide_stay_whole():
    mesh = mesh_of((8, 1, 1))
    ours = jax.jit(sharding.under(mesh, lambda x: devices.over_texts(lambda _, x: (x.sum(), x), (), x)))
    total, same = ours(jnp.arange(6.0))
    assert total == 15 and same.shape == (6,)


def test_without_a_mesh():
    assert devices.mesh() is None and devices.platform() == "cpu"
    x = jnp.ones((2, 3))
    assert devices.by_text(x) is x
    assert sharding.mesh(default().mesh, jax.devices()[:1]).size == 1
