"""Tokenises a corpus once into fixed windows on disk, and reopens them.

A prepared folder holds, for each split, ArrayRecord shards of windows of L token ids, the
tokenizer's files and manifest.json. It is written beside its place and moved there when it is
whole (into a bucket it is copied, the manifest last), so an interrupted run leaves nothing behind that
looks finished.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax import files
from hdlm_jax.data import corpora, tokenizers
from hdlm_jax.data.cache import MANIFEST, fetched, publish
from hdlm_jax.errors import UserError, require, unknown

FORMAT = 1
_SHARD_BYTES = 2**28  # of token ids
_GROUP_BYTES = 2**22  # of text encoded at a time
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class DataConfig:
    """The `data` block of an experiment."""

    source: str = "python_docs"  # 'python_docs', 'text' or 'tfds'
    path: str = ""  # 'text': files or globs, separated by commas
    tfds_name: str = ""  # 'tfds': any TFDS name
    tfds_dir: str = ""  # 'tfds': folder of the prepared data; '' is TFDS's default
    tfds_field: str = "text"  # 'tfds': the text feature
    held_out: float = 0.05  # fraction of the documents
    held_out_path: str = ""  # files or globs to hold out instead
    tokenizer: str = "bytes"  # 'bytes', 'sentencepiece' or a path ending in .model
    vocab_size: int = 8192  # 'sentencepiece': N, ordinary tokens
    length: int = 256  # L, tokens in a window
    prepared: str = ""  # a folder written by `hdlm prepare`, read instead

    @classmethod
    def of(cls, block: "DataConfig | Mapping[str, Any]") -> "DataConfig":
        """The config block as a `DataConfig`; an unknown field or a bad length is refused by name."""
        if isinstance(block, cls):
            return block
        names = [field.name for field in fields(cls)]
        for name in block:
            if name not in names:
                raise unknown("data", name, names)
        config = cls(**dict(block))
        whole = isinstance(config.length, int) and config.length >= 1
        require(whole, "data.length", config.length, "a number of tokens >= 1")
        return config

    def shaping(self) -> dict[str, Any]:
        """The fields that decide what the prepared windows are, without those that are not read."""
        unread = {"prepared"}
        unread |= {"path"} if self.source != "text" else set()
        unread |= {"tfds_name", "tfds_dir", "tfds_field"} if self.source != "tfds" else set()
        unread |= {"vocab_size"} if self.tokenizer != "sentencepiece" else set()
        unread |= {"held_out"} if self.held_out_path else set()
        return {name: value for name, value in asdict(self).items() if name not in unread}


class Windows(Sequence[np.ndarray]):
    """The windows of one split: `windows[i]` is int32 [L]. May be read by threads and pickled."""

    def __init__(self, paths: Sequence[str], dtype: str, length: int, size: int):
        self._paths = list(paths)
        self._dtype = dtype
        self.length = length
        self._size = size
        self._source = None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> np.ndarray:
        if not -self._size <= index < self._size:
            raise IndexError(f"window {index} of {self._size}")
        if self._source is None:
            import grain

            self._source = grain.sources.ArrayRecordDataSource(self._paths)
        record = self._source[int(index) % self._size]
        return np.frombuffer(record, self._dtype).astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


Progress = Callable[[str, int, int], None]  # split, documents done, documents in all


class Prepared(NamedTuple):
    """A prepared folder, open.

    Attributes:
      manifest: manifest.json. `splits[name]` counts windows, tokens in them (`tokens`), tokens of
        the tail that fills no window (`dropped_tokens`), documents, bytes of text that the windows
        cover (`bytes`) and of the whole split (`text_bytes`); `unigram_bits_per_byte` is the
        held-out cost under the training split's byte frequencies.
      tokenizer: the `Tokenizer`.
      train, held_out: sequences of windows, int32 [L].
    """

    manifest: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    train: Windows
    held_out: Windows


def open_or_prepare(
    config: DataConfig | Mapping[str, Any], folder: str | os.PathLike, progress: Progress | None = None
) -> Prepared:
    """The data of a run: `config.prepared` where it is given, else prepared once in `folder`.

    A prepared folder is its own authority: of the config's fields only `length` must agree with it.
    """
    config = DataConfig.of(config)
    if not config.prepared:
        return prepare(config, folder, progress)
    opened = open_prepared(config.prepared)
    length = opened.manifest["length"]
    require(config.length == length, "data.length", config.length, f"{length}, as in {config.prepared}")
    return opened


def prepare(
    config: DataConfig | Mapping[str, Any], folder: str | os.PathLike, progress: Progress | None = None
) -> Prepared:
    """Tokenises the corpus of `config` into windows of `config.length` tokens under `folder`.

    The documents of a split are joined, each opened by `end_of_text`, and cut into windows; the
    tail that fills no window is dropped and counted. A folder that already holds the same data is
    only opened. On failure nothing is left in `folder`.

    Args:
      config: a `DataConfig` or its fields.
      folder: where to write.
      progress: called now and then with (split, documents done, documents in all).

    Raises:
      UserError: bad input (see `corpora.load` and `tokenizers.build`), a split shorter than one
        window, or a `folder` that holds something else.
    """
    config, folder = DataConfig.of(config), files.place(folder, "out")
    if files.is_file(folder / MANIFEST):
        return open_prepared(folder, config)
    _require_free(folder)
    corpus = _load_corpus(config)
    tokenizer = tokenizers.build(config.tokenizer, config.vocab_size, corpus.train)
    remote = files.is_remote(folder)
    if not remote:
        files.make_folder(folder.parent)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=None if remote else folder.parent)
    )
    try:
        partial.chmod(0o755)
        _write(partial, config, corpus, tokenizer, progress or (lambda *_: None))
        if remote:
            _upload(partial, folder)
        else:
            publish(partial, folder)
    finally:
        files.remove(partial)
    return open_prepared(folder, config)


def _load_corpus(config: DataConfig) -> corpora.Corpus:
    return corpora.load(
        source=config.source,
        path=config.path,
        tfds_name=config.tfds_name,
        tfds_dir=config.tfds_dir,
        tfds_field=config.tfds_field,
        held_out=config.held_out,
        held_out_path=config.held_out_path,
    )


def _upload(partial: Path, folder: Path) -> None:
    try:
        files.copy_folder(partial, folder, last=MANIFEST)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({files.reason(error)})") from error


def _require_free(folder: Path) -> None:
    free = not files.is_file(folder) and not files.names(folder)
    require(free, "out", str(folder), "a new or empty folder, or one that holds the same prepared data")


def _write(
    folder: Path,
    config: DataConfig,
    corpus: corpora.Corpus,
    tokenizer: tokenizers.Tokenizer,
    progress: Progress,
) -> None:
    """Writes everything that a prepared folder holds; the manifest comes last."""
    dtype = "<u2" if tokenizer.num_tokens <= 2**16 else "<u4"
    summaries, byte_counts = {}, {}
    for name in SPLITS:
        writer = _ShardWriter(folder, name, config.length, dtype)
        summaries[name], byte_counts[name] = _write_split(writer, getattr(corpus, name), tokenizer, progress)
    tokenizer.save(folder)
    manifest = {
        "format": FORMAT,
        "config": config.shaping(),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "tokenizer": {
            "name": tokenizer.name,
            "num_tokens": tokenizer.num_tokens,
            "sha256": tokenizer.fingerprint,
        },
        "length": config.length,
        "dtype": dtype,
        "splits": summaries,
        "unigram_bits_per_byte": unigram_bits_per_byte(byte_counts["train"], byte_counts["held_out"]),
    }
    files.write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


class _ShardWriter:
    """Writes windows of one split to ArrayRecord files, one window a record."""

    def __init__(self, folder: Path, split: str, length: int, dtype: str):
        self.split = split
        self.length = length
        self.shards: list[dict[str, Any]] = []
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._per_shard = max(1, _SHARD_BYTES // (length * self._dtype.itemsize))
        self._writer = None

    def write(self, tokens: np.ndarray) -> np.ndarray:
        """Writes every whole window of `tokens`, int32 [n], and returns the tail that fills none."""
        whole = len(tokens) // self.length * self.length
        for window in tokens[:whole].reshape(-1, self.length).astype(self._dtype):
            if not self.shards or self.shards[-1]["windows"] == self._per_shard:
                self._next_shard()
            self._writer.write(window.tobytes())
            self.shards[-1]["windows"] += 1
        return tokens[whole:]

    def _next_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.close()
        name = f"{self.split}-{len(self.shards):05d}.array_record"
        self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1,zstd:3")
        self.shards.append({"file": name, "windows": 0})

    def close(self) -> None:
        """Finishes the shard being written and notes its size."""
        if self._writer is not None:
            self._writer.close()
            self.shards[-1]["bytes"] = files.size(self._folder / self.shards[-1]["file"])
            self._writer = None


def _write_split(
    writer: _ShardWriter, documents: Sequence[str], tokenizer: tokenizers.Tokenizer, progress: Progress
) -> tuple[dict[str, Any], np.ndarray]:
    """Writes one split; returns its entry in the manifest and the counts of its 256 byte values."""
    byte_counts, done = np.zeros(256, np.int64), 0
    tail = np.zeros(0, np.int32)
    opening = np.array([tokenizer.end_of_text], np.int32)
    try:
        for texts in _groups(documents):
            byte_counts += sum(_byte_counts(text) for text in texts)
            ids = [part for ids in tokenizer.encode_many(texts) for part in (opening, ids)]
            tail = writer.write(np.concatenate([tail, *ids]))
            done += len(texts)
            progress(writer.split, done, len(documents))
    finally:
        writer.close()
    windows = sum(shard["windows"] for shard in writer.shards)
    too_short = f"at most {len(tail)}: the {writer.split} split has no more tokens"
    require(windows > 0, "data.length", writer.length, too_short)
    text_bytes = int(byte_counts.sum())
    return {
        "windows": windows,
        "tokens": windows * writer.length,
        "dropped_tokens": len(tail),
        "documents": len(documents),
        "bytes": text_bytes - int(tokenizer.token_bytes[tail].sum()),
        "text_bytes": text_bytes,
        "shards": writer.shards,
    }, byte_counts


def _groups(documents: Sequence[str]) -> Iterator[list[str]]:
    """The documents in order, in lists of a few million characters."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _byte_counts(text: str) -> np.ndarray:
    return np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)


def unigram_bits_per_byte(train_counts: np.ndarray, held_out_counts: np.ndarray) -> float:
    """Bits per byte of held-out text under the byte frequencies of the training text.

    The frequencies are smoothed by one count each: p(b) = (n_b + 1) / (sum n + 256).

    Args:
      train_counts, held_out_counts: int [256], how often each byte occurs.

    >>> unigram_bits_per_byte(np.zeros(256, int), np.ones(256, int))
    8.0
    """
    costs = np.log2(train_counts.sum() + 256) - np.log2(train_counts + 1)
    return float((held_out_counts * costs).sum() / held_out_counts.sum())


def open_prepared(folder: str | os.PathLike, config: DataConfig | Mapping[str, Any] | None = None) -> Prepared:
    """Opens a folder that `prepare` wrote.

    Args:
      folder: the prepared folder.
      config: if given, the folder must hold what this config asks for.

    Raises:
      UserError: no prepared folder, one of another format, damaged shards, or data that differ
        from `config` (the message lists every field that differs).
    """
    folder = files.place(folder, "data.prepared")
    manifest = _read_manifest(folder)
    if config is not None and (differing := differences(manifest, DataConfig.of(config))):
        what = "; ".join(differing)
        raise UserError(f"{folder} was prepared from other settings: {what}. Give the same, or another folder")
    folder = fetched(folder)
    tokenizer = tokenizers.load(folder)
    same = tokenizer.fingerprint == manifest["tokenizer"]["sha256"]
    require(same, "data.prepared", str(folder), "a folder with the tokenizer it was prepared with")
    train, held_out = (_open_split(folder, manifest, name) for name in SPLITS)
    return Prepared(manifest, tokenizer, train, held_out)


def differences(manifest: Mapping[str, Any], config: DataConfig) -> list[str]:
    """Every field in which prepared data and a config differ, as 'data.length: prepared 8, config 4'."""
    old, new = manifest["config"], config.shaping()
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"data.{name}: prepared {old.get(name)!r}, config {new.get(name)!r}" for name in names]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(files.read_text(folder / MANIFEST))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.prepared: got '{folder}'; allowed: a folder that `hdlm prepare` wrote") from error
    require(
        version == FORMAT,
        "data.prepared",
        str(folder),
        f"format {FORMAT} (this one is {version}: prepare it anew)",
    )
    return manifest


def _open_split(folder: Path, manifest: Mapping[str, Any], name: str) -> Windows:
    summary = manifest["splits"][name]
    paths = [folder / shard["file"] for shard in summary["shards"]]
    for path, shard in zip(paths, summary["shards"], strict=True):
        size = files.size(path) if files.is_file(path) else 0
        given = f"{path} of {size} bytes"
        require(size == shard["bytes"], "data.prepared", given, f"the {shard['bytes']} bytes that were written")
    return Windows([str(path) for path in paths], manifest["dtype"], manifest["length"], summary["windows"])
