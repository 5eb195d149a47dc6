"""Every access to the files of runs, checkpoints and prepared data: folders of this machine, and gs:// buckets.

A bucket knows whole objects only: `write_whole` writes one or none, `append` writes one anew (about once a second at
most, says Google of one object), `rename` copies and removes one after another, and folders are nothing but beginnings
of names. Paths of buckets are etils' (extra `gcs`); what fails with them is an `OSError`, as on a disk.
"""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from hdlm_jax.errors import UserError, require

SCHEME = "gs://"


def place(path: str | os.PathLike, field: str = "path") -> Path:
    """A path of this machine, or of a bucket (which has pathlib's methods too).

    >>> place("runs/a").name
    'a'
    >>> place("s3://bucket/a", "--workdir")
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: --workdir: got 's3://bucket/a'; allowed: a folder of this machine, or gs://BUCKET/FOLDER

    Raises:
      UserError: another scheme than gs://, no bucket or folder, or the packages that it takes are not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return path if isinstance(path, Path) else Path(text)
    bucket, _, folder = text.removeprefix(SCHEME).partition("/")
    whole = text.startswith(SCHEME) and bucket and folder.strip("/")
    require(bool(whole), field, text, "a folder of this machine, or gs://BUCKET/FOLDER")
    return _epath().Path(text)


def is_remote(path: PurePath) -> bool:
    """Whether a path that `place` gave is one of a bucket."""
    return os.fspath(path).startswith(SCHEME)


@functools.cache
def _epath() -> Any:
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{SCHEME}: needs a package: pip install 'hdlm_jax[gcs]'") from error
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other processes write there too
    os.environ.setdefault("EPATH_USE_TF", "false")  # the same code wherever TensorFlow happens to be installed
    from etils import epath

    return epath


def reason(error: Exception) -> str:
    """Why an access failed, in a line.

    >>> reason(FileNotFoundError(2, "No such file or directory", "x"))
    'No such file or directory'
    """
    lines = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()
    return lines[0][:250]


@contextlib.contextmanager
def _as_on_a_disk(path: Path) -> Iterator[None]:
    """Turns what the clients of buckets raise (HTTP, credentials) into `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(0, reason(error), os.fspath(path)) from error


def read_bytes(path: Path) -> bytes:
    """The contents of a file; raises `OSError`."""
    with _as_on_a_disk(path):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file; raises `OSError`, `UnicodeDecodeError`."""
    return read_bytes(path).decode("utf-8")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, with the folders on the way.

    Args:
      path: from `place`.
      content: a text is written as UTF-8.

    Raises:
      UserError: the folder cannot be written to; `path` is there and no file (a device must not be replaced).
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if is_remote(path):
            with _as_on_a_disk(path):
                path.write_bytes(data)
            return
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written (it is no plain file)")
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Adds a line to a file, which is made if it is not there; a line that a kill has torn before it is ended.

    Raises:
      UserError: it cannot be written.
    """
    text = line if line.endswith("\n") else line + "\n"
    try:
        if is_remote(path):
            before = read_bytes(path) if is_file(path) else b""
            write_whole(path, before + (b"" if before.endswith(b"\n") or not before else b"\n") + text.encode())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error


def is_file(path: Path) -> bool:
    """Whether there is a file; raises `OSError` if a bucket cannot be asked."""
    with _as_on_a_disk(path):
        return path.is_file()


def is_dir(path: Path) -> bool:
    """Whether there is a folder (in a bucket: objects below it)."""
    with _as_on_a_disk(path):
        return path.is_dir()


def size(path: Path) -> int:
    """Bytes of a file; raises `OSError`."""
    with _as_on_a_disk(path):
        found = path.stat()
        return found.length if is_remote(path) else found.st_size


def names(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing if there is none."""
    if not is_dir(folder):
        return []
    with _as_on_a_disk(folder):
        return sorted(path.name for path in folder.iterdir())


def make_folder(folder: Path) -> None:
    """Makes a folder with those above it; a bucket needs none. Raises `OSError`."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name, which must be free; in a bucket not at once. Raises `OSError`."""
    with _as_on_a_disk(path):
        path.rename(target)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError), _as_on_a_disk(path):
        if is_remote(path):
            path.rmtree(missing_ok=True)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def free_bytes(folder: Path) -> int | None:
    """Room on the disk of a folder, None where it has no end; raises `OSError`."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free


def copy(path: Path, target: Path) -> None:
    """Copies a file between this machine and a bucket, in pieces; raises `OSError`."""
    with _as_on_a_disk(path), _as_on_a_disk(target):
        make_folder(target.parent)
        _epath().Path(path).copy(target, overwrite=True)


def copy_folder(folder: Path, target: Path, last: str | None = None) -> None:
    """Copies all files of a local folder; `last` is the one that makes the copy count. Raises `OSError`."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    for name in sorted(found, key=lambda name: str(name) == last):
        copy(folder / name, target / name)


def cache(name: str) -> Path:
    """A folder of the user's cache, made by whoever writes to it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdlm_jax" / name
