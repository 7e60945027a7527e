"""Columns into matrices."""

from __future__ import annotations

import numpy as np
import pytest

from evergreen.models.encoded_fields import interleave


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 3), (5, 1), (5000, 16), (4100, 40)])
def test_interleaved_columns_are_the_columns_of_the_matrix(num_rows: int, num_columns: int) -> None:
    columns = np.random.default_rng(0).integers(100, size=(num_columns, num_rows)).astype(np.int32)
    out = np.full((num_rows, num_columns), -1, np.int32)
    places = np.random.default_rng(1).permutation(num_columns).tolist()
    interleave(out, zip(places, columns, strict=True))
    np.testing.assert_array_equal(out[:, places], columns.T)
