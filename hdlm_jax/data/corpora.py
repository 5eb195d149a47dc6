"""Where text comes from: the interpreter's own documentation, local files, any TFDS dataset.

A corpus is two sequences of documents, one to train on and one held out. Whether a document is
held out depends on that document alone (its name or its contents), never on the machine, the
folder or the order of the files, so a split stays what it is when a corpus moves or grows.
"""

import codecs
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from hdlm_jax.data.python_docs import python_docs
from hdlm_jax.errors import UserError, choose, require


class Documents(Sequence[str]):
    """The documents `read(i) for i in indices`, each read when it is asked for."""

    def __init__(self, read: Callable[[int], str], indices: Sequence[int]):
        self._read = read
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Documents(self._read, self._indices[index])
        return self._read(self._indices[index])


class Corpus(NamedTuple):
    """A text corpus split by document.

    Attributes:
      name: what the corpus is, for people: 'python_docs 3.11', 'text books/*.txt', 'tfds lm1b/1.1.0'.
      train: the documents to train on.
      held_out: the documents never trained on; never empty.
      sha256: hexadecimal digest of the documents of both splits (for TFDS: of the version, the
        sizes and the shards, so that terabytes need not be read to name them).
    """

    name: str
    train: Sequence[str]
    held_out: Sequence[str]
    sha256: str


class _Part(NamedTuple):
    """Documents, a digest of what they hold, and the keys by which some may be held out."""

    documents: Documents
    digest: bytes
    keys: Iterable[str] = ()


class _Options(NamedTuple):
    path: str
    tfds_name: str
    tfds_dir: str
    tfds_field: str
    held_out: float
    held_out_path: str


def load(
    source: str = "python_docs",
    path: str = "",
    tfds_name: str = "",
    tfds_dir: str = "",
    tfds_field: str = "text",
    held_out: float = 0.05,
    held_out_path: str = "",
) -> Corpus:
    """Reads a corpus and splits it into training and held-out documents.

    Args:
      source: 'python_docs' (the documentation inside the Python interpreter), 'text' (local UTF-8
        files: a file is a document, and so is a line {"text": ...} of a .jsonl file), or 'tfds'.
      path: files or globs of 'text', separated by commas.
      tfds_name: any TFDS name, as 'lm1b' or 'wiki40b/en:1.3.0'.
      tfds_dir: folder of the prepared TFDS data; '' is TFDS's own default.
      tfds_field: the text feature of the TFDS dataset.
      held_out: fraction of the documents to hold out, in [0, 1). A single file is cut at the
        paragraph nearest to its last fraction. A TFDS 'validation' or 'test' split goes first.
      held_out_path: files or globs to hold out instead; the whole source is trained on.

    Returns:
      The `Corpus`; neither split is empty.

    Raises:
      UserError: an unknown source, missing, empty or binary files, TFDS data that are not there,
        or no document left for one of the splits.
    """
    read = choose("data.source", source, _SOURCES)
    require(0 <= held_out < 1, "data.held_out", held_out, "a fraction in [0, 1)")
    name, whole, held = read(_Options(path, tfds_name, tfds_dir, tfds_field, held_out, held_out_path))
    if held_out_path:
        held = _text_part(_scan(held_out_path, "data.held_out_path"))
    if held is not None:
        digest = hashlib.sha256(whole.digest + held.digest)
        return Corpus(name, whole.documents, held.documents, digest.hexdigest())
    train_ids, held_ids = split(whole.keys, held_out)
    n = len(whole.documents)
    allowed = f"a fraction that leaves a document on both sides of {n}, or a data.held_out_path"
    require(bool(train_ids and held_ids), "data.held_out", held_out, allowed)
    digest = hashlib.sha256(whole.digest + repr(held_ids).encode())
    read_one = whole.documents.__getitem__
    return Corpus(name, Documents(read_one, train_ids), Documents(read_one, held_ids), digest.hexdigest())


def split(keys: Iterable[str], fraction: float) -> tuple[list[int], list[int]]:
    """Splits documents by a hash of their keys into (train, held-out) indices, both in order.

    A document is held out if its hash, read as a number in [0, 1), is below `fraction`; where none
    is, the one with the smallest hash is held out, unless the fraction is 0 or it is the only one.

    >>> split(["asyncio", "json", "logging", "typing"], 0.05)
    ([0, 3], [1, 2])
    """
    places = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    if fraction == 0 or len(places) < 2:
        return list(range(len(places))), []
    bound = max(int(fraction * 2**64), min(places) + 1)
    held = [i for i, place in enumerate(places) if place < bound]
    return [i for i, place in enumerate(places) if place >= bound], held


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# The three sources.


def _load_python_docs(options: _Options) -> tuple[str, _Part, _Part | None]:
    documents = python_docs()
    texts = list(documents.values())
    digest = hashlib.sha256(b"".join(map(_sha256, [*documents, *texts]))).digest()
    name = f"python_docs {sys.version_info.major}.{sys.version_info.minor}"
    return name, _Part(Documents(texts.__getitem__, range(len(texts))), digest, documents), None


class _Span(NamedTuple):
    """One document of a local file: the bytes [start, stop), a JSON object if `is_json`."""

    path: str
    start: int
    stop: int
    is_json: bool
    digest: bytes

    def read(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start).decode()
        return json.loads(text)["text"] if self.is_json else text


def read_text(path: str, field: str) -> str:
    """Reads one UTF-8 text file whole; `field` is the config field that named it.

    Raises:
      UserError: the file is missing, empty, or not text (with the offset of the first bad byte).
    """
    return _read_bytes(path, field).decode().removeprefix("\ufeff")


def _read_bytes(path: str, field: str) -> bytes:
    """The contents of a text file, checked."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{field}: cannot read {path!r}: {error.strerror}; allowed: UTF-8 text files") from error
    problem = "it is empty" if not data.removeprefix(codecs.BOM_UTF8).strip() else _why_binary(data)
    if problem:
        raise UserError(f"{field}: got {path!r}, but {problem}; allowed: UTF-8 text files")
    return data


def _why_binary(data: bytes) -> str:
    """Why `data` are not text, '' if they are."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 at byte {error.start}"
    nul = data.find(b"\0")
    return f"it holds a NUL at byte {nul}" if nul >= 0 else ""


def files_of(pattern: str, field: str) -> list[str]:
    """The files that a comma-separated list of paths and globs names, sorted, each once.

    Raises:
      UserError: a path or glob that names no file.
    """
    files = set()
    for one in [pattern] if Path(pattern).is_file() else pattern.split(","):
        one = one.strip()
        found = [one] if Path(one).is_file() else [f for f in glob(one, recursive=True) if Path(f).is_file()]
        hint = f"; it is a folder: say '{one}/*.txt'" if one and Path(one).is_dir() else ""
        if not found:
            raise UserError(f"{field}: got {one!r}, which names no file{hint}; allowed: text files or globs")
        files.update(found)
    return sorted(files)


def _scan(pattern: str, field: str) -> list[_Span]:
    """Checks every file once and notes where its documents lie."""
    return [span for path in files_of(pattern, field) for span in _spans_of(path, field)]


def _spans_of(path: str, field: str) -> list[_Span]:
    data = _read_bytes(path, field)
    if path.endswith(".jsonl"):
        return _json_spans(path, data, field)
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0  # a byte order mark is no text
    return [_Span(path, start, len(data), False, hashlib.sha256(data[start:]).digest())]


def _json_spans(path: str, data: bytes, field: str) -> list[_Span]:
    spans, start = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        stop = start + len(line)
        if line.strip():
            text = _json_text(line, f"{path}:{number}", field)
            spans += [_Span(path, start, stop, True, _sha256(text))] if text else []
        start = stop + 1
    if not spans:
        raise UserError(f'{field}: got {path!r}, which holds no text; allowed: lines of {{"text": "..."}}')
    return spans


def _json_text(line: bytes, place: str, field: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{field}: {place} is not a line of {{"text": "..."}}: {error}') from error
    return text


def _cut(span: _Span, fraction: float) -> list[_Span]:
    """Cuts one file in two where a paragraph (else a line) starts nearest to its last `fraction`."""
    with open(span.path, "rb") as file:
        data = file.read()[span.start : span.stop]
    target = (1 - fraction) * len(data)
    for boundary in (rb"\n[ \t\r]*\n\s*", rb"\n"):
        places = [match.end() for match in re.finditer(boundary, data)]
        places = [p for p in places if data[:p].strip() and data[p:].strip()]
        if places:
            place = min(places, key=lambda p: abs(p - target))
            parts = (span.start, span.start + place), (span.start + place, span.stop)
            digest = lambda start, stop: hashlib.sha256(data[start - span.start : stop - span.start]).digest()
            return [span._replace(start=a, stop=b, digest=digest(a, b)) for a, b in parts]
    return [span]


def _text_part(spans: Sequence[_Span]) -> _Part:
    documents = Documents(lambda i: spans[i].read(), range(len(spans)))
    digest = hashlib.sha256(b"".join(span.digest for span in spans)).digest()
    return _Part(documents, digest, [span.digest.hex() for span in spans])


def _load_text(options: _Options) -> tuple[str, _Part, _Part | None]:
    require(bool(options.path), "data.path", options.path, "text files or globs, separated by commas")
    spans = _scan(options.path, "data.path")
    name = f"text {options.path}"
    if len(spans) == 1 and not spans[0].is_json and options.held_out and not options.held_out_path:
        spans = _cut(spans[0], options.held_out)
        if len(spans) == 2:
            return name, _text_part(spans[:1]), _text_part(spans[1:])
    return name, _text_part(spans), None


# TFDS, without TensorFlow.


def _load_tfds(options: _Options) -> tuple[str, _Part, _Part | None]:
    require(bool(options.tfds_name), "data.tfds_name", options.tfds_name, "the name of a TFDS dataset")
    builder = _tfds_builder(options.tfds_name, options.tfds_dir)
    splits = builder.info.splits
    if "train" not in splits:
        raise UserError(f"data.tfds_name: got {options.tfds_name!r}, which has no 'train' split but {list(splits)}")
    train = _tfds_part(builder, "train", options.tfds_field)
    other = next((s for s in ("validation", "test") if s in splits and splits[s].num_examples), None)
    held = _tfds_part(builder, other, options.tfds_field) if other and not options.held_out_path else None
    return f"tfds {builder.info.full_name}", train, held


def _tfds_builder(name: str, folder: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("data.source: 'tfds' needs a package: pip install tensorflow-datasets") from error
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except (ValueError, AssertionError, ImportError, OSError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")
        raise UserError(f"data.tfds_name: got {name!r}: {why}. {_how_to_prepare(name, folder)}") from error
    if not Path(builder.data_dir).is_dir():
        where = f"is not prepared in {Path(builder.data_dir).parent}"
        raise UserError(f"data.tfds_name: got {name!r}, which {where}. {_how_to_prepare(name, folder)}")
    return builder


def _how_to_prepare(name: str, folder: str) -> str:
    where = f", data_dir={folder!r}" if folder else ""
    return (
        "Prepare it once in the ArrayRecord format, where TensorFlow is never needed to read it: "
        f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare(); "
        "then name its folder in data.tfds_dir. "
        "(Preparing, unlike reading, may need importlib_resources, apache-beam or tensorflow.)"
    )


def _tfds_part(builder: Any, name: str, field: str) -> _Part:
    try:
        source = builder.as_data_source(split=name)
    except (NotImplementedError, AssertionError, ValueError) as error:
        what = f"{builder.info.full_name} lies in {builder.data_dir} in a format without random access"
        raise UserError(f"data.tfds_name: {what}. {_how_to_prepare(builder.name, '')}") from error
    fields = list(builder.info.features)
    require(field in fields, "data.tfds_field", field, f"a field of {builder.info.full_name}: {fields}")
    info = builder.info.splits[name]
    what = [builder.info.full_name, field, name, info.num_bytes, list(info.shard_lengths)]
    keys = (f"{name}/{i}" for i in range(len(source)))
    documents = Documents(lambda i: _tfds_text(source[i], field, f"{name}/{i}"), range(len(source)))
    return _Part(documents, _sha256(json.dumps(what)), keys)


def _tfds_text(example: dict[str, Any], field: str, place: str) -> str:
    value = example[field]
    try:
        return value.decode()
    except (AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"data.tfds_field: {field!r} of example {place} is not UTF-8 text: {error}") from error


_SOURCES = {"python_docs": _load_python_docs, "text": _load_text, "tfds": _load_tfds}
