"""Training: the loop around `train_step`, with evaluation, samples, checkpoints, resume and signals."""

import contextlib
import functools
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from hdlm_jax.data import pipeline, tokenizers
from hdlm_jax.data.prepare import DataConfig, Prepared, open_or_prepare
from hdlm_jax.errors import UserError, require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.perplexity import Bound
from hdlm_jax.generation import sampling
from hdlm_jax.generation.loop import Chain
from hdlm_jax.models import parts as builders
from hdlm_jax.models import transformer
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import flops, optimizer, run_folder, sharding, state, weights_file
from hdlm_jax.training.checkpoints import Checkpoints
from hdlm_jax.training.metrics import MetricsLog
from hdlm_jax.training.progress import Progress
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.step import Update, train_step

HELD_OUT = "held_out/bits_per_byte"
SAMPLES = 4  # texts drawn at a time while training


class Run(NamedTuple):
    """What stays the same from step to step."""

    config: ConfigDict
    workdir: Path
    data: Prepared
    parts: Parts
    step: Callable  # (state, x0_BxL, rng) -> (state, metrics), jitted, the state donated
    place: Callable  # numpy batch -> global device array
    flops_per_second: float | None  # the devices' peak, where known
    flops_per_step: float


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains `config` in `workdir` to its last step, or to SIGINT / SIGTERM; resumes what is there.

    Returns:
      0 at the end; 130 or 143 after a signal (saved; the same command goes on).

    Raises:
      UserError: bad config, a folder that holds another experiment or is in use, steps that stay without
        a finite loss (the last good checkpoint is kept).
    """
    workdir = Path(workdir)
    check(config)
    with run_folder.locked(workdir):
        run_folder.refuse_other(workdir, config)
        data = open_or_prepare(config.data.to_dict(), workdir / "data")
        parts = builders.build(config, data.tokenizer.num_tokens, data.tokenizer.bos_id)
        mesh = sharding.mesh(config.mesh)
        tx = optimizer.build(config.optimizer, config.training.steps)
        fresh = lambda: transformer.init(parts.model, jax.random.key(config.seed))
        kept = config.optimizer.ema > 0
        wanted = state.abstract(fresh, tx, mesh, ema=kept)
        initial = None if _has_begun(workdir) else _initial(config.training.initial, parts, data)
        run_folder.claim(workdir, config, data.manifest)
        data.tokenizer.save(workdir)
        with Checkpoints(workdir / "checkpoints", config.training.keep, best=HELD_OUT) as saved:
            found = saved.restore(wanted)
            current = _begin(state.create(fresh, tx, mesh, ema=kept), initial) if found is None else found[0]
            update = Update(parts, tx, config.optimizer, config.training.accumulation)
            return _loop(_run(config, workdir, data, parts, mesh, update, current), current, saved)


def _has_begun(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("[0-9]*"))


def _initial(folder: str, parts: Parts, data: Prepared) -> dict | None:
    """The weights that a run starts from: the running mean of another run of the same sizes and tokenizer."""
    if not folder:
        return None
    same = tokenizers.load(folder).fingerprint == data.tokenizer.fingerprint
    allowed = f"a run with the tokenizer of these data, or --config.data.tokenizer={folder}"
    require(same, "training.initial", folder, allowed)
    abstract = jax.eval_shape(lambda: transformer.init(parts.model, jax.random.key(0)))
    return weights_file.restore(Path(folder), abstract, parts.model.vocabulary).params


def _begin(current: TrainState, initial: dict | None) -> TrainState:
    """The state at step 0 with other weights, laid out as those that were there."""
    if initial is None:
        return current
    # copies: weights and running mean are donated, and must not share memory
    place = lambda x, old: jax.make_array_from_callback(old.shape, old.sharding, lambda i: np.array(x[i], old.dtype))
    params = jax.tree.map(place, initial, current.params)
    ema = None if current.ema is None else jax.tree.map(place, initial, current.ema)
    return current._replace(params=params, ema=ema)


def check(config: ConfigDict) -> None:
    """Refuses, by the field's name, whatever is wrong in an experiment before there are data or a folder.

    Raises:
      UserError: a field out of its range, an unknown name, parts that do not fit each other or the devices.
    """
    c = config.training
    for name in ("steps", "batch", "accumulation", "log_every", "evaluate_batches", "checkpoint_every", "keep"):
        require(c[name] >= 1, f"training.{name}", c[name], "a positive integer")
    require(c.max_skipped >= 1, "training.max_skipped", c.max_skipped, "a positive integer")
    for name in ("evaluate_every", "sample_every"):
        require(c[name] >= 0, f"training.{name}", c[name], "0 (only at the end) or a number of steps")
    require(0 <= config.seed < 2**32, "seed", config.seed, f"a whole number from 0 to {2**32 - 1}")
    require(config.sampler.steps >= 1, "sampler.steps", config.sampler.steps, "a positive integer")
    DataConfig.of(config.data.to_dict())
    if c.initial:
        run_folder.read_config(Path(c.initial))
    optimizer.check(config.optimizer)
    sharding.check_batch(c.batch, c.accumulation, sharding.mesh(config.mesh))
    parts = builders.build(config, num_tokens=256, bos_id=0)  # the vocabulary comes with the data
    shape = _chain(config, parts).shape_logits
    jax.eval_shape(shape, jax.ShapeDtypeStruct((parts.model.vocabulary,), np.float32))


def _chain(config: ConfigDict, parts: Parts) -> Chain:
    """What the texts drawn while training come from."""
    return sampling.chain(parts, builders.build_hyperschedule(config, parts.model.length), config.sampler)


def _run(config, workdir, data, parts, mesh, update, current) -> Run:
    places = jax.tree.map(lambda x: x.sharding, current)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = functools.partial(train_step, update)
    shape = jax.ShapeDtypeStruct((config.training.batch, config.data.length), np.int32)
    per_step = flops.count(step, jax.eval_shape(lambda s: s, current), shape, jax.random.key(0))
    return Run(
        config=config,
        workdir=workdir,
        data=data,
        parts=parts,
        step=jax.jit(
            step,
            in_shardings=(places, rows, everywhere),
            out_shardings=(places, everywhere),
            donate_argnums=0,
        ),
        place=lambda batch: jax.make_array_from_process_local_data(rows, batch),
        flops_per_second=flops.peak(list(mesh.devices.flat)),
        flops_per_step=per_step,
    )


def _loop(run: Run, current: TrainState, saved: Checkpoints) -> int:
    """Steps until the end or a signal."""
    c, first = run.config.training, int(current.step)
    rng = jax.random.fold_in(jax.random.key(run.config.seed), 1)
    _announce(run, current, first)
    if first >= c.steps:
        print(f"nothing left to do: step {first} of {c.steps}; evaluate or sample it", flush=True)
        return 0
    batches = pipeline.batches(
        run.data.train, run.config.seed, c.batch, first, jax.process_index(), jax.process_count()
    )
    log = MetricsLog(run.workdir)
    log.resume(first)
    pending, skipped, clock, away = [], 0, time.perf_counter(), 0.0
    with (
        _signals() as caught,
        contextlib.closing(batches),
        contextlib.closing(log),
        Progress(c.steps, first) as progress,
    ):
        for done in range(first + 1, c.steps + 1):
            current, metrics = run.step(current, run.place(next(batches)), rng)
            pending.append(metrics)
            signals = tuple(caught)  # one that comes later stops the next step
            end = done == c.steps
            if _due(done, c.log_every, end or signals):
                means, skipped = _summary(pending, skipped)
                now = time.perf_counter()
                record = means | _speed(run, done, len(pending), now - clock - away)
                pending, clock, away = [], now, 0.0
                log.write(done, record)
                progress.update(done, record)
                _stop_if_lost(min(c.max_skipped, c.steps), skipped, done)
            pause = time.perf_counter()
            scores = {}
            if _due(done, c.evaluate_every, end):
                bound = _evaluate(run, current)
                scores = _held_out(bound)
                log.write(done, scores)
                progress.note(f"step {done}, held out: {bound}")
            if _due(done, c.checkpoint_every, end or signals):
                _save(saved, done, current, scores, bool(metrics["skipped"]), progress)
            if _due(done, c.sample_every, end):
                _sample(run, current, done)
            away += time.perf_counter() - pause
            if signals:
                progress.note(f"{signals[0].name}: stopped after step {done}; the same command goes on from there")
                return 128 + signals[0]
    return 0


def _save(saved: Checkpoints, done: int, current: TrainState, scores: dict, skipped: bool, progress: Progress):
    """Starts a checkpoint, unless the step was skipped: then the weights may be what spoiled its loss."""
    if skipped:
        progress.note(f"step {done} had no finite loss or gradient: not saved, the last good checkpoint is kept")
    else:
        saved.save(done, current, scores)


def _due(done: int, every: int, last: object) -> bool:
    return bool(last) or (every > 0 and done % every == 0)


def _announce(run: Run, current: TrainState, first: int) -> None:
    model, count = run.parts.model, transformer.num_parameters(current.params)
    corpus, start = run.data.manifest["corpus"], run.config.training.initial
    print(
        f"{run.workdir}: {count:,} parameters (hidden {model.hidden}, blocks {model.blocks}), {model.prediction},"
        f" {run.parts.layout} layout; {run.parts.process.name}; {run.parts.hs.describe()}\n"
        f"data: {corpus['name']} (sha256 {corpus['sha256'][:12]}), {len(run.data.train):,} training windows of"
        f" {model.length} tokens ({run.data.tokenizer.name}), unigram byte model"
        f" {run.data.manifest['unigram_bits_per_byte']:.4f} bits/byte\n"
        + (f"resumed at step {first}" if first else f"started from {start}" if start else "fresh start"),
        flush=True,
    )


def _summary(pending: list[dict], skipped: int) -> tuple[dict[str, float], int]:
    """Means over the steps that were not skipped, and how many in a row have been skipped by now."""
    rows = jax.device_get(pending)
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


def _stop_if_lost(limit: int, skipped: int, done: int) -> None:
    if skipped >= limit:
        raise UserError(
            f"training: no finite loss and gradient in the last {skipped} steps up to step {done}; the last good"
            " checkpoint is kept. Try a lower optimizer.learning_rate, a longer warmup or another seed in a new folder"
        )


def _evaluate(run: Run, current: TrainState) -> Bound:
    """The bound of the running-mean weights on the first held-out windows."""
    c = run.config.training
    batch = min(c.batch, len(run.data.held_out))
    rows = pipeline.held_out_batches(run.data.held_out, batch)
    chosen = [
        (x, np.broadcast_to(is_row[:, None], x.shape)) for x, is_row in itertools.islice(rows, c.evaluate_batches)
    ]
    return perplexity.estimate(
        perplexity.estimator(run.parts, run.parts.loss.reading),
        state.weights(current),
        chosen,
        run.data.manifest["splits"]["held_out"]["bytes"] / run.data.manifest["splits"]["held_out"]["tokens"],
        draws=2,
        seed=0,
        hyperschedule=perplexity.name_of(run.parts),
    )


def _held_out(bound: Bound) -> dict[str, float]:
    return {
        HELD_OUT: bound.bits_per_byte,
        "held_out/bits_per_byte_error": bound.bits_per_byte_error,
        "held_out/nats_per_token": bound.nats_per_token,
        **{f"held_out/{name}": x for name, x in bound.terms.items()},
    }


def _sample(run: Run, current: TrainState, done: int) -> None:
    """Writes a few texts to samples/."""
    c = run.config
    chain = _chain(c, run.parts)
    out = sampling.draw(chain, state.weights(current), run.data.tokenizer, [""] * SAMPLES, chain.hs.length, seed=done)
    record = {"step": done, "hyperschedule": repr(chain.hs), "sampler": c.sampler.to_dict(), "texts": out.texts}
    path = run.workdir / "samples" / f"step{done}.json"
    run_folder.write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""
    caught: list[signal.Signals] = []

    def note(number, frame):
        caught.append(signal.Signals(number))
        signal.signal(number, before[number])

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in kinds}
    try:
        yield caught
    finally:
        for number in kinds:
            signal.signal(number, before[number])
