"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

QUIET = 10.0  # seconds between plain lines


class Progress:
    """Step, loss, tokens/s, MFU and time left; a context manager.

    Args:
      total: steps of the whole run.
      first: steps done before.
      stream: standard error by default.
      now: seconds on a clock that never goes back.
      shown: False for a process that is to be silent.
    """

    def __init__(
        self,
        total: int,
        first: int = 0,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        shown: bool = True,
    ):
        self._total, self._first, self._now = total, first, now
        self._stream = sys.stderr if stream is None else stream
        self._start, self._shown = now(), float("-inf")
        self._bar: Any = None
        self._visible = shown

    def __enter__(self) -> "Progress":
        if self._visible and self._stream.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=self._total, initial=self._first, unit="step", dynamic_ncols=True, file=self._stream
            )
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, record: Mapping[str, float]) -> None:
        """Shows a record after `done` steps: on the bar, or as a line unless the last one is recent.

        Reads `train/loss`, `train/tokens_per_second` and `train/mfu`, each if it is there.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(_text(record), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._now() - self._shown >= QUIET or done >= self._total:
            self._shown = self._now()
            left = (self._shown - self._start) / max(1, done - self._first) * (self._total - done)
            self.note(f"step {done}/{self._total}: {_text(record)}, {clock(left)} left")

    def note(self, message: str) -> None:
        """Prints a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        elif self._visible:
            print(message, file=self._stream, flush=True)


def _text(record: Mapping[str, float]) -> str:
    loss = record.get("train/loss")
    parts = ["no finite loss" if loss is None else f"loss {loss:.3f}"]
    if "train/tokens_per_second" in record:
        parts.append(f"{record['train/tokens_per_second']:,.0f} tokens/s")
    if "train/mfu" in record:
        parts.append(f"MFU {record['train/mfu']:.1%}")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3725.2), clock(59)
    ('1:02:05', '0:59')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
