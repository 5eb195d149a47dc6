"""Visibility: the predicates against their words, and what a trained model may sample."""

import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noise_schedules, visibility
from hdlm_jax.errors import UserError

L = 12
LINEAR, GEOMETRIC = noise_schedules.linear(), noise_schedules.geometric(0.1, 3.0)
PREFIX = [
    hyperschedules.quenched(L),
    hyperschedules.flat(L, 1),
    hyperschedules.flat(L, 3),
    hyperschedules.block(L, 4, 4),
    hyperschedules.block(L, 4, 2),
    hyperschedules.slide(L, 4, 1),
    hyperschedules.slide(L, 6, "3/2"),
    hyperschedules.slide(L, 2, "1/2"),
    hyperschedules.slide(L, 1, "1/3"),
    hyperschedules.block_slide(L, 6, 4, 2),
    hyperschedules.ar_diffusion(L, 16),
]
ROW_R = np.arange(L + 1)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, L + 1), (0, 4), (3, 7), (5, 5), (9, L + 1), (L + 1, L + 1)])
def test_the_plain_layout_in_words(start, stop):
    visible = visibility.one_text(ROW_R[:, None], ROW_R[None, :], start, stop)
    settled, worthless = start > ROW_R, stop <= ROW_R
    active = ~settled & ~worthless
    for query in ROW_R:
        seen = set(np.flatnonzero(visible[query]))
        if settled[query]:
            assert seen == set(range(query + 1))
        elif active[query]:
            assert seen == set(range(start)) | set(np.flatnonzero(active))
        else:
            assert seen == {query}


def test_every_row_sees_itself_and_seeing_is_transitive():
    """What a row can reach through any number of blocks is what it sees: nothing leaks through a third row."""
    for start, stop in [(0, 3), (4, 8), (L, L + 1)]:
        visible = visibility.one_text(ROW_R[:, None], ROW_R[None, :], start, stop)
        assert visible.diagonal().all()
        np.testing.assert_array_equal(visible @ visible, visible)


@pytest.mark.parametrize("hs", PREFIX, ids=lambda hs: f"{hs.kind}-{hs.width}-{hs.rate}".replace("/", ":"))
def test_a_trailing_row_matters_where_a_window_ends_in_more_than_noise(hs):
    """At the end of a text no new token starts, so the rule looks at the windows before it."""
    levels, ends_in_noise = np.asarray(hs.levels), []
    for step in range(hs.num_steps):
        start, stop = hs.window(step)
        if start < stop and (stop < L or hs.num_groups > 1 or hs.kind in ("flat", "ar_diffusion")):
            ends_in_noise.append(levels[step, stop - 1] == hs.tau_max)
    assert visibility.trailing_row_matters(hs, LINEAR) == (not all(ends_in_noise))
    assert visibility.trailing_row_matters(hs, GEOMETRIC)  # pure noise keeps some tokens


def test_a_full_model_samples_any_order():
    shuffled = hyperschedules.from_levels([[1, 1, 1], [1, 0, 1], [0, 0, 0]])
    assert visibility.check_sampling("full", 1, shuffled) is None
    assert visibility.check_sampling("full", 1, hyperschedules.slide(L, 6, 1)) is None


def test_a_prefix_model_samples_from_left_to_right_through_a_window_that_it_knows():
    for hs in PREFIX:
        assert visibility.check_sampling("prefix", hs.width, hs) is None
    with pytest.raises(UserError, match=r"hyperschedule.width: got 4; allowed .* at most 3, the widest window"):
        visibility.check_sampling("prefix", 3, hyperschedules.block(L, 4, 2))
    shuffled = hyperschedules.from_levels([[1, 1, 1], [1, 0, 1], [0, 0, 0]])
    with pytest.raises(UserError, match=r"hyperschedule.kind: got 'from_levels'.*settle from left to right"):
        visibility.check_sampling("prefix", 3, shuffled)
