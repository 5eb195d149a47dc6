"""Byte-level BPE vocabularies of the Hugging Face form (GPT-2 and its kin), from local files.

A vocabulary is a tokenizer.json, or vocab.json with merges.txt. The optional package `tokenizers` encodes;
decoding is ours: a token of the vocabulary is written in 256 printable characters, one for each byte. Special
tokens are never made from text, and stand for no text.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer, require_lossless, utf8
from hdlm_jax.errors import UserError, require

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def is_here(path: str | os.PathLike) -> bool:
    """Whether `load` has something to read: a file, or a folder with a vocabulary of this form."""
    path = Path(path)
    if path.is_dir():
        return all((path / name).is_file() for name in FILES[1:]) or _is_vocabulary(path / FILES[0])
    return path.suffix == ".json"


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder with one or with vocab.json and merges.txt.

    Raises:
      UserError: no such files, files that cannot be read, a vocabulary that loses text or is no byte-level
        BPE, or the package `tokenizers` is not installed.
    """
    path = Path(path)
    file = path / FILES[0] if path.is_dir() else path
    whole = not path.is_dir() or _is_vocabulary(file)
    try:
        text = file.read_bytes() if whole else _joined(path).encode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: cannot read {str(path)!r}: {error}") from error
    return from_json(text)


def from_json(text: bytes) -> Tokenizer:
    """The tokenizer of a serialised vocabulary (the content of a tokenizer.json).

    Raises:
      UserError: as `load`.
    """
    library = _import_tokenizers()
    try:
        backend = library.Tokenizer.from_str(text.decode())
        about = json.loads(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"data.tokenizer: not a tokenizer.json: {error}") from error
    require(
        about["model"].get("type") == "BPE" and "ByteLevel" in json.dumps([about["pre_tokenizer"], about["decoder"]]),
        "data.tokenizer",
        f"{about['model'].get('type')} model",
        "byte-level BPE (as GPT-2's)",
    )
    backend.encode_special_tokens = True  # what looks like a special token in a text is text
    backend.no_padding()
    backend.no_truncation()
    end = backend.token_to_id(END_OF_TEXT)
    require(end is not None, "data.tokenizer", f"no token {END_OF_TEXT!r}", "a vocabulary with one, which opens texts")
    tokenizer = Tokenizer(
        name="byte_bpe",
        pieces=_pieces(backend.get_vocab(), about, end),
        encode_many=functools.partial(_encode, backend),
        fingerprint=hashlib.sha256(b"hdlm_jax byte_bpe" + text).hexdigest(),
        model=text,
        end_of_text=end,
    )
    require_lossless(
        tokenizer,
        "this vocabulary loses text; allowed: byte-level BPE with a token for every byte, no normaliser and"
        " add_prefix_space=false",
    )
    return tokenizer


def _is_vocabulary(file: Path) -> bool:
    """Whether a tokenizer.json is of this form (ours has the same name)."""
    try:
        return "model" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _joined(folder: Path) -> str:
    """vocab.json and merges.txt of GPT-2's form as one tokenizer.json."""
    library = _import_tokenizers()
    try:
        model = library.models.BPE.from_file(*(str(folder / name) for name in FILES[1:]))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"data.tokenizer: cannot read {', '.join(FILES[1:])} in {folder}: {error}") from error
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    return backend.to_str()


def _pieces(vocabulary: Mapping[str, int], about: Mapping[str, Any], end: int) -> tuple[bytes, ...]:
    """The bytes of every token, in the order of their ids."""
    size = len(vocabulary)
    require(
        sorted(vocabulary.values()) == list(range(size)),
        "data.tokenizer",
        "ids with gaps",
        f"ids 0 .. {size - 1} for its {size} tokens",
    )
    added = {
        token["content"]: b"" if token["special"] else token["content"].encode() for token in about["added_tokens"]
    }
    byte_of = byte_of_character()
    pieces = [b""] * size
    for token, i in vocabulary.items():
        if i != end:
            pieces[i] = added[token] if token in added else _bytes(token, byte_of)
    return tuple(pieces)


def _bytes(token: str, byte_of: Mapping[str, int]) -> bytes:
    known = all(c in byte_of for c in token)
    require(
        known, "data.tokenizer", f"token {token!r}", "byte-level BPE, its tokens in the 256 characters of the bytes"
    )
    return bytes(byte_of[c] for c in token)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 are themselves, the others follow from U+0100 in order.

    >>> [byte_of_character()[c] for c in "aĠ"]
    [97, 32]
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _encode(backend: Any, texts: Sequence[str]) -> list[np.ndarray]:
    for text in texts:
        utf8(text)
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "data.tokenizer: byte-level BPE needs a package: pip install tokenizers (or 'hdlm_jax[tokenizers]')"
        ) from error
    return tokenizers
