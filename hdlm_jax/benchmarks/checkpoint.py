"""How long checkpoints hold up training, and how long a run that starts again takes to its first step."""

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax import files
from hdlm_jax.benchmarks.kill import trained
from hdlm_jax.data.tokenizers import bytes_tokenizer
from hdlm_jax.errors import UserError
from hdlm_jax.models import parts as builders
from hdlm_jax.models import transformer
from hdlm_jax.training import metrics, optimizer, sharding, state
from hdlm_jax.training.checkpoints import Checkpoints

SIZE = {"model.hidden": 768, "model.blocks": 14, "model.heads": 12, "data.length": 64, "training.batch": 2}  # 99M
RUN = {"data.source": "text", "data.tokenizer": "bytes", "training.log_every": 1, "training.checkpoint_every": 1}


def measure(config: ConfigDict, folder: Path, repeats: int) -> dict[str, Any]:
    """Saves and restores the state of an experiment with fresh weights, then trains two steps and starts again.

    Args:
      config: an experiment; its data are replaced by a made-up text.
      folder: an empty one, on the disk to measure.
      repeats: saves.

    Returns:
      parameters, bytes of the state (weights, optimizer, running mean), the longest and the median seconds that
      `save` held up its caller (checksums included), seconds until all was on the disk, seconds of a restore with
      its checks, seconds from the start of a process to the record of its first resumed step, and those of them
      that compiling took.
    """
    found = _saves(config, folder / "checkpoints", repeats)
    return found | _resume(config, folder)


def _saves(config: ConfigDict, folder: Path, repeats: int) -> dict[str, Any]:
    tokenizer, mesh = bytes_tokenizer(), sharding.mesh(config.mesh)
    parts = builders.build(config, tokenizer.num_tokens, tokenizer.bos_id)
    tx, kept = optimizer.build(config.optimizer, config.training.steps), config.optimizer.ema > 0
    fresh = lambda: transformer.init(parts.model, jax.random.key(0))
    wanted, held = state.abstract(fresh, tx, mesh, ema=kept), state.create(fresh, tx, mesh, ema=kept)
    jax.block_until_ready(held)
    blocking, written = [], []
    with Checkpoints(folder, keep=1) as saved:
        saved.restore(wanted)  # nothing yet; compiles the checksums, as the start of a run does
        for step in range(1, repeats + 1):
            began = time.perf_counter()
            saved.save(step, held)
            blocking.append(time.perf_counter() - began)
            saved.wait()
            written.append(time.perf_counter() - began)
        began = time.perf_counter()
        jax.block_until_ready(saved.restore(wanted))
        restored = time.perf_counter() - began
    return {
        "parameters": transformer.num_parameters(held.params),
        "state bytes": sum(x.nbytes for x in jax.tree.leaves(held)),
        "blocking, longest": max(blocking),
        "blocking, median": statistics.median(blocking),
        "written": statistics.median(written),
        "restored": restored,
    }


def _resume(config: ConfigDict, folder: Path) -> dict[str, Any]:
    files.write_whole(folder / "text.txt", "\n\n".join(f"{i} times {i} is {i * i}. " * 20 for i in range(100)))
    ends = {"training.steps": 2, "training.evaluate_every": 0, "training.sample_every": 0}
    config = configs.override(config, {**RUN, **ends, "data.path": str(folder / "text.txt")})
    workdir = folder / "run"
    first = _start(config, workdir)
    first.join()
    if first.exitcode:
        raise UserError(f"hdlm train: ended with {first.exitcode}; see {_log(workdir)}")
    before = _steps(workdir, 0.0)[-1]
    files.remove(workdir / "checkpoints" / "2")
    began, wall = time.monotonic(), time.time()
    process = _start(config, workdir)
    while not (again := _steps(workdir, wall)) and process.is_alive():
        time.sleep(0.05)
    seconds = time.monotonic() - began
    process.kill()
    process.join()
    if not again:
        raise UserError(f"hdlm train: no step after a restart; see {_log(workdir)}")
    return {"resumed": seconds, "of it compiling": again[0]["goodput/compile"] - before["goodput/compile"]}


def _start(config: ConfigDict, workdir: Path) -> multiprocessing.Process:
    """Training in a process of its own, begun from nothing."""
    arguments = (configs.to_json(config), workdir, _log(workdir))
    process = multiprocessing.get_context("spawn").Process(target=trained, args=arguments)
    process.start()
    return process


def _log(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def _steps(workdir: Path, since: float) -> list[dict[str, Any]]:
    """The records of steps that were written after a time of day."""
    rows = (row for row in metrics.read(workdir) if "train/loss" in row)
    return [row for row in rows if row["goodput/time"] > since]
