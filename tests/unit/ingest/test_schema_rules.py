"""What becomes of a value, one column at a time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Mapping

GOOD = "2024-01-01T00:00:00Z"


@pytest.fixture
def one(ingest: Callable[..., Any], clicks: Callable[..., Mapping]) -> Callable[..., Any]:
    """one(column, value, **mapping): the snapshot's value of a column `x` of the log, or the reason for its refusal."""

    def run(column: str, value: str, *, time: str = GOOD, **mapping: Any) -> Any:
        log = f'time,user,item,click,x\n{GOOD},keep,me,0,\n{time},u,i,1,"{value}"\n'
        result = ingest(clicks(**mapping), log)
        if result.rejected:
            return result.rejected[0]["reason"]
        return result.rows[-1][column]

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2019-11-24 00:01:03.979311+00:00", datetime(2019, 11, 24, 0, 1, 3, 979311, UTC)),
        ("2019-11-24T00:01:03Z", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("2019-11-24T05:31:03+05:30", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("2019-11-24T05:31:03 +0530", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("2019-11-24 00:01:03", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("2019-11-24 00:01", datetime(2019, 11, 24, 0, 1, tzinfo=UTC)),
        ("2019-11-24", datetime(2019, 11, 24, tzinfo=UTC)),
        ("2019-11-24 00:01:03,5", datetime(2019, 11, 24, 0, 1, 3, 500000, UTC)),
        ("", "timestamp: missing"),
        ("yesterday", "timestamp: not a time"),
        ("24/11/2019", "timestamp: not a time"),
        ("2019-02-30", "timestamp: not a time"),
        ("epoch", "timestamp: outside 1990-2100"),
        ("infinity", "timestamp: not a time"),
        ("1574553663", 'timestamp: not a time (unit = "s"?)'),
        ("1574553663979", 'timestamp: not a time (unit = "ms"?)'),
        ("1970-01-01", "timestamp: outside 1990-2100"),
        ("50000-01-01", "timestamp: outside 1990-2100"),
    ],
)
def test_iso_times(ingest: Any, clicks: Any, text: str, expected: object) -> None:
    result = ingest(clicks(), f'time,user,item,click\n2000-01-01,u,i,0\n"{text}",u,i,0\n')
    assert (result.rejected[0]["reason"] if result.rejected else result.rows[-1]["event_timestamp"]) == expected


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("s", "1574553663", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("s", "1574553663.979311", datetime(2019, 11, 24, 0, 1, 3, 979311, UTC)),
        ("s", "1.574553663e9", datetime(2019, 11, 24, 0, 1, 3, tzinfo=UTC)),
        ("ms", "1574553663979", datetime(2019, 11, 24, 0, 1, 3, 979000, UTC)),
        ("us", "1574553663979311", datetime(2019, 11, 24, 0, 1, 3, 979311, UTC)),
        ("ns", "1574553663979311999", datetime(2019, 11, 24, 0, 1, 3, 979311, UTC)),
        ("s", "1574553663979", 'timestamp: outside 1990-2100 (unit = "ms"?)'),
        ("ms", "1574553663", 'timestamp: outside 1990-2100 (unit = "s"?)'),
        ("us", "1574553663979311999", 'timestamp: outside 1990-2100 (unit = "ns"?)'),
        ("ns", "1574553663", 'timestamp: outside 1990-2100 (unit = "s"?)'),
        ("s", "-1", "timestamp: outside 1990-2100"),
        ("s", "1e300", "timestamp: outside 1990-2100"),
        ("ns", "1e300", "timestamp: outside 1990-2100"),
        ("s", "2019-11-24", "timestamp: not a number"),
        ("s", "nan", "timestamp: not a number"),
    ],
)
def test_unix_times(ingest: Any, clicks: Any, unit: str, text: str, expected: object) -> None:
    good = {"s": "1500000000", "ms": "1500000000000", "us": "1500000000000000", "ns": "1500000000000000000"}[unit]
    mapping = clicks(timestamp={"column": "time", "unit": unit})
    result = ingest(mapping, f"time,user,item,click\n{good},u,i,0\n{text},u,i,0\n")
    assert (result.rejected[0]["reason"] if result.rejected else result.rows[-1]["event_timestamp"]) == expected


def test_time_zone_is_for_times_without_an_offset(ingest: Any, clicks: Any) -> None:
    mapping = clicks(timestamp={"column": "time", "timezone": "America/New_York"})
    result = ingest(
        mapping, "time,user,item,click\n2024-01-01 00:00,u,i,0\n2024-07-01 00:00,u,i,0\n2024-08-01T00:00Z,u,i,0\n"
    )
    assert [t.hour for t in result.column("event_timestamp")] == [5, 4, 0]


def test_times_in_a_format_of_their_own(ingest: Any, clicks: Any) -> None:
    mapping = clicks(timestamp={"column": "time", "format": "%d/%b/%Y:%H:%M:%S %z"})
    result = ingest(mapping, "time,user,item,click\n10/Oct/2000:13:55:36 -0700,u,i,0\n2000-10-10,u,i,0\n")
    assert result.column("event_timestamp") == [datetime(2000, 10, 10, 20, 55, 36, tzinfo=UTC)]
    assert result.reasons == [(3, "timestamp: not in the mapping's format")]


def test_row_order_as_time_counts_refused_rows_too(ingest: Any) -> None:
    mapping = Mapping.model_validate(
        {
            "name": "ordered",
            "kind": "impressions",
            "timestamp": {"start": datetime(2024, 1, 1, tzinfo=UTC), "interval": "15m"},
            "label": {"column": "click"},
        }
    )
    result = ingest(mapping, "click,x\n0,a\n\n7,b\n1\n1,d\n")
    assert [t.minute for t in result.column("event_timestamp")] == [0, 45]
    assert result.reasons == [(4, "clicked: not one of the label's values"), (5, "wrong number of fields")]
    assert result.column("user_id") == [None, None]


@pytest.mark.parametrize(
    "text", ["007", "1.0", "1e5", "9007199254740993", "héllo", "a b", "NULL", "-3499919498720038879"]
)
def test_ids_stay_text(ingest: Any, clicks: Any, text: str) -> None:
    assert ingest(clicks(), f"time,user,item,click\n{GOOD},{text},i,0\n").column("user_id") == [text]


def test_spaces_around_values_and_names_do_not_count(ingest: Any, clicks: Any) -> None:
    result = ingest(clicks(), f"time , user,item , click\n {GOOD},u , i,\t1\n")
    assert [(row["user_id"], row["item_id"], row["clicked"]) for row in result.rows] == [("u", "i", True)]


def test_an_id_that_the_mapping_names_must_be_there(ingest: Any, clicks: Any) -> None:
    result = ingest(
        clicks(source={"null_values": ["NULL"]}),
        f"time,user,item,click\n{GOOD},,i,0\n{GOOD},u,NULL,0\n{GOOD},u,i,0\n",
    )
    assert result.reasons == [(2, "user_id: missing"), (3, "item_id: missing")]


def test_ids_of_several_columns_are_joined_and_whole_or_missing(ingest: Any, clicks: Any) -> None:
    mapping = clicks(columns={"user_id": ["user", "x"], "item_id": "item", "request_id": ["x", "item"]})
    result = ingest(mapping, f"time,user,item,click,x\n{GOOD},u,i,0,1\n{GOOD},u,i,0,\n")
    assert (result.rows[0]["user_id"], result.rows[0]["request_id"]) == ("u|1", "1|i")
    assert result.reasons == [(3, "user_id: missing")]


def test_a_missing_request_is_null(one: Any) -> None:
    assert one("request_id", "", columns={"user_id": "user", "item_id": "item", "request_id": "x"}) is None


NOT_A_POSITION = "position: not an integer >= 0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("0", 0),
        ("2.0", 2),
        ("", None),
        ("-1", NOT_A_POSITION),
        ("1.5", NOT_A_POSITION),
        ("x", NOT_A_POSITION),
        ("3000000000", NOT_A_POSITION),
        ("inf", NOT_A_POSITION),
    ],
)
def test_position(one: Any, text: str, expected: object) -> None:
    assert one("position", text, columns={"user_id": "user", "item_id": "item", "position": "x"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("1", 1.0),
        ("", None),
        ("0", "propensity: outside (0, 1]"),
        ("1.01", "propensity: outside (0, 1]"),
        ("-0.1", "propensity: outside (0, 1]"),
        ("nan", "propensity: not a number"),
        ("p", "propensity: not a number"),
    ],
)
def test_propensity(one: Any, text: str, expected: object) -> None:
    assert one("propensity", text, columns={"user_id": "user", "item_id": "item", "propensity": "x"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.5", 12.5),
        ("", None),
        ("-1", "dwell_seconds: negative or too large"),
        ("1e39", "dwell_seconds: negative or too large"),
    ],
)
def test_dwell(one: Any, text: str, expected: object) -> None:
    assert one("dwell_seconds", text, columns={"user_id": "user", "item_id": "item", "dwell_seconds": "x"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("+7", 7.0),
        ("true", 1.0),
        ("False", 0.0),
        ("", None),
        ("NaN", "x: not a number"),
        ("inf", "x: not a number"),
        ("1e999", "x: not a number"),
        ("1_000", "x: not a number"),
        ("1.000,5", "x: not a number"),
    ],
)
def test_numeric_feature(one: Any, text: str, expected: object) -> None:
    assert one("x", text, item_features={"x": "numeric"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b|c", ["a", "b", "c"]), ("a", ["a"]), (" a | |b", ["a", "b"]), ("", None), ("|", None)],
)
def test_multi_feature(one: Any, text: str, expected: object) -> None:
    assert one("x", text, item_features={"x": "multi"}) == expected


def test_category_of_a_multi_feature_is_its_first_value(one: Any) -> None:
    columns = {"user_id": "user", "item_id": "item", "category": "x"}
    features = {"genres": {"column": "x", "type": "multi", "separator": "/"}}
    assert one("category", "drama/crime", columns=columns, item_features=features) == "drama"
    assert one("category", "drama/crime", columns=columns) == "drama/crime"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", True),
        ("true", True),
        ("0.0", False),
        ("2", "clicked: not one of the label's values"),
        ("", "clicked: missing"),
    ],
)
def test_label_of_impressions(ingest: Any, clicks: Any, text: str, expected: object) -> None:
    result = ingest(clicks(), f"time,user,item,click\n{GOOD},u,i,0\n{GOOD},u,i,{text}\n")
    assert (result.rejected[0]["reason"] if result.rejected else result.rows[-1]["clicked"]) == expected


def test_star_means_that_all_else_is_negative(ingest: Any, clicks: Any) -> None:
    mapping = clicks(label={"column": "click", "positive": ["buy"], "negative": ["*"]})
    result = ingest(mapping, f"time,user,item,click\n{GOOD},u,a,buy\n{GOOD},u,b,view\n{GOOD},u,c,\n")
    assert result.column("clicked") == [True, False, False]


def test_negative_interactions_are_left_out_and_unknown_ones_refused(ingest: Any, clicks: Any) -> None:
    mapping = clicks(kind="interactions", label={"column": "click", "positive": ["buy", "like"], "negative": ["view"]})
    result = ingest(mapping, f"time,user,item,click\n{GOOD},u,a,buy\n{GOOD},u,b,view\n{GOOD},u,c,hm\n{GOOD},u,d,like\n")
    assert result.column("item_id") == ["a", "d"]
    assert result.column("clicked") == [None, None]
    assert result.snapshot.manifest.left_out == {"label: negative": 1}
    assert result.snapshot.manifest.num_positives == 2
    assert result.reasons == [(4, "label: not one of the label's values")]


def test_ratings_must_be_numbers_in_their_range(ingest: Any, clicks: Any) -> None:
    mapping = clicks(kind="ratings", label=None, rating={"column": "stars"})
    rows = ["5", "0.5", "6", "", "good", "nan", "3.5"]
    result = ingest(mapping, "time,user,item,stars\n" + "".join(f"{GOOD},u,i,{value}\n" for value in rows))
    assert result.column("rating") == [5.0, 3.5]
    assert [reason for _, reason in result.reasons] == [
        "rating: outside [1, 5]",
        "rating: outside [1, 5]",
        "rating: missing",
        "rating: not a number",
        "rating: not a number",
    ]


def test_ratings_of_impressions_may_be_missing(one: Any) -> None:
    assert one("rating", "", rating={"column": "x"}) is None
    assert one("rating", "4", rating={"column": "x"}) == 4.0


def test_of_several_reasons_the_first_in_a_fixed_order_is_given(ingest: Any, clicks: Any) -> None:
    result = ingest(clicks(), f"time,user,item,click\n{GOOD},u,i,0\nnever,,,9\n{GOOD},,,9\n{GOOD},u,i,9\n")
    assert [reason for _, reason in result.reasons] == [
        "timestamp: not a time",
        "user_id: missing",
        "clicked: not one of the label's values",
    ]


def test_columns_with_hostile_names_are_read(ingest: Any, clicks: Any) -> None:
    name = """a "b" c'); DROP TABLE block; --"""
    mapping = clicks(item_features={"x": {"column": name, "type": "categorical"}}, source={"null_values": ["o'neill"]})
    quoted = '"' + name.replace('"', '""') + '"'
    result = ingest(mapping, f"time,user,item,click,{quoted}\n{GOOD},u,i,0,v\n{GOOD},u,i,0,o'neill\n")
    assert result.column("x") == ["v", None]


def test_when_nothing_fits_the_error_shows_why(ingest: Any, clicks: Any) -> None:
    with pytest.raises(InputError, match=r"none of the 2 rows fits") as error:
        ingest(clicks(), "time,user,item,click\n1574553663,u,i,0\n1574553664,u,i,1\n")
    assert 'unit = "s"?' in str(error.value)
    assert "log.csv, line 2: 1574553663,u,i,0" in str(error.value)


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("iso", "2024-01-01 00:00:05.25", datetime(2024, 1, 1, 0, 0, 5, 250000, UTC)),
        ("iso", "2024-01-01T01:00:05+01:00", datetime(2024, 1, 1, 0, 0, 5, tzinfo=UTC)),
        ("iso", "2024-01-01", datetime(2024, 1, 1, tzinfo=UTC)),
        ("iso", "", None),
        ("iso", "2023-12-31T23:59:59", "click_timestamp: before the event"),
        ("iso", "soon", "click_timestamp: not a time"),
        ("iso", "2200-01-01", "click_timestamp: outside 1990-2100"),
        ("ms", "1704067205250", datetime(2024, 1, 1, 0, 0, 5, 250000, UTC)),
        ("ms", "1704067205", "click_timestamp: before the event"),
    ],
)
def test_click_timestamp_is_written_like_the_events(
    ingest: Any, clicks: Any, unit: str, text: str, expected: object
) -> None:
    columns = {"user_id": "user", "item_id": "item", "click_timestamp": "x"}
    time = {"iso": GOOD, "ms": "1704067200000"}[unit]
    log = f"time,user,item,click,x\n{time},keep,me,0,\n{time},u,i,1,{text}\n"
    result = ingest(clicks(columns=columns, timestamp={"column": "time", "unit": unit}), log)
    assert (result.rejected[0]["reason"] if result.rejected else result.rows[-1]["click_timestamp"]) == expected


def test_click_timestamp_takes_the_mappings_time_zone(ingest: Any, clicks: Any) -> None:
    columns = {"user_id": "user", "item_id": "item", "click_timestamp": "x"}
    time = {"column": "time", "timezone": "Europe/Berlin"}
    log = "time,user,item,click,x\n2024-01-01 00:00,u,i,1,2024-01-01 00:05\n"
    row = ingest(clicks(columns=columns, timestamp=time), log).rows[0]
    assert row["click_timestamp"] == datetime(2023, 12, 31, 23, 5, tzinfo=UTC)
    assert row["event_timestamp"] == datetime(2023, 12, 31, 23, 0, tzinfo=UTC)
