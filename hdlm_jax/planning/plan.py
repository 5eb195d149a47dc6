"""A plan: whether an experiment fits a slice, what its chips hold, send and compute, and what to change.

Every figure is the compiler's or follows from its program; nothing ran. Times are estimates: the compiler's
cycles per instruction, kernels at half of the peak, transfers at the full rate of the interconnect, both at once.
"""

from collections import defaultdict

import jax
from ml_collections import ConfigDict

from hdlm_jax.errors import choose
from hdlm_jax.models import fused_attention
from hdlm_jax.models.parts import Parts
from hdlm_jax.planning import chips, hlo, program
from hdlm_jax.planning.program import Compiled, Program

KERNEL_SHARE = 0.5  # of the peak that a kernel is assumed to reach
GIB = chips.GIB


def plan(
    config: ConfigDict,
    topology: str,
    sizes: tuple[int, int, int],
    slices: int = 1,
    what: str = "train",
    num_tokens: int | None = None,
) -> dict:
    """Compiles an experiment for a slice and says what came out, as a tree of plain values.

    Args:
      config: the experiment.
      topology: as `v5p:4x4x8`.
      sizes: the mesh (data, fsdp, tensor); -1 is what is left.
      slices: so many slices, joined along `data` by the data-center network.
      what: 'train', one optimizer step, or 'sample', the generation of a batch.
      num_tokens: N (default: that of the experiment's tokenizer).

    Raises:
      UserError: an unknown topology, sizes that do not fit, or an experiment that is refused.
    """
    wanted, make = chips.parse(topology), choose("--what", what, program.PROGRAMS)
    mesh = chips.mesh(wanted, sizes, slices)
    made = make(config, mesh, num_tokens or program.vocabulary(config))
    out = program.compiled(made, mesh)
    read, limit = hlo.Program(out.text), wanted.chip.hbm / wanted.chip.devices
    found = read.collectives()
    count = mesh.size // wanted.chip.devices
    return {
        "what": what,
        "topology": topology,
        "slices": slices,
        "chips": count,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": config.training.batch,
        "length": config.data.length,
        "tokens_per_chip": made.tokens / count,
        "attention": _attention(made.parts),
        "remat": made.parts.model.remat,
        "fits": not out.error and out.peak <= limit,
        "error": out.error.splitlines()[0] if out.error else "",
        "memory": _memory(made, out, limit),
        "largest_buffers": [b._asdict() for b in hlo.buffers(out.report, read)],
        "flops": {"model": made.work, "executed": made.executed, "executed_per_chip": made.executed / count},
        "collectives": _collectives(found, config),
        "estimate": _estimate(made, read, found, wanted, count),
        "advice": _advice(config, made, out, limit),
    }


def _attention(parts: Parts) -> str:
    """Which backend the layout of training takes on a TPU."""
    R = parts.model.length * (2 if parts.layout == "tiled" else 1)
    obstacle = "" if parts.layout == "tiled" or parts.model.visibility == "full" else "rows of one text with a window"
    return fused_attention.resolve(parts.model, R, obstacle, "tpu")


def _memory(made: Program, out: Compiled, limit: float) -> dict:
    """Bytes per device."""
    held = {name: program.per_device(tree) for name, tree in made.held.items() if tree is not None}
    used = out.peak or None
    return {
        **held,
        "activations": max(0.0, out.peak - sum(held.values())) if used else None,
        "peak": used,
        "limit": limit,
        "free_share": 1 - out.peak / limit if used else None,
    }


def _collectives(found: list[hlo.Collective], config: ConfigDict) -> dict:
    kinds: dict[str, dict] = defaultdict(lambda: {"count": 0, "bytes": 0.0})
    for one in found:
        kinds[one.kind]["count"] += one.count
        kinds[one.kind]["bytes"] += one.bytes
    total = {kind: kinds[kind]["bytes"] for kind in hlo.COLLECTIVES}
    weights = total["all-gather"] + total["reduce-scatter"]
    whole = config.training.batch * config.data.length * config.model.hidden
    return {
        "by_kind": dict(kinds),
        "all_reduce_share": total["all-reduce"] / weights if weights else None,
        "whole_batch": [one._asdict() for one in found if one.elements >= whole],
        "largest": [one._asdict() for one in found[:5]],
    }


def _estimate(made: Program, read: hlo.Program, found: list, wanted: chips.Slice, count: int) -> dict:
    """Seconds of a call; marked as an estimate wherever it is shown."""
    chip = wanted.chip
    compute = read.cycles() / chip.clock
    kernels = _kernel_flops(made) / count / (KERNEL_SHARE * chip.flops)
    network = sum(one.bytes for one in found) * chip.devices / chip.ici_rate
    seconds = max(compute + kernels, network)
    mfu = made.work / count / chip.flops / seconds if seconds else None
    return {"seconds": seconds, "compute": compute, "kernels": kernels, "network": network, "mfu": mfu}


def _kernel_flops(made: Program) -> float:
    """FLOPs of the attention kernels of a training step: what the compiler's cycles leave out."""
    parts = made.parts
    if "optimizer" not in made.held or _attention(parts) != "splash":
        return 0.0
    rows = parts.model.length * (2 if parts.layout == "tiled" else 1)
    reach = fused_attention.Reach(parts.model.length, parts.hs.width) if parts.layout == "tiled" else None
    pairs = rows**2 * fused_attention.computed_share(reach, rows)
    texts = made.tokens // parts.model.length
    products = 2 + 2 * (parts.model.remat != "none") + 7  # forward, again for the backward pass, dq and dk, dv
    return 2.0 * products * pairs * texts * parts.model.hidden * parts.model.blocks


def _advice(config: ConfigDict, made: Program, out: Compiled, limit: float) -> list[str]:
    """What to change, the cheapest first, when a program does not fit or leaves little room."""
    if not out.error and out.peak <= 0.7 * limit:
        return []
    held = sum(program.per_device(tree) for tree in made.held.values() if tree is not None)
    tips = []
    if held > limit / 2:
        tips.append("weights and optimizer take over half: a larger fsdp in --mesh cuts them over more chips")
    if made.parts.model.remat != "full":
        tips.append("--config.model.remat=full keeps only what enters each block")
    if _attention(made.parts) == "xla":
        tips.append("--config.model.dropout=0, rows in multiples of 128: the splash kernel then holds no scores")
    if made.parts.rows_per_chunk > 1024:
        tips.append("--config.loss.rows_per_chunk=1024 halves the scores over the vocabulary that exist at a time")
    double = 2 * config.training.accumulation
    tips.append(f"--config.training.accumulation={double} halves the texts of a pass, or a smaller training.batch")
    tips.append("a larger slice, or --slices, at the same training.batch")
    return tips


def table(found: dict) -> str:
    """A plan as lines for people."""
    gib = lambda x: "-" if x is None else f"{x / GIB:.2f} GiB"
    memory, estimate, network = found["memory"], found["estimate"], found["collectives"]
    free = "" if memory["free_share"] is None else f", {memory['free_share']:.0%} of HBM free"
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    lines = [
        f"{found['what']} on {found['slices']} x {found['topology']}: {found['chips']} chips, mesh {mesh}",
        f"{'FITS' if found['fits'] else 'DOES NOT FIT'}{free} (compiled, not run)",
        f"batch {found['batch']} x {found['length']} tokens, {found['tokens_per_chip']:,.0f} tokens per chip;"
        f" attention {found['attention']}, remat {found['remat']}",
        "memory per device",
    ]
    if found["error"]:
        lines.append(f"  compiler: {found['error']}")
    names = [name for name in memory if name not in ("limit", "free_share")]
    lines += [f"  {name:<14} {gib(memory[name]):>12}" for name in names]
    lines += [f"  {'limit':<14} {gib(memory['limit']):>12}", "largest buffers"]
    lines += [f"  {gib(b['bytes']):>12}  {b['shapes'][:60]}  {b['source'][-60:]}" for b in found["largest_buffers"]]
    work = found["flops"]
    lines.append(f"FLOPs: {work['model']:.3e} of the model, {work['executed_per_chip']:.3e} executed per chip")
    lines.append("collectives per chip")
    for kind, sums in sorted(network["by_kind"].items()):
        lines.append(f"  {kind:<20} {sums['count']:>6}  {gib(sums['bytes']):>12}")
    share = network["all_reduce_share"]
    lines.append(f"  all-reduce / (all-gather + reduce-scatter): {'-' if share is None else f'{share:.1%}'}")
    whole = network["whole_batch"]
    lines.append(f"  results as large as the whole batch of activations: {len(whole) or 'none'}")
    lines += [f"    {one['kind']} {gib(one['bytes'])} {one['source'][-80:]}" for one in whole[:3]]
    ms = lambda name: f"{1e3 * estimate[name]:.1f} ms"
    mfu = "-" if estimate["mfu"] is None else f"{estimate['mfu']:.0%}"
    lines.append(
        f"ESTIMATE (compiler's model, never measured): {ms('seconds')} per call, MFU {mfu}; compute {ms('compute')},"
        f" kernels {ms('kernels')}, network {ms('network')}"
    )
    return "\n".join(lines + [f"to change: {tip}" for tip in found["advice"]])


def versions() -> dict[str, str]:
    """What compiled it."""
    from importlib import metadata

    return {"jax": jax.__version__, "libtpu": metadata.version("libtpu")}
