"""The gallery shows every builder: the levels it makes and the windows of its calls."""

import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.visual import gallery


@pytest.mark.parametrize("length", [4, 5, 24, 100])
def test_every_builder_is_shown_with_its_levels_and_windows(length: int):
    figure, shown = gallery.gallery(length), gallery.examples(length)
    assert {hs.kind for hs in shown} == set(hyperschedules.BUILDERS)
    for panel, hs in zip(figure.axes, shown, strict=False):
        np.testing.assert_allclose(panel.images[0].get_array(), hs.levels / hs.tau_max, rtol=1e-6)
        windows = np.array([hs.window(step) for step in range(hs.num_steps)])
        for line, bound in zip(panel.lines, windows.T, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), np.repeat(bound, 2) - 0.5)
            np.testing.assert_array_equal(line.get_ydata()[::2], np.arange(hs.num_steps))
        assert panel.get_title().startswith(f"{hs.kind}\nwidth {hs.width}, rate {hs.rate}\n{hs.num_steps} calls")
    figure.draw_without_rendering()


def test_too_few_positions():
    with pytest.raises(UserError, match="length: got 3; allowed: at least 4 positions"):
        gallery.gallery(3)
