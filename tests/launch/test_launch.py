"""The launch scripts against stub gcloud, xpk, kubectl and sbatch: what they would run, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["tpu_vm.sh", "xpk.sh", "slurm.sbatch", "local_processes.sh"]
CLOUD = {"PROJECT": "acme", "ZONE": "us-west4-a", "WORKDIR": "/shared/runs/a"}
STUB = """#!/usr/bin/env bash
call=$(basename "$0")$(printf ' <%s>' "$@")
echo "$call" >>"$CALLS"
"""


@pytest.fixture
def launch(tmp_path):
    """(script, arguments, settings, stubs that answer) -> (status, output, commands that ran)."""

    def run(script, *arguments, answers=None, **settings):
        stubs, calls = tmp_path / "bin", tmp_path / "calls"
        stubs.mkdir(exist_ok=True)
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "srun", "hdlm", "git"):
            stub = stubs / name
            stub.write_text(STUB + (answers or {}).get(name, ""))
            stub.chmod(0o755)
        calls.write_text("")
        clean = {"PATH": f"{stubs}:/usr/bin:/bin", "CALLS": str(calls), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments], env=clean | settings, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def test_create_asks_for_a_queued_resource(launch):
    status, output, calls = launch("tpu_vm.sh", "create", **CLOUD, SPOT="yes")
    assert status == 0, output
    assert calls == [
        "gcloud <compute> <tpus> <queued-resources> <create> <hdlm> <--project=acme> <--zone=us-west4-a>"
        " <--node-id=hdlm> <--accelerator-type=v5litepod-16> <--runtime-version=v2-alpha-tpuv5-lite> <--spot>"
    ]


@pytest.mark.parametrize(
    ("topology", "kind", "runtime"),
    [
        ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base"),
        ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p:4x8x8", "v5p-512", "v2-alpha-tpuv5"),
        ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_slices_by_their_names_at_google(launch, topology, kind, runtime):
    status, output, calls = launch("tpu_vm.sh", "--dry-run", "create", **CLOUD, TOPOLOGY=topology, SLICES="2")
    assert (status, calls) == (0, []), output
    assert f"--accelerator-type={kind} --runtime-version={runtime}" in output
    assert "--node-count=2 --node-prefix=hdlm" in output and "--node-id" not in output


def test_waiting_ends_when_the_slice_is_there_or_lost(launch):
    status, output, _ = launch("tpu_vm.sh", "wait", answers={"gcloud": "echo ACTIVE\n"}, **CLOUD)
    assert status == 0 and "state: ACTIVE" in output
    status, output, _ = launch("tpu_vm.sh", "wait", answers={"gcloud": "echo FAILED\n"}, **CLOUD)
    assert status == 2 and "is FAILED" in output


def test_training_starts_on_every_host_of_every_slice(launch):
    status, output, calls = launch("tpu_vm.sh", "train", **CLOUD, SLICES="2")
    assert status == 0, output
    started = [call for call in calls if "<ssh>" in call]
    assert [call.split("<ssh> ")[1].split()[0] for call in started] == ["<hdlm-0>", "<hdlm-1>"]
    assert all("<--worker=all>" in call for call in started)
    command = "hdlm train --config experiments/scale/epsilon.py:130m-v5e --workdir /shared/runs/a --distributed on"
    assert all(command in call and "LIBTPU_INIT_ARGS='--xla_jf" in call for call in started)


def test_what_a_dry_run_prints_is_what_runs(launch):
    """The lines of a dry run, executed by a shell, give the calls of the real run."""
    settings = CLOUD | {"CLUSTER": "c", "IMAGE": "r/i:t", "PARTITION": "gpu"}
    for script, verb in [("tpu_vm.sh", "train"), ("xpk.sh", "submit"), ("slurm.sbatch", None)]:
        arguments = [] if verb is None else [verb]
        status, printed, none = launch(script, "--dry-run", *arguments, **settings)
        assert (status, none) == (0, [])
        _, _, real = launch(script, *arguments, **settings)
        calls = [" ".join(f"<{word}>" for word in shell_words(line)) for line in printed.splitlines()]
        assert calls == [f"<{call.split(' ', 1)[0]}> {call.split(' ', 1)[1]}" for call in real]


def shell_words(line):
    """The words that bash reads in a line."""
    out = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return out.stdout.split("\0")[:-1]


def test_xpk_submits_the_same_training(launch):
    status, output, calls = launch("xpk.sh", "submit", **CLOUD, CLUSTER="c", IMAGE="r/i:t", TOPOLOGY="tpu7x:4x4x4")
    assert status == 0, output
    (call,) = calls
    assert "<--tpu-type=tpu7x-4x4x4> <--num-slices=1> <--docker-image=r/i:t>" in call and "--distributed on" in call
    _, _, calls = launch("xpk.sh", "logs", **CLOUD, CLUSTER="c")
    assert calls[0].startswith("kubectl <logs>")


def test_slurm_submits_itself_and_starts_one_process_per_gpu(launch):
    settings = {"WORKDIR": "/shared/runs/a", "PARTITION": "gpu", "GPUS_PER_NODE": "4"}
    status, output, calls = launch("slurm.sbatch", **settings)
    assert status == 0, output
    assert "<--nodes=2> <--ntasks-per-node=4> <--gpus-per-task=1>" in calls[0] and "<--requeue>" in calls[0]
    inside = {"SLURM_JOB_ID": "1", "HDLM_COMMAND": "hdlm train --config c --workdir w --distributed on"}
    status, output, calls = launch("slurm.sbatch", **inside)
    assert status == 0, output
    assert calls == ["srun <--kill-on-bad-exit=1> <hdlm> <train> <--config> <c> <--workdir> <w> <--distributed> <on>"]


def test_local_processes_find_each_other_and_fail_together(launch, tmp_path):
    settings = {"WORKDIR": str(tmp_path / "run"), "CONFIG": "x.py", "PROCESSES": "3"}
    status, output, calls = launch("local_processes.sh", **settings)
    assert status == 0, output
    assert sorted(call[-len("<--process-id> <0>") :] for call in calls) == [f"<--process-id> <{i}>" for i in range(3)]
    assert all("<--coordinator> <localhost:12355> <--num-processes> <3>" in call for call in calls)
    failing = {"hdlm": '[[ "$*" != *"--process-id 1"* ]] || exit 7\nsleep 20\n'}
    assert launch("local_processes.sh", answers=failing, **settings)[0] == 7


@pytest.mark.parametrize("script", SCRIPTS)
def test_placeholders_are_refused(launch, script):
    arguments = {"tpu_vm.sh": ["create"], "xpk.sh": ["submit"]}.get(script, [])
    status, output, calls = launch(script, "--dry-run", *arguments)
    assert (status, calls) == (2, [])
    assert "CHANGE_ME" in output and "set it in launch/launch.env" in output


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("tpu_vm.sh", [], CLOUD, "usage: tpu_vm.sh"),
        ("tpu_vm.sh", ["start"], CLOUD, "usage: tpu_vm.sh"),
        ("tpu_vm.sh", ["create"], CLOUD | {"TOPOLOGY": "v9:4x4"}, "TOPOLOGY: got 'v9:4x4'; allowed: v4:"),
        ("tpu_vm.sh", ["create"], CLOUD | {"TOPOLOGY": "tpu7x:4x4x4"}, "tpu7x runs on GKE only"),
        ("tpu_vm.sh", ["create"], CLOUD | {"SLICES": "0"}, "SLICES: got '0'"),
        ("local_processes.sh", [], {"WORKDIR": "w", "PROCESSES": "no"}, "PROCESSES: got 'no'"),
        ("slurm.sbatch", ["now"], {}, "usage: slurm.sbatch"),
    ],
)
def test_bad_settings_are_refused(launch, script, arguments, settings, message):
    status, output, calls = launch(script, *arguments, **settings)
    assert (status, calls) == (2, []) and message in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_headers_say_what_to_expect(script):
    header = (LAUNCH / script).read_text().split("set -euo pipefail")[0]
    assert "What to expect" in header or "to expect" in header
    assert "--dry-run" in header


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra dev)")
    files = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))] + ["launch/slurm.sbatch"]
    done = subprocess.run([shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_generation_has_its_compiler_flags():
    flags = {path.stem: [line for line in path.read_text().splitlines() if not line.startswith("#")]
             for path in (LAUNCH / "flags").glob("*.txt")}  # fmt: skip
    assert set(flags) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}
    assert all(line.startswith("--xla_") and "=" in line for lines in flags.values() for line in lines)
