"""Metrics of predicted probabilities: against sklearn, by hand, with ties and with one class."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from evergreen.metrics.binary import (
    Auc,
    auc,
    calibration_curve,
    confusion_matrix,
    equal_mass_bins,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
    roc_points,
)


@pytest.fixture
def clicks() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    probabilities = np.round(rng.beta(1, 20, 3_000), 3)  # rounded: many ties
    return (rng.random(3_000) < probabilities).astype(float), probabilities


def test_auc_equals_sklearn_with_ties(clicks):
    assert auc(*clicks) == pytest.approx(reference.roc_auc_score(*clicks), abs=1e-12)


def test_weighted_auc_equals_sklearn_with_the_rows_repeated(clicks):
    weights = np.random.default_rng(2).integers(0, 4, 3_000).astype(float)
    expected = reference.roc_auc_score(*clicks, sample_weight=weights)
    assert Auc(*clicks)(weights) == pytest.approx(expected, abs=1e-12)


def test_auc_of_a_constant_score_is_a_half():
    assert auc([0, 1, 0, 1], [3.0, 3.0, 3.0, 3.0]) == 0.5


def test_auc_by_hand():
    # Pairs (1, 0): .8 beats .1 and .7; .7 beats .1 and ties .7 -> 3.5 of 4.
    assert auc([1, 0, 1, 0], [0.8, 0.1, 0.7, 0.7]) == 3.5 / 4


def test_log_loss_equals_sklearn(clicks):
    labels, probabilities = clicks
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    assert log_loss(labels, probabilities) == pytest.approx(reference.log_loss(labels, clipped), rel=1e-12)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert log_loss([0, 1], [1.0, 0.0]) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_normalized_entropy_of_the_base_rate_is_one(clicks):
    labels, _ = clicks
    assert normalized_entropy(labels, np.full(len(labels), labels.mean())) == pytest.approx(1.0, abs=1e-12)


def test_normalized_entropy_by_hand():
    expected = -(math.log(0.8) + math.log(0.6)) / 2 / math.log(2)
    assert normalized_entropy([1, 0], [0.8, 0.4]) == pytest.approx(expected)


def test_a_single_class_leaves_auc_and_normalized_entropy_undefined_but_not_log_loss():
    assert math.isnan(auc([0, 0], [0.1, 0.2]))
    assert math.isnan(normalized_entropy([1, 1], [0.1, 0.2]))
    assert log_loss([0, 0], [0.5, 0.5]) == pytest.approx(math.log(2))


def test_calibration_error_by_hand():
    labels, probabilities = [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6]
    # Two bins of two rows: |0.15 - 0| and |0.45 - 1|, half the rows each.
    assert expected_calibration_error(labels, probabilities, num_bins=2) == pytest.approx((0.15 + 0.55) / 2)


def test_calibration_error_does_not_split_a_tie():
    # Split by position, the tie would show bins of click rate 0 and 1; together they are calibrated.
    assert expected_calibration_error([0, 0, 1, 1], [0.5] * 4, num_bins=2) == pytest.approx(0)


def test_equal_mass_bins_hold_equally_many_rows():
    bins = equal_mass_bins(np.random.default_rng(0).random(1_000), num_bins=10)
    assert np.bincount(bins).tolist() == [100] * 10


def test_calibration_curve_counts_every_row_and_rises(clicks):
    curve = calibration_curve(*clicks, num_bins=10)
    assert sum(b.rows for b in curve) == 3_000
    assert sorted(b.predicted for b in curve) == [b.predicted for b in curve]
    assert sum(b.rows * b.actual for b in curve) == pytest.approx(clicks[0].sum())


def test_roc_points_span_the_curve_and_keep_its_area(clicks):
    points = roc_points(*clicks, max_points=200)
    assert 50 < len(points.thresholds) <= 200
    assert (points.false_positive_rate[0], points.true_positive_rate[0]) == (0, 0)
    assert (points.false_positive_rate[-1], points.true_positive_rate[-1]) == (1, 1)
    area = np.trapezoid(points.true_positive_rate, points.false_positive_rate)
    assert area == pytest.approx(auc(*clicks), abs=0.005)
    assert np.isfinite(points.thresholds).all()


def test_roc_points_equal_sklearn_when_none_is_dropped():
    labels, scores = [0, 1, 0, 1, 1], [0.2, 0.2, 0.4, 0.9, 0.6]
    false_rate, true_rate, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    points = roc_points(labels, scores)
    assert points.false_positive_rate == pytest.approx(false_rate)
    assert points.true_positive_rate == pytest.approx(true_rate)


def test_roc_points_refuse_one_class():
    with pytest.raises(ValueError, match="all 2 are 0"):
        roc_points([0, 0], [0.1, 0.2])


def test_confusion_matrix_flags_from_the_threshold_up(clicks):
    labels, probabilities = clicks
    expected = reference.confusion_matrix(labels, probabilities >= 0.05).tolist()
    assert confusion_matrix(labels, probabilities, threshold=0.05) == expected


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], [0.1, 0.1], "labels: 2.0 at row 1"),
        ([0, 1], [0.1, 1.5], "probabilities: 1.5 at row 1"),
        ([0, 1], [0.1, float("nan")], "nan at row 1"),
        ([0, 1], [0.1], "1 values for 2 rows"),
        ([], [], "no rows"),
    ],
)
def test_malformed_input_is_refused_and_named(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        log_loss(labels, probabilities)
