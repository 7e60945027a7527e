"""Online stores for tests: one view, rows of it, and what a store holds byte for byte."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import redis
from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.types import Array, Float64, Int64, String, UnixTimestamp

from evergreen.features.online_store import GuardedOnlineStore
from evergreen.features.redis_online_store import GuardedRedisOnlineStore
from evergreen.features.sqlite_online_store import GuardedSqliteOnlineStore

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2026, 1, 1, tzinfo=UTC)
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
CATEGORY = Entity(name="category", join_keys=["category"], value_type=ValueType.STRING)
FEATURES = {
    "clicks": (pa.int64(), Int64),
    "rate": (pa.float64(), Float64),
    "city": (pa.string(), String),
    "seen": (MICROS, UnixTimestamp),
    "history": (pa.list_(pa.string()), Array(String)),
}


def feature_view(*, ttl: timedelta = timedelta(0), name: str = "taste") -> FeatureView:
    """A view with two entities and a feature of each type."""
    keys = [Field(name=key, dtype=String) for key in ("user_id", "category")]
    return FeatureView(
        name=name,
        entities=[USER, CATEGORY],
        ttl=ttl,
        schema=keys + [Field(name=name, dtype=dtype) for name, (_, dtype) in FEATURES.items()],
        source=FileSource(path="taste.parquet", timestamp_field="event_timestamp"),
    )


def rows(*values: dict[str, Any]) -> pa.Table:
    """Rows of the view; what is not given is user u1, category c, START, and null."""
    schema = pa.schema(
        [("user_id", pa.string()), ("category", pa.string()), ("event_timestamp", MICROS)]
        + [(name, dtype) for name, (dtype, _) in FEATURES.items()]
    )
    defaults = {"user_id": "u1", "category": "c", "event_timestamp": START}
    return pa.Table.from_pylist([defaults | value for value in values], schema=schema)


@dataclass(frozen=True)
class Backend:
    """Evergreen's store and Feast's own, on databases of their own, and how to look into them."""

    ours: RepoConfig
    feasts: RepoConfig

    def open(self) -> GuardedOnlineStore:
        """Evergreen's store, with connections of its own."""
        raise NotImplementedError

    def open_feasts(self) -> OnlineStore:
        """Feast's store."""
        raise NotImplementedError

    def content(self, config: RepoConfig) -> dict[Any, Any]:
        """Everything that a store holds and Feast knows of."""
        raise NotImplementedError


class SqliteBackend(Backend):
    """Two files in a folder."""

    @classmethod
    def create(cls, folder: Path, **options: Any) -> SqliteBackend:
        ours = "evergreen.features.sqlite_online_store.GuardedSqliteOnlineStore"
        return cls(
            _config({"type": ours, "path": str(folder / "ours.db")}, **options),
            _config({"type": "sqlite", "path": str(folder / "feasts.db")}),
        )

    def open(self) -> GuardedOnlineStore:
        return self._updated(GuardedSqliteOnlineStore(), self.ours)

    def open_feasts(self) -> OnlineStore:
        return self._updated(SqliteOnlineStore(), self.feasts)

    def content(self, config: RepoConfig) -> dict[Any, Any]:
        columns = "entity_key, feature_name, value, value_text, event_ts, created_ts"
        with sqlite3.connect(config.online_store.path) as connection:
            return {row[:2]: row[2:] for row in connection.execute(f"SELECT {columns} FROM evergreen_taste")}

    @staticmethod
    def _updated(store: Any, config: RepoConfig) -> Any:
        store.update(config, [], [feature_view()], [], [], partial=False)
        return store


class RedisBackend(Backend):
    """Two databases of a server."""

    @classmethod
    def create(cls, address: str, **options: Any) -> RedisBackend:
        ours = "evergreen.features.redis_online_store.GuardedRedisOnlineStore"
        return cls(
            _config({"type": ours, "connection_string": address, "retry_seconds": 5}, **options),
            _config({"type": "redis", "connection_string": f"{address},db=1"}),
        )

    def open(self) -> GuardedOnlineStore:
        return GuardedRedisOnlineStore()

    def open_feasts(self) -> OnlineStore:
        return RedisOnlineStore()

    def content(self, config: RepoConfig) -> dict[Any, Any]:
        server = client(config)
        return {key: server.hgetall(key) for key in server.scan_iter() if not key.startswith(b"evergreen:")}


def client(config: RepoConfig) -> redis.Redis:
    """A plain client of the Redis that a store is configured for."""
    return RedisOnlineStore()._get_client(config.online_store)


def _config(online_store: dict[str, Any], *, batch_rows: int = 3) -> RepoConfig:
    return RepoConfig(
        project="evergreen",
        provider="local",
        registry="unused.db",
        online_store=online_store,
        entity_key_serialization_version=3,
        materialization={"online_write_batch_size": batch_rows},
    )
