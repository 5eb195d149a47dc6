"""Prepared data from a bucket: copied once to this machine, for ArrayRecord files are read from disks only."""

import hashlib
import tempfile
from pathlib import Path

from hdlm_jax import files
from hdlm_jax.errors import UserError

MANIFEST = "manifest.json"


def fetched(folder: Path) -> Path:
    """The local copy of a prepared folder: the folder itself, or for one in a bucket a folder of the user's cache.

    A copy is known by the contents of its manifest, so that it serves every name of the same data. Every machine
    needs room for all of them.

    Raises:
      UserError: it cannot be copied.
    """
    if not files.is_remote(folder):
        return folder
    try:
        digest = hashlib.sha256(files.read_bytes(folder / MANIFEST)).hexdigest()
        copy = files.cache("data") / digest[:32]
        if not files.is_file(copy / MANIFEST):
            _copy(folder, copy)
    except OSError as error:
        raise UserError(f"data.prepared: {folder} cannot be copied to this machine ({files.reason(error)})") from error
    return copy


def _copy(folder: Path, target: Path) -> None:
    files.make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as scratch:
        partial = Path(scratch) / "data"
        for name in files.names(folder):
            files.copy(folder / name, partial / name)
        publish(partial, target)


def publish(partial: Path, folder: Path) -> None:
    """Moves a finished folder to its place on the same disk, unless another process was faster."""
    try:
        files.rename(partial, folder)
    except OSError:
        if not files.is_file(folder / MANIFEST):
            raise
