"""Tokenizers: lossless, the mask out of reach of any text, decoding of broken UTF-8, files, errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hdlm_jax.data import tokenizers
from hdlm_jax.errors import UserError

WORDS = [
    "the",
    "mask",
    "sees",
    "only",
    "settled",
    "tokens",
    "every",
    "window",
    "noise",
    "level",
    "moves",
    "right",
]
CORPUS = [
    "\n".join(" ".join(WORDS[(i * j) % len(WORDS)] + str(j) for j in range(12)) + ".  [MASK]" for i in range(20))
    for _ in range(5)
]
SIZE = 400
SPECIAL_TEXT = [
    "[MASK]",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<0x41>",
    "\u2581a \u2581\u2581",
    "\0",
    "a\r\n\tb ",
    "\ufeff",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return tokenizers.build("sentencepiece", SIZE, CORPUS)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, trained) -> tokenizers.Tokenizer:
    return trained if request.param == "sentencepiece" else tokenizers.build("bytes")


# ---- ids


def test_ids_are_laid_out_as_promised(tokenizer):
    n = tokenizer.num_tokens
    assert n == {"bytes": 257, "sentencepiece": SIZE}[tokenizer.name]
    assert (tokenizer.mask_id, tokenizer.end_of_text, tokenizer.bos_id) == (n, n - 1, n - 1)
    assert len(tokenizer.pieces) == n
    assert [i for i, piece in enumerate(tokenizer.pieces) if not piece] == [n - 1]
    assert len(set(tokenizer.pieces[:-1])) >= n - 1 - 128  # '\n' and ASCII letters stand twice: as byte and piece


@given(text=TEXT)
@example(text="")
@example(text="".join(SPECIAL_TEXT))
def test_encoding_is_lossless_and_never_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.end_of_text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(texts=st.lists(TEXT, max_size=5))
def test_many_are_encoded_like_each(tokenizer, texts):
    for ids, text in zip(tokenizer.encode_many(texts), texts, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("text", SPECIAL_TEXT)
def test_text_that_looks_special_is_ordinary(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {tokenizer.mask_id, tokenizer.end_of_text} & set(tokenizer.encode(text).tolist())


def test_words_of_the_corpus_become_few_tokens(trained):
    assert len(trained.encode(CORPUS[0])) < 0.5 * len(CORPUS[0])


def test_decoding_agrees_with_sentencepiece(trained):
    spm = pytest.importorskip("sentencepiece")
    processor = spm.SentencePieceProcessor(model_proto=trained.model)
    kept = [i for i in range(len(processor)) if not (processor.is_control(i) or processor.is_unknown(i))]
    ids = np.random.default_rng(0).integers(0, SIZE - 1, 2000)
    ids = [i for i in ids if not processor.is_byte(kept[i])]  # broken characters are replaced in its own way
    assert trained.decode(ids) == processor.decode([kept[i] for i in ids])


def test_token_bytes_cover_every_id(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.num_tokens + 1,)
    assert tokenizer.token_bytes[-2:].tolist() == [0, 0]


# ---- decoding


def test_specials_are_shown_only_when_asked(tokenizer):
    ids = [tokenizer.end_of_text, *tokenizer.encode("é a"), tokenizer.mask_id, tokenizer.mask_id]
    assert tokenizer.decode(ids) == "é a"
    assert tokenizer.decode(ids, mask="_") == "é a__"
    assert tokenizer.decode(np.array(ids), mask="▒", end_of_text="<|>") == "<|>é a▒▒"


def test_a_broken_character_reads_as_a_replacement():
    tokenizer = tokenizers.build("bytes")
    ids = tokenizer.encode("aéb").tolist()
    assert tokenizer.decode(ids[:2]) == "a\ufffd"
    assert tokenizer.decode(ids[2:]) == "\ufffdb"
    assert tokenizer.decode([*ids[:2], tokenizer.mask_id, *ids[2:]], mask="_") == "a\ufffd_\ufffdb"


@given(ids=st.lists(st.integers(0, 257)), cuts=st.lists(st.integers(0, 30), max_size=5))
def test_a_stream_decodes_like_the_whole(tokenizer, ids, cuts):
    places = [0, *sorted(cuts), len(ids)]
    chunks = [ids[a:b] for a, b in zip(places[:-1], places[1:], strict=True)] if places[-2] <= len(ids) else [ids]
    assert "".join(tokenizer.decode_stream(chunks, mask="_")) == tokenizer.decode(ids, mask="_")


def test_a_stream_waits_for_the_rest_of_a_character():
    tokenizer = tokenizers.build("bytes")
    ids = tokenizer.encode("é!").tolist()
    assert list(tokenizer.decode_stream([ids[:1], ids[1:]])) == ["", "é!", ""]


@pytest.mark.parametrize("bad", [-1, 258])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=rf"tokens: got {bad}; allowed: token ids in 0 .. 257"):
        tokenizers.build("bytes").decode([1, bad])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="text: got .* at character 2; allowed: Unicode text"):
        tokenizer.encode("ab\ud800")


# ---- training, saving, loading


def test_training_is_deterministic(trained):
    assert tokenizers.train_sentencepiece(CORPUS, SIZE) == trained.model
    assert tokenizers.build("sentencepiece", SIZE + 1, CORPUS).fingerprint != trained.fingerprint


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    loaded = tokenizers.load(tmp_path / "run")
    assert (loaded.fingerprint, loaded.pieces) == (tokenizer.fingerprint, tokenizer.pieces)
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_a_model_file_is_used_as_it_is(trained, tmp_path):
    (tmp_path / "x.model").write_bytes(trained.model)
    assert tokenizers.build(str(tmp_path / "x.model")).fingerprint == trained.fingerprint


def test_long_lines_and_large_corpora_are_trained_on(monkeypatch):
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (3000, 4))
    line = " ".join("".join(word) for word in letters)  # more than the trainer would read in one piece
    assert tokenizers.build("sentencepiece", SIZE, [line]).num_tokens == SIZE
    monkeypatch.setattr(tokenizers, "_SAMPLE_BYTES", 100)
    lines = list(tokenizers._lines(["ab\ncd" * 8, "x" * 1500] * 10))
    assert 90 < sum(map(len, lines)) < 1700 and max(map(len, lines)) <= 1000


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("byte",), "data.tokenizer: got 'byte' .*did you mean 'bytes'.*'sentencepiece'"),
        (("/nowhere/x.model",), "data.tokenizer: cannot read '/nowhere/x.model': No such file"),
        (("sentencepiece", 0, CORPUS), "data.vocab_size: got 0"),
        (("sentencepiece", 100, CORPUS), r"data.vocab_size: got 100; allowed: at least \d+ for the char"),
        (("sentencepiece", 500, []), "data.vocab_size: got 500; allowed: a text that"),
    ],
)
def test_what_is_refused(arguments, why):
    with pytest.raises(UserError, match=why):
        tokenizers.build(*arguments)


def test_a_vocabulary_too_large_names_the_largest_that_works():
    with pytest.raises(UserError, match=r"data.vocab_size: got 8192; allowed: at most (\d+)") as error:
        tokenizers.build("sentencepiece", 8192, CORPUS)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert tokenizers.build("sentencepiece", largest, CORPUS).num_tokens == largest
    with pytest.raises(UserError, match=f"at most {largest} "):
        tokenizers.build("sentencepiece", largest + 1, CORPUS)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05hello"])
def test_files_that_are_no_model(content, tmp_path):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match="data.tokenizer: "):
        tokenizers.build(str(tmp_path / "x.model"))


@pytest.mark.parametrize(
    "setting",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
    ],
)
def test_a_model_that_loses_text_is_refused(setting, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    lossless = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    with open(tmp_path / "x.model", "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(CORPUS).split("\n")),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=2,
            **{**lossless, **setting},
        )
    with pytest.raises(UserError, match="this SentencePiece model loses text"):
        tokenizers.build(str(tmp_path / "x.model"))


def test_a_folder_without_its_tokenizer(tmp_path, trained):
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        tokenizers.load(tmp_path)
    trained.save(tmp_path)
    tokenizers.build("sentencepiece", SIZE + 1, CORPUS).save(tmp_path / "other")
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="are not those that were saved"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained.model[:-100])
    with pytest.raises(UserError, match="tokenizer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"name": "words"}))
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        tokenizers.load(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tokenizers.build("sentencepiece", SIZE, CORPUS)


def test_importing_the_data_package_loads_nothing_heavy():
    program = (
        "import sys, hdlm_jax.data\n"
        "heavy = ['grain', 'sentencepiece', 'tensorflow_datasets', 'array_record', 'tensorflow']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
