"""Named random streams: what one part of the world draws never shifts what another part draws."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def stream(seed: int, name: str, *steps: int) -> np.random.Generator:
    """A generator of its own for one purpose and step (a day, an hour).

    Day 12's drift is therefore the same whether or not anybody drew a slate on day 11.
    """
    return np.random.default_rng(_sequence(seed, name, *steps))


class KeyedDraws:
    """Random numbers that keys decide: what chance has in store for a pair does not depend on what else is drawn.

    Two worlds in which different things are shown so share the luck of what both show (common random numbers).
    """

    def __init__(self, seed: int, name: str, *steps: int) -> None:
        self._seed = _sequence(seed, name, *steps).generate_state(1, np.uint64)[0]

    def uniform(self, *keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) uniform in (0, 1), for n keys of one part or of several, each (n,) and not negative.

        Source: the output function of SplitMix64 (Steele, Lea and Flood 2014), applied once for each part.
        """
        state = np.full(len(keys[0]), self._seed)
        for key in keys:
            state = (state ^ key.astype(np.uint64)) + _GOLDEN
            for shift, factor in _MIX:
                state = (state ^ (state >> shift)) * factor
            state ^= state >> np.uint64(31)
        numbers: NDArray[np.float64] = ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return numbers

    def normal(self, *keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) standard normal."""
        numbers: NDArray[np.float64] = ndtri(self.uniform(*keys))
        return numbers


def _sequence(seed: int, name: str, *steps: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(name.encode()), *steps])
