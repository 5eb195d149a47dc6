"""Folders that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hdlm_jax.errors import UserError, require


def require_free(folder: Path, field: str) -> None:
    """Raises `UserError` unless `folder` is new or empty."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(free, field, str(folder), "a new or empty folder")


@contextlib.contextmanager
def whole(folder: Path, field: str) -> Iterator[Path]:
    """A new folder beside `folder`, moved to its place at the end; nothing is left behind when anything fails.

    Raises:
      UserError: `folder` is not free, or cannot be written.
    """
    require_free(folder, field)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        partial.chmod(0o755)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be written ({error})") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
