"""The gallery: every builder of hyperschedules side by side, with what it costs."""

from fractions import Fraction

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import require
from hdlm_jax.visual.figures import DARK, level_colors, whole_numbers

_LEAST = 4


def examples(length: int) -> list[Hyperschedule]:
    """One hyperschedule of each builder, windows a third of the length wide in four levels, and a wider slide.

    Raises:
      UserError: fewer than 4 positions.

    >>> [hs.kind for hs in examples(24)] == [*hyperschedules.BUILDERS, "slide"]
    True
    """
    require(length >= _LEAST, "length", length, f"at least {_LEAST} positions")
    width, half = max(1, length // 3), -(-length // 2)
    window = {"width": width, "rate": Fraction(width, 4)}
    fields = {
        "quenched": {},
        "flat": {"steps": half},
        "block": window,
        "slide": window,
        "block_slide": {"block": half, **window},
        "ar_diffusion": {"steps": length + half},
    }
    made = [hyperschedules.build(kind, length, **fields[kind]) for kind in hyperschedules.BUILDERS]
    return [*made, hyperschedules.slide(length, 2 * width, Fraction(width, 4))]


def gallery(length: int = 24) -> Figure:
    """Draws `examples(length)`: levels as colours, the window of each call as two lines.

    Args:
      length: positions.

    Raises:
      UserError: fewer than 4 positions.
    """
    shown = examples(length)
    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    panels = figure.subplots(2, -(-len(shown) // 2)).ravel()
    for panel, hs in zip(panels, shown, strict=False):
        image = _miniature(panel, hs)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
        _explain(panel, image)
    figure.suptitle(f"Hyperschedules of {length} positions: from autoregression to diffusion")
    return figure


def _miniature(panel: Axes, hs: Hyperschedule):
    T, L = hs.num_steps, hs.length
    extent = (-0.5, L - 0.5, T + 0.5, -0.5)
    level_SxL = hs.level_of(np.arange(L)[None, :], np.arange(T + 1)[:, None])
    image = panel.imshow(level_SxL / hs.tau_max, cmap=level_colors(), vmin=0, vmax=1, extent=extent, aspect="auto")
    windows_Tx2 = np.array([hs.window(step) for step in range(T)])
    edges = np.repeat(np.arange(T + 1), 2)[1:-1]
    for bound_T in windows_Tx2.T:
        panel.plot(np.repeat(bound_T, 2) - 0.5, edges, color="black", linewidth=1.1, clip_on=False)
    cost = f"{float(hs.cost):.3g}"
    panel.set_title(f"{hs.kind}\nwidth {hs.width}, rate {hs.rate}\n{T} calls, {cost} rows per token", fontsize=10)
    panel.set(xlabel="position", ylabel="generation step", xlim=(-0.5, L - 0.5), ylim=(T + 0.5, -0.5))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(whole_numbers())
    return image


def _explain(panel: Axes, image) -> None:
    bar = panel.figure.colorbar(image, ax=panel, location="top", fraction=0.06, ticks=[0, 1])
    for label, side in zip(bar.ax.set_xticklabels(["settled", "worthless"]), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.outline.set_visible(False)
    text = (
        "Colour: the noise level of a position,\nas a share of the highest.\n\n"
        "Lines: the window of each call,\nfrom the step above to the one below.\n\n"
        "Rate: tokens settled per call.\n\n"
        "Rows per token: window rows fed to\nthe network for each token of text."
    )
    panel.text(0.0, 0.98, text, transform=panel.transAxes, va="top", color=DARK, fontsize=10)
