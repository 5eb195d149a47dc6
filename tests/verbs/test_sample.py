"""`hdlm sample` with all its dials."""

import json

import pytest

from hdlm_jax.__main__ import main

# three texts after a prompt: one program for most of what is tested here
THREE = ["--num", "3", "--prompt", "the cat "]


@pytest.fixture
def sampled(smoke_run, tmp_path, capfd):
    """Runs the verb; the printed text and the written record."""

    def run(*more):
        capfd.readouterr()
        path = tmp_path / "samples.json"
        assert main(["sample", "--run", str(smoke_run), "--out", str(path), *map(str, more)]) == 0
        return capfd.readouterr().out, json.loads(path.read_text())

    return run


def test_texts_begin_with_the_prompt_and_are_printed_and_written(sampled):
    out, record = sampled(*THREE, "--seed", 5)
    assert len(record["texts"]) == 3
    for i, text in enumerate(record["texts"]):
        assert text.startswith("the cat ")
        assert f"--- sample {i} (slide: L=32, width 8" in out and text in out
    assert record["prompt"] == "the cat " and record["step"] == 6
    assert record["settings"]["seed"] == 5
    assert out.endswith("samples.json\n")


def test_the_seed_decides(sampled):
    one, same, other = (sampled(*THREE, "--seed", seed)[1]["texts"] for seed in (1, 1, 2))
    assert one == same != other


def test_all_dials_at_once(sampled):
    dials = ["--sampler", "acs", "--eta", 0.5, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 20, "--weights", "raw"]
    order = ["--hyperschedule", "block", "--width", 4, "--rate", 2, "--length", 24, "--num", 2]
    out, record = sampled(*dials, *order)
    assert "block: L=24, width 4, rate 2" in out
    expected = {"eta": 0.5, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "width": 4, "rate": "2", "sampler": "acs"}
    assert expected.items() <= record["settings"].items()
    assert record["settings"]["hyperschedule"] == "block(length=24, width=4, rate=2)"


@pytest.mark.slow
def test_greedy_draws_are_the_same_for_every_seed(sampled):
    """One token settles at a time, the likeliest one: nothing is left to chance."""
    greedy = ["--temperature", 0, "--hyperschedule", "quenched", "--sampler", "ancestral", "--prompt", "the"]
    assert sampled(*greedy, "--seed", 1)[1]["texts"] == sampled(*greedy, "--seed", 2)[1]["texts"]


def test_by_default_the_record_goes_to_the_runs_samples_under_a_new_name(smoke_run, capfd, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    before = set((smoke_run / "samples").iterdir())
    for name in ("20250101-000000-step6.json", "20250101-000000-step6-2.json"):
        path = smoke_run / "samples" / name
        assert main(["sample", "--run", str(smoke_run), *THREE]) == 0
        assert f"--- written to {path}" in capfd.readouterr().out
        assert len(json.loads(path.read_text())["texts"]) == 3
    for path in set((smoke_run / "samples").iterdir()) - before:
        path.unlink()


def test_prompts_from_a_file_and_a_fixed_text(sampled, tmp_path):
    """The run's model is a prefix model, which is told."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n\nthe red hen\n")
    out, record = sampled("--prompts", prompts, "--fixed", "20=on a mat", "--stop")
    assert [text[:7] for text in record["texts"]] == ["the cat", record["texts"][1][:7], "the red"]
    assert record["fixed"] == {"20": "on a mat"} and record["prompt"] == ["the cat", "", "the red hen"]
    assert len(record["lengths"]) == 3 and record["calls"] >= 1
    for text, length in zip(record["texts"], record["lengths"], strict=True):
        assert length < 29 or "on a mat" in text


def test_live_shows_one_text_and_writes_nothing(smoke_run, capfd):
    before = set((smoke_run / "samples").iterdir())
    assert main(["sample", "--run", str(smoke_run), "--live", "--delay", "0", "--prompt", "the cat "]) == 0
    out = capfd.readouterr().out
    assert out.startswith("step 0/") and "the cat ····" in out and "\n--- the cat " in out
    assert set((smoke_run / "samples").iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fixed", "abc"], "--fixed: got 'abc'; allowed: POSITION=TEXT"),
        (["--fixed", "1=a", "--fixed", "1=b"], "--fixed: got '1=b'; allowed: each position once"),
        (["--live", "--num", "2"], "--live: got 'several texts'"),
        (["--live", "--out", "x.json"], "--out: got 'x.json'; allowed: nothing with --live"),
        (["--prompts", "LATIN1"], "--prompts: "),
        (["--prompts", "LATIN1", "--prompt", "a"], "--prompts: got"),
        (["--prompt", ""], "prompt: got ''"),
        (["--sampler", "remdm"], "sampler.kind: got 'remdm' (did you mean 'remdm_"),
        (["--sampler", "ancestral", "--threshold", "0.5"], "sampler.threshold: got 0.5; allowed: nothing: 'ancestral'"),
        (["--guidance", "1"], "sampler.guidance: got 1.0; allowed: 0 for a prefix model"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_that_names_the_flag(smoke_run, tmp_path, capfd, arguments, says):
    latin = tmp_path / "latin1.txt"
    latin.write_bytes(b"caf\xe9\n")
    arguments = [str(latin) if word == "LATIN1" else word for word in arguments]
    assert main(["sample", "--run", str(smoke_run), *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"hdlm: {says}") and error.count("\n") == 1
