"""The feature store as it is used: created from tables, asked for the past, materialized, asked for now, and moved."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError, RequestError
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables, FeatureTablesManifest
from evergreen.contracts.mapping import Mapping
from evergreen.features.point_in_time import items_as_of, join_features, service_columns
from evergreen.features.request import REQUEST_SCHEMA
from evergreen.features.schema import feature_table_schemas
from evergreen.features.store import FeatureStore
from tests.joined import Joined

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=6)
DAYS = 10


def mapping(**features: dict[str, str]) -> Mapping:
    return Mapping.model_validate(
        {
            "name": "log",
            "kind": "interactions",
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
            **features,
        }
    )


RICH = mapping(user_features={"segment": "categorical"}, item_features={"price": "numeric", "tags": "multi"})


def random_value(dtype: pa.DataType, known: datetime, rng: random.Random) -> object:
    """A value known before `known`, one time in eight null."""
    if rng.random() < 0.125:
        return None
    if pa.types.is_integer(dtype):
        return rng.randrange(100)
    if pa.types.is_floating(dtype):
        return rng.random()
    if pa.types.is_timestamp(dtype):
        return known - timedelta(microseconds=rng.randrange(1, 10**11))
    if pa.types.is_list(dtype):
        return [f"i{rng.randrange(30)}" for _ in range(rng.randrange(8))]
    return f"v{rng.randrange(4)}"


def write_tables(path: Path, log: Mapping, *, empty: tuple[str, ...] = ()) -> FeatureTables:
    """Random tables: 40 users, 30 items, 4 categories, hourly change points over DAYS days."""
    path.mkdir()
    rng = random.Random(5)
    sizes = {"user_id": 40, "item_id": 30, "category": 4}
    counts = {}
    for name, schema in feature_table_schemas(log).items():
        rows = {}
        for _ in range(0 if name in empty else 400):
            key = tuple(f"{column[0]}{rng.randrange(sizes[column])}" for column in JOIN_KEYS[name])
            known = START + timedelta(hours=rng.randrange(24 * DAYS))
            values = {field.name: random_value(field.type, known, rng) for field in schema}
            values |= dict(zip(JOIN_KEYS[name], key, strict=True))
            rows[(key, known)] = values | {"event_timestamp": known}
        table = pa.Table.from_pylist([rows[key] for key in sorted(rows)], schema=schema)
        pq.write_table(table, path / f"{name}.parquet")
        counts[name] = table.num_rows
    as_of = START + timedelta(days=DAYS)
    first_event = START - timedelta(days=2)
    FeatureTablesManifest(snapshot_id="s", mapping=log, as_of=as_of, first_event=first_event, rows=counts).write(
        path / FeatureTables.MANIFEST
    )
    return FeatureTables.load(path)


def spine(num_rows: int = 300, *, at: datetime | None = None, without: tuple[str, ...] = ()) -> pa.Table:
    """Random rows, some with null or unknown keys; keys named in `without` are null throughout."""
    rng = random.Random(11)

    def key(name: str, size: int) -> pa.Array:
        ids = [
            None if name in without or rng.random() < 0.1 else f"{name[0]}{rng.randrange(size)}"
            for _ in range(num_rows)
        ]
        return pa.array(ids, pa.string())

    times = [at or START + timedelta(microseconds=rng.randrange(DAYS * 86_400_000_000)) for _ in range(num_rows)]
    return pa.table(
        {
            "row_id": pa.array(range(num_rows)),
            "event_timestamp": pa.array(times, MICROS),
            "user_id": key("user_id", 44),
            "item_id": key("item_id", 33),
            "category": key("category", 5),
        }
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    return write_tables(tmp_path_factory.mktemp("features") / "tables", RICH)


@pytest.fixture(scope="module")
def store(tables: FeatureTables, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store that was materialized as of NOW."""
    store = FeatureStore.create(tmp_path_factory.mktemp("features") / "store", tables)
    store.materialize(NOW)
    return store


@pytest.mark.parametrize("without", [(), ("category",), ("user_id", "category"), ("user_id", "item_id", "category")])
def test_feast_gives_what_the_join_gives(store: FeatureStore, tables: FeatureTables, without: tuple[str, ...]) -> None:
    rows = spine(without=without)
    historical = store.historical(rows)
    joined = join_features(rows, tables)
    assert historical.column_names == joined.column_names
    for name in joined.column_names:
        assert historical[name].combine_chunks().equals(joined[name].combine_chunks()), name


def test_rows_know_what_was_known_at_the_moment_that_is_asked_for(store: FeatureStore, tables: FeatureTables) -> None:
    """And how long ago things are is counted to the row."""
    rows = spine()
    known_at = pa.array([at - timedelta(hours=7) for at in rows["event_timestamp"].to_pylist()], MICROS)
    historical = store.historical(rows, known_at=known_at)
    assert historical.equals(Joined(tables).historical(rows, known_at=known_at))
    assert not historical["user_events_1d"].equals(store.historical(rows)["user_events_1d"])


def test_log_without_users_and_categories_has_null_features(tmp_path: Path) -> None:
    empty = ("user_activity", "user_category_activity", "user_profile")
    tables = write_tables(tmp_path / "tables", mapping(), empty=empty)
    store = FeatureStore.create(tmp_path / "store", tables)
    rows = spine(20, without=("user_id", "category"))
    historical = store.historical(rows)
    assert historical.equals(join_features(rows, tables))
    assert historical["user_history"].null_count == 20
    assert historical["item_events_1d"].null_count < 20
    store.materialize(NOW)
    assert store.online("ranker_v1", pa.table({"user_id": ["u1"]}))["user_events_1d"].to_pylist() == [None]


def test_historical_of_no_rows_has_the_columns(store: FeatureStore) -> None:
    historical = store.historical(spine(1).slice(0, 0))
    assert historical.num_rows == 0
    assert set(service_columns(store.tables)) < set(historical.column_names)


def test_retrieval_service_is_served_too(store: FeatureStore, tables: FeatureTables) -> None:
    rows = spine(50)
    historical = store.historical(rows, "retrieval_v1")
    assert historical.equals(join_features(rows, tables).select(historical.column_names))
    assert {"user_history", "segment", "item_rate_7d", "price"} < set(historical.column_names)


def assert_online_is(store: FeatureStore, tables: FeatureTables, at: datetime) -> None:
    """Whatever a user or an item may be asked for is what the point-in-time join gives."""
    rows = spine(at=at)
    entities = rows.select(["user_id", "item_id", "category"])
    online = store.online("ranker_v1", entities.append_column("request_timestamp", rows["event_timestamp"]))
    joined = join_features(rows, tables)
    for name in service_columns(tables):
        expected = joined[name]
        if pa.types.is_timestamp(expected.type):  # Feast keeps whole seconds online
            expected = expected.cast(pa.timestamp("s", tz="UTC"), safe=False).cast(MICROS)
        assert online[name].to_pylist() == expected.to_pylist(), name
        assert online.schema.field(name).type == joined.schema.field(name).type


def test_online_equals_the_join_at_the_time_of_materialization(store: FeatureStore, tables: FeatureTables) -> None:
    assert_online_is(store, tables, NOW)


def test_online_answers_for_the_keys_it_is_given(store: FeatureStore) -> None:
    users = store.online("ranker_v1", pa.table({"user_id": ["u1", "nobody", None, "u1"]}))
    assert "user_history" in users.column_names
    assert not {"item_events_1h", "user_category_events_1h", "hour"} & set(users.column_names)
    events = users["user_events_30d"].to_pylist()
    assert events[1:3] == [None, None]
    assert users.slice(0, 1).to_pylist() == users.slice(3, 1).to_pylist()

    pairs = store.online("ranker_v1", pa.table({"user_id": ["u1"], "category": ["c1"]}))
    assert "user_category_events_1h" in pairs.column_names

    items = store.online("ranker_v1", store.items().select(["item_id"]))
    assert items["item_id"].equals(store.items()["item_id"])
    assert set(REQUEST_SCHEMA.names).isdisjoint(items.column_names)


def test_online_answers_for_many_keys_in_order(store: FeatureStore) -> None:
    ids = [f"i{n % 33}" for n in range(2500)]
    many = store.online("ranker_v1", pa.table({"item_id": ids}))
    few = store.online("ranker_v1", pa.table({"item_id": ids[:33]}))
    assert many["item_id"].to_pylist() == ids
    assert many.slice(2475, 25).to_pylist() == few.slice(0, 25).to_pylist()


def test_online_without_any_key_is_refused(store: FeatureStore) -> None:
    with pytest.raises(RequestError, match="user_id"):
        store.online("ranker_v1", pa.table({"color": ["red"]}))


def test_unknown_service_is_named_with_the_known_ones(store: FeatureStore) -> None:
    with pytest.raises(ArtifactError, match=r"ranker_v9.*ranker_v1"):
        store.historical(spine(1), "ranker_v9")


def test_catalogue_is_as_of_the_materialization(store: FeatureStore, tables: FeatureTables) -> None:
    assert store.items().equals(items_as_of(tables, NOW))
    assert store.categories() == sorted(set(store.items()["category"].to_pylist()) - {None})


def test_store_goes_forward_but_not_back(tables: FeatureTables, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", tables)
    with pytest.raises(ArtifactError, match="materialize"):
        store.items()
    keys = pa.table({"user_id": [f"u{n}" for n in range(40)]})
    store.materialize(START + timedelta(days=1))
    early = store.online("ranker_v1", keys)
    store.materialize(NOW)
    late = store.online("ranker_v1", keys)
    assert early["user_events_1d"].null_count > late["user_events_1d"].null_count
    with pytest.raises(ArtifactError, match="create the store anew"):
        store.materialize(START + timedelta(days=1))


def test_moved_store_still_works(tables: FeatureTables, tmp_path: Path) -> None:
    here = tmp_path / "here"
    FeatureStore.create(here, tables).materialize(NOW)
    there = here.rename(tmp_path / "there")
    store = FeatureStore.open(there)
    assert store.online("ranker_v1", pa.table({"item_id": ["i1"]}))["item_first_seen"].null_count == 0
    rows = spine(20)
    assert store.historical(rows).equals(join_features(rows, tables))


def test_two_stores_in_one_process_keep_their_own_schema(store: FeatureStore, tmp_path: Path) -> None:
    other_tables = write_tables(tmp_path / "tables", mapping(item_features={"weight": "numeric"}))
    other = FeatureStore.create(tmp_path / "store", other_tables)
    rows = spine(5)
    assert {"weight"} == set(other.historical(rows).column_names) - set(store.historical(rows).column_names)
    assert not {"entities", "sources", "views", "on_demand", "services"} & set(sys.modules)


def test_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no feature_store\.yaml"):
        FeatureStore.open(tmp_path)


@pytest.mark.slow
def test_feast_apply_works_in_the_folder(tables: FeatureTables, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", tables)
    (store.path / "data" / "registry.db").unlink()
    feast = Path(sys.executable).with_name("feast")
    applied = subprocess.run(
        [feast, "-c", store.path, "apply"], capture_output=True, text=True, timeout=300, check=False
    )
    assert applied.returncode == 0, applied.stderr
    rows = spine(20)
    assert FeatureStore.open(store.path).historical(rows).equals(join_features(rows, tables))
