"""From texts to what is given of a generation, and from finished tokens to where each text ends."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.errors import require


class Given(NamedTuple):
    """What is given of B texts of L tokens.

    Attributes:
      tokens: int32 [B, L]; 0 where nothing is given.
      mask: bool [B, L], the given ones.
      longest_prompt: the most tokens given at the front of a text.
    """

    tokens: np.ndarray
    mask: np.ndarray
    longest_prompt: int


def encode(tokenizer: Tokenizer, prompts: Sequence[str], length: int, fixed: Mapping[int, str] | None = None) -> Given:
    """Prompts at the front of texts of `length` tokens, and texts fixed behind them.

    Args:
      tokenizer: of the model.
      prompts: one for each text; '' begins from nothing.
      length: L.
      fixed: position -> text whose tokens stand from there on, in all texts.

    Raises:
      UserError: no prompt at all, one that leaves no room, a fixed text outside the text or on other given tokens.

    >>> from hdlm_jax.data.tokenizers import bytes_tokenizer
    >>> given = encode(bytes_tokenizer(), ["a", ""], length=4, fixed={3: "!"})
    >>> given.tokens.tolist(), given.mask.astype(int).tolist(), given.longest_prompt
    ([[97, 0, 0, 33], [0, 0, 0, 33]], [[1, 0, 0, 1], [0, 0, 0, 1]], 1)
    """
    require(len(prompts) > 0, "prompt", prompts, "at least one text")
    tokens_BxL, given_BxL = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for i, text in enumerate(prompts):
        ids = tokenizer.encode(text) if text else tokens_BxL[i, :0]
        require(len(ids) < length, "prompt", f"{len(ids)} tokens", f"fewer than the text's {length} tokens")
        tokens_BxL[i, : len(ids)], given_BxL[i, : len(ids)] = ids, True
    for position, text in (fixed or {}).items():
        ids = tokenizer.encode(text)
        inside = position >= 0 and position + len(ids) <= length
        allowed = f"positions 0 .. {length - 1}, the text's {length} tokens"
        require(inside, "fixed", f"{len(ids)} tokens from position {position}", allowed)
        place = slice(position, position + len(ids))
        taken = given_BxL[:, place].any(0)
        free = f"positions that neither the prompt nor another fixed text has (taken: {position + int(taken.argmax())})"
        require(not taken.any(), "fixed", f"{len(ids)} tokens from position {position}", free)
        tokens_BxL[:, place], given_BxL[:, place] = ids, True
    require(not given_BxL.all(1).any(), "fixed", "every position", "some position that is left to generate")
    return Given(tokens_BxL, given_BxL, int(np.cumprod(given_BxL, 1).sum(1).max()))


def ends(tokens_BxL: np.ndarray, given_BxL: np.ndarray, end: int | None) -> np.ndarray:
    """int32 [B], tokens of each text up to its first generated `end`, which is counted; L where there is none.

    >>> ends(np.array([[9, 1, 9, 2], [1, 1, 1, 1]]), np.array([[True, False, False, False]] * 2), end=9).tolist()
    [3, 4]
    """
    length = tokens_BxL.shape[1]
    if end is None:
        return np.full(len(tokens_BxL), length, np.int32)
    is_end_BxL = (tokens_BxL == end) & ~given_BxL
    return np.where(is_end_BxL.any(1), is_end_BxL.argmax(1) + 1, length).astype(np.int32)
