"""What is given of a text, and where texts end."""

import numpy as np
import pytest

from hdlm_jax.data.tokenizers import bytes_tokenizer
from hdlm_jax.errors import UserError
from hdlm_jax.generation import prompting

TOKENIZER = bytes_tokenizer()


def test_prompts_of_any_length_and_texts_fixed_behind_them():
    given = prompting.encode(TOKENIZER, ["", "abc", "é"], 8, fixed={4: "xy", 7: "z"})
    assert given.mask.tolist() == [
        [False, False, False, False, True, True, False, True],
        [True, True, True, False, True, True, False, True],
        [True, True, False, False, True, True, False, True],
    ]
    assert bytes(given.tokens[1][given.mask[1]].tolist()) == b"abcxyz"
    assert (given.tokens[~given.mask] == 0).all()
    assert given.longest_prompt == 3


def test_a_fixed_text_that_follows_a_prompt_at_once_is_part_of_it():
    assert prompting.encode(TOKENIZER, ["ab", ""], 6, fixed={2: "cd"}).longest_prompt == 4


@pytest.mark.parametrize(
    ("prompts", "fixed", "field"),
    [
        ([], None, "prompt: got"),
        (["abcd"], None, "prompt: got '4 tokens'; allowed: fewer than the text's 4 tokens"),
        (["a"], {4: "b"}, "fixed: got '1 tokens from position 4'; allowed: positions 0 .. 3"),
        (["a"], {-1: "b"}, "fixed: got '1 tokens from position -1'"),
        (["a"], {3: "é"}, "fixed: got '2 tokens from position 3'"),
        (["ab", "a"], {1: "b"}, "taken: 1"),
        ([""], {1: "bc", 2: "d"}, "taken: 2"),
        (["a"], {1: "bcd"}, "fixed: got 'every position'"),
    ],
)
def test_bad_input_names_its_field(prompts, fixed, field):
    with pytest.raises(UserError, match=field):
        prompting.encode(TOKENIZER, prompts, 4, fixed)


def test_a_given_end_does_not_end_a_text():
    tokens = np.array([[5, 1, 5, 5], [5, 1, 2, 3]])
    given = np.array([[True, False, False, False]] * 2)
    assert prompting.ends(tokens, given, end=5).tolist() == [3, 4]
    assert prompting.ends(tokens, given, end=None).tolist() == [4, 4]
