"""Traces of steps on request, and what would take the process down. In processes of their own: see `profiler.check`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hdlm_jax.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_steps_are_traced_on_request(smoke_run, smoke_command, tmp_path):
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    done = python("-m", "hdlm_jax", *smoke_command(run, "--profile", "2:1"))
    assert done.returncode == 0, done.stderr
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1


def test_where_the_compiler_for_tpus_is_loaded_none_is_taken():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra launch)")
    program = (
        "from hdlm_jax.planning import chips\n"
        "from hdlm_jax.training import profiler\n"
        "chips.devices(chips.parse('v5e:2x2'))\n"
        "profiler.check((0, 0))\n"
        "profiler.check((1, 1))\n"
    )
    done = python("-c", program)
    assert done.returncode == 1, done.stderr
    message = "UserError: --profile: libtpu is loaded, though this is no TPU, and would crash the profiler; start anew"
    assert message in done.stderr.splitlines()[-1] and "JAX_PLATFORMS=cpu" in done.stderr.splitlines()[-1]


def test_what_is_no_range_of_steps_is_refused(smoke_command, tmp_path, capsys):
    assert main(smoke_command(tmp_path / "run", "--profile", "2")) == 2
    assert capsys.readouterr().err.startswith("hdlm: --profile: got '2'; allowed: FIRST:COUNT")
