"""Cluster bootstrap: how sure is a metric, and how sure is the difference of two models?

Rows of one user are not independent, so users are drawn, with replacement, and all of a user's rows go along. Models
are compared on the same draws, so what makes a day hard for both of them cancels in the difference.

Source: Efron and Tibshirani 1993 (percentile intervals); Field and Welsh 2007 (clusters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evergreen.metrics.statistic import FloatArray, IntArray, Statistic, evaluate

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with the 95 % interval around it. nan where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0 (never so when it is undefined)."""
        return self.low > 0 or self.high < 0


def _interval(value: float, replicates: FloatArray) -> Interval:
    finite = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or len(finite) == 0:
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of the rows as they are, and of every draw of clusters; all statistics see the same draws."""

    values: dict[str, float]
    replicates: dict[str, FloatArray]
    """By statistic, (num_replicates,); nan where a draw leaves it undefined (no click in it)."""
    num_clusters: int

    def interval(self, name: str) -> Interval:
        """A statistic and its 95 % percentile interval, over the draws in which it is defined."""
        return _interval(self.values[name], self.replicates[name])

    def difference(self, name: str, other: str) -> Interval:
        """`name` minus `other`, paired draw by draw, and its 95 % percentile interval."""
        return _interval(self.values[name] - self.values[other], self.replicates[name] - self.replicates[other])


def cluster_bootstrap(
    statistics: Mapping[str, Statistic], clusters: ArrayLike, *, num_replicates: int = 200, seed: int = 0
) -> Bootstrap:
    """Resample clusters and compute every statistic on each draw.

    Memory is one weight a row; time is num_replicates times one call of every statistic.

    Args:
        statistics: what to compute, by name; all over the same rows.
        clusters: (num_rows,) integers from 0: which cluster a row belongs to.
        num_replicates: how many draws.
        seed: of the draws; the same seed gives the same draws whatever the statistics are.

    Raises:
        ValueError: num_replicates is below 1, a cluster is negative, or a statistic is of other rows.
    """
    codes: IntArray = np.asarray(clusters, dtype=np.int64)
    if num_replicates < 1:
        raise ValueError(f"num_replicates={num_replicates}: must be at least 1")
    if codes.ndim != 1 or len(codes) == 0 or codes.min() < 0:
        raise ValueError(f"clusters: shape {codes.shape}, needed is one integer from 0 for each row")
    for name, statistic in statistics.items():
        if statistic.num_rows != len(codes):
            raise ValueError(f"{name}: {statistic.num_rows} rows, but there are {len(codes)} clusters")
    # Codes without gaps, or draws of clusters that have no row here would shrink the sample.
    _, codes = np.unique(codes, return_inverse=True)
    num_clusters = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    replicates = {name: np.empty(num_replicates) for name in statistics}
    for r in range(num_replicates):
        # Counting uniform draws is a multinomial sample, several times faster than rng.multinomial.
        drawn = np.bincount(rng.integers(0, num_clusters, num_clusters), minlength=num_clusters)
        weights = drawn.astype(np.float64)[codes]
        for name, statistic in statistics.items():
            replicates[name][r] = statistic(weights)
    return Bootstrap({name: evaluate(s) for name, s in statistics.items()}, replicates, num_clusters)
