"""The ASOF offline store, asked through Feast, against a join in plain Python: no row lost, none mismatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
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
from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RegistryConfig
from feast.types import Array, Float64, Int64, String
from hypothesis import given, settings
from hypothesis import strategies as st

START = datetime(2026, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
ASOF = "evergreen.features.offline_store.AsofOfflineStore"


@dataclass(frozen=True)
class FeatureRow:
    """A row of a file. `number` is its only content, written as two features: both must come from one row."""

    number: int
    keys: tuple[str | None, ...]
    at: datetime | None
    created: datetime | None


@dataclass(frozen=True)
class View:
    """A view, and what its file calls the columns."""

    name: str
    entities: tuple[str, ...]
    ttl: timedelta = timedelta(0)
    has_created: bool = False
    renamed: bool = False
    """The file has names of its own for everything; `field_mapping` gives those of the view."""

    def in_file(self, column: str) -> str:
        return f"file {column}" if self.renamed else column

    def write(self, folder: Path, rows: Sequence[FeatureRow]) -> None:
        columns = {
            **{key: pa.array([row.keys[i] for row in rows], pa.string()) for i, key in enumerate(self.entities)},
            "happened": pa.array([row.at for row in rows], MICROS),
            **({"created": pa.array([row.created for row in rows], MICROS)} if self.has_created else {}),
            f"{self.name}_number": pa.array([row.number for row in rows], pa.int64()),
            f"{self.name}_words": pa.array([[str(row.number)] for row in rows], pa.list_(pa.string())),
        }
        table = pa.table({self.in_file(name): column for name, column in columns.items()})
        pq.write_table(table, folder / f"{self.name}.parquet")

    def definition(self, folder: Path, entities: dict[str, Entity]) -> FeatureView:
        names = [*self.entities, "happened", "created", f"{self.name}_number", f"{self.name}_words"]
        return FeatureView(
            name=self.name,
            entities=[entities[name] for name in self.entities],
            ttl=self.ttl,
            schema=[Field(name=names[-2], dtype=Int64), Field(name=names[-1], dtype=Array(String))],
            source=FileSource(
                name=self.name,
                path=str(folder / f"{self.name}.parquet"),
                timestamp_field="happened",
                created_timestamp_column="created" if self.has_created else "",
                field_mapping={self.in_file(name): name for name in names} if self.renamed else {},
            ),
        )

    def answers(self, rows: Sequence[FeatureRow], keys: tuple[str | None, ...], at: datetime) -> set[int | None]:
        """Numbers of the rows that may be joined: more than one only where nothing tells them apart."""
        past = [row for row in rows if None not in keys and row.keys == keys and row.at is not None and row.at <= at]
        if not past:
            return {None}
        latest = max(row.at for row in past)
        if self.ttl and at - latest > self.ttl:
            return {None}
        last = [row for row in past if row.at == latest]
        created = [row.created for row in last if row.created is not None]
        if self.has_created and created:
            last = [row for row in last if row.created == max(created)]
        return {row.number for row in last}


SHOP = View("shop_stats", ("shop",), has_created=True, renamed=True)
RIDER = View("rider_stats", ("rider",), ttl=timedelta(hours=2))
PAIR = View("pair_stats", ("shop", "rider"), ttl=timedelta(hours=3), has_created=True)
CITY = View("city_stats", (), has_created=True)
VIEWS = (SHOP, RIDER, PAIR, CITY)

# Half hours and a microsecond around them: equal times, and times at the very end of a ttl, are common.
moments = st.builds(
    lambda half_hours, micros: START + half_hours * timedelta(minutes=30) + timedelta(microseconds=micros),
    st.integers(0, 12),
    st.sampled_from([0, 0, 0, -1, 1]),
)
keys = st.sampled_from(["a", "b", "c", "ü", "", None])


def feature_rows(view: View) -> st.SearchStrategy[list[FeatureRow]]:
    drawn = st.tuples(st.tuples(*[keys] * len(view.entities)), moments | st.none(), moments | st.none())
    return st.lists(drawn, max_size=25).map(lambda rows: [FeatureRow(i, *row) for i, row in enumerate(rows)])


entity_rows = st.lists(
    st.fixed_dictionaries({"event_timestamp": moments, "shop": keys, "rider": keys, "buyer": keys}),
    min_size=1,
    max_size=15,
)


def total(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"total": inputs["shop_stats_number"].astype("float64") + inputs["boost"]})


TOTAL = """
def total(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"total": inputs["shop_stats_number"].astype("float64") + inputs["boost"]})
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store over files that the tests write anew for every example."""
    folder = tmp_path_factory.mktemp("repository")
    store = FeatureStore(
        config=RepoConfig(
            project="test",
            provider="local",
            registry=RegistryConfig(path=str(folder / "registry.db")),
            offline_store={"type": ASOF},
            online_store=SqliteOnlineStoreConfig(path=str(folder / "online.db")),
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )
    entities = {name: Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in ("shop", "rider")}
    for view in VIEWS:
        view.write(folder, [])
    views = {view: view.definition(folder, entities) for view in VIEWS}
    request = RequestSource(name="request", schema=[Field(name="boost", dtype=Float64)])
    on_demand = OnDemandFeatureView(
        name="sums",
        sources=[views[SHOP][["shop_stats_number"]], request],
        schema=[Field(name="total", dtype=Float64)],
        udf=total,
        udf_string=TOTAL,
        mode="pandas",
    )
    store.apply([*entities.values(), *views.values(), on_demand])
    aliased = [
        store.get_feature_view(view.name).with_name(name).with_join_key_map({"rider": key})
        for view, name, key in ((RIDER, "buyers", "buyer"), (RIDER, "riders", "rider"), (PAIR, "deals", "buyer"))
    ]
    store.apply([FeatureService(name="trade", features=aliased)])
    return store


def write(store: FeatureStore, rows: dict[View, list[FeatureRow]]) -> Path:
    for view, of in rows.items():
        view.write(Path(store.config.repo_path), of)
    return Path(store.config.repo_path)


def as_entity_df(rows: list[dict[str, Any]], form: str, folder: Path) -> pd.DataFrame | str:
    """Entity rows in one of the forms that Feast takes."""
    if form == "query":
        schema = pa.schema(
            {"row": pa.int64(), "event_timestamp": MICROS}
            | dict.fromkeys(["shop", "rider", "buyer"], pa.string())
            | {"boost": pa.float64()}
        )
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "entities.parquet")
        return f"SELECT * FROM '{folder / 'entities.parquet'}'"
    frame = pd.DataFrame(rows)
    times = frame["event_timestamp"]
    if form == "naive":
        frame["event_timestamp"] = times.dt.tz_localize(None)
    elif form == "another zone":
        frame["event_timestamp"] = times.dt.tz_convert(timezone(timedelta(hours=-7)))
    elif form == "text":
        frame["event_timestamp"] = times.map(datetime.isoformat)
    return frame


@settings(max_examples=60, deadline=None)
@given(
    rows=st.fixed_dictionaries({view: feature_rows(view) for view in VIEWS}),
    asked=entity_rows,
    form=st.sampled_from(["aware", "naive", "another zone", "text", "query"]),
    full_feature_names=st.booleans(),
)
def test_every_entity_row_gets_what_was_known_then(
    store: FeatureStore,
    rows: dict[View, list[FeatureRow]],
    asked: list[dict[str, Any]],
    form: str,
    full_feature_names: bool,
) -> None:
    folder = write(store, rows)
    asked = [{"row": i, **row, "boost": i / 2} for i, row in enumerate(asked)]
    references = [f"{view.name}:{view.name}_{what}" for view in VIEWS for what in ("number", "words")]
    joined = store.get_historical_features(
        as_entity_df(asked, form, folder), [*references, "sums:total"], full_feature_names=full_feature_names
    ).to_arrow()
    assert joined.select(list(asked[0])).to_pylist() == asked
    prefix = {view: f"{view.name}__" * full_feature_names + view.name for view in VIEWS}
    on_demand = "sums__total" if full_feature_names else "total"
    assert set(joined.column_names) - set(asked[0]) == {on_demand} | {
        f"{prefix[view]}_{what}" for view in VIEWS for what in ("number", "words")
    }
    for row in joined.to_pylist():
        for view in VIEWS:
            number = row[f"{prefix[view]}_number"]
            key = tuple(row[name] for name in view.entities)
            assert number in view.answers(rows[view], key, row["event_timestamp"])
            assert row[f"{prefix[view]}_words"] == (None if number is None else [str(number)])
        number = row[f"{prefix[SHOP]}_number"]
        assert row[on_demand] == (None if number is None else number + row["boost"])


@settings(max_examples=25, deadline=None)
@given(rows=st.fixed_dictionaries({view: feature_rows(view) for view in (RIDER, PAIR)}), asked=entity_rows)
def test_views_under_another_key_read_that_key(
    store: FeatureStore, rows: dict[View, list[FeatureRow]], asked: list[dict[str, Any]]
) -> None:
    write(store, rows)
    service = store.get_feature_service("trade")
    joined = store.get_historical_features(pd.DataFrame(asked), service, full_feature_names=True).to_arrow()
    assert joined.num_rows == len(asked)
    for row in joined.to_pylist():
        at = row["event_timestamp"]
        assert row["riders__rider_stats_number"] in RIDER.answers(rows[RIDER], (row["rider"],), at)
        assert row["buyers__rider_stats_number"] in RIDER.answers(rows[RIDER], (row["buyer"],), at)
        assert row["deals__pair_stats_number"] in PAIR.answers(rows[PAIR], (row["shop"], row["buyer"]), at)
