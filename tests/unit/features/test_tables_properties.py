"""The feature tables of any log against a naive reference, and the promise that the future never changes the past."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.contracts.feature_tables import HISTORY_LENGTH, JOIN_KEYS, WINDOWS_HOURS
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.engines import duckdb_engine
from evergreen.features.partitions import build_feature_partitions
from evergreen.features.tables import build_feature_tables

WriteSnapshot = Callable[..., Snapshot]
Row = dict[str, Any]

START = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
STRENGTH = 20
KINDS: dict[str, dict[str, Any]] = {
    "impressions": {"kind": "impressions", "label": {"column": "click"}},
    "interactions": {"kind": "interactions"},
    "ratings": {"kind": "ratings", "rating": {"column": "stars"}},
}
# Where windows begin and end, and their neighbours.
HOURS = (0, 1, 2, 3, 23, 24, 25, 26, 167, 168, 169, 170, 719, 720, 721, 722, 745)
WITHIN_HOUR = (timedelta(0), timedelta(microseconds=1), timedelta(minutes=30), HOUR - timedelta(microseconds=1))


@dataclass(frozen=True)
class Log:
    mapping: Mapping
    lag: timedelta
    rows: list[Row]
    as_of: datetime


@st.composite
def events(draw: st.DrawFn, kind: str) -> Row:
    user, item = draw(st.sampled_from(["u1", "u2", None])), draw(st.sampled_from(["i1", "i2", "i3", None]))
    label: Row = {"clicked": draw(st.booleans())} if kind == "impressions" else {}
    if kind == "ratings":
        label = {"rating": draw(st.sampled_from([1.0, 2.5, 3.3, 5.0]))}
    return label | {
        "event_timestamp": START + draw(st.sampled_from(HOURS)) * HOUR + draw(st.sampled_from(WITHIN_HOUR)),
        "user_id": user,
        "item_id": item,
        "category": draw(st.sampled_from(["c1", "c2", None])),
        "country": draw(st.sampled_from(["de", "fr", None])),
        "price": draw(st.sampled_from([1.5, 2.0, None])),
        "tags": draw(st.sampled_from([["a"], ["a", "b"], [], None])),
    }


@st.composite
def logs(draw: st.DrawFn) -> Log:
    kind = draw(st.sampled_from(sorted(KINDS)))
    window, lag = draw(st.sampled_from([("0s", 0), ("10m", 1), ("60m", 1), ("90m", 2), ("1d", 24)]))
    mapping = Mapping.model_validate(
        {
            "name": "log",
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
            "split": {"attribution_window": window},
            "user_features": {"country": "categorical"},
            "item_features": {"price": "numeric", "tags": "multi"},
            **KINDS[kind],
        }
    )
    rows = sorted(draw(st.lists(events(kind), min_size=1, max_size=50)), key=lambda row: row["event_timestamp"])
    extra = draw(st.sampled_from([HOUR, 1.5 * HOUR, 24 * HOUR, 760 * HOUR]))
    return Log(mapping, lag * HOUR, rows, hour_of(rows[-1]["event_timestamp"]) + extra)


def hour_of(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def label_of(row: Row) -> float:
    return float(row.get("clicked", row.get("rating", 1)))


def is_positive(row: Row) -> bool:
    return bool(row.get("clicked", True))


def before(rows: Iterable[Row], end: datetime, hours: int | None = None) -> list[Row]:
    """Rows of [end - hours, end), or of all time before `end`."""
    start = datetime.min.replace(tzinfo=UTC) if hours is None else end - hours * HOUR
    return [row for row in rows if start <= row["event_timestamp"] < end]


def activity_at(log: Log, mine: list[Row], moment: datetime, prefix: str) -> Row:
    """What is known of a key at a full hour, by counting."""
    matured = moment - log.lag
    everybody = [label_of(row) for row in before(log.rows, matured)]
    positives = [row for row in before(mine, matured) if is_positive(row)]
    values: Row = {}
    for window, hours in WINDOWS_HOURS.items():
        labels = [label_of(row) for row in before(mine, matured, hours)]
        values[f"{prefix}_events_{window}"] = len(before(mine, moment, hours))
        values[f"{prefix}_positives_{window}"] = sum(map(is_positive, before(mine, matured, hours)))
        values[f"{prefix}_rate_{window}"] = (
            pytest.approx(
                (sum(labels) + STRENGTH * sum(everybody) / len(everybody)) / (len(labels) + STRENGTH), rel=1e-9
            )
            if everybody
            else None
        )
    if prefix != "user_category":
        values[f"{prefix}_last_positive_timestamp"] = max((r["event_timestamp"] for r in positives), default=None)
    if prefix == "user":
        values["user_last_event_timestamp"] = max((r["event_timestamp"] for r in before(mine, moment)), default=None)
        values["user_history"] = [r["item_id"] for r in positives if r["item_id"] is not None][-HISTORY_LENGTH:]
    return values


def activity_rows(log: Log, keys: tuple[str, ...], prefix: str) -> list[Row]:
    """The whole table: for each key, the hours at which an event or its label enters or leaves a window."""
    table = []
    known = {tuple(row[k] for k in keys) for row in log.rows if all(row[k] is not None for k in keys)}
    for key in sorted(known):
        mine = [row for row in log.rows if tuple(row[k] for k in keys) == key]
        ends = {hour_of(row["event_timestamp"]) + HOUR for row in mine}
        shifts = [base + hours * HOUR for base in (0 * HOUR, log.lag) for hours in (0, *WINDOWS_HOURS.values())]
        for moment in sorted({end + shift for end in ends for shift in shifts}):
            if moment <= log.as_of:
                values = activity_at(log, mine, moment, prefix)
                table.append(dict(zip(keys, key, strict=True)) | {"event_timestamp": moment} | values)
    return table


def profile_rows(log: Log, key: str, prefix: str, attributes: dict[str, str]) -> list[Row]:
    table = []
    for value in sorted({row[key] for row in log.rows} - {None}):
        mine = [row for row in log.rows if row[key] == value]
        known: Row = dict.fromkeys(attributes)
        shown = None
        for i, row in enumerate(mine):
            known |= {name: row[source] for name, source in attributes.items() if row[source] is not None}
            is_last_of_instant = i + 1 == len(mine) or mine[i + 1]["event_timestamp"] != row["event_timestamp"]
            if is_last_of_instant and known != shown:
                shown = dict(known)
                times = {
                    "event_timestamp": row["event_timestamp"] + timedelta(microseconds=1),
                    f"{prefix}_first_seen": mine[0]["event_timestamp"],
                }
                table.append({key: value} | times | shown)
    return table


BUDGET = settings(
    derandomize=True,
    deadline=None,
    # A build takes most of a second, whatever the size: few examples, each with many keys, ties and window borders.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(BUDGET, max_examples=7)
@given(log=logs())
def test_tables_equal_a_naive_count(
    log: Log, write_snapshot: WriteSnapshot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out") / "tables"
    tables = build_feature_tables(write_snapshot(log.mapping, log.rows, log.as_of), out)
    expected = {
        "user_activity": activity_rows(log, JOIN_KEYS["user_activity"], "user"),
        "item_activity": activity_rows(log, JOIN_KEYS["item_activity"], "item"),
        "user_category_activity": activity_rows(log, JOIN_KEYS["user_category_activity"], "user_category"),
        "user_profile": profile_rows(log, "user_id", "user", {"country": "country"}),
        "item_profile": profile_rows(
            log, "item_id", "item", {"item_category": "category", "price": "price", "tags": "tags"}
        ),
    }
    assert expected.keys() == set(JOIN_KEYS) - {"user_recent"}  # which is in test_recent
    for name in expected:
        assert pq.read_table(tables.table(name)).to_pylist() == expected[name], name
        assert tables.manifest.rows[name] == len(expected[name])
    check_between_rows(log, pq.read_table(tables.table("user_activity")).to_pylist())


def check_between_rows(log: Log, table: list[Row]) -> None:
    """No change point is missing: at any hour, the last row not later holds what counting gives."""
    moments = {row["event_timestamp"] + k * HOUR for row in table for k in (-1, 1, 5)}
    for user in {row["user_id"] for row in table}:
        mine = [row for row in log.rows if row["user_id"] == user]
        rows = [row for row in table if row["user_id"] == user]
        for moment in (m for m in moments if m <= log.as_of):
            expected = activity_at(log, mine, moment, "user")
            at_moment = [row for row in rows if row["event_timestamp"] <= moment]
            if not at_moment:
                assert not any(expected[f"user_events_{window}"] for window in WINDOWS_HOURS)
                continue
            # A rate is as of its own row: the prior, which is everybody's, goes on moving in between.
            counts = {name: value for name, value in expected.items() if "_rate_" not in name}
            assert {name: at_moment[-1][name] for name in counts} == counts


@settings(BUDGET, max_examples=5)
@given(log=logs(), data=st.data())
def test_shuffling_the_future_does_not_change_a_single_past_value(
    log: Log, data: st.DataObject, write_snapshot: WriteSnapshot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    borders = sorted({row["event_timestamp"] for row in log.rows} | {hour_of(r["event_timestamp"]) for r in log.rows})
    now = data.draw(st.sampled_from(borders), label="now")
    past = [row for row in log.rows if row["event_timestamp"] < now]
    future = data.draw(st.lists(events(log.mapping.kind.value), min_size=0 if past else 1, max_size=50), label="future")
    # Other events, other keys, other labels, at other times, but none before now.
    future = [row | {"event_timestamp": max(row["event_timestamp"], now)} for row in future]
    as_of = max(log.as_of, hour_of(max(r["event_timestamp"] for r in past + future)) + HOUR)
    out = tmp_path_factory.mktemp("out")
    real = build_feature_tables(write_snapshot(log.mapping, log.rows, as_of), out / "real")
    other = build_feature_tables(write_snapshot(log.mapping, past + future, as_of), out / "other")
    for name in JOIN_KEYS:
        until_now = pc.field("event_timestamp") <= now
        was, would_be = (pq.read_table(tables.table(name)).filter(until_now) for tables in (real, other))
        assert was.to_pylist() == would_be.to_pylist(), name


@settings(BUDGET, max_examples=4)
@given(log=logs(), data=st.data())
def test_a_range_of_dates_holds_what_the_whole_log_gives(
    log: Log, data: st.DataObject, write_snapshot: WriteSnapshot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    snapshot = write_snapshot(log.mapping, log.rows, log.as_of)
    out = tmp_path_factory.mktemp("out")
    whole = build_feature_tables(snapshot, out / "whole")
    events = [log.rows[0]["event_timestamp"].date(), log.as_of.date()]
    first, last = sorted(data.draw(st.tuples(st.dates(*events), st.dates(*events)), label="dates"))
    with duckdb_engine(out / "spill") as engine:
        part = build_feature_partitions(snapshot, out / "part", engine=engine, first=first, last=last)
    for name, keys in JOIN_KEYS.items():
        order = [(key, "ascending") for key in (*keys, "event_timestamp")]
        expected = [
            row
            for row in pq.read_table(whole.table(name)).to_pylist()
            if first <= row["event_timestamp"].date() <= last
        ]
        assert ds.dataset(part.table(name), format="parquet").to_table().sort_by(order).to_pylist() == expected, name
