"""The rows that are evaluated: how they are clustered, dated and timed."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from evergreen.evaluation.config import EvaluationConfig
from evergreen.evaluation.latency import request_rows
from evergreen.evaluation.rows import MIN_CLUSTERS, row_clusters, row_periods


def keys(users: list[str | None], requests: list[str | None]) -> pa.Table:
    return pa.table({"user_id": pa.array(users, pa.string()), "request_id": pa.array(requests, pa.string())})


MANY = [f"k{n}" for n in range(MIN_CLUSTERS)]


def test_users_are_clusters_and_a_row_without_one_stands_alone():
    clusters = row_clusters(keys([*MANY, None, "k0", None], [None] * (MIN_CLUSTERS + 3)))
    assert clusters.unit == "users"
    assert clusters.codes[0] == clusters.codes[MIN_CLUSTERS + 1]
    assert len(np.unique(clusters.codes)) == MIN_CLUSTERS + 2


def test_without_users_requests_are_clusters_and_without_those_rows():
    assert row_clusters(keys([None] * MIN_CLUSTERS, MANY)).unit == "requests"
    alone = row_clusters(keys([None] * 3, [None] * 3))
    assert alone.unit == "rows"
    assert len(np.unique(alone.codes)) == 3


def test_too_few_users_are_not_resampled_for_their_intervals_would_have_no_width():
    n = MIN_CLUSTERS
    assert row_clusters(keys(["only"] * n, MANY)).unit == "requests"
    assert row_clusters(keys(["only"] * n, ["one", "two"] * (n // 2))).unit == "rows"


def test_periods_are_named_by_their_first_day_and_old_ones_are_put_together():
    days = [1, 2, 3, 8]  # 1 January 2024 is a Monday
    times = pa.chunked_array(
        [pa.array([datetime(2024, 1, d, 23, tzinfo=UTC) for d in days], pa.timestamp("us", tz="UTC"))]
    )
    assert row_periods(times, unit="day", max_periods=2).tolist() == ["until 2024-01-02"] * 2 + [
        "2024-01-03",
        "2024-01-08",
    ]
    assert row_periods(times, unit="week", max_periods=9).tolist() == ["2024-01-01"] * 3 + ["2024-01-08"]
    assert row_periods(times, unit="month", max_periods=9).tolist() == ["2024-01"] * 4


def test_a_request_has_as_many_rows_as_asked_for():
    rows = pa.table({"x": [1, 2, 3]})
    assert request_rows(rows, 7)["x"].to_pylist() == [1, 2, 3, 1, 2, 3, 1]
    assert request_rows(rows, 2)["x"].to_pylist() == [1, 2]


def test_config_refuses_a_primary_cutoff_that_is_not_measured():
    with pytest.raises(ValidationError, match=r"primary_cutoff=7: must be one of cutoffs \[5, 10\]"):
        EvaluationConfig(cutoffs=(5, 10), primary_cutoff=7)
