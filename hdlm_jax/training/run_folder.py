"""A run folder: config.json, env.json, tokenizer files, metrics, checkpoints/, samples/.

One experiment per folder: the same command run again resumes it, another experiment is refused.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax import files
from hdlm_jax.errors import UserError, require
from hdlm_jax.files import write_whole
from hdlm_jax.training import lease

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
LOCK = ".lock"


def refuse_other(workdir: Path, config: ConfigDict) -> None:
    """Checks that the folder is free, or holds this very experiment (on any mesh); nothing is written.

    Raises:
      UserError: the folder holds another experiment; the message shows the differing fields.
    """
    if not files.is_file(workdir / "config.json"):
        return
    begun = read_config(workdir)
    begun.mesh.update(config.mesh)  # a checkpoint can be laid out anew: where a run goes on may change
    if diff := configs.differences(begun, config):
        raise UserError(
            f"--workdir: {workdir} holds another experiment; allowed: the same config, or a new folder\n{diff}"
        )


def claim(workdir: Path, config: ConfigDict, manifest: Mapping[str, Any]) -> None:
    """Makes the folder this experiment's on these data, or checks that it already is.

    Args:
      manifest: of the prepared data.

    Raises:
      UserError: the folder holds another experiment, or the run began with other data; nothing is written.
    """
    refuse_other(workdir, config)
    about = {"corpus": manifest["corpus"], "tokenizer": manifest["tokenizer"]}
    if files.is_file(workdir / "data.json"):
        begun = json.loads(files.read_text(workdir / "data.json"))
        changes = [_change(part, begun[part], about[part]) for part in about if begun[part] != about[part]]
        if changes:
            raise UserError(f"data: not those that {workdir} began with: {'; '.join(changes)}; nothing was changed")
    for name, text in (
        ("config.json", configs.to_json(config)),
        ("env.json", json.dumps(environment(), indent=2, sort_keys=True) + "\n"),
        ("data.json", json.dumps(about, indent=2, sort_keys=True) + "\n"),
    ):
        if not files.is_file(workdir / name):
            write_whole(workdir / name, text)


def _change(part: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    named = lambda about: f"{about['name']!r} (sha256 {about['sha256'][:12]})"
    return f"{part} was {named(old)}, is {named(new)}"


def read_config(workdir: str | Path) -> ConfigDict:
    """The experiment of a run folder.

    Raises:
      UserError: no such folder, no config.json in it, or a file that is no experiment.
    """
    path = files.place(workdir, "run folder") / "config.json"
    require(files.is_file(path), "run folder", str(workdir), "a folder with a config.json, written by `hdlm train`")
    try:
        return configs.from_json(files.read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON (line {error.lineno}): {error.msg}") from error


def environment() -> dict:
    """Versions and devices, for the record."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "command": sys.argv,
    }


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock goes with the process, however it ends (in a bucket: see `lease`).

    A folder that was made here and got nothing written into it is removed again.

    Raises:
      UserError: a live process trains in this folder, or the folder cannot be written to.
    """
    if files.is_remote(workdir):
        with lease.held(workdir / LOCK, lambda message: print(message, file=sys.stderr, flush=True)):
            yield
        return
    made = not files.is_dir(workdir)
    try:
        files.make_folder(workdir)
        file = open(workdir / LOCK, "a+")  # noqa: SIM115 (held open for as long as the lock)
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir: {workdir} is in use by process {file.read().strip() or '?'}; allowed: wait for it,"
                " stop it, or take another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if made and files.names(workdir) == [LOCK]:  # nothing came of it
                files.remove(workdir)
