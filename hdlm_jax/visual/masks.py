"""Figures of who sees whom: training and generation masks beside the hyperschedule, over one position axis."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hdlm_jax.diffusion import noise_schedules, phases, visibility
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import require
from hdlm_jax.models.layouts import tiled_visible
from hdlm_jax.visual import figures

_SEEN = ListedColormap(["#eceae4", "#2f5f9e"])


def visibility_masks(hs: Hyperschedule, shifted: bool = False, step: int | None = None, seed: int = 0) -> Figure:
    """Draws a hyperschedule, the masks of one training phase and the mask of one generation step.

    Args:
      hs: a hyperschedule that settles left to right.
      shifted: whether rows hold the token before the one they predict; the masks are named by the latter.
      step: the generation step shown (default: the middle one).
      seed: of the training phase.

    Returns:
      A figure: levels by step and, over the same positions as keys, what is seen by the noised copy, by the
      clean copy and by the rows fed in one generation step. Titles give the share of allowed pairs.

    Raises:
      UserError: a hyperschedule without a period (it trains in the plain layout), a step outside it.
    """
    require(
        hs.period is not None, "hyperschedule", hs.kind, "one with tiled training: quenched, block, slide, block_slide"
    )
    step = hs.num_steps // 2 if step is None else step
    require(0 <= step < hs.num_steps, "step", step, f"0 .. {hs.num_steps - 1}")
    L, trained = hs.length, _training_mask(hs, seed)
    rows_R, fed = _generation_mask(hs, shifted, step)
    figure = Figure(figsize=(11.0, 10.5), layout="constrained")
    panels = figure.subplots(3, 2, sharex=True, height_ratios=(3, 4, 4))
    figures.heat_map(panels[0, 0], np.asarray(hs.levels), hs.tau_max, hs.num_steps)
    panels[0, 0].axhline(step, color="black", linewidth=1.0)
    _mask(panels[0, 1], fed, f"generation, step {step}: rows fed", rows_R)
    _mask(panels[1, 0], trained[L:, :L], "training: noised copy sees clean copy")
    _mask(panels[1, 1], trained[L:, L:], "training: noised copy sees its own windows")
    _mask(panels[2, 0], trained[:L, :L], "training: clean copy sees clean copy")
    _mask(panels[2, 1], trained[:L, L:], "training: clean copy sees noised copy")
    figure.suptitle(
        f"{hs.describe()}\ntraining: {trained.mean():.1%} of all pairs of {2 * L} rows; generation:"
        f" {len(rows_R)} rows of {L}, {fed.mean():.1%} of their pairs"
    )
    return figure


def _training_mask(hs: Hyperschedule, seed: int) -> np.ndarray:
    """bool [2L, 2L] of one phase."""
    origin = jnp.zeros(1, jnp.int32)
    phase = phases.tiled(jax.random.key(seed), origin, hs, noise_schedules.linear(), 1.0)
    return np.asarray(tiled_visible(phase.start))[0]


def _generation_mask(hs: Hyperschedule, shifted: bool, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows fed at a step, and bool [rows, L]: which positions' keys they see, cached or fed."""
    start, stop = hs.window(step)
    before = hs.window(step - 1)[0] if step else start
    stop += shifted and visibility.trailing_row_matters(hs, noise_schedules.linear())
    rows_R = np.arange(before, min(stop, hs.length))
    return rows_R, visibility.one_text(rows_R[:, None], np.arange(hs.length)[None, :], start, stop)


def _mask(panel: Axes, seen: np.ndarray, title: str, rows: np.ndarray | None = None) -> None:
    rows = np.arange(len(seen)) if rows is None else rows
    extent = (-0.5, seen.shape[1] - 0.5, rows[-1] + 0.5, rows[0] - 0.5)
    panel.imshow(seen, cmap=_SEEN, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    panel.set(title=f"{title}: {seen.mean():.1%}", xlabel="key: position", ylabel="query: row")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.tick_params(labelbottom=True)
