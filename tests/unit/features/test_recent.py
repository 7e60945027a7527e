"""The last minutes against counting by hand, and their edges."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.tables import build_feature_tables

WriteSnapshot = Callable[..., Snapshot]
Row = dict[str, Any]
START = datetime(2026, 3, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
WINDOWS = {"10m": timedelta(minutes=10), "1h": timedelta(hours=1)}
KINDS: dict[str, dict[str, Any]] = {
    "impressions": {"kind": "impressions", "label": {"column": "click"}},
    "interactions": {"kind": "interactions"},
    "ratings": {"kind": "ratings", "rating": {"column": "stars"}},
}


def mapping(kind: str, window: str = "10m") -> Mapping:
    columns = {"user_id": "u", "item_id": "i"}
    split = {"attribution_window": window}
    parts = {"name": "log", "timestamp": {"column": "t"}, "columns": columns, "split": split, **KINDS[kind]}
    return Mapping.model_validate(parts)


def event(minutes: float, item: str | None = "i", user: str | None = "u", **more: Any) -> Row:
    return {"event_timestamp": START + timedelta(minutes=minutes), "user_id": user, "item_id": item, **more}


def build(snapshot: Snapshot, out: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(build_feature_tables(snapshot, out).table("user_recent")).to_pylist()
    return rows


def counts(rows: list[Row], *columns: str) -> list[tuple[Any, ...]]:
    return [(row["event_timestamp"] - START, *(row[f"user_recent_{column}"] for column in columns)) for row in rows]


def minutes(number: float) -> timedelta:
    return timedelta(minutes=number) + MICROSECOND


def test_event_counts_from_just_after_it_until_just_after_each_window(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    rows = build(write_snapshot(mapping("interactions"), [event(5)], START + timedelta(days=1)), tmp_path / "t")
    assert counts(rows, "events_10m", "events_1h", "positives_10m", "positives_1h", "items") == [
        (minutes(5), 1, 1, 1, 1, ["i"]),
        (minutes(15), 0, 1, 0, 1, ["i"]),
        (minutes(65), 0, 0, 0, 0, ["i"]),
    ]


def test_click_is_known_when_it_happened_and_without_a_time_after_the_attribution_window(
    write_snapshot: WriteSnapshot, tmp_path: Path
) -> None:
    log = [
        event(0, "timed", clicked=True, click_timestamp=START + timedelta(minutes=2)),
        event(0, "untimed", clicked=True),
        event(0, "unclicked", clicked=False),
    ]
    rows = build(write_snapshot(mapping("impressions", "30m"), log, START + timedelta(hours=1)), tmp_path / "t")
    assert counts(rows, "events_10m", "positives_10m", "items") == [
        (minutes(0), 3, 0, []),
        (minutes(2), 3, 1, ["timed"]),
        (minutes(10), 0, 1, ["timed"]),
        (minutes(12), 0, 0, ["timed"]),
        (minutes(30), 0, 1, ["timed", "untimed"]),
        (minutes(40), 0, 0, ["timed", "untimed"]),
    ]


def test_no_row_is_later_than_as_of_even_between_full_hours(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    as_of = START + minutes(15)
    rows = build(write_snapshot(mapping("interactions"), [event(5), event(5.5)], as_of), tmp_path / "t")
    assert [moment for moment, *_ in counts(rows)] == [minutes(5), minutes(5.5), minutes(15)]


def test_last_ten_items_are_kept_oldest_first(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(k, f"i{k}") for k in range(12)] + [event(11, None)]
    rows = build(write_snapshot(mapping("interactions"), log, START + timedelta(hours=1)), tmp_path / "t")
    assert counts(rows, "items")[9] == (minutes(9), [f"i{k}" for k in range(10)])
    assert counts(rows, "items")[-1][1] == [f"i{k}" for k in range(2, 12)]


@st.composite
def logs(draw: st.DrawFn) -> tuple[Mapping, list[Row]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    offsets = st.sampled_from([0, 0.5, 5, 9.5, 10, 10.5, 15, 20, 59.5, 60, 65, 70, 120])

    def one(number: int) -> Row:
        row = event(draw(offsets), draw(st.sampled_from([f"i{number}", None])), draw(st.sampled_from(["u", "v", None])))
        row["event_timestamp"] += draw(st.sampled_from([0, 1, -1])) * MICROSECOND
        if kind == "impressions":
            delay = draw(st.sampled_from([None, timedelta(0), timedelta(minutes=5), timedelta(minutes=10, seconds=30)]))
            row["clicked"] = draw(st.booleans())
            row["click_timestamp"] = None if delay is None else row["event_timestamp"] + delay
        if kind == "ratings":
            row["rating"] = draw(st.sampled_from([1.0, 5.0, None]))
        return row

    rows = [one(number) for number in range(draw(st.integers(1, 30)))]
    return mapping(kind, draw(st.sampled_from(["0s", "5m", "10m", "2h"]))), sorted(
        rows, key=lambda row: row["event_timestamp"]
    )


def counted(log: Mapping, rows: list[Row], user: str, moment: datetime) -> Row:
    """What is known of a user strictly before a moment."""
    mine = [row for row in rows if row["user_id"] == user]
    known = []
    for place, row in enumerate(mine):
        if not row.get("clicked", row.get("rating", 1)):
            continue
        at = row["event_timestamp"]
        if log.kind == "impressions":
            at = row["click_timestamp"] or at + log.split.attribution_window
        known.append((at, place, row["item_id"]))
    items = [item for at, _, item in sorted(known, key=lambda k: k[:2]) if at < moment and item is not None]
    return {
        **{
            f"user_recent_events_{w}": sum(moment - length <= row["event_timestamp"] < moment for row in mine)
            for w, length in WINDOWS.items()
        },
        **{
            f"user_recent_positives_{w}": sum(moment - length <= at < moment for at, *_ in known)
            for w, length in WINDOWS.items()
        },
        "user_recent_items": items[-10:],
    }


@settings(
    derandomize=True,
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(log=logs())
def test_values_equal_a_naive_count_at_any_time(
    log: tuple[Mapping, list[Row]], write_snapshot: WriteSnapshot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log_mapping, events = log
    as_of = START + timedelta(hours=5)
    table = build(write_snapshot(log_mapping, events, as_of), tmp_path_factory.mktemp("out") / "t")
    for user in {row["user_id"] for row in events} - {None}:
        mine = [row for row in table if row["user_id"] == user]
        for row in mine:
            expected = counted(log_mapping, events, user, row["event_timestamp"])
            assert row == {"user_id": user, "event_timestamp": row["event_timestamp"], **expected}
        # No change point is missing: at any time, the last row not later holds what counting gives.
        for minute in range(-1, 200):
            moment = START + timedelta(minutes=minute, seconds=30)
            at_moment = [row for row in mine if row["event_timestamp"] <= moment]
            expected = counted(log_mapping, events, user, moment)
            held = {name: at_moment[-1][name] for name in expected} if at_moment else None
            assert held == expected if held else not any(expected.values())


def test_snapshot_without_click_times_is_read_too(write_snapshot: WriteSnapshot, tmp_path: Path) -> None:
    log = [event(0, clicked=True, click_timestamp=START + timedelta(minutes=2))]
    snapshot = write_snapshot(mapping("impressions", "30m"), log, START + timedelta(hours=1))
    for file in snapshot.files:  # as schema version 1 had them
        pq.write_table(pq.read_table(file).drop_columns("click_timestamp"), file)
    snapshot.manifest.model_copy(update={"schema_version": 1}).write(snapshot.path / Snapshot.MANIFEST)
    rows = build(Snapshot.load(snapshot.path), tmp_path / "t")
    assert counts(rows, "positives_10m")[-2:] == [(minutes(30), 1), (minutes(40), 0)]


def test_a_mapping_gives_click_timestamps_to_impressions_alone() -> None:
    parts = mapping("interactions").model_dump()
    parts["columns"]["click_timestamp"] = "clicked_at"
    with pytest.raises(ValueError, match="elsewhere the event is the click"):
        Mapping.model_validate(parts)
