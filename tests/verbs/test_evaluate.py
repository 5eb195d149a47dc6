"""`hdlm evaluate` on the held-out split and on files."""

import json
import math

import pytest

from hdlm_jax import lm
from hdlm_jax.__main__ import main


@pytest.fixture
def evaluated(smoke_run, capfd):
    """Runs the verb and returns its JSON."""

    def run(*more):
        capfd.readouterr()
        assert main(["evaluate", "--run", str(smoke_run), "--json", *map(str, more)]) == 0
        return json.loads(capfd.readouterr().out)

    return run


def test_json_of_the_held_out_split(evaluated, smoke_run):
    found = evaluated("--draws", 3, "--batch", 8)
    split = json.loads((smoke_run / "data/manifest.json").read_text())
    assert found["tokens"] == split["splits"]["held_out"]["tokens"]
    assert found["num_bytes"] == pytest.approx(split["splits"]["held_out"]["bytes"])
    assert found["unigram_bits_per_byte"] == split["unigram_bits_per_byte"]
    assert (found["step"], found["draws"]) == (6, 3)
    assert found["nats_per_token"] == pytest.approx(sum(found["terms"].values()))
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["bits_per_byte"] == pytest.approx(
        found["nats_per_token"] * found["tokens"] / found["num_bytes"] / math.log(2)
    )
    assert 0 < found["bits_per_byte_error"] < 1


def test_the_words_say_the_same_as_the_numbers(smoke_run, evaluated, capfd):
    found = evaluated("--windows", 8, "--draws", 2)
    assert main(["evaluate", "--run", str(smoke_run), "--windows", "8", "--draws", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "held-out split at step 6, weights ema"
    assert f"{found['bits_per_byte']:.4f} +- {found['bits_per_byte_error']:.4f} bits/byte" in lines[1]
    assert f"{found['nats_per_token']:.4f} +- {found['standard_error']:.4f} nats/token" in lines[1]
    assert f"{found['tokens']:,} tokens, 2 draws, slide: L=32, width 8" in lines[1]
    assert lines[2].startswith("  terms (nats/token): ")
    gap = found["unigram_bits_per_byte"] - found["bits_per_byte"]
    assert lines[3].endswith(f"{found['unigram_bits_per_byte']:.4f} bits/byte ({gap:+.4f})")


def test_the_same_seed_gives_the_same_bound_and_another_one_another(evaluated):
    one, same, other = (evaluated("--windows", 8, "--draws", 2, "--seed", seed) for seed in (1, 1, 2))
    assert one == same
    assert one["bits_per_byte"] != other["bits_per_byte"]


def test_any_text_file_counts_its_own_tokens_and_bytes(evaluated, smoke_run, tmp_path, capfd):
    text = "thé cat sat\n" * 5 + "end"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    found = evaluated("--text", tmp_path / "x.txt", "--draws", 2)
    assert (found["tokens"], found["num_bytes"]) == (len(text.encode()),) * 2
    assert found["unigram_bits_per_byte"] is None
    bound = lm.load(smoke_run).perplexity(text, draws=2)
    assert bound.bits_per_byte == pytest.approx(found["bits_per_byte"])
    assert main(["evaluate", "--run", str(smoke_run), "--text", str(tmp_path / "x.txt"), "--draws", "2"]) == 0
    assert "unigram" not in capfd.readouterr().out


def test_raw_weights_are_the_last_ones(evaluated):
    mean, last = (evaluated("--windows", 8, "--draws", 2, "--weights", which) for which in ("ema", "raw"))
    assert mean["bits_per_byte"] != last["bits_per_byte"]
