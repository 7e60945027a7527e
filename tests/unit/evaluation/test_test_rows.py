"""The rows that are evaluated: how they are clustered, dated and timed."""

from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from evergreen.evaluation.config import EvaluationConfig
from evergreen.evaluation.latency import request_rows
from evergreen.evaluation.rows import (
    MIN_CLUSTERS,
    each_encoded,
    has_values,
    predict_test_rows,
    row_clusters,
    row_periods,
)
from evergreen.evaluation.slices import KnownIds, row_slices


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


class ShownScorer:
    """A model that answers with the position at which it is told that a row was shown, as a probability."""

    info = SimpleNamespace(name="deepfm")
    encoder = SimpleNamespace(digest="none", transform=lambda table: table)

    def predict_encoded(self, rows, positions=None):
        return positions / 10


def test_test_rows_are_predicted_where_they_were_shown_and_unknown_positions_are_0(write_world, split_rows, tmp_path):
    rows = {split: split_rows(split, np.arange(8) % 2, np.zeros(8)) for split in ("train", "validation", "test")}
    position = pa.array([1, None, 3, 2, 1, None, 5, 4], pa.int32())
    rows["test"] = rows["test"].append_column("position", position)
    world = write_world(tmp_path, "impressions", rows)
    for chunk in (3, 100):
        predicted = predict_test_rows(world.training_set, [ShownScorer()], EvaluationConfig(chunk_rows=chunk))
        assert predicted.predictions["deepfm"].tolist() == [0.1, 0.0, 0.3, 0.2, 0.1, 0.0, 0.5, 0.4]


def test_rows_are_encoded_once_for_all_models_of_one_encoder():
    encoded = []

    def encode(encoder):
        encoded.append(encoder.digest)
        return f"rows of {encoder.digest}"

    packages = [SimpleNamespace(name=n, encoder=SimpleNamespace(digest=d)) for n, d in ("ax", "bx", "cy", "dx")]
    rows = {package.name: rows for package, rows in each_encoded(packages, encode)}
    assert encoded == ["x", "y"]
    assert rows == {"a": "rows of x", "b": "rows of x", "c": "rows of y", "d": "rows of x"}


def test_users_without_history_are_a_slice_of_their_own(write_world, split_rows, tmp_path):
    n = 600
    labels = np.arange(n) % 3 == 0
    rows = {split: split_rows(split, labels, np.full(n, 0.3)) for split in ("train", "validation", "test")}
    history = [None if i % 4 == 0 else [] if i % 4 == 1 else ["i1"] for i in range(n)]
    rows["test"] = rows["test"].append_column("user_history", pa.array(history, pa.list_(pa.string())))
    world = write_world(tmp_path, "impressions", rows)
    config = EvaluationConfig(chunk_rows=250)
    test_rows = predict_test_rows(world.training_set, [], config)
    assert test_rows.has_history.tolist() == has_values(rows["test"]["user_history"]).tolist()
    slices = row_slices(
        test_rows, KnownIds.of(world.training_set), kind=world.training_set.kind, metric="log_loss", config=config
    )
    named = {part.name: len(part.index) for part in slices if part.dimension == "user"}
    assert named["users without history"] == named["users with history"] == n // 2


def test_config_refuses_a_primary_cutoff_that_is_not_measured():
    with pytest.raises(ValidationError, match=r"primary_cutoff=7: must be one of cutoffs \[5, 10\]"):
        EvaluationConfig(cutoffs=(5, 10), primary_cutoff=7)
