"""How varied texts are: entropy of their n-grams, distinct n-grams, self-BLEU.

All of them count n-grams of tokens: compare texts of the same tokenizer, length and number only.
Letters: B texts of L tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from hdlm_jax.diffusion import fields
from hdlm_jax.errors import require


def entropy(tokens_BxL: np.ndarray, n: int = 1) -> float:
    """Entropy of the n-grams within a text, nats, averaged over texts; low where texts repeat themselves.

    At most log(L - n + 1).

    >>> texts_BxL = np.array([[0, 0, 0, 0], [0, 1, 0, 1]])
    >>> round(entropy(texts_BxL), 4), round(entropy(texts_BxL, n=2), 4)
    (0.3466, 0.3183)
    """
    return float(np.mean([_entropy(counts.values()) for counts in _ngrams(tokens_BxL, n)]))


def pooled_entropy(tokens_BxL: np.ndarray, n: int = 1) -> float:
    """Entropy of the n-grams of all texts together, nats; low where texts repeat each other too.

    It is that of the empirical law, which is below the true law's while n-grams are many and texts few.

    >>> round(pooled_entropy(np.array([[0, 0, 0, 0], [1, 1, 1, 1]])), 4)
    0.6931
    """
    return _entropy(sum(_ngrams(tokens_BxL, n), Counter()).values())


def distinct(tokens_BxL: np.ndarray, n: int) -> float:
    """distinct-n: different n-grams of all texts together, as a share of all n-grams (Li et al. 2016).

    >>> distinct(np.array([[0, 1, 0, 1], [0, 1, 2, 2]]), n=2)
    0.6666666666666666
    """
    counts = sum(_ngrams(tokens_BxL, n), Counter())
    return len(counts) / counts.total()


def self_bleu(tokens_BxL: np.ndarray, n: int = 4) -> float:
    """Mean BLEU of each text with all others for references (Zhu et al. 2018): 1 where texts are copies.

    The geometric mean of the clipped precisions of 1- to n-grams; no smoothing, so a text without any shared n-gram
    has 0; no brevity penalty, since all texts are of one length.

    Raises:
      UserError: fewer than two texts, n longer than they are.

    >>> round(self_bleu(np.array([[0, 1, 2], [0, 1, 3]]), n=2), 4)  # precisions 2/3 and 1/2 each
    0.5774
    """
    require(len(tokens_BxL) >= 2, "texts", len(tokens_BxL), "at least 2 (each is compared with the others)")
    log_BxN = [[_log_precision(own, most) for own, most in _against_others(tokens_BxL, m)] for m in range(1, n + 1)]
    return float(np.exp(np.mean(log_BxN, axis=0)).mean())


def _against_others(tokens_BxL: np.ndarray, n: int) -> Iterable[tuple[Counter, dict]]:
    """Each text's n-grams, and for each of them the most that any other text holds."""
    texts = _ngrams(tokens_BxL, n)
    first, second = Counter(), Counter()  # the two largest counts of every n-gram over the texts
    for counts in texts:
        for gram, count in counts.items():
            low, first[gram] = sorted((first[gram], count))
            second[gram] = max(second[gram], low)
    for counts in texts:
        yield counts, {gram: second[gram] if count == first[gram] else first[gram] for gram, count in counts.items()}


def _log_precision(own: Counter, most: dict) -> float:
    shared = sum(min(count, most[gram]) for gram, count in own.items())
    return math.log(shared / own.total()) if shared else -math.inf


def _ngrams(tokens_BxL: np.ndarray, n: int) -> list[Counter]:
    L = tokens_BxL.shape[1]
    fields.whole("n", n, 1, L, "the length of the texts")
    return [Counter(tuple(text[i : i + n]) for i in range(L - n + 1)) for text in tokens_BxL.tolist()]


def _entropy(counts: Iterable[int]) -> float:
    p = np.array(list(counts)) / sum(counts)
    return float(-(p * np.log(p)).sum())
