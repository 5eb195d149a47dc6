"""Two processes of four devices each, in one run: the whole cycle, a dead peer, a notice to one of them; bad flags."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdlm_jax.__main__ import main
from hdlm_jax.errors import UserError
from hdlm_jax.training import distributed, metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6  # of the smoke run
PAUSED = (  # waits at the end of each step: {pause}, however busy the machine is
    "import sys, time\n"
    "from hdlm_jax.training import loop\n"
    "beat = loop.hosts.beat\n"
    "pause = lambda done: {pause}\n"
    "loop.hosts.beat = lambda folder, done, *more: (beat(folder, done, *more), time.sleep(pause(done)))\n"
    "from hdlm_jax.__main__ import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)
UNTIL_KILLED = PAUSED.format(pause="300 if done == 3 else 0")  # in step 3, whose checkpoint is not due
AWAITING_NOTICE = PAUSED.format(pause="3")  # a notice takes a second or two to reach all


def start(command, tmp_path, program=("-m", "hdlm_jax"), peer_timeout=600):
    """Two processes with the same command; their output is in out<i>."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    joined = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--peer-timeout", str(peer_timeout)]
    processes = []
    for i in range(2):
        with (tmp_path / f"out{i}").open("w") as out:
            whole = [sys.executable, *program, *command, *joined, "--process-id", str(i)]
            processes.append(subprocess.Popen(whole, env=environment, stdout=out, stderr=subprocess.STDOUT))
    return processes


def ends(processes, tmp_path, timeout=400):
    """Their exit statuses and what each has said."""
    try:
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass  # killed: the status tells
    finally:
        for process in processes:
            process.kill()
    statuses = [process.wait() for process in processes]
    return statuses, [(tmp_path / f"out{i}").read_text() for i in range(2)]


def wait_until(holds, processes, tmp_path):
    """Waits for what the processes are about to do; ends them where it does not come."""
    until = time.monotonic() + 400
    while not holds():
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            pytest.fail(str(ends(processes, tmp_path, timeout=1)))
        time.sleep(0.05)


def reached(folder, step):
    return max((row["step"] for row in metrics.read(folder)), default=0) >= step


def assert_close_to(folder, smoke_run):
    """Losses and bounds of a run on two processes are those of one, to rounding."""
    there, here = metrics.read(smoke_run), metrics.read(folder)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for a, b in zip(there, here, strict=True):
        wanted = {
            name: a[name] for name in ("train/loss", "train/gradient_norm", "held_out/bits_per_byte") if name in a
        }
        assert {name: b[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_two_processes_train_and_one_evaluates_and_samples(smoke_command, smoke_run, tmp_path, capfd):
    run = tmp_path / "run"
    statuses, said = ends(start(smoke_command(run), tmp_path), tmp_path)
    assert statuses == [0, 0], said
    assert "fresh start" in said[0] and f"step {STEPS}, held out" in said[0]
    assert not any("step" in line for line in said[1].splitlines() if not line.startswith("[Gloo]"))  # one writer
    assert_close_to(run, smoke_run)
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in sorted((run / "hosts").iterdir())] == ["process0.jsonl", "process1.jsonl"]
    assert main(["evaluate", "--run", str(run), "--windows", "4"]) == 0
    assert main(["sample", "--run", str(run)]) == 0
    assert main(smoke_command(run, "--config.training.steps=6")) == 0  # one process reads what two have written
    assert "nothing left to do" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_evaluate_a_run_together(smoke_run, tmp_path, capfd):
    command = ["evaluate", "--run", str(smoke_run), "--windows", "12", "--batch", "8", "--json"]
    capfd.readouterr()
    assert main(command) == 0
    alone = json.loads(capfd.readouterr().out)
    for mesh in (["--mesh", "4,2,1"], []):
        statuses, said = ends(start([*command, *mesh], tmp_path), tmp_path)
        assert statuses == [0, 0] and "bits_per_byte" not in said[1], said
        together = json.loads(said[0][said[0].index("{\n") :])
        assert (together["tokens"], together["step"]) == (12 * 32, STEPS)
        assert together["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_peer_ends_the_run_and_restart_continues(dead, smoke_command, smoke_run, tmp_path):
    run = tmp_path / "run"
    processes = start(smoke_command(run), tmp_path, ("-c", UNTIL_KILLED), peer_timeout=30)
    wait_until(lambda: reached(run, 3) and (run / "checkpoints/2").is_dir(), processes, tmp_path)
    processes[dead].send_signal(signal.SIGKILL)
    statuses, said = ends(processes, tmp_path)
    assert statuses[dead] == -signal.SIGKILL and statuses[1 - dead] not in (0, -signal.SIGKILL), said
    assert f"hdlm: process {1 - dead} of 2" in said[1 - dead]
    assert "start the same command again in every process; it goes on from the last checkpoint" in said[1 - dead]
    statuses, said = ends(start(smoke_command(run), tmp_path), tmp_path)
    assert statuses == [0, 0], said
    assert "resumed at step 2" in said[0]
    assert_close_to(run, smoke_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_to_one_process_stops_both_after_the_same_step(number, smoke_command, smoke_run, tmp_path):
    run = tmp_path / "run"
    processes = start(smoke_command(run), tmp_path, ("-c", AWAITING_NOTICE))
    wait_until(lambda: reached(run, 1), processes, tmp_path)
    processes[1].send_signal(number)
    statuses, said = ends(processes, tmp_path)
    assert statuses == [143, 143], said
    assert "SIGTERM: stopped after step" in said[0]
    stopped = metrics.read(run)[-1]["step"]
    assert (run / "checkpoints" / str(stopped)).is_dir() and stopped < STEPS
    statuses, said = ends(start(smoke_command(run), tmp_path), tmp_path)
    assert statuses == [0, 0] and f"resumed at step {stopped}" in said[0], said
    assert_close_to(run, smoke_run)


@pytest.mark.slow
def test_what_one_process_refuses_ends_them_all(smoke_command, smoke_run, tmp_path):
    """The folder holds another experiment: process 0 sees it first."""
    more = ("--config.seed=5",)
    statuses, said = ends(start(smoke_command(smoke_run, *more), tmp_path), tmp_path)
    assert statuses == [2, 2], said
    assert all("holds another experiment" in text and "Traceback" not in text for text in said)


# ---- alone


def test_the_sitter_speaks_only_when_no_word_was_left():
    command = [sys.executable, "-I", "-c", distributed._SITTER, "last words"]
    for word, said in ((b"", "last words\n"), (b"good-bye", "")):
        done = subprocess.run(command, input=word, stderr=subprocess.PIPE, timeout=60)
        assert done.stderr.decode() == said


def test_alone_there_is_nothing_to_join_and_together_is_here():
    with distributed.joined("auto"), distributed.joined("off"):
        assert distributed.is_writer()
    assert distributed.writer_first(lambda: 3) == 3
    with pytest.raises(UserError, match="^as it was$"), distributed.together():
        raise UserError("as it was")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"mode": "maybe"}, r"--distributed: got 'maybe'; allowed: 'auto', 'off', 'on'"),
        ({"mode": "on"}, r"--distributed: got 'on'; allowed: 'auto' or 'off', or --coordinator"),
        ({"coordinator": "a:1"}, r"--num-processes, --process-id: got None; allowed: all of"),
        ({"mode": "off", "coordinator": "a:1", "num_processes": 2, "process_id": 0}, r"--distributed: got 'off'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"--process-id: got 2; allowed: 0 \.\. 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, r"--coordinator: got 'a'; allowed: .*HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, r"--num-processes: got 0"),
        ({"peer_timeout": 0}, r"--peer-timeout: got 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, says):
    with pytest.raises(UserError, match=says), distributed.joined(**flags):
        pass
