"""The state: its shapes before its values, the same values on every mesh, every copy a buffer of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.config import default
from hdlm_jax.errors import UserError
from hdlm_jax.training import optimizer, sharding
from hdlm_jax.training import state as states

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


def mesh_of(shape, devices=None):
    block = default().mesh
    block.update(dict(zip(sharding.AXES, shape, strict=True)))
    return sharding.mesh(block, devices)


def init():
    a, b = jax.random.split(jax.random.key(3))
    kernel = jax.random.normal(a, (2, 8, 16))
    return {"embedding": jax.random.normal(b, (8, 8)), "blocks": {"qkv": {"kernel": kernel}}}


@pytest.fixture(scope="module")
def tx():
    return optimizer.build(default().optimizer, 10)


@pytest.fixture(scope="module")
def single(tx):
    return states.create(init, tx, mesh_of((1, 1, 1), jax.devices()[:1]))


@pytest.mark.parametrize("shape", MESHES)
def test_create_gives_the_same_values_on_every_mesh(tx, single, shape):
    mesh = mesh_of(shape)
    made = states.create(init, tx, mesh)
    wanted = states.abstract(init, tx, mesh)
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for x, y, want in zip(*map(jax.tree.leaves, (made, single, wanted)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x.shape, x.dtype, x.sharding) == (want.shape, want.dtype, want.sharding)


def test_a_fresh_state(single):
    assert single.step.dtype == jnp.int32 and int(single.step) == 0
    np.testing.assert_array_equal(single.params["embedding"], init()["embedding"])
    jax.tree.map(np.testing.assert_array_equal, single.ema, single.params)


@pytest.mark.parametrize("shape", MESHES)
def test_the_state_can_be_donated(tx, shape):
    made = states.create(init, tx, mesh_of(shape))
    double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    doubled = double(made)
    np.testing.assert_array_equal(doubled.ema["embedding"], doubled.params["embedding"])
    assert made.params["embedding"].is_deleted() and made.ema["embedding"].is_deleted()


def test_without_a_running_mean_the_last_weights_stand_in(tx):
    shapes = states.abstract(init, tx, mesh_of((8, 1, 1)), ema=False)
    assert shapes.ema is None
    assert states.weights(shapes, "ema") is states.weights(shapes, "raw") is shapes.params


def test_weights_are_the_mean_or_the_last(single):
    other = single._replace(ema="mean", params="last")
    assert states.weights(other) == "mean" and states.weights(other, "raw") == "last"
    with pytest.raises(UserError, match="weights: got 'emma'"):
        states.weights(other, "emma")


def test_a_parameter_without_a_rule_is_refused_before_anything_is_made(tx):
    with pytest.raises(UserError, match="parameter params/odd"):
        states.create(lambda: {"odd": jnp.ones((4, 4))}, tx, mesh_of((8, 1, 1)))
