"""Proof of resume: training is killed at random moments, started again, and compared bit for bit."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError, require
from hdlm_jax.training import metrics

TIMES = ("train/tokens_per_second", "train/mfu", "goodput/")  # what a record says of time, by beginning
DELAYS = {"steps": 0.03, "save": 0.03, "start": 3.0}  # in what kills fall, in turn, and the longest delay in seconds
MOMENTS = tuple(DELAYS)
PRELOADED = ["hdlm_jax.training.train", "hdlm_jax.training.storage", "grain", "tensorboardX"]


def measure(config: ConfigDict, folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Trains once straight and once killed `times` times by SIGKILL, each time started again in the same folder.

    The kills fall in turn into the steps, the writing of a checkpoint, and the start (`MOMENTS`).

    Args:
      config: an experiment of a few dozen steps with a checkpoint every few.
      folder: a new or empty one, for both runs.
      times: kills.
      seed: of the moments.

    Returns:
      the kills, how many of them fell into a half-written checkpoint, the steps that were resumed at, and seconds.

    Raises:
      UserError: the runs differ in the state that they end with or in what they logged (times excepted); a run
        that failed by itself.
    """
    require(times >= 1, "--times", times, "a positive integer")
    empty = not folder.exists() or not any(folder.iterdir())
    require(empty, "--workdir", str(folder), "a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs, chance, began = _Runs(config, folder), random.Random(seed), time.monotonic()
    straight, again = folder / "straight", 1
    runs.to_the_end(straight)
    most = max(1, 2 * len(metrics.read(straight)) // times)  # records between two kills
    saving, resumed = 0, []
    while len(resumed) < times:
        killed, kind = folder / f"killed{again}", MOMENTS[len(resumed) % len(MOMENTS)]
        if not runs.to_a_kill(killed, kind, chance.randint(1, most), chance.uniform(0, DELAYS[kind])):
            compare(straight, killed)  # it was faster: the next kills are another run's
            again += 1
            continue
        saving += kind != "start" and bool(_half_written(killed))  # a start may find one of before
        resumed.append(max(_steps(killed), default=0))
    runs.to_the_end(killed)
    compare(straight, killed)
    return {
        "kills": times,
        "in mid-save": saving,
        "resumed at": " ".join(map(str, resumed)),
        "bitwise equal": True,
        "seconds": time.monotonic() - began,
    }


class _Runs:
    """Starts training in processes of its own; what they print goes to log.txt."""

    def __init__(self, config: ConfigDict, folder: Path):
        self._context = multiprocessing.get_context("forkserver")  # one process imports; each run is a fork of it
        self._context.set_forkserver_preload(PRELOADED)
        self._config, self._log = configs.to_json(config), folder / "log.txt"

    def to_the_end(self, workdir: Path) -> None:
        """Trains without a kill."""
        process = self._start(workdir)
        process.join()
        self._check(process.exitcode == 0, process)

    def to_a_kill(self, workdir: Path, kind: str, records: int, delay: float) -> bool:
        """Kills after so many records, in mid-save or in the start, a delay after that; False if the run has ended."""
        before = len(metrics.read(workdir))
        process = self._start(workdir)
        arrived = {
            "steps": lambda: len(metrics.read(workdir)) >= before + records,
            "save": lambda: bool(_half_written(workdir)) and len(metrics.read(workdir)) > before,
            "start": lambda: True,
        }[kind]
        while process.is_alive() and not arrived():
            time.sleep(0.001)
        process.join(delay)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        self._check(process.exitcode in (0, -signal.SIGKILL), process)
        return process.exitcode != 0

    def _check(self, fine: bool, process) -> None:
        require(fine, "hdlm train", f"status {process.exitcode}", f"0 unless killed (see {self._log})")

    def _start(self, workdir: Path):
        process = self._context.Process(target=trained, args=(self._config, workdir, self._log))
        process.start()
        return process


def trained(config: str, workdir: Path, log: Path) -> None:
    """What `hdlm train` does, in a process of its own."""
    file = open(log, "a")  # noqa: SIM115 (open to the end)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    from hdlm_jax.training import compilation, train

    compilation.keep()
    sys.exit(train.train(configs.from_json(config), workdir))


def compare(straight: Path, killed: Path) -> None:
    """Raises `UserError` unless two runs end in the same bits and logged the same numbers, times excepted.

    State (weights, optimizer, running mean, step: the random numbers are functions of seed and step) is compared
    by the names, shapes, dtypes and checksums of the last checkpoint, which are those of its arrays.
    """
    last = max(_steps(straight), default=0)
    saved = [_leaves(folder, last) for folder in (straight, killed)]
    other = [name for name in saved[0] | saved[1] if saved[0].get(name) != saved[1].get(name)]
    if other:
        raise UserError(f"resume: step {last} differs in {len(other)} arrays: {', '.join(other[:5])}")
    for a, b in zip(_records(straight), _records(killed), strict=False):
        if a != b:
            raise UserError(f"resume: the records of step {a['step']} differ: {a} and {b}")
    counts = [len(_records(folder)) for folder in (straight, killed)]
    if counts[0] != counts[1]:
        raise UserError(f"resume: {counts[0]} records in the straight run, {counts[1]} in the one that was killed")


def _leaves(folder: Path, step: int) -> dict[str, Any]:
    from hdlm_jax.training import storage

    return storage.read_manifest(folder / "checkpoints", step)["leaves"]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics.read(folder)]


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def _half_written(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))
