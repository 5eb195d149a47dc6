"""Timing of jitted calls."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import jax

Result = TypeVar("Result")


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call that returns arrays, after one call that compiles."""
    return timed(call, repeats)[0]


def timed(call: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """`seconds`, and what the call returned."""
    result, times = jax.block_until_ready(call()), []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def table(rows: list[dict]) -> str:
    """Rows of equal keys as an aligned text table.

    >>> print(table([{"name": "a", "seconds": 1.25}, {"name": "bc", "seconds": 10.0}]))
    name  seconds
    a     1.25
    bc    10
    """
    heads = list(rows[0])
    cells = [heads] + [[_text(row[head]) for head in heads] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
