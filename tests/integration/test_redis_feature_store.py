"""The feature store as a whole on Redis: materialized, refilled after a restart, brought up to date; and by `feast`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.features.store import CONFIG, FeatureStore
from tests.integration.test_feature_store import MICROS, NOW, RICH, assert_online_is, mapping, write_tables
from tests.servers import RedisServer, redis_server


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    return write_tables(tmp_path_factory.mktemp("features") / "tables", RICH)


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tables: FeatureTables, tmp_path: Path) -> FeatureStore:
    store = FeatureStore.create(tmp_path / "store", tables)
    return store if request.param == "sqlite" else on_redis(store, request.getfixturevalue("server"))


def on_redis(store: FeatureStore, server: RedisServer) -> FeatureStore:
    """The same store with Redis, empty, in the place of SQLite."""
    server.stop()
    server.start()
    config = yaml.safe_load((store.path / CONFIG).read_text())
    config["online_store"] = {
        "type": "evergreen.features.redis_online_store.GuardedRedisOnlineStore",
        "connection_string": server.address,
        "retry_seconds": 5,
    }
    (store.path / CONFIG).write_text(yaml.safe_dump(config))
    return FeatureStore.open(store.path)


def with_late_rows(tables: FeatureTables, folder: Path) -> FeatureTables:
    """Tables in which the last row of some keys is corrected, of some gone, and some have a row that came late."""
    folder.mkdir()
    (folder / FeatureTables.MANIFEST).write_bytes((tables.path / FeatureTables.MANIFEST).read_bytes())
    for name in tables.manifest.rows:
        table = pq.read_table(tables.table(name))
        kept = table.filter(pa.array(row % 5 != 0 for row in range(table.num_rows)))
        late = kept.slice(0, 40)
        moved = pa.array([at + timedelta(microseconds=7) for at in late["event_timestamp"].to_pylist()], MICROS)
        late = late.set_column(table.schema.get_field_index("event_timestamp"), "event_timestamp", moved)
        order = [(key, "ascending") for key in (*JOIN_KEYS[name], "event_timestamp")]
        pq.write_table(pa.concat_tables([kept, late]).sort_by(order), folder / f"{name}.parquet")
    return FeatureTables.load(folder)


def test_tables_that_changed_behind_the_last_end_come_online(
    store: FeatureStore, tables: FeatureTables, tmp_path: Path
) -> None:
    first = store.materialize(NOW)
    assert_online_is(store, tables, NOW)
    assert all(done.written == done.rows > 0 for done in first.values())
    again = store.materialize(NOW)
    assert all(done.written == done.withdrawn == 0 for done in again.values())

    newer = with_late_rows(tables, tmp_path / "newer")
    store = store.replace_tables(newer)
    changed = store.materialize(NOW)
    assert_online_is(store, newer, NOW)
    assert all(0 < done.written < done.rows and done.withdrawn > 0 for done in changed.values())

    later = NOW + timedelta(hours=5)
    advanced = store.materialize(later)
    assert_online_is(store, newer, later)
    assert all(0 < done.written < done.rows for done in advanced.values())


def test_redis_that_restarts_empty_is_filled_again(server: RedisServer, tables: FeatureTables, tmp_path: Path) -> None:
    store = on_redis(FeatureStore.create(tmp_path / "store", tables), server)
    store.materialize(NOW)
    server.stop()
    server.start()
    refilled = store.materialize(NOW)
    assert all(done.written == done.rows for done in refilled.values())
    assert_online_is(store, tables, NOW)


def test_online_store_of_feasts_own_is_written_by_feast(tables: FeatureTables, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", tables)
    config = yaml.safe_load((store.path / CONFIG).read_text())
    config["online_store"]["type"] = "sqlite"
    (store.path / CONFIG).write_text(yaml.safe_dump(config))
    store = FeatureStore.open(store.path)
    assert store.materialize(NOW) == {}
    assert_online_is(store, tables, NOW)


def test_tables_of_another_log_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    other = write_tables(tmp_path / "other", mapping(item_features={"weight": "numeric"}))
    with pytest.raises(ArtifactError, match="create the feature store anew"):
        store.replace_tables(other)


def test_store_file_that_does_not_exist_is_named(tables: FeatureTables, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no feature_store\.moon\.yaml"):
        FeatureStore.create(tmp_path / "store", tables, config="feature_store.moon.yaml")


@pytest.mark.slow
def test_feast_materialize_gives_the_same_and_never_goes_back(tables: FeatureTables, tmp_path: Path) -> None:
    """Feast's command line, and its Python, write through the same guard."""
    earlier, start = NOW - timedelta(days=2), datetime(2025, 1, 1, tzinfo=UTC)
    store = FeatureStore.create(tmp_path / "store", tables)
    store.materialize(earlier)
    feast = Path(sys.executable).with_name("feast")
    done = subprocess.run(
        [feast, "-c", store.path, "materialize", start.isoformat(), NOW.isoformat()],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    store = FeatureStore.open(store.path)
    assert_online_is(store, tables, NOW)
    store._store.materialize(start, earlier)
    assert_online_is(store, tables, NOW)
