"""Checkpoints: equal after a restore, on any mesh; damage found and passed over; nothing harmed by a failure."""

import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.config import default
from hdlm_jax.errors import UserError
from hdlm_jax.training import optimizer, sharding
from hdlm_jax.training import state as states
from hdlm_jax.training.checkpoints import CheckpointError, Checkpoints, restore_params

TX = optimizer.build(default().optimizer, 10)


def init(width=64):
    a, b = jax.random.split(jax.random.key(3))
    kernel = jax.random.normal(a, (2, width, 3 * width))
    embedding = jax.random.normal(b, (8, width)).astype(jnp.bfloat16)
    return {"embedding": embedding, "blocks": {"qkv": {"kernel": kernel}}}


def abstract(shape=(1, 1, 1), ema=True, width=64):
    block = default().mesh
    block.update(dict(zip(sharding.AXES, shape, strict=True)))
    mesh = sharding.mesh(block, jax.devices()[: int(np.prod(shape))])
    return states.abstract(lambda: init(width), TX, mesh, ema=ema)


def fill(shapes, seed):
    """A state of random numbers, the same on every mesh."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put((9 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)
    return jax.tree.map(draw, shapes)


def assert_same(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert jax.tree.map(lambda a: a.dtype, x) == jax.tree.map(lambda a: a.dtype, y)


def listing(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(Path(folder).rglob("*"))}


def saved(folder, *steps):
    """A folder with these steps, step s holding `fill(abstract(), s)`."""
    with Checkpoints(folder, keep=10) as ck:
        for step in steps:
            assert ck.save(step, fill(abstract(), step))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two"), 10, 20)


@pytest.fixture
def folder(two, tmp_path):
    """Steps 10 and 20, a copy to damage."""
    return Path(shutil.copytree(two, tmp_path / "run" / "checkpoints"))


def test_a_state_comes_back_equal_though_it_was_donated(tmp_path):
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    with Checkpoints(tmp_path) as ck:
        assert ck.restore(abstract()) is None
        state = fill(abstract(), 1)
        assert ck.save(1, state)
        state = donate(state)
    with Checkpoints(tmp_path) as ck:
        found, step = ck.restore(abstract())
    assert step == 1 and isinstance(found, states.TrainState)
    assert_same(found, fill(abstract(), 1))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract())


@pytest.mark.parametrize(("there", "here"), [((2, 2, 2), (1, 1, 1)), ((1, 1, 1), (1, 8, 1)), ((8, 1, 1), (2, 2, 2))])
def test_a_state_comes_back_on_another_mesh(tmp_path, there, here):
    with Checkpoints(tmp_path) as ck:
        ck.save(1, fill(abstract(there), 1))
        found, _ = ck.restore(abstract(here))
    assert_same(found, fill(abstract(), 1))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract(here))


def test_the_newest_and_the_best_are_kept_also_by_a_later_process(tmp_path):
    state = fill(abstract(), 0)
    with Checkpoints(tmp_path, keep=2, best="bound") as ck:
        for step, bound in ((1, 5.0), (2, 3.0), (3, float("nan")), (4, 4.0)):
            ck.save(step, state, {"bound": bound, "other": -step})
        ck.save(5, state)
        ck.wait()
        assert ck.steps() == [2, 4, 5]
    with Checkpoints(tmp_path, keep=1, best="bound") as ck:
        ck.save(6, state, {"bound": jnp.float32(9.0)})
    with Checkpoints(tmp_path) as ck:
        assert ck.steps() == [2, 6]


def test_a_step_that_is_there_is_left_as_it_is(folder):
    before = listing(folder / "20")
    with Checkpoints(folder) as ck:
        assert not ck.save(20, fill(abstract(), 99))
    assert listing(folder / "20") == before


def test_a_step_before_the_newest_can_be_saved(folder):
    with Checkpoints(folder) as ck:
        assert ck.save(15, fill(abstract(), 15))
    assert restore_params(folder, jax.eval_shape(init))[1] == 20
    assert sorted(p.name for p in folder.iterdir()) == ["10", "15", "20"]


def largest(step):
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(step):
    data = bytearray(largest(step).read_bytes())
    data[len(data) // 2] ^= 1
    largest(step).write_bytes(data)


def truncate(step):
    os.truncate(largest(step), largest(step).stat().st_size // 2)


def swap_arrays(step):
    """Arrays that read well and are not the ones that were saved."""
    shutil.rmtree(step / "state")
    shutil.copytree(step.parent / "10" / "state", step / "state")


def change_a_metric(step):
    path = step / "manifest" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"bound": 0.0}}))


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = {
    "flipped bit": (flip_a_bit, ""),
    "other arrays": (swap_arrays, "checksums differ: "),
    "truncated data": (truncate, ""),
    "no arrays": (lambda step: shutil.rmtree(step / "state"), ""),
    "no manifest": (lambda step: (step / "manifest" / "manifest.json").unlink(), "No such file"),
    "changed manifest": (change_a_metric, "digest"),
    "empty": (empty, "No such file"),
}


# What Orbax leaves behind when it fails to read is collected here, and not in a later test that minds it.
reads_damage = pytest.mark.usefixtures("collected")
ignored = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture
def collected():
    yield
    gc.collect()


@ignored
@reads_damage
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_step_is_set_aside_and_the_one_before_is_used(folder, damage):
    spoil, reason = DAMAGE[damage]
    spoil(folder / "20")
    before, messages = listing(folder / "20"), []
    with Checkpoints(folder, report=messages.append) as ck:
        found, step = ck.restore(abstract())
        assert step == 10 and ck.steps() == [10]
        assert_same(found, fill(abstract(), 10))
        assert listing(folder / "bad-20") == before
        assert "checkpoint 20" in messages[0] and "bad-20" in messages[0] and reason in messages[0]
        assert ck.save(15, fill(abstract(), 15)) and ck.save(20, fill(abstract(), 20))
        assert_same(ck.restore(abstract())[0], fill(abstract(), 20))
    assert sorted(p.name for p in folder.iterdir()) == ["10", "15", "20", "bad-20"]


@ignored
@reads_damage
def test_a_second_bad_step_of_the_same_number_gets_a_name_of_its_own(folder):
    (folder / "bad-20").mkdir()
    flip_a_bit(folder / "20")
    with Checkpoints(folder, report=lambda _: None) as ck:
        ck.restore(abstract())
    assert sorted(p.name for p in folder.iterdir()) == ["10", "bad-20", "bad-20-2"]


@ignored
@reads_damage
def test_when_no_step_is_intact_nothing_is_touched(folder):
    flip_a_bit(folder / "10")
    flip_a_bit(folder / "20")
    before = listing(folder)
    with (
        Checkpoints(folder) as ck,
        pytest.raises(CheckpointError, match=r"no checkpoint in .* \(20: .+; 10: .+\); nothing was changed"),
    ):
        ck.restore(abstract())
    assert listing(folder) == before


def test_a_save_that_was_killed_is_swept_away_and_can_be_repeated(folder):
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp")
    flip_a_bit(folder / "30.orbax-checkpoint-tmp")
    with Checkpoints(folder) as ck:
        assert ck.steps() == [10, 20] and ck.restore(abstract())[1] == 20
        assert ck.save(30, fill(abstract(), 30))
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"width": 128}, "params/embedding (bfloat16[8, 64] there, bfloat16[8, 128] here)"),
        ({"ema": False}, "unexpected"),
    ],
)
def test_another_architecture_is_the_users_error_and_touches_nothing(folder, other, part):
    before = listing(folder)
    with Checkpoints(folder) as ck:
        with pytest.raises(UserError) as error:
            ck.restore(abstract(**other))
        assert part in str(error.value) and not isinstance(error.value, CheckpointError)
    assert listing(folder) == before


@pytest.mark.parametrize(("which", "group"), [("ema", "ema"), ("raw", "params")])
def test_weights_alone_come_back_in_host_memory(folder, which, group):
    before = listing(folder)
    params, step = restore_params(folder, jax.eval_shape(init), which)
    assert step == 20 and {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}
    assert_same(params, getattr(fill(abstract(), 20), group))
    assert listing(folder) == before


def test_weights_pass_over_a_damaged_step_and_leave_it_there(folder):
    swap_arrays(folder / "20")
    before, messages = listing(folder), []
    params, step = restore_params(folder, jax.eval_shape(init), "raw", messages.append)
    assert step == 10 and "checkpoint 20" in messages[0]
    assert_same(params, fill(abstract(), 10).params)
    assert listing(folder) == before
    change_a_metric(folder / "10")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore_params(folder, jax.eval_shape(init), "raw")


def test_without_a_running_mean_the_last_weights_come_back(tmp_path):
    state = fill(abstract(ema=False), 1)
    with Checkpoints(tmp_path) as ck:
        ck.save(1, state)
    assert_same(restore_params(tmp_path, jax.eval_shape(init), "ema")[0], state.params)


def test_weights_that_cannot_be_had_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"hdlm train --workdir \S*/fresh`"):
        restore_params(tmp_path / "fresh" / "checkpoints", jax.eval_shape(init))
    with pytest.raises(UserError, match="weights: got 'emma'"):
        restore_params(folder, jax.eval_shape(init), "emma")
    with pytest.raises(UserError, match="of another model"):
        restore_params(folder, jax.eval_shape(lambda: init(128)))
    assert not (tmp_path / "fresh").exists()


def test_a_full_disk_is_said_and_older_steps_stay(folder, monkeypatch):
    with Checkpoints(folder) as ck:
        full = shutil.disk_usage(folder)._replace(free=1000)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: full)
            with pytest.raises(CheckpointError, match=r"checkpoint 30 .* needs up to .* 0 MB are free"):
                ck.save(30, fill(abstract(), 30))
        assert ck.restore(abstract())[1] == 20
        assert ck.save(30, fill(abstract(), 30))
        assert ck.restore(abstract())[1] == 30


FAILING = """
    import os, resource, sys
    import jax, jax.numpy as jnp
    from hdlm_jax.training.checkpoints import CheckpointError, Checkpoints

    def attempt(step):
        try:
            ck.save(step, {"a": x})
            ck.wait()
            said.append("saved")
        except CheckpointError as error:
            said.append(str(error))

    x, said, folder = jnp.arange(100_000.0), [], sys.argv[1]
    with Checkpoints(folder) as ck:
        attempt(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # files end here, as on a full disk
        attempt(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        attempt(2)
        os.chmod(folder, 0o555)
        if not os.geteuid():
            os.seteuid(65534)  # root may write everywhere
        attempt(3)
        if not os.getuid():
            os.seteuid(0)
        os.chmod(folder, 0o755)
        attempt(3)
        found, step = ck.restore({"a": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)})
        print(said, ck.steps(), step, bool((found["a"] == x).all()), sep="\\n")
"""


def test_writes_that_fail_in_the_background_are_said_and_can_be_repeated(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", textwrap.dedent(FAILING), str(tmp_path / "ck")]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    said, steps, step, equal = out.stdout.splitlines()
    one, full, two, read_only, three = eval(said)
    assert one == two == three == "saved"
    assert "checkpoint 2 could not be written" in full and "too large" in full
    assert "checkpoint 3 could not be written" in read_only and "Permission denied" in read_only
    assert (steps, step, equal) == ("[1, 2, 3]", "3", "True")


def test_a_failure_of_the_save_before_does_not_cost_this_one(folder, monkeypatch):
    with Checkpoints(folder) as ck:
        monkeypatch.setattr(ck._manager, "wait_until_finished", fail_once(ck._manager.wait_until_finished))
        ck._writing = 25
        with pytest.raises(CheckpointError, match="checkpoint 25 could not be written .* disk gone"):
            ck.save(30, fill(abstract(), 30))
        assert ck.restore(abstract())[1] == 30


def fail_once(then):
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("disk gone")
        return then()

    return call


def test_a_failure_at_the_end_is_raised_and_does_not_hide_another(folder, monkeypatch):
    with pytest.raises(CheckpointError, match="disk gone"), Checkpoints(folder) as ck:
        monkeypatch.setattr(ck._manager, "wait_until_finished", fail_once(ck._manager.wait_until_finished))
    messages = []
    with pytest.raises(KeyError), Checkpoints(folder, report=messages.append) as ck:
        monkeypatch.setattr(ck._manager, "wait_until_finished", fail_once(ck._manager.wait_until_finished))
        raise KeyError
    assert "disk gone" in messages[0]


def test_what_cannot_be_a_checkpoint_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"), Checkpoints(tmp_path / "file" / "checkpoints"):
        pass
    with pytest.raises(UserError, match=r"training.keep: got 0"):
        Checkpoints(tmp_path, keep=0)
