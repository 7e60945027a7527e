"""A request's users, read straight from what Feast's layout holds: one round trip, one deadline, no Feast on the way.

`get_online_features` makes a protobuf object for every value of every row, and again a Python value of each. What a
server needs is one user's row and some numbers for each category, so the bytes are fetched and decoded here. The values
are Feast's own: a feature older than its view's ttl is null, as is everything of a key that the store does not hold.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS
from evergreen.features.online_store import OnlineStoreError
from evergreen.features.online_user import OnlineUser
from evergreen.features.value_decoding import Row, RowDecoder

if TYPE_CHECKING:
    from evergreen.features.store import FeatureStore

USER_KEYS, PAIR_KEYS, ITEM_KEYS = ("user_id",), ("user_id", "category"), ("item_id",)

_ITEMS_AT_ONCE = 250  # some milliseconds, in which requests wait for the interpreter
_STRING_TYPE = 2  # Feast's ValueType.STRING

_Decoded = TypeVar("_Decoded")


class ReadFailure(StrEnum):
    """Why a read failed."""

    TIMEOUT = "timeout"  # no answer within the deadline
    CONNECTION = "connection"  # nobody there, or the connection broke
    REFUSED = "refused"  # it answers with an error: memory, password, role, still loading
    DECODING = "decoding"  # it holds bytes that are no feature value


class OnlineReadError(OnlineStoreError):
    """The online store is away, refuses, does not answer in time, or holds what cannot be decoded."""

    def __init__(self, message: str, reason: ReadFailure) -> None:
        super().__init__(message)
        self.reason = reason


class View:
    """One feature view as a service reads it.

    Attributes:
        definition: Feast's own object.
        name: of the view.
        features: that the service takes of it, in the service's order.
        decoder: of their values.
        ttl_seconds: rows older than this are null; None: they never are.
        no_row: stands for a row that the store does not hold.
    """

    def __init__(self, definition: Any, features: Sequence[str], schema: pa.Schema) -> None:
        self.definition = definition
        self.name: str = definition.name
        self.features = tuple(features)
        self.decoder = RowDecoder(self.name, pa.schema([schema.field(name) for name in features]))
        self.ttl_seconds: float | None = definition.ttl.total_seconds() if definition.ttl else None
        self.no_row: Row = (None,) * (1 + len(self.features))


class OnlineReader(ABC):
    """Reads users and items of one feature service. Made for one event loop; `read_items` for one other thread."""

    def __init__(self, store: FeatureStore, service: str, *, deadline_seconds: float) -> None:
        """See `open_reader`."""
        self._deadline_seconds = deadline_seconds
        self._config = store._store.config
        views = [
            View(store._store.get_feature_view(name, allow_registry_cache=True), features, store.tables.schema(name))
            for name, features in store._projections(service).items()
            if name in JOIN_KEYS
        ]
        self._user_views = [view for view in views if JOIN_KEYS[view.name] == USER_KEYS]
        self._pair_views = [view for view in views if JOIN_KEYS[view.name] == PAIR_KEYS]
        self._item_views = [view for view in views if JOIN_KEYS[view.name] == ITEM_KEYS]
        self.user_features = tuple(name for view in self._user_views for name in view.features)
        """Names of `OnlineUser.values`."""
        self.pair_features = tuple(name for view in self._pair_views for name in view.features)
        """Names of the columns of `OnlineUser.by_category`."""
        self._unknown = dict.fromkeys(self.user_features)

    def nobody(self, num_categories: int) -> OnlineUser:
        """A user of whom nothing is known."""
        return OnlineUser(self._unknown.copy(), np.full((num_categories, len(self.pair_features)), np.nan), None)

    @abstractmethod
    async def read(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[OnlineUser]:
        """Users and their features by category, all in one round trip.

        Args:
            asked: user ids, and the categories to read for each.

        Returns:
            (num_asked) a user each; one that the store does not hold is as `nobody`.

        Raises:
            OnlineReadError: the store is away, refuses, does not answer within the deadline, or holds bytes that are no
                value.
        """

    def read_items(self, item_ids: Sequence[str]) -> pa.Table:
        """Features of items, for a thread beside the event loop: it lets others run every few milliseconds.

        Args:
            item_ids: any, also unknown ones.

        Returns:
            (num_items) item_id, then the features of the service's item views; null where unknown.

        Raises:
            OnlineReadError: as for `read`, but the deadline is some seconds.
        """
        schema = pa.schema([pa.field("item_id", pa.string()), *(f for v in self._item_views for f in v.decoder.schema)])
        parts = [schema.empty_table()]
        for first in range(0, len(item_ids), _ITEMS_AT_ONCE):
            some = item_ids[first : first + _ITEMS_AT_ONCE]
            columns = [pa.array(some, pa.string())]
            found = self._item_rows(some) if self._item_views else ()
            for view, rows in zip(self._item_views, found, strict=True):
                columns += _decoded(view.decoder.table, self._held(view, rows)).columns
                time.sleep(0)  # hands the interpreter to whoever waits for it
            parts.append(pa.Table.from_arrays(columns, schema=schema))
        return pa.concat_tables(parts).combine_chunks()

    @abstractmethod
    async def close(self) -> None:
        """End the connections. Reads that are under way fail."""

    @abstractmethod
    def _item_rows(self, item_ids: Sequence[str]) -> Sequence[Sequence[Row]]:
        """By item view, (num_items) rows."""

    @staticmethod
    @abstractmethod
    def _seconds(event_time: Any) -> float:
        """Unix seconds of an event time as the store writes it."""

    def _holds(self, view: View, row: Row) -> bool:
        """Whether there is a row, and not one older than its view's ttl."""
        if row[0] is None:
            return False
        return view.ttl_seconds is None or self._seconds(row[0]) >= time.time() - view.ttl_seconds

    def _held(self, view: View, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows, without the values of those that are too old."""
        if view.ttl_seconds is None:
            return rows
        return [row if self._holds(view, row) else view.no_row for row in rows]

    def _user(self, rows: Sequence[Row], pairs: Sequence[Sequence[Row]], num_categories: int) -> OnlineUser:
        """A user from a row of each user view, and for each pair view a row of each category."""
        values = self._unknown.copy()
        updated_at = None
        for view, row in zip(self._user_views, rows, strict=True):
            if self._holds(view, row):
                values.update(zip(view.features, _decoded(view.decoder.values, row), strict=True))
                seconds = self._seconds(row[0])
                updated_at = seconds if updated_at is None else max(seconds, updated_at)
        parts = [
            _decoded(view.decoder.numbers, self._held(view, found))
            for view, found in zip(self._pair_views, pairs, strict=True)
        ]
        by_category = parts[0] if len(parts) == 1 else np.hstack([np.empty((num_categories, 0)), *parts])
        return OnlineUser(values, by_category, updated_at)


def _decoded(decode: Callable[[Any], _Decoded], cells: Any) -> _Decoded:
    try:
        return decode(cells)
    except ArtifactError as error:
        raise OnlineReadError(str(error), ReadFailure.DECODING) from error


def open_reader(store: FeatureStore, service: str, *, deadline_seconds: float) -> OnlineReader:
    """A reader of one feature service, by the kind of the store's online store. Connects when it is first asked.

    Args:
        store: whose online store is read.
        service: name of a feature service; its views keyed by user, by user and category, and by item are read.
        deadline_seconds: for one call of `read`, name look-up and connecting included. Each key adds 20 microseconds
            (100 for SQLite), so that a call of thousands is not late by its size.

    Raises:
        ArtifactError: no such service, or an online store of another kind.
    """
    kinds = {base.__name__ for base in type(store._store.config.online_store).__mro__}
    if "RedisOnlineStoreConfig" in kinds:
        from evergreen.features.redis_reader import RedisReader

        return RedisReader(store, service, deadline_seconds=deadline_seconds)
    if "SqliteOnlineStoreConfig" in kinds:
        from evergreen.features.sqlite_reader import SqliteReader

        return SqliteReader(store, service, deadline_seconds=deadline_seconds)
    raise ArtifactError(
        f"{store.path}: the online store is a {store._store.config.online_store.type!r}: serving reads Redis and SQLite"
    )


def key_head(names: Sequence[str]) -> bytes:
    """How a serialized Feast entity key (version 3) begins; each value follows, in the order of the sorted names."""
    return struct.pack("<I", len(names)) + b"".join(entity_value(name) for name in sorted(names))


def entity_value(text: str) -> bytes:
    """One name or value of an entity key."""
    data = text.encode()
    return struct.pack("<II", _STRING_TYPE, len(data)) + data
