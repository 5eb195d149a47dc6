"""The training step: accumulation, meshes, skipped steps, rematerialisation, and a golden run of a few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from hdlm_jax import config as configs
from hdlm_jax.models import parts as builders
from hdlm_jax.models import passes, transformer
from hdlm_jax.training import optimizer, sharding, state
from hdlm_jax.training.step import Update, train_step

N, L, B, STEPS = 16, 16, 8, 20
SETTINGS = {
    "data.length": L,
    "model.hidden": 16,
    "model.blocks": 2,
    "model.heads": 2,
    "model.dropout": 0.0,
    "model.prediction": "shifted",
    "model.visibility": "prefix",
    "model.remat": "none",
    "model.vocabulary_multiple": 8,
    "hyperschedule.kind": "slide",
    "hyperschedule.width": 4,
    "hyperschedule.rate": "1",
    "noising.epsilon": 0.1,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup": 4,
    "optimizer.ema": 0.9,
}
ONE = (1, 1, 1)
FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # which is what these tests spend their time on
RNG = jax.random.key(7)
X0_BXL = np.random.default_rng(0).integers(0, N, (B, L), np.int32)


def slow(value):
    """A case of the second tier."""
    return pytest.param(value, marks=pytest.mark.slow)


GOLDEN = {"loss": [4.098436, 3.251777, 3.47081], "gradient_norm": [23.324949, 13.951502, 11.867554]}
REGENERATE = """a training step gives other numbers than before. If its mathematics was changed on purpose, say so in
the commit and set GOLDEN in tests/training/test_step.py to
GOLDEN = {}"""


@functools.cache
def update_of(accumulation=1, **changed):
    """A small experiment's `Update`; `changed` are fields with __ for the dot."""
    given = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    c = configs.override(configs.default(), given)
    tx = optimizer.build(c.optimizer, STEPS)
    return Update(builders.build(c, num_tokens=N, bos_id=N - 1), tx, FrozenConfigDict(c.optimizer), accumulation)


@functools.cache
def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return sharding.mesh(ConfigDict(dict(zip(sharding.AXES, sizes, strict=True))), devices)


def fresh_params():
    """With a head that is not zero: else the first gradients reach nothing but the head."""
    params = transformer.init(update_of().parts.model, jax.random.key(0))
    return params | {"head_kernel": 0.3 * jax.random.normal(jax.random.key(1), params["head_kernel"].shape)}


@functools.cache
def begin(update, sizes=ONE):
    return state.create(fresh_params, update.tx, mesh_of(sizes))


@functools.cache
def compiled(update, sizes=ONE):
    """The step on a mesh, its shardings pinned as in training."""
    mesh = mesh_of(sizes)
    places = jax.tree.map(lambda x: x.sharding, state.abstract(fresh_params, update.tx, mesh))
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        sharding.under(mesh, functools.partial(train_step, update)),
        in_shardings=(places, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(places, everywhere),
        compiler_options=FAST_COMPILATION,
    )


def run(update, steps, sizes=ONE):
    """The state and the metrics of each step, as floats, on a mesh."""
    current, history = begin(update, sizes), []
    for _ in range(steps):
        current, metrics = compiled(update, sizes)(current, X0_BXL, RNG)
        history.append(metrics)
    return current, [{name: float(x) for name, x in row.items()} for row in jax.device_get(history)]


def close(a, b, relative):
    """Whether two trees of arrays agree to `relative` of the largest element."""
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    return all(
        np.allclose(x, y, rtol=0, atol=relative * scale)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def plain():
    return run(update_of(), STEPS)


def test_accumulation_equals_the_full_batch():
    once, (whole,) = run(update_of(), 1)
    parts, (summed,) = run(update_of(4), 1)
    assert summed["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert summed["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-6)
    # Adam's first moment is the gradient; its step divides by the gradient's size, and so blows up rounding
    assert close(once.optimizer["adam"].mu, parts.optimizer["adam"].mu, 1e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2), slow((8, 1, 1)), slow((1, 8, 1))], ids=str)
def test_the_mesh_does_not_change_the_losses(plain, sizes):
    losses = [[row["loss"] for row in history] for history in (plain[1], run(update_of(), STEPS, sizes)[1])]
    one, many = np.array(losses)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(many, one, rtol=1e-4)


def test_the_noise_is_the_same_on_every_mesh():
    parts, drawn = update_of().parts, []
    for sizes in (ONE, (8, 1, 1), (1, 8, 1), (2, 2, 2)):
        mesh = mesh_of(sizes)
        draw = jax.jit(
            functools.partial(passes.noise, parts),
            out_shardings=sharding.batch_sharding(mesh),
            compiler_options=FAST_COMPILATION,
        )
        place = jax.device_put((RNG, X0_BXL), (sharding.replicated(mesh), sharding.batch_sharding(mesh)))
        drawn.append(jax.device_get(draw(*place)))
    for other in drawn[1:]:
        jax.tree.map(np.testing.assert_array_equal, drawn[0], other)


def test_the_loss_falls(plain):
    losses = [row["loss"] for row in plain[1]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert all(row["skipped"] == 0 for row in plain[1])


def test_the_terms_add_up_to_the_loss(plain):
    for row in plain[1]:
        assert row["loss"] == pytest.approx(row["mask"] + row["shuffled"] + row["clean"], rel=1e-6)


@pytest.mark.parametrize("broken", ["head_bias", "embedding"])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_step(broken):
    update = update_of()
    before = begin(update)
    spoiled = before.params | {broken: before.params[broken].at[0].set(jnp.nan)}
    before = before._replace(params=spoiled, step=jnp.int32(5))
    after, metrics = compiled(update)(before, X0_BXL, RNG)
    assert (float(metrics["skipped"]), int(after.step)) == (1, 6)
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=before.step), before)


def test_a_good_step_moves_weights_moments_and_the_running_mean(plain):
    update = update_of()
    before, (after, metrics) = begin(update), run(update, 1)
    assert metrics[0]["skipped"] == 0
    moved = lambda a, b: not np.array_equal(a, b)
    for part in ("params", "ema"):
        assert all(jax.tree.leaves(jax.tree.map(moved, getattr(before, part), getattr(after, part)))), part
    assert not close(after.params, after.ema, 1e-6)


@pytest.mark.parametrize("dropout", [0.0, slow(0.2)])
def test_recomputing_blocks_changes_nothing(dropout):
    """With dropout, whose masks are drawn again in the backward pass, too."""
    kept, (a,) = run(update_of(model__dropout=dropout), 1)
    recomputed, (b,) = run(update_of(model__dropout=dropout, model__remat="full"), 1)
    assert b == pytest.approx(a, rel=1e-6)
    assert close(kept.optimizer["adam"].mu, recomputed.optimizer["adam"].mu, 1e-6)


def test_golden_steps(plain):
    found = {name: [round(row[name], 6) for row in plain[1][:3]] for name in GOLDEN}
    for name, values in GOLDEN.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=REGENERATE.format(found))
