"""Being told to stop: SIGINT and SIGTERM, and the preemption notice of a cluster, at the end of a step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

Asked = Callable[[int], signal.Signals | None]


@contextlib.contextmanager
def watched() -> Iterator[Asked]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one kills as usual.

    Yields:
      a function of the steps done, to be called after each: the signal that asks to stop here, or None. Where
      processes are joined, one that is told (SIGTERM is the notice of most clusters) tells all, and all of them
      stop after the same step.
    """
    with _joined() if jax.distributed.is_initialized() else _alone() as asked:
        yield asked


@contextlib.contextmanager
def _alone() -> Iterator[Asked]:
    caught: list[signal.Signals] = []

    def note(number, frame):
        caught.append(signal.Signals(number))
        signal.signal(number, before[number])

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in kinds}
    try:
        yield lambda _: caught[0] if caught else None
    finally:
        for number in kinds:
            signal.signal(number, before[number])


@contextlib.contextmanager
def _joined() -> Iterator[Asked]:
    """JAX takes SIGTERM and agrees on the step; Ctrl-C is handed on to it."""

    def hand_on(number, frame):
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, hand_on)
    try:
        yield lambda done: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(done) else None
    finally:
        signal.signal(signal.SIGINT, before)
