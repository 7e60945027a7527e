"""`OnlineReader` for SQLite: one statement a view, in a thread of its own with a read-only connection."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.features.deadline import store_deadline
from evergreen.features.online_reader import (
    ITEM_KEYS,
    PAIR_KEYS,
    USER_KEYS,
    OnlineReader,
    OnlineReadError,
    ReadFailure,
    View,
    entity_value,
    key_head,
)
from evergreen.features.online_user import OnlineUser
from evergreen.features.sqlite_online_store import GuardedSqliteOnlineStore, _table_name
from evergreen.features.value_decoding import Row

if TYPE_CHECKING:
    from evergreen.features.store import FeatureStore

_ITEMS_SECONDS = 5.0
_SECONDS_A_KEY = 100e-6  # a row of a dozen features is a dozen rows here
_KEYS_A_STATEMENT = 1000
_STEPS_BETWEEN_LOOKS = 10_000  # of SQLite's machine; some tenths of a millisecond


class SqliteReader(OnlineReader):
    """Reads users in one worker thread, and items in the thread of whoever asks for them."""

    def __init__(self, store: FeatureStore, service: str, *, deadline_seconds: float) -> None:
        super().__init__(store, service, deadline_seconds=deadline_seconds)
        self._path = Path(GuardedSqliteOnlineStore._get_db_path(self._config))
        self._tables = {
            view.name: '"' + _table_name(self._config, view.definition).replace('"', '""') + '"'
            for view in (*self._user_views, *self._pair_views, *self._item_views)
        }
        self._users_file = _File(self._path)
        self._items_file = _File(self._path)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="online-reader")

    async def read(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[OnlineUser]:
        """See `OnlineReader.read`."""
        num_keys = sum(1 + len(categories) for _, categories in asked)
        deadline_seconds = self._deadline_seconds + _SECONDS_A_KEY * num_keys
        until = time.monotonic() + deadline_seconds
        try:
            async with store_deadline(deadline_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._worker, self._read, asked, until)
        except TimeoutError as error:
            raise OnlineReadError(
                f"{self._path} was not read within {1000 * deadline_seconds:.0f} ms", ReadFailure.TIMEOUT
            ) from error

    async def close(self) -> None:
        """See `OnlineReader.close`."""
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)
        self._users_file.close()
        self._items_file.close()

    @staticmethod
    def _seconds(event_time: int) -> float:
        # Feast writes a UTC time as if it were local time, and reads it back likewise.
        return datetime.fromtimestamp(event_time).replace(tzinfo=UTC).timestamp()

    def _read(self, asked: Sequence[tuple[str, Sequence[str]]], until: float) -> list[OnlineUser]:
        user_head, pair_head = key_head(USER_KEYS), key_head(PAIR_KEYS)
        user_keys, pair_keys = [], []
        for user_id, categories in asked:
            user = entity_value(user_id)
            user_keys.append(user_head + user)
            pair_keys.append([pair_head + entity_value(category) + user for category in categories])
        user_rows = [self._rows(self._users_file, view, user_keys, until) for view in self._user_views]
        all_pairs = [key for keys in pair_keys for key in keys]
        pair_rows = [self._rows(self._users_file, view, all_pairs, until) for view in self._pair_views]
        return [
            self._user(
                [rows.get(user, view.no_row) for view, rows in zip(self._user_views, user_rows, strict=True)],
                [
                    [rows.get(key, view.no_row) for key in pairs]
                    for view, rows in zip(self._pair_views, pair_rows, strict=True)
                ],
                len(pairs),
            )
            for user, pairs in zip(user_keys, pair_keys, strict=True)
        ]

    def _item_rows(self, item_ids: Sequence[str]) -> list[Sequence[Row]]:
        head, until = key_head(ITEM_KEYS), time.monotonic() + _ITEMS_SECONDS
        keys = [head + entity_value(item_id) for item_id in item_ids]
        found = [(view, self._rows(self._items_file, view, keys, until)) for view in self._item_views]
        return [[rows.get(key, view.no_row) for key in keys] for view, rows in found]

    def _rows(self, file: _File, view: View, keys: Sequence[bytes], until: float) -> Mapping[bytes, Row]:
        """Rows of a view by key."""
        places = {name: place for place, name in enumerate(view.features, start=1)}
        found: dict[bytes, list[Any]] = {}
        for first in range(0, len(keys), _KEYS_A_STATEMENT):
            some = keys[first : first + _KEYS_A_STATEMENT]
            statement = (
                f"SELECT entity_key, feature_name, value, event_ts FROM {self._tables[view.name]} "
                f"WHERE entity_key IN ({','.join('?' * len(some))})"
            )
            for key, name, value, event_ts in file.execute(statement, some, until):
                row = found.get(key)
                if row is None:
                    row = found[key] = [event_ts, *view.no_row[1:]]
                if name in places:
                    row[places[name]] = value
        return found


class _File:
    """A database file, opened for reading when it is first used, and again when another file has taken its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._until = 0.0

    def execute(self, statement: str, parameters: Sequence[Any], until: float) -> list[Any]:
        """All rows of a statement.

        Raises:
            OnlineReadError: SQLite says no, or has not said anything until then (as of `time.monotonic`).
        """
        self._until = until
        try:
            connection = self._open()
            connection.execute(f"PRAGMA busy_timeout = {max(0, int(1000 * (until - time.monotonic())))}")
            return connection.execute(statement, parameters).fetchall()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise OnlineReadError(f"{self._path}: {error}", _reason(error)) from error

    def close(self) -> None:
        """Close the file; it opens itself again when it is next used."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        status = self._path.stat()
        if self._connection is None or self._opened != (status.st_dev, status.st_ino):
            self.close()
            self._connection = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._connection.set_progress_handler(lambda: time.monotonic() > self._until, _STEPS_BETWEEN_LOOKS)
            self._opened = status.st_dev, status.st_ino
        return self._connection


def _reason(error: Exception) -> ReadFailure:
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
        return ReadFailure.TIMEOUT
    away = isinstance(error, OSError) or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN
    return ReadFailure.CONNECTION if away else ReadFailure.REFUSED
