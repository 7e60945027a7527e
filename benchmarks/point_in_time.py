"""The point-in-time join: Evergreen's offline store, the bare DuckDB ASOF JOIN, and Feast's own DuckDB store.

    python benchmarks/point_in_time.py [--rows 1000000] [--times during after] [--stores evergreen asof feast]
        [--rounds 3] [--out benchmarks/point_in_time.md]

Three views of ten numbers, 50,000 keys a view, 28 daily rows a key. Entity rows ask at any time during these days (half
of a key's rows are known then) or on the day after them (all 28 are). Every join runs in a process of its own, the
stores by turns; all must give the same sums. CPU seconds are of all threads, from the entity rows in memory to the
result in Arrow; peak memory is what the process gains over its imports and entity rows, and what it holds in all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VIEWS = {"user": "user_id", "item": "item_id", "shop": "shop_id"}
NUM_KEYS, NUM_DAYS, NUM_FEATURES = 50_000, 28, 10
START = datetime(2026, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
OFFLINE_STORES = {"evergreen": "evergreen.features.offline_store.AsofOfflineStore", "feast": "duckdb"}
ASOF = "asof"


def features_of(view: str) -> list[str]:
    return [f"{view}_f{i}" for i in range(NUM_FEATURES)]


def keys(codes: np.ndarray) -> pa.Array:
    return pa.array(np.char.add("k", codes.astype(str)))


def write_data(folder: Path, num_rows: int, times: str) -> None:
    """Write the views' tables, sorted by key and time as Evergreen's feature tables are, and the entity rows."""
    generator = np.random.default_rng(0)
    day = 86_400_000_000
    start = int(START.timestamp()) * 1_000_000
    for view, key in VIEWS.items():
        codes = np.repeat(np.arange(NUM_KEYS), NUM_DAYS)
        at = start + np.tile(np.arange(NUM_DAYS), NUM_KEYS) * day + generator.integers(0, day, len(codes))
        values = {name: generator.random(len(codes)) for name in features_of(view)}
        table = pa.table({key: keys(codes), "event_timestamp": pa.array(at, pa.int64()).cast(MICROS), **values})
        pq.write_table(table, folder / f"{view}.parquet", compression="zstd", row_group_size=102_400)
    entities = {key: keys(generator.integers(0, NUM_KEYS, num_rows)) for key in VIEWS.values()}
    first_day = 0 if times == "during" else NUM_DAYS
    at = start + generator.integers(first_day * day, (NUM_DAYS + 1) * day, num_rows)
    entities["event_timestamp"] = pa.array(at, pa.int64()).cast(MICROS)
    pq.write_table(pa.table(entities), folder / "entities.parquet")


def open_store(folder: Path, name: str):
    """A Feast store of the three views."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig
    from feast.repo_config import RegistryConfig
    from feast.types import Float64

    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=RegistryConfig(path=str(folder / f"{name}.db")),
            offline_store={"type": OFFLINE_STORES[name]},
            online_store=SqliteOnlineStoreConfig(path=str(folder / f"{name}-online.db")),
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )
    entities = {key: Entity(name=key, join_keys=[key], value_type=ValueType.STRING) for key in VIEWS.values()}
    views = [
        FeatureView(
            name=view,
            entities=[entities[key]],
            ttl=timedelta(0),
            schema=[Field(name=name, dtype=Float64) for name in features_of(view)],
            source=FileSource(name=view, path=str(folder / f"{view}.parquet"), timestamp_field="event_timestamp"),
        )
        for view, key in VIEWS.items()
    ]
    store.apply([*entities.values(), *views])
    return store


def asof_sql(folder: Path) -> str:
    """What somebody would write by hand."""
    joins = "\n".join(
        f"ASOF LEFT JOIN read_parquet('{folder / view}.parquet') {view} "
        f"ON e.{key} = {view}.{key} AND e.event_timestamp >= {view}.event_timestamp"
        for view, key in VIEWS.items()
    )
    columns = ", ".join(f"{view}.{name}" for view in VIEWS for name in features_of(view))
    return f"SELECT e.*, {columns} FROM entities e {joins}"


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


class PeakMemory:
    """The most that this process holds while the block runs, in MiB, looked at every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.mib = resident_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.mib = max(self.mib, resident_mib())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def join(folder: Path, name: str) -> dict[str, float]:
    """Join in this process, and say what it cost."""
    entities = pq.read_table(folder / "entities.parquet")
    if name == ASOF:
        db = duckdb.connect()
        db.execute("SET TimeZone = 'UTC'")
        db.register("entities", entities)

        def run() -> pa.Table:
            return db.sql(asof_sql(folder)).to_arrow_table()
    else:
        store = open_store(folder, name)
        references = [f"{view}:{feature}" for view in VIEWS for feature in features_of(view)]
        frame = entities.to_pandas()
        del entities

        def run() -> pa.Table:
            return store.get_historical_features(frame, references).to_arrow()

    before = resident_mib()
    with PeakMemory() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "gained_mib": peak.mib - before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": result.num_rows,
        "sums": [round(pc.sum(result[name]).as_py(), 3) for view in VIEWS for name in features_of(view)],
        "nulls": sum(result[name].null_count for view in VIEWS for name in features_of(view)),
    }


def measure(folder: Path, names: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every store in turn, `rounds` times, each in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--join", name, "--folder", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, {k: round(v, 1) for k, v in runs[name][-1].items() if k not in ("sums",)}, flush=True)
    return runs


def table(times: str, runs: dict[str, list[dict[str, float]]]) -> list[str]:
    equal = len({json.dumps([run["rows"], run["sums"], run["nulls"]]) for of in runs.values() for run in of}) == 1
    ours = min(run["cpu_s"] for run in runs["evergreen"]) if "evergreen" in runs else float("nan")
    lines = [
        "",
        f"Entity rows {times} the days of the feature rows; the results are {'equal' if equal else 'NOT EQUAL'}.",
        "",
        "| | CPU s | against Evergreen's | wall s | memory gained MiB | peak RSS MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, of in runs.items():
        least = {what: min(run[what] for run in of) for what in ("cpu_s", "wall_s", "gained_mib", "peak_mib")}
        lines.append(
            f"| {name} | {least['cpu_s']:.1f} | {least['cpu_s'] / ours:.2f} | {least['wall_s']:.1f} "
            f"| {least['gained_mib']:.0f} | {least['peak_mib']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", nargs="+", choices=["during", "after"], default=["during", "after"])
    parser.add_argument("--stores", nargs="+", choices=[*OFFLINE_STORES, ASOF], default=["evergreen", ASOF, "feast"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.join:
        print(json.dumps(join(arguments.folder, arguments.join)))
        return
    lines = [
        f"# Point-in-time join, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"DuckDB {duckdb.__version__}",
        "",
        f"{arguments.rows:,} entity rows × {len(VIEWS)} views × {NUM_FEATURES} features, {NUM_DAYS} rows a key; least "
        f"of {arguments.rounds} rounds.",
    ]
    for times in arguments.times:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), arguments.rows, times)
            lines += table(times, measure(Path(folder), arguments.stores, arguments.rounds))
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
