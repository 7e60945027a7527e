"""From scores to probabilities: Platt's line and the isotonic curve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError
from evergreen.models.calibration import (
    Calibration,
    IsotonicCalibration,
    PlattCalibration,
    calibration_report,
    fit_isotonic,
    fit_platt,
    sigmoid,
)

FITS = [fit_platt, fit_isotonic]
ROWS = st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=2, max_size=80)


def clicks(logit: np.ndarray, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(logit)) < sigmoid(logit)).astype(np.float64)


def bent(scores: np.ndarray) -> np.ndarray:
    """Log-odds that no line through the scores fits: flat, then steep, then flat."""
    return -3.5 + 2 * np.tanh(2 * (scores + 3.5))


@pytest.mark.parametrize("fit", FITS)
def test_distortion_of_true_logits_is_undone(fit) -> None:
    logit = np.random.default_rng(0).normal(-3, 1.5, 200_000)
    fitted = fit(2.5 * logit + 4, clicks(logit, 1))
    inside = np.linspace(-5, 0, 50)
    # Clicks are few at the low end, so a step of the curve is not exact there.
    np.testing.assert_allclose(fitted.apply(2.5 * inside + 4), sigmoid(inside), rtol=0.25)


def test_platt_finds_slope_and_intercept() -> None:
    logit = np.random.default_rng(0).normal(-3, 1.5, 200_000)
    fitted = fit_platt(2.5 * logit + 4, clicks(logit, 1))
    assert fitted.slope == pytest.approx(1 / 2.5, rel=0.03)
    assert fitted.intercept == pytest.approx(-4 / 2.5, abs=0.05)


def test_isotonic_bends_where_a_line_cannot() -> None:
    rng = np.random.default_rng(2)
    scores, fresh = rng.normal(-3.5, 1, 40_000), rng.normal(-3.5, 1, 40_000)
    truth = sigmoid(bent(fresh))
    errors = {fit: np.abs(fit(scores, clicks(bent(scores))).apply(fresh) - truth).mean() for fit in FITS}
    assert errors[fit_isotonic] < 0.6 * errors[fit_platt]


@pytest.mark.parametrize("fit", FITS)
@given(ROWS)
def test_mean_probability_is_the_click_rate(fit, rows: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    if not 0 < labels.mean() < 1:
        return
    assert fit(scores, labels).apply(scores).mean() == pytest.approx(labels.mean(), rel=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_order_is_kept_even_when_scores_point_the_wrong_way(fit) -> None:
    scores = np.linspace(-2, 2, 1000)
    fitted = fit(scores, (scores < 0).astype(float))
    assert (np.diff(fitted.apply(scores)) > 0).all()


def test_isotonic_makes_no_ties_within_nor_beyond_the_scores_it_saw() -> None:
    scores = np.random.default_rng(0).normal(-3.5, 1, 20_000).astype(np.float32)
    fitted = fit_isotonic(scores, clicks(bent(scores.astype(float))))
    everywhere = np.linspace(-15, 8, 300_000).astype(np.float32)
    assert len(fitted.scores) > 5
    assert (np.diff(fitted.apply(np.unique(everywhere))) > 0).all()


def test_isotonic_does_not_take_a_lucky_row_on_top_for_certainty() -> None:
    scores = np.linspace(-6, -2, 5_000)
    labels = clicks(scores)
    labels[-1], labels[0] = 1, 0
    p = fit_isotonic(scores, labels).apply(scores)
    assert p[-1] < 0.5
    assert p[0] > 1e-4


def test_isotonic_of_equal_scores_is_the_click_rate() -> None:
    labels = (np.arange(100) % 4 == 0).astype(float)
    assert fit_isotonic(np.full(100, 0.7), labels).apply(np.full(3, 0.7)).tolist() == pytest.approx([0.25] * 3)


def test_isotonic_of_separable_scores_is_finite() -> None:
    scores = np.linspace(-1, 1, 200)
    p = fit_isotonic(scores, (scores > 0).astype(float)).apply(np.array([-1.0, 1.0, 30.0]))
    assert (np.diff(p) > 0).all()
    assert 0 < p[0] < p[1] < 1


def test_separable_scores_have_a_finite_slope() -> None:
    scores = np.array([-1.0, -0.5, 0.5, 1.0])
    assert np.isfinite(fit_platt(scores, np.array([0.0, 0, 1, 1])).slope)


@pytest.mark.parametrize("fit", FITS)
def test_one_class_is_refused(fit) -> None:
    with pytest.raises(ValueError, match=r"click rate of 0\.0"):
        fit(np.zeros(3), np.zeros(3))


@pytest.mark.parametrize(
    "calibration",
    [PlattCalibration(slope=1, intercept=0), IsotonicCalibration(scores=(-1, 1), logits=(-1, 1), end_slope=1)],
)
def test_extreme_scores_do_not_overflow(calibration: Calibration) -> None:
    assert calibration.apply(np.array([-1e6, 1e6])).tolist() == [0.0, 1.0]


def test_file_gives_back_the_kind_that_was_written(tmp_path: Path) -> None:
    platt = PlattCalibration(slope=0.5, intercept=-1.25)
    isotonic = fit_isotonic(np.linspace(-3, 3, 2_000), clicks(np.linspace(-3, 3, 2_000)))
    for calibration in (platt, isotonic):
        calibration.write(tmp_path / "calibration.json")
        assert Calibration.read(tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "spline"}', "spline.*'platt', 'isotonic'"),
        ('{"slope": 1, "intercept": 0}', "method"),
        ('{"method": "isotonic", "scores": [1, 2], "logits": [0], "end_slope": 1}', "2 scores for 1 logits"),
        ('{"method": "isotonic", "scores": [2, 1], "logits": [0, 1], "end_slope": 1}', "rise from knot to knot"),
        ('{"method": "isotonic", "scores": [1, 2], "logits": [1, 0], "end_slope": 1}', "rise from knot to knot"),
    ],
)
def test_broken_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ArtifactError, match=f"calibration.json.*{message}"):
        Calibration.read(tmp_path / "calibration.json")


def test_report_shows_what_calibration_mends() -> None:
    scores = np.random.default_rng(0).normal(-3, 1, 20_000)
    labels = clicks(scores - 1)
    report = calibration_report(scores, labels, fit_platt(scores, labels))
    assert report["click_rate_ratio_before"] > 1.5
    assert report["click_rate_ratio_after"] == pytest.approx(1)
    assert report["calibration_error_after"] < 0.2 * report["calibration_error_before"]
    assert report["log_loss_after"] < report["log_loss_before"]


def test_applying_a_curve_does_not_load_scipy() -> None:
    program = (
        "import sys, numpy as np; from evergreen.models.calibration import IsotonicCalibration as C; "
        "C(scores=(0, 1), logits=(0, 1), end_slope=1).apply(np.zeros(2)); sys.exit('scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
