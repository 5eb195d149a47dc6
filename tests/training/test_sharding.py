"""Meshes, the rules on the transformer's parameters, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hdlm_jax.config import default
from hdlm_jax.errors import UserError
from hdlm_jax.models import transformer
from hdlm_jax.training import optimizer, sharding

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


def block(data=-1, fsdp=1, tensor=1):
    made = default().mesh
    made.update(data=data, fsdp=fsdp, tensor=tensor)
    return made


def transformer_shapes(**fields):
    sizes = {"num_tokens": 7, "length": 4, "hidden": 16, "blocks": 2, "heads": 2, "conditioning": 8} | fields
    config = transformer.TransformerConfig(**sizes)
    return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1)), ((4, 1, 2), (4, 1, 2))],
)
def test_the_mesh_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.mesh(block(*sizes))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    assert sharding.mesh(block(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "field"),
    [((3, 1, 1), "mesh"), ((-1, 3, 1), "mesh"), ((-1, -1, 1), "mesh"), ((-1, 16, 1), "mesh"), ((0, 1, 1), "mesh.data")]
    + [((1, 1, -2), "mesh.tensor")],
)
def test_sizes_that_do_not_fit_are_refused(sizes, field):
    with pytest.raises(UserError, match=f"^{field}: got"):
        sharding.mesh(block(*sizes))


@pytest.mark.parametrize("shape", MESHES)
def test_every_parameter_has_a_rule_and_its_copies_lie_as_it_does(shape):
    mesh, params = sharding.mesh(block(*shape)), transformer_shapes()
    tx = optimizer.build(default().optimizer, 10)
    places = sharding.named_leaves(sharding.shardings(params, mesh))
    state = {"optimizer": jax.eval_shape(tx.init, params), "ema": params}
    copies = sharding.named_leaves(sharding.shardings(state, mesh))
    for name, place in places.items():
        assert copies[f"ema/{name}"] == copies[f"optimizer/adam/mu/{name}"] == place
    assert copies["optimizer/adam/count"].spec == P()


def test_large_parameters_are_cut_over_fsdp_and_tensor():
    mesh = sharding.mesh(block(1, 4, 2))
    places = sharding.named_leaves(sharding.shardings(transformer_shapes(), mesh))
    shapes = sharding.named_leaves(transformer_shapes())
    for name in (
        "blocks/qkv/kernel",
        "blocks/out/kernel",
        "blocks/mlp_in/kernel",
        "blocks/mlp_out/kernel",
        "head_kernel",
    ):
        part = places[name].shard_shape(shapes[name].shape)
        assert jnp.prod(jnp.array(part)) * 8 == jnp.prod(jnp.array(shapes[name].shape)), name
    assert places["embedding"].shard_shape(shapes["embedding"].shape) == (128, 4)


def test_the_first_rule_that_matches_the_whole_parameter_path_decides():
    mesh = sharding.mesh(block(2, 2, 2))
    rules = ((r"a/kernel", P("fsdp")), (r"\w+/kernel", P("tensor")), (r"kernel", P("data")))
    at = lambda name: sharding.partition(name, (4,), mesh, rules)
    assert at("params/a/kernel") == P("fsdp")
    assert at("optimizer/adam/mu/b/kernel") == P("tensor")
    assert at("aa/kernel") == P("tensor")
    assert at("kernel") == P("data")


def test_an_unmatched_parameter_is_refused_with_its_path_and_shape():
    with pytest.raises(UserError, match=r"parameter params/blocks/gate/kernel: got \(2, 3\)"):
        sharding.shardings({"params": {"blocks": {"gate": {"kernel": jnp.ones((2, 3))}}}}, sharding.mesh(block()))


def test_a_rule_of_more_axes_than_the_parameter_is_refused():
    with pytest.raises(UserError, match="parameter embedding"):
        sharding.partition("embedding", (4,), sharding.mesh(block()))


def test_a_parameter_that_does_not_divide_is_refused_with_the_axis():
    with pytest.raises(UserError, match=r"parameter \S+: axis \d of \(.*12.*\); allowed: .* 8 \(mesh.fsdp\)"):
        sharding.shardings(transformer_shapes(hidden=12), sharding.mesh(block(1, 8, 1)))


def test_batch_rows_lie_over_data_and_fsdp():
    mesh = sharding.mesh(block(2, 2, 2))
    batch = jax.device_put(jnp.arange(8 * 3).reshape(8, 3), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    assert sharding.replicated(mesh).is_fully_replicated


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (0, 1), (8, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch, accumulation):
    mesh = sharding.mesh(block(2, 2, 2))
    sharding.check_batch(8, 2, mesh)
    with pytest.raises(UserError, match="training.batch: got"):
        sharding.check_batch(batch, accumulation, mesh)


def test_no_accumulation_is_refused():
    with pytest.raises(UserError, match="training.accumulation: got 0"):
        sharding.check_batch(8, 0, sharding.mesh(block()))


@pytest.mark.parametrize("shape", MESHES)
def test_a_batch_is_placed_by_global_row(shape):
    """The rows that are here, in any share, come to lie where `batch_sharding` cuts them."""
    mesh = sharding.mesh(block(*shape))
    rows_BxL = np.arange(8 * 3).reshape(8, 3)
    assert sharding.local_rows(mesh, 8) == list(range(8))  # all devices are of this process
    placed = sharding.place_rows(mesh, 8, rows_BxL)
    assert placed.sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(placed, rows_BxL)


def test_rows_that_do_not_lie_side_by_side(monkeypatch):
    """As on a slice whose devices are in the order of its torus: a process has rows 0, 1, 4 and 5."""
    mesh = sharding.mesh(block(4, 1, 2))
    cut, mine = sharding.batch_sharding(mesh), [0, 1, 4, 5]

    class Cut:
        def addressable_devices_indices_map(self, shape):
            parts = cut.addressable_devices_indices_map(shape)
            return {device: index for device, index in parts.items() if index[0].start in (0, 4)}

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "batch_sharding", lambda _: Cut())
        assert sharding.local_rows(mesh, 8) == mine


def test_weights_for_generation_lie_whole_on_one_device():
    mesh = sharding.mesh(block(2, 2, 2))
    params = {"head_kernel": jnp.arange(16.0).reshape(4, 4)}
    cut = jax.device_put(params, sharding.shardings(params, mesh))
    whole = sharding.on_one_device(mesh, cut)["head_kernel"]
    assert whole.devices() == {jax.local_devices()[0]}
    np.testing.assert_array_equal(whole, params["head_kernel"])
