"""The record of a run: metrics.jsonl, one JSON object a line, and the same as TensorBoard events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from hdlm_jax.training.run_folder import write_whole

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run folder; every line is flushed."""

    def __init__(self, folder: str | Path):
        from tensorboardX import SummaryWriter

        self._path = Path(folder) / FILE
        self._path.touch()
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for as long as the log)
        self._events = SummaryWriter(str(folder), write_to_disk=True)

    def resume(self, step: int) -> None:
        """Drops what was written after `step`, and a last line torn by a kill."""
        kept = [record for record in read(self._path.parent) if record["step"] <= step]
        self._file.close()
        write_whole(self._path, "".join(_line(record) for record in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record. Numbers that are not finite are written as null."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        self._events.close()


def read(folder: str | Path) -> list[dict]:
    """All records of a run folder, in order; a last line torn by a kill is left out."""
    path = Path(folder) / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def _line(record: Mapping[str, float | None]) -> str:
    finite = {name: x if x is None or math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite, sort_keys=True) + "\n"
