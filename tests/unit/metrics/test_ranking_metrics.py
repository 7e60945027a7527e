"""Ranking metrics of one query: by hand, against sklearn, and with ties in expectation."""

import itertools
import math

import numpy as np
import pytest
from sklearn import metrics as reference

from evergreen.metrics.ranking import ndcg_at_k, recall_at_k


def test_ndcg_by_hand():
    # Relevant at ranks 1 and 3 of 4; ideal is ranks 1 and 2.
    got = ndcg_at_k([4.0, 3.0, 2.0, 1.0], [True, False, True, False], k=10)
    assert got == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


def test_recall_counts_the_relevant_within_the_cutoff():
    scores, relevant = [4.0, 3.0, 2.0, 1.0], [True, False, True, False]
    assert [recall_at_k(scores, relevant, k=k) for k in (1, 2, 3, 4)] == [0.5, 0.5, 1.0, 1.0]


def test_ndcg_equals_sklearn_without_ties():
    rng = np.random.default_rng(0)
    scores, relevant = rng.permutation(200).astype(float), rng.random(200) < 0.05
    expected = reference.ndcg_score([relevant], [scores], k=10)
    assert ndcg_at_k(scores, relevant, k=10) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [ndcg_at_k, recall_at_k])
def test_ties_are_the_mean_over_all_orders(metric):
    scores = np.array([1.0, 1.0, 1.0, 2.0, 0.0])
    relevant = np.array([True, False, True, False, True])
    orders = [
        metric(scores + 0.01 * np.array([*order, 0, 0]), relevant, k=2) for order in itertools.permutations(range(3))
    ]
    assert metric(scores, relevant, k=2) == pytest.approx(np.mean(orders))


def test_a_constant_score_is_worth_a_shuffle():
    assert recall_at_k(np.zeros(100), np.arange(100) == 7, k=10) == pytest.approx(0.1)


def test_the_order_of_listing_does_not_matter():
    rng = np.random.default_rng(3)
    scores, relevant = rng.integers(0, 5, 50).astype(float), rng.random(50) < 0.2
    order = rng.permutation(50)
    assert ndcg_at_k(scores, relevant, k=5) == pytest.approx(ndcg_at_k(scores[order], relevant[order], k=5))


def test_a_cutoff_beyond_the_list_is_the_whole_list():
    assert recall_at_k([2.0, 1.0], [False, True], k=20) == 1.0
    assert ndcg_at_k([2.0, 1.0], [False, True], k=20) == pytest.approx(1 / math.log2(3))


def test_more_relevant_items_than_the_cutoff_can_still_be_perfect():
    assert ndcg_at_k([3.0, 2.0, 1.0], [True, True, True], k=2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scores", "relevant", "k", "message"),
    [
        ([1.0], [True], 0, "k=0: must be at least 1"),
        ([1.0, 2.0], [False, False], 1, "none of 2 items is relevant"),
        ([1.0, math.nan], [True, False], 1, "nan at row 1"),
        ([1.0, 2.0], [True], 1, "for 2 scores"),
    ],
)
def test_malformed_queries_are_refused(scores, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        ndcg_at_k(scores, relevant, k=k)
