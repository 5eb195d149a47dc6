"""Figures: a hyperschedule as a heat map beside its window, and the loss curves of a run.

Every function builds a `matplotlib.figure.Figure` without pyplot: no display is needed and nothing global
changes. `save` writes one to a file.
"""

import io
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LightSource, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import UserError, choose, require

# Blue settled, red worthless, pale between: seven anchors of ColorBrewer's RdYlBu, safe for the colour-blind.
LEVEL_COLORS = ["#2f5f9e", "#74add1", "#d6ecf3", "#fffbc4", "#fdc170", "#f0703f", "#b8202f"]
COLORS = ["#2f5f9e", "#d9632c", "#4d9078", "#8a5a9e", "#b8902f"]
DARK = "#3d3d3d"
_MAX_STEPS = 2048  # steps drawn; a longer schedule is sampled evenly, still finer than the pixels
_MAX_BARS = 48  # steps, and positions, drawn as bars
_LIGHT = LightSource(azdeg=200, altdeg=55)
_MAX_BANDS = 12  # up to this many levels get a colour and a tick each
_SUFFIXES = (".png", ".pdf", ".svg")

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> (steps, values). The part of a name after its last "/" is the quantity: each has its own panel."""


def hyperschedule(hs: Hyperschedule, title: str = "", style: str = "heat") -> Figure:
    """Draws the levels of a hyperschedule, step by position.

    Args:
        hs: a hyperschedule of any length and number of steps.
        title: of the figure; by default what the hyperschedule says of itself.
        style: 'heat', a heat map beside the window of every model call; 'bars', one bar in space for each level.

    Returns:
        heat: two panels over one axis of generation steps, 0 (pure noise) on top. Left the levels, from 0
        (settled, blue) to tau_max (worthless, red); right each call's window, from start to stop.
        bars: the levels as heights, for at most 48 steps and 48 positions, evenly spread.

    Raises:
        UserError: an unknown style.

    References:
        Fathi, Scholak, Noël, arXiv 2504.06416, draw theirs as bars.
    """
    figure = choose("style", style, {"heat": _heat, "bars": _bars})(hs)
    figure.suptitle(title or hs.describe())
    return figure


def _heat(hs: Hyperschedule) -> Figure:
    steps_S = _spread(hs.num_steps + 1)
    calls_C = _spread(hs.num_steps)
    levels_SxL = hs.level_of(np.arange(hs.length)[None, :], steps_S[:, None])
    start_C, stop_C = np.array([hs.window(int(step)) for step in calls_C], int).reshape(-1, 2).T
    figure = Figure(figsize=(10.5, 6.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    heat_map(left, levels_SxL, hs.tau_max, hs.num_steps)
    _window_band(right, calls_C, start_C, stop_C, hs.length)
    return figure


def _bars(hs: Hyperschedule) -> Figure:
    steps_S, position_P = _spread(hs.num_steps + 1, _MAX_BARS), _spread(hs.length, _MAX_BARS)
    level_SxP = hs.level_of(position_P[None, :], steps_S[:, None])
    height_SxP = np.maximum(level_SxP, 0.005 * hs.tau_max)  # settled ones as tiles
    wide, deep = (0.9 * (x[1] - x[0]) if len(x) > 1 else 0.9 for x in (position_P, steps_S))
    figure = Figure(figsize=(9.0, 7.0))
    panel = figure.add_axes((0.0, 0.02, 0.94, 0.92), projection="3d", computed_zorder=False)
    panel.view_init(elev=36, azim=140)  # from the settled side, over which the noise rises
    nearness_SxP = np.arange(len(steps_S))[:, None] - np.arange(len(position_P))[None, :]
    for nearness in np.unique(nearness_SxP):  # none of these bars hides another, nearer ones are drawn over them
        s, p = np.nonzero(nearness_SxP == nearness)
        corner = position_P[p] - wide / 2, steps_S[s] - deep / 2, np.zeros(len(s))
        colors = level_colors()(level_SxP[s, p] / hs.tau_max)
        panel.bar3d(*corner, wide, deep, height_SxP[s, p], color=colors, lightsource=_LIGHT, zorder=3 + nearness / 1e3)
    panel.set_xlabel("position", labelpad=10)
    panel.set_ylabel("generation step", labelpad=10)
    panel.set_zlabel("level")
    for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
        axis.set_major_locator(whole_numbers())
    return figure


def loss_curve(
    records: Series | Iterable[Mapping[str, Any]],
    baselines: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Draws loss curves against the optimizer step, one panel for each quantity.

    Args:
        records: the lines of a metrics.jsonl (see `series_of`), or name -> (steps, values). A series whose
            name starts with "held_out" has markers; any other is pale, with its running mean over it.
        baselines: name -> value, horizontal lines in the panel of the last quantity, such as the unigram
            model's bits per byte beside the held-out ones.
        title: of the figure.

    Raises:
        UserError: when there is nothing to draw.

    >>> figure = loss_curve({"train/loss": ([10, 20], [5.1, 4.7])}, baselines={"uniform": 5.5})
    >>> [line.get_label() for line in figure.axes[0].lines[1:]]
    ['train/loss (last 4.700)', 'uniform (5.500)']
    """
    series = records if isinstance(records, Mapping) else series_of(records)
    series = {name: points for name, points in series.items() if len(points[0])}
    require(len(series) > 0, "metrics", "no values of a loss", "records that hold a step and a loss")
    quantities = list(dict.fromkeys(name.rpartition("/")[2] for name in series))
    figure = Figure(figsize=(9.0, 1.4 + 3.2 * len(quantities)), layout="constrained")
    panels = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    colors = dict(zip(series, COLORS * len(series), strict=False))
    for panel, quantity in zip(panels, quantities, strict=True):
        chosen = {name: points for name, points in series.items() if name.rpartition("/")[2] == quantity}
        lines = baselines or {} if quantity == quantities[-1] else {}
        _curves(panel, chosen, colors, lines)
        panel.set_ylabel(quantity.replace("_", " "))
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(whole_numbers())
    figure.suptitle(title)
    return figure


def series_of(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Collects name -> (steps, values) from records, keeping finite losses and bits per byte.

    >>> series_of([{"step": 1, "train/loss": 5.0, "lr": 0.1}, {"step": 2, "train/loss": float("nan")}])
    {'train/loss': ([1], [5.0])}
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            quantity = name.rpartition("/")[2]
            known = value is not None and "step" in record
            if quantity in ("loss", "bits_per_byte") and known and np.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes `figure` to `path`, whole or not at all; folders on the way are made.

    Raises:
        UserError: when the suffix is not .png, .pdf or .svg, or the file cannot be written.
    """
    path = checked(path)
    draft = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(draft, dpi=150)
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"out: cannot write {str(path)!r}: {error.strerror}") from error
    finally:
        if draft.exists():
            draft.unlink()
    return path


def checked(path: str | os.PathLike) -> Path:
    """The path of a picture; `UserError` unless it ends in .png, .pdf or .svg."""
    path = Path(path)
    require(path.suffix in _SUFFIXES, "out", str(path), f"a file name ending in {', '.join(_SUFFIXES)}")
    return path


def png(figure: Figure) -> bytes:
    """The figure as a picture of the size that notebooks show."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def level_colors() -> LinearSegmentedColormap:
    """Colours of the noise fraction: 0 settled, 1 worthless."""
    return LinearSegmentedColormap.from_list("levels", LEVEL_COLORS)


def _spread(count: int, most: int = _MAX_STEPS) -> np.ndarray:
    """The integers below `count`, or `most` of them evenly spread with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int32))


def heat_map(panel: Axes, levels_SxL: np.ndarray, tau_max: int, num_steps: int) -> None:
    """Levels as colours, one row per generation step downwards, with a colour bar below."""
    colors = level_colors()
    banded = tau_max <= _MAX_BANDS
    norm = BoundaryNorm(np.arange(tau_max + 2) - 0.5, colors.N) if banded else Normalize(0, tau_max)
    extent = (-0.5, levels_SxL.shape[1] - 0.5, num_steps + 0.5, -0.5)
    image = panel.imshow(levels_SxL, cmap=colors, norm=norm, extent=extent, aspect="auto")
    panel.set(title="level of each position", xlabel="position", ylabel="generation step")
    panel.xaxis.set_major_locator(whole_numbers())
    panel.yaxis.set_major_locator(whole_numbers())
    ticks = range(tau_max + 1) if banded else _ends_and_between(tau_max)
    bar = panel.figure.colorbar(image, ax=panel, location="bottom", shrink=0.7, pad=0.03, ticks=ticks)
    words = {0: "settled", tau_max: "worthless"}
    bar.ax.set_xticklabels([f"{tick}\n{words.get(tick, '')}" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def whole_numbers() -> MaxNLocator:
    """Ticks at whole numbers, even where there is room for one only."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def _ends_and_between(top: int) -> list[int]:
    """Round ticks from 0 to `top`, with room between the last two.

    >>> _ends_and_between(256)
    [0, 50, 100, 150, 200, 256]
    """
    ticks = MaxNLocator(6, integer=True).tick_values(0, top)
    return [*(int(tick) for tick in ticks if tick < 0.9 * top), top]


def _window_band(panel: Axes, calls_C: np.ndarray, start_C: np.ndarray, stop_C: np.ndarray, length: int) -> None:
    """The window of each call as a band: call `step` fills the height from step to step + 1."""
    step_edges = np.stack([calls_C, calls_C + 1], axis=1).ravel()
    start, stop = (np.repeat(bound, 2) - 0.5 for bound in (start_C, stop_C))
    style = {"linewidth": 1.3, "clip_on": False, "zorder": 3}  # seen on the frame too
    panel.fill_betweenx(step_edges, start, stop, color=COLORS[0], alpha=0.25, linewidth=0)
    panel.plot(start, step_edges, color=COLORS[0], label="start", **style)
    panel.plot(stop, step_edges, color=COLORS[1], label="stop", **style)
    panel.set(title="window of each call", xlabel="position", xlim=(-0.5, length - 0.5))
    panel.xaxis.set_major_locator(whole_numbers())
    panel.legend(loc="upper right", frameon=False)


def _curves(panel: Axes, series: Series, colors: Mapping[str, str], baselines: Mapping[str, float]) -> None:
    """Curves and baselines of one quantity; the view is fitted to means and markers, not to the noise."""
    seen = list(baselines.values())
    for name, (steps, values) in series.items():
        style = {"color": colors[name], "linewidth": 1.5}
        held_out = name.startswith("held_out")
        if not held_out:
            panel.plot(steps, values, color=colors[name], alpha=0.25, linewidth=0.8)
            values = _running_mean(np.asarray(values, float), span=len(values) // 40)
        if held_out or len(values) == 1:
            style["marker"] = "o"
        panel.plot(steps, values, label=f"{name} (last {values[-1]:.3f})", **style)
        seen.extend(values)
    for name, value in baselines.items():
        panel.axhline(value, color=DARK, linestyle="--", linewidth=1.0, label=f"{name} ({value:.3f})")
    low, high = min(seen), max(seen)
    margin = 0.08 * (high - low) or 0.5
    panel.set_ylim(low - margin, high + margin)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


def _running_mean(values: np.ndarray, span: int) -> np.ndarray:
    """Mean over the `span` values before and after each, fewer at the ends.

    >>> _running_mean(np.array([0.0, 3.0, 6.0]), span=1)
    array([1.5, 3. , 4.5])
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - span, 0), np.minimum(index + span + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
