"""Proof of resume: killed at random moments, also in mid-save, and equal in every bit at the end."""

import json
import shutil

import pytest

from hdlm_jax import config as configs
from hdlm_jax.benchmarks import kill
from hdlm_jax.errors import UserError
from hdlm_jax.training import metrics, run_folder


def test_killed_five_times_a_run_ends_in_the_same_bits(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: it starts faster
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    sizes = {"steps": 40, "checkpoint_every": 4, "evaluate_every": 20}
    config = configs.override(run_folder.read_config(smoke_run), {f"training.{k}": v for k, v in sizes.items()})
    found = kill.measure(config, tmp_path / "runs", times=5, seed=1)
    assert found["kills"] == 5 and found["in mid-save"] >= 1 and found["bitwise equal"]


def test_what_differs_is_found(smoke_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(smoke_run, other)
    kill.compare(smoke_run, other)
    lines = (other / metrics.FILE).read_text().splitlines()
    record = json.loads(lines[2])
    faster = record | {"train/tokens_per_second": 1.0, "goodput/step": 0.0}
    (other / metrics.FILE).write_text("\n".join([*lines[:2], json.dumps(faster), *lines[3:]]) + "\n")
    kill.compare(smoke_run, other)  # times may differ
    (other / metrics.FILE).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="resume: 8 records in the straight run, 7 in the one"):
        kill.compare(smoke_run, other)
    name = next(key for key in record if key.startswith("train/") and key not in kill.TIMES)
    (other / metrics.FILE).write_text("\n".join([*lines[:2], json.dumps(record | {name: 0.5}), *lines[3:]]) + "\n")
    with pytest.raises(UserError, match="resume: the records of step"):
        kill.compare(smoke_run, other)
    shutil.rmtree(other / "checkpoints/6")
    shutil.copytree(other / "checkpoints/4", other / "checkpoints/6")
    with pytest.raises(UserError, match="resume: step 6 differs in .* arrays: "):
        kill.compare(smoke_run, other)


def test_no_kills_and_a_folder_in_use_are_refused(tmp_path):
    with pytest.raises(UserError, match="--times: got 0"):
        kill.measure(configs.default(), tmp_path / "new", 0)
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="--workdir: got .*; allowed: a new or empty folder"):
        kill.measure(configs.default(), tmp_path, 1)
