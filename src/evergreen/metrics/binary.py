"""Metrics of predicted probabilities against what happened: 1 a click, 0 none.

With one class only, AUC and normalized entropy are undefined and come out as nan, so that a bootstrap replicate without
a click does not stop the run; who reports them says why. Malformed input (a label that is neither 0 nor 1, a
probability outside [0, 1], nan) is a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evergreen.metrics.statistic import FloatArray, IntArray, Mean, as_rows, evaluate

PROBABILITY_FLOOR = 1e-7
"""Probabilities are kept this far from 0 and 1 under a logarithm: models score in float32, which knows no finer."""


def _as_labels(labels: ArrayLike) -> FloatArray:
    array = as_rows("labels", labels)
    if not np.isin(array, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(array, (0.0, 1.0)))[0])
        raise ValueError(f"labels: {array[row]} at row {row}, a label is 0 or 1")
    return array


def _as_probabilities(probabilities: ArrayLike, labels: FloatArray) -> FloatArray:
    array = as_rows("probabilities", probabilities, labels)
    outside = (array < 0) | (array > 1)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"probabilities: {array[row]} at row {row}, must lie in [0, 1]: is this a raw score?")
    return array


class Auc:
    """Area under the ROC curve: the chance that a click is scored above a non-click, ties counting half.

    Negatives are sorted once; a call costs one gather and one cumulative sum over them, and a lookup for each positive.

    Source: Hanley and McNeil 1982 (the Mann-Whitney form).
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike) -> None:
        y = _as_labels(labels)
        s = as_rows("scores", scores, y)
        self._num_rows = len(y)
        self._positives: IntArray = np.flatnonzero(y == 1)
        negatives = np.flatnonzero(y == 0)
        self._negatives: IntArray = negatives[np.argsort(s[negatives], kind="stable")]
        below = s[self._negatives]
        self._lower: IntArray = np.searchsorted(below, s[self._positives], side="left")
        self._upper: IntArray = np.searchsorted(below, s[self._positives], side="right")

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return self._num_rows

    def __call__(self, weights: FloatArray) -> float:
        """The area in [0, 1]; nan when one of the classes has no weight."""
        beaten = np.zeros(len(self._negatives) + 1)
        np.cumsum(weights[self._negatives], out=beaten[1:])
        positive_weights = weights[self._positives]
        pairs = positive_weights.sum() * beaten[-1]
        if pairs <= 0:
            return float("nan")
        return float(positive_weights @ (beaten[self._lower] + beaten[self._upper]) / (2 * pairs))


def _row_log_loss(labels: FloatArray, probabilities: FloatArray) -> FloatArray:
    p = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    loss: FloatArray = -np.where(labels == 1, np.log(p), np.log1p(-p))
    return loss


class LogLoss(Mean):
    """Mean negative log likelihood, in nats."""

    def __init__(self, labels: ArrayLike, probabilities: ArrayLike) -> None:
        y = _as_labels(labels)
        super().__init__(_row_log_loss(y, _as_probabilities(probabilities, y)))


class NormalizedEntropy:
    """Log loss divided by the entropy of the click rate of the rows evaluated; below 1 beats knowing only that rate.

    Source: He et al. 2014, Practical lessons from predicting clicks on ads at Facebook.
    """

    def __init__(self, labels: ArrayLike, probabilities: ArrayLike) -> None:
        self._labels = _as_labels(labels)
        self._loss = _row_log_loss(self._labels, _as_probabilities(probabilities, self._labels))

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._labels)

    def __call__(self, weights: FloatArray) -> float:
        """The ratio, at least 0; nan when one of the classes has no weight."""
        total = weights.sum()
        clicked = weights @ self._labels
        if not 0 < clicked < total:
            return float("nan")
        rate = clicked / total
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(weights @ self._loss / total / entropy)


class CalibrationError:
    """Expected calibration error: mean |predicted - actual click rate| over bins that hold equally many rows.

    Bins are cut on all rows at once and stay where they are when rows are resampled. Equal scores share a bin. It is
    never negative, so it is above 0 for a perfectly calibrated model on finite data, and a bootstrap interval of it
    lies high; compare models by it, do not test it against 0.

    Source: Naeini et al. 2015, with the equal-mass bins of Nguyen and O'Connor 2015.
    """

    def __init__(self, labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 10) -> None:
        y = _as_labels(labels)
        p = _as_probabilities(probabilities, y)
        self._bins = equal_mass_bins(p, num_bins=num_bins)
        self._residuals = p - y

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._residuals)

    def __call__(self, weights: FloatArray) -> float:
        """The error in [0, 1]; nan when all weights are 0."""
        total = weights.sum()
        if total <= 0:
            return float("nan")
        return float(np.abs(np.bincount(self._bins, weights=weights * self._residuals)).sum() / total)


def equal_mass_bins(values: FloatArray, *, num_bins: int) -> IntArray:
    """The bin of each row, (num_rows,), such that bins hold about equally many rows and ties share a bin.

    Raises:
        ValueError: num_bins is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: must be at least 1")
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first_of_tie = np.searchsorted(ordered, ordered, side="left")
    bins = np.empty(len(values), dtype=np.int64)
    bins[order] = first_of_tie * num_bins // len(values)
    return bins


class ClickRateRatio:
    """Predicted clicks over actual clicks; 1 is calibrated on the whole, above 1 promises too much."""

    def __init__(self, labels: ArrayLike, probabilities: ArrayLike) -> None:
        self._labels = _as_labels(labels)
        self._probabilities = _as_probabilities(probabilities, self._labels)

    @property
    def num_rows(self) -> int:
        """How many rows it is computed from."""
        return len(self._labels)

    def __call__(self, weights: FloatArray) -> float:
        """The ratio; nan when no click has weight."""
        clicked = weights @ self._labels
        return float(weights @ self._probabilities / clicked) if clicked > 0 else float("nan")


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve in [0, 1]; nan with one class. See `Auc`."""
    return evaluate(Auc(labels, scores))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log likelihood in nats. See `LogLoss`."""
    return evaluate(LogLoss(labels, probabilities))


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss over the entropy of the click rate of these rows; nan with one class. See `NormalizedEntropy`."""
    return evaluate(NormalizedEntropy(labels, probabilities))


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 10) -> float:
    """Mean |predicted - actual click rate| over equal-mass bins, in [0, 1]. See `CalibrationError`."""
    return evaluate(CalibrationError(labels, probabilities, num_bins=num_bins))


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar predicted probability, and how often they were clicked."""

    rows: int
    predicted: float
    actual: float


def calibration_curve(labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 10) -> list[CalibrationBin]:
    """Mean predicted probability and click rate of each equal-mass bin that has rows, from low to high.

    Args:
        labels: (num_rows,) 0 or 1.
        probabilities: (num_rows,) in [0, 1].
        num_bins: how many bins to cut; ties may leave fewer.
    """
    y = _as_labels(labels)
    p = _as_probabilities(probabilities, y)
    bins = equal_mass_bins(p, num_bins=num_bins)
    rows = np.bincount(bins)
    predicted, actual = np.bincount(bins, weights=p), np.bincount(bins, weights=y)
    return [CalibrationBin(int(rows[b]), predicted[b] / rows[b], actual[b] / rows[b]) for b in np.flatnonzero(rows)]


@dataclass(frozen=True)
class RocPoints:
    """Points of a ROC curve from (0, 0) to (1, 1). The first threshold is above every score: nothing is flagged."""

    false_positive_rate: FloatArray
    true_positive_rate: FloatArray
    thresholds: FloatArray


def roc_points(labels: ArrayLike, scores: ArrayLike, *, max_points: int = 200) -> RocPoints:
    """The ROC curve, thinned to points that lie evenly along it.

    Args:
        labels: (num_rows,) 0 or 1.
        scores: (num_rows,) higher is more likely clicked.
        max_points: how many points to keep at most.

    Raises:
        ValueError: there is one class only, or max_points is below 2.
    """
    y = _as_labels(labels)
    s = as_rows("scores", scores, y)
    if max_points < 2:
        raise ValueError(f"max_points={max_points}: must be at least 2")
    if y.min() == y.max():
        raise ValueError(f"labels: all {len(y)} are {int(y[0])}, a ROC curve needs both classes")
    order = np.argsort(-s, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(s[order]) != 0, True))
    hits = np.concatenate([[0.0], np.cumsum(y[order])[ends]])
    misses = np.concatenate([[0.0], np.cumsum(1 - y[order])[ends]])
    true_rate, false_rate = hits / hits[-1], misses / misses[-1]
    thresholds = np.concatenate([[np.nextafter(s.max(), np.inf)], s[order][ends]])
    if len(true_rate) > max_points:
        # The curve rises in both rates, so their sum runs from 0 to 2 along it: even steps of it are even on the eye.
        keep = np.searchsorted(true_rate + false_rate, np.linspace(0, 2, max_points))
        keep = np.unique(np.clip(keep, 0, len(true_rate) - 1))
        true_rate, false_rate, thresholds = true_rate[keep], false_rate[keep], thresholds[keep]
    return RocPoints(false_rate, true_rate, thresholds)


def confusion_matrix(labels: ArrayLike, probabilities: ArrayLike, *, threshold: float) -> list[list[int]]:
    """Counts [[true negatives, false positives], [false negatives, true positives]]; flagged from `threshold` up."""
    y = _as_labels(labels)
    flagged = _as_probabilities(probabilities, y) >= threshold
    counts = np.bincount((2 * y + flagged).astype(np.int64), minlength=4)
    return [[int(counts[0]), int(counts[1])], [int(counts[2]), int(counts[3])]]
