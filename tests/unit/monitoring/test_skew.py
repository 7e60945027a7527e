"""The skew check counts what differs, and nothing else."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import FeatureTables, FeatureTablesManifest
from evergreen.contracts.impressions import impression_schema
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.monitoring.skew import MAX_EXAMPLES, Comparison, SkewReport, check_skew, compare
from evergreen.serving.impression_sinks import ParquetSink

AT = datetime(2026, 3, 9, 12, 30, tzinfo=UTC)
FEATURES = (
    Feature(name="price", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ITEM),
    Feature(name="device", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.CONTEXT),
)
NAN, INF = float("nan"), float("inf")


def impressions(prices: list[float | None], *, at: datetime = AT, degraded: bool = False) -> pa.Table:
    n = len(prices)
    schema = impression_schema(FEATURES)
    columns: dict[str, list[Any]] = {
        "request_id": ["r1"] * n,
        "event_timestamp": [at] * n,
        "served_at": [AT] * n,
        "user_id": ["u1"] * n,
        "known_user": [True] * n,
        "model_version": ["m"] * n,
        "degraded": [degraded] * n,
        "sampling_rate": [1.0] * n,
        "item_id": [f"i{place}" for place in range(n)],
        "category": ["c"] * n,
        "position": list(range(1, n + 1)),
        "score": [0.5] * n,
        "features": [{"price": price, "device": "phone"} for price in prices],
    }
    return pa.table(columns, schema)


def offline(prices: dict[str, float | None]) -> Any:
    """A store that knows what items cost."""

    def join(spine: pa.Table) -> pa.Table:
        found = [prices.get(item) for item in spine["item_id"].to_pylist()]
        return spine.append_column("price", pa.array(found, pa.float64())).append_column(
            "item_category", spine["category"]
        )

    return join


@pytest.fixture
def tables(tmp_path: Path) -> FeatureTables:
    mapping = Mapping.model_validate(
        {
            "name": "shop",
            "kind": "impressions",
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i"},
            "label": {"column": "clicked"},
        }
    )
    manifest = FeatureTablesManifest(
        snapshot_id="s", mapping=mapping, as_of=AT, first_event=AT - timedelta(days=1), rows={}
    )
    return FeatureTables(tmp_path, manifest)


def skew_of(served: list[Any], known: list[Any], dtype: pa.DataType, tolerance: float = 0.0) -> Any:
    columns = (pa.chunked_array([pa.array(values, dtype)]) for values in (served, known))
    return compare(*columns, impressions([0.0] * len(served)), tolerance=tolerance)


@pytest.mark.parametrize(
    ("served", "known", "equal"),
    [
        (None, None, True),
        (NAN, NAN, True),
        (None, NAN, False),
        (0.0, None, False),
        (INF, INF, True),
        (INF, -INF, False),
        (INF, 1.0, False),
        (0.0, -0.0, True),
        (1.0, 1.0 + 2**-52, False),
    ],
)
def test_numbers_are_equal_only_when_they_are_the_same(served: float | None, known: float | None, equal: bool) -> None:
    found = skew_of([1.0, served], [1.0, known], pa.float64())
    assert (found.equal, found.differing) == ((2, 0) if equal else (1, 1))


def test_tolerance_is_included() -> None:
    found = skew_of([1.0, 1.0, None], [1.5, 1.75, None], pa.float64(), tolerance=0.5)
    assert (found.equal, found.differing, found.max_abs_difference) == (2, 1, 0.75)


def test_side_that_lacks_a_value_is_told_apart() -> None:
    found = skew_of([None, None, 3.0, 4.0], [1.0, None, None, 6.0], pa.float64())
    assert (found.rows, found.equal, found.differing, found.only_served, found.only_offline) == (4, 1, 3, 1, 1)
    assert found.max_abs_difference == 2.0
    assert [(e.item_id, e.served, e.offline) for e in found.examples] == [
        ("i0", None, 1.0),
        ("i2", 3.0, None),
        ("i3", 4.0, 6.0),
    ]


def test_text_is_compared_as_it_is() -> None:
    found = skew_of(["a", "a", None, ""], ["a", "A", None, None], pa.string())
    assert (found.equal, found.only_served, found.max_abs_difference) == (2, 1, None)


@pytest.mark.parametrize(
    ("served", "known", "equal"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["b", "a"], False),
        (["a"], ["a", "b"], False),
        ([], [], True),
        ([], None, False),
        (None, None, True),
        (["a", None], ["a", None], True),
        (["a", None], ["a", "b"], False),
    ],
)
def test_lists_are_compared_in_their_order(served: Any, known: Any, equal: bool) -> None:
    rows = skew_of([["x"], served, None, ["y", "z"]], [["x"], known, None, ["y", "z"]], pa.list_(pa.string()))
    assert rows.equal == (4 if equal else 3)
    assert [example.item_id for example in rows.examples] == ([] if equal else ["i1"])


def test_column_of_another_type_offline_is_compared_by_value() -> None:
    counts = pa.chunked_array([pa.array([1, None, 3], pa.int64())])
    found = compare(pa.chunked_array([pa.array([1.0, None, 4.0])]), counts, impressions([0.0] * 3), tolerance=0.0)
    assert (found.equal, found.differing) == (2, 1)


def test_report_adds_up_over_tables_and_keeps_few_examples() -> None:
    comparison = Comparison(offline({f"i{n}": 1.0 for n in range(9)}))
    for shift in (0.5, 0.25):
        comparison.add(impressions([1.0 + shift] * 4 + [1.0]))
    comparison.add(impressions([]))
    report = comparison.report({})
    price = report.features["price"]
    assert (report.rows, report.requests, report.first, report.last) == (10, 2, AT, AT)
    assert (price.rows, price.equal, price.differing, price.max_abs_difference) == (10, 2, 8, 0.5)
    assert len(price.examples) == MAX_EXAMPLES and price.share == 0.8
    assert report.differing == ("price",) and not report.is_clean
    assert report.features["category"].equal == 10


def test_category_that_the_server_knew_otherwise_is_skew() -> None:
    def join(spine: pa.Table) -> pa.Table:
        found = offline({"i0": 1.0})(spine)
        return found.set_column(found.column_names.index("item_category"), "item_category", pa.array(["moved"]))

    comparison = Comparison(join)
    comparison.add(impressions([1.0]))
    assert comparison.report({}).differing == ("category",)


def test_model_that_reads_ids_alone_still_has_a_category_to_compare() -> None:
    comparison = Comparison(offline({}))
    comparison.add(impressions([1.0, 2.0]).drop_columns(["features"]))
    assert list(comparison.report({}).features) == ["category"] and comparison.report({}).is_clean


def test_log_without_items_has_no_category_to_compare() -> None:
    rows = impressions([1.0])
    nobody = pa.nulls(1, pa.string())
    rows = rows.set_column(rows.column_names.index("item_id"), "item_id", nobody)
    comparison = Comparison(lambda spine: spine.append_column("price", pa.array([1.0])))
    comparison.add(rows)
    assert list(comparison.report({}).features) == ["price"] and comparison.report({}).is_clean


def test_log_is_compared_and_the_report_is_kept(tables: FeatureTables, tmp_path: Path) -> None:
    sink = ParquetSink(str(tmp_path / "log"))
    sink.write("a", impressions([1.0, 2.0, NAN]))
    sink.write("b", impressions([8.0], degraded=True))
    sink.write("c", impressions([8.0, 8.0], at=AT + timedelta(seconds=1)))
    out = tmp_path / "skew.json"
    report = check_skew(str(tmp_path / "log"), tables, out, join=offline({"i0": 1.0, "i1": 2.5}))
    assert report.rows == 3 and report.left_out == {"degraded": 1, "later than the feature tables": 2}
    assert report.not_compared == {"device": "the offline store has no such feature: the request brings it"}
    assert report.features["price"].differing == 2 and report.features["price"].only_served == 1
    assert json.loads(out.read_text())["features"]["price"]["examples"][1]["served"] == "nan"
    assert SkewReport.read(out) == report


def test_moment_of_the_stored_features_can_be_given(tables: FeatureTables, tmp_path: Path) -> None:
    asked: list[datetime] = []

    def join(spine: pa.Table) -> pa.Table:
        asked.extend(spine["event_timestamp"].to_pylist())
        times = pa.array([AT - timedelta(hours=2)] * spine.num_rows, pa.timestamp("us", tz="UTC"))
        for name in ("user_last_event_timestamp", "user_last_positive_timestamp", "user_first_seen"):
            spine = spine.append_column(name, times)
        for name in ("item_last_positive_timestamp", "item_first_seen"):
            spine = spine.append_column(name, times)
        for name in ("hour", "weekday"):
            spine = spine.append_column(name, pa.array(["wrong"] * spine.num_rows))
        for name in (
            "user_recency_seconds",
            "user_positive_recency_seconds",
            "user_age_seconds",
            "item_recency_seconds",
            "item_age_seconds",
        ):
            spine = spine.append_column(name, pa.array([0.0] * spine.num_rows))
        return spine.append_column("item_category", spine["category"])

    features = (
        Feature(name="hour", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ON_DEMAND),
        Feature(name="item_age_seconds", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.ON_DEMAND),
    )
    served = impressions([0.0])
    values = [{"hour": "12", "item_age_seconds": 7200.0}]
    table = pa.table([*served.columns[:-1], values], impression_schema(features))
    ParquetSink(str(tmp_path / "log")).write("a", table)
    before = AT - timedelta(hours=1)
    report = check_skew(str(tmp_path / "log"), tables, tmp_path / "skew.json", known_at=before, join=join)
    assert asked == [before] and report.is_clean, "stored features of then, hour and age of the request"


def test_nothing_to_compare_is_no_clean_report(tables: FeatureTables, tmp_path: Path) -> None:
    ParquetSink(str(tmp_path / "log")).write("a", impressions([1.0], degraded=True))
    with pytest.raises(ArtifactError, match=r"no impressions to compare \(left out: {'degraded': 1}\)"):
        check_skew(str(tmp_path / "log"), tables, tmp_path / "skew.json", join=offline({}))
    assert not (tmp_path / "skew.json").exists()


@pytest.mark.parametrize("tolerance", [-1.0, NAN, INF])
def test_tolerance_must_be_a_distance(tables: FeatureTables, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        check_skew(str(tmp_path), tables, tmp_path / "skew.json", tolerance=tolerance)
