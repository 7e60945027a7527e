"""Platt scaling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.models.calibration import Calibration, fit_platt, sigmoid


def test_distortion_of_true_logits_is_undone() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-3, 1.5, 200_000)
    label = rng.random(len(logit)) < sigmoid(logit)
    fitted = fit_platt(2.5 * logit + 4, label.astype(float))
    assert fitted.slope == pytest.approx(1 / 2.5, rel=0.03)
    assert fitted.intercept == pytest.approx(-4 / 2.5, abs=0.05)


@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=2, max_size=40))
def test_mean_probability_is_the_click_rate(rows: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    if not 0 < labels.mean() < 1:
        return
    probability = fit_platt(scores, labels).apply(scores)
    assert probability.mean() == pytest.approx(labels.mean(), rel=1e-4)


def test_order_is_kept_even_when_scores_point_the_wrong_way() -> None:
    scores = np.linspace(-2, 2, 1000)
    fitted = fit_platt(scores, (scores < 0).astype(float))
    assert (np.diff(fitted.apply(scores)) > 0).all()


def test_separable_scores_have_a_finite_answer() -> None:
    scores = np.array([-1.0, -0.5, 0.5, 1.0])
    assert np.isfinite(fit_platt(scores, np.array([0.0, 0, 1, 1])).slope)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"click rate of 0\.0"):
        fit_platt(np.zeros(3), np.zeros(3))


def test_extreme_scores_do_not_overflow() -> None:
    assert Calibration(slope=1, intercept=0).apply(np.array([-1e6, 1e6])).tolist() == [0.0, 1.0]
