"""The ASOF offline store against Feast's own DuckDB store, on the same definitions and small random data."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RegistryConfig
from feast.types import Array, Int64, String

START = datetime(2026, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
ASOF = "evergreen.features.offline_store.AsofOfflineStore"
FEATURES = ["shop_stats:sales", "shop_stats:tags", "rider_stats:trips", "pair_stats:meetings"]


def write(path: Path, keys: list[str], value: str, *, seed: int, ties: bool = False) -> None:
    """Random rows for keys "0" to "4", with a creation time, and with equal timestamps if `ties`."""
    rng = random.Random(seed)
    rows = {}
    for _ in range(120):
        key = tuple(str(rng.randrange(5)) for _ in keys)
        hour = rng.randrange(30)
        created = START + timedelta(hours=hour + rng.random() * 3)
        rows[(key, hour, created if ties else None)] = {
            **dict(zip(keys, key, strict=True)),
            "happened": START + timedelta(hours=hour),
            "created": created,
            value: rng.randrange(1000),
            "tags": [str(rng.randrange(9)) for _ in range(rng.randrange(3))],
        }
    schema = pa.schema(
        [pa.field(key, pa.string()) for key in keys]
        + [("happened", MICROS), ("created", MICROS), (value, pa.int64()), ("tags", pa.list_(pa.string()))]
    )
    pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=schema), path)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write(folder / "shop.parquet", ["shop"], "sold", seed=1)
    write(folder / "rider.parquet", ["rider"], "trips", seed=2, ties=True)
    write(folder / "pair.parquet", ["shop", "rider"], "meetings", seed=3)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.STRING)
    rider = Entity(name="rider", join_keys=["rider"], value_type=ValueType.STRING)
    sources = {
        "shop": FileSource(
            name="shop", path="shop.parquet", timestamp_field="happened", field_mapping={"sold": "sales"}
        ),
        "rider": FileSource(
            name="rider", path="rider.parquet", timestamp_field="happened", created_timestamp_column="created"
        ),
        "pair": FileSource(name="pair", path="pair.parquet", timestamp_field="happened"),
    }
    views = [
        FeatureView(
            name="shop_stats",
            entities=[shop],
            ttl=timedelta(0),
            schema=[Field(name="sales", dtype=Int64), Field(name="tags", dtype=Array(String))],
            source=sources["shop"],
        ),
        FeatureView(
            name="rider_stats",
            entities=[rider],
            ttl=timedelta(hours=4),
            schema=[Field(name="trips", dtype=Int64)],
            source=sources["rider"],
        ),
        FeatureView(
            name="pair_stats",
            entities=[shop, rider],
            ttl=timedelta(0),
            schema=[Field(name="meetings", dtype=Int64)],
            source=sources["pair"],
        ),
    ]
    for store in ("asof", "duckdb"):
        # Feast's own store reads relative to the working directory, so it is given absolute paths.
        for name, source in sources.items():
            source.file_options.uri = f"{name}.parquet" if store == "asof" else str(folder / f"{name}.parquet")
        open_store(folder, store).apply([shop, rider, *views])
    return folder


def open_store(folder: Path, store: str) -> FeatureStore:
    return FeatureStore(
        config=RepoConfig(
            project="test",
            provider="local",
            registry=RegistryConfig(path=str(folder / f"{store}.db")),
            offline_store={"type": ASOF if store == "asof" else "duckdb"},
            online_store=SqliteOnlineStoreConfig(path=str(folder / f"{store}-online.db")),
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )


@pytest.fixture(scope="module")
def entity_rows() -> pd.DataFrame:
    """300 rows out of order, some equal, with keys and times that no feature row has."""
    rng = random.Random(7)
    rows = [
        {
            "row": n,
            "event_timestamp": START + timedelta(hours=rng.randrange(-2, 36), minutes=rng.choice([0, 30])),
            "shop": str(rng.randrange(6)),
            "rider": str(rng.randrange(6)),
            "buyer": str(rng.randrange(6)),
        }
        for n in range(300)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("full_feature_names", [False, True])
def test_equals_feasts_own_join(repository: Path, entity_rows: pd.DataFrame, full_feature_names: bool) -> None:
    results = []
    for name in ("asof", "duckdb"):
        store = open_store(repository, name)
        job = store.get_historical_features(entity_rows.copy(), FEATURES, full_feature_names=full_feature_names)
        results.append(job.to_arrow().sort_by("row"))
    asof, feasts = results
    assert asof.column_names == feasts.column_names
    assert asof.to_pylist() == feasts.to_pylist()
    sales = "shop_stats__sales" if full_feature_names else "sales"
    assert 0 < asof[sales].null_count < asof.num_rows


def test_equals_feasts_own_join_under_another_key(repository: Path, entity_rows: pd.DataFrame) -> None:
    results = []
    for name in ("asof", "duckdb"):
        store = open_store(repository, name)
        buyers = store.get_feature_view("rider_stats").with_name("buyer_stats").with_join_key_map({"rider": "buyer"})
        service = FeatureService(name="trips", features=[buyers, store.get_feature_view("shop_stats")])
        store.apply([service])
        job = store.get_historical_features(entity_rows.copy(), service, full_feature_names=True)
        results.append(job.to_arrow().sort_by("row").to_pylist())
    assert results[0] == results[1]
    riders = (
        open_store(repository, "asof").get_historical_features(entity_rows.copy(), ["rider_stats:trips"]).to_arrow()
    )
    assert [row["buyer_stats__trips"] for row in results[0]] != riders["trips"].to_pylist()


def test_created_cutoff_is_left_to_feasts_own_join(repository: Path, entity_rows: pd.DataFrame) -> None:
    results = []
    for name in ("asof", "duckdb"):
        job = open_store(repository, name).get_historical_features(
            entity_rows.copy(), ["rider_stats:trips"], filter_by_created_timestamp=True
        )
        results.append(job.to_arrow().sort_by("row").to_pylist())
    assert results[0] == results[1]


def test_rows_keep_their_order_and_duplicates(repository: Path, entity_rows: pd.DataFrame) -> None:
    twice = pd.concat([entity_rows, entity_rows], ignore_index=True).drop(columns="row")
    result = open_store(repository, "asof").get_historical_features(twice, ["shop_stats:sales"]).to_df()
    assert len(result) == 600
    assert result["shop"].tolist() == twice["shop"].tolist()
    assert result["sales"][:300].equals(result["sales"][300:].reset_index(drop=True))


def test_entity_rows_may_be_a_query(repository: Path, entity_rows: pd.DataFrame) -> None:
    store = open_store(repository, "asof")
    path = repository / "entities.parquet"
    entity_rows.to_parquet(path)
    by_query = store.get_historical_features(f"SELECT * FROM '{path}'", ["shop_stats:sales"]).to_arrow()
    by_frame = store.get_historical_features(entity_rows.copy(), ["shop_stats:sales"]).to_arrow()
    assert by_query.to_pylist() == by_frame.to_pylist()


def test_text_timestamps_are_read_as_utc(repository: Path, entity_rows: pd.DataFrame) -> None:
    store = open_store(repository, "asof")
    text = entity_rows.assign(event_timestamp=entity_rows["event_timestamp"].map(lambda t: t.isoformat()))
    assert (
        store.get_historical_features(text, ["shop_stats:sales"])
        .to_df()["sales"]
        .equals(store.get_historical_features(entity_rows.copy(), ["shop_stats:sales"]).to_df()["sales"])
    )


def test_materialization_loads_what_the_join_finds(repository: Path) -> None:
    store = open_store(repository, "asof")
    end = START + timedelta(hours=12)
    store.materialize(START, end, feature_views=["shop_stats", "pair_stats"])
    keys = {"shop": ["0", "1", "9"], "rider": ["1", "2", "9"]}
    references = ["shop_stats:sales", "shop_stats:tags", "pair_stats:meetings"]
    online = store.get_online_features(references, keys).to_dict()
    rows = pd.DataFrame({**keys, "event_timestamp": [end] * 3})
    offline = store.get_historical_features(rows, references).to_arrow()
    for name in ("sales", "tags", "meetings"):
        assert online[name] == offline[name].to_pylist()
    assert online["sales"][2] is None


def test_on_demand_views_see_only_their_inputs(repository: Path, entity_rows: pd.DataFrame) -> None:
    store = open_store(repository, "asof")
    shop_stats = store.get_feature_view("shop_stats")
    view = OnDemandFeatureView(
        name="seen",
        sources=[shop_stats[["sales"]]],
        schema=[Field(name="columns", dtype=String)],
        udf=seen_columns,
        udf_string=SEEN_COLUMNS,
        mode="pandas",
    )
    store.apply([view])
    job = store.get_historical_features(entity_rows.copy(), [*FEATURES, "seen:columns"])
    assert set(job.to_arrow()["columns"].to_pylist()) == {"sales,shop_stats__sales"}


SEEN_COLUMNS = """
def seen_columns(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"columns": [",".join(sorted(inputs.columns))] * len(inputs)})
"""


def seen_columns(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"columns": [",".join(sorted(inputs.columns))] * len(inputs)})
