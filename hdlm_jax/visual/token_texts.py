"""Tokens as text that can be seen one by one: line ends, control characters, parts of characters."""

import unicodedata
from collections.abc import Callable

from hdlm_jax.data.tokenizers import Tokenizer

END_OF_TEXT = "\u27e8end\u27e9"
_SIGNS = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t"}
_JOINERS = "\u200c\u200d"  # of many scripts and emoji; they move nothing
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def token_texts(tokenizer: Tokenizer) -> Callable[[int], str]:
    r"""Token id (0 .. N - 1) -> its text; bytes that are no character by themselves are written \x...

    >>> from hdlm_jax.data.tokenizers import bytes_tokenizer
    >>> [token_texts(bytes_tokenizer())(i) for i in (104, 195, 256)]
    ['h', '\\xc3', '⟨end⟩']
    """

    def text_of(token: int) -> str:
        if token == tokenizer.end_of_text:
            return END_OF_TEXT
        return tokenizer.pieces[token].decode(errors="backslashreplace")

    return text_of


def visible(text: str) -> str:
    r"""The text with a sign for everything that would not be seen alone, or that would move its neighbours.

    Line ends keep their effect behind their sign; a combining mark gets a circle to stand on; other control
    characters and those that turn the direction of writing are written as escapes; nothing at all is '∅'.

    >>> visible("a\n\tb"), visible("\u0301e"), visible("\u202ex\x00"), visible("")
    ('a↵\n⇥\tb', '◌́e', '\\u202ex\\x00', '∅')
    """
    base = "\u25cc" if unicodedata.category(text[:1] or " ").startswith("M") else ""
    return base + "".join(map(_sign, text)) or "\u2205"


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
    return character.encode("unicode_escape").decode() if hidden else character
