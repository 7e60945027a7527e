"""What an online store knows of a user; apart from the reader, which needs Feast and takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class OnlineUser:
    """What the online store knows of one user.

    Attributes:
        values: every feature of the views keyed by user_id alone: str, float, int, list of str, or None where unknown;
            timestamps are whole Unix seconds.
        by_category: (num_asked_categories, num_pair_features) float64, nan where unknown.
        updated_at: the newest event time of the user's rows, in Unix seconds; None: the store does not know the user.
    """

    values: dict[str, Any]
    by_category: NDArray[np.float64]
    updated_at: float | None
