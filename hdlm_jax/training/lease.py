"""A lock for a run folder in a bucket: an object that its holder writes anew while it lives.

No lock of a bucket goes with the process that held it. One that finds the object watches it for a while: if it
changes, its holder lives; if not, the lock is taken over. No clocks are compared. A process that was held up for
longer than `PATIENCE` can lose its folder, and says so.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from hdlm_jax import files
from hdlm_jax.errors import UserError

BEAT = 10.0  # seconds between signs of life
PATIENCE = 35.0  # seconds without one after which a holder counts as dead
SETTLE = 1.0  # seconds after which two that have taken the lock at once see who was last


@contextlib.contextmanager
def held(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock for the block.

    Args:
      path: of the object.
      report: takes a message when this has to wait, and when the lock is lost.

    Raises:
      UserError: a live process holds it; the bucket cannot be written to.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "where": _where(), "token": uuid.uuid4().hex}
    _await_death(path, report)
    files.write_whole(path, json.dumps(mine | {"beat": 0}))
    time.sleep(SETTLE)
    if not _is_mine(path, mine):
        raise _in_use(path, _read(path))
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, mine, done, report), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _is_mine(path, mine):
                files.remove(path)


def _beat(path: Path, mine: dict, done: threading.Event, report: Callable[[str], None]) -> None:
    count = 0
    while not done.wait(BEAT):
        count += 1
        with contextlib.suppress(OSError, UserError):  # the next one may succeed
            if not _is_mine(path, mine):
                report(f"{path.parent}: another process has taken this run folder over; stop one of the two")
                return
            files.write_whole(path, json.dumps(mine | {"beat": count}))


def _await_death(path: Path, report: Callable[[str], None]) -> None:
    """Returns when nobody holds the lock; raises `UserError` when somebody does."""
    first = _read(path)
    if first is None or _is_dead(first):
        return
    report(f"{path.parent}: {_holder(first)} left its lock: watching for {PATIENCE:.0f} s whether it is alive")
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(min(SETTLE, PATIENCE))
        now = _read(path)
        if now is None:
            return
        if now != first:
            raise _in_use(path, now)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(files.read_text(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"--workdir: {path.parent} cannot be read ({files.reason(error)})") from error


def _is_mine(path: Path, mine: dict) -> bool:
    there = _read(path)
    return there is not None and there["token"] == mine["token"]


def _is_dead(about: dict) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if about["where"] != _where():
        return False
    try:
        os.kill(about["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return about["pid"] == os.getpid()  # of an earlier process with this one's number


def _where() -> str:
    """Names the space in which process numbers can be compared: this boot of this machine, or a container in it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _in_use(path: Path, about: dict | None) -> UserError:
    holder = "another process" if about is None else _holder(about)
    return UserError(
        f"--workdir: {path.parent} is in use by {holder}; allowed: wait for it, stop it, or take another folder"
    )


def _holder(about: dict) -> str:
    return f"process {about['pid']} on {about['host']}"
