"""Figures show what the hyperschedule and the records say; a file is written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.visual import figures

SCHEDULES = {
    "quenched": hyperschedules.quenched(7),
    "flat": hyperschedules.flat(8, 5),
    "block": hyperschedules.block(10, 4, 2),
    "slide": hyperschedules.slide(16, 6, "3/2"),
    "many levels": hyperschedules.slide(12, 10, "1/2"),
    "prompt": hyperschedules.slide(12, 4, 1).with_prompt(5),
    "all given": hyperschedules.slide(6, 2, 1).with_prompt(6),
    "table": hyperschedules.from_levels(np.array([[2, 2, 2], [2, 1, 2], [1, 0, 2], [0, 0, 0]])),
}


@pytest.mark.parametrize("hs", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_heat_map_and_band_hold_the_levels_and_windows(hs):
    figure = figures.hyperschedule(hs)
    heat_map, band = figure.axes[:2]
    image = heat_map.images[0]
    np.testing.assert_array_equal(image.get_array(), hs.levels)
    assert image.get_extent() == [-0.5, hs.length - 0.5, hs.num_steps + 0.5, -0.5]
    windows = np.array([hs.window(step) for step in range(hs.num_steps)]).reshape(-1, 2)
    start, stop = band.lines
    np.testing.assert_array_equal(start.get_xdata()[::2] + 0.5, windows[:, 0])
    np.testing.assert_array_equal(stop.get_xdata()[1::2] + 0.5, windows[:, 1])
    np.testing.assert_array_equal(start.get_ydata(), np.repeat(np.arange(hs.num_steps + 1), 2)[1:-1])
    assert band.get_shared_y_axes().joined(heat_map, band)
    assert figure.get_suptitle() == hs.describe()
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", ["slide", "many levels"])
def test_settled_is_blue_and_worthless_red(name: str):
    image = figures.hyperschedule(SCHEDULES[name]).axes[0].images[0]
    red, _, blue, _ = image.to_rgba(np.array([0, SCHEDULES[name].tau_max])).T
    assert blue[0] > 2 * red[0]
    assert red[1] > 2 * blue[1]


def test_a_long_schedule_is_sampled_with_both_ends():
    hs = hyperschedules.slide(1024, 64, "1/4")
    figure = figures.hyperschedule(hs)
    levels = figure.axes[0].images[0].get_array()
    assert levels.shape == (2048, 1024)
    assert (levels[0] == hs.tau_max).all()
    assert (levels[-1] == 0).all()
    assert figure.axes[0].get_ylim() == (hs.num_steps + 0.5, -0.5)
    assert figure.axes[1].lines[0].get_ydata()[-1] == hs.num_steps


RECORDS = [
    {"step": 10, "train/loss": 6.0, "train/tokens_per_second": 100.0, "note": "start"},
    {"step": 20, "train/loss": float("nan")},
    {"step": 20, "held_out/bits_per_byte": 5.0},
    {"step": 30, "train/loss": 4.0, "held_out/bits_per_byte": 4.5},
]


def test_loss_curve_puts_each_quantity_in_its_panel():
    figure = figures.loss_curve(RECORDS, baselines={"unigram": 4.64}, title="a run")
    loss, held_out = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 6.0], [30, 4.0]])
    np.testing.assert_array_equal(held_out.lines[0].get_xydata(), [[20, 5.0], [30, 4.5]])
    assert held_out.lines[0].get_marker() == "o"
    assert held_out.lines[1].get_ydata() == [4.64, 4.64]
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "bits per byte"]
    assert figure.get_suptitle() == "a run"
    figure.draw_without_rendering()


def test_the_view_holds_means_markers_and_baselines_but_not_every_spike():
    steps = np.arange(400)
    values = np.where(steps == 200, 1000.0, 3.0)
    series = {"train/loss": (steps, values), "held_out/loss": ([100], [7.0])}
    (panel,) = figures.loss_curve(series, baselines={"uniform": 9.0}).axes
    low, high = panel.get_ylim()
    assert low < 3.0
    assert 9.0 < high < 100.0


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=23)
    expected = [values[max(0, i - 4) : i + 5].mean() for i in range(23)]
    np.testing.assert_allclose(figures._running_mean(values, span=4), expected, atol=1e-12)


@pytest.mark.parametrize("records", [[], [{"step": 1, "lr": 0.1}], {"train/loss": ([], [])}])
def test_nothing_to_draw_is_an_error(records):
    with pytest.raises(UserError, match="metrics"):
        figures.loss_curve(records)


def test_save_makes_the_folder_and_leaves_one_file(tmp_path: Path):
    path = figures.save(figures.loss_curve(RECORDS), tmp_path / "a" / "b" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("name", ["loss.jpeg", "loss", "loss.png.txt"])
def test_save_refuses_an_unknown_suffix(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"\.png, \.pdf, \.svg"):
        figures.save(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_save_names_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="out: cannot write"):
        figures.save(Figure(), tmp_path / "file" / "loss.png")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "loss.png"
    path.write_text("old")

    def half(_, draft, **__):
        Path(draft).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match="No space left"):
        figures.save(Figure(), path)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"loss.png": "old"}


@pytest.mark.parametrize("name", ["slide", "prompt", "table"])
def test_bars_are_as_high_as_the_levels(name: str, monkeypatch: pytest.MonkeyPatch):
    hs, drawn = SCHEDULES[name], {}

    def keep(_, x, y, __, wide, deep, heights, **style):
        for i, height in enumerate(heights):
            drawn[round(y[i] + deep / 2), round(x[i] + wide / 2)] = height, style["zorder"]

    monkeypatch.setattr(Axes3D, "bar3d", keep)
    figure = figures.hyperschedule(hs, style="bars")
    levels = np.asarray(hs.levels)
    heights = np.array([[drawn[step, i][0] for i in range(hs.length)] for step in range(hs.num_steps + 1)])
    np.testing.assert_allclose(np.where(heights < 0.01 * hs.tau_max, 0, heights), levels)
    for (step, i), (_, zorder) in drawn.items():  # what is nearer to the eye lies over what is behind it
        assert all(drawn[at][1] < zorder for at in ((step - 1, i), (step, i + 1)) if at in drawn)
    assert figure.get_suptitle() == hs.describe()


def test_bars_of_a_long_schedule_are_few():
    figure = figures.hyperschedule(hyperschedules.slide(400, 64, "1/4"), "long", style="bars")
    faces = sum(len(collection.get_facecolor()) for collection in figure.axes[0].collections)
    assert faces == 6 * 48 * 48
    assert figure.get_suptitle() == "long"


def test_an_unknown_style():
    with pytest.raises(UserError, match="style: got 'bar' .*allowed: 'bars', 'heat'"):
        figures.hyperschedule(SCHEDULES["slide"], style="bar")


def test_a_hyperschedule_shows_itself_in_a_notebook(monkeypatch: pytest.MonkeyPatch):
    hs, shown = SCHEDULES["slide"], []
    draw = figures.hyperschedule
    monkeypatch.setattr(figures, "hyperschedule", lambda given: (shown.append(given), draw(given))[1])
    picture = hs._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert shown == [hs]
