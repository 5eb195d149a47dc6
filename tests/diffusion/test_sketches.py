"""Sketches: what becomes of anchor points and drawings, and which rule a bad one breaks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.diffusion.sketches import from_drawing, from_sketch
from hdlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("points", "tau_max", "known"),
    [
        ([(0, 0)], 5, hyperschedules.flat(8, 5)),
        ([(0, 0), (7, 7)], 1, hyperschedules.quenched(8)),
        ([(7, 14), (0, 0)], 4, hyperschedules.slide(8, 2, Fraction(1, 2))),
        ([(0, 0, 4), (1, 0, 4), (6, 2, 6), (7, 3, 7)], None, None),
    ],
)
def test_points_through_known_hyperschedules(points, tau_max, known):
    hs = from_sketch(points, length=8, tau_max=tau_max)
    if known is None:  # a bent line: positions 1 to 6 start 2/5 of a call apart
        assert hs.starts.tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    else:
        np.testing.assert_array_equal(hs.levels, known.levels)
    assert hs.num_steps == max((*p, p[1] + (tau_max or 0))[2] for p in points)


def test_positions_of_different_length_pass_evenly_through_the_levels():
    level_SxL = np.asarray(from_sketch([(0, 0, 2), (1, 0, 3), (2, 0, 6)], length=3).levels)
    assert level_SxL.T.tolist() == [[6, 3, 0, 0, 0, 0, 0], [6, 4, 2, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1, 0]]


ANCHORS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=5)


@given(ANCHORS, st.integers(0, 4))
def test_every_anchor_is_met(anchors, spare):
    """Starts and settling steps at the anchors are those asked for; between them they stay between."""
    points = [(p, s, s + d) for p, s, d in {a[0]: a for a in anchors}.values()]
    try:
        hs = from_sketch(points, length=10, tau_max=max(d for _, _, d in anchors) + spare)
    except UserError as error:
        assert "which changes nothing" in str(error)
        return
    settle_L = (np.asarray(hs.levels) > 0).sum(0)
    for position, start, settle in points:
        assert (hs.starts[position], settle_L[position]) == (start, settle)
    for column, found_L in ((1, hs.starts), (2, settle_L)):
        at = [p[column] for p in points]
        assert min(at) <= found_L.min() and found_L.max() <= max(at)


def test_a_drawing_of_a_known_hyperschedule():
    slide = hyperschedules.slide(6, 4, 2)
    drawn = from_drawing(["##....", "####..", "..####", "....##"], visibility="prefix")
    np.testing.assert_array_equal(drawn.levels, slide.levels)
    assert [drawn.window(step) for step in range(4)] == [slide.window(step) for step in range(4)]


def test_marks_need_not_stand_together():
    hs = from_drawing(np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1]], bool))
    assert hs.levels.T.tolist() == [[3, 2, 2, 0], [3, 3, 0, 0], [3, 2, 1, 0]]
    assert not hs.settles_prefix


BAD_POINTS = [
    ({"points": []}, "sketch: got []; allowed: at least one point"),
    ({"points": [(0, 0, 2, 3)]}, "sketch: got (0, 0, 2, 3); allowed: points (position, start)"),
    ({"points": [(0, 0)]}, "tau_max: got None; allowed: a whole number, since (0, 0) has no settle"),
    ({"points": [(0, 0)], "tau_max": 0}, "tau_max: got 0"),
    ({"points": [(8, 0, 2)]}, "sketch position: got 8; allowed: a whole number from 0 to 7 (the last position)"),
    ({"points": [(0, -1, 2)]}, "sketch start of position 0: got -1"),
    ({"points": [(0, 0, 1.5)]}, "sketch settle of position 0: got 1.5"),
    ({"points": [(0, 0, 2), (0, 1, 3)]}, "sketch: got 'two points at position 0'; allowed: one"),
    ({"points": [(3, 2, 2)]}, "sketch: got 'position 3 settled at step 2, started by call 2'; allowed: levels that"),
    ({"points": [(3, 0, 5)], "tau_max": 4}, "sketch: got 'position 3 in calls 0 to 4'; allowed: at most tau_max = 4"),
    ({"points": [(0, 1, 3)]}, "sketch: got 'call 0, which changes nothing'; allowed: calls that each lower some level"),
    ({"points": [(3, 0, 2), (4, 5, 7)]}, "sketch: got 'call 2, which changes nothing'"),
    (
        {"points": [(0, 2, 4), (7, 0, 2)], "visibility": "prefix"},
        "sketch: got 'start 1 at position 1, start 2 at position 0'; allowed: positions that start from left to right",
    ),
    (
        {"points": [(0, 0, 6), (7, 0, 2)], "visibility": "prefix"},
        "sketch: got 'settle 5 at position 1, settle 6 at position 0'; allowed: positions that settle from left",
    ),
    ({"points": [(0, 0, 2)], "visibility": "causal"}, "visibility: got 'causal'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_POINTS, ids=lambda value: value if isinstance(value, str) else "")
def test_which_rule_of_points_is_broken(fields, message):
    with pytest.raises(UserError) as caught:
        from_sketch(length=8, **fields)
    assert str(caught.value).startswith(message)


BAD_DRAWINGS = [
    ([], "sketch: got []; allowed: at least one row"),
    (["##", "#"], "sketch: got '1 positions at call 1, 2 at call 0'; allowed: rows of one length"),
    (["", ""], "sketch: got '0 positions at call 0"),
    (["##", "#x"], "sketch: got \"'x' at call 1\"; allowed: '#' and '.' only"),
    (["#.", "#."], "sketch: got 'no call for position 1'; allowed: positions that all settle"),
    (["##", "..", "##"], "sketch: got 'call 1, which changes nothing'"),
    ([[2, 2], [0, 0]], "sketch: got 'int64[2, 2]'; allowed: texts or booleans [T, L]; levels: from_levels"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_DRAWINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_which_rule_of_a_drawing_is_broken(rows, message):
    with pytest.raises(UserError) as caught:
        from_drawing(rows)
    assert str(caught.value).startswith(message)


def test_a_drawing_for_a_prefix_model_goes_from_left_to_right():
    from_drawing([".#", "#."])
    with pytest.raises(UserError, match="'start 0 at position 1, start 1 at position 0'.*for a 'prefix' model"):
        from_drawing([".#", "#."], visibility="prefix")
