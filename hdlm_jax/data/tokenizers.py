"""Text to token ids and back: bytes, SentencePiece trained on the corpus, or byte-level BPE (data/byte_bpe.py).

Ordinary tokens are 0 .. N-1; one of them, `end_of_text` (the last one unless the vocabulary says otherwise),
opens every document and so is also the beginning-of-sequence token. The mask is token N and no text encodes
to it. Every ordinary token stands for fixed bytes of UTF-8, so decoding is concatenation.
"""

import codecs
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax import files
from hdlm_jax.errors import UserError, require, unknown

_TOKENLESS = 4  # pieces that we train but give no token: pad, bos, unk, mask (eos is end_of_text)
_SAMPLE_BYTES = 20_000_000  # text that a SentencePiece model is trained on: more changes little
_LINE = 1000  # characters; the trainer skips lines of more than 4192 bytes without a word
_SPACE = "\u2581"  # how SentencePiece writes a space
# What a model must give back unchanged: compatibility forms, combining marks, spaces, rare characters.
_PROBE = " \ufb01 \uff21\u00a0x  y\n\t e\u0301 \U0001f600 \x7f\r\n [MASK] \u2581 "


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Encodes text to ordinary token ids and decodes them; lossless for every string.

    Attributes:
      name: 'bytes', 'sentencepiece', 'byte_bpe' or 'tokens' (a vocabulary without text).
      pieces: the bytes that each of the N ordinary tokens stands for; b'' at `end_of_text`.
      encode_many: texts -> one int32 array of token ids for each, `end_of_text` not among them.
      fingerprint: hexadecimal sha256 of everything the token ids depend on.
      model: the serialised SentencePiece or BPE model; b'' for the others.
      end_of_text: the token that opens every document; None for the last one, N - 1.
    """

    name: str
    pieces: tuple[bytes, ...] = field(repr=False)
    encode_many: Callable[[Sequence[str]], list[np.ndarray]] = field(repr=False)
    fingerprint: str
    model: bytes = field(default=b"", repr=False)
    end_of_text: int | None = None

    def __post_init__(self):
        if self.end_of_text is None:
            object.__setattr__(self, "end_of_text", len(self.pieces) - 1)

    @property
    def num_tokens(self) -> int:
        """N, the number of ordinary tokens; the mask is token N and V = N + 1."""
        return len(self.pieces)

    @property
    def mask_id(self) -> int:
        """The mask, N: after all ordinary tokens."""
        return len(self.pieces)

    @property
    def bos_id(self) -> int:
        """The token before position 0: `end_of_text`."""
        return self.end_of_text

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text each token stands for; 0 at `end_of_text` and at the mask."""
        return np.array([*map(len, self.pieces), 0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [n], without `end_of_text`.

        Raises:
          UserError: half of a surrogate pair, which is no Unicode text.
        """
        return self.encode_many([text])[0]

    def decode(self, ids: Any, mask: str = "", end_of_text: str = "") -> str:
        """The text of `ids`; `mask` and `end_of_text` are written for those two tokens.

        A character cut by the first or last token, or broken by a mask, reads U+FFFD.

        Args:
          ids: int [n] token ids in 0 .. N.

        Raises:
          UserError: an id outside 0 .. N.
        """
        return b"".join(self._bytes_of(ids, mask, end_of_text)).decode(errors="replace")

    def decode_stream(self, chunks: Iterable[Any], mask: str = "", end_of_text: str = "") -> Iterator[str]:
        """Decodes token ids that arrive in chunks: the yielded texts join to what `decode` gives.

        A character whose bytes are not all there yet waits for the next chunk.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for ids in chunks:
            yield utf8.decode(b"".join(self._bytes_of(ids, mask, end_of_text)))
        yield utf8.decode(b"", final=True)

    def _bytes_of(self, ids: Any, mask: str, end_of_text: str) -> list[bytes]:
        ids = np.asarray(ids).reshape(-1).tolist()
        n = self.num_tokens
        bad = next((i for i in ids if not 0 <= i <= n), 0)
        require(0 <= bad <= n, "tokens", bad, f"token ids in 0 .. {n}")
        special = {n: mask.encode(), self.end_of_text: end_of_text.encode()}
        return [special[i] if i in special else self.pieces[i] for i in ids]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, and tokenizer.model where there is a model, into `folder`."""
        folder = files.place(folder)
        if self.model:
            files.write_whole(folder / "tokenizer.model", self.model)
        about = {"name": self.name, "num_tokens": self.num_tokens, "fingerprint": self.fingerprint}
        files.write_whole(folder / "tokenizer.json", json.dumps(about, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
      UserError: there is none, or its files are not the ones that were saved.
    """
    folder = files.place(folder)
    try:
        about = json.loads(files.read_text(folder / "tokenizer.json"))
        tokenizer = _saved(folder, about["name"], about["num_tokens"])
        same = tokenizer.fingerprint == about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer: {folder} holds no readable tokenizer: {error}") from error
    if not same:
        raise UserError(f"tokenizer: the files in {folder} are not those that were saved there")
    return tokenizer


def _saved(folder: Path, name: str, num_tokens: int) -> Tokenizer:
    """What `Tokenizer.save` wrote: from its name, its number of tokens and its model."""
    if name in ("bytes", "tokens"):
        return bytes_tokenizer() if name == "bytes" else tokens_only(num_tokens)
    return {"sentencepiece": sentencepiece, "byte_bpe": _byte_bpe}[name](files.read_bytes(folder / "tokenizer.model"))


def _byte_bpe(model: bytes) -> Tokenizer:
    from hdlm_jax.data import byte_bpe

    return byte_bpe.from_json(model)


def build(kind: str, vocab_size: int = 0, documents: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
      kind: 'bytes', 'sentencepiece' (trained on `documents`), a path ending in .model (SentencePiece) or
        .json (byte-level BPE), or a folder: one with vocab.json and merges.txt, or one that a tokenizer was
        saved in, such as a run folder.
      vocab_size: N, ordinary tokens of a SentencePiece tokenizer that is trained here.
      documents: the training split.

    Raises:
      UserError: an unknown kind, a missing or unfit model, a vocabulary too large for the text.
    """
    if kind == "bytes":
        return bytes_tokenizer()
    if kind == "sentencepiece":
        return sentencepiece(train_sentencepiece(documents, vocab_size))
    place = files.place(kind, "data.tokenizer")
    if files.is_remote(place):
        return load(place)
    if kind.endswith(".json") or files.is_dir(place):
        from hdlm_jax.data import byte_bpe

        return byte_bpe.load(kind) if byte_bpe.is_here(kind) else load(kind)
    if not kind.endswith(".model"):
        choices = ["bytes", "sentencepiece", "a path ending in .model or .json", "a folder that holds a tokenizer"]
        raise unknown("data.tokenizer", kind, choices)
    try:
        model = files.read_bytes(place)
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read {kind!r}: {files.reason(error)}") from error
    return sentencepiece(model)


def bytes_tokenizer() -> Tokenizer:
    """One token for each byte of UTF-8, and `end_of_text`: N = 257.

    >>> t = bytes_tokenizer()
    >>> t.encode("hé").tolist(), t.decode([104, 195, 169, 257], mask="_"), t.num_tokens
    ([104, 195, 169], 'hé_', 257)
    """
    pieces = (*(bytes([i]) for i in range(256)), b"")
    encode = lambda texts: [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]
    return Tokenizer("bytes", pieces, encode, hashlib.sha256(b"hdlm_jax bytes").hexdigest())


def tokens_only(num_tokens: int) -> Tokenizer:
    """A vocabulary whose texts are not known: ids decode to their numbers, and no text can be encoded.

    >>> tokens_only(5).decode([3, 0])
    '3 0 '

    Encoding raises `UserError`.
    """

    def encode_many(texts):
        raise UserError(
            f"text: this model has a vocabulary of {num_tokens:,} tokens and no tokenizer, so it can only generate"
            " token ids; import it anew with `hdlm import --tokenizer DIR_OR_FILE`"
        )

    pieces = (*(f"{i} ".encode() for i in range(num_tokens - 1)), b"")
    fingerprint = hashlib.sha256(f"hdlm_jax {num_tokens} tokens".encode()).hexdigest()
    return Tokenizer("tokens", pieces, encode_many, fingerprint)


def utf8(text: str) -> bytes:
    """The bytes of a text; half of a surrogate pair raises `UserError`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        given = text[error.start : error.end]
        raise UserError(f"text: got {given!r} at character {error.start}; allowed: Unicode text") from error


# SentencePiece.


def sentencepiece(model: bytes) -> Tokenizer:
    """A tokenizer from a serialised SentencePiece model.

    The model's control symbols (its own mask, padding and sentence marks) get no token: text
    never encodes to them. The others keep their order as tokens 0 .. N-2.

    Raises:
      UserError: not a SentencePiece model, or one that loses text (it must be trained without
        normalisation, without a dummy prefix and with byte fallback).
    """
    spm = _import_sentencepiece()
    try:
        processor = spm.SentencePieceProcessor(model_proto=model)
        count = processor.get_piece_size()
    except RuntimeError as error:
        raise UserError(f"data.tokenizer: not a SentencePiece model: {error}") from error
    kept = [i for i in range(count) if not (processor.is_control(i) or processor.is_unknown(i))]
    token_of = np.full(count + 1, -1, np.int32)
    token_of[kept] = np.arange(len(kept), dtype=np.int32)
    tokenizer = Tokenizer(
        name="sentencepiece",
        pieces=(*(_piece_bytes(processor, i) for i in kept), b""),
        encode_many=functools.partial(_encode_pieces, processor, token_of),
        fingerprint=hashlib.sha256(b"hdlm_jax sentencepiece" + model).hexdigest(),
        model=model,
    )
    require_lossless(
        tokenizer,
        "this SentencePiece model loses text; allowed: a model trained with normalization_rule_name='identity',"
        " remove_extra_whitespaces=False, add_dummy_prefix=False and byte_fallback=True",
    )
    return tokenizer


def require_lossless(tokenizer: Tokenizer, reason: str) -> None:
    """Raises `UserError` unless difficult text comes back unchanged and every byte has a token of its own."""
    single = {piece for piece in tokenizer.pieces if len(piece) == 1}
    same = lambda text: tokenizer.decode(tokenizer.encode(text)) == text
    if len(single) < 256 or not (same(_PROBE) and same(_PROBE.strip())):
        raise UserError(f"data.tokenizer: {reason}")


def _piece_bytes(processor: Any, i: int) -> bytes:
    piece = processor.id_to_piece(i)
    return bytes([int(piece[1:-1], 16)]) if processor.is_byte(i) else piece.replace(_SPACE, " ").encode()


def _encode_pieces(processor: Any, token_of: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text. A literal U+2581, SentencePiece's own sign, goes in as its bytes."""
    for text in texts:
        utf8(text)
    parts = [text.split(_SPACE) for text in texts]
    flat = [part for split in parts for part in split]
    threads = os.cpu_count() if len(flat) > 1 else 1
    encoded = iter(processor.encode(flat, out_type="numpy", num_threads=threads))
    sign = np.array([processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()], np.int32)
    return [token_of[_joined([next(encoded) for _ in split], sign)] for split in parts]


def _joined(arrays: list[np.ndarray], separator: np.ndarray) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([x for array in arrays for x in (separator, array)][1:])


def train_sentencepiece(documents: Sequence[str], vocab_size: int) -> bytes:
    """Trains a lossless BPE model with `vocab_size` ordinary tokens and returns it serialised.

    Deterministic: depends on the documents and the size alone. Of large corpora a fixed random
    sample of documents (20 MB) is read.

    Raises:
      UserError: the text is too small or too varied for `vocab_size`; the message says what fits.
    """
    spm = _import_sentencepiece()
    model = io.BytesIO()
    require(vocab_size > 0, "data.vocab_size", vocab_size, "a number of ordinary tokens, as 8192")
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            vocab_size=vocab_size + _TOKENLESS,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            control_symbols=["[MASK]"],  # a user-defined symbol would turn this text into the mask
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(str(error), vocab_size) from error
    return model.getvalue()


def _lines(documents: Sequence[str]) -> Iterator[str]:
    """Lines of a fixed random sample of the documents, none longer than the trainer reads."""
    budget = _SAMPLE_BYTES
    for i in np.random.default_rng(0).permutation(len(documents)):
        for line in documents[int(i)].split("\n"):
            if budget <= 0:
                return
            budget -= len(line.encode()) + 1
            yield from (line[j : j + _LINE] for j in range(0, len(line), _LINE))


def _vocabulary_error(message: str, vocab_size: int) -> UserError:
    high = re.search(r"set it to a value <= (\d+)", message)
    low = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if high:
        allowed = f"at most {int(high[1]) - _TOKENLESS} for a text this small"
    elif low:
        allowed = f"at least {int(low[1]) - _TOKENLESS} for the characters of this text"
    else:
        allowed = f"a text that SentencePiece can train on ({message.strip()})"
    return UserError(f"data.vocab_size: got {vocab_size}; allowed: {allowed}")


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("data.tokenizer: 'sentencepiece' needs a package: pip install sentencepiece") from error
    return sentencepiece
