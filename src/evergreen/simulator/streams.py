"""Named random streams: what one part of the world draws never shifts what another part draws."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, name: str, *steps: int) -> np.random.Generator:
    """A generator of its own for one purpose and step (a day, an hour).

    Day 12's drift is therefore the same whether or not anybody drew a slate on day 11.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *steps]))
