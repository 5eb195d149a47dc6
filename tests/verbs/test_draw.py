"""`hdlm draw` writes pictures."""

import json
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
    monkeypatch.setattr(figures, "hyperschedule", lambda hs, style: (seen.append((repr(hs), style)), draw(hs))[1])
    path = tmp_path / "new" / "x.png"
    config = f"{ROOT}/experiments/quickstart.py"
    more = ["--config.data.length=32", "--config.hyperschedule.width=4"]
    assert drawn(path, "hyperschedule", "--config", config, *more).startswith(PNG)
    assert capfd.readouterr().out == f"written to {path}\n"
    assert drawn(path, "hyperschedule", "--kind", "slide", "--width", 6, "--rate", "3/2").startswith(PNG)
    assert drawn(path, "hyperschedule", "--kind", "flat", "--length", 8, "--steps", 3, "--style", "bars").startswith(
        PNG
    )
    assert seen == [
        ("slide(length=32, width=4, rate=1)", "heat"),
        ("slide(length=64, width=6, rate=3/2)", "heat"),
        ("flat(length=8, steps=3)", "bars"),
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


@pytest.mark.parametrize(
    "command",
    [("gallery", "--length", 6), ("noise",), ("noise", "--kind", "cosine", "linear"), ("kernels", "--tokens", 3)],
    ids=lambda command: "-".join(map(str, command)),
)
def test_pictures_of_the_mathematics(tmp_path, command):
    assert drawn(tmp_path / "x.png", *command).startswith(PNG)


def test_a_generation_as_a_page_and_its_corrections(smoke_run, tmp_path):
    settings = ["--run", smoke_run, "--prompt", "the ", "--sampler", "ancestral", "--seed", 3, "--length", 16]
    settings += ["--temperature", 0.5]
    page = drawn(tmp_path / "x.html", "trajectory", *settings).decode()
    assert page.startswith("<!doctype html>")
    assert f"<h1>{smoke_run}, step 6: ancestral, temperature 0.5</h1>" in page
    assert "slide: L=16, " in page
    assert drawn(tmp_path / "x.png", "corrections", *settings, "--num", 1).startswith(PNG)


def test_a_page_is_no_picture_and_a_picture_no_page(tmp_path, capfd):
    assert main(["draw", "trajectory", "--run", "none", "--out", str(tmp_path / "x.png")]) == 2
    assert "allowed: a file name ending in .html" in capfd.readouterr().err
    assert main(["draw", "noise", "--out", str(tmp_path / "x.html")]) == 2
    assert "allowed: a file name ending in .png, .pdf, .svg" in capfd.readouterr().err


ROWS = [
    {"sampler": "acs", "calls": calls, "entropy": 3 + nats / 10, "judge nats/token": nats, "standard error": 0.1}
    for calls, nats in [(8, 5.0), (16, 3.0), (32, 2.5)]
]


@pytest.mark.parametrize("written", [ROWS, {"environment": {}, "rows": ROWS}], ids=["rows", "report"])
@pytest.mark.parametrize("more", [[], ["--against", "entropy"], ["--value", "entropy"]], ids=" ".join)
def test_quality_of_the_rows_of_a_file(tmp_path, written, more):
    (tmp_path / "x.json").write_text(json.dumps(written))
    assert drawn(tmp_path / "x.png", "quality", "--json", tmp_path / "x.json", *more).startswith(PNG)


def test_calibration_of_the_rows_of_a_file(tmp_path):
    rows = [{"at": "masks", "confidence": 0.3, "accuracy": 0.2, "count": 7}]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert drawn(tmp_path / "x.png", "calibration", "--json", tmp_path / "x.json").startswith(PNG)


@pytest.mark.parametrize("text", [None, "{", "3", '{"rows": 3}', "[1]", "\xff"], ids=str)
def test_a_file_without_rows_is_told(tmp_path, capfd, text):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert main(["draw", "quality", "--json", str(path), "--out", str(tmp_path / "x.png")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hdlm: --json: ")
    assert line.endswith("allowed: a JSON file that holds rows")


def test_what_is_drawn_against_what_is_checked(tmp_path, capfd):
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    command = ["draw", "quality", "--json", str(tmp_path / "x.json"), "--out", str(tmp_path / "x.png")]
    assert main([*command, "--against", "time"]) == 2
    assert "--against: got 'time'; allowed: 'calls', 'entropy'" in capfd.readouterr().err
    assert main([*command, "--against", "entropy", "--value", "rate"]) == 2
    assert "--value: got 'rate'; allowed: nothing with --against entropy" in capfd.readouterr().err
    assert main([*command, "--value", "rate"]) == 2
    assert "allowed: rows that hold 'rate'" in capfd.readouterr().err


def test_laws_of_every_sampler(tmp_path, capfd, monkeypatch):
    from hdlm_jax.benchmarks import laws

    monkeypatch.setattr(laws, "CASES", laws.CASES[:2])
    assert main(["draw", "laws", "--samples", "64", "--out", str(tmp_path / "laws.png")]) == 0
    assert (tmp_path / "laws.png").stat().st_size > 10_000
    assert main(["draw", "laws", "--samples", "0", "--out", str(tmp_path / "none.png")]) == 2
    assert "--samples: got 0" in capfd.readouterr().err and not (tmp_path / "none.png").exists()
