"""Writing features into the online stores: Evergreen's stores, Feast's own, and the least that a client must do.

    python benchmarks/materialize.py [--keys 100000] [--rounds 3] [--out benchmarks/materialize.md]

Keys with 10 features each (4 int64, 4 double, 1 string, 1 timestamp) go from an Arrow table into an empty store, and
then again with later event times. Feast's writer is what its materialization runs: Arrow to protobuf objects, then
`online_write_batch`, 5,000 rows at a time. The floor sends bytes that were encoded before the clock started, without
comparing event times: redis-py's pipeline of HSET, and SQLite's executemany of one row a feature. The writers take
turns; the median of the rounds counts. Then whole runs of one view. Needs redis-server.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.types import Float64, Int64, String, UnixTimestamp
from feast.utils import _convert_arrow_to_proto

from evergreen.features.materialize import materialize_view
from evergreen.features.online_store import GuardedOnlineStore, OnlineRows
from evergreen.features.redis_online_store import GuardedRedisOnlineStore, _fields
from evergreen.features.sqlite_online_store import GuardedSqliteOnlineStore
from tests.servers import RedisServer, redis_server

START = datetime(2026, 1, 1, tzinfo=UTC)
TYPES = {"int": Int64, "double": Float64, "string": String, "time": UnixTimestamp}
FEATURES = [*(f"int_{i}" for i in range(4)), *(f"double_{i}" for i in range(4)), "string_0", "time_0"]
BATCH_ROWS = 5000
TIMES = pa.timestamp("us", tz="UTC")
WRITERS = ("evergreen", "feast", "floor")


def feature_view() -> FeatureView:
    """A view of the features, keyed by user."""
    return FeatureView(
        name="benchmark",
        entities=[Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)],
        schema=[Field(name="user_id", dtype=String)]
        + [Field(name=name, dtype=TYPES[name.split("_")[0]]) for name in FEATURES],
        source=FileSource(path="benchmark.parquet", timestamp_field="event_timestamp"),
    )


def rows(num_keys: int, *, later: timedelta = timedelta(0)) -> pa.Table:
    """Random rows of as many users."""
    random = np.random.default_rng(0)
    moments = START + later, START + later + timedelta(days=30)
    times = random.integers(*(int(moment.timestamp() * 1e6) for moment in moments), num_keys)
    columns = {"user_id": [f"user{i}" for i in range(num_keys)]}
    columns |= {name: random.integers(0, 500, num_keys) for name in FEATURES if name.startswith("int")}
    columns |= {name: random.random(num_keys) for name in FEATURES if name.startswith("double")}
    columns["string_0"] = [f"city{i}" for i in random.integers(0, 300, num_keys)]
    for name in ("time_0", "event_timestamp"):
        columns[name] = pa.array(times, TIMES)
    return pa.table(columns)


def write_by_feast(store: OnlineStore, config: RepoConfig, view: FeatureView, table: pa.Table) -> None:
    """What Feast's local materialization does with the rows that it pulled."""
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        protos = _convert_arrow_to_proto(batch, view, {"user_id": ValueType.STRING})
        store.online_write_batch(config, view, protos, None)


def encoded(view: FeatureView, table: pa.Table) -> list[OnlineRows]:
    return [OnlineRows.from_arrow(batch, view, with_texts=True) for batch in table.to_batches(max_chunksize=BATCH_ROWS)]


def redis_floor(config: RepoConfig, view: FeatureView, batches: list[OnlineRows]) -> Callable[[], None]:
    """HSET of what is encoded already."""
    client = RedisOnlineStore()._get_client(config.online_store)
    fields = _fields(config, view, FEATURES)

    def write() -> None:
        for batch in batches:
            with client.pipeline(transaction=False) as pipe:
                for key, *values in zip(batch.keys, *batch.values.values(), strict=True):
                    pipe.hset(key, mapping=dict(zip(fields, [b"", *values], strict=True)))
                pipe.execute()

    return write


def sqlite_floor(config: RepoConfig, view: FeatureView, batches: list[OnlineRows]) -> Callable[[], None]:
    """Feast's upsert for each feature of what is encoded already."""
    connection = SqliteOnlineStore()._get_conn(config)
    statement = (
        "INSERT INTO evergreen_benchmark (entity_key, feature_name, value, value_text, event_ts, created_ts) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, "
        "value_text = excluded.value_text, event_ts = excluded.event_ts, created_ts = excluded.created_ts"
    )

    def write() -> None:
        for batch in batches:
            with connection:
                connection.executemany(
                    statement,
                    [
                        (key, name, batch.values[name][row], batch.texts[name][row], at, None)
                        for row, (key, at) in enumerate(zip(batch.keys, batch.micros.tolist(), strict=True))
                        for name in FEATURES
                    ],
                )

    return write


def cpu_seconds(write: Callable[[], object], server: RedisServer | None = None) -> tuple[float, float]:
    """CPU seconds of this process, and of the server."""
    of_server = server.cpu_seconds if server else 0.0
    started = time.process_time()
    write()
    spent = time.process_time() - started
    return spent, (server.cpu_seconds if server else 0.0) - of_server


@contextlib.contextmanager
def empty_store(name: str, writer: str) -> Iterator[tuple[OnlineStore, RepoConfig, RedisServer | None]]:
    """A store of Evergreen's or of Feast's, and its server."""
    ours = writer == "evergreen"
    if name == "Redis":
        with redis_server() as server:
            store = GuardedRedisOnlineStore() if ours else RedisOnlineStore()
            kind = "evergreen.features.redis_online_store.GuardedRedisOnlineStore" if ours else "redis"
            yield store, repo_config({"type": kind, "connection_string": server.address}), server
    else:
        with tempfile.TemporaryDirectory() as folder:
            store = GuardedSqliteOnlineStore() if ours else SqliteOnlineStore()
            kind = "evergreen.features.sqlite_online_store.GuardedSqliteOnlineStore" if ours else "sqlite"
            config = repo_config({"type": kind, "path": f"{folder}/online.db"})
            store.update(config, [], [feature_view()], [], [], partial=False)
            store._get_conn(config).commit()
            yield store, config, None


def measure_writers(name: str, tables: list[pa.Table], rounds: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """CPU seconds by writer and by which of the tables is written, over the one before."""
    view = feature_view()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for writer in WRITERS:
            with empty_store(name, writer) as (store, config, server):
                for place, table in enumerate(tables):
                    if writer == "evergreen":
                        write = functools.partial(store.write_table, config, view, table)
                    elif writer == "feast":
                        write = functools.partial(write_by_feast, store, config, view, table)
                    else:
                        floor = redis_floor if name == "Redis" else sqlite_floor
                        write = floor(config, view, encoded(view, table))
                    found.setdefault((writer, place), []).append(cpu_seconds(write, server))
    return found


def writer_lines(name: str, tables: list[pa.Table], rounds: int) -> list[str]:
    """Lines of the first table."""
    found = measure_writers(name, tables, rounds)
    lines = []
    for place, into in enumerate(("an empty store", "a full one")):
        rate, server = {}, {}
        for writer in WRITERS:
            spent = found[writer, place]
            rate[writer] = tables[place].num_rows / statistics.median(own for own, _ in spent)
            server[writer] = statistics.median(of_server for _, of_server in spent)
        served = [f"{server[writer]:.1f}" if name == "Redis" else "" for writer in ("evergreen", "feast")]
        lines.append(
            f"| {name} | {into} | {rate['evergreen']:,.0f} | {rate['feast']:,.0f} | {rate['floor']:,.0f} "
            f"| {rate['evergreen'] / rate['feast']:.1f} | {rate['evergreen'] / rate['floor']:.1f} "
            f"| {served[0]} | {served[1]} |"
        )
    return lines


@dataclass(frozen=True)
class Writer:
    """A `materialize.ViewWriter`."""

    store: GuardedOnlineStore
    config: RepoConfig

    def marker(self) -> str | None:
        return self.store.marker(self.config, feature_view())

    def set_marker(self, marker: str) -> None:
        self.store.set_marker(self.config, feature_view(), marker)

    def write(self, table: pa.Table) -> int:
        return self.store.write_table(self.config, feature_view(), table)

    def withdraw(self, table: pa.Table) -> int:
        return self.store.withdraw(self.config, feature_view(), table)


def incremental_lines(name: str, first: pa.Table) -> list[str]:
    """Lines of the second table: a first run, one without changes, one where each hundredth key has a new row."""
    now = first["event_timestamp"].to_pylist()
    moved = pa.array([at + timedelta(days=90) if row % 100 == 0 else at for row, at in enumerate(now)], TIMES)
    changed = first.set_column(first.column_names.index("event_timestamp"), "event_timestamp", moved)
    lines = []
    with empty_store(name, "evergreen") as (store, config, _), tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "benchmark.parquet"
        for what, rows_of_run in (("first", first), ("nothing new", first), ("1 % new", changed)):
            pq.write_table(rows_of_run, table)
            done = []
            spent, _ = cpu_seconds(
                lambda done=done: done.append(
                    materialize_view(
                        table,
                        ["user_id"],
                        FEATURES,
                        as_of=START + timedelta(days=365),
                        records=Path(folder) / "materialized",
                        writer=Writer(store, config),
                        full=False,
                    )
                )
            )
            lines.append(f"| {name} | {what} | {done[0].written:,} | {spent:.2f} |")
    return lines


def repo_config(online_store: dict[str, str]) -> RepoConfig:
    return RepoConfig(
        project="evergreen",
        provider="local",
        registry="unused.db",
        online_store=online_store,
        entity_key_serialization_version=3,
        materialization={"online_write_batch_size": BATCH_ROWS},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tables = [rows(arguments.keys), rows(arguments.keys, later=timedelta(days=40))]
    lines = [
        f"# Materialization, {arguments.keys:,} keys x {len(FEATURES)} features, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "",
        "Keys a CPU second of the writing process (SQLite runs within it), and CPU seconds of the Redis server.",
        "",
        "| store | into | Evergreen | Feast | floor | to Feast | to floor | server: Evergreen | Feast |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(line for name in ("Redis", "SQLite") for line in writer_lines(name, tables, arguments.rounds)),
        "",
        "Whole runs of one view, from its Parquet file on:",
        "",
        "| store | run | keys written | CPU s |",
        "|---|---|---:|---:|",
        *(line for name in ("Redis", "SQLite") for line in incremental_lines(name, tables[0])),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
