"""Metrics of predicted ratings."""

import numpy as np
import pytest
from sklearn import metrics as reference

from evergreen.metrics.regression import mae, rmse


def test_rmse_and_mae_equal_sklearn():
    rng = np.random.default_rng(0)
    ratings, predictions = rng.integers(1, 6, 500), rng.uniform(1, 5, 500)
    assert rmse(ratings, predictions) == pytest.approx(reference.root_mean_squared_error(ratings, predictions))
    assert mae(ratings, predictions) == pytest.approx(reference.mean_absolute_error(ratings, predictions))


def test_rmse_and_mae_by_hand():
    assert rmse([1, 5], [4, 1]) == pytest.approx((25 / 2) ** 0.5)
    assert mae([1, 5], [4, 1]) == pytest.approx(3.5)


def test_a_prediction_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="predictions: inf at row 1"):
        rmse([1, 2], [1, np.inf])
