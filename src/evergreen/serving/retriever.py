"""Which items to score when a request brings no candidates."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from evergreen.serving.items import ItemTable


class CatalogueRetriever:
    """Exact retrieval: every item of the catalogue is a candidate.

    Right up to some ten thousand items; beyond that an approximate index takes this place.
    """

    def __init__(self, items: ItemTable, *, recommend_seen: bool) -> None:
        """Set what may be proposed.

        Args:
            items: the catalogue.
            recommend_seen: whether items that the user already knows may be proposed again.
        """
        self._items = items
        self._recommend_seen = recommend_seen

    def retrieve(self, history: Collection[str]) -> pa.Array:
        """Rows of the items to score, int64, ascending.

        Args:
            history: items that the user knows; how many are kept is `contracts.feature_tables.HISTORY_LENGTH`.
        """
        keep = np.ones(len(self._items.rows), dtype=np.bool_)
        if not self._recommend_seen:
            keep[[self._items.rows[item] for item in history if item in self._items.rows]] = False
        return pa.array(np.flatnonzero(keep))
