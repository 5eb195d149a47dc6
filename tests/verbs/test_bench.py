"""`hdlm bench` on sizes that take no time: the table, the JSON, finite numbers."""

import json
import math

import jax
import pytest

from hdlm_jax.__main__ import main

TINY = ["--config.model.hidden=16", "--config.model.blocks=1", "--config.model.heads=2"]
TINY += ["--vocabulary", "16", "--repeats", "1"]


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Compiling takes all the time here, and nobody asks for the speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def measured(tmp_path, capfd):
    """Runs the verb; its rows, after a look at the table and at the environment beside them."""

    def run(*more, sizes=TINY, note="; medians of 1"):
        path = tmp_path / "bench.json"
        assert main(["bench", *map(str, more), *sizes, "--out", str(path)]) == 0
        found = json.loads(path.read_text())
        head, columns, *lines = capfd.readouterr().out.splitlines()
        assert head.startswith("8 x cpu, jax ") and head.endswith(note)
        assert all(name in columns for name in found["rows"][0])
        assert len(lines) == len(found["rows"])
        assert found["environment"]["devices"]["count"] == 8
        for row in found["rows"]:
            numbers = [value for value in row.values() if isinstance(value, int | float)]
            assert all(math.isfinite(x) and x > 0 for x in numbers), row
        return found["rows"]

    return run


def test_train(measured):
    """A step's products are three times the forward pass's; what a backward pass recomputes is no work done."""
    (row,) = measured("train", "--config.data.length=16", "--config.model.remat=full")
    D, F, V, R = 16, 64, 128, 16
    assert row["FLOP/step"] == 3 * 2 * 8 * R * (4 * D * D + 2 * D * F + 2 * R * D + D * V)
    assert row["tokens/s"] == pytest.approx(8 * R / row["seconds/step"])
    assert row["FLOP/s"] == pytest.approx(row["FLOP/step"] / row["seconds/step"])
    assert row["of products"] == pytest.approx(row["FLOP/s"] / row["products FLOP/s"])
    assert (row["layout"], row["hyperschedule"], row["mfu"]) == ("continuous", "flat", "peak not known")


@pytest.mark.slow
def test_a_tiled_step_stands_beside_the_plain_one(measured):
    block = ["--config.hyperschedule.kind=block", "--config.hyperschedule.width=4", "--config.hyperschedule.rate=2"]
    tiled, plain = measured("train", "--config.data.length=16", "--config.model.visibility=prefix", *block)
    assert (tiled["layout"], plain["layout"], plain["x plain"]) == ("tiled", "plain", 1)
    assert tiled["x plain"] == pytest.approx(tiled["seconds/step"] / plain["seconds/step"])
    assert 1.5 < tiled["FLOP/step"] / plain["FLOP/step"] < 3  # two copies, one of them with scores


def test_sample(measured):
    (row,) = measured("sample", "--kind", "slide", "--width", 4, "--rate", 2, "--length", 16, "--batch", 2, "--alone")
    assert not {"x without cache", "x quenched"} & set(row)
    assert (row["hyperschedule"], row["L"], row["batch"], row["width"], row["rate"]) == ("slide", 16, 2, 4, "2")
    assert row["calls"] == 9  # floor(15 / 2) + 4 / 2
    assert row["tokens/s"] == pytest.approx(2 * 16 / (row["calls"] * row["ms/call"] / 1e3))
    assert row["cache bytes"] == 2 * 2 * 16 * 16 * 4  # k and v, batch, slots, hidden, float32


@pytest.mark.slow
def test_sample_over_a_grid(measured):
    rows = measured("sample", "--kind", "block", "--width", 2, 4, "--rate", 1, "--length", 8, "--batch", 1, 2)
    assert [(row["batch"], row["width"], row["steps"]) for row in rows] == [(1, 2, 8), (1, 4, 8), (2, 2, 8), (2, 4, 8)]
    assert all(row["calls"] <= 8 for row in rows)


@pytest.mark.slow
def test_sample_of_a_full_model_and_of_an_autoregressive_one(measured):
    few, many = measured("sample", "--kind", "flat", "--steps", 2, 512, "--length", 8, "--batch", 1)
    assert (few["rows/call"], few["steps"], many["steps"]) == (8, 2, 512)
    assert few["calls"] <= 2 and 2 < many["calls"] < 512  # most of so many calls have nothing to do
    (quenched,) = measured("sample", "--kind", "quenched", "--length", 8, "--batch", 2)
    assert (quenched["rows/call"], quenched["steps"], quenched["calls"]) == (1, 8, 8)


def test_variance(measured, smoke_run):
    """Both ways estimate one bound; stratified times spread it less."""
    note = "; 8 draws of the noise of 4 held-out windows, step 6"
    given = ["--run", smoke_run, "--batch", 4, "--draws", 8]
    rows = measured("variance", *given, sizes=[], note=note)
    assert [row["variance"] for row in rows] == ["independent", "stratified"]
    error = sum(row["standard error"] ** 2 for row in rows) ** 0.5
    assert abs(rows[0]["nats/token"] - rows[1]["nats/token"]) < 4 * error
    assert rows[0]["variance x passes"] == pytest.approx(8 * rows[0]["standard error"] ** 2)
    assert rows[1]["x independent"] == rows[1]["variance x passes"] / rows[0]["variance x passes"]


def test_samplers(measured, smoke_run):
    """Every sampler at every rate; tokens may change in an exact last step too, so that no sampler is without."""
    given = ["--run", smoke_run, "--judge", smoke_run, "--rate", 2, 4, "--eta", 0.5, "--num", 32]
    found = measured("samplers", *given, sizes=[], note="; 32 texts of 32 tokens, epsilon_hybrid, step 6")
    assert [row["sampler"] for row in found] == ["ancestral"] * 2 + ["acs eta 0.5"] * 2
    assert [row["calls"] for row in found] == [19, 9] * 2  # floor(31 / rate) + 8 / rate
    assert all(0 < row["corrected"] <= 1 for row in found)
    assert all(0 < row["entropy"] <= math.log(32) and 0 < row["distinct-2"] <= 1 for row in found)
    assert {row["knee"] for row in found} == {""}  # two points have none
    assert found[0]["judge perplexity"] == pytest.approx(math.exp(found[0]["judge nats/token"]))
