"""A figure of how far each sampler's law is from the data's, against the number of model calls.

Rows are those of `benchmarks.laws.measure`: dicts with `sampler`, `family`, `calls` and `distance`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from hdlm_jax.errors import require
from hdlm_jax.visual.figures import COLORS, DARK

_MARKERS = "osD^vPX*"
_STYLES = ("-", "--", ":")


def total_variation(rows: Iterable[Mapping[str, Any]], title: str = "") -> Figure:
    """Draws total variation against model calls, both on a logarithmic scale, one panel for each family of samplers.

    Rows of the family '' are in every panel: 'the data's law', drawn as the least that can be measured, and any other
    as a reference in black.

    Raises:
      UserError: no rows.

    >>> row = {"sampler": "a", "family": "x", "calls": 2.0, "distance": 0.5}
    >>> [panel.get_title() for panel in total_variation([row]).axes]
    ['x']
    """
    rows = list(rows)
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"]))
    require(len(families) > 0, "rows", rows, "at least one row of a family")
    figure = Figure(figsize=(4.6 * len(families), 5.6), layout="constrained")
    panels = figure.subplots(1, len(families), sharex=True, sharey=True, squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        shared, own = _curves(rows, ""), _curves(rows, family)
        for name, points in shared.items():
            floor = name == "the data's law"
            style = {"color": "#9a9a9a", "linewidth": 6, "alpha": 0.5} if floor else {"color": DARK, "marker": "."}
            panel.plot(*points, label=f"{name} (the least to be seen)" if floor else name, **style)
        for i, (name, points) in enumerate(own.items()):
            style = {"color": COLORS[i % len(COLORS)], "linestyle": _STYLES[i // len(COLORS) % len(_STYLES)]}
            marker = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 9 - 0.6 * min(i, 8), "fillstyle": "none"}
            panel.plot(*points, label=name, linewidth=1.5, **marker, **style)  # open marks: equal curves show both
        panel.set_title(family)
        _tidy(panel, max(row["calls"] for row in rows))
    panels[0].set_ylabel("total variation from the data's law")
    figure.suptitle(title)
    return figure


def _curves(rows: Iterable[Mapping[str, Any]], family: str) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["family"] == family:
            calls, distances = curves.setdefault(row["sampler"], ([], []))
            calls.append(row["calls"])
            distances.append(row["distance"])
    return curves


def _tidy(panel: Axes, most_calls: float) -> None:
    panel.set(xscale="log", yscale="log", xlabel="model calls per text")
    panel.set_xticks([2**n for n in range(math.ceil(math.log2(max(most_calls, 2))) + 1)])
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.tick_params(labelleft=True)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
