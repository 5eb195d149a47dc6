"""The record of a run: metrics.jsonl, one JSON object a line, and the same numbers as TensorBoard events."""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdlm_jax import files
from hdlm_jax.errors import UserError

FILE = "metrics.jsonl"
EVENTS_EVERY = 60.0  # seconds between copies of the TensorBoard events to a bucket


class MetricsLog:
    """Appends records to a run folder; every line is written at once, so that a kill loses one at most.

    Call `resume` before the first `write` when the folder may hold records already.

    Args:
      folder: the run folder; holds metrics.jsonl and the TensorBoard event files.
    """

    def __init__(self, folder: str | Path):
        self._path = files.place(folder) / FILE
        self._purge: int | None = None
        self._events: Any = None
        self._scratch: tempfile.TemporaryDirectory | None = None  # holds what a bucket gets a copy of
        self._copied = 0.0

    def resume(self, step: int) -> None:
        """Drops the records after `step`, the last step that is kept, and what a kill has torn.

        Raises:
          UserError: the folder cannot be written to.
        """
        self.close()
        kept = [record for record in read(self._path.parent) if record["step"] <= step]
        files.write_whole(self._path, "".join(map(_line, kept)))
        self._purge = step + 1  # TensorBoard hides what older event files hold from here on

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one record.

        Args:
          step: steps done.
          values: numbers (Python's, numpy's or JAX scalars), texts, true, false or None by name. A number
            that is not finite is written as null and left out of the TensorBoard events.

        Raises:
          UserError: the file cannot be written to.
        """
        record = {name: _plain(value) for name, value in values.items()} | {"step": int(step)}
        try:
            files.append(self._path, _line(record))
            self._open()
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, record["step"])
            if self._scratch is not None and time.monotonic() - self._copied >= EVENTS_EVERY:
                self._copy()
        except OSError as error:  # of the events
            raise UserError(f"{self._path.parent}: cannot be written to ({files.reason(error)})") from error

    def close(self) -> None:
        """Ends the event file; a later `write` begins another."""
        if self._events is not None:
            self._events.close()
        self._events = None
        if self._scratch is not None:
            with contextlib.suppress(OSError):  # the numbers are in metrics.jsonl
                self._copy()
            self._scratch.cleanup()
        self._scratch = None

    def _open(self) -> None:
        if self._events is None:
            from tensorboardX import SummaryWriter

            folder = self._path.parent
            if files.is_remote(folder):
                self._scratch = tempfile.TemporaryDirectory(prefix="hdlm-events-")
                folder = Path(self._scratch.name)
            self._events = SummaryWriter(str(folder), purge_step=self._purge)

    def _copy(self) -> None:
        self._copied = time.monotonic()
        if self._events is not None:
            self._events.flush()
        files.copy_folder(Path(self._scratch.name), self._path.parent)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run folder, in order; a line torn by a kill is left out. Empty when there are none."""
    path = files.place(folder) / FILE
    text = files.read_bytes(path).decode(errors="replace") if files.is_file(path) else ""
    records = []
    for line in text.split("\n"):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A value that JSON has: scalars of numpy and JAX as Python's, numbers that are not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
