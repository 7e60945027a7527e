"""What Feast asks of any offline store, asked of ours: a courier company's features, retrieved in every way."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    RepoConfig,
    RequestSource,
    ValueType,
)
from feast.errors import (
    EntityTimestampInferenceException,
    FeastEntityDFMissingColumnsError,
    FeatureNameCollisionError,
    FeatureServiceNotFoundException,
    FeatureViewNotFoundException,
    RequestDataNotFoundInEntityDfException,
)
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RegistryConfig
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String

from evergreen.contracts.errors import ArtifactError

START = datetime(2026, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
ASOF = "evergreen.features.offline_store.AsofOfflineStore"
Rows = list[dict[str, Any]]

FILES = {
    "couriers": {
        "courier_id": pa.int64(),
        "rate": pa.float32(),
        "trips": pa.int32(),
        "vehicles": pa.list_(pa.string()),
    },
    "customers": {"customer_id": pa.int64(), "balance": pa.float32(), "is_member": pa.bool_()},
    "orders": {"customer_id": pa.int64(), "courier_id": pa.int64(), "is_success": pa.int32()},
    "places": {"place_id": pa.string(), "temperature": pa.int64()},
    "city": {"rides": pa.int64()},
    "renamed": {"column name": pa.int64()},
}
TTLS = {"couriers": timedelta(hours=5), "customers": timedelta(hours=9), "orders": timedelta(hours=3)}
REFERENCES = [
    "couriers:rate",
    "couriers:trips",
    "couriers:vehicles",
    "customers:balance",
    "customers:is_member",
    "orders:is_success",
    "city:rides",
    "renamed:feature_name",
]
ON_DEMAND = ["bonus:rate_plus_100", "bonus:rate_plus_offer"]
KEYS = {
    "couriers": ["courier_id"],
    "customers": ["customer_id"],
    "orders": ["customer_id", "courier_id"],
    "places": ["place_id"],
}


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def draw_rows(name: str, rng: random.Random) -> Rows:
    """200 rows over a day; every key and hour at most once, so that each answer is the only right one."""
    values: dict[str, Callable[[], Any]] = {
        "courier_id": lambda: rng.randrange(1001, 1006),
        "customer_id": lambda: rng.randrange(201, 206),
        "place_id": lambda: f"place {rng.randrange(5)}",
        "rate": lambda: rng.randrange(100) / 4,
        "vehicles": lambda: [f"van {rng.randrange(9)}" for _ in range(rng.randrange(3))],
        "is_member": lambda: rng.random() < 0.5,
    }
    rows = {}
    for _ in range(200):
        row = {column: values.get(column, lambda: rng.randrange(1000))() for column in FILES[name]}
        row |= {"event_timestamp": at(rng.randrange(24)), "created": at(30)}
        rows[(*(row[key] for key in KEYS.get(name, [])), row["event_timestamp"])] = row
    return list(rows.values())


def write(path: Path, rows: Rows, columns: dict[str, pa.DataType]) -> None:
    schema = pa.schema({**columns, "event_timestamp": MICROS, "created": MICROS})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


BONUS = """
def bonus(inputs: pd.DataFrame) -> pd.DataFrame:
    rate = inputs["rate"].astype("float64")
    return pd.DataFrame({"rate_plus_100": rate + 100, "rate_plus_offer": rate + inputs["offer"]})
"""


def bonus(inputs: pd.DataFrame) -> pd.DataFrame:
    rate = inputs["rate"].astype("float64")
    return pd.DataFrame({"rate_plus_100": rate + 100, "rate_plus_offer": rate + inputs["offer"]})


def open_store(folder: Path) -> FeatureStore:
    return FeatureStore(
        config=RepoConfig(
            project="couriers",
            provider="local",
            registry=RegistryConfig(path=str(folder / "registry.db")),
            offline_store={"type": ASOF},
            online_store=SqliteOnlineStoreConfig(path=str(folder / "online.db")),
            materialization={"pull_latest_features": True},
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    rng = random.Random(3)
    return {name: draw_rows(name, rng) for name in FILES}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Rows]) -> FeatureStore:
    """Every definition that the tests need, applied once; paths are relative to the repository."""
    folder = tmp_path_factory.mktemp("repository")
    for name, of in rows.items():
        write(folder / f"{name}.parquet", of, FILES[name])
    types = {"courier_id": ValueType.INT64, "customer_id": ValueType.INT64, "place_id": ValueType.STRING}
    entities = {key: Entity(name=key, join_keys=[key], value_type=dtype) for key, dtype in types.items()}
    sources = {
        name: FileSource(
            name=name,
            path=f"{name}.parquet",
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
            field_mapping={"column name": "feature_name"} if name == "renamed" else {},
        )
        for name in FILES
    }
    fields = {
        "couriers": {"rate": Float32, "trips": Int32, "vehicles": Array(String)},
        "customers": {"balance": Float32, "is_member": Bool},
        "orders": {"is_success": Int32},
        "places": {"temperature": Int64},
        "city": {"rides": Int64},
        "renamed": {"feature_name": Int64},
        "courier_trips": {"trips": Int32},
        "courier_rates_forever": {"rate": Float32},
    }
    of_view = {"courier_trips": "couriers", "courier_rates_forever": "couriers"}
    views = {
        name: FeatureView(
            name=name,
            entities=[entities[key] for key in KEYS.get(of_view.get(name, name), [])],
            ttl=TTLS.get(name, timedelta(0)),
            schema=[Field(name=feature, dtype=dtype) for feature, dtype in of.items()],
            source=sources[of_view.get(name, name)],
        )
        for name, of in fields.items()
    }
    on_demand = OnDemandFeatureView(
        name="bonus",
        sources=[
            views["couriers"][["rate"]],
            RequestSource(name="request", schema=[Field(name="offer", dtype=Float64)]),
        ],
        schema=[Field(name=ref.split(":")[1], dtype=Float64) for ref in ON_DEMAND],
        udf=bonus,
        udf_string=BONUS,
        mode="pandas",
    )
    journey = [
        views["places"].with_name(name).with_join_key_map({"place_id": f"{name}_id"})
        for name in ("origin", "destination")
    ]
    services = [
        FeatureService(name="rates", features=[views["couriers"][["rate"]], on_demand]),
        FeatureService(name="journey", features=journey),
    ]
    store = open_store(folder)
    store.apply([*entities.values(), *views.values(), on_demand, *services])
    return store


@pytest.fixture(scope="module")
def asked() -> pd.DataFrame:
    """150 entity rows in no order, some twice, with keys and times that no feature row has."""
    rng = random.Random(5)
    rows = [
        {
            "order_id": n,
            "event_timestamp": at(rng.randrange(-1, 32) + rng.choice([0, 0.5])),
            "courier_id": rng.randrange(1001, 1007),
            "customer_id": rng.randrange(201, 207),
            "origin_id": f"place {rng.randrange(6)}",
            "destination_id": f"place {rng.randrange(6)}",
            "offer": n / 2,
        }
        for n in range(75)
    ]
    return pd.DataFrame([row for row in rows for _ in range(2)])


def known(rows: Rows, keys: dict[str, Any], moment: datetime, ttl: timedelta = timedelta(0)) -> dict[str, Any]:
    """The row of these keys that holds at a moment."""
    past = [
        row
        for row in rows
        if all(row[key] == value for key, value in keys.items()) and row["event_timestamp"] <= moment
    ]
    last = max(past, key=lambda row: (row["event_timestamp"], row["created"]), default={})
    expired = bool(last) and bool(ttl) and moment - last["event_timestamp"] > ttl
    return {} if expired else last


def expected(rows: dict[str, Rows], asked: pd.DataFrame, references: list[str], *, full: bool = False) -> Rows:
    """The entity rows with their features, by a search through all rows."""
    answers = []
    for row in asked.to_dict("records"):
        answer = row | {"event_timestamp": row["event_timestamp"].to_pydatetime()}
        for reference in references:
            name, feature = reference.split(":")
            last = known(
                rows[name],
                {key: row[key] for key in KEYS.get(name, [])},
                answer["event_timestamp"],
                TTLS.get(name, timedelta(0)),
            )
            stored = "column name" if feature == "feature_name" else feature
            answer[f"{name}__{feature}" if full else feature] = last.get(stored)
        answers.append(answer)
    return answers


def with_bonus(rows: Rows, *, full: bool) -> Rows:
    prefix = "bonus__" if full else ""
    for row in rows:
        rate = row["couriers__rate" if full else "rate"]
        row[f"{prefix}rate_plus_100"] = None if rate is None else rate + 100
        row[f"{prefix}rate_plus_offer"] = None if rate is None else rate + row["offer"]
    return rows


@pytest.mark.parametrize("full", [False, True])
def test_values_of_all_kinds_of_views(
    store: FeatureStore, rows: dict[str, Rows], asked: pd.DataFrame, full: bool
) -> None:
    job = store.get_historical_features(asked.copy(), [*REFERENCES, *ON_DEMAND], full_feature_names=full)
    answer = with_bonus(expected(rows, asked, REFERENCES, full=full), full=full)
    found = job.to_arrow()
    assert found.to_pylist() == answer
    assert 0 < found["couriers__rate" if full else "rate"].null_count < len(asked)
    frame = job.to_df()
    assert frame.columns.tolist() == found.column_names
    assert frame["offer"].tolist() == asked["offer"].tolist()


@pytest.mark.parametrize("full", [False, True])
def test_feature_service_with_an_on_demand_view(
    store: FeatureStore, rows: dict[str, Rows], asked: pd.DataFrame, full: bool
) -> None:
    service = store.get_feature_service("rates")
    found = store.get_historical_features(asked.copy(), service, full_feature_names=full).to_arrow()
    assert found.to_pylist() == with_bonus(expected(rows, asked, ["couriers:rate"], full=full), full=full)


def test_one_view_twice_under_other_keys(store: FeatureStore, rows: dict[str, Rows], asked: pd.DataFrame) -> None:
    service = store.get_feature_service("journey")
    found = store.get_historical_features(asked.copy(), service, full_feature_names=True).to_arrow()
    for row in found.to_pylist():
        for end in ("origin", "destination"):
            last = known(rows["places"], {"place_id": row[f"{end}_id"]}, row["event_timestamp"])
            assert row[f"{end}__temperature"] == last.get("temperature")
    assert found["origin__temperature"] != found["destination__temperature"]


def test_ttl_of_nothing_never_ends(store: FeatureStore, rows: dict[str, Rows]) -> None:
    asked = pd.DataFrame({"courier_id": [1001], "event_timestamp": [at(9999)]})
    found = store.get_historical_features(asked, ["courier_rates_forever:rate", "couriers:trips"]).to_arrow()
    last = known(rows["couriers"], {"courier_id": 1001}, at(9999))
    assert found.select(["rate", "trips"]).to_pylist() == [{"rate": last["rate"], "trips": None}]


def test_entity_rows_from_a_query(store: FeatureStore, rows: dict[str, Rows], asked: pd.DataFrame) -> None:
    path = Path(store.config.repo_path) / "asked.parquet"
    asked.astype({"event_timestamp": "datetime64[us, UTC]"}).to_parquet(path)
    query = f"SELECT order_id, courier_id, event_timestamp FROM '{path}' WHERE order_id >= 10"
    found = store.get_historical_features(query, ["couriers:rate"]).to_arrow()
    some = asked[asked["order_id"] >= 10][["order_id", "courier_id", "event_timestamp"]]
    assert found.to_pylist() == expected(rows, some, ["couriers:rate"])


def test_any_one_time_column_will_do(store: FeatureStore, rows: dict[str, Rows], asked: pd.DataFrame) -> None:
    renamed = asked[["courier_id", "event_timestamp"]].rename(columns={"event_timestamp": "e_ts"})
    found = store.get_historical_features(renamed, ["couriers:rate"]).to_arrow()
    assert found["rate"].to_pylist() == [row["rate"] for row in expected(rows, asked, ["couriers:rate"])]


def test_saved_dataset_holds_what_the_job_gives(store: FeatureStore, asked: pd.DataFrame) -> None:
    job = store.get_historical_features(asked.copy(), ["customers:balance", "city:rides", *ON_DEMAND])
    storage = SavedDatasetFileStorage(path=str(Path(store.config.repo_path) / "saved.parquet"))
    store.create_saved_dataset(from_=job, name="saved", storage=storage, allow_overwrite=True)
    saved = pq.read_table(Path(store.config.repo_path) / "saved.parquet")
    assert saved.to_pylist() == job.to_arrow().to_pylist()
    assert {"balance", "rides", "rate_plus_100", "rate_plus_offer"} <= set(saved.column_names)
    assert job.metadata.min_event_timestamp == asked["event_timestamp"].min()
    assert job.metadata.max_event_timestamp == asked["event_timestamp"].max()


@pytest.fixture(scope="module")
def backfilled(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store with rows that were written twice."""
    folder = tmp_path_factory.mktemp("backfilled")
    table = [
        {"courier_id": 1, "trips": 10, "event_timestamp": at(0), "created": at(0)},
        {"courier_id": 1, "trips": 20, "event_timestamp": at(0), "created": at(24)},
        {"courier_id": 2, "trips": 30, "event_timestamp": at(0), "created": at(24)},
        {"courier_id": 2, "trips": 40, "event_timestamp": at(24), "created": at(0)},
        {"courier_id": 3, "trips": 50, "event_timestamp": at(0), "created": None},
        {"courier_id": 3, "trips": 60, "event_timestamp": at(0), "created": at(1)},
    ]
    write(folder / "trips.parquet", table, {"courier_id": pa.int64(), "trips": pa.int64()})
    courier = Entity(name="courier", join_keys=["courier_id"], value_type=ValueType.INT64)
    source = FileSource(
        name="trips", path="trips.parquet", timestamp_field="event_timestamp", created_timestamp_column="created"
    )
    view = FeatureView(name="trips", entities=[courier], schema=[Field(name="trips", dtype=Int64)], source=source)
    store = open_store(folder)
    store.apply([courier, view])
    return store


def test_of_rows_written_twice_the_later_counts_unless_it_is_of_an_earlier_time(backfilled: FeatureStore) -> None:
    asked = pd.DataFrame({"courier_id": [1, 2, 3], "event_timestamp": [at(48)] * 3})
    found = backfilled.get_historical_features(asked, ["trips:trips"]).to_arrow()
    assert found["trips"].to_pylist() == [20, 40, 60]


def test_backfill_can_be_kept_from_those_who_could_not_know_it(backfilled: FeatureStore) -> None:
    asked = pd.DataFrame({"courier_id": [1, 2, 3], "event_timestamp": [at(12)] * 3})
    job = backfilled.get_historical_features(asked, ["trips:trips"], filter_by_created_timestamp=True)
    assert {row["courier_id"]: row["trips"] for row in job.to_arrow().to_pylist()} == {1: 10, 2: None, 3: 60}


@pytest.mark.parametrize(
    ("start", "end", "trips"),
    [(0, 48, [20, 40, 60]), (0, 24, [20, 40, 60]), (0, 23.9, [20, 30, 60]), (24, 48, [40]), (25, 48, [])],
)
def test_latest_rows_of_a_range_of_time_ends_included(
    backfilled: FeatureStore, start: float, end: float, trips: list[int]
) -> None:
    source = backfilled.get_feature_view("trips").batch_source
    names = (["courier_id"], ["trips"], "event_timestamp", "created")
    provider = backfilled._get_provider().offline_store
    latest = provider.pull_latest_from_table_or_query(backfilled.config, source, *names, at(start), at(end)).to_arrow()
    assert latest.sort_by("courier_id")["trips"].to_pylist() == trips
    assert latest.column_names == ["courier_id", "trips", "event_timestamp", "created"]


def test_all_rows_of_a_range_of_time(backfilled: FeatureStore) -> None:
    source = backfilled.get_feature_view("trips").batch_source
    every = backfilled._get_provider().offline_store.pull_all_from_table_or_query(
        backfilled.config,
        source,
        ["courier_id"],
        ["trips"],
        "event_timestamp",
        created_timestamp_column="created",
        start_date=at(0),
        end_date=at(1),
    )
    assert sorted(every.to_arrow()["trips"].to_pylist()) == [10, 20, 30, 50, 60]


def test_all_rows_of_a_view_without_entities_have_the_key_that_feast_stores_them_under(store: FeatureStore) -> None:
    source = store.get_feature_view("city").batch_source
    every = store._get_provider().offline_store.pull_all_from_table_or_query(
        store.config, source, [], ["rides"], "event_timestamp", start_date=at(0), end_date=at(24)
    )
    table = every.to_arrow()
    assert table.num_rows > 0
    assert set(table["__dummy_id"].to_pylist()) == {""}


def test_rows_pushed_offline_are_joined(tmp_path: Path, backfilled: FeatureStore) -> None:
    (tmp_path / "trips.parquet").write_bytes((Path(backfilled.config.repo_path) / "trips.parquet").read_bytes())
    store = open_store(tmp_path)
    view = backfilled.get_feature_view("trips")
    store.apply([backfilled.get_entity("courier"), view])
    pushed = pd.DataFrame({"courier_id": [1], "trips": [70], "event_timestamp": [at(30)], "created": [at(30)]}).astype(
        {"event_timestamp": "datetime64[us, UTC]", "created": "datetime64[us, UTC]"}
    )
    store.write_to_offline_store("trips", pushed)
    asked = pd.DataFrame({"courier_id": [1, 1, 2], "event_timestamp": [at(29), at(31), at(31)]})
    assert store.get_historical_features(asked, ["trips:trips"]).to_arrow()["trips"].to_pylist() == [20, 70, 40]


def test_materialized_views_hold_what_the_join_finds(store: FeatureStore) -> None:
    """Views without entities and with renamed columns among them."""
    names = ["courier_rates_forever", "courier_trips", "places", "city", "renamed"]
    store.materialize(at(0), at(24), feature_views=names)
    keys = {"courier_id": [1001, 1003, 9], "place_id": ["place 0", "place 4", "nowhere"]}
    references = [
        "courier_rates_forever:rate",
        "courier_trips:trips",
        "places:temperature",
        "city:rides",
        "renamed:feature_name",
    ]
    online = store.get_online_features(references, keys).to_dict()
    asked = pd.DataFrame({**keys, "event_timestamp": [at(24)] * 3})
    offline = store.get_historical_features(asked, references).to_arrow()
    for reference in references:
        feature = reference.split(":")[1]
        assert online[feature] == offline[feature].to_pylist()
    assert online["rate"][2] is None


@pytest.mark.parametrize(
    ("references", "error", "message"),
    [
        (["nothing:rate"], FeatureViewNotFoundException, "nothing"),
        (["courier_trips:rate"], KeyError, "rate"),  # the file has it, the view does not
        (["couriers:trips", "courier_trips:trips"], FeatureNameCollisionError, "trips"),
        (ON_DEMAND, RequestDataNotFoundInEntityDfException, "offer"),
        (["places:temperature"], FeastEntityDFMissingColumnsError, "place_id"),
    ],
)
def test_what_cannot_be_retrieved_is_named(
    store: FeatureStore, references: list[str], error: type[Exception], message: str
) -> None:
    asked = pd.DataFrame({"courier_id": [1001], "event_timestamp": [at(5)]})
    with pytest.raises(error, match=message):
        store.get_historical_features(asked, references)


def test_service_that_does_not_exist_is_named(store: FeatureStore) -> None:
    with pytest.raises(FeatureServiceNotFoundException, match="nothing"):
        store.get_feature_service("nothing")


def test_entity_rows_without_a_time_are_refused(store: FeatureStore) -> None:
    asked = pd.DataFrame({"courier_id": [1001], "day": ["2026-01-01"]})
    with pytest.raises(EntityTimestampInferenceException):
        store.get_historical_features(asked, ["couriers:rate"])


def test_entity_rows_with_the_column_of_a_feature_are_refused(store: FeatureStore) -> None:
    asked = pd.DataFrame({"courier_id": [1001], "event_timestamp": [at(5)], "rate": [1.0]})
    with pytest.raises(ValueError, match=r"'rate'.*full_feature_names"):
        store.get_historical_features(asked, ["couriers:rate"])
    joined = store.get_historical_features(asked, ["couriers:rate"], full_feature_names=True).to_arrow()
    assert joined.column_names == [*asked.columns, "couriers__rate"]


def test_key_that_is_text_on_one_side_is_refused(store: FeatureStore) -> None:
    asked = pd.DataFrame({"courier_id": ["1001"], "event_timestamp": [at(5)]})
    with pytest.raises(ArtifactError, match=r"couriers.parquet: courier_id is int64, .* string"):
        store.get_historical_features(asked, ["couriers:rate"]).to_arrow()


def test_range_of_time_without_entity_rows_is_refused(store: FeatureStore) -> None:
    with pytest.raises(ValueError, match=r"start_date and end_date: .* give entity_df"):
        store.get_historical_features(features=["couriers:rate"], start_date=at(0), end_date=at(9))


def test_no_entity_rows_give_no_rows_with_all_columns(store: FeatureStore, asked: pd.DataFrame) -> None:
    found = store.get_historical_features(asked[:0].copy(), REFERENCES).to_arrow()
    assert found.num_rows == 0
    assert found.column_names == [*asked.columns, *(reference.split(":")[1] for reference in REFERENCES)]
