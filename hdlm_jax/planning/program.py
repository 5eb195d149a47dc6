"""The programs that a plan compiles: the training step and the sampler, as they run, for devices that are not here."""

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hdlm_jax.generation import sampling
from hdlm_jax.models import parts as builders
from hdlm_jax.models import transformer
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import flops, optimizer, sharding, state
from hdlm_jax.training.step import Update, train_step

# Products that wait for pieces of a weight in a loop run far below peak on narrow pieces: gather, then multiply.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
BYTE_TOKENS = 257  # of the 'bytes' tokenizer: bytes and the end of a text


class Program(NamedTuple):
    """A program and the arrays it holds.

    Attributes:
      function: to be compiled.
      arguments: abstract arrays with their shardings.
      outputs: shardings of the results, or None.
      donated: which arguments it may overwrite.
      held: name -> the arrays that stay on the devices.
      work: FLOPs that it is there for, over all devices, without recomputation; `executed` with it.
      tokens: per call.
    """

    function: Callable
    arguments: tuple
    outputs: Any
    donated: tuple[int, ...]
    held: dict[str, Any]
    work: float
    executed: float
    tokens: int
    parts: Parts


class Compiled(NamedTuple):
    """What the compiler left: its text, its report of memory, and sizes in bytes per device (0 without a fit)."""

    text: str
    report: str
    arguments: float
    temporary: float
    peak: float
    error: str


def vocabulary(config: ConfigDict) -> int:
    """N of an experiment whose data are not here: that of its byte or sentencepiece tokenizer."""
    return BYTE_TOKENS if config.data.tokenizer == "bytes" else config.data.vocab_size


def training(config: ConfigDict, mesh: Mesh, num_tokens: int) -> Program:
    """One optimizer step.

    Raises:
      UserError: as `parts.build`, `sharding.check_batch`, `state.abstract`.
    """
    c = config.training
    sharding.check_batch(c.batch, c.accumulation, mesh)
    parts = builders.build(config, num_tokens, bos_id=0)
    tx = optimizer.build(config.optimizer, c.steps)
    fresh = lambda: transformer.init(parts.model, jax.random.key(0))
    held = state.abstract(fresh, tx, mesh, ema=config.optimizer.ema > 0)
    update = Update(parts, tx, config.optimizer, c.accumulation)
    tokens = jax.ShapeDtypeStruct((c.batch, config.data.length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    arguments = (held, tokens, _key(mesh))
    return Program(
        function=functools.partial(train_step, update),
        arguments=arguments,
        outputs=(jax.tree.map(lambda x: x.sharding, held), sharding.replicated(mesh)),
        donated=(0,),
        held={"params": held.params, "optimizer": held.optimizer, "running mean": held.ema, "batch": tokens},
        work=flops.of_step(update, *arguments),
        executed=flops.of_step(update, *arguments, remat=parts.model.remat),
        tokens=c.batch * config.data.length,
        parts=parts,
    )


def sampler(config: ConfigDict, mesh: Mesh, num_tokens: int) -> Program:
    """Generation of `training.batch` texts without a prompt under the experiment's hyperschedule and sampler."""
    parts = builders.build(config, num_tokens, bos_id=0)
    count, length = config.training.batch, config.data.length
    sharding.check_batch(count, 1, mesh)
    chain = sampling.chain(parts, builders.build_hyperschedule(config, length), config.sampler)
    shapes = jax.eval_shape(lambda: transformer.init(parts.model, jax.random.key(0)))
    params = jax.tree.map(_placed, shapes, sharding.shardings(shapes, mesh))
    texts, given = (
        jax.ShapeDtypeStruct((count, length), dtype, sharding=sharding.batch_sharding(mesh))
        for dtype in (jnp.int32, bool)
    )
    function = lambda params, texts, given: sampling.complete(chain, params, texts, given, 0, sampling.keys(0, count)).x
    work = flops.count(function, params, texts, given)
    held = {"params": params, "texts": texts}
    return Program(function, (params, texts, given), None, (), held, work, work, count * length, parts)


def compiled(program: Program, mesh: Mesh) -> Compiled:
    """Compiles a program for the mesh and reads its dump; a program that does not fit is a result too."""
    traced = jax.jit(
        sharding.under(mesh, program.function), out_shardings=program.outputs, donate_argnums=program.donated
    ).trace(*program.arguments)
    with jax.set_mesh(mesh):  # kernels ask for the kind of chip when they are lowered
        lowered = traced.lower()
    with tempfile.TemporaryDirectory(prefix="hdlm-plan-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **OPTIONS}
        try:
            with _uncached():
                sizes, error = lowered.compile(compiler_options=options).memory_analysis(), ""
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" not in str(failure):
                raise
            sizes, error = None, str(failure)
        text = _read(folder, "after_codegen.txt") or _read(folder, "after_optimizations.txt")
        report = _read(folder, "memory-usage-report.txt")
    if sizes is None:
        return Compiled(text, report, 0.0, 0.0, 0.0, error)
    arguments, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    peak = sizes.peak_memory_in_bytes or arguments + temporary
    return Compiled(text, report, float(arguments), float(temporary), float(peak), "")


def per_device(tree: Any) -> int:
    """Bytes of a tree of placed arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """A program from the compilation cache would leave no dump."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks the setting once, then remembers
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _read(folder: str, ending: str) -> str:
    """The dump of the program itself: the largest file of that kind."""
    files = sorted(Path(folder).glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    return files[-1].read_text(errors="replace") if files else ""


PROGRAMS = {"train": training, "sample": sampler}
