"""The loop around `train_step`: evaluation, samples, checkpoints, records, and stopping when told to."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hdlm_jax import files
from hdlm_jax.data import pipeline
from hdlm_jax.data.prepare import Prepared
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.perplexity import Bound
from hdlm_jax.generation import sampling
from hdlm_jax.generation.chain import Chain
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import hosts, metrics, optimizer, profiler, replay, sharding, signals, state
from hdlm_jax.training.checkpoints import Checkpoints
from hdlm_jax.training.distributed import is_writer
from hdlm_jax.training.goodput import Account
from hdlm_jax.training.metrics import MetricsLog
from hdlm_jax.training.progress import Progress
from hdlm_jax.training.state import TrainState

HELD_OUT = "held_out/bits_per_byte"
SAMPLES = 4  # texts drawn at a time while training


class Run(NamedTuple):
    """What stays the same from step to step."""

    config: ConfigDict
    workdir: Path
    data: Prepared
    parts: Parts
    chain: Chain  # what the texts drawn while training come from
    mesh: Mesh
    step: Callable  # (state, x0_BxL, rng) -> (state, metrics), compiled, the state donated
    draw: Callable  # (params, tokens_BxL, valid_BxL, rng) -> {term: [B]}, one draw of the held-out bound
    rng: Array  # of all noise, on every device
    flops_per_second: float | None  # the devices' peak, where known
    flops_per_step: float
    profile: tuple[int, int]  # the first step to be traced, and how many; (0, 0): none


class Interval(NamedTuple):
    """What has gathered since the last record."""

    pending: list[dict]  # metrics of the steps
    skipped: int  # steps in a row, up to the last record, without a finite loss
    began: float  # on the clock of the loop
    away: float  # seconds of it that were not training


def run_steps(run: Run, current: TrainState, saved: Checkpoints, account: Account) -> int:
    """Steps until the end or until told to stop.

    Returns:
      0 at the end; 130 or 143 after a signal (saved).

    Raises:
      UserError: too many steps in a row without a finite loss and gradient; nothing can be written, and
        `training.on_save_error` is 'stop'.
    """
    c, first = run.config.training, int(current.step)
    rows = sharding.local_rows(run.mesh, c.batch)
    batches = pipeline.batches(run.data.train, run.config.seed, c.batch, first, rows=rows)
    log = MetricsLog(run.workdir)
    if is_writer():
        account.resume(metrics.read(run.workdir), first, time.time())
        log.resume(first)
    interval = Interval([], 0, time.perf_counter(), 0.0)
    with (
        signals.watched() as asked,
        contextlib.closing(batches),
        contextlib.closing(log),
        Progress(c.steps, first, shown=is_writer()) as progress,
        profiler.traced(run.workdir / profiler.FOLDER, run.profile) as profile,
    ):
        for done in range(first + 1, c.steps + 1):
            profile(done)
            with account.spend("data"):
                x0_BxL = sharding.place_rows(run.mesh, c.batch, next(batches))
            current, found = run.step(current, x0_BxL, run.rng)
            interval.pending.append(found)
            told, end = asked(done), done == c.steps  # a signal that comes later stops the next step
            if _due(done, c.log_every, end or told):
                interval = _log(run, log, progress, account, interval, done)
            pause = time.perf_counter()
            scores = {}
            if _due(done, c.evaluate_every, end):
                with account.spend("evaluate"):
                    bound = evaluate(run, current)
                scores = _held_out(bound)
                _write(run, progress, lambda: log.write(done, scores))  # noqa: B023 (called here and now)
                progress.note(f"step {done}, held out: {bound}")
            if _due(done, c.checkpoint_every, end or told):
                with account.spend("save"):
                    _save(run, progress, bool(found["skipped"]), done, lambda: saved.save(done, current, scores))  # noqa: B023
            if _due(done, c.sample_every, end):
                with account.spend("sample"):
                    record = _sample(run, current, done)
                    _write(run, progress, lambda: _keep(run, done, record))  # noqa: B023
            interval = interval._replace(away=interval.away + time.perf_counter() - pause)
            if told:
                progress.note(f"{told.name}: stopped after step {done}; the same command goes on from there")
                return 128 + told
    return 0


def evaluate(run: Run, current: TrainState) -> Bound:
    """The bound of the running-mean weights on the first held-out windows, each device with rows of its own."""
    c, held_out = run.config.training, run.data.held_out
    batch = sharding.whole_rows(run.mesh, min(c.batch, len(held_out)))
    rows = pipeline.held_out_batches(held_out, batch)
    chosen = [
        (x, np.broadcast_to(is_row[:, None], x.shape)) for x, is_row in itertools.islice(rows, c.evaluate_batches)
    ]
    counts = run.data.manifest["splits"]["held_out"]
    return perplexity.estimate(
        run.draw,
        state.weights(current),
        chosen,
        counts["bytes"] / counts["tokens"],
        draws=2,
        seed=0,
        hyperschedule=perplexity.name_of(run.parts),
    )


def _due(done: int, every: int, last: object) -> bool:
    return bool(last) or (every > 0 and done % every == 0)


def _log(run: Run, log: MetricsLog, progress: Progress, account: Account, interval: Interval, done: int) -> Interval:
    """Records the steps since the last record; the next interval."""
    c, rows = run.config.training, jax.device_get(interval.pending)
    first = done - len(rows) + 1
    for step, row in enumerate(rows, first):
        if row["skipped"]:
            record = replay.record(run.data, run.config.seed, c.batch, step, run.rng, row)
            _write(run, progress, lambda: replay.append(run.workdir, record))  # noqa: B023 (called here and now)
    means, skipped = summary(rows, interval.skipped)
    now = time.perf_counter()
    seconds = now - interval.began - interval.away
    record = means | _speed(run, done, len(rows), seconds)
    _write(run, progress, lambda: log.write(done, record | account.record(time.time())))
    hosts.beat(run.workdir, done, seconds / len(rows))
    progress.update(done, record)
    stop_if_lost(min(c.max_skipped, c.steps), skipped, done)
    return Interval([], skipped, now, 0.0)


def _write(run: Run, progress: Progress, write: Callable[[], object]) -> None:
    """Lets the writing process write; what fails stops the run or is only told, as `training.on_save_error` says."""
    try:
        if is_writer():
            write()
    except UserError as error:
        _or_go_on(run, progress, error)


def _or_go_on(run: Run, progress: Progress, error: UserError) -> None:
    if run.config.training.on_save_error == "stop":
        raise error
    progress.note(f"{error}; going on, as training.on_save_error says")


def _save(run: Run, progress: Progress, skipped: bool, done: int, save: Callable[[], object]) -> None:
    """Starts a checkpoint, unless the step was skipped: then the weights may be what spoiled its loss."""
    if skipped:
        progress.note(f"step {done} had no finite loss or gradient: not saved, the last good checkpoint is kept")
        return
    try:
        save()
    except UserError as error:  # every process learns of it
        _or_go_on(run, progress, error)


def summary(rows: list[dict], skipped: int) -> tuple[dict[str, float], int]:
    """Means over the steps that were not skipped, and how many in a row have been skipped by now."""
    for row in rows:
        skipped = skipped + 1 if row["skipped"] else 0
    good = [row for row in rows if not row["skipped"]]
    means = {f"train/{name}": float(np.mean([row[name] for row in good])) for name in (good[0] if good else ())}
    means["train/skipped"] = float(sum(row["skipped"] for row in rows))
    return means, skipped


def _speed(run: Run, done: int, steps: int, seconds: float) -> dict[str, float]:
    """Learning rate, and the speed of the last `steps` steps without evaluation, samples and saves."""
    c = run.config.training
    record = {
        "train/learning_rate": float(optimizer.learning_rate(run.config.optimizer, c.steps)(done - 1)),
        "train/tokens_per_second": c.batch * run.config.data.length * steps / seconds,
    }
    if run.flops_per_second is not None:
        record["train/mfu"] = run.flops_per_step * steps / seconds / run.flops_per_second
    return record


def stop_if_lost(limit: int, skipped: int, done: int) -> None:
    """Raises `UserError` after `limit` steps in a row without a finite loss and gradient."""
    if skipped >= limit:
        raise UserError(
            f"training: no finite loss and gradient in the last {skipped} steps up to step {done}; the last good"
            f" checkpoint is kept, {replay.FILE} tells their batches. Try a lower optimizer.learning_rate, a longer"
            " warmup or another seed in a new folder"
        )


def _held_out(bound: Bound) -> dict[str, float]:
    return {
        HELD_OUT: bound.bits_per_byte,
        "held_out/bits_per_byte_error": bound.bits_per_byte_error,
        "held_out/nats_per_token": bound.nats_per_token,
        **{f"held_out/{name}": x for name, x in bound.terms.items()},
    }


def _sample(run: Run, current: TrainState, done: int) -> dict[str, Any]:
    """A few texts, drawn by all processes."""
    chain, tokenizer = run.chain, run.data.tokenizer
    weights = sharding.on_one_device(run.mesh, state.weights(current))
    out = sampling.draw(chain, weights, tokenizer, [""] * SAMPLES, chain.hs.length, seed=done)
    sampler = run.config.sampler.to_dict()
    return {"step": done, "hyperschedule": repr(chain.hs), "sampler": sampler, "texts": out.texts}


def _keep(run: Run, done: int, record: Mapping[str, Any]) -> None:
    path = run.workdir / "samples" / f"step{done}.json"
    files.write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
