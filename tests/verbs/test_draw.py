"""`hdlm draw` writes pictures."""

from pathlib import Path

import pytest

from hdlm_jax.__main__ import main
from hdlm_jax.visual import figures

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def drawn(path, *command):
    assert main(["draw", *map(str, command), "--out", str(path)]) == 0
    return path.read_bytes()


def test_a_hyperschedule_of_an_experiment_and_one_by_name(tmp_path, capfd, monkeypatch):
    seen = []
    draw = figures.hyperschedule
    monkeypatch.setattr(figures, "hyperschedule", lambda hs: (seen.append(repr(hs)), draw(hs))[1])
    path = tmp_path / "new" / "x.png"
    config = f"{ROOT}/experiments/quickstart.py"
    more = ["--config.data.length=32", "--config.hyperschedule.width=4"]
    assert drawn(path, "hyperschedule", "--config", config, *more).startswith(PNG)
    assert capfd.readouterr().out == f"written to {path}\n"
    assert drawn(path, "hyperschedule", "--kind", "slide", "--width", 6, "--rate", "3/2").startswith(PNG)
    assert drawn(path, "hyperschedule", "--kind", "flat", "--length", 8, "--steps", 3).startswith(PNG)
    assert seen == [
        "slide(length=32, width=4, rate=1)",
        "slide(length=64, width=6, rate=3/2)",
        "flat(length=8, steps=3)",
    ]


def test_the_masks_are_drawn_and_their_share_printed(tmp_path, capfd):
    command = ["visibility", "--kind", "slide", "--length", 16, "--width", 4, "--rate", 1]
    assert drawn(tmp_path / "x.png", *command).startswith(PNG)
    assert "%" in capfd.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_loss_of_a_run_beside_the_unigram_model(smoke_run, tmp_path, suffix):
    data = drawn(tmp_path / f"x.{suffix}", "loss", "--run", smoke_run)
    assert data.startswith(PNG if suffix == "png" else b"<?xml")


def test_the_loss_of_a_run_whose_data_are_gone(smoke_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((smoke_run / name).read_bytes())
    assert drawn(tmp_path / "x.png", "loss", "--run", run).startswith(PNG)


def test_a_run_without_metrics_is_told(smoke_run, tmp_path, capfd):
    (tmp_path / "config.json").write_bytes((smoke_run / "config.json").read_bytes())
    assert main(["draw", "loss", "--run", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert "metrics: got 'no values of a loss'" in capfd.readouterr().err
    assert not (tmp_path / "x.png").exists()
