"""MAUVE: how near the law of generated texts is to that of held-out ones, from features of a judge.

Both sets of features are put into clusters together; P and Q are the shares of the generated and of the held-out texts
in each. The score is the area under the curve of (exp(-c KL(Q || R)), exp(-c KL(P || R))) over mixtures R of P and Q,
in (0, 1], 1 for P = Q (Pillutla et al. 2021). It depends on the features and on the numbers of clusters and of texts:
scores with different settings cannot be compared.

Letters: B texts, F features, K clusters, M mixtures.
"""

from typing import NamedTuple

import numpy as np

from hdlm_jax.diffusion import fields
from hdlm_jax.errors import require

EXPLAINED = 0.9  # of the variance of the features that the principal components keep
ROUNDS = 500  # of the clustering, at most
STARTS = 5  # of the clustering; the tightest clusters are taken


class Mauve(NamedTuple):
    """A score and what it was measured with.

    Attributes:
      score: in (0, 1].
      clusters: K.
      generated: texts.
      held_out: texts.
      components: principal components of the features that were kept.
      scaling: c.
      mixtures: M.
      seed: of the clustering.
    """

    score: float
    clusters: int
    generated: int
    held_out: int
    components: int
    scaling: float
    mixtures: int
    seed: int


def mauve(
    generated_BxF: np.ndarray,
    held_out_BxF: np.ndarray,
    clusters: int | None = None,
    scaling: float = 5.0,
    mixtures: int = 25,
    seed: int = 0,
) -> Mauve:
    """The score of features of generated against those of held-out texts.

    Args:
      generated_BxF: one row per text.
      held_out_BxF: the same of held-out texts; as many of them is best.
      clusters: K; None is a tenth of the smaller number of texts, at least 2 and at most 500.
      scaling: c.
      mixtures: points of the curve.
      seed: of the clustering.

    Raises:
      UserError: features that are not finite or are all the same, more clusters than texts.
    """
    P, Q = len(generated_BxF), len(held_out_BxF)
    clusters = min(max(min(P, Q) // 10, 2), 500) if clusters is None else clusters
    fields.whole("--clusters", clusters, 2, min(P, Q), "the smaller number of texts")
    fields.number("scaling", scaling, "a positive number", lambda value: value > 0)
    fields.whole("mixtures", mixtures, 2)
    features_BxF = np.concatenate([generated_BxF, held_out_BxF]).astype(np.float64)
    require(bool(np.isfinite(features_BxF).all()), "features", "numbers that are not finite", "finite features")
    features_BxC = principal(_normalised(features_BxF))
    cluster_B = k_means(features_BxC, clusters, seed)
    share = lambda cluster: np.bincount(cluster, minlength=clusters) / len(cluster)
    score = area(share(cluster_B[:P]), share(cluster_B[P:]), scaling, mixtures)
    return Mauve(score, clusters, P, Q, features_BxC.shape[1], scaling, mixtures, seed)


def area(p_K: np.ndarray, q_K: np.ndarray, scaling: float = 5.0, mixtures: int = 25) -> float:
    """The area under the divergence curve of two laws, by trapezoids over both axes, averaged.

    >>> round(area(np.array([0.5, 0.5]), np.array([0.5, 0.5])), 6)
    1.0
    """
    weight_M = np.linspace(1e-6, 1 - 1e-6, mixtures)
    mixed_MxK = weight_M[:, None] * p_K + (1 - weight_M)[:, None] * q_K
    x_M, y_M = (np.exp(-scaling * _divergence(law_K, mixed_MxK)) for law_K in (q_K, p_K))
    x_M, y_M = np.concatenate([[0.0], x_M[::-1], [1.0]]), np.concatenate([[1.0], y_M[::-1], [0.0]])
    return float((np.trapezoid(y_M, x_M) + np.trapezoid(x_M[::-1], y_M[::-1])) / 2)


def _divergence(law_K: np.ndarray, mixed_MxK: np.ndarray) -> np.ndarray:
    """KL(law || mixture) of each mixture, nats [M]."""
    inside = law_K > 0
    return (law_K[inside] * np.log(law_K[inside] / mixed_MxK[:, inside])).sum(1)


def principal(features_BxF: np.ndarray) -> np.ndarray:
    """The fewest principal components that hold `EXPLAINED` of the variance, [B, C].

    Raises:
      UserError: features without variance.

    >>> principal(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])).shape
    (3, 1)
    """
    centred_BxF = features_BxF - features_BxF.mean(0)
    left_BxC, size_C, _ = np.linalg.svd(centred_BxF, full_matrices=False)
    variance_C = size_C**2
    allowed = "texts whose features differ"
    require(bool(variance_C.sum() > 1e-12 * (features_BxF**2).sum()), "features", "all the same", allowed)
    kept = int(np.searchsorted(np.cumsum(variance_C) / variance_C.sum(), EXPLAINED - 1e-12)) + 1
    return left_BxC[:, :kept] * size_C[:kept]


def k_means(features_BxF: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each row, int [B]: Lloyd's rounds from k-means++ centres, the tightest of `STARTS`.

    >>> cluster = k_means(np.array([[0.0], [0.1], [5.0], [5.1]]), 2, seed=0)
    >>> (cluster == cluster[0]).tolist()
    [True, True, False, False]
    """
    rng = np.random.default_rng(seed)
    return min((_lloyd(features_BxF, clusters, rng) for _ in range(STARTS)), key=lambda found: found[0])[1]


def _lloyd(x_BxF: np.ndarray, clusters: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Sum of squared distances to the centres, and the clusters."""
    centre_KxF, cluster_B = _spread(x_BxF, clusters, rng), None
    for _ in range(ROUNDS):
        distance_BxK = _distances(x_BxF, centre_KxF)
        before, cluster_B = cluster_B, distance_BxK.argmin(1)
        if before is not None and (before == cluster_B).all():
            break
        for k in range(clusters):
            members = x_BxF[cluster_B == k]  # none where rows are the same: the centre stays
            centre_KxF[k] = members.mean(0) if len(members) else centre_KxF[k]
    return float(distance_BxK.min(1).sum()), cluster_B


def _spread(x_BxF: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """First centres: rows drawn in proportion to their squared distance from those before (k-means++)."""
    centres = [x_BxF[rng.integers(len(x_BxF))]]
    nearest_B = _distances(x_BxF, centres[0][None])[:, 0]
    for _ in range(clusters - 1):
        total = nearest_B.sum()
        chance_B = nearest_B / total if total > 0 else None  # fewer different rows than clusters
        centres.append(x_BxF[rng.choice(len(x_BxF), p=chance_B)])
        nearest_B = np.minimum(nearest_B, _distances(x_BxF, centres[-1][None])[:, 0])
    return np.array(centres)


def _distances(x_BxF: np.ndarray, centre_KxF: np.ndarray) -> np.ndarray:
    """Squared distances [B, K], never below 0."""
    square = (x_BxF**2).sum(1)[:, None] + (centre_KxF**2).sum(1)[None, :] - 2 * x_BxF @ centre_KxF.T
    return np.maximum(square, 0.0)


def _normalised(features_BxF: np.ndarray) -> np.ndarray:
    return features_BxF / np.maximum(np.linalg.norm(features_BxF, axis=1, keepdims=True), 1e-12)
