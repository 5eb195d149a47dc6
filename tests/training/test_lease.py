"""The lock of a bucket: it is renewed, it refuses others, and goes to the next when its holder is dead."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from hdlm_jax import files
from hdlm_jax.errors import UserError
from hdlm_jax.training import lease


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Times of a test: a sign of life every 0.1 s."""
    for name, seconds in (("BEAT", 0.1), ("PATIENCE", 1.0), ("SETTLE", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def path(tmp_path):
    """The lock of a folder; it lies on a disk, for nothing in it knows the difference."""
    return tmp_path / "run" / ".lock"


def left_by(path, **about):
    """A lock that somebody has left."""
    mine = {"host": "other", "pid": 17, "where": "elsewhere", "token": "t", "beat": 3}
    files.write_whole(path, json.dumps(mine | about))


def test_it_is_renewed_refuses_others_and_is_gone_at_the_end(path):
    said = []
    with lease.held(path, said.append):
        first = files.read_text(path)
        time.sleep(0.5)
        assert json.loads(files.read_text(path))["beat"] > json.loads(first)["beat"]
        other = json.loads(files.read_text(path))
        other_machine(path, other)
    assert not path.exists() and said == []


def other_machine(path, mine):
    """What another machine sees of a live lock: that it changes."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_where", lambda: "another machine")
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*; allowed: wait for it"):
            lease.held(path, said.append).__enter__()
    assert "watching for 1 s whether it is alive" in said[0]
    assert json.loads(files.read_text(path))["token"] == mine["token"]


def test_one_that_is_left_is_taken_over_after_a_while(path):
    left_by(path)
    began = time.monotonic()
    with lease.held(path, lambda _: None):
        assert time.monotonic() - began >= 1.0
        assert json.loads(files.read_text(path))["pid"] == os.getpid()


def test_one_of_a_dead_process_of_this_machine_is_taken_over_at_once(path, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE", 60.0)
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (int(child.stdout), os.getpid()):  # the second: that of an earlier process with this one's number
        left_by(path, where=lease._where(), pid=pid)
        with lease.held(path, lambda _: None):
            assert json.loads(files.read_text(path))["token"] != "t"


def test_of_two_at_once_one_gets_it(path, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.5)
    ready, outcomes = threading.Barrier(2), []

    def take():
        ready.wait()
        try:
            with lease.held(path, lambda _: None):
                outcomes.append("held")
                time.sleep(1)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_one_that_was_taken_away_is_told_and_not_removed(path):
    said = []
    with lease.held(path, said.append):
        left_by(path)
        time.sleep(0.5)
    assert len(said) == 1 and "another process has taken this run folder over" in said[0]
    assert json.loads(files.read_text(path))["token"] == "t"
