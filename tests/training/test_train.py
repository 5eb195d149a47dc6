"""The training loop: what a run leaves behind, resume, signals, lost runs, and everything it refuses."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax import lm
from hdlm_jax.__main__ import main
from hdlm_jax.data import pipeline, prepare
from hdlm_jax.errors import UserError
from hdlm_jax.training import goodput, loop, metrics, optimizer, run_folder, storage, train
from hdlm_jax.training.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6  # of the smoke run
TIMED = ("train/tokens_per_second", "train/mfu")


@pytest.fixture
def copied(smoke_run, tmp_path):
    """A copy of the smoke run that a test may change."""
    return Path(shutil.copytree(smoke_run, tmp_path / "copy"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(folder, step=STEPS):
    """Name -> shape, dtype and checksum of every array of a checkpoint: weights, optimizer, running mean, step."""
    return storage.read_manifest(folder / "checkpoints", step)["leaves"]


def untimed(folder):
    timed = lambda name: name in TIMED or name.startswith("goodput/")
    return [{name: x for name, x in row.items() if not timed(name)} for row in metrics.read(folder)]


def assert_equals_the_straight_run(folder, smoke_run):
    assert saved(folder) == saved(smoke_run)
    assert untimed(folder) == untimed(smoke_run)
    texts = [json.loads((f / f"samples/step{STEPS}.json").read_text())["texts"] for f in (folder, smoke_run)]
    assert texts[0] == texts[1]


def kill_at(monkeypatch, step, number):
    """Sends this process a signal while the record of `step` is being written."""
    write = MetricsLog.write

    def killing(log, done, values):
        write(log, done, values)
        if done == step and "train/loss" in values:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", killing)


# ---- what a run leaves behind


def test_a_run_folder_holds_what_the_help_promises(smoke_run):
    names = {path.name for path in smoke_run.iterdir()} - {run_folder.LOCK}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {
        "config.json",
        "env.json",
        "data.json",
        "data",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "hosts",
    }
    assert {path.name for path in (smoke_run / "checkpoints").iterdir()} == {"2", "4", "6"}
    assert [path.name for path in (smoke_run / "samples").iterdir()] == [f"step{STEPS}.json"]


def test_metrics_are_logged_when_the_config_says(smoke_run):
    rows = metrics.read(smoke_run)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if train.HELD_OUT in row] == [3, 6]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
    first = next(row for row in rows if "train/loss" in row)
    config = run_folder.read_config(smoke_run)
    others = {"step", *(f"train/{name}" for name in ("loss", "gradient_norm", "learning_rate", "skipped")), *TIMED}
    weight = {"train/context": config.loss.context_weight}
    own = {name: x for name, x in first.items() if name.startswith("train/") and name not in others}
    terms = [weight.get(name, 1.0) * value for name, value in own.items()]
    assert len(terms) > 1 and first["train/loss"] == pytest.approx(sum(terms))
    rate = optimizer.learning_rate(config.optimizer, STEPS)
    assert first["train/learning_rate"] == pytest.approx(float(rate(0)))
    assert 0 < rows[-1][train.HELD_OUT] < 20 and rows[-1]["held_out/bits_per_byte_error"] > 0


def test_samples_are_finished_texts(smoke_run):
    record = json.loads((smoke_run / "samples" / f"step{STEPS}.json").read_text())
    assert record["step"] == STEPS and record["sampler"]["kind"] == "acs"
    assert len(record["texts"]) == loop.SAMPLES and all(record["texts"])


def test_tensorboard_reads_the_events(smoke_run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(smoke_run)).Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(
        {row["step"]: row["train/loss"] for row in metrics.read(smoke_run) if "train/loss" in row}
    )


def test_the_running_mean_is_not_the_last_weights(smoke_run):
    mean, last = (lm.load(smoke_run, weights).params for weights in ("ema", "raw"))
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), mean, last)
    assert all(jax.tree.leaves(differ))


def test_the_time_of_a_run_is_accounted_for(smoke_run):
    last = [row for row in metrics.read(smoke_run) if "goodput/step" in row][-1]
    assert {f"goodput/{kind}" for kind in goodput.KINDS} < last.keys()
    assert last["goodput/compile"] > 0 and last["goodput/evaluate"] > 0 and last["goodput/save"] > 0
    assert last["goodput/lost"] == last["goodput/down"] == 0 and 0 < last["goodput/share"] < 1


def test_every_process_leaves_a_heartbeat(smoke_run):
    lines = [json.loads(line) for line in (smoke_run / "hosts/process0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["host"] for line in lines} == {socket.gethostname()}
    assert all(line["seconds_per_step"] > 0 and line["host_memory"] > 2**20 for line in lines)


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(choice, smoke_command, tmp_path, monkeypatch, capfd):
    """The disk is full for the saves before the last: the run stops, or says so and goes on."""
    run, full = tmp_path / "run", shutil.disk_usage(tmp_path)._replace(free=0)
    plain, asked = shutil.disk_usage, itertools.count(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if next(asked) in (2, 3) else plain(path))
    command = smoke_command(run, f"--config.training.on_save_error={choice}", "--config.training.steps=6")
    says = "checkpoint 4 could not be written to"
    if choice == "stop":
        refused(capfd, command, says)
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"2"}  # unharmed
    else:
        assert main(command) == 0
        error = capfd.readouterr().err
        assert says in error and "going on, as training.on_save_error says" in error
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"2"}  # 6 could not be written either


# ---- resume


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["TERM", "INT"],
)
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
    number, status, smoke_run, smoke_command, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        kill_at(patch, 2, number)  # seen after step 3, which no checkpoint is due at
        assert main(smoke_command(tmp_path / "run")) == status
    assert "SIG" in capfd.readouterr().err
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"2", "3"}
    assert main(smoke_command(tmp_path / "run")) == 0
    assert "resumed at step 3" in capfd.readouterr().out
    assert_equals_the_straight_run(tmp_path / "run", smoke_run)


@pytest.mark.slow
def test_sigterm_to_the_process_itself(smoke_run, smoke_command, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    # slow enough to be hit
    program = (
        "import sys, time\n"
        "from hdlm_jax.training.metrics import MetricsLog\n"
        "write = MetricsLog.write\n"
        "MetricsLog.write = lambda *a: (write(*a), time.sleep(1))\n"
        "from hdlm_jax.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, *smoke_command(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 180
        while not metrics.read(tmp_path / "run") and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, error
    assert "SIGTERM: stopped after step" in error
    assert "Traceback" not in error
    assert main(smoke_command(tmp_path / "run")) == 0
    assert_equals_the_straight_run(tmp_path / "run", smoke_run)


def test_a_finished_run_says_that_nothing_is_left(copied, smoke_command, capfd):
    before = contents(copied)
    assert main(smoke_command(copied)) == 0
    assert f"nothing left to do: step {STEPS} of {STEPS}" in capfd.readouterr().out
    assert contents(copied).keys() == before.keys()
    assert metrics.read(copied) == [json.loads(line) for line in before["metrics.jsonl"].splitlines()]


def test_a_truncated_checkpoint_is_set_aside_and_its_steps_done_again(copied, smoke_run, smoke_command, capfd):
    for path in (copied / "checkpoints/6/state").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            os.truncate(path, path.stat().st_size // 2)
    assert main(smoke_command(copied)) == 0
    out, err = capfd.readouterr()
    assert "checkpoint 6 in" in err and "set aside as bad-6" in err and "going on from checkpoint 4" in err
    assert "resumed at step 4" in out
    assert (copied / "checkpoints/bad-6").is_dir()
    assert_equals_the_straight_run(copied, smoke_run)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(copied, smoke_run, smoke_command, capfd):
    shutil.rmtree(copied / "checkpoints/6")
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert main(smoke_command(copied, *mesh)) == 0
    assert "resumed at step 4" in capfd.readouterr().out
    for a, b in zip(untimed(smoke_run), untimed(copied), strict=True):
        assert b == pytest.approx(a, rel=1e-3)


# ---- what it refuses, with nothing changed


def refused(capfd, arguments, *says):
    """The one message of a command that is refused."""
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for text in says:
        assert text in error, error
    return error


def test_another_experiment_in_the_folder(copied, smoke_command, capfd):
    before = contents(copied)
    more = ["--config.model.hidden=32", "--config.seed=7"]
    error = refused(capfd, smoke_command(copied, *more), "holds another experiment", "  model.hidden: 16 in the run")
    assert len(error.splitlines()) == 3
    assert contents(copied) == before


def test_a_folder_in_use(copied, smoke_command, capfd):
    before = contents(copied)
    with run_folder.locked(copied):
        refused(capfd, smoke_command(copied), f"is in use by process {os.getpid()}")
    assert contents(copied).keys() == before.keys()


def test_no_checkpoint_that_can_be_read(copied, smoke_command, capfd):
    for path in copied.glob("checkpoints/*/manifest/manifest.json"):
        path.write_text("{}")
    before = contents(copied)
    error = refused(capfd, smoke_command(copied), "no checkpoint in", "can be read", "nothing was changed")
    assert len(error.splitlines()) == 1
    assert contents(copied) == before


def test_data_that_were_prepared_and_changed(small_text, smoke_command, tmp_path, capfd):
    """Prepared data train as well as those a run prepares itself; other data under the same name are refused."""
    data, run = tmp_path / "data", tmp_path / "run"
    block = {"source": "text", "path": str(small_text), "tokenizer": "bytes", "length": 32}
    prepare.prepare(block, data)
    command = smoke_command(run, f"--config.data.prepared={data}", "--config.training.steps=1")
    assert main(command) == 0
    assert not (run / "data").exists()
    before = contents(run)
    shutil.rmtree(data)
    other = tmp_path / "other.txt"
    other.write_text(small_text.read_text().upper())
    prepare.prepare(block | {"path": str(other)}, data)
    capfd.readouterr()
    error = refused(capfd, command, "data: not those that", "corpus was 'text", "sha256", "nothing was changed")
    assert len(error.splitlines()) == 1
    assert contents(run) == before


def test_weights_of_another_model(copied, smoke_command, capfd):
    """A config edited by hand to what the weights are not."""
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"mlp_ratio": 4', '"mlp_ratio": 2'))
    before = contents(copied)
    command = smoke_command(copied, "--config.model.mlp_ratio=2")
    refused(capfd, command, "is of another model or optimizer than this one", "ema/blocks/mlp_in/kernel")
    assert contents(copied) == before


# ---- lost runs


def test_a_run_without_finite_losses_stops_and_keeps_the_last_good_checkpoint(
    smoke_command, tmp_path, monkeypatch, capfd
):
    """From step 4 on every step is skipped: checkpoint 2 stays the newest."""
    make = train._run

    def breaking(*arguments):
        run, calls = make(*arguments), itertools.count(1)

        def step(*inputs):
            state, found = run.step(*inputs)
            return state, found | ({"loss": found["loss"] * np.nan, "skipped": 1.0} if next(calls) >= 4 else {})

        return run._replace(step=step)

    command = smoke_command(tmp_path / "run", "--config.training.max_skipped=3")
    with monkeypatch.context() as patch:
        patch.setattr(train, "_run", breaking)
        refused(
            capfd,
            command,
            "step 4 had no finite loss or gradient: not saved",
            "no finite loss and gradient in the last 3 steps up to step 6",
            "the last good checkpoint is kept",
            "optimizer.learning_rate",
        )
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"2"}
    assert [row["train/skipped"] for row in metrics.read(tmp_path / "run") if "train/skipped" in row] == [0] * 3 + [
        1
    ] * 3
    assert "train/loss" not in metrics.read(tmp_path / "run")[-1]
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [4, 5, 6] and skipped[0]["rows"] == [24, 31]
    config, data = run_folder.read_config(tmp_path / "run"), prepare.open_prepared(tmp_path / "run/data")
    again = pipeline.batch_at(data.train, config.seed, config.training.batch, 3)
    np.testing.assert_array_equal(np.stack([data.train[i] for i in skipped[0]["windows"]]), again)
    noise_rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), 3)
    assert skipped[0]["rng"] == jax.random.key_data(noise_rng).tolist() and skipped[0]["loss"] == "nan"


@pytest.mark.slow
def test_a_learning_rate_beyond_all_measure_stops_the_run(smoke_command, tmp_path, capfd):
    more = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip=0", "--config.training.max_skipped=2"]
    refused(capfd, smoke_command(tmp_path / "run", *more), "no finite loss and gradient in the last")


def test_a_run_shorter_than_the_patience_still_tells(monkeypatch):
    with pytest.raises(UserError, match="no finite loss and gradient in the last 4 steps up to step 4"):
        loop.stop_if_lost(min(10, 4), 4, 4)
    loop.stop_if_lost(10, 9, 9)
