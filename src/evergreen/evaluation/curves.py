"""ROC curves, reliability diagrams and confusion matrices of the test rows."""

from __future__ import annotations

from evergreen.contracts.evaluation import BASE_RATE, Curve, CurveBin, Curves
from evergreen.contracts.mapping import LogKind
from evergreen.evaluation.config import EvaluationConfig
from evergreen.evaluation.rows import TestRows
from evergreen.metrics.binary import calibration_curve, confusion_matrix, roc_points


def model_curves(rows: TestRows, *, kind: LogKind, threshold: float, config: EvaluationConfig) -> Curves:
    """Curves of every model but the base rate; none for ratings, or when the rows have one class only.

    Args:
        rows: test rows and predictions.
        kind: of the log.
        threshold: from which probability on a row is flagged in the confusion matrix.
        config: number of calibration bins.
    """
    if kind is LogKind.RATINGS or rows.labels.min() == rows.labels.max():
        return Curves()
    curves = {}
    for name, predictions in rows.predictions.items():
        if name == BASE_RATE:
            continue
        roc = roc_points(rows.labels, predictions, max_points=200)
        bins = calibration_curve(rows.labels, predictions, num_bins=config.calibration_bins)
        negatives, positives = confusion_matrix(rows.labels, predictions, threshold=threshold)
        curves[name] = Curve(
            false_positive_rate=tuple(roc.false_positive_rate.round(6).tolist()),
            true_positive_rate=tuple(roc.true_positive_rate.round(6).tolist()),
            thresholds=tuple(roc.thresholds.tolist()),
            calibration=tuple(CurveBin(rows=b.rows, predicted=b.predicted, actual=b.actual) for b in bins),
            confusion_threshold=threshold,
            confusion=((negatives[0], negatives[1]), (positives[0], positives[1])),
        )
    return Curves(models=curves)
