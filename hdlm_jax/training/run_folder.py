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
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError, require

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      UserError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder this experiment's, or checks that it already is.

    Raises:
      UserError: the folder holds another experiment; the message shows the differing fields.
    """
    path = workdir / "config.json"
    if path.exists():
        old = read_config(workdir)
        if diff := configs.differences(old, config):
            raise UserError(
                f"--workdir: {workdir} holds another experiment; allowed: the same config, or a new folder\n{diff}"
            )
        return
    write_whole(path, configs.to_json(config))
    write_whole(workdir / "env.json", json.dumps(environment(), indent=2, sort_keys=True) + "\n")


def claim_data(workdir: Path, manifest: Mapping[str, Any]) -> None:
    """Notes which data the run reads, or checks that they are still the same.

    Raises:
      UserError: the data differ from those the run began with.
    """
    about = {"corpus": manifest["corpus"], "tokenizer": manifest["tokenizer"]}
    path = workdir / "data.json"
    if not path.exists():
        write_whole(path, json.dumps(about, indent=2, sort_keys=True) + "\n")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    allowed = f"the data the run began with, {old}"
    require(old == about, "data", about, allowed)


def read_config(workdir: Path) -> ConfigDict:
    """The experiment of a run folder.

    Raises:
      UserError: no such folder, no config.json in it, or a file that is no experiment.
    """
    path = Path(workdir) / "config.json"
    require(path.is_file(), "run folder", str(workdir), "a folder with a config.json, written by `hdlm train`")
    try:
        return configs.from_json(path.read_text(encoding="utf-8"))
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
    """Holds the folder for this process; the lock goes with the process, however it ends.

    Raises:
      UserError: a live process trains in this folder, or the folder cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")  # noqa: SIM115 (held open for as long as the lock)
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
        yield
