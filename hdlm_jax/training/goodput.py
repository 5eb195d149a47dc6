"""Where the time of a run goes, over all its restarts: the account beside the metrics."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PREFIX = "goodput/"
KINDS = {
    "start": "data, model and devices made ready",
    "compile": "compiling the training step",
    "restore": "reading a checkpoint",
    "data": "waiting for a batch",
    "step": "training steps that were kept (all the rest of the time)",
    "evaluate": "the held-out bound",
    "sample": "texts drawn while training",
    "save": "held up by checkpoints",
    "lost": "steps done and not kept: after the last checkpoint before a kill",
    "down": "between the last record and the next start",
}


class Account:
    """Seconds by kind (`KINDS`) since `begun`, on top of those of earlier starts.

    Args:
      begun: when this start began, on the clock `now`.
      now: seconds on a clock that never goes back.
    """

    def __init__(self, begun: float | None = None, now: Callable[[], float] = time.monotonic):
        self._now, self._begun = now, now() if begun is None else begun
        self._earlier = dict.fromkeys(KINDS, 0.0)
        self._spent = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Books the block's time; blocks are not nested."""
        start = self._now()
        try:
            yield
        finally:
            self._spent[kind] += self._now() - start

    def resume(self, records: Sequence[Mapping[str, Any]], first: int, wall: float) -> None:
        """Goes on from the records of earlier starts: steps after `first`, which is restored, are lost.

        Args:
          records: of metrics.jsonl, in order.
          first: the step that is gone on from.
          wall: the time of day of `begun`, seconds since 1970.
        """
        accounts = [record for record in records if f"{PREFIX}step" in record]
        if not accounts:
            return
        last = accounts[-1]
        kept = next((r[f"{PREFIX}step"] for r in reversed(accounts) if r["step"] <= first), 0.0)
        self._earlier = {kind: float(last.get(PREFIX + kind) or 0.0) for kind in KINDS}
        self._earlier["lost"] += self._earlier["step"] - kept
        self._earlier["step"] = kept
        self._earlier["down"] += max(0.0, wall - last[f"{PREFIX}time"])

    def record(self, wall: float) -> dict[str, float]:
        """Seconds by kind up to now, the share of steps that were kept, and the time of day; for metrics.jsonl."""
        spent = dict(self._spent)
        spent["step"] += self._now() - self._begun - sum(spent.values())
        total = {kind: self._earlier[kind] + spent[kind] for kind in KINDS}
        share = total["step"] / max(sum(total.values()), 1e-9)
        named = {PREFIX + kind: round(seconds, 3) for kind, seconds in total.items()}
        return named | {f"{PREFIX}share": round(share, 4), f"{PREFIX}time": round(wall, 3)}
