"""Feast's SQLite online store with bulk writes, a guard against late rows, and ttl: the embedded default.

A row lies as Feast lays it: one for each key and feature, its event time in whole seconds. The column `event_us`, which
Feast does not read, has the microseconds that the guard compares.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
from feast.feature_view import FeatureView
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _quote_id
from feast.repo_config import RepoConfig
from numpy.typing import NDArray

from evergreen.contracts.instant import from_micros
from evergreen.features.online_store import GuardedOnlineStore, OnlineRows, OnlineStoreError

_MARKERS = "evergreen_markers"
_CREATE_MARKERS = f"CREATE TABLE IF NOT EXISTS {_MARKERS} (view TEXT PRIMARY KEY, marker TEXT)"


class GuardedSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):  # type: ignore[misc]
    """Configuration in feature_store.yaml: the parent's, under this store's own name."""

    type: str = "evergreen.features.sqlite_online_store.GuardedSqliteOnlineStore"


class GuardedSqliteOnlineStore(GuardedOnlineStore, SqliteOnlineStore):  # type: ignore[misc]
    """SqliteOnlineStore that writes by column, one transaction a batch, and keeps the newer row.

    A full disk, or a file that another process holds for more than five seconds, undoes the batch and raises
    `OnlineStoreError`; batches before it stay.
    """

    writes_texts = True

    def __init__(self) -> None:
        super().__init__()
        self._guarded: set[str] = set()

    def marker(self, config: RepoConfig, view: FeatureView) -> str | None:
        """What `set_marker` left in this file for the view."""
        connection = self._get_conn(config)
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [_MARKERS]).fetchone():
            return None
        row = connection.execute(
            f"SELECT marker FROM {_MARKERS} WHERE view = ?", [_table_name(config, view)]
        ).fetchone()
        return None if row is None else str(row[0])

    def set_marker(self, config: RepoConfig, view: FeatureView, marker: str) -> None:
        """Leave a marker in this file."""
        with self._transaction(config) as connection:
            connection.execute(_CREATE_MARKERS)
            connection.execute(f"REPLACE INTO {_MARKERS} VALUES (?, ?)", [_table_name(config, view), marker])

    def update(self, config: RepoConfig, tables_to_delete: Any, tables_to_keep: Any, *args: Any, **kwargs: Any) -> None:
        """Create and drop tables; the marker of a dropped one goes with it."""
        super().update(config, tables_to_delete, tables_to_keep, *args, **kwargs)
        with self._transaction(config) as connection:
            connection.execute(_CREATE_MARKERS)
            names = [_table_name(config, view) for view in tables_to_delete]
            connection.executemany(f"DELETE FROM {_MARKERS} WHERE view = ?", [[name] for name in names])
            self._guarded.clear()  # a table that is created anew has no guard

    def _write(self, config: RepoConfig, view: FeatureView, rows: OnlineRows) -> int:
        if not rows.keys or not rows.values:
            return 0
        assert rows.texts is not None
        with self._transaction(config) as connection:
            statement = _upsert(self._guarded_table(connection, config, view), list(rows.values))
            pairs = [column for name in rows.values for column in (rows.values[name], rows.texts[name])]
            created = [None if moment is None else _feast_seconds(moment) for moment in rows.created]
            micros = rows.micros.tolist()
            seconds = [_feast_seconds(from_micros(at)) for at in micros]
            cursor = connection.executemany(statement, zip(rows.keys, seconds, micros, created, *pairs, strict=True))
        return len(rows.keys) - cursor.rowcount // len(rows.values)

    def _withdraw(self, config: RepoConfig, view: FeatureView, keys: list[bytes], micros: NDArray[np.int64]) -> int:
        with self._transaction(config) as connection:
            name = self._guarded_table(connection, config, view)
            cursor = connection.executemany(
                f"DELETE FROM {name} WHERE entity_key = ? AND event_us = ?", zip(keys, micros.tolist(), strict=True)
            )
        removed: int = cursor.rowcount // len(view.features)
        return removed

    def _guarded_table(self, connection: sqlite3.Connection, config: RepoConfig, view: FeatureView) -> str:
        """Quoted name of the view's table, with the column that the guard needs."""
        name: str = _quote_id(_table_name(config, view))
        if name not in self._guarded:
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({name})")}
            if "event_us" not in columns:
                connection.execute(f"ALTER TABLE {name} ADD COLUMN event_us INTEGER")
            self._guarded.add(name)
        return name

    @contextmanager
    def _transaction(self, config: RepoConfig) -> Iterator[sqlite3.Connection]:
        connection = self._get_conn(config)
        try:
            with connection:
                yield connection
        except sqlite3.OperationalError as error:
            self._guarded.clear()  # a column that was added in this transaction is gone with it
            raise OnlineStoreError(
                f"{self._get_db_path(config)}: SQLite says {str(error)!r}. Nothing of this batch was written; make "
                "room (or let the other writer end) and write again: rows that are there already do no harm"
            ) from error


def _upsert(table: str, features: list[str]) -> str:
    """A statement that writes all features of one key; parameters: key, seconds, micros, created, value, text, …."""
    rows = ", ".join(
        f"(?1, {_literal(name)}, ?{5 + 2 * place}, ?{6 + 2 * place}, ?2, ?4, ?3)" for place, name in enumerate(features)
    )
    columns = ("value", "value_text", "event_ts", "created_ts", "event_us")
    # A row that Feast itself wrote has no microseconds: then whole seconds decide.
    return (
        f"INSERT INTO {table} (entity_key, feature_name, {', '.join(columns)}) VALUES {rows} "
        f"ON CONFLICT (entity_key, feature_name) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in columns)} "
        "WHERE CASE WHEN event_us IS NULL THEN excluded.event_ts >= event_ts ELSE excluded.event_us >= event_us END"
    )


def _feast_seconds(moment: datetime) -> int:
    """An instant as Feast stores it: UTC without its zone, counted as if it were local time, and read back likewise."""
    naive = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    return int(naive.timestamp())


def _table_name(config: RepoConfig, view: FeatureView) -> str:
    name: str = compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    return name


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
