"""Runs in a bucket (a fake one): the same bits as in a folder, damage set aside, kills, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdlm_jax import files
from hdlm_jax.__main__ import main
from hdlm_jax.training import metrics, storage

ROOT = Path(__file__).resolve().parents[2]
RUN = "gs://bucket/runs/a"
LAST = 6  # step of the smoke run
# Orbax ends its loop at the first array that fails, and the others find it closed.
LATE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def here(bucket, tmp_path, monkeypatch):
    """An empty bucket, and a cache of its own."""
    bucket.objects.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return bucket


def untimed(folder):
    timed = lambda name: name in ("train/tokens_per_second", "train/mfu") or name.startswith("goodput/")
    return [{name: x for name, x in row.items() if not timed(name)} for row in metrics.read(folder)]


def assert_equals_the_straight_run(smoke_run):
    there, here = (storage.read_manifest(files.place(f) / "checkpoints", LAST)["leaves"] for f in (RUN, smoke_run))
    assert there == here
    assert untimed(RUN) == untimed(smoke_run)


def test_a_run_in_a_bucket_is_that_of_a_folder(here, smoke_command, smoke_run, capfd):
    assert main(smoke_command(RUN)) == 0
    assert_equals_the_straight_run(smoke_run)
    top = set(files.names(files.place(RUN)))
    local = {path.name for path in smoke_run.iterdir()} - {".lock"}
    known = lambda names: {"events" if name.startswith("events.out") else name for name in names}
    assert known(top) == known(local)  # the lock is gone
    assert {name.split("/")[0] for name in here.names("runs/a/checkpoints/")} == {"2", "4", "6"}
    assert len(here.names("runs/a/hosts/")) == 1
    capfd.readouterr()
    assert main(smoke_command(RUN)) == 0
    assert f"nothing left to do: step {LAST} of {LAST}" in capfd.readouterr().out
    assert main(["evaluate", "--run", RUN, "--windows", "4"]) == 0
    assert main(["sample", "--run", RUN]) == 0
    assert "--- written to gs://bucket/runs/a/samples/" in capfd.readouterr().out


@LATE
def test_a_flipped_bit_is_found_and_the_step_set_aside(here, smoke_command, smoke_run, capfd):
    assert main(smoke_command(RUN)) == 0
    arrays = [name for name in here.objects if "/6/state/" in name and "/d/" in name]
    for name in arrays:
        data = bytearray(here.objects[name].data)
        data[len(data) // 2] ^= 1
        here.put(name, bytes(data), None)
    capfd.readouterr()
    assert main(smoke_command(RUN)) == 0
    out, err = capfd.readouterr()
    assert "set aside as bad-6" in err and "going on from checkpoint 4" in err and "resumed at step 4" in out
    assert here.names("runs/a/checkpoints/bad-6/")
    assert_equals_the_straight_run(smoke_run)


def test_a_save_without_its_last_object_does_not_count(here, smoke_command, smoke_run, capfd):
    assert main(smoke_command(RUN)) == 0
    here.remove(f"runs/a/checkpoints/{LAST}/commit_success.txt", None)
    here.put(f"runs/a/checkpoints/{LAST}/left", b"", None)
    assert main(smoke_command(RUN)) == 0
    assert "resumed at step 4" in capfd.readouterr().out
    assert "left" not in here.names(f"runs/a/checkpoints/{LAST}/")
    assert_equals_the_straight_run(smoke_run)


@LATE
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_bucket_that_takes_no_checkpoint(choice, here, smoke_command, capfd):
    here.refuse = re.compile("checkpoints/4/")
    try:
        status = main(smoke_command(RUN, f"--config.training.on_save_error={choice}"))
    finally:
        here.refuse = None
    error = capfd.readouterr().err
    assert f"checkpoint 4 could not be written to {RUN}/checkpoints" in error, error
    assert status == (2 if choice == "stop" else 0)
    committed = [name for name in here.names("runs/a/checkpoints/") if re.fullmatch(r"\d/commit_success.txt", name)]
    assert [name[0] for name in committed] == ["2", "6"]  # the last one had begun when the failure came out


def test_what_is_no_bucket_or_takes_nothing_is_refused(here, smoke_command, capfd):
    assert main(smoke_command("s3://bucket/runs")) == 2
    allowed = "allowed: a folder of this machine, or gs://BUCKET/FOLDER"
    assert capfd.readouterr().err == f"hdlm: --workdir: got 's3://bucket/runs'; {allowed}\n"
    here.refuse = re.compile("")
    try:
        assert main(smoke_command(RUN)) == 2
    finally:
        here.refuse = None
    error = capfd.readouterr().err
    assert error.startswith(f"hdlm: {RUN}/.lock: cannot be written (Forbidden") and len(error.splitlines()) == 1
    assert here.names() == []


@pytest.mark.slow
def test_killed_in_mid_save_the_same_command_goes_on(here, smoke_command, smoke_run):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    command = [sys.executable, "-m", "hdlm_jax", *smoke_command(RUN)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while not here.names("runs/a/checkpoints/4/"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert json.loads(here.objects["runs/a/.lock"].data)["pid"] == process.pid
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_equals_the_straight_run(smoke_run)
