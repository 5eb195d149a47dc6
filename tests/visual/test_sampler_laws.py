"""The picture of total variation against calls shows the rows that it is given."""

import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.visual import sampler_laws

ROWS = [
    {"sampler": "the data's law", "family": "", "calls": 1, "distance": 0.01},
    {"sampler": "the data's law", "family": "", "calls": 8, "distance": 0.01},
    {"sampler": "ancestral", "family": "", "calls": 8, "distance": 0.2},
    {"sampler": "acs", "family": "noise", "calls": 2, "distance": 0.4},
    {"sampler": "acs", "family": "noise", "calls": 8, "distance": 0.1},
    {"sampler": "threshold", "family": "orders", "calls": 2.5, "distance": 0.5},
]


def test_a_panel_for_each_family_and_the_shared_curves_in_all():
    figure = sampler_laws.total_variation(ROWS, title="laws")
    figure.draw_without_rendering()
    assert [panel.get_title() for panel in figure.axes] == ["noise", "orders"]
    noise, orders = ({line.get_label(): line for line in panel.lines} for panel in figure.axes)
    floor = "the data's law (the least to be seen)"
    assert (list(noise), list(orders)) == ([floor, "ancestral", "acs"], [floor, "ancestral", "threshold"])
    assert [list(points) for points in noise["acs"].get_data()] == [[2, 8], [0.4, 0.1]]
    assert [list(points) for points in orders["threshold"].get_data()] == [[2.5], [0.5]]
    assert {panel.get_xscale() + panel.get_yscale() for panel in figure.axes} == {"loglog"}


def test_curves_of_a_panel_can_be_told_apart():
    rows = [{"sampler": f"s{i}", "family": "x", "calls": 1 + i, "distance": 0.1} for i in range(12)]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in _lines(rows)]
    assert len(set(looks)) == 12


def _lines(rows):
    return sampler_laws.total_variation(rows).axes[0].lines


def test_nothing_to_draw_is_refused():
    with pytest.raises(UserError, match="rows: got "):
        sampler_laws.total_variation(ROWS[:1])
