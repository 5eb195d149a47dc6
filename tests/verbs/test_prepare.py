"""`hdlm prepare`, and training on what it wrote."""

import json
from pathlib import Path

import pytest

from hdlm_jax.__main__ import main
from hdlm_jax.data import prepare

ROOT = Path(__file__).resolve().parents[2]
QUICK = f"{ROOT}/experiments/quickstart.py:smoke"


def test_it_says_what_it_wrote_and_does_it_once(small_text, tmp_path, capfd):
    command = ["prepare", "--config", QUICK, "--data", str(small_text), "--out", str(tmp_path / "data")]
    assert main(command) == 0
    out = capfd.readouterr().out
    prepared = prepare.open_prepared(tmp_path / "data")
    assert f"train: 1 documents, {len(prepared.train):,} windows of 32 tokens" in out
    assert f"held_out: 1 documents, {len(prepared.held_out):,} windows of 32 tokens" in out
    assert "tokenizer: bytes, 257 tokens" in out
    assert f"corpus: text {small_text}, sha256 {prepared.manifest['corpus']['sha256']}" in out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_settings_for_the_same_folder_are_refused(small_text, tmp_path, capfd):
    command = ["prepare", "--config", QUICK, "--data", str(small_text), "--out", str(tmp_path / "data")]
    assert main(command) == 0
    assert main([*command, "--config.data.length=16"]) == 2
    assert "data.length: prepared 32, config 16" in capfd.readouterr().err


def test_sentencepiece_is_trained_on_the_corpus_and_kept(small_text, tmp_path, capfd):
    more = ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=300"]
    assert main(["prepare", "--config", QUICK, "--data", str(small_text), "--out", str(tmp_path / "data"), *more]) == 0
    assert "tokenizer: sentencepiece, 300 tokens" in capfd.readouterr().out
    assert {"tokenizer.json", "tokenizer.model", "manifest.json"} <= {p.name for p in (tmp_path / "data").iterdir()}


@pytest.mark.slow
def test_a_run_on_prepared_sentencepiece_goes_from_training_to_samples(small_text, tmp_path, capfd):
    more = ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=300"]
    data, run = tmp_path / "data", tmp_path / "run"
    assert main(["prepare", "--config", QUICK, "--data", str(small_text), "--out", str(data), *more]) == 0
    command = ["train", "--config", QUICK, "--workdir", str(run), f"--config.data.prepared={data}"]
    assert main(command) == 0
    assert not (run / "data").exists() and (run / "tokenizer.model").exists()
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    capfd.readouterr()
    assert main(["sample", "--run", str(run), "--prompt", "the cat ", "--out", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["texts"][0].startswith("the cat ")
