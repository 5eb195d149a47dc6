"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping

QUIET = 10.0  # seconds between plain lines


class Progress:
    """A context manager; `update` shows a record, `note` a message."""

    def __init__(self, total: int, first: int = 0):
        self._total, self._first = total, first
        self._start = self._shown = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=self._total, initial=self._first, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, record: Mapping[str, float]) -> None:
        """Shows step, loss, speed and, on plain lines, the time left."""
        shown = _shown(record)
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown >= QUIET or done == self._total:
            left = (now - self._start) / max(1, done - self._first) * (self._total - done)
            self.note(f"step {done}/{self._total}: {shown}, {clock(left)} left")
            self._shown = now

    def note(self, message: str) -> None:
        """Prints a line of its own."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)


def _shown(record: Mapping[str, float]) -> str:
    parts = [f"loss {record['train/loss']:.3f}"] if "train/loss" in record else ["no finite loss"]
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
