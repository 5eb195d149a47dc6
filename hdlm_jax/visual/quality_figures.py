"""Figures of quality: what more calls buy, what entropy costs, how well confidence is calibrated.

Rows are dicts as `hdlm bench samplers` writes them: `sampler`, `calls`, `entropy` (nats), `judge nats/token`, its
`standard error`. Lower nats under the judge are better, as long as the entropy does not fall with them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from hdlm_jax.errors import require
from hdlm_jax.evaluation.diagnostics import knee
from hdlm_jax.visual.figures import COLORS, DARK

NATS = "judge nats/token"
_MARKERS = "osD^vPX"

Rows = Iterable[Mapping[str, Any]]


def frontier(entropy: Sequence[float], nats: Sequence[float]) -> np.ndarray:
    """bool [n]: the points that no other beats, having no less entropy and no more nats and not both equal.

    >>> frontier([1.0, 2.0, 3.0, 2.5], [1.0, 2.0, 3.0, 4.0]).tolist()
    [True, True, True, False]
    """
    x, y = np.asarray(entropy, float), np.asarray(nats, float)
    no_worse = (x[None, :] >= x[:, None]) & (y[None, :] <= y[:, None])
    differs = (x[None, :] != x[:, None]) | (y[None, :] != y[:, None])
    return ~(no_worse & differs).any(1)


def steps_quality(rows: Rows, value: str = NATS, title: str = "") -> Figure:
    """Draws a quantity against the number of model calls, one curve per sampler, its knee ringed where it falls.

    The knee is that of `diagnostics.knee`: with log(calls) and the values each scaled to [0, 1] over the curve, the
    point farthest below the line from the fewest calls to the most, of three or more.

    Args:
      rows: see above; the standard error is that of the judge's nats.
      value: the key of the quantity.
      title: of the figure.

    Raises:
      UserError: no rows, or rows that lack a key.
    """
    curves = _curves(rows, value)
    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    panel = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        calls, values = _column(points, "calls"), _column(points, value)
        error = _column(points, "standard error") if value == NATS and "standard error" in points[0] else None
        bend = knee(calls, values) if values[-1] < values[0] else None
        label = name if bend is None else f"{name} (knee at {calls[bend]:g} calls)"
        style = {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.6}
        panel.errorbar(calls, values, error, capsize=3, label=label, **style)
        if bend is not None:
            ring = {"markersize": 17, "markeredgewidth": 1.6, "fillstyle": "none", "color": DARK, "zorder": 4}
            panel.plot(calls[bend], values[bend], "o", **ring)
    _log_calls(panel, curves)
    panel.set(ylabel=value, title=title)
    _tidy(panel)
    return figure


def entropy_quality(rows: Rows, title: str = "") -> Figure:
    """Draws the judge's nats against the texts' entropy, one line per sampler, and the frontier of all.

    Args:
      rows: see above.
      title: of the figure.

    Raises:
      UserError: no rows, or rows that lack a key.
    """
    curves = _curves(rows, NATS, "entropy")
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    panel = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        x, y = _column(points, "entropy"), _column(points, NATS)
        style = {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.2}
        panel.plot(x, y, label=name, **style)
        for point, *place in zip(points, x, y, strict=True):
            panel.annotate(f"{point['calls']:g}", place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    every = [point for points in curves.values() for point in points]
    best = frontier(_column(every, "entropy"), _column(every, NATS))
    x, y = _column(every, "entropy")[best], _column(every, NATS)[best]
    order = np.argsort(x)
    panel.plot(x[order], y[order], color=DARK, linestyle=":", linewidth=4, alpha=0.45, zorder=1, label="frontier")
    panel.set(xlabel="entropy of the tokens of a text (nats); more is more varied", title=title)
    panel.set_ylabel(f"{NATS}; less is more likely text")
    panel.text(0.99, 0.01, "numbers: calls", transform=panel.transAxes, ha="right", va="bottom", color=DARK, fontsize=9)
    panel.margins(0.08)
    _tidy(panel)
    return figure


def calibration(bins: Rows, title: str = "") -> Figure:
    """Draws how often predictions are right against the probability that they were given.

    Args:
      bins: rows of `diagnostics.calibration`: `confidence` (mean of the bin), `accuracy` (the share right) and `count`;
        `at`, where there is one, names the curve that the bin belongs to.
      title: of the figure.

    Returns:
      A figure: the share that was right against confidence, beside the diagonal, with one binomial standard error,
      and below it which share of a curve's predictions each bin holds. The legend gives the expected calibration
      error, the mean distance from the diagonal over the predictions.

    Raises:
      UserError: no rows, or rows that lack a key.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in _with_keys(bins, "confidence", "accuracy", "count"):
        curves.setdefault(row.get("at", "predictions"), []).append(row)
    figure = Figure(figsize=(5.8, 6.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color=DARK, linestyle="--", linewidth=1, label="calibrated")
    for i, (name, points) in enumerate(curves.items()):
        confidence, right, count = (_column(points, key) for key in ("confidence", "accuracy", "count"))
        error = np.sqrt(right * (1 - right) / count)
        far = float((count * np.abs(right - confidence)).sum() / count.sum())
        style = {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        upper.errorbar(confidence, right, error, capsize=3, label=f"{name} (error {far:.3f})", **style)
        lower.plot(confidence, count / count.sum(), linewidth=1.2, markersize=4, **style)
    upper.set(ylabel="share that was right", xlim=(0, 1), ylim=(0, 1))
    lower.set(xlabel="confidence: the probability given", ylabel="share of all", ylim=(0, None))
    _tidy(upper)
    lower.grid(alpha=0.25)
    lower.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _with_keys(rows: Rows, *keys: str) -> list[Mapping[str, Any]]:
    rows = list(rows)
    require(len(rows) > 0, "rows", rows, "at least one row of results")
    for key in keys:
        for row in rows:
            require(key in row, "rows", list(row), f"rows that hold {key!r}")
    return rows


def _curves(rows: Rows, *keys: str) -> dict[str, list[Mapping[str, Any]]]:
    """Sampler -> its rows, by calls."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(_with_keys(rows, "sampler", "calls", *keys), key=lambda row: row["calls"]):
        curves.setdefault(row["sampler"], []).append(row)
    return {name: curves[name] for name in sorted(curves)}


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], float)


def _log_calls(panel: Axes, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    ticks = sorted({row["calls"] for points in curves.values() for row in points})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
    panel.set_xlabel("model calls")


def _tidy(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
