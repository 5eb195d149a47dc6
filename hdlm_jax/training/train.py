"""Training: an experiment's parts made ready in a run folder, and the loop over its steps."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from hdlm_jax import files
from hdlm_jax.data import tokenizers
from hdlm_jax.data.prepare import DataConfig, Prepared, open_or_prepare
from hdlm_jax.diffusion import fields
from hdlm_jax.errors import one_of, require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.generation import sampling
from hdlm_jax.generation.chain import Chain
from hdlm_jax.models import parts as builders
from hdlm_jax.models import passes, transformer
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import flops, optimizer, profiler, run_folder, sharding, state, weights_file
from hdlm_jax.training.checkpoints import Checkpoints
from hdlm_jax.training.distributed import is_writer, meet, together, writer_first
from hdlm_jax.training.goodput import Account
from hdlm_jax.training.loop import HELD_OUT, Run, run_steps
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.step import Update, train_step


def train(config: ConfigDict, workdir: str | Path, profile: tuple[int, int] = (0, 0)) -> int:
    """Trains `config` in `workdir` to its last step, or until told to stop; resumes what is there.

    Where processes are joined (see `distributed.joined`) each of them calls this, with the same arguments and a
    folder that they share.

    Args:
      config: the experiment.
      workdir: the run folder.
      profile: (step, count): a profiler trace of so many steps from that one on goes to profile/; count 0 for none.

    Returns:
      0 at the end; 130 or 143 after a signal (saved; the same command goes on).

    Raises:
      UserError: bad config, a folder that holds another experiment or is in use, steps that stay without
        a finite loss (the last good checkpoint is kept).
    """
    account, workdir = Account(), files.place(workdir, "--workdir")
    with contextlib.ExitStack() as held:
        with together(), account.spend("start"):
            profiler.check(profile)
            check(config)
            if is_writer():
                held.enter_context(run_folder.locked(workdir))
            run_folder.refuse_other(workdir, config)
        with account.spend("start"):
            data = writer_first(lambda: open_or_prepare(config.data.to_dict(), workdir / "data"))
            parts = builders.build(config, data.tokenizer.num_tokens, data.tokenizer.bos_id)
            mesh = sharding.mesh(config.mesh)
            tx = optimizer.build(config.optimizer, config.training.steps)
            fresh = lambda: transformer.init(parts.model, jax.random.key(config.seed))
            kept = config.optimizer.ema > 0
            with together():
                wanted = state.abstract(fresh, tx, mesh, ema=kept)
                initial = None if _has_begun(workdir) else _initial(config.training.initial, parts, data)
            writer_first(lambda: _claim(config, workdir, data))
        with Checkpoints(workdir / "checkpoints", config.training.keep, best=HELD_OUT) as saved:
            with account.spend("restore"), together():
                found = saved.restore(wanted)
            current = _begin(state.create(fresh, tx, mesh, ema=kept), initial) if found is None else found[0]
            update = Update(parts, tx, config.optimizer, config.training.accumulation)
            _announce(config, workdir, data, parts, current)
            if int(current.step) >= config.training.steps:
                return 0
            with account.spend("compile"):
                run = _run(config, workdir, data, parts, mesh, update, current)
                meet("the step is compiled")
            return run_steps(run._replace(profile=profile), current, saved, account)


def _claim(config: ConfigDict, workdir: Path, data: Prepared) -> None:
    """The writing process makes the folder this run's; the others look whether they see it."""
    if is_writer():
        run_folder.claim(workdir, config, data.manifest)
        data.tokenizer.save(workdir)
    seen = files.is_file(workdir / "config.json")
    require(seen, "--workdir", str(workdir), "a folder that all processes share: process 0 has written to it")


def _has_begun(workdir: Path) -> bool:
    return any(name[0].isdigit() for name in files.names(workdir / "checkpoints"))


def _initial(folder: str, parts: Parts, data: Prepared) -> dict | None:
    """The weights that a run starts from: the running mean of another run of the same sizes and tokenizer."""
    if not folder:
        return None
    same = tokenizers.load(folder).fingerprint == data.tokenizer.fingerprint
    allowed = f"a run with the tokenizer of these data, or --config.data.tokenizer={folder}"
    require(same, "training.initial", folder, allowed)
    abstract = jax.eval_shape(lambda: transformer.init(parts.model, jax.random.key(0)))
    return weights_file.restore(files.place(folder), abstract, parts.model.vocabulary).params


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
    one_of("training.on_save_error", c.on_save_error, ("stop", "continue"))
    fields.seed("seed", config.seed)
    require(config.sampler.steps >= 1, "sampler.steps", config.sampler.steps, "a positive integer")
    DataConfig.of(config.data.to_dict())
    if c.initial:
        run_folder.read_config(c.initial)
    optimizer.check(config.optimizer)
    sharding.check_batch(c.batch, c.accumulation, sharding.mesh(config.mesh))
    parts = builders.build(config, num_tokens=256, bos_id=0)  # the vocabulary comes with the data
    fed = lambda x0: passes.rows(parts, x0, passes.noise(parts, jax.random.key(0), x0)).tokens  # picks the attention
    jax.eval_shape(fed, jax.ShapeDtypeStruct((1, config.data.length), np.int32))
    _chain(config, parts)


def _chain(config: ConfigDict, parts: Parts) -> Chain:
    """What the texts drawn while training come from."""
    return sampling.chain(parts, builders.build_hyperschedule(config, parts.model.length), config.sampler)


def _run(config, workdir, data, parts, mesh, update, current) -> Run:
    """The run with its step compiled."""
    places = jax.tree.map(lambda x: x.sharding, current)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    rng = jax.jit(lambda: jax.random.fold_in(jax.random.key(config.seed), 1), out_shardings=everywhere)()
    shape = jax.ShapeDtypeStruct((config.training.batch, config.data.length), np.int32, sharding=rows)
    step = jax.jit(
        sharding.under(mesh, functools.partial(train_step, update)),
        in_shardings=(places, rows, everywhere),
        out_shardings=(places, everywhere),
        donate_argnums=0,
    )
    return Run(
        config=config,
        workdir=workdir,
        data=data,
        parts=parts,
        chain=_chain(config, parts),
        mesh=mesh,
        step=step.lower(current, shape, rng).compile(),
        draw=sharding.over_rows(mesh, perplexity.estimator(parts, parts.loss.reading)),
        rng=rng,
        flops_per_second=flops.peak(list(mesh.devices.flat)),
        flops_per_step=flops.of_step(update, jax.eval_shape(lambda s: s, current), shape, rng),
        profile=(0, 0),
    )


def _announce(config: ConfigDict, workdir: Path, data: Prepared, parts: Parts, current: TrainState) -> None:
    if not is_writer():
        return
    model, count, first = parts.model, transformer.num_parameters(current.params), int(current.step)
    corpus, start, last = data.manifest["corpus"], config.training.initial, config.training.steps
    beginning = f"resumed at step {first}" if first else f"started from {start}" if start else "fresh start"
    print(
        f"{workdir}: {count:,} parameters (hidden {model.hidden}, blocks {model.blocks}), {model.prediction},"
        f" {parts.layout} layout; {parts.process.name}; {parts.hs.describe()}\n"
        f"data: {corpus['name']} (sha256 {corpus['sha256'][:12]}), {len(data.train):,} training windows of"
        f" {model.length} tokens ({data.tokenizer.name}), unigram byte model"
        f" {data.manifest['unigram_bits_per_byte']:.4f} bits/byte\n{beginning}",
        flush=True,
    )
    if first >= last:
        print(f"nothing left to do: step {first} of {last}; evaluate or sample it", flush=True)
