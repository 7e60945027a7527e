"""Thinned negatives, and the correction of scores that were trained on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.training.imbalance import sample_negatives, score_correction

LABELS = (np.arange(10_000) % 50 == 0).astype(np.float32)


def test_all_positives_and_the_rate_of_the_negatives_are_kept_in_order() -> None:
    rows = sample_negatives(LABELS, 0.1, seed=3)
    assert (np.diff(rows) > 0).all()
    assert LABELS[rows].sum() == 200
    assert len(rows) == 200 + 980


def test_equal_seeds_keep_equal_rows_and_others_do_not() -> None:
    rows = sample_negatives(LABELS, 0.1, seed=3)
    assert (rows == sample_negatives(LABELS, 0.1, seed=3)).all()
    assert not (rows == sample_negatives(LABELS, 0.1, seed=4)).all()


def test_every_negative_is_kept_as_often_as_any_other() -> None:
    labels = np.array([0, 0, 1, 0, 0, 0], np.float32)
    kept = np.bincount(np.concatenate([sample_negatives(labels, 0.4, seed=seed) for seed in range(2_000)]), minlength=6)
    assert kept[2] == 2_000
    assert np.abs(kept[labels == 0] - 800).max() < 100  # 4.5 standard deviations


def test_rate_of_one_keeps_every_row() -> None:
    assert (sample_negatives(LABELS, 1.0, seed=0) == np.arange(len(LABELS))).all()


def test_a_last_negative_is_left_however_low_the_rate() -> None:
    assert LABELS[sample_negatives(LABELS, 1e-6, seed=0)].tolist().count(0) == 1


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rate_outside_its_range_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match=f"negative_rate={rate}"):
        sample_negatives(LABELS, rate, seed=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weight_outside_its_range_is_named(weight: float) -> None:
    with pytest.raises(ValueError, match=f"positive_weight={weight}"):
        score_correction(negative_rate=1.0, positive_weight=weight)


@given(st.floats(0.001, 0.999), st.floats(1e-4, 1), st.floats(0.01, 100))
def test_correction_gives_the_probability_of_the_full_data(p: float, rate: float, weight: float) -> None:
    thinned = weight * p / (weight * p + rate * (1 - p))  # what a model learns that is right about what it is shown
    score = np.log(thinned / (1 - thinned)) + score_correction(negative_rate=rate, positive_weight=weight)
    assert 1 / (1 + np.exp(-score)) == pytest.approx(p, rel=1e-6)


def test_correction_is_the_formula_of_he_et_al() -> None:
    q, w = 0.3, 0.05
    score = np.log(q / (1 - q)) + score_correction(negative_rate=w, positive_weight=1.0)
    assert 1 / (1 + np.exp(-score)) == pytest.approx(q / (q + (1 - q) / w))
