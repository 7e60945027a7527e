"""What is SQLite's alone: a full disk, files that Feast wrote, a second writer."""

from __future__ import annotations

import sqlite3
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from feast import ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.utils import _convert_arrow_to_proto

from evergreen.features.online_store import OnlineStoreError
from tests.online_stores import START, SqliteBackend, feature_view, rows

VIEW = feature_view()


@pytest.fixture
def backend(tmp_path: Path) -> SqliteBackend:
    return SqliteBackend.create(tmp_path, batch_rows=100)


def users(num_users: int) -> pa.Table:
    return rows(*({"user_id": f"u{user}", "clicks": user} for user in range(num_users)))


def test_full_disk_undoes_the_batch_and_names_the_file(backend: SqliteBackend) -> None:
    store = backend.open()
    pages = store._get_conn(backend.ours).execute("PRAGMA max_page_count = 40").fetchone()
    assert pages == (40,)
    with pytest.raises(OnlineStoreError, match=r"ours\.db: SQLite says 'database or disk is full'.*make room"):
        store.write_table(backend.ours, VIEW, users(5000))
    kept = backend.content(backend.ours)
    assert kept
    assert len(kept) % (100 * len(VIEW.features)) == 0
    store._get_conn(backend.ours).execute("PRAGMA max_page_count = 100000")
    assert store.write_table(backend.ours, VIEW, users(5000)) == 0
    assert len(backend.content(backend.ours)) == 5000 * len(VIEW.features)


def test_file_that_another_process_holds_is_named(backend: SqliteBackend) -> None:
    store = backend.open()
    store._get_conn(backend.ours).execute("PRAGMA busy_timeout = 50")
    with sqlite3.connect(backend.ours.online_store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OnlineStoreError, match=r"ours\.db: SQLite says 'database is locked'"):
            store.write_table(backend.ours, VIEW, users(1))
        other.execute("ROLLBACK")
    assert store.write_table(backend.ours, VIEW, users(1)) == 0


def test_rows_that_feasts_own_store_wrote_are_guarded_to_the_second(backend: SqliteBackend) -> None:
    feasts = backend.open_feasts()
    keys = {"user_id": ValueType.STRING, "category": ValueType.STRING}
    feasts.online_write_batch(backend.feasts, VIEW, _convert_arrow_to_proto(users(3), VIEW, keys), None)
    Path(backend.feasts.online_store.path).rename(backend.ours.online_store.path)
    store = backend.open()
    earlier = rows({"user_id": "u1", "clicks": 9, "event_timestamp": START - timedelta(seconds=1)})
    later = rows({"user_id": "u2", "clicks": 9, "event_timestamp": START + timedelta(seconds=1)})
    assert store.write_table(backend.ours, VIEW, earlier) == 1
    assert store.write_table(backend.ours, VIEW, later) == 0
    entities = [
        EntityKey(join_keys=["user_id", "category"], entity_values=[Value(string_val=user), Value(string_val="c")])
        for user in ("u1", "u2")
    ]
    read = store.online_read(backend.ours, VIEW, entities)
    assert [values["clicks"].int64_val for _, values in read] == [1, 9]
