"""Statistics of weighted rows: the form of a metric that can be computed once or resampled many times.

Every metric of this package is a `Statistic`: it prepares what does not depend on the weights (sorting, binning) once,
and is then called with one weight a row. All weights 1 gives the metric itself; how often a row was drawn gives a
bootstrap replicate of it. So a metric and its interval can never be two different formulas.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Statistic(Protocol):
    """A number computed from weighted rows."""

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        ...

    def __call__(self, weights: FloatArray) -> float:
        """The statistic with these weights; nan where it is undefined.

        Args:
            weights: (num_rows,) not negative.
        """
        ...


def evaluate(statistic: Statistic) -> float:
    """The statistic with all rows counted once."""
    return statistic(np.ones(statistic.num_rows))


def as_rows(name: str, values: ArrayLike, like: FloatArray | None = None) -> FloatArray:
    """Values as a one-dimensional float64 array.

    Args:
        name: what to call the values in an error.
        values: (num_rows,) finite numbers.
        like: an array whose length they must have.

    Raises:
        ValueError: not one-dimensional, not finite, empty, or of another length.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}, one value a row is needed")
    if len(array) == 0:
        raise ValueError(f"{name}: no rows, a metric needs at least one")
    if like is not None and len(array) != len(like):
        raise ValueError(f"{name}: {len(array)} values for {len(like)} rows")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name}: {array[row]} at row {row}, all values must be finite")
    return array


class Mean:
    """Weighted mean of a value a row: log loss of each row, NDCG of each query."""

    def __init__(self, values: ArrayLike) -> None:
        self._values = as_rows("values", values)

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._values)

    def __call__(self, weights: FloatArray) -> float:
        """The mean; nan when all weights are 0."""
        total = weights.sum()
        return float(weights @ self._values / total) if total > 0 else float("nan")
