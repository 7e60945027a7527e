"""Metrics of one query's ranked items, with binary relevance.

Items of equal score have no order. Each metric is its expected value over all orders of the tied items (McSherry and
Najork 2008, Computing information retrieval performance measures efficiently in the presence of tied scores): a model
that scores everything alike is worth as much as a shuffle, and nothing hangs on the order in which items were listed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evergreen.metrics.statistic import FloatArray, IntArray, as_rows


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")


def relevant_ranks(scores: ArrayLike, relevant: ArrayLike) -> tuple[IntArray, IntArray]:
    """Where the relevant items of a query land.

    Args:
        scores: (num_items,) higher is better.
        relevant: (num_items,) bool.

    Returns:
        For each relevant item, how many items score strictly higher, and how many score the same (itself included).

    Raises:
        ValueError: no item is relevant, a score is not finite, or the lengths differ.
    """
    s = as_rows("scores", scores)
    mask: NDArray[np.bool_] = np.asarray(relevant, dtype=bool)
    if mask.shape != s.shape:
        raise ValueError(f"relevant: shape {mask.shape} for {len(s)} scores")
    if not mask.any():
        raise ValueError(f"relevant: none of {len(s)} items is relevant, leave such a query out")
    ordered = np.sort(s)
    lower = np.searchsorted(ordered, s[mask], side="left")
    upper = np.searchsorted(ordered, s[mask], side="right")
    return len(s) - upper, upper - lower


def _expected_gain(higher: IntArray, tied: IntArray, gain_at_rank: FloatArray) -> float:
    """Sum over items of the mean gain of the ranks that an item may land on; gain is 0 beyond the array."""
    cumulative = np.concatenate([[0.0], np.cumsum(gain_at_rank)])
    first = np.minimum(higher, len(gain_at_rank))
    last = np.minimum(higher + tied, len(gain_at_rank))
    return float(((cumulative[last] - cumulative[first]) / tied).sum())


def ndcg_of_ranks(higher: IntArray, tied: IntArray, *, k: int) -> float:
    """NDCG@k from `relevant_ranks`, for several cutoffs of one query without sorting again."""
    _check_cutoff(k)
    discount = 1 / np.log2(np.arange(2, k + 2))
    return _expected_gain(higher, tied, discount) / float(discount[: min(k, len(higher))].sum())


def recall_of_ranks(higher: IntArray, tied: IntArray, *, k: int) -> float:
    """Recall@k from `relevant_ranks`, for several cutoffs of one query without sorting again."""
    _check_cutoff(k)
    return _expected_gain(higher, tied, np.ones(k)) / len(higher)


def ndcg_at_k(scores: ArrayLike, relevant: ArrayLike, *, k: int) -> float:
    """NDCG@k of one query, in [0, 1].

    Args:
        scores: (num_items,) higher is better.
        relevant: (num_items,) bool, at least one true.
        k: cutoff, in ranks; may exceed the number of items.

    Raises:
        ValueError: k is below 1, no item is relevant, a score is not finite, or the lengths differ.

    Source: Jarvelin and Kekalainen 2002, binary gains.
    """
    _check_cutoff(k)
    return ndcg_of_ranks(*relevant_ranks(scores, relevant), k=k)


def recall_at_k(scores: ArrayLike, relevant: ArrayLike, *, k: int) -> float:
    """Share of a query's relevant items that are among the first k, in [0, 1].

    Args:
        scores: (num_items,) higher is better.
        relevant: (num_items,) bool, at least one true.
        k: cutoff, in ranks; may exceed the number of items.

    Raises:
        ValueError: k is below 1, no item is relevant, a score is not finite, or the lengths differ.
    """
    _check_cutoff(k)
    return recall_of_ranks(*relevant_ranks(scores, relevant), k=k)
