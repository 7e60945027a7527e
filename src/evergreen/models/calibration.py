"""Platt scaling: from a score to a probability that means what it says.

Source: Platt 1999, Probabilistic outputs for support vector machines. Deviates: in place of Platt's smoothed targets a
normal prior of mean 1 and variance 1 lies on the slope alone, so the mean of the probabilities equals the click rate of
the rows fitted on, and separable or constant scores have a finite answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evergreen.contracts.artifact import JsonModel

_MIN_SLOPE = 1e-3  # above 0: calibration may flatten a model that knows nothing, it never turns its order around
_ITERATIONS = 100
_TOLERANCE = 1e-9


class Calibration(JsonModel):
    """probability = sigmoid(slope * score + intercept)."""

    slope: float
    intercept: float

    def apply(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) probabilities in [0, 1] of (n,) scores."""
        return sigmoid(self.slope * scores.astype(np.float64) + self.intercept)


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function that does not overflow."""
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return result


def fit_platt(
    scores: NDArray[np.floating], labels: NDArray[np.floating], *, min_slope: float = _MIN_SLOPE
) -> Calibration:
    """Fit slope and intercept by Newton's method.

    Args:
        scores: (n,) of any scale.
        labels: (n,) 0 or 1; both occur.
        min_slope: slopes below are raised to it and the intercept is fitted again.

    Raises:
        ValueError: only one class occurs.
    """
    x, y = scores.astype(np.float64), labels.astype(np.float64)
    rate = float(y.mean())
    if not 0 < rate < 1:
        raise ValueError(f"calibration needs both classes, the rows have a click rate of {rate}")
    line = np.array([1.0, _shift(x, rate)])
    for _ in range(_ITERATIONS):
        p = sigmoid(line[0] * x + line[1])
        weight = p * (1 - p)
        gradient = np.array([(p - y) @ x + line[0] - 1.0, (p - y).sum()])
        cross = weight @ x
        hessian = np.array([[weight @ (x * x) + 1.0, cross], [cross, weight.sum() + 1e-9]])
        step = np.linalg.solve(hessian, gradient)
        # Where the curve is flat a full Newton step overshoots: halve it until the loss falls.
        loss = _penalised_loss(line, x, y)
        while not _penalised_loss(line - step, x, y) <= loss and np.abs(step).max() > _TOLERANCE:
            step = step / 2
        line = line - step
        if np.abs(step).max() <= _TOLERANCE:
            break
    slope = max(float(line[0]), min_slope)
    return Calibration(slope=slope, intercept=_shift(slope * x, rate))


def _penalised_loss(line: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Cross-entropy of all rows plus the prior on the slope."""
    logit = line[0] * x + line[1]
    return float((np.logaddexp(0.0, logit) - y * logit).sum() + 0.5 * (line[0] - 1.0) ** 2)


def _shift(logits: NDArray[np.float64], rate: float) -> float:
    """The intercept at which the mean probability is `rate`, by bisection."""
    target = float(np.log(rate / (1 - rate)))
    low, high = target - float(logits.max()), target - float(logits.min())
    for _ in range(100):
        middle = 0.5 * (low + high)
        if float(sigmoid(logits + middle).mean()) < rate:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
