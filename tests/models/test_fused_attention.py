"""Kernels against the reference: the same mask, the same results forward and backward, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.models import devices, fused_attention, layouts, passes
from hdlm_jax.models.attention import dense
from hdlm_jax.models.fused_attention import Reach, causal_sight, cudnn, resolve, splash, tiled_sight, visible
from hdlm_jax.models.transformer import TransformerConfig
from tests.models import tiny

H, D = 2, 8
CONFIG = TransformerConfig(num_tokens=5, length=128, hidden=32, blocks=1, heads=4, dropout=0.0)


def windows(kind, length, batch, **fields):
    """start and stop [B, L] of the windows of a tiled batch, with random origins."""
    own = {f"hyperschedule__{name}": value for name, value in fields.items()}
    shared = {"noising__epsilon": 0.1, "model__visibility": "prefix", "loss__origin_share": 0.5}
    made = tiny.build(3, length, hyperschedule__kind=kind, **shared, **own)
    noised = passes.noise(made, jax.random.key(1), jnp.zeros((batch, length), jnp.int32))
    return noised.phase.start, noised.phase.stop, made.hs.width


KINDS = [("slide", {"width": 24, "rate": "3/2"}), ("block", {"width": 32, "rate": "4"}), ("quenched", {})]


@pytest.mark.parametrize(("kind", "fields"), KINDS)
@pytest.mark.parametrize("group", [1, 4])
def test_runs_are_the_mask_of_the_tiled_layout(kind, fields, group):
    start, stop, width = windows(kind, 64, 6, **fields)
    sight = tiled_sight(start, stop, width, group)
    seen = np.asarray(visible(sight))
    np.testing.assert_array_equal(seen, layouts.tiled_visible(start, group=group))
    row = np.arange(seen.shape[1])
    reach = sight.reach(row[:, None], row[None, :])
    assert not (seen & ~reach[None]).any(), "what some row sees must lie in the blocks the kernel computes"
    assert reach.mean() < 0.7


@pytest.mark.parametrize("group", [1, 8])
def test_causal_runs(group):
    row = np.arange(32)
    expected = row[None, :] // group <= row[:, None] // group
    sight = causal_sight((1, 32), group)
    np.testing.assert_array_equal(visible(sight)[0], expected)
    np.testing.assert_array_equal(sight.reach(row[:, None], row[None, :]), expected)


def both(attention, reference, sizes, place=None):
    """Values and gradients in q, k, v of a kernel and of the reference."""
    rng = np.random.default_rng(0)
    qkv = [jax.device_put(rng.normal(size=sizes).astype(np.float32), place) for _ in range(3)]
    weight = jnp.asarray(rng.normal(size=sizes), jnp.float32)
    out = []
    for attend in (attention, reference):
        loss = lambda qkv, attend=attend: (attend(*qkv, None, None) * weight).sum()
        out.append(jax.jit(jax.value_and_grad(loss))(qkv))
    return out


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "fields"), KINDS[:2])
def test_splash_is_the_reference_forward_and_backward(kind, fields):
    """Interpreted on the CPU; texts with other origins and phases in one batch."""
    start, stop, width = windows(kind, 128, 2, **fields)
    assert (start[0] != start[1]).any()
    sight = tiled_sight(start, stop, width)
    ours, theirs = both(splash(sight, 256, interpret=True), dense(layouts.tiled_visible(start)), (2, H, 256, D))
    assert_same(ours, theirs)


def test_splash_without_a_mask():
    assert_same(*both(splash(None, 128, interpret=True), dense(), (2, H, 128, D)))


def test_splash_on_a_mesh_gives_each_device_its_texts_and_heads():
    start, stop, width = windows("slide", 128, 4, width=24, rate="3/2")
    reference = dense(layouts.tiled_visible(start))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def on_mesh(q, k, v, past, dropout):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return splash(tiled_sight(start, stop, width), 256, interpret=True)(q, k, v, past, dropout)

    place = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    assert_same(*both(on_mesh, reference, (4, H, 256, D), place))


@pytest.mark.parametrize("full", [True, False])
def test_the_call_of_cudnn_is_the_reference(full):
    """The same call without cuDNN: layout of the rows, scale and mask."""
    start, stop, width = windows("slide", 16, 3, width=6, rate="3/2")
    sight, seen = (None, None) if full else (tiled_sight(start, stop, width), layouts.tiled_visible(start))
    assert_same(*both(cudnn(sight, implementation="xla"), dense(seen), (3, H, 32, D)))


REFUSED = [
    ("splash", {}, 256, "", "cpu", "splash runs on a TPU, this is a CPU"),
    ("splash", {}, 256, "", "gpu", "splash runs on a TPU, this is a GPU"),
    ("cudnn", {}, 256, "", "tpu", "cudnn runs on a GPU, this is a TPU"),
    ("splash", {}, 256, "windows with a trailing row", "tpu", "splash cannot: windows with a trailing row"),
    ("splash", {"dropout": 0.1}, 256, "", "tpu", "model.dropout must be 0"),
    ("splash", {}, 200, "", "tpu", "multiples of 128, not 200"),
    ("splash", {}, 1 << 16, "", "tpu", "fewer than 32768 rows"),
    ("cudnn", {}, 256, "", "gpu", "model.dtype 'bfloat16'"),
    ("cudnn", {"dtype": "bfloat16"}, 255, "", "gpu", "even rows"),
    ("cudnn", {"dtype": "bfloat16", "hidden": 1024}, 256, "", "gpu", "at most 128"),
]


@pytest.mark.parametrize(("name", "fields", "rows", "obstacle", "platform", "reason"), REFUSED)
def test_an_impossible_kernel_is_refused_with_its_reason(name, fields, rows, obstacle, platform, reason):
    config = dataclasses.replace(CONFIG, attention=name, **fields)
    with pytest.raises(UserError, match=f"^model.attention: got '{name}'; allowed here: 'xla' or 'auto' .*{reason}"):
        resolve(config, rows, obstacle, platform)
    auto = dataclasses.replace(config, attention="auto")
    assert resolve(auto, rows, obstacle, platform) == ("splash" if platform == "tpu" and name != "splash" else "xla")


def test_auto_is_splash_on_a_tpu_and_the_reference_elsewhere():
    assert [resolve(CONFIG, 256, "", platform) for platform in ("tpu", "gpu", "cpu")] == ["splash", "xla", "xla"]
    assert devices.platform() == "cpu"
    reference = dense()
    assert fused_attention.attention(CONFIG, 256, None, reference) is reference


def test_kernels_of_equal_reach_are_made_once():
    arguments = Reach(128, 8), 128, 256, 2, True
    assert fused_attention._kernel(*arguments) is fused_attention._kernel(*arguments)


def test_every_hyperschedule_that_tiles_fits_the_reach():
    """Windows of the widest hyperschedules lie within `width` rows of each of their rows."""
    for hs in (hyperschedules.slide(64, 16, "1/2"), hyperschedules.block_slide(64, 32, 8, 2)):
        fields = {"width": hs.width, "rate": str(hs.rate)} | ({"block": 32} if hs.kind == "block_slide" else {})
        start, stop, width = windows(hs.kind, 64, 8, **fields)
        row = np.arange(64)[None]
        assert ((row - np.asarray(start)) < width).all() and ((np.asarray(stop) - row) <= width).all()
