"""Several processes in one run, one per host: joining, deciding together, one writer, and peers that die."""

import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from hdlm_jax.errors import UserError, choose, require

MODES = {
    "auto": "join the processes of a TPU slice, SLURM or Open MPI where there are some",
    "on": "join them, or fail",
    "off": "this process alone",
}
PEER_TIMEOUT = 100  # seconds without a heartbeat after which a peer counts as dead
_LONGEST = 1500  # bytes of a message that is sent around

# A process whose peer has died is aborted by the runtime from a thread of its own, and no Python runs any more.
# So a second process waits for the end of this one, and says what to do unless it left with a word.
_SITTER = "import sys\nif not sys.stdin.read(): print(sys.argv[1], file=sys.stderr, flush=True)"

T = TypeVar("T")


class AgreedError(UserError):
    """Bad input that all processes have learned of: each of them ends by itself."""


@contextlib.contextmanager
def joined(
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_timeout: int = PEER_TIMEOUT,
) -> Iterator[None]:
    """Joins the processes of a run for the block; before anything else that touches JAX's devices.

    If the block fails in one process alone, that process ends at once, so that its peers notice. If a peer
    dies, this process is aborted (exit status 134) and a message says what to do.

    Args:
      mode: one of `MODES`; a coordinator is always joined, unless 'off'.
      coordinator: address of process 0; with `num_processes` and `process_id`.
      peer_timeout: seconds.

    Raises:
      UserError: an unknown mode, flags that do not go together, nothing to join though `mode` is 'on'.
    """
    if not _initialize(mode, coordinator, num_processes, process_id, peer_timeout):
        yield
        return
    if jax.process_count() == 1:
        yield
        jax.distributed.shutdown()
        return
    command = [sys.executable, "-I", "-c", _SITTER, last_words()]
    sitter = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    except AgreedError:
        _leave(sitter)
        raise
    except BaseException as error:
        sitter.communicate(b"told")
        _end(error)
    _leave(sitter)


def _leave(sitter: subprocess.Popen) -> None:
    """Waits for the peers; then says good-bye."""
    jax.distributed.shutdown()
    sitter.communicate(b"good-bye")


def _end(error: BaseException) -> NoReturn:
    """Ends this process here: an orderly exit would wait for peers that wait for this process.

    What is no `UserError` may be a peer that died in the middle of an exchange: then too it is said what to do.
    """
    if isinstance(error, UserError):
        print(f"hdlm: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
        print(last_words(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)


def last_words() -> str:
    """What is said in the place of a process that was killed or aborted."""
    return (
        f"hdlm: process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()} has ended before its"
        " work was done: it was killed, or a peer died or could not be reached (see the first error above and in the"
        " peers' logs). What to do: start the same command again in every process; it goes on from the last checkpoint"
    )


def _initialize(mode, coordinator, num_processes, process_id, peer_timeout) -> bool:
    """Whether JAX's processes were joined."""
    choose("--distributed", mode, MODES)
    require(peer_timeout >= 1, "--peer-timeout", peer_timeout, "a positive number of seconds")
    named = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) < len(named):
        require(not missing, ", ".join(missing), None, f"all of {', '.join(named)} or none of them")
        require(mode != "off", "--distributed", mode, f"'on' or 'auto' with {', '.join(named)}")
        require(num_processes >= 1, "--num-processes", num_processes, "a positive integer")
        require(0 <= process_id < num_processes, "--process-id", process_id, f"0 .. {num_processes - 1}")
        port = coordinator.rpartition(":")[2]
        require(port.isdigit() and ":" in coordinator, "--coordinator", coordinator, "an address, HOST:PORT")
        # its devices are all of this process: no cluster is asked which are
        method = {"cluster_detection_method": "deactivate"}
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=peer_timeout, **method
        )
        return True
    return mode != "off" and _initialize_cluster(mode, peer_timeout)


def _initialize_cluster(mode: str, peer_timeout: int) -> bool:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=peer_timeout)
    except (ValueError, RuntimeError) as error:  # no cluster that JAX knows; or devices are in use already
        allowed = f"'auto' or 'off', or --coordinator and its companions ({str(error).splitlines()[0]})"
        require(mode == "auto", "--distributed", mode, allowed)
        return False
    return True


def is_writer() -> bool:
    """Whether this process writes what one process writes: logs, samples, the experiment."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that succeeds in every process or fails in every one; all of them must run it.

    Raises:
      UserError: what the block raised here.
      AgreedError: the same where there are several processes, also for a block that failed elsewhere.
    """
    error = None
    try:
        yield
    except UserError as caught:
        if jax.process_count() == 1:
            raise
        error = caught
    if jax.process_count() == 1:
        return
    texts = _exchange("" if error is None else str(error))
    if error is not None:
        raise AgreedError(str(error)) from error
    for process, text in enumerate(texts):
        if text:
            raise AgreedError(f"process {process}: {text}")


def writer_first(action: Callable[[], T]) -> T:
    """What `action` gives, done in the writing process before the others; fails `together`."""
    found = None
    with together():
        if is_writer():
            found = action()
    with together():
        if not is_writer():
            found = action()
    return found


def everywhere(here: bool) -> bool:
    """Whether it holds in every process; all of them must ask."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def meet(place: str) -> None:
    """Waits for the other processes, half an hour at most; a collective itself waits for 30 s only on CPUs (Gloo)."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(f"hdlm_jax: {place}", timeout=1800)


def _exchange(text: str) -> list[str]:
    """The text of every process."""
    row = np.zeros(_LONGEST, np.uint8)
    raw = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
    row[: len(raw)] = raw
    return [bytes(x).rstrip(b"\0").decode(errors="replace") for x in multihost_utils.process_allgather(row)]
