"""The record of a run: metrics.jsonl, one JSON object a line, and the same numbers as TensorBoard events."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdlm_jax.errors import UserError
from hdlm_jax.training.run_folder import write_whole

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run folder; every line is flushed, so that a kill loses one at most.

    Call `resume` before the first `write` when the folder may hold records already.

    Args:
      folder: the run folder; holds metrics.jsonl and the TensorBoard event files.
    """

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / FILE
        self._purge: int | None = None
        self._file = self._events = None

    def resume(self, step: int) -> None:
        """Drops the records after `step`, the last step that is kept, and what a kill has torn.

        Raises:
          UserError: the folder cannot be written to.
        """
        self.close()
        kept = [record for record in read(self._path.parent) if record["step"] <= step]
        write_whole(self._path, "".join(map(_line, kept)))
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
            self._open()
            self._file.write(_line(record))
            self._file.flush()
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, record["step"])
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Ends the files; a later `write` opens them again."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def _open(self) -> None:
        if self._file is None:
            from tensorboardX import SummaryWriter

            before = self._path.read_bytes() if self._path.is_file() else b""
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the log)
            self._file.write("" if before.endswith(b"\n") or not before else "\n")
            self._events = SummaryWriter(str(self._path.parent), purge_step=self._purge)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run folder, in order; a line torn by a kill is left out. Empty when there are none."""
    path = Path(folder) / FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
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
