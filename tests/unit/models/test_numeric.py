"""How numbers are fitted, where values are extreme."""

from __future__ import annotations

import numpy as np
import pytest

from evergreen.models.numeric import fit_numeric


@pytest.mark.parametrize("spread", [1e-137, 1e-170])
def test_spread_whose_square_or_cube_vanishes_is_a_constant(spread: float) -> None:
    fitted = fit_numeric("age", np.array([0.0, spread]), num_boundaries=3)
    assert fitted is not None
    assert (fitted.std, fitted.log) == (1.0, False)
