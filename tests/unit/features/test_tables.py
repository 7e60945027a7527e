"""The feature tables on small logs whose answer can be read off, and their edges."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.contracts.mapping import RESERVED_NAMES, Mapping
from evergreen.contracts.snapshot import Snapshot, event_schema
from evergreen.features.schema import feature_table_schemas
from evergreen.features.tables import build_feature_tables, feature_table_expressions

WriteSnapshot = Callable[..., Snapshot]
START = datetime(2026, 3, 1, tzinfo=UTC)
KINDS: dict[str, dict[str, Any]] = {
    "impressions": {"kind": "impressions", "label": {"column": "click"}},
    "interactions": {"kind": "interactions"},
    "ratings": {"kind": "ratings", "rating": {"column": "stars"}},
}


def mapping(kind: str, attribution_window: str = "0s", **more: Any) -> Mapping:
    columns = {"user_id": "u", "item_id": "i", "category": "c"}
    split = {"attribution_window": attribution_window}
    parts = {"name": "log", "timestamp": {"column": "t"}, "columns": columns, "split": split, **KINDS[kind], **more}
    return Mapping.model_validate(parts)


def at(hours: float, microseconds: int = 0) -> datetime:
    return START + timedelta(hours=hours, microseconds=microseconds)


def event(hours: float, user: str | None = "u", item: str | None = "i", **more: Any) -> dict[str, Any]:
    return {"event_timestamp": at(hours), "user_id": user, "item_id": item, **more}


def rows(tables: FeatureTables, name: str, *columns: str) -> list[tuple[Any, ...]]:
    return list(zip(*(pq.read_table(tables.table(name))[c].to_pylist() for c in columns), strict=True))


def test_event_is_counted_from_the_end_of_its_hour_until_it_leaves_each_window(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    snapshot = write_snapshot(mapping("interactions"), [event(10.5)], as_of=at(2000))
    tables = build_feature_tables(snapshot, tmp_path / "t")
    columns = ["event_timestamp", *(f"user_events_{w}" for w in ("1h", "1d", "7d", "30d"))]
    assert rows(tables, "user_activity", *columns) == [
        (at(11), 1, 1, 1, 1),
        (at(12), 0, 1, 1, 1),
        (at(35), 0, 0, 1, 1),
        (at(179), 0, 0, 0, 1),
        (at(731), 0, 0, 0, 0),
    ]


def test_hour_ends_with_its_last_microsecond(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(10) | {"event_timestamp": at(11, -1)}, event(11)]
    tables = build_feature_tables(write_snapshot(mapping("interactions"), log), tmp_path / "t")
    expected = [(at(11), 1, at(11, -1)), (at(12), 1, at(11))]
    columns = ("event_timestamp", "user_events_1h", "user_last_event_timestamp")
    assert rows(tables, "user_activity", *columns) == expected


def test_nothing_is_later_than_as_of(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    snapshot = write_snapshot(mapping("interactions"), [event(10.5), event(13.2)], as_of=at(13.5))
    tables = build_feature_tables(snapshot, tmp_path / "t")
    assert rows(tables, "item_activity", "event_timestamp", "item_events_1d") == [(at(11), 1), (at(12), 1)]


def test_click_is_known_only_after_the_attribution_window(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(10.5, clicked=True), event(10.6, clicked=False)]
    snapshot = write_snapshot(mapping("impressions", attribution_window="90m"), log, as_of=at(14))
    tables = build_feature_tables(snapshot, tmp_path / "t")
    columns = ("event_timestamp", "user_events_1d", "user_positives_1d", "user_rate_1d", "user_history")
    prior = 1 / 2
    assert rows(tables, "user_activity", *columns) == [
        (at(11), 2, 0, None, []),
        (at(12), 2, 0, None, []),
        (at(13), 2, 1, (1 + 20 * prior) / (2 + 20), ["i"]),
        (at(14), 2, 1, (1 + 20 * prior) / (2 + 20), ["i"]),
    ]
    assert rows(tables, "user_activity", "user_last_event_timestamp")[0] == (at(10.6),)
    assert [row[0] for row in rows(tables, "user_activity", "user_last_positive_timestamp")] == [
        None,
        None,
        at(10.5),
        at(10.5),
    ]


def test_rate_is_drawn_to_the_mean_as_known_then_not_to_the_mean_of_the_whole_log(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    log = [event(0.5, "a", clicked=True), event(1.5, "b", clicked=False), event(1.6, "c", clicked=False)]
    tables = build_feature_tables(write_snapshot(mapping("impressions"), log), tmp_path / "t")
    found = rows(tables, "user_activity", "user_id", "event_timestamp", "user_rate_1h")
    rates = {(user, moment): rate for user, moment, rate in found}
    assert rates["a", at(1)] == (1 + 20 * 1) / 21
    assert rates["a", at(2)] == (0 + 20 * (1 / 3)) / 20
    assert rates["b", at(2)] == (0 + 20 * (1 / 3)) / 21


def test_rate_of_ratings_is_their_smoothed_mean_without_float_noise(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    log = [event(0.1, "a", rating=3.3), event(0.2, "a", rating=4.7), event(0.3, "b", rating=1.1)]
    tables = build_feature_tables(write_snapshot(mapping("ratings"), log), tmp_path / "t")
    prior = (3.3 + 4.7 + 1.1) / 3
    ((first, _), (second, _)) = rows(tables, "user_activity", "user_rate_1h", "user_positives_1h")
    assert first == pytest.approx((3.3 + 4.7 + 20 * prior) / 22, rel=1e-12)
    assert second == pytest.approx((1.1 + 20 * prior) / 21, rel=1e-12)


def test_history_holds_the_last_fifty_in_order_at_every_page_border(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    log = [event(k, item=f"i{k}") for k in range(160)] + [event(k + 0.5, item=None) for k in range(0, 160, 9)]
    tables = build_feature_tables(write_snapshot(mapping("interactions"), log), tmp_path / "t")
    known = rows(tables, "user_activity", "event_timestamp", "user_history")
    assert len(known) == 160
    for moment, history in known:
        hour = (moment - START) // timedelta(hours=1)
        assert history == [f"i{k}" for k in range(max(0, hour - 50), hour)]


def test_attributes_hold_from_a_microsecond_after_the_event_that_showed_them(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    log = mapping("interactions", user_features={"country": "categorical"}, item_features={"tags": "multi"})
    snapshot = write_snapshot(
        log,
        [
            event(1, category="x", country="de", tags=["a", "b"]),
            event(2, category="x", country="de", tags=["a", "b"]),
            event(3, category="y", country=None, tags=["a", "b"]),
            event(4, category=None, country="de", tags=["a,b"]),
            event(5, category="y", country="fr", tags=None),
            event(5, category="y", country="it", tags=["a,b"]),
        ],
    )
    tables = build_feature_tables(snapshot, tmp_path / "t")
    assert rows(tables, "user_profile", "event_timestamp", "user_first_seen", "country") == [
        (at(1, 1), at(1), "de"),
        (at(5, 1), at(1), "it"),
    ]
    assert rows(tables, "item_profile", "event_timestamp", "item_first_seen", "item_category", "tags") == [
        (at(1, 1), at(1), "x", ["a", "b"]),
        (at(3, 1), at(1), "y", ["a", "b"]),
        (at(4, 1), at(1), "y", ["a,b"]),
    ]


def test_log_without_ids_gives_empty_tables_of_the_same_schema(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = mapping("impressions", item_features={"price": "numeric", "tags": "multi"})
    anonymous = [event(1, None, None, clicked=True, price=2.0), event(2, None, None, clicked=False)]
    empty = build_feature_tables(write_snapshot(log, anonymous), tmp_path / "empty")
    named = build_feature_tables(write_snapshot(log, [event(1, category="c", clicked=True)]), tmp_path / "named")
    assert empty.manifest.rows == dict.fromkeys(JOIN_KEYS, 0)
    assert all(named.manifest.rows.values())
    for name, schema in feature_table_schemas(log).items():
        for tables in (empty, named):
            written = pq.read_schema(tables.table(name))
            assert {f.name: f.type for f in written} == {f.name: f.type for f in schema}, name
            assert written.names == schema.names


def test_events_without_a_category_are_in_no_user_category_row(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(1, category="c"), event(1, category=None)]
    tables = build_feature_tables(write_snapshot(mapping("interactions"), log), tmp_path / "t")
    assert rows(tables, "user_category_activity", "category", "user_category_events_1h") == [("c", 1)]
    assert rows(tables, "user_activity", "user_events_1h") == [(2,)]


def test_same_snapshot_gives_the_same_bytes_whatever_the_threads(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(k * 0.37, f"u{k % 7}", f"i{k % 11}", category=f"c{k % 3}", clicked=k % 5 == 0) for k in range(3000)]
    snapshot = write_snapshot(mapping("impressions", "10m", item_features={"price": "numeric"}), log)
    one = build_feature_tables(snapshot, tmp_path / "one", threads=1)
    two = build_feature_tables(snapshot, tmp_path / "two", threads=2)
    for file in sorted(one.path.iterdir()):
        assert file.read_bytes() == (two.path / file.name).read_bytes(), file.name
    assert sorted(p.name for p in two.path.iterdir()) == sorted([*(f"{n}.parquet" for n in JOIN_KEYS), "manifest.json"])


def test_tables_are_sorted_and_hold_one_row_a_key_and_time(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(k % 50 * 0.7, f"u{k % 7}", f"i{k % 5}", category=f"c{k % 3}", rating=3.0) for k in range(400)]
    tables = build_feature_tables(write_snapshot(mapping("ratings", "1h"), log), tmp_path / "t")
    for name, keys in JOIN_KEYS.items():
        found = rows(tables, name, *keys, "event_timestamp")
        assert found == sorted(set(found))


def test_failed_build_leaves_nothing_behind(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    snapshot = write_snapshot(mapping("interactions"), [event(1)])
    Path(snapshot.files[0]).write_bytes(b"not parquet")
    with pytest.raises(Exception, match="part-00000"):
        build_feature_tables(snapshot, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_mapping_cannot_take_the_name_of_a_computed_feature() -> None:
    names = {name for schema in feature_table_schemas(mapping("interactions")).values() for name in schema.names}
    assert [name for name in names if not RESERVED_NAMES.fullmatch(name)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_expressions_compile_for_spark(kind: str) -> None:
    log = mapping(kind, "10m", user_features={"country": "categorical"}, item_features={"tags": "multi"})
    events = ibis.table(ibis.Schema.from_pyarrow(pa.schema(list(event_schema(log)))), name="events")
    for name, table in feature_table_expressions(events, log, as_of=at(0)).items():
        # Databricks is Ibis's PySpark compiler, which alone needs no Spark to be installed.
        assert "FROM `events`" in str(ibis.to_sql(table, dialect="databricks")), name
