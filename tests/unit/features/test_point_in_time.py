"""The point-in-time join against a naive one, and its edges."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, RANKER_TABLES, FeatureTables, FeatureTablesManifest
from evergreen.contracts.mapping import Mapping
from evergreen.features.point_in_time import (
    AsofSource,
    Timeline,
    asof_features,
    items_as_of,
    join_features,
    service_columns,
    table_source,
)
from evergreen.features.schema import feature_table_schemas

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2026, 1, 1, tzinfo=UTC)
MAPPING = Mapping.model_validate(
    {
        "name": "log",
        "kind": "interactions",
        "timestamp": {"column": "t"},
        "columns": {"user_id": "u", "item_id": "i", "category": "c"},
        "item_features": {"price": "numeric", "tags": "multi"},
    }
)


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def spine(*rows: tuple[float, str | None, str | None, str | None]) -> pa.Table:
    times, users, items, categories = zip(*rows, strict=True)
    return pa.table(
        {
            "event_timestamp": pa.array([at(t) for t in times], MICROS),
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "category": pa.array(categories, pa.string()),
        }
    )


def write_tables(path: Path, **rows: list[dict[str, Any]]) -> FeatureTables:
    """Feature tables with these rows; a column that a row does not give is null."""
    path.mkdir()
    for name, schema in feature_table_schemas(MAPPING).items():
        full = [dict.fromkeys(schema.names) | row for row in rows.get(name, [])]
        pq.write_table(pa.Table.from_pylist(full, schema=schema), path / f"{name}.parquet")
    FeatureTablesManifest(
        snapshot_id="s",
        mapping=MAPPING,
        as_of=at(100),
        first_event=START,
        rows={name: len(r) for name, r in rows.items()},
    ).write(path / FeatureTables.MANIFEST)
    return FeatureTables.load(path)


def write_source(path: Path, rows: list[tuple[str | None, int, int]]) -> AsofSource:
    """A file of (key, hour, value)."""
    keys, hours, values = zip(*rows, strict=True) if rows else ((), (), ())
    table = pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "event_timestamp": pa.array([at(h) for h in hours], MICROS),
            "value": pa.array(values, pa.int64()),
        }
    )
    pq.write_table(table, path)
    return AsofSource(path=str(path), keys={"key": "user_id"}, features={"value": "value"})


keys = st.sampled_from(["a", "b", "c", None])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(st.tuples(keys, st.integers(0, 12)), st.integers(), max_size=20).filter(
        lambda rows: all(abs(value) < 2**63 for value in rows.values())
    ),
    asked=st.lists(st.tuples(keys, st.integers(0, 13)), min_size=1, max_size=15),
)
def test_equals_the_naive_join(
    tmp_path: Path, rows: dict[tuple[str | None, int], int], asked: list[tuple[str | None, int]]
) -> None:
    source = write_source(tmp_path / "table.parquet", [(key, hour, value) for (key, hour), value in rows.items()])
    joined = asof_features(spine(*[(hour, key, None, None) for key, hour in asked]), source)
    expected = []
    for key, hour in asked:
        known = {h: value for (k, h), value in rows.items() if key is not None and k == key and h <= hour}
        expected.append(known[max(known)] if known else None)
    assert joined["value"].to_pylist() == expected


def test_row_counts_from_its_own_microsecond_on(tmp_path: Path) -> None:
    source = write_source(tmp_path / "table.parquet", [("a", 5, 1)])
    rows = spine((5 - 1 / 3.6e9, "a", None, None), (5, "a", None, None))
    assert asof_features(rows, source)["value"].to_pylist() == [None, 1]


def test_folder_of_files_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    write_source(folder / "0.parquet", [("a", 1, 1), ("b", 1, 2)])
    write_source(folder / "1.parquet", [("a", 2, 3)])
    source = AsofSource(path=str(folder), keys={"key": "user_id"}, features={"value": "value"})
    rows = spine((1, "a", None, None), (2, "a", None, None), (2, "b", None, None))
    assert asof_features(rows, source)["value"].to_pylist() == [1, 3, 2]


def test_ttl_ends_a_row_and_reaches_for_no_older_one(tmp_path: Path) -> None:
    source = write_source(tmp_path / "table.parquet", [("a", 1, 1), ("a", 2, 2)])
    source = AsofSource(path=source.path, keys=source.keys, features=source.features, ttl=timedelta(hours=3))
    rows = spine((4.5, "a", None, None), (5, "a", None, None), (5.001, "a", None, None))
    assert asof_features(rows, source)["value"].to_pylist() == [2, 2, None]


def test_of_equal_timestamps_the_row_created_last_counts(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": ["a", "a", "a"],
            "event_timestamp": pa.array([at(1)] * 3, MICROS),
            "created": pa.array([at(2), at(4), at(3)], MICROS),
            "value": [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    source = AsofSource(
        path=str(tmp_path / "table.parquet"), keys={"key": "user_id"}, features={"value": "value"}, created="created"
    )
    assert asof_features(spine((9, "a", None, None)), source)["value"].to_pylist() == [2]


def test_names_need_no_escaping_and_can_change(tmp_path: Path) -> None:
    table = pa.table({'a "key"': ["x"], "the time": pa.array([at(1)], MICROS), "select": ["v"]})
    pq.write_table(table, tmp_path / "it's.parquet")
    source = AsofSource(
        path=str(tmp_path / "it's.parquet"),
        keys={'a "key"': "user_id"},
        features={'re"named': "select"},
        timestamp="the time",
    )
    assert asof_features(spine((1, "x", None, None)), source).to_pydict() == {'re"named': ["v"]}


@pytest.mark.parametrize(
    "dtype", [pa.timestamp("us"), pa.timestamp("ns", tz="UTC"), pa.timestamp("ms", tz="Asia/Tokyo")]
)
def test_times_of_any_unit_and_zone_are_compared_in_utc(tmp_path: Path, dtype: pa.DataType) -> None:
    source = write_source(tmp_path / "table.parquet", [("a", 5, 1)])
    moments = [START + timedelta(hours=4.9), START + timedelta(hours=5)]
    times = pa.array([m.replace(tzinfo=None) if dtype.tz is None else m for m in moments], dtype)
    rows = pa.table({"event_timestamp": times, "user_id": ["a", "a"]})
    assert asof_features(rows, source)["value"].to_pylist() == [None, 1]


def test_key_column_of_nulls_alone_gives_nulls(tmp_path: Path) -> None:
    source = write_source(tmp_path / "table.parquet", [("a", 1, 1)])
    rows = pa.table({"event_timestamp": pa.array([at(9)] * 2, MICROS), "user_id": pa.nulls(2)})
    assert asof_features(rows, source)["value"].to_pylist() == [None, None]


def test_join_keeps_rows_order_duplicates_and_other_columns(tmp_path: Path) -> None:
    tables = write_tables(
        tmp_path / "tables",
        user_activity=[
            {"user_id": "a", "event_timestamp": at(1), "user_events_1h": 1, "user_history": ["x", "y"]},
            {"user_id": "a", "event_timestamp": at(3), "user_events_1h": 2},
        ],
        user_category_activity=[
            {"user_id": "a", "category": "red", "event_timestamp": at(2), "user_category_rate_1d": 0.5}
        ],
        item_profile=[{"item_id": "i", "event_timestamp": at(2), "item_first_seen": at(2), "tags": ["t"]}],
    )
    rows = spine((4, "a", "i", "red"), (1, "a", "i", "red"), (4, "a", "i", "red"), (4, "a", None, "blue"))
    rows = rows.append_column("note", pa.array(["1", "2", "3", "4"]))
    joined = join_features(rows, tables)
    assert joined.column_names == [*rows.column_names, *service_columns(tables)]
    assert joined.select(rows.column_names).equals(rows)
    assert joined["user_events_1h"].to_pylist() == [2, 1, 2, 2]
    assert joined["user_history"].to_pylist() == [None, ["x", "y"], None, None]
    assert joined["user_category_rate_1d"].to_pylist() == [0.5, None, 0.5, None]
    assert joined["tags"].to_pylist() == [["t"], None, ["t"], None]
    assert joined["item_age_seconds"].to_pylist() == [7200.0, None, 7200.0, None]
    assert joined["hour"].to_pylist() == ["4", "1", "4", "4"]


def test_join_gives_the_types_of_the_tables(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    joined = join_features(spine((1, "a", "i", "red")), tables)
    schemas = feature_table_schemas(MAPPING)
    for name in RANKER_TABLES:
        for field in schemas[name]:
            if field.name not in (*JOIN_KEYS[name], "event_timestamp"):
                assert joined.schema.field(field.name).type == field.type
                assert joined[field.name].null_count == 1


def test_rewriting_the_future_changes_no_past_feature(tmp_path: Path) -> None:
    past = [{"user_id": "a", "event_timestamp": at(h), "user_events_1h": h} for h in range(5)]
    futures = (
        [{"user_id": "a", "event_timestamp": at(h), "user_events_1h": -h} for h in range(5, 9)],
        [{"user_id": "a", "event_timestamp": at(5), "user_events_1h": 77}],
    )
    rows = spine(*[(h / 2, "a", None, None) for h in range(10)])
    results = [
        join_features(rows, write_tables(tmp_path / str(i), user_activity=past + future))
        for i, future in enumerate(futures)
    ]
    assert results[0].equals(results[1])
    assert results[0]["user_events_1h"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_join_of_no_rows_has_the_columns(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    joined = join_features(spine((1, "a", "i", "red")).slice(0, 0), tables)
    assert joined.num_rows == 0
    assert set(service_columns(tables)) < set(joined.column_names)


def test_spine_without_a_key_is_named(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    with pytest.raises(ArtifactError, match="category"):
        join_features(spine((1, "a", "i", "red")).drop_columns(["category"]), tables)


def test_spine_with_a_column_of_the_service_is_refused(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    with pytest.raises(ArtifactError, match="price"):
        join_features(spine((1, "a", "i", "red")).append_column("price", pa.array([1.0])), tables)


def test_catalogue_holds_each_item_once_as_it_was(tmp_path: Path) -> None:
    tables = write_tables(
        tmp_path / "tables",
        item_profile=[
            {"item_id": "z", "event_timestamp": at(1), "item_first_seen": at(1), "item_category": "red"},
            {"item_id": "z", "event_timestamp": at(5), "item_first_seen": at(1), "item_category": "blue"},
            {"item_id": "b", "event_timestamp": at(2), "item_first_seen": at(2)},
            {"item_id": "c", "event_timestamp": at(4), "item_first_seen": at(4), "item_category": "red"},
        ],
    )
    catalogue = items_as_of(tables, at(4))
    assert catalogue.to_pylist() == [
        {"item_id": "b", "category": None, "item_first_seen": at(2)},
        {"item_id": "c", "category": "red", "item_first_seen": at(4)},
        {"item_id": "z", "category": "red", "item_first_seen": at(1)},
    ]
    assert pc.all(pc.equal(items_as_of(tables, at(5))["category"].drop_null(), pa.array(["red", "blue"]))).as_py()
    assert items_as_of(tables, at(0.5)).num_rows == 0


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 8)), max_size=12, unique=True),
    st.integers(0, 8),
    st.integers(0, 4),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_timeline_gives_what_the_join_gives_at_every_moment_of_its_stretch(
    tmp_path_factory: pytest.TempPathFactory, known: list[tuple[str, int]], start: int, length: int
) -> None:
    rows = [
        {"item_id": key, "event_timestamp": at(hour), "item_events_1h": number}
        for number, (key, hour) in enumerate(known)
    ]
    tables = write_tables(tmp_path_factory.mktemp("timeline") / "tables", item_activity=rows)
    timeline = Timeline(tables, "item_activity", start=at(start), end=at(start + length))
    keys, hours = ["b", "a", None, "unknown", "c", "b"], [start, start + length / 2, start + length]
    asked = spine(*((hour, None, key, None) for hour in hours for key in keys))
    expected = asof_features(asked, table_source(tables, "item_activity"))
    found = [timeline.rows_at(at(hour), pa.array(keys)) for hour in hours]
    features = timeline.features.take(pa.chunked_array(found))
    assert features.to_pylist() == expected.to_pylist()
    assert features.schema.equals(expected.schema)


def test_timeline_refuses_a_moment_that_it_does_not_hold(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    timeline = Timeline(tables, "item_profile", start=at(1), end=at(2))
    assert timeline.rows_at(at(2), pa.array(["a"])).to_pylist() == [None]
    for hour in (0.9, 2.1):
        with pytest.raises(ValueError, match="this timeline holds"):
            timeline.rows_at(at(hour), pa.array(["a"]))


def test_tables_that_are_not_asked_for_are_null_and_cost_no_column(tmp_path: Path) -> None:
    tables = write_tables(
        tmp_path / "tables",
        user_activity=[{"user_id": "u", "event_timestamp": at(0), "user_events_1h": 3}],
        item_activity=[{"item_id": "i", "event_timestamp": at(0), "item_events_1h": 5}],
    )
    asked = spine((1, "u", "i", None))
    whole, users = join_features(asked, tables), join_features(asked, tables, only=["user_activity"])
    assert users.schema.equals(whole.schema)
    assert users["user_events_1h"].to_pylist() == whole["user_events_1h"].to_pylist() == [3]
    assert (users["item_events_1h"].to_pylist(), whole["item_events_1h"].to_pylist()) == ([None], [5])
