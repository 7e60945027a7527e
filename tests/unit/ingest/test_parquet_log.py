"""Parquet logs: every type that a log may have comes to the same values as its text would."""

from __future__ import annotations

import zipfile
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import InputError
from evergreen.ingest import parquet
from evergreen.ingest.log import ingest_log

TIME = datetime(2024, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def ingest_table(ingest: Any, clicks: Any, tmp_path: Path) -> Any:
    """ingest_table(columns, **mapping): ingest a table with defaults for the columns that are not given."""

    def run(columns: dict[str, pa.Array], **mapping: Any) -> Any:
        num_rows = len(next(iter(columns.values())))
        defaults = {
            "time": pa.array([TIME] * num_rows, pa.timestamp("us", tz="UTC")),
            "user": pa.array(["u"] * num_rows),
            "item": pa.array(["i"] * num_rows),
            "click": pa.array([True] * num_rows),
        }
        pq.write_table(pa.table(defaults | columns), tmp_path / "log.parquet", row_group_size=3)
        return ingest(clicks(**mapping), tmp_path / "log.parquet")

    return run


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([7, 2**63 - 1, -5], pa.int64()), ["7", "9223372036854775807", "-5"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([12.0, 1e15, 0.5]), ["12", "1000000000000000", "0.5"]),
        (pa.array([12.0], pa.float32()), ["12"]),
        (pa.array(["007", " x "], pa.large_string()), ["007", "x"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"bytes"]), ["bytes"]),
        (pa.array([Decimal("12.50")]), ["12.50"]),
        (pa.array([True]), ["true"]),
    ],
)
def test_ids(ingest_table: Any, array: pa.Array, expected: list[str]) -> None:
    assert ingest_table({"user": array}).column("user_id") == expected


@pytest.mark.parametrize(
    "array",
    [
        pa.array([TIME], pa.timestamp("s", tz="UTC")),
        pa.array([TIME], pa.timestamp("ns", tz="America/New_York")),
        pa.array([TIME.replace(tzinfo=None)], pa.timestamp("ms")),
        pa.array(["2024-01-01T12:00:00Z"]),
    ],
)
def test_times(ingest_table: Any, array: pa.Array) -> None:
    assert ingest_table({"time": array}).column("event_timestamp") == [TIME]


def test_naive_times_and_dates_are_in_the_time_zone_of_the_mapping(ingest_table: Any) -> None:
    timestamp = {"column": "time", "timezone": "Europe/Berlin"}
    times = ingest_table({"time": pa.array([datetime(2024, 7, 1)], pa.timestamp("us"))}, timestamp=timestamp)
    dates = ingest_table({"time": pa.array([date(2024, 7, 1)])}, timestamp=timestamp)
    expected = [datetime(2024, 6, 30, 22, tzinfo=UTC)]
    assert times.column("event_timestamp") == dates.column("event_timestamp") == expected


def test_unix_times(ingest_table: Any) -> None:
    result = ingest_table({"time": pa.array([1704110400123456789])}, timestamp={"column": "time", "unit": "ns"})
    assert result.column("event_timestamp") == [datetime(2024, 1, 1, 12, 0, 0, 123456, UTC)]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([True, False]),
        pa.array([1, 0], pa.int8()),
        pa.array([1.0, 0.0]),
        pa.array(["1", "0"]),
    ],
)
def test_labels(ingest_table: Any, array: pa.Array) -> None:
    assert ingest_table({"click": array}).column("clicked") == [True, False]


def test_features(ingest_table: Any) -> None:
    features = {"price": "numeric", "genres": "multi", "brand": "categorical", "new": "numeric"}
    result = ingest_table(
        {
            "price": pa.array([1.5, None, float("nan")]),
            "genres": pa.array([["a", "b"], [], None]),
            "brand": pa.array([3.0, None, 4.0]),
            "new": pa.array([True, None, False]),
        },
        item_features=features,
    )
    assert [[row[name] for name in features] for row in result.rows] == [
        [1.5, ["a", "b"], "3", 1.0],
        [None, None, None, None],
    ]
    assert result.reasons == [(3, "price: not a number")]
    assert '"brand": 4.0' in result.rejected[0]["row"]


def test_null_ids_are_refused_by_row_number(ingest_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 2)
    result = ingest_table({"user": pa.array(["a", None, "b", "", "c"])})
    assert result.column("user_id") == ["a", "b", "c"]
    assert result.reasons == [(2, "user_id: missing"), (4, "user_id: missing")]


def test_a_type_that_no_column_can_have_is_an_error(ingest_table: Any) -> None:
    with pytest.raises(InputError, match=r"log.parquet: column 'user' is of type struct"):
        ingest_table({"user": pa.array([{"id": 1}])})


def test_missing_column(ingest_table: Any) -> None:
    with pytest.raises(InputError, match=r"'device' \(context_features.os\)"):
        ingest_table({"user": pa.array(["u"])}, context_features={"os": {"column": "device", "type": "categorical"}})


def test_parquet_inside_an_archive(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"time": [TIME], "user": ["u"], "item": ["i"], "click": [1]}), tmp_path / "log.parquet")
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.write(tmp_path / "log.parquet", "day/log.parquet")
    url = f"zip://day::{tmp_path / 'log.zip'}"
    assert ingest_log(clicks(), url, tmp_path / "snapshot").manifest.rows == 1
