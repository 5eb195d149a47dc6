"""With a perfect network the law of samples approaches the data's as calls grow, for the samplers that say so."""

import functools

import numpy as np
import pytest

from hdlm_jax.benchmarks import laws
from tests.oracle import hdlm_oracle as oracle

L, SAMPLES = 4, 8192
FLOOR = 0.032  # what samples of the law itself stay below, and an exact sampler with them
CASES = {case.name: case for case in laws.CASES}
# one of each mechanism in the first tier: compiling is what takes the time
FIRST = {"ancestral (absorb)", "acs", "remdm_cap", "first_hitting", "entropy"}


@functools.cache
def distances(name, steps):
    return [row["distance"] for row in laws.distances(CASES[name], steps, L, SAMPLES)]


def cases(chosen):
    return [pytest.param(case.name, marks=[pytest.mark.slow] * (case.name not in FIRST)) for case in chosen]


GRADUAL = [case for case in laws.CASES if case.limit and case.kind not in laws.EXACT_ORDERS]
EXACT = [case for case in laws.CASES if case.kind in laws.EXACT_ORDERS]
BIASED = [case for case in laws.CASES if not case.limit and case.kind in laws.orders.RULES]


@pytest.mark.parametrize("name", cases(GRADUAL))
def test_the_error_falls_as_calls_grow(name):
    few, more, many = distances(name, (2, 8, 24))
    assert few > 0.25, "several tokens of one call are drawn as if they did not depend on each other"
    assert many < more < few
    assert many < 0.07


@pytest.mark.parametrize("name", cases(EXACT))
def test_one_token_a_call_in_an_order_that_does_not_look_at_it_is_exact(name):
    assert distances(name, (L,))[0] < FLOOR


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in BIASED])
def test_choosing_by_the_drawn_tokens_confidence_is_not(name):
    """However many calls: likely texts are drawn too often."""
    assert min(distances(name, (L, 16))) > 0.2


def test_samples_of_the_law_itself_are_as_far_as_the_floor():
    law = laws.markov_law(L)
    drawn = np.random.default_rng(0).choice(law.size, SAMPLES, p=law.ravel())
    assert 0.01 < laws.total_variation(np.stack(np.unravel_index(drawn, law.shape), 1), law) < FLOOR


def test_masks_left_in_a_text_count_in_full():
    law = np.full((2, 2), 0.25)
    assert laws.total_variation(np.array([[0, 0], [0, 1], [1, 0], [2, 1]]), law) == 0.25


@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("ancestral (absorb)", oracle.Absorb(laws.N)),
        ("acs", oracle.Epsilon(laws.N, 0.05)),
    ],
)
def test_the_network_is_the_oracles_posterior(name, chain, alpha):
    law = laws.markov_law(3)
    ours = laws.perfect(CASES[name], law, alpha)
    theirs = oracle.bayes_denoiser(chain, law)([-np.log(alpha)] * 3).reshape(-1, 3, laws.N)
    shares = np.exp(ours[..., : laws.N] - ours[..., : laws.N].max(-1, keepdims=True))
    np.testing.assert_allclose(shares / shares.sum(-1, keepdims=True), theirs, atol=1e-5)


def test_the_markov_law_is_one():
    law = laws.markov_law(5)
    assert law.shape == (laws.N,) * 5 and law.min() > 0
    np.testing.assert_allclose(law.sum(), 1)
    np.testing.assert_allclose(law.sum((3, 4)), laws.markov_law(3), rtol=1e-12)
