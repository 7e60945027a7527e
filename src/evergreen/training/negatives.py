"""Negatives for logs that tell only what people did: items that existed at that time and that the user did not know.

Uniform sampling over the catalogue of the moment: the ranker then learns popularity as well as taste, which is what
ranking the whole catalogue asks of it. An item may turn out to be chosen later; to leave such items out would use the
future.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_REDRAWS = 8


@dataclass(frozen=True)
class Negatives:
    """Drawn negatives: `item[i]` stands against positive `positive[i]`. Both arrays have shape (num_negatives,)."""

    positive: NDArray[np.int64]
    item: NDArray[np.int64]


def draw_negatives(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    time: NDArray[np.int64],
    item_first_seen: NDArray[np.int64],
    *,
    per_positive: int,
    rng: np.random.Generator,
) -> Negatives:
    """Draw items uniformly from those first seen strictly before each positive and not yet known to its user.

    Args:
        user: (n,) user code of each positive interaction, in time order.
        item: (n,) item code, an index into `item_first_seen`.
        time: (n,) time of the interaction, in microseconds.
        item_first_seen: (num_items,) time at which each item was first seen, in microseconds.
        per_positive: how many to draw against each positive.
        rng: source of randomness.

    Returns:
        At most n * per_positive negatives; fewer where the catalogue of the moment has no item left to draw.
    """
    by_age = np.argsort(item_first_seen, kind="stable")
    catalogue_size = np.searchsorted(item_first_seen[by_age], time, side="left")
    # First time that a user met an item: a draw is refused when it lies at or before the positive's own time.
    pair = user * len(item_first_seen) + item
    known_pairs, first_index = np.unique(pair, return_index=True)
    known_since = time[first_index]

    positive = np.repeat(np.arange(len(user)), per_positive)
    positive = positive[catalogue_size[positive] > 0]
    drawn = np.full(len(positive), -1, dtype=np.int64)
    pending = np.arange(len(positive))
    for _ in range(_REDRAWS):
        if len(pending) == 0:
            break
        rows = positive[pending]
        candidates = by_age[(rng.random(len(rows)) * catalogue_size[rows]).astype(np.int64)]
        pairs = user[rows] * len(item_first_seen) + candidates
        place = np.minimum(np.searchsorted(known_pairs, pairs), len(known_pairs) - 1)
        refused = (known_pairs[place] == pairs) & (known_since[place] <= time[rows])
        drawn[pending[~refused]] = candidates[~refused]
        pending = pending[refused]
    found = drawn >= 0
    return Negatives(positive[found], drawn[found])
