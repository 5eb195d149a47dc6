"""Figure of a trajectory's corrections: when tokens that were there already are replaced."""

import numpy as np
from matplotlib.figure import Figure

from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.visual.figures import COLORS, whole_numbers


def corrections(trajectory: Trajectory, title: str = "") -> Figure:
    """Draws corrections over the generation steps.

    Args:
      trajectory: of a batch of texts.
      title: of the figure; by default what the hyperschedule says of itself.

    Returns:
      A figure: above, the tokens corrected between each frame and the one before, the mean over the texts; below,
      their sum so far as a share of the tokens that were not given, for each text and in the mean.
    """
    corrected_FxBxL = trajectory.corrected()
    per_frame_FxB = corrected_FxBxL.sum(2)
    share_FxB = np.cumsum(per_frame_FxB, axis=0) / np.maximum((~trajectory.given).sum(1), 1)
    figure = Figure(figsize=(8.6, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    widths = np.diff(trajectory.steps)
    upper.bar(trajectory.steps[1:], per_frame_FxB[1:].mean(1), width=-0.85 * widths, align="edge", color=COLORS[1])
    upper.set(ylabel="corrected tokens of a text", title="corrections in each step")
    for share_F in share_FxB.T:
        lower.plot(trajectory.steps, share_F, color=COLORS[0], alpha=0.3, linewidth=0.8)
    last = share_FxB[-1].mean()
    lower.plot(
        trajectory.steps, share_FxB.mean(1), color=COLORS[0], linewidth=2, label=f"mean of texts (last {last:.3f})"
    )
    lower.set(ylabel="corrections per token", xlabel="generation step", title="corrections so far")
    lower.legend(frameon=False, loc="upper left")
    for panel in (upper, lower):
        panel.set_xlim(trajectory.steps[0], trajectory.steps[-1])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(whole_numbers())
    figure.suptitle(title or trajectory.hyperschedule.describe())
    return figure
