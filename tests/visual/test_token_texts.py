"""Every token has a text that can be seen, and that moves or hides nothing around it."""

import unicodedata

import pytest

from hdlm_jax.data import tokenizers
from hdlm_jax.visual.token_texts import END_OF_TEXT, token_texts, visible


def test_bytes_are_characters_where_they_can_be_and_codes_elsewhere():
    text_of = token_texts(tokenizers.bytes_tokenizer())
    assert [text_of(i) for i in range(128)] == [chr(i) for i in range(128)]
    assert [text_of(i) for i in range(128, 256)] == [f"\\x{i:02x}" for i in range(128, 256)]
    assert text_of(256) == END_OF_TEXT


def test_end_of_text_may_be_any_token():
    tokenizer = tokenizers.Tokenizer("x", (b"", b"a\xe2", "é".encode()), list, "", end_of_text=0)
    assert [token_texts(tokenizer)(i) for i in range(3)] == [END_OF_TEXT, "a\\xe2", "é"]


@pytest.mark.parametrize(
    "code", [*range(0x20), 0x7F, 0x85, 0xAD, 0x202E, 0x2028, 0x2029, 0x2066, 0xFEFF, 0xD800, 0xE000]
)
def test_what_cannot_be_seen_gets_a_sign(code: int):
    shown = visible(chr(code))
    hidden = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert hidden <= set("\n\t")
    assert shown.strip()


@pytest.mark.parametrize("text", ["word", " a b", "é語", "😀", "👩\u200d💻", "नमस्ते"])
def test_what_can_be_seen_stays(text: str):
    assert visible(text) == text
