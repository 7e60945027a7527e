"""Metrics of predicted ratings."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from evergreen.metrics.statistic import FloatArray, Mean, as_rows, evaluate


class RootMeanSquaredError(Mean):
    """Root of the mean squared error, in the unit of the rating."""

    def __init__(self, labels: ArrayLike, predictions: ArrayLike) -> None:
        y = as_rows("labels", labels)
        super().__init__(np.square(as_rows("predictions", predictions, y) - y))

    def __call__(self, weights: FloatArray) -> float:
        """The error, at least 0; nan when all weights are 0."""
        return math.sqrt(super().__call__(weights))


class MeanAbsoluteError(Mean):
    """Mean absolute error, in the unit of the rating."""

    def __init__(self, labels: ArrayLike, predictions: ArrayLike) -> None:
        y = as_rows("labels", labels)
        super().__init__(np.abs(as_rows("predictions", predictions, y) - y))


def rmse(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Root mean squared error, in the unit of the rating."""
    return evaluate(RootMeanSquaredError(labels, predictions))


def mae(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean absolute error, in the unit of the rating."""
    return evaluate(MeanAbsoluteError(labels, predictions))
