"""Checkpoints that can be trusted: written in the background, checked in every bit when they are read."""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hdlm_jax import files
from hdlm_jax.errors import UserError, choose, require
from hdlm_jax.training import manifest
from hdlm_jax.training.distributed import everywhere, is_writer, meet
from hdlm_jax.training.sharding import named_leaves


class CheckpointError(UserError):
    """A checkpoint could not be written, or none could be read: names the folder and the reason."""


def to_stderr(message: str) -> None:
    """Prints one line to the standard error."""
    print(message, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run, as a context manager: leaving it waits for what is being written.

    All processes of a run make the same calls in the same order. One live run per folder: a save removes
    what earlier ones have left half-written.

    Args:
      folder: holds one folder per step; made on entry.
      keep: how many of the newest steps are kept.
      best: name of a metric; the step where it is lowest is kept too.
      report: takes messages about damaged checkpoints.

    Raises:
      UserError: `keep` < 1.
      CheckpointError: the folder cannot be written (on entry); the last save failed (on leaving).
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        best: str | None = None,
        report: Callable[[str], None] = to_stderr,
    ):
        require(keep >= 1, "training.keep", keep, "a positive integer")
        self.folder, self._keep, self._best, self._report = _absolute(folder), keep, best, report
        self._scores: dict[int, float] = {}
        self._writing: int | None = None

    def __enter__(self) -> "Checkpoints":
        from hdlm_jax.training import storage

        _check_writable(self.folder)
        self._storage = storage
        self._manager = storage.manager(self.folder, self._keep, self._scores)
        for step in self.steps():
            self._score(step, self._saved_metrics(step))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        failure = self._finish()
        self._manager.close()
        if failure and error is None:
            raise failure
        if failure:
            self._say(str(failure))

    def steps(self) -> list[int]:
        """The steps there are, in order; one that is being written counts."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts writing `state` as `step` and returns; the state may be donated at once.

        Blocks while an earlier save is unfinished, and while the arrays are copied off the devices. A step
        that is there already is left as it is.

        Args:
          step: steps done.
          state: a tree of arrays of 1-, 2-, 4- or 8-byte numbers.
          metrics: numbers to store beside it; `best` is looked up here.

        Returns:
          whether writing has started.

        Raises:
          CheckpointError: this step could not be started; or the save before could not be finished (this
            one then has started all the same). Older steps are unharmed in both cases.
        """
        failure = _agreed(self._finish())
        started = step not in self.steps()
        if started:
            try:
                self._start(step, state, metrics or {})
            except CheckpointError:
                if failure is None:
                    raise
                # several of Orbax's threads can fail in one save: what the second one says comes only now
                self._start(step, state, metrics or {})
        if failure:
            raise failure
        return started

    def wait(self) -> None:
        """Waits until nothing is being written; raises `CheckpointError` if the last save failed."""
        failure = _agreed(self._finish())
        if failure:
            raise failure

    def restore(self, abstract: Any) -> tuple[Any, int] | None:
        """The newest intact state, laid out as asked for, and its step; None when there is no step at all.

        Names, shapes and dtypes are compared before any array is read. Steps that cannot be read or whose
        checksums differ are renamed to `bad-<step>`, with a message, once an older intact one is found.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with shardings, on any mesh (see `state.abstract`).

        Raises:
          UserError: the newest readable step is of another model or optimizer; nothing is changed.
          CheckpointError: there are steps, and none is intact (nothing is changed); a save under way failed.
        """
        self.wait()
        wanted = named_leaves(abstract)
        manifest.compile_ahead(wanted.values())
        read = lambda step: self._storage.read_leaves(self._manager, self.folder, step, wanted)
        found, step, damaged = _newest(self.steps(), read)
        if found is None and damaged:
            raise _none_intact(self.folder, damaged)
        if found is None:
            return None
        for bad, reason in damaged.items():
            place = self._set_aside(bad)
            self._say(f"checkpoint {bad} in {self.folder} is damaged ({reason}): set aside as {place}")
        if damaged:
            self._say(f"going on from checkpoint {step}")
        return jax.tree.unflatten(jax.tree.structure(abstract), list(found.values())), step

    def _start(self, step: int, state: Any, metrics: Mapping[str, float]) -> None:
        leaves = named_leaves(state)
        _check_room(self.folder, step, sum(leaf.nbytes for leaf in leaves.values()))
        self._score(step, metrics)
        try:
            self._sweep()
            self._storage.save(self._manager, step, leaves, metrics)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._writing = step

    def _finish(self) -> CheckpointError | None:
        """Waits for the save under way; what went wrong with it, or None."""
        step, self._writing = self._writing, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # the writing threads hand on whatever stopped them
            failure = self._failed(step, error)
            failure.__cause__ = error
            return failure
        return None

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        """Goes back to the steps that are there, and says what happened."""
        self._scores.pop(step, None)
        with contextlib.suppress(OSError):  # a folder that is out of reach
            self._sweep()
            self._manager.reload()
        return CheckpointError(f"checkpoint {step} could not be written to {self.folder}: {_reason(error)}")

    def _say(self, message: str) -> None:
        if is_writer():
            self._report(message)

    def _sweep(self) -> None:
        """Removes what a failed or killed save has left half-written; nothing is being written by now."""
        if is_writer():
            for leftover in self._storage.half_written(self.folder):
                files.remove(self.folder / leftover)

    def _saved_metrics(self, step: int) -> dict[str, float]:
        try:
            return self._storage.read_manifest(self.folder, step)["metrics"]
        except (OSError, manifest.Damaged):  # a damaged step has no say in which is best; see `restore`
            return {}

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._best)
        if value is not None and math.isfinite(value):
            self._scores[step] = float(value)

    def _set_aside(self, step: int) -> str:
        """Renames a step's folder to a name that is free, once for all processes."""
        names = (f"bad-{step}" + (f"-{i}" if i > 1 else "") for i in range(1, 10_000))
        taken = files.names(self.folder)
        name = next(name for name in names if name not in taken)
        meet(f"checkpoint {name} chosen")
        if is_writer():
            files.rename(self.folder / str(step), self.folder / name)
        meet(f"checkpoint {name} renamed")
        self._scores.pop(step, None)
        self._manager.reload()
        return name


def restore_params(
    folder: str | Path,
    abstract: Any,
    which: str = "ema",
    report: Callable[[str], None] = to_stderr,
) -> tuple[Any, int]:
    """The weights of the newest intact step, and that step; nothing is changed.

    Safe beside a run that is writing to the folder. Only the weights asked for are read.

    Args:
      folder: the checkpoints folder of a run.
      abstract: the parameters' shapes and dtypes, e.g. `jax.eval_shape(lambda: init(config, rng))`, for numpy arrays;
        with shardings (`sharding.placed`) for arrays that lie as they say.
      which: 'ema', the running mean (the last weights if the run kept none), or 'raw', the last weights.
      report: takes messages about damaged checkpoints, which are passed over.

    Raises:
      UserError: no checkpoint there; the weights are of another model.
      CheckpointError: there are steps, and none is intact.
    """
    from hdlm_jax.training import storage

    group = choose("weights", which, {"ema": "ema", "raw": "params"})
    folder = _absolute(folder)
    with storage.manager(folder, reading=True) as manager:
        steps = manager.all_steps()
        remedy = f"a folder with a checkpoint: run `hdlm train --workdir {folder.parent}` first"
        require(len(steps) > 0, "checkpoints", str(folder), remedy)

        def read(step):
            groups = {name.split("/")[0] for name in storage.read_manifest(folder, step)["leaves"]}
            head = f"{group if group in groups else 'params'}/"
            wanted = {f"{head}{name}": _wanted(leaf) for name, leaf in named_leaves(abstract).items()}
            return list(storage.read_leaves(manager, folder, step, wanted, head).values())

        found, step, damaged = _newest(steps, read)
    if found is None:
        raise _none_intact(folder, damaged)
    for bad, reason in damaged.items():
        report(f"checkpoint {bad} in {folder} is damaged ({reason}): using {step} instead")
    return jax.tree.unflatten(jax.tree.structure(abstract), found), step


def _newest(steps: list[int], read: Callable[[int], Any]) -> tuple[Any, int | None, dict[int, str]]:
    """What `read` gives for the newest step it does not fail at, that step, and why the newer ones failed."""
    damaged: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        found, reason = None, ""
        try:
            found = read(step)
        except UserError:
            raise
        except Exception as error:  # damage comes out of Orbax as anything, down to a bare Exception
            reason = _reason(error)
        if everywhere(not reason):
            return found, step, damaged
        damaged[step] = reason or "another process could not read it"
    return None, None, damaged


def _agreed(failure: CheckpointError | None) -> CheckpointError | None:
    """What failed, in every process if it failed in one."""
    if everywhere(failure is None):
        return None
    return failure or CheckpointError("a checkpoint could not be written by another process (see its log)")


def _none_intact(folder: Path, damaged: Mapping[int, str]) -> CheckpointError:
    reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
    return CheckpointError(f"no checkpoint in {folder} can be read ({reasons}); nothing was changed")


def _reason(error: Exception) -> str:
    """The first line of an error; of a long one the two ends, where Orbax says what and why."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 250 else f"{text[:120]} ... {text[-120:]}"


def _wanted(leaf: Any) -> Any:
    """What stands for an array in a restore; without a sharding a numpy array, one that takes no memory."""
    if getattr(leaf, "sharding", None) is not None:
        return leaf
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _absolute(folder: str | Path) -> Path:
    place = files.place(folder)
    return place if files.is_remote(place) else place.absolute()


def _check_writable(folder: Path) -> None:
    if jax.process_index():
        return
    probe = folder / ".writable"
    try:
        files.make_folder(folder)
        files.write_whole(probe, "")
        files.remove(probe)
    except (OSError, UserError) as error:
        raise CheckpointError(f"checkpoints cannot be written to {folder}: {_reason(error)}") from error


def _check_room(folder: Path, step: int, needed: int) -> None:
    """Raises `CheckpointError` if the disk is too full: one that fills up in mid-write leaves noisy threads."""
    try:
        free = files.free_bytes(folder)
    except OSError as error:
        raise CheckpointError(f"checkpoint {step} could not be written to {folder}: {_reason(error)}") from error
    if not everywhere(free is None or needed < free):
        room = f"it needs up to {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        raise CheckpointError(f"checkpoint {step} could not be written to {folder}: {room}")
