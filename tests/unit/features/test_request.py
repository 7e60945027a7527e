"""What is computed when the request comes: calendar and elapsed time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pandas as pd
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.features.request import ELAPSED_FEATURES, REQUEST_SCHEMA, request_features, request_features_frame

MICROS = pa.timestamp("us", tz="UTC")
NOON = datetime(2026, 3, 4, 12, 30, tzinfo=UTC)  # a Wednesday


def stored(**columns: list[datetime | None]) -> pa.Table:
    num_rows = len(next(iter(columns.values()))) if columns else 1
    return pa.table(
        {name: pa.array(columns.get(name, [None] * num_rows), MICROS) for name in ELAPSED_FEATURES.values()}
    )


@pytest.mark.parametrize(
    ("moment", "hour", "weekday"),
    [
        (NOON, "12", "2"),
        (datetime(2026, 3, 2, 0, 0, tzinfo=UTC), "0", "0"),  # Monday, midnight
        (datetime(2026, 3, 1, 23, 59, 59, 999_999, tzinfo=UTC), "23", "6"),  # Sunday, the last microsecond
        (datetime(1969, 12, 31, 23, 0, tzinfo=UTC), "23", "2"),  # before 1970
        (datetime(2026, 3, 4, 1, 0, tzinfo=timezone(timedelta(hours=9))), "16", "1"),  # another zone, the day before
        (datetime(2026, 3, 4, 12, 30), "12", "2"),  # without a zone: UTC
    ],
)
def test_hour_and_weekday_are_utc(moment: datetime, hour: str, weekday: str) -> None:
    row = request_features(moment, stored()).to_pylist()[0]
    assert (row["hour"], row["weekday"]) == (hour, weekday)


def test_elapsed_times_count_from_their_own_timestamp() -> None:
    ago = {name: [NOON - timedelta(seconds=n)] for n, name in enumerate(ELAPSED_FEATURES.values(), start=1)}
    row = request_features(NOON, stored(**ago)).to_pylist()[0]
    assert [row[name] for name in ELAPSED_FEATURES] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_unknown_timestamps_give_null() -> None:
    table = stored(user_first_seen=[None, NOON])
    requests = pa.array([NOON, None], MICROS)
    assert request_features(requests, table).to_pylist() == [
        {"hour": "12", "weekday": "2", **dict.fromkeys(ELAPSED_FEATURES)},
        dict.fromkeys(REQUEST_SCHEMA.names),
    ]


def test_store_ahead_of_request_counts_as_just_now() -> None:
    table = stored(user_last_event_timestamp=[NOON + timedelta(hours=1)])
    assert request_features(NOON, table)["user_recency_seconds"].to_pylist() == [0.0]


def test_fractions_of_a_second_do_not_matter() -> None:
    # Feast's online store cuts timestamps to seconds; training must see the same.
    stamp = NOON - timedelta(seconds=10, microseconds=-700_000)
    exact = request_features(NOON + timedelta(microseconds=900_000), stored(item_first_seen=[stamp]))
    cut = request_features(NOON, stored(item_first_seen=[stamp.replace(microsecond=0)]))
    assert exact.equals(cut)


def test_one_time_for_all_rows_equals_the_same_time_on_every_row() -> None:
    table = stored(user_first_seen=[NOON - timedelta(days=1), None, NOON])
    assert request_features(NOON, table).equals(request_features(pa.chunked_array([[NOON] * 3], MICROS), table))


def test_pandas_form_gives_the_same_values() -> None:
    table = stored(user_first_seen=[NOON - timedelta(days=1), None]).append_column(
        "request_timestamp", pa.array([NOON, NOON + timedelta(hours=20)], MICROS)
    )
    frame = request_features_frame(table.to_pandas())
    expected = request_features(table["request_timestamp"], table).to_pandas()
    pd.testing.assert_frame_equal(frame, expected)


def test_no_rows_give_no_rows() -> None:
    empty = stored(user_first_seen=[])
    assert request_features(NOON, empty).equals(REQUEST_SCHEMA.empty_table())


def test_missing_column_is_named() -> None:
    with pytest.raises(ArtifactError, match="item_first_seen"):
        request_features(NOON, stored().drop_columns(["item_first_seen"]))
