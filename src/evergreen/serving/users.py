"""One user's features, looked up once a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from evergreen.serving.items import OnlineStore


@dataclass(frozen=True)
class UserFeatures:
    """What the online store knows of one user.

    Attributes:
        row: (1) the features of the user views; all null for an unknown user.
        by_category: (num_categories) the features of the user x category view, in the order of the lookup's categories.
    """

    row: pa.Table
    by_category: pa.Table

    @property
    def known(self) -> bool:
        """Whether the store has ever seen the user."""
        return bool(self.row["user_first_seen"][0].is_valid)

    @property
    def history(self) -> list[str]:
        """The last items that the user chose, oldest first."""
        return list(self.row["user_history"][0].as_py() or [])


class UserLookup:
    """Reads users from the online store."""

    def __init__(self, store: OnlineStore, service: str, categories: Sequence[str]) -> None:
        self._store = store
        self._service = service
        self._categories = pa.array(categories, pa.string())
        self._places = {category: place for place, category in enumerate(categories)}
        self.nobody = self._read(None)
        """The features of a user of whom nothing is known."""

    def get(self, user_id: str | None) -> UserFeatures:
        """Features of a user; of nobody for None."""
        return self.nobody if user_id is None else self._read(user_id)

    def places(self, categories: pa.ChunkedArray) -> pa.Array:
        """Row of each category in `by_category`, null where there is none."""
        return pa.array([self._places.get(category) for category in categories.to_pylist()], pa.int64())

    def _read(self, user_id: str | None) -> UserFeatures:
        # A row for no category at all comes first: it is there even when the log knows no categories.
        categories = pa.concat_arrays([pa.nulls(1, pa.string()), self._categories])
        users = pa.array([user_id] * len(categories), pa.string())
        # One look-up for both: the user views answer to user_id, the user x category view to both keys.
        found = self._store.online(self._service, pa.table({"user_id": users, "category": categories})).combine_chunks()
        return UserFeatures(row=found.slice(0, 1), by_category=found.slice(1))
