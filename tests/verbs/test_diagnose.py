"""`hdlm diagnose` on a run of six steps: tables, JSON with its settings, one line for bad input."""

import json
import math

import jax
import pytest

from hdlm_jax.__main__ import main


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Compiling takes all the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def diagnosed(smoke_run, tmp_path, capfd):
    """Runs the verb; its JSON, after a look at what is printed."""

    def run(kind, *more, windows=6):
        path = tmp_path / "found.json"
        given = ["--run", str(smoke_run), "--windows", str(windows), "--out", str(path), *map(str, more)]
        assert main(["diagnose", kind, *given]) == 0
        found = json.loads(path.read_text())
        head, columns, *lines = capfd.readouterr().out.splitlines()
        assert head.startswith(f"{windows} held-out windows, step 6, weights ema; ")
        assert all(name in columns for name in found["rows"][0])
        assert len(lines) == len(found["rows"]) + bool(found["summary"])
        assert (found["step"], found["weights"]) == (6, "ema")
        return found

    return run


def test_context(diagnosed):
    found = diagnosed("context", "--draws", 2, "--batch", 4, "--seed", 3)
    assert [row["ablation"] for row in found["rows"]] == ["right hidden", "right shuffled", "left hidden"]
    assert all(0 < row["nats"] < 20 and row["standard error"] >= 0 for row in found["rows"])
    assert 1 < found["summary"]["predictions"] <= 12
    settings = {"diagnostic": "context", "noising": "epsilon_hybrid", "windows": 6, "length": 32, "seed": 3, "draws": 2}
    assert settings.items() <= found["settings"].items()
    assert found["settings"]["hyperschedule"].startswith("slide: L=32, width 8")


def test_calibration(diagnosed):
    found = diagnosed("calibration", "--draws", 1, "--bins", 5, "--token", "sampled")
    counts = {at: sum(row["count"] for row in found["rows"] if row["at"] == at) for at in ("masks", "tokens")}
    assert sum(counts.values()) == 6 * 32  # every position changes in one call of each tiled pass
    assert counts == {at: found["summary"][f"{at}: predictions"] for at in counts}
    assert (found["settings"]["bins"], found["settings"]["token"]) == (5, "sampled")


def test_corrections(diagnosed):
    found = diagnosed("corrections", "--draws", 1, "--eta", 0.5)
    assert [row["call"] for row in found["rows"]] == ["earlier", "last"]
    assert 0 < sum(row["tokens"] for row in found["rows"]) < 6 * 32
    assert (found["settings"]["sampler"], found["settings"]["eta"]) == ("acs", 0.5)


@pytest.mark.slow
def test_texts_beside_held_out_ones(diagnosed, smoke_run):
    found = diagnosed("texts", "--judge", smoke_run, windows=8)
    generated, held_out = found["rows"]
    assert (generated["texts"], held_out["texts"]) == ("generated", "held out")
    for row in found["rows"]:
        assert 0 < row["MAUVE"] <= 1 and 0 <= row["self-BLEU-4"] < 1
        assert row["judge perplexity"] == pytest.approx(math.exp(row["judge nats/token"]))
    assert found["settings"]["texts"] == found["settings"]["mauve"]["generated"] == 4
    assert found["settings"]["judge"]["folder"] == str(smoke_run)
    assert found["settings"]["mauve"]["scaling"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repair"], "hyperschedule.kind: got 'slide'; allowed: 'flat' or 'block' (all positions at one level)"),
        (["corrections", "--sampler", "asc"], "sampler.kind: got 'asc' (did you mean 'acs'?)"),
        (["corrections", "--sampler", "ancestral", "--eta", "0.5"], "sampler.eta: got 0.5"),
        (["context", "--draws", "0"], "--draws: got 0"),
        (["context", "--windows", "1"], "--windows: got 1; allowed: at least 2"),
        (["texts", "--windows", "3"], "--windows: got 3; allowed: at least 4"),
        (["texts", "--windows", "4", "--causal-judge", "nowhere"], "--causal-judge: got 'nowhere'; allowed: a folder"),
    ],
)
def test_bad_input_is_one_line(words, message, smoke_run, capfd):
    assert main(["diagnose", *words, "--run", str(smoke_run)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"hdlm: {message}") and said.count("\n") == 1
