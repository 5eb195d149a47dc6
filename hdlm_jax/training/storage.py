"""The one module that speaks with Orbax (v0 CheckpointManager): how a checkpoint is written and read.

A step is a folder of two items: `state`, the arrays as a nested dict by name, and `manifest`, one JSON file.
Import it where it is used: Orbax takes a while to load.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from orbax.checkpoint import checkpoint_managers as policies

from hdlm_jax import files
from hdlm_jax.training import manifest
from hdlm_jax.training.distributed import is_writer

FILE = "manifest.json"
COMMITTED = "commit_success.txt"  # Orbax's, in a bucket


def manager(
    folder: Path,
    keep: int | None = None,
    scores: Mapping[int, float] | None = None,
    reading: bool = False,
) -> ocp.CheckpointManager:
    """An Orbax manager that writes in the background and keeps the `keep` newest steps and the best.

    Args:
      folder: absolute; made unless `reading`.
      keep: None keeps every step.
      scores: the lowest one is the best step's; read at every save.
      reading: nothing will be saved.
    """
    # Whatever goes wrong in Orbax's threads also reaches the caller as an exception; its logged stack
    # traces, several for one full disk, would bury our message.
    logging.getLogger("absl").addFilter(_not_orbax)
    kept = [policies.LatestN(keep), _Best({} if scores is None else scores)]
    options = ocp.CheckpointManagerOptions(
        create=not reading,
        enable_async_checkpointing=not reading,
        preservation_policy=policies.AnyPreservationPolicy(kept),
    )
    return ocp.CheckpointManager(folder, options=options)


def save(manager: ocp.CheckpointManager, step: int, leaves: Mapping[str, Array], metrics: Mapping[str, float]):
    """Starts writing the arrays and their manifest; returns as soon as the arrays may be donated."""
    finish: Future = Future()
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(unflatten_dict(dict(leaves), sep="/")),
        manifest=_ManifestSave(lambda: finish.result()()),
    )
    try:
        manager.save(step, args=items, force=True)
    finally:  # not before: on a CPU the checksums would take the cores from Orbax's start
        finish.set_result(manifest.begin(leaves, metrics))


def half_written(folder: Path) -> list[str]:
    """Names in a checkpoints folder of what a failed or killed save has left; to be asked while nothing is written.

    On a disk Orbax writes under another name and renames at the end; in a bucket a last object says that all is there.
    """
    there = files.names(folder)
    if not files.is_remote(folder):
        return [name for name in there if name.endswith(".orbax-checkpoint-tmp")]
    return [name for name in there if name.isdigit() and not files.is_file(folder / name / COMMITTED)]


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of one step; raises `Damaged` or `OSError`."""
    return manifest.read(files.read_text(folder / str(step) / "manifest" / FILE))


def read_leaves(manager: ocp.CheckpointManager, folder: Path, step: int, wanted: Mapping[str, Any], head: str = ""):
    """The arrays of one step whose name starts with `head`, by name, compared before and after reading.

    Args:
      wanted: abstract arrays with shardings, or numpy arrays for arrays in host memory, by name.

    Raises:
      UserError: other names, shapes or dtypes than wanted.
      Damaged, or what Orbax raises: the step cannot be read or a checksum differs.
    """
    leaves = read_manifest(folder, step)["leaves"]
    saved = {name: leaf for name, leaf in leaves.items() if name.startswith(head)}
    manifest.compare(folder / str(step), saved, wanted)
    target = unflatten_dict(dict(wanted), sep="/")
    places = ocp.checkpoint_utils.construct_restore_args(target)
    state = ocp.args.PyTreeRestore(target, restore_args=places, partial_restore=True)
    flat = flatten_dict(manager.restore(step, args=ocp.args.Composite(state=state))["state"], sep="/")
    found = {name: flat[name] for name in wanted}
    manifest.verify(found, saved)
    return found


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes the manifest in the background, when its checksums are there."""

    async def async_save(self, directory, args):
        async def write():
            self.save(directory, args)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, directory, args):
        if is_writer():
            files.write_whole(directory / FILE, json.dumps(args.finish()))

    def restore(self, directory, args=None):
        return manifest.read(files.read_text(directory / FILE))


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    finish: Callable[[], dict[str, Any]]


@dataclasses.dataclass
class _Best:
    """Orbax preservation policy: the step of the lowest score, among those that have one."""

    scores: Mapping[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        scored = [info.step for info in checkpoints if info.step in self.scores]
        best = min(scored, key=self.scores.get, default=None)
        return [info.step == best for info in checkpoints]


def _not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname
