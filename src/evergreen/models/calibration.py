"""Calibration: from a score to a probability that means what it says, by a line or by a rising curve.

Both keep the order of scores, equal only where scores are equal, and both hold the mean probability of the rows fitted
on at their click rate.

Sources: Platt 1999, Probabilistic outputs for support vector machines. Deviates: in place of Platt's smoothed targets a
normal prior of mean 1 and variance 1 lies on the slope alone, so the mean of the probabilities equals the click rate of
the rows fitted on, and separable or constant scores have a finite answer. Zadrozny and Elkan 2002, Transforming
classifier scores into accurate multiclass probability estimates (isotonic regression); Oron and Flournoy 2017, Centered
isotonic regression: a line between the middles of the steps, so that no step makes ties. Deviates: see `fit_isotonic`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ModelWrapValidatorHandler, TypeAdapter, model_validator

from evergreen.contracts.artifact import JsonModel
from evergreen.metrics.binary import ClickRateRatio, expected_calibration_error, log_loss
from evergreen.metrics.statistic import evaluate

_MIN_SLOPE = 1e-3  # above 0: calibration may flatten a model that knows nothing, it never turns its order around
_ITERATIONS = 100
_TOLERANCE = 1e-9
_ROWS_OF_EACH_CLASS = 10
"""Clicks, and rows without one, that every step of an isotonic curve rests on at least."""


class Calibration(JsonModel):
    """What all calibrations have in common. `Calibration.read(path)` gives the kind that the file's `method` names."""

    method: str

    def apply(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) probabilities in [0, 1] of (n,) scores; they rise with the score."""
        raise NotImplementedError

    def in_words(self) -> str:
        """How scores become probabilities, as half a sentence for people."""
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _by_method(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is Calibration:
            chosen: Self = _ANY.validate_python(data)
            return chosen
        return handler(data)


class PlattCalibration(Calibration):
    """probability = sigmoid(slope * score + intercept)."""

    method: Literal["platt"] = "platt"
    slope: float
    intercept: float

    def apply(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) probabilities in [0, 1] of (n,) scores."""
        return sigmoid(self.slope * scores.astype(np.float64) + self.intercept)

    def in_words(self) -> str:
        """The formula."""
        return (
            "Platt scaling on validation rows makes them probabilities: "
            f"sigmoid({self.slope:.4g} x score {self.intercept:+.4g})"
        )


class IsotonicCalibration(Calibration):
    """probability = sigmoid(curve(score)): straight lines between knots, and beyond the first and last knot."""

    method: Literal["isotonic"] = "isotonic"
    scores: tuple[float, ...] = Field(min_length=1)
    """Of the knots, strictly ascending."""
    logits: tuple[float, ...]
    """Of the knots, ascending, as many as `scores`."""
    end_slope: float = Field(gt=0)
    """Of the lines beyond the outermost knots."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.scores) != len(self.logits):
            raise ValueError(f"{len(self.scores)} scores for {len(self.logits)} logits: a knot has one of each")
        rising = bool((np.diff(self.scores) > 0).all() and (np.diff(self.logits) >= 0).all())
        if not (rising and np.isfinite(self.scores).all() and np.isfinite(self.logits).all()):
            raise ValueError("scores and logits of the knots must be finite and rise from knot to knot")
        return self

    def apply(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n,) probabilities in [0, 1] of (n,) scores."""
        return sigmoid(self.logit(scores.astype(np.float64)))

    def logit(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) log-odds of (n,) scores."""
        beyond = scores - np.clip(scores, self.scores[0], self.scores[-1])
        logits: NDArray[np.float64] = np.interp(scores, self.scores, self.logits) + self.end_slope * beyond
        return logits

    def in_words(self) -> str:
        """The number of knots."""
        return (
            "isotonic regression on validation rows makes them probabilities: "
            f"a rising curve of {len(self.scores)} knots"
        )


_ANY: TypeAdapter[Any] = TypeAdapter(Annotated[PlattCalibration | IsotonicCalibration, Field(discriminator="method")])


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function that does not overflow."""
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return result


def fit_platt(
    scores: NDArray[np.floating], labels: NDArray[np.floating], *, min_slope: float = _MIN_SLOPE
) -> PlattCalibration:
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
    return PlattCalibration(slope=slope, intercept=_shift(slope * x, rate))


def fit_isotonic(scores: NDArray[np.floating], labels: NDArray[np.floating]) -> IsotonicCalibration:
    """Fit a rising curve of straight lines.

    Deviates from plain isotonic regression: neighbouring steps are merged until each holds at least ten clicks and ten
    rows without one, so that no step says 0 or 1 and a lucky row at the top is not taken for certainty; between knots
    the curve rises by 0.001 a unit of score at least, and beyond the outermost ones it goes on as Platt's line does, so
    that no two scores become equal; and it is shifted, in log-odds, to the click rate.

    Args:
        scores: (n,) of any scale; log-odds suit it best.
        labels: (n,) 0 or 1; both occur. With some thousand clicks there are enough for a curve; with fewer than twenty
            the answer is one knot, which is Platt's slope through the click rate.

    Raises:
        ValueError: only one class occurs.
    """
    from scipy.optimize import isotonic_regression  # here, so that serving does not load scipy

    x, y = scores.astype(np.float64), labels.astype(np.float64)
    line = fit_platt(x, y)
    # Rows of equal score have no order: they enter as one, with their click rate.
    distinct, place, rows = np.unique(x, return_inverse=True, return_counts=True)
    clicks = np.bincount(place, weights=y)
    steps = isotonic_regression(clicks / rows, weights=rows).x
    first = np.append(0, np.flatnonzero(np.diff(steps) > 0) + 1)
    block_rows, block_clicks = np.add.reduceat(rows, first), np.add.reduceat(clicks, first)
    first = first[_merged(block_clicks, block_rows - block_clicks)]
    block_rows, block_clicks = np.add.reduceat(rows, first), np.add.reduceat(clicks, first)
    middles = np.add.reduceat(rows * distinct, first) / block_rows
    logits = np.log(block_clicks) - np.log(block_rows - block_clicks)
    logits = np.maximum.accumulate(logits - _MIN_SLOPE * middles) + _MIN_SLOPE * middles
    curve = IsotonicCalibration(scores=tuple(middles.tolist()), logits=tuple(logits.tolist()), end_slope=line.slope)
    shift = _shift(curve.logit(x), float(y.mean()))
    return curve.model_copy(update={"logits": tuple((logits + shift).tolist())})


def _merged(clicks: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64]:
    """First steps of the groups, when neighbours are merged until each group has enough of both classes."""
    starts, in_group, others_in_group = [0], 0.0, 0.0
    for place, (clicked, not_clicked) in enumerate(zip(clicks, others, strict=True)):
        if min(in_group, others_in_group) >= _ROWS_OF_EACH_CLASS:
            starts.append(place)
            in_group = others_in_group = 0.0
        in_group += clicked
        others_in_group += not_clicked
    if len(starts) > 1 and min(in_group, others_in_group) < _ROWS_OF_EACH_CLASS:
        starts.pop()
    return np.array(starts, dtype=np.int64)


def calibration_report(
    scores: NDArray[np.floating], labels: NDArray[np.floating], calibration: Calibration
) -> dict[str, float]:
    """How well probabilities mean what they say, before calibration (the sigmoid of the score) and after.

    Args:
        scores: (n,) log-odds.
        labels: (n,) 0 or 1.
        calibration: fitted, on other rows if the figures are to be honest.

    Returns:
        calibration_error, click_rate_ratio (predicted clicks over actual ones, nan without a click) and log_loss, each
        with the suffix _before and _after.
    """
    report = {}
    y = labels.astype(np.float64)
    for when, p in (("before", sigmoid(scores.astype(np.float64))), ("after", calibration.apply(scores))):
        report[f"calibration_error_{when}"] = expected_calibration_error(y, p)
        report[f"click_rate_ratio_{when}"] = evaluate(ClickRateRatio(y, p))
        report[f"log_loss_{when}"] = log_loss(y, p)
    return report


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
