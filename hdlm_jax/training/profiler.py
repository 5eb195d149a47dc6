"""A profiler trace of some steps of a run, on request."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from hdlm_jax import files
from hdlm_jax.errors import UserError, require

FOLDER = "profile"
_LOADED = Path("/proc/self/maps")  # of Linux: the files that are mapped into this process


def check(profile: tuple[int, int]) -> None:
    """Raises `UserError` unless the steps `(first, count)` can be traced here; (0, 0) asks for none."""
    require(profile[0] >= 0 and profile[1] >= 0, "--profile", profile, "a first step and a number of steps")
    if profile[1] and jax.default_backend() != "tpu" and _LOADED.exists() and "libtpu" in _LOADED.read_text():
        # JAX loads an installed libtpu wherever it looks for TPUs, and its profiler then takes the process down
        raise UserError(
            f"--profile: libtpu is loaded, though this is no TPU, and would crash the profiler; start anew with"
            f" JAX_PLATFORMS={jax.default_backend()} in the environment, and without a plan in the same process"
        )


@contextlib.contextmanager
def traced(folder: Path, profile: tuple[int, int]) -> Iterator[Callable[[int], None]]:
    """Traces `count` steps from `first` on into the folder.

    Args:
      folder: of the trace; one in a bucket gets it when it is whole.
      profile: (first, count); count 0 traces none.

    Yields:
      what is to be called with the number of each step before it.
    """
    first, count = profile
    tracing = False
    scratch = tempfile.TemporaryDirectory(prefix="hdlm-trace-") if files.is_remote(folder) else None
    here = folder if scratch is None else Path(scratch.name)

    def at(step: int) -> None:
        nonlocal tracing
        if count and step == first:
            jax.profiler.start_trace(here)
            tracing = True
        elif tracing and step == first + count:
            stop()

    def stop() -> None:
        nonlocal tracing
        if tracing:
            jax.profiler.stop_trace()
            tracing = False
            if scratch is not None:
                files.copy_folder(here, folder)

    try:
        yield at
    finally:
        stop()
        if scratch is not None:
            scratch.cleanup()
