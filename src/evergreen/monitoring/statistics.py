"""Is the difference of two samples of clustered rows more than chance? Tests on how rows spread over cells.

Rows of one user are alike, so 100,000 rows of 1,000 users tell little more than 1,000 do. What is tested is therefore
each user's total in each cell: their spread from user to user says how far shares move by chance, whatever the rows of
a user have to do with each other. That is an estimate in closed form (the sandwich), which reaches the small p-values
that many tests at a time need; a bootstrap by user would take 100,000 draws for one of 1e-4.

Samples are taken as independent. Users who are in both make their difference vary less than that, so p-values err on
the side of no drift.

Shapes: G clusters, K cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FloatArray = NDArray[np.float64]

_MIN_CLUSTERS_A_CELL = 10
"""Clusters of both samples that must have rows in a cell; rarer ones are put together."""


@dataclass(frozen=True)
class CellShares:
    """How the rows of a sample are spread over cells, and how sure that is."""

    shares: FloatArray
    """(K,) adding up to 1."""
    covariance: FloatArray
    """(K, K) of the shares, robust to clusters."""
    clusters: NDArray[np.int64]
    """(K,) that have rows in each cell."""
    effective_clusters: float
    """(sum n)^2 / sum n^2 of the clusters' rows: one cluster with most of the rows leaves little more than one."""

    @classmethod
    def from_totals(cls, totals: FloatArray) -> CellShares:
        """Measure.

        Args:
            totals: (G, K) rows, or their weights, of each cluster in each cell; at least one is positive.

        Source: Liang and Zeger 1986 (the sandwich); Carter, Schnepel and Steigerwald 2017 (effective clusters).
        """
        sizes = totals.sum(axis=1)
        totals, sizes = totals[sizes > 0], sizes[sizes > 0]
        num_clusters, total = len(sizes), sizes.sum()
        shares = totals.sum(axis=0) / total
        scores = (totals - sizes[:, None] * shares) / total
        return cls(
            shares=shares,
            covariance=scores.T @ scores * (num_clusters / max(num_clusters - 1, 1)),
            clusters=np.count_nonzero(totals, axis=0),
            effective_clusters=float(total**2 / (sizes @ sizes)),
        )

    def project(self, matrix: FloatArray, clusters: NDArray[np.int64]) -> CellShares:
        """The shares under a linear map (J, K), near these shares."""
        return CellShares(matrix @ self.shares, matrix @ self.covariance @ matrix.T, clusters, self.effective_clusters)

    def known(self) -> CellShares:
        """The shares among the rows that are in any but the last cell, which holds what is missing."""
        present = self.shares[:-1].sum()
        shares = self.shares[:-1] / present
        jacobian = (np.eye(len(shares)) - shares[:, None]) / present
        covariance = jacobian @ self.covariance[:-1, :-1] @ jacobian.T
        return CellShares(shares, covariance, self.clusters[:-1], self.effective_clusters)


def mean_p_value(one: CellShares, other: CellShares, scores: FloatArray) -> float:
    """Chance that the means of two samples lie as far apart, if they are the same: Welch's t-test on clusters.

    Args:
        one: of the one sample.
        other: of the other sample, the same cells.
        scores: (K,) value of each cell.
    """
    difference = float(scores @ (one.shares - other.shares))
    variances = [(float(scores @ v @ scores), n) for v, n in _covariances(one, other)]
    total = sum(variance for variance, _ in variances)
    if total <= 0:
        return 1.0
    freedom = total**2 / sum(variance**2 / max(n - 1, 1) for variance, n in variances)
    return float(2 * stats.t.sf(abs(difference) / np.sqrt(total), freedom))


def shape_p_value(one: CellShares, other: CellShares) -> float:
    """Chance that all shares of two samples lie as far apart, if they are the same: Hotelling's test on clusters.

    Rare cells are put together, since a few clusters do not tell how a share varies.

    Source: Hotelling 1931 with the degrees of freedom of Nel and van der Merwe 1986, as covariances differ.
    """
    one, other = _pool_rare_cells(one, other)
    # Shares add up to 1, so the largest cell follows from the others.
    kept = np.delete(np.arange(len(one.shares)), np.argmax(one.shares + other.shares))
    difference = (one.shares - other.shares)[kept]
    if not difference.any():
        return 1.0
    size = len(kept)
    parts = [(v[np.ix_(kept, kept)], n) for v, n in _covariances(one, other)]
    total = parts[0][0] + parts[1][0]
    spread = sum(_squares(part) / max(n - 1, 1) for part, n in parts)
    left = _squares(total) / spread - size + 1
    if left <= 0:
        return 1.0
    distance = float(difference @ np.linalg.solve(total, difference))
    return float(stats.f.sf(distance * left / ((left + size - 1) * size), size, left))


def _squares(covariance: FloatArray) -> float:
    return float(np.trace(covariance @ covariance) + np.trace(covariance) ** 2)


def _covariances(one: CellShares, other: CellShares) -> list[tuple[FloatArray, float]]:
    """Covariance and effective clusters of both samples.

    Where all clusters agree there is no spread, which is not certainty: one more cluster might have been unlike them.
    So a part of the spread is added that is one cluster's in a sample of single rows.
    """
    middle = (one.shares + other.shares) / 2
    spread = np.diag(middle) - np.outer(middle, middle)
    return [(s.covariance + spread / s.effective_clusters**2, s.effective_clusters) for s in (one, other)]


def _pool_rare_cells(one: CellShares, other: CellShares) -> tuple[CellShares, CellShares]:
    """Both samples, with cells that few clusters have rows in put together, and with the rarest of the others."""
    clusters = one.clusters + other.clusters
    cells = np.flatnonzero(clusters)
    order = cells[np.argsort(clusters[cells], kind="stable")]
    num_pooled = int(np.count_nonzero(clusters[order] < _MIN_CLUSTERS_A_CELL))
    if num_pooled and clusters[order[:num_pooled]].sum() < _MIN_CLUSTERS_A_CELL:
        num_pooled += 1
    groups = ([order[:num_pooled]] if num_pooled else []) + [np.array([cell]) for cell in order[num_pooled:]]
    matrix = np.zeros((len(groups), len(clusters)))
    for row, members in enumerate(groups):
        matrix[row, members] = 1.0
    counts = (matrix @ clusters).astype(np.int64)
    return one.project(matrix, counts), other.project(matrix, counts)


def jensen_shannon(one: FloatArray, other: FloatArray) -> float:
    """Distance of two distributions, in [0, 1]: the root of their Jensen-Shannon divergence in bits.

    Source: Endres and Schindelin 2003.
    """
    middle = (one + other) / 2
    divergence = 0.0
    for shares in (one, other):
        held = shares > 0
        divergence += float(shares[held] @ np.log2(shares[held] / middle[held])) / 2
    return float(np.sqrt(max(divergence, 0.0)))


def normal_scores(shares: FloatArray) -> FloatArray:
    """(K,) of ordered cells: the normal quantile of the middle of each cell's ranks; no outlier can pull at them."""
    middle = np.cumsum(shares) - shares / 2
    scores: FloatArray = stats.norm.ppf(np.clip(middle / shares.sum(), 1e-4, 1 - 1e-4))
    return scores


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """(n,) adjusted p-values: of those at most q, a share of at most q is false.

    The aspects of a column, and columns of one user, lean the same way; under such dependence the promise holds.

    Source: Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001 (positive dependence).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)[::-1]
    ranks = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.minimum.accumulate(p[order] * len(p) / ranks), 1.0)
    return adjusted
