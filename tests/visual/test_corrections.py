"""The picture of corrections counts what the trajectory says was corrected."""

import numpy as np

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.visual.corrections import corrections
from tests.visual.trajectories import made


def test_bars_and_curves_count_the_corrections():
    trajectory = made(hyperschedules.slide(12, 6, 1), 5, prompts=(0, 3))
    steps, tokens = trajectory.steps, trajectory.tokens
    count_FxB = np.zeros(tokens.shape[:2])
    for f, b, i in np.ndindex(tokens.shape):
        old = tokens[f - 1, b, i]
        count_FxB[f, b] += f > 0 and old != trajectory.mask and old != tokens[f, b, i]
    figure = corrections(trajectory)
    upper, lower = figure.axes
    bars = {round(bar.get_x() + bar.get_width()): bar.get_height() for bar in upper.patches}
    heights = [bar.get_height() for bar in upper.patches]
    np.testing.assert_allclose(heights, count_FxB[1:].mean(1))
    assert len(bars) == len(steps) - 1
    free = (~trajectory.given).sum(1)
    *each, mean = lower.lines
    share_FxB = np.cumsum(count_FxB, 0) / free
    np.testing.assert_allclose(np.stack([line.get_ydata() for line in each], 1), share_FxB)
    np.testing.assert_allclose(mean.get_ydata(), share_FxB.mean(1))
    np.testing.assert_array_equal(mean.get_xdata(), steps)
    assert share_FxB[-1].min() > 0
    figure.draw_without_rendering()
