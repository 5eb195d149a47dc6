"""Variety of texts against counts by hand."""

import math

import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import diversity

RANDOM = np.random.default_rng(0).integers(0, 3, (5, 9))


def test_entropies_of_known_counts():
    texts_BxL = np.array([[0, 1, 0, 1, 2], [3, 3, 3, 3, 3]])
    within = -(0.4 * math.log(0.4) * 2 + 0.2 * math.log(0.2)) / 2  # the second text has none
    assert diversity.entropy(texts_BxL) == pytest.approx(within)
    pairs = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / 2  # 01 10 01 12
    assert diversity.entropy(texts_BxL, n=2) == pytest.approx(pairs)
    pooled = -(2 * 0.2 * math.log(0.2) + 0.1 * math.log(0.1) + 0.5 * math.log(0.5))
    assert diversity.pooled_entropy(texts_BxL) == pytest.approx(pooled)
    assert diversity.distinct(texts_BxL, 2) == 4 / 8
    assert diversity.distinct(texts_BxL, 5) == 1


def brute_self_bleu(texts_BxL, n):
    """Every text against all others, by its definition."""
    found = []
    for i, text in enumerate(texts_BxL.tolist()):
        product = 1.0
        for m in range(1, n + 1):
            grams = lambda t, m=m: [tuple(t[j : j + m]) for j in range(len(t) - m + 1)]
            own, others = grams(text), [grams(t) for k, t in enumerate(texts_BxL.tolist()) if k != i]
            clipped = sum(min(own.count(g), max(other.count(g) for other in others)) for g in set(own))
            product *= clipped / len(own)
        found.append(product ** (1 / n))
    return np.mean(found)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_that_of_its_definition(n):
    assert 0 < brute_self_bleu(RANDOM, n) < 1
    assert diversity.self_bleu(RANDOM, n) == pytest.approx(brute_self_bleu(RANDOM, n))


def test_self_bleu_of_copies_and_of_strangers():
    assert diversity.self_bleu(np.tile(RANDOM[:1], (3, 1))) == pytest.approx(1)
    assert diversity.self_bleu(np.arange(12).reshape(2, 6)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diversity.entropy(RANDOM, 10), r"n: got 10; allowed: a whole number from 1 to 9 \(the length"),
        (lambda: diversity.distinct(RANDOM, 0), "n: got 0"),
        (lambda: diversity.self_bleu(RANDOM[:1]), "texts: got 1; allowed: at least 2"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
