"""Pictures of visibility show the predicates, over the positions of the hyperschedule."""

import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noise_schedules, visibility
from hdlm_jax.errors import UserError
from hdlm_jax.visual import masks

L = 10
CASES = [
    (hyperschedules.block(L, 4, 2), False),
    (hyperschedules.block(L, 4, 2), True),
    (hyperschedules.slide(L, 4, 2), True),
    (hyperschedules.quenched(L), True),
]


@pytest.mark.parametrize(("hs", "shifted"), CASES, ids=lambda x: getattr(x, "kind", x))
def test_every_panel_is_what_the_predicates_say(hs, shifted):
    step = hs.num_steps // 2
    figure = masks.visibility_masks(hs, shifted, step)
    levels, fed, context, windows, clean, none = (axes.images[0].get_array() for axes in figure.axes[:6])
    np.testing.assert_array_equal(levels, hs.levels)
    np.testing.assert_array_equal(clean, np.tri(L))
    assert not np.any(none)
    start_L, row_L = np.asarray(context).sum(1), np.arange(L)
    np.testing.assert_array_equal(context, visibility.active_sees_settled(start_L[:, None], row_L[None, :]))
    np.testing.assert_array_equal(windows, visibility.active_sees_active(start_L[:, None], start_L[None, :]))
    start, stop = hs.window(step)
    stop += shifted and visibility.trailing_row_matters(hs, noise_schedules.linear())
    whole = visibility.one_text(row_L[:, None], row_L[None, :], start, stop)
    first = round(figure.axes[1].images[0].get_extent()[3] + 0.5)
    np.testing.assert_array_equal(fed, whole[first : first + len(fed)])
    figure.draw_without_rendering()


def test_titles_give_the_share_of_allowed_pairs():
    figure = masks.visibility_masks(hyperschedules.block(L, 4, 2), step=3)
    seen = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:6]]
    for axes, mask in zip(figure.axes[1:6], seen[1:], strict=True):
        assert axes.get_title().endswith(f"{mask.mean():.1%}")
    whole = np.block([[seen[4], seen[5]], [seen[2], seen[3]]])
    assert f"training: {whole.mean():.1%} of all pairs of 20 rows" in figure.get_suptitle()
    assert f"{seen[1].mean():.1%} of their pairs" in figure.get_suptitle()


def test_panels_share_the_position_axis():
    levels, *panels = masks.visibility_masks(hyperschedules.slide(L, 4, 2)).axes[:6]
    assert all(levels.get_shared_x_axes().joined(levels, panel) for panel in panels)


@pytest.mark.parametrize(
    ("hs", "step", "message"),
    [
        (hyperschedules.ar_diffusion(L, 12), None, r"hyperschedule: got 'ar_diffusion'; allowed: one with tiled"),
        (hyperschedules.block(L, 4, 2), 6, r"step: got 6; allowed: 0 .. 5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(hs, step, message):
    with pytest.raises(UserError, match=message):
        masks.visibility_masks(hs, step=step)
