"""Prepared folders: the windows are the corpus, all or nothing, and only what was asked for is opened."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from hdlm_jax.data import corpora, prepare, tokenizers
from hdlm_jax.errors import UserError

LENGTH = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> prepare.DataConfig:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Text number {i}:\n" + f"é{i} " * (10 + 7 * i))
    return prepare.DataConfig(source="text", path=f"{folder}/*.txt", held_out=0.2, length=LENGTH)


@pytest.fixture(scope="module")
def opened(config, tmp_path_factory) -> prepare.Prepared:
    return prepare.prepare(config, tmp_path_factory.mktemp("out") / "prepared")


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# ---- what is written


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_windows_are_the_documents_joined(config, tmp_path, split, kind, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 5 * LENGTH * 2)  # five windows a shard
    monkeypatch.setattr(prepare, "_GROUP_BYTES", 100)
    config = replace(config, tokenizer=kind, vocab_size=300)
    opened = prepare.prepare(config, tmp_path / "out")
    documents = getattr(prepare._load_corpus(config), split)
    t = opened.tokenizer
    ids = [i for text in documents for i in (t.end_of_text, *t.encode(text))]
    windows, summary = getattr(opened, split), opened.manifest["splits"][split]
    stored = np.stack(list(windows))
    n = len(ids) // LENGTH
    assert stored.dtype == np.int32
    np.testing.assert_array_equal(stored, np.array(ids[: n * LENGTH]).reshape(n, LENGTH))
    assert (len(windows), summary["windows"], summary["tokens"]) == (n, n, n * LENGTH)
    assert summary["dropped_tokens"] == len(ids) - n * LENGTH
    assert summary["documents"] == len(documents)
    assert summary["text_bytes"] == sum(len(text.encode()) for text in documents)
    assert summary["bytes"] == t.token_bytes[stored].sum()
    assert [shard["windows"] for shard in summary["shards"]][:-1] == [5] * ((n - 1) // 5)


def test_the_manifest_says_what_is_in_the_folder(opened, config):
    manifest, corpus = opened.manifest, prepare._load_corpus(config)
    assert manifest["corpus"] == {"name": corpus.name, "sha256": corpus.sha256}
    assert manifest["tokenizer"] == {
        "name": "bytes",
        "num_tokens": 257,
        "sha256": tokenizers.build("bytes").fingerprint,
    }
    assert (manifest["format"], manifest["length"], manifest["dtype"]) == (1, LENGTH, "<u2")


def test_the_unigram_model_is_the_training_bytes_with_one_added(opened, config):
    corpus = prepare._load_corpus(config)
    counts = np.ones(256)
    for text in corpus.train:
        for byte in text.encode():
            counts[byte] += 1
    held_out = list("".join(corpus.held_out).encode())
    expected = -np.mean(np.log2(counts / counts.sum())[held_out])
    np.testing.assert_allclose(opened.manifest["unigram_bits_per_byte"], expected, rtol=1e-12)


def test_large_vocabularies_are_stored_in_32_bits(config, tmp_path, monkeypatch):
    pieces = (*(str(i).encode() for i in range(70_000)), b"")
    encode = lambda texts: [np.full(len(text), 69_999, np.int32) for text in texts]
    big = tokenizers.Tokenizer("bytes", pieces, encode, tokenizers.build("bytes").fingerprint)
    monkeypatch.setattr(tokenizers, "build", lambda *_: big)
    opened = prepare.prepare(config, tmp_path / "out")
    assert opened.manifest["dtype"] == "<u4"
    assert opened.train[0].tolist() == [70_000] + [69_999] * (LENGTH - 1)


def test_windows_are_a_sequence(opened):
    windows = opened.train
    n = len(windows)
    np.testing.assert_array_equal(windows[-1], windows[n - 1])
    np.testing.assert_array_equal(windows[np.int64(2)], windows[2])
    copy = pickle.loads(pickle.dumps(windows))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(copy.__getitem__, [i % n for i in range(200)]))
    np.testing.assert_array_equal(read, [windows[i % n] for i in range(200)])
    for index in (n, -n - 1):
        with pytest.raises(IndexError):
            windows[index]


def test_progress_is_reported(config, tmp_path):
    seen = []
    prepare.prepare(config, tmp_path / "out", lambda *args: seen.append(args))
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    for name in prepare.SPLITS:
        n = splits[name]["documents"]
        assert [args for args in seen if args[0] == name][-1] == (name, n, n)


# ---- all or nothing, once


def test_a_second_call_only_opens(config, tmp_path, monkeypatch):
    prepare.prepare(config, tmp_path / "out")
    monkeypatch.setattr(corpora, "load", lambda **_: pytest.fail("read the corpus again"))
    again = prepare.prepare(config, tmp_path / "out")
    assert len(again.train) > 0
    assert len(prepare.open_or_prepare(replace(config, prepared=str(tmp_path / "out")), "/x").train) > 0


def test_a_failure_leaves_nothing(config, tmp_path, monkeypatch):
    save = tokenizers.Tokenizer.save

    def fail(self, folder):
        save(self, folder)
        assert any(p.suffix == ".array_record" for p in Path(folder).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.Tokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(config, tmp_path / "out")
    assert folders(tmp_path) == []
    monkeypatch.undo()
    prepare.prepare(config, tmp_path / "out")
    assert folders(tmp_path) == ["out"]


def test_two_at_once_agree(config, tmp_path, monkeypatch):
    write = prepare._write

    def write_twice(*args):
        monkeypatch.setattr(prepare, "_write", write)
        prepare.prepare(config, tmp_path / "out")
        write(*args)

    monkeypatch.setattr(prepare, "_write", write_twice)
    opened = prepare.prepare(config, tmp_path / "out")
    assert folders(tmp_path) == ["out"]
    assert opened.manifest["config"] == config.shaping()


def test_an_empty_folder_is_filled_and_another_is_left_alone(config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(prepare.prepare(config, tmp_path / "empty").train) > 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for place in ("mine", "mine/thesis.txt"):
        with pytest.raises(UserError, match="out: got .*; allowed: a new or empty folder"):
            prepare.prepare(config, tmp_path / place)
    assert folders(tmp_path / "mine") == ["thesis.txt"]


def test_a_split_shorter_than_a_window_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"data.length: got 100000; allowed: at most \d+: the train split"):
        prepare.prepare(replace(config, length=100_000), tmp_path / "out")
    assert folders(tmp_path) == []


# ---- opening


def test_other_settings_are_refused_with_a_diff(config, opened, tmp_path):
    prepare.prepare(config, tmp_path / "out")
    other = replace(config, length=8, tokenizer="sentencepiece")
    with pytest.raises(UserError) as error:
        prepare.prepare(other, tmp_path / "out")
    assert "was prepared from other settings" in str(error.value)
    assert "data.length: prepared 16, config 8" in str(error.value)
    assert "data.tokenizer: prepared 'bytes', config 'sentencepiece'" in str(error.value)
    assert "data.path" not in str(error.value)
    with pytest.raises(UserError, match="data.length"):
        prepare.open_or_prepare(replace(other, prepared=str(tmp_path / "out")), tmp_path / "run")
    assert prepare.differences(opened.manifest, replace(config, vocab_size=5, tfds_name="x", prepared="y")) == []


def test_folders_that_cannot_be_opened(config, tmp_path):
    with pytest.raises(UserError, match="data.prepared: got .*; allowed: a folder that `hdlm prepare` wrote"):
        prepare.open_prepared(tmp_path)
    folder = tmp_path / "out"
    manifest = prepare.prepare(config, folder).manifest
    shard = folder / manifest["splits"]["train"]["shards"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(UserError, match=f"data.prepared: got '{shard} of {len(content) - 5} bytes'"):
        prepare.open_prepared(folder)
    shard.unlink()
    with pytest.raises(UserError, match="of 0 bytes"):
        prepare.open_prepared(folder)
    shard.write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(UserError, match="format 1 .this one is 9"):
        prepare.open_prepared(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest)[:-9])
    with pytest.raises(UserError, match="a folder that `hdlm prepare` wrote"):
        prepare.open_prepared(folder)


def test_another_tokenizer_in_the_folder_is_refused(config, tmp_path):
    prepare.prepare(replace(config, tokenizer="sentencepiece", vocab_size=300), tmp_path / "out")
    tokenizers.build("bytes").save(tmp_path / "out")
    with pytest.raises(UserError, match="a folder with the tokenizer it was prepared with"):
        prepare.open_prepared(tmp_path / "out")


# ---- the config block


def test_a_config_block_is_read(config):
    block = ConfigDict({"source": "text", "path": config.path, "held_out": 0.2, "length": LENGTH})
    assert prepare.DataConfig.of(block) == config
    assert prepare.DataConfig.of({}) == prepare.DataConfig()


def test_the_default_block_of_an_experiment_is_a_data_config():
    defaults = pytest.importorskip("hdlm_jax.config").default().data
    assert set(defaults) == set(prepare.DataConfig.__dataclass_fields__)
    prepare.DataConfig.of(defaults)


@pytest.mark.parametrize("length", [0, -1, 1.5, "16"])
def test_a_bad_length_is_refused(length):
    with pytest.raises(UserError, match="data.length: got"):
        prepare.DataConfig.of({"length": length})


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match="data: got 'lenght' .did you mean 'length'"):
        prepare.DataConfig.of({"lenght": 3})
