"""MAUVE against closed forms of its curve, and its clusters on points that leave no doubt."""

import itertools

import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.evaluation.mauve import area, k_means, mauve, principal


def test_the_area_of_laws_without_overlap_is_a_beta_function():
    """x = (1 - w)^5, y = w^5: the integral of y over x is 5 B(5, 6) = 1/252."""
    p_K, q_K = np.array([0.3, 0.7, 0.0]), np.array([0.0, 0.0, 1.0])
    assert area(p_K, q_K, mixtures=4000) == pytest.approx(1 / 252, rel=1e-5)
    assert area(p_K, q_K, scaling=1.0, mixtures=4000) == pytest.approx(1 / 2, rel=1e-3)  # 1 B(1, 2)


def test_the_area_is_symmetric_and_falls_with_the_distance():
    rng = np.random.default_rng(0)
    p_K, q_K = rng.dirichlet(np.ones(6), 2)
    assert area(p_K, q_K) == pytest.approx(area(q_K, p_K), rel=1e-9)
    nearer = [area(p_K, share * p_K + (1 - share) * q_K) for share in (0.0, 0.5, 0.9, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(nearer))
    assert nearer[-1] == pytest.approx(1)


def test_clusters_that_stand_apart_are_found():
    rng = np.random.default_rng(1)
    centres_KxF = 20 * np.eye(5)
    truth_B = rng.integers(0, 5, 200)
    cluster_B = k_means(centres_KxF[truth_B] + rng.normal(size=(200, 5)), 5, seed=0)
    assert len(set(zip(truth_B, cluster_B, strict=True))) == 5  # one name for each


def test_fewer_different_rows_than_clusters():
    cluster_B = k_means(np.repeat(np.eye(2), 5, axis=0), 3, seed=0)
    assert len(set(cluster_B[:5])) == len(set(cluster_B[5:])) == 1
    assert cluster_B[0] != cluster_B[5]


def test_components_keep_the_variance_and_the_distances():
    rng = np.random.default_rng(2)
    x_BxF = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 6))
    kept = principal(x_BxF)
    assert kept.shape[1] <= 2
    centred = x_BxF - x_BxF.mean(0)
    assert 0.9 <= (kept**2).sum() / (centred**2).sum() <= 1 + 1e-12


def test_scores_tell_the_same_law_from_another():
    rng = np.random.default_rng(3)
    centres_KxF = np.array([[5.0, 0, 1], [0, 5, 1], [5, 5, 1]])
    draw = lambda p, count: centres_KxF[rng.choice(3, count, p=p)] + 0.1 * rng.normal(size=(count, 3))
    held_out = draw([0.5, 0.3, 0.2], 400)
    same = mauve(draw([0.5, 0.3, 0.2], 400), held_out, clusters=3)
    other = mauve(draw([0.05, 0.05, 0.9], 400), held_out, clusters=3)
    assert same.score > 0.97
    assert other.score < 0.5
    law = area(np.array([0.05, 0.05, 0.9]), np.array([0.5, 0.3, 0.2]))
    assert other.score == pytest.approx(law, abs=0.08)
    assert (same.clusters, same.generated, same.held_out, same.scaling, same.mixtures) == (3, 400, 400, 5.0, 25)
    assert mauve(held_out, held_out).clusters == 40
    assert mauve(held_out, held_out).score == pytest.approx(1)


@pytest.mark.parametrize(
    ("features", "clusters", "message"),
    [
        (np.full((4, 2), np.nan), 2, "features: got 'numbers that are not finite'"),
        (np.ones((4, 2)), 2, "features: got 'all the same'"),
        (np.eye(4), 5, r"--clusters: got 5; allowed: a whole number from 2 to 4 \(the smaller number of texts\)"),
    ],
)
def test_what_has_no_score_is_refused(features, clusters, message):
    with pytest.raises(UserError, match=message):
        mauve(features, features, clusters)
