"""Spark gives the values that DuckDB gives, on every kind of log, whatever the machine's time zone.

One Spark for the whole module: its first result takes half a minute.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.engines import SparkEngine, duckdb_engine, spark_engine
from evergreen.features.leakage import past_of
from evergreen.features.partitions import build_feature_partitions
from evergreen.features.point_in_time import join_features
from evergreen.features.store import CONFIG, FeatureStore
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import simulate_log
from tests.integration.test_feature_store import NOW, RICH, assert_online_is, spine, write_tables
from tests.servers import RedisServer, redis_server

SparkSession = pytest.importorskip("pyspark.sql", reason="pyspark is not installed: uv sync --extra spark").SparkSession
pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java, which Spark runs on")

DESKDROP = Path(__file__).resolve().parents[3] / "shared" / "data" / "deskdrop"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkEngine]:
    settings = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "1g",
        "spark.local.dir": str(tmp_path_factory.mktemp("spark")),
        "spark.sql.shuffle.partitions": "2",
        # A machine in New York must not shift a single hour. And Java's quick compiler: the other is for long runs.
        "spark.driver.extraJavaOptions": "-Duser.timezone=America/New_York -XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.sql.session.timeZone": "America/New_York",
    }
    with spark_engine(master="local[2]", settings=settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Impressions, as_of within a day."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate_log(SimulatorConfig(num_users=50, num_items=50, num_days=4, events_per_day=500, seed=5), folder / "log")
    as_of = datetime(2025, 1, 4, 15, 20, tzinfo=UTC)
    return ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot", as_of=as_of)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Ratings with thirds, lists, nulls, quiet weeks, events at one instant and in the last microsecond of a day."""
    folder = tmp_path_factory.mktemp("ratings")
    rng = np.random.default_rng(3)
    count = 400
    start = np.datetime64("2024-12-30T00:00:00.000000")
    times = start + rng.choice([0, 1, 2, 9, 33], count) * np.timedelta64(1, "D")
    times = times + rng.choice([0, 1, 3_599_999_999, 3_600_000_000, 86_399_999_999], count).astype("timedelta64[us]")
    log = pa.table(
        {
            "t": pa.array(times, pa.timestamp("us", tz="UTC")),
            "u": pa.array([f"u{k}" if k else None for k in rng.integers(0, 9, count)]),
            "i": pa.array([f"i{k}" if k else None for k in rng.integers(0, 9, count)]),
            "stars": pa.array(rng.choice([1.0, 2.5, 3.3, 10 / 3, 5.0], count), pa.float32()),
            "country": pa.array(rng.choice(["de", "fr", None], count).tolist()),
            "price": pa.array([None if p == 0 else p for p in rng.choice([0, 1.5, 2.0, 1 / 3], count).tolist()]),
            "tags": pa.array(rng.choice(["a", "a|b", "b|a", ""], count).tolist()),
        }
    )
    pq.write_table(log, folder / "log.parquet")
    mapping = Mapping.model_validate(
        {
            "name": "log",
            "kind": "ratings",
            "rating": {"column": "stars"},
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i", "category": "tags"},
            "split": {"attribution_window": "90m"},
            "user_features": {"country": "categorical"},
            "item_features": {"price": "numeric", "tags": "multi"},
        }
    )
    return ingest_log(mapping, str(folder / "log.parquet"), folder / "snapshot")


@pytest.fixture(scope="module")
def deskdrop(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Interactions: the first fortnight of a real log."""
    if not DESKDROP.is_dir():
        pytest.skip(f"{DESKDROP} is not here")
    whole = ingest_log(Mapping.load("deskdrop"), str(DESKDROP), tmp_path_factory.mktemp("deskdrop") / "snapshot")
    return past_of(whole, cut=datetime(2016, 3, 28, tzinfo=UTC))


def by_key(tables: FeatureTables, name: str) -> pa.Table:
    rows = ds.dataset(tables.table(name), format="parquet", schema=tables.schema(name)).to_table()
    return rows.sort_by([(key, "ascending") for key in (*JOIN_KEYS[name], "event_timestamp")]).combine_chunks()


def assert_equal(left: FeatureTables, right: FeatureTables) -> None:
    """Rows, counts, times and lists, and rates to the last bit: all sums are over integers."""
    for name in JOIN_KEYS:
        one, other = by_key(left, name), by_key(right, name)
        assert one.num_rows == other.num_rows, name
        for column in one.column_names:
            assert one[column].equals(other[column]), f"{name}: {column}"
    assert left.manifest.rows == right.manifest.rows


@pytest.mark.parametrize("log", ["simulated", "ratings", pytest.param("deskdrop", marks=pytest.mark.heavy)])
def test_both_engines_give_the_same_values(
    log: str, spark: SparkEngine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    snapshot: Snapshot = request.getfixturevalue(log)
    build_feature_partitions(snapshot, tmp_path / "spark", engine=spark)
    tables = FeatureTables.load(tmp_path / "spark")
    assert_equal(tables, build_feature_tables(snapshot, tmp_path / "duckdb"))
    assert sum(tables.manifest.rows.values()) > snapshot.manifest.rows
    assert not [file for file in tables.path.rglob("*.crc") if file.is_file()]


def test_spark_mends_dates_that_duckdb_wrote(spark: SparkEngine, simulated: Snapshot, tmp_path: Path) -> None:
    whole = build_feature_tables(simulated, tmp_path / "whole")
    with duckdb_engine(tmp_path / "spill") as duckdb:
        build_feature_partitions(simulated, tmp_path / "t", engine=duckdb)
    for name in JOIN_KEYS:
        for day in ("2025-01-02", "2025-01-03"):
            shutil.rmtree(tmp_path / "t" / f"{name}.parquet" / f"date={day}", ignore_errors=True)
    kept = {path: path.stat().st_ino for path in (tmp_path / "t").rglob("date=*/*.parquet")}
    build_feature_partitions(simulated, tmp_path / "t", engine=spark, first=date(2025, 1, 2), last=date(2025, 1, 3))
    mended = FeatureTables.load(tmp_path / "t")
    assert_equal(mended, whole)
    assert {path: path.stat().st_ino for path in kept} == kept
    spine = ds.dataset(simulated.files, format="parquet").to_table(
        columns=["event_timestamp", "user_id", "item_id", "category"]
    )
    assert join_features(spine, mended).equals(join_features(spine, whole))


def test_broken_event_file_is_named(spark: SparkEngine, simulated: Snapshot, tmp_path: Path) -> None:
    broken = tmp_path / "snapshot"
    shutil.copytree(simulated.path, broken)
    file = next(iter(sorted(broken.rglob("date=2025-01-02/*.parquet"))))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="date=2025-01-02"):
        build_feature_partitions(Snapshot.load(broken), tmp_path / "t", engine=spark)
    assert [entry.name for entry in (tmp_path / "t").iterdir()] == [".lock"]


def test_store_file_of_a_cluster_gives_the_same_from_spark_and_redis(server: RedisServer, tmp_path: Path) -> None:
    """Last, for it ends the session of the other tests: Feast starts its own, in the Java machine that is there."""
    if (session := SparkSession.getActiveSession()) is not None:
        session.stop()
    tables = write_tables(tmp_path / "tables", RICH)
    store = FeatureStore.create(tmp_path / "store", tables, config="feature_store.cluster.yaml")
    config = yaml.safe_load((store.path / CONFIG).read_text())
    config["online_store"]["connection_string"] = server.address
    config["offline_store"]["spark_conf"] |= {"spark.master": "local[1]", "spark.ui.enabled": "false"}
    config["offline_store"]["spark_conf"] |= {"spark.sql.shuffle.partitions": "1"}
    (store.path / CONFIG).write_text(yaml.safe_dump(config))
    store = FeatureStore.open(store.path)
    store.materialize(NOW)
    assert_online_is(store, tables, NOW)
    rows = spine(40)
    assert store.historical(rows).equals(join_features(rows, tables))
