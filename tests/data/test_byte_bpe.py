"""Byte-level BPE vocabularies from files: ids as the library's, text back in every byte, what is refused."""

import json
import sys

import numpy as np
import pytest
import tokenizers as library

from hdlm_jax.data import byte_bpe, prepare, tokenizers
from hdlm_jax.errors import UserError
from tests.interop.vocabulary import SAMPLE, small_vocabulary

TEXTS = ["", SAMPLE, " é\n\n\t  x\U0001f600 \u2581\x00", "<|endoftext|>", "a<|endoftext|>b", "\ufb01\uff21e\u0301 \r\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe.from_json(small_vocabulary().encode())


def test_tokens_are_the_librarys(tokenizer):
    theirs = library.Tokenizer.from_str(small_vocabulary())
    assert tokenizer.num_tokens == theirs.get_vocab_size() == 271
    assert tokenizer.encode(SAMPLE).tolist() == theirs.encode(SAMPLE, add_special_tokens=False).ids
    assert len(tokenizer.encode(SAMPLE)) < len(SAMPLE) / 1.5
    assert (tokenizer.end_of_text, tokenizer.bos_id, tokenizer.mask_id) == (270, 270, 271)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_text_comes_back_and_never_makes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_many([text, "x"])[0], ids)


def test_the_special_token_stands_for_what_it_is_told(tokenizer):
    assert tokenizer.decode([270, 271, *tokenizer.encode("a")], mask="_", end_of_text="|") == "|_a"


def test_files_of_both_forms_and_saved_ones_are_the_same(tokenizer, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(small_vocabulary())
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    theirs = library.Tokenizer.from_str(small_vocabulary())
    theirs.model.save(str(gpt2))
    (gpt2 / "vocab.json").write_text(json.dumps(theirs.get_vocab()))  # GPT-2's vocab.json has the special token
    tokenizer.save(tmp_path / "saved")
    places = [tmp_path / "hf", tmp_path / "hf" / "tokenizer.json", gpt2, tmp_path / "saved"]
    for place in places:
        found = tokenizers.build(str(place))
        assert found.end_of_text == 270 and found.pieces == tokenizer.pieces
        for text in TEXTS:
            np.testing.assert_array_equal(found.encode(text), tokenizer.encode(text))
    assert tokenizers.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_end_of_text_need_not_be_the_last_token(tmp_path):
    tree = json.loads(small_vocabulary())
    extra = {**tree["added_tokens"][0], "id": 271, "content": "<pad>"}
    word = {**extra, "id": 272, "content": "hen!", "special": False}
    tree["added_tokens"] += [extra, word]
    found = byte_bpe.from_json(json.dumps(tree).encode())
    assert (found.num_tokens, found.end_of_text, found.mask_id) == (273, 270, 273)
    ids = found.encode("the hen! <pad>")
    assert 272 in ids and 271 not in ids and found.decode(ids) == "the hen! <pad>"
    assert found.decode([270, 272], end_of_text="|") == "|hen!"


def test_a_corpus_is_prepared_with_a_vocabulary_from_files(small_text, tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(small_vocabulary())
    config = {"source": "text", "path": str(small_text), "tokenizer": str(tmp_path / "tokenizer.json"), "length": 32}
    found = prepare.prepare(config, tmp_path / "data")
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    assert found.train[0][0] == 270  # the document's opening
    assert tokenizer.decode(found.train[0][1:]) in small_text.read_text()


def spoilt(change):
    tree = json.loads(small_vocabulary())
    change(tree)
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b'{"name": "bytes", "num_tokens": 257}', "not a tokenizer.json"),
        (small_vocabulary("<end>").encode(), "no token '<|endoftext|>'"),
        (small_vocabulary(add_prefix_space=True).encode(), "this vocabulary loses text"),
        (spoilt(lambda tree: tree.update(normalizer={"type": "Lowercase"})), "this vocabulary loses text"),
        (spoilt(lambda tree: tree.update(pre_tokenizer={"type": "Whitespace"}, decoder=None)), "allowed: byte-level"),
        (spoilt(lambda tree: tree["model"]["vocab"].pop("!")), "ids with gaps"),
    ],
    ids=["json", "utf-8", "ours", "end of text", "prefix space", "normaliser", "words", "gaps"],
)
def test_what_is_no_vocabulary_or_loses_text_is_refused(text, says):
    with pytest.raises(UserError, match="data.tokenizer: ") as caught:
        byte_bpe.from_json(text)
    assert says in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="data.tokenizer: cannot read .*no.json"):
        tokenizers.build(str(tmp_path / "no.json"))
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        tokenizers.build(str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="data.tokenizer: cannot read vocab.json, merges.txt in"):
        tokenizers.build(str(tmp_path))


def test_the_package_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install tokenizers \(or 'hdlm_jax\[tokenizers\]'\)"):
        byte_bpe.from_json(b"{}")


def test_tokens_only_has_no_text(tmp_path):
    only = tokenizers.tokens_only(5)
    assert (only.num_tokens, only.mask_id, only.bos_id) == (5, 5, 4)
    assert only.decode([0, 3, 4, 5], mask="_", end_of_text=".") == "0 3 ._"
    with pytest.raises(UserError, match="a vocabulary of 5 tokens and no tokenizer"):
        only.encode("a")
    only.save(tmp_path)
    assert tokenizers.load(tmp_path).fingerprint == only.fingerprint != tokenizers.tokens_only(6).fingerprint
