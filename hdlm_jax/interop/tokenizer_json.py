"""Our tokenizers as files that the libraries `tokenizers` and `transformers` open: the same ids for the same text."""

import itertools
import json
from typing import Any

from hdlm_jax.data import byte_bpe
from hdlm_jax.data.tokenizers import Tokenizer

NAME, SETTINGS, MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
SPACE = "\u2581"  # how SentencePiece writes a space


def files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """Files by name; none for a vocabulary without text.

    A SentencePiece model comes as itself too; one that is no BPE comes only so.

    Args:
      tokenizer: of the model.
      length: the longest text, tokens.
    """
    if tokenizer.name == "tokens":
        return {}
    found = {MODEL: tokenizer.model} if tokenizer.name == "sentencepiece" else {}
    text = serialised(tokenizer)
    if text is None:
        return found
    end = byte_bpe.END_OF_TEXT
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": end for role in ("bos", "eos", "pad")},
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # what looks like a special token in a text is text
    }
    return found | {NAME: text, SETTINGS: _json(settings)}


def serialised(tokenizer: Tokenizer) -> bytes | None:
    """The content of tokenizer.json; None for a SentencePiece model that is no BPE."""
    if tokenizer.name == "byte_bpe":
        return tokenizer.model
    if tokenizer.name == "bytes":
        model = _bpe(byte_bpe.byte_of_character(), [])
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return _json(_tree(model, tokenizer.end_of_text, [], level, level))
    found = _merges(tokenizer)
    if found is None:
        return None
    vocabulary, merges, whole = found
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return _json(_tree(_bpe(vocabulary, merges), tokenizer.end_of_text, whole, None, decoder))


def _merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[list[str]], list[tuple[str, int]]] | None:
    """Vocabulary, merges in order, and the pieces that stand alone, of a SentencePiece BPE; None for other models.

    A space is written as itself: U+2581 in a text then falls back to its bytes, as it does in ours.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    kept = [i for i in range(processor.get_piece_size()) if not (processor.is_control(i) or processor.is_unknown(i))]
    name = lambda i: processor.id_to_piece(i) if processor.is_byte(i) else processor.id_to_piece(i).replace(SPACE, " ")
    vocabulary = {name(i): token for token, i in enumerate(kept)}
    plain = {name(i): processor.get_score(i) for i in kept if not processor.is_byte(i)}
    splits = {
        piece: [[piece[:k], piece[k:]] for k in range(1, len(piece)) if piece[:k] in plain and piece[k:] in plain]
        for piece in plain
    }
    merged = sorted((piece for piece in plain if splits[piece]), key=lambda piece: -plain[piece])
    ranks = [plain[piece] for piece in merged]
    if not all(rank == int(rank) for rank in ranks) or len(set(ranks)) < len(ranks):
        return None  # scores are log-probabilities (a unigram model), not the order of merges
    alone = [(piece, vocabulary[piece]) for piece in plain if len(piece) > 1 and not splits[piece]]
    return vocabulary, list(itertools.chain.from_iterable(splits[piece] for piece in merged)), alone


def _bpe(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": bool(merges),
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _tree(model: dict, end: int, alone: list[tuple[str, int]], pre_tokenizer: Any, decoder: Any) -> dict[str, Any]:
    def added(content: str, token: int, special: bool) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": token, "content": content, **flags, "special": special}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*(added(*pair, False) for pair in alone), added(byte_bpe.END_OF_TEXT, end, True)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
