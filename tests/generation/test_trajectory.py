"""Levels, windows and corrections of a record, by hand."""

import numpy as np

from hdlm_jax.diffusion.hyperschedules import slide
from hdlm_jax.generation.trajectory import Trajectory

MASK = 9
TOKENS = np.array([[[9, 9, 9, 9], [7, 9, 9, 9]], [[1, 9, 9, 9], [7, 2, 9, 9]], [[3, 9, 9, 9], [7, 2, 4, 9]]], np.int32)


def record():
    """Two texts of four tokens under slide(width 2, rate 1), the second behind a prompt of one, first three frames."""
    given = np.array([[False] * 4, [True, False, False, False]])
    origins, hs = np.array([0, 1]), slide(length=4, width=2, rate=1)
    return Trajectory(np.arange(3), TOKENS, np.zeros(TOKENS.shape), given, origins, hs, MASK)


def test_levels_follow_the_hyperschedule_from_each_origin():
    levels = record().levels()
    assert levels[:, 0].tolist() == [[2, 2, 2, 2], [1, 2, 2, 2], [0, 1, 2, 2]]
    assert levels[:, 1].tolist() == [[0, 2, 2, 2], [0, 1, 2, 2], [0, 0, 1, 2]]


def test_windows_are_those_of_the_next_call():
    assert record().windows().tolist() == [[[0, 1], [1, 2]], [[0, 2], [1, 3]], [[1, 3], [2, 4]]]


def test_a_correction_is_another_token_in_the_place_of_a_token():
    corrected = record().corrected()
    assert corrected.shape == TOKENS.shape
    assert np.argwhere(corrected).tolist() == [[2, 0, 0]]
