"""Pictures of quality hold the rows they are given, the knee, the frontier and the calibration error."""

import itertools

import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import diagnostics
from hdlm_jax.visual import quality_figures

NATS = {"ancestral": [4.0, 3.0, 2.6, 2.5, 2.45], "acs": [3.5, 3.4, 2.2, 2.1, 2.0]}
CALLS = [8, 16, 32, 64, 128]
ROWS = [
    {"sampler": name, "calls": calls, "judge nats/token": x, "standard error": 0.01 * i, "entropy": 3 + 0.1 * i + x / 9}
    for name, nats in NATS.items()
    for i, (calls, x) in reversed([*enumerate(zip(CALLS, nats, strict=True))])
]


def test_steps_quality_draws_every_curve_by_calls_with_its_knee():
    figure = quality_figures.steps_quality(ROWS, title="a run")
    (panel,) = figure.axes
    curves = dict(zip(sorted(NATS), panel.containers, strict=True))
    rings = [line for line in panel.lines if line.get_fillstyle() == "none"]
    for (name, container), ring in zip(curves.items(), rings, strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_xydata(), np.stack([CALLS, NATS[name]], 1))
        heights = [high - low for (_, low), (_, high) in bars.get_segments()]
        np.testing.assert_allclose(heights, 0.02 * np.arange(5), atol=1e-12)
        bend = diagnostics.knee(CALLS, NATS[name])
        np.testing.assert_allclose(ring.get_xydata(), [[CALLS[bend], NATS[name][bend]]])
        assert container.get_label() == f"{name} (knee at {CALLS[bend]} calls)"
    assert [tick.get_text() for tick in panel.get_xticklabels()] == [str(calls) for calls in CALLS]
    figure.draw_without_rendering()


def test_two_points_have_no_knee():
    (panel,) = quality_figures.steps_quality(ROWS[:2]).axes
    assert [container.get_label() for container in panel.containers] == ["ancestral"]


def test_a_rising_curve_has_no_knee():
    rows = [
        {"sampler": "acs", "calls": calls, "entropy": x} for calls, x in zip(CALLS, [1, 1.1, 1.2, 2, 3], strict=True)
    ]
    (panel,) = quality_figures.steps_quality(rows, "entropy").axes
    assert [container.get_label() for container in panel.containers] == ["acs"]


def test_any_other_value_is_drawn_without_the_error_of_the_judge():
    (panel,) = quality_figures.steps_quality(ROWS, "entropy").axes
    assert panel.get_ylabel() == "entropy"
    assert all(container[2] == () for container in panel.containers)


def test_the_frontier_against_all_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 60))
    beaten = np.zeros(60, bool)
    for i, j in itertools.product(range(60), repeat=2):
        beaten[i] |= (x[j] >= x[i] and y[j] < y[i]) or (x[j] > x[i] and y[j] <= y[i])
    np.testing.assert_array_equal(quality_figures.frontier(x, y), ~beaten)


def test_entropy_quality_joins_the_frontier():
    figure = quality_figures.entropy_quality(ROWS)
    (panel,) = figure.axes
    *lines, best = panel.lines
    assert [line.get_label() for line in lines] == sorted(NATS)
    points = np.array([[row["entropy"], row["judge nats/token"]] for row in ROWS])
    expected = points[quality_figures.frontier(*points.T)]
    np.testing.assert_allclose(best.get_xydata(), expected[np.argsort(expected[:, 0])])
    assert sorted(text.get_text() for text in panel.texts) == sorted([*(str(c) for c in CALLS * 2), "numbers: calls"])
    figure.draw_without_rendering()


def test_calibration_of_known_predictions():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(500), rng.random(500) < 0.5
    rows, error = diagnostics.binned(confidence, right, bins=5)
    figure = quality_figures.calibration([{"at": "masks", **row} for row in rows])
    upper, lower = figure.axes
    line, _, (bars,) = upper.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[row["confidence"], row["accuracy"]] for row in rows])
    heights = [(high - low) / 2 for (_, low), (_, high) in bars.get_segments()]
    np.testing.assert_allclose(heights, [row["standard error"] for row in rows])
    assert upper.containers[0].get_label() == f"masks (error {error:.3f})"
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [row["count"] / 500 for row in rows])
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    "draw", [quality_figures.steps_quality, quality_figures.entropy_quality, quality_figures.calibration]
)
def test_rows_that_say_nothing_are_told(draw):
    with pytest.raises(UserError, match=r"rows: got \[\]; allowed: at least one row"):
        draw([])
    with pytest.raises(UserError, match=r"rows: got \['rate'\]; allowed: rows that hold '"):
        draw([{"rate": 1}])
