"""When a click comes: seconds after its impression was shown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evergreen.simulator.population import FARM_ACCOUNT, MIMIC, PERSON, Floats, Ints

LONGEST_DELAY_SECONDS = 590.0
"""Below the attribution window of the mapping `simulated`: a later click would count as none."""

_MEDIAN_SECONDS, _SIGMA = 6.0, 1.0
_MACHINE_MEDIAN_SECONDS = 0.3
_FARM_SECONDS, _FARM_SIGMA = 2.0, 0.02


def click_delays(rng: np.random.Generator, kinds: Ints, clicked: NDArray[np.bool_]) -> Floats:
    """Seconds from the impression to the click: log-normal around six for people, far below one for machines.

    Args:
        rng: decides; it draws as many numbers as there are rows, whatever was clicked.
        kinds: (n,) kinds of the rows' users.
        clicked: (n,)

    Returns:
        (n,) NaN where nothing was clicked.
    """
    return delays_of(rng.normal(size=len(kinds)), kinds, clicked)


def delays_of(draws: Floats, kinds: Ints, clicked: NDArray[np.bool_]) -> Floats:
    """The delays of `click_delays` that (n,) standard normal numbers decide."""
    human = np.isin(kinds, (PERSON, MIMIC))
    median = np.where(human, _MEDIAN_SECONDS, np.where(kinds == FARM_ACCOUNT, _FARM_SECONDS, _MACHINE_MEDIAN_SECONDS))
    sigma = np.where(kinds == FARM_ACCOUNT, _FARM_SIGMA, _SIGMA)
    delays = np.minimum(median * np.exp(sigma * draws), LONGEST_DELAY_SECONDS)
    return np.where(clicked, delays, np.nan)
