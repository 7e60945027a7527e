"""The gate on the same test rows twice: with features as trained, and as the log of what was served has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.evaluation import Verdict
from evergreen.contracts.impressions import ITEM_FIELDS, REQUEST_FIELDS, impression_schema, impression_table
from evergreen.contracts.training_set import SPLITS, Feature, TrainingSet
from evergreen.evaluation.gate import GateConfig, gate_challenger
from evergreen.evaluation.served import DEGRADED, NOT_LOGGED, OLDER, find_served

CONFIG = GateConfig(latency_budget_ms=1000)  # other tests run beside


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, clicks: Any) -> Any:
    """The clicks as pages of two items."""
    return in_pages(tmp_path_factory.mktemp("shown"), clicks)


def in_pages(path: Path, world: Any) -> Any:
    for split in SPLITS:
        table = pq.read_table(world.training_set.file(split)).drop_columns(["request_id", "item_id"])
        pages = pa.array([f"{split}-{n // 2}" for n in range(table.num_rows)])
        items = pa.array([f"i{n % 2}" for n in range(table.num_rows)])
        table = table.append_column("request_id", pages).append_column("item_id", items)
        pq.write_table(table, path / f"{split}.parquet")
    world.training_set.manifest.write(path / TrainingSet.MANIFEST)
    return replace(world, training_set=TrainingSet.load(path))


def log_of(
    world: Any,
    x: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    *,
    features: tuple[Feature, ...] | None = None,
    degraded: bool = False,
    rows: slice = slice(None),
) -> pa.Table:
    """What a server logged of the test rows: their feature is a function of what it was trained as."""
    test = world.training_set.read("test")
    test = test.take(pa.array(np.arange(test.num_rows)[rows]))
    num_rows = test.num_rows
    fields = {field.name: field for field in (*REQUEST_FIELDS, *ITEM_FIELDS)}
    constant = {
        "known_user": True,
        "model_version": "old",
        "degraded": degraded,
        "sampling_rate": 1.0,
        "category": "c",
        "position": 1,
        "score": 0.1,
    }
    columns = {name: pa.array([value] * num_rows, fields[name].type) for name, value in constant.items()}
    columns |= {name: test[name].combine_chunks() for name in ("request_id", "event_timestamp", "user_id", "item_id")}
    columns["served_at"] = columns["event_timestamp"]
    schema = impression_schema(world.training_set.manifest.features if features is None else features)
    return impression_table(columns, {"x": pa.array(x(test["x"].to_numpy()))}, schema)


def truth(table: pa.Table) -> np.ndarray:
    return table["x"].fill_null(0.118).to_numpy()


def blurred(table: pa.Table) -> np.ndarray:
    return 0.5 * truth(table) + 0.5 * 0.118


def stale(x: np.ndarray) -> np.ndarray:
    """The feature as a store knows it that is behind: of somebody else."""
    return np.roll(x, 1)


def behind(x: np.ndarray) -> np.ndarray:
    """A little."""
    return x * np.where(np.arange(len(x)) % 10 == 0, 0.5, 1.0)


def gate(world: Any, challenger: Any, incumbent: Any, *log: pa.Table, **changes: Any) -> Any:
    scorers = [world.scorer("deepfm", formula) if formula else None for formula in (challenger, incumbent)]
    return gate_challenger(world.training_set, *scorers, config=CONFIG.model_copy(update=changes), served=iter(log))


def base_rate(table: pa.Table) -> np.ndarray:
    return np.full(table.num_rows, 0.118)


def test_challenger_that_holds_as_served_passes(shown: Any) -> None:
    report = gate(shown, truth, blurred, log_of(shown))
    assert report.passed and report.served.verdict is Verdict.BETTER
    assert (report.served.rows, report.served.left_out, report.served.never_served) == (4_000, {}, ())
    assert report.served.skew.value == report.served.incumbent_skew.value == 0.0
    assert report.served.difference == report.difference


def test_feature_that_knows_the_future_is_found_where_the_server_does_not_have_it(shown: Any) -> None:
    alone = gate_challenger(
        shown.training_set, shown.scorer("deepfm", truth), shown.scorer("deepfm", base_rate), config=CONFIG
    )
    assert alone.passed and alone.served is None
    report = gate(shown, truth, base_rate, log_of(shown, stale))
    assert not report.passed and report.reason.startswith("training-serving skew: ")
    assert list(report.served.skew_by_feature) == ["x"] and "most by x (" in report.reason
    assert report.served.skew_difference.low > 0 and report.served.incumbent_skew.value == 0.0


def test_store_that_is_behind_for_both_is_no_fault_of_the_challenger(shown: Any) -> None:
    report = gate(shown, truth, lambda table: truth(table) ** 1.3, log_of(shown, behind), must_beat=False)
    assert report.served.skew.low > 0 and report.served.incumbent_skew.low > 0
    assert report.passed


def test_challenger_that_is_better_by_more_than_it_loses_passes(shown: Any) -> None:
    """What knows nothing loses nothing."""
    report = gate(shown, truth, base_rate, log_of(shown, behind), max_skew=0.0)
    assert report.served.skew_difference.low > 0 and report.served.incumbent_skew.value == 0.0
    assert report.passed


def test_feature_that_no_server_has_logged_counts_as_unknown(shown: Any) -> None:
    log = log_of(shown, features=())
    report = gate(shown, truth, base_rate, log)
    assert not report.passed and report.served.never_served == ("x",)
    assert (
        report.reason.startswith("leans on x, which no server has logged") and report.served.never_served_gain.low > 0
    )
    assert gate(shown, truth, base_rate, log, trusted_features=("x",)).passed


def test_challenger_that_is_no_better_as_served_does_not_pass(shown: Any) -> None:
    """Both lose as much, so nothing is skewed; but what made the challenger better is not there when it serves."""

    def one(table: pa.Table) -> np.ndarray:
        return 0.9 * truth(table) + 0.1 * 0.118

    report = gate(shown, truth, one, log_of(shown, lambda x: np.full(len(x), 0.118)), max_skew=1.0)
    assert not report.passed and report.reason.startswith("with features as served, normalized_entropy differs by")


def test_challenger_that_is_not_calibrated_as_served_does_not_pass(shown: Any) -> None:
    report = gate(shown, truth, base_rate, log_of(shown, lambda x: np.minimum(2 * x, 0.99)), max_skew=1.0)
    assert not report.passed and report.reason.startswith("with features as served, it predicts 1.")


def test_log_that_says_too_little_lets_nothing_pass(shown: Any) -> None:
    report = gate(shown, truth, blurred, log_of(shown, rows=slice(0, 300)))
    assert not report.passed and "positive test rows are in the log of what was served, 100 needed" in report.reason
    assert report.served.difference.value is None and report.served.left_out == {NOT_LOGGED: 3_700}


def test_first_model_is_held_against_its_own_training(shown: Any) -> None:
    assert gate(shown, truth, None, log_of(shown)).passed
    report = gate(shown, truth, None, log_of(shown, stale))
    assert not report.passed and "training-serving skew" in report.reason


def test_ratings_are_compared_by_their_error(tmp_path: Path, ratings: Any) -> None:
    def mean(table: pa.Table) -> np.ndarray:
        return np.full(table.num_rows, 3.2)

    def rating(table: pa.Table) -> np.ndarray:
        return table["x"].fill_null(3.2).to_numpy()

    world = in_pages(tmp_path, ratings)
    assert gate(world, rating, mean, log_of(world)).passed
    report = gate(world, rating, mean, log_of(world, stale))
    assert not report.passed and "its rmse rises by" in report.reason and report.served.click_rate_ratio is None


def test_rows_are_found_by_request_and_item(shown: Any) -> None:
    keys = shown.training_set.read("test", ["event_timestamp", "request_id", "user_id", "item_id", "label"])
    twice = log_of(shown, lambda x: x + 1, rows=slice(0, 20))
    parts = [
        log_of(shown, rows=slice(10, 30)),
        twice,
        log_of(shown, degraded=True, rows=slice(25, 40)),
    ]
    found = find_served(shown.training_set, parts, keys, CONFIG)
    assert found.places.tolist() == list(range(30))
    assert found.left_out == {NOT_LOGGED: 3_960, DEGRADED: 10}
    trained = shown.training_set.read("test", ["x"])["x"].to_numpy()[:30]
    assert found.table["x"].to_numpy().tolist() == [*(trained[:10] + 1), *trained[10:]]
    newest = find_served(shown.training_set, parts, keys, CONFIG.model_copy(update={"max_served_rows": 5}))
    assert newest.places.tolist() == list(range(25, 30)) and newest.left_out[OLDER] == 25


def test_log_of_another_time_is_not_looked_at(shown: Any) -> None:
    log = log_of(shown)
    moved = pa.array([t + timedelta(days=30) for t in log["event_timestamp"].to_pylist()], log["event_timestamp"].type)
    log = log.set_column(log.column_names.index("event_timestamp"), "event_timestamp", moved)
    keys = shown.training_set.read("test", ["event_timestamp", "request_id", "user_id", "item_id", "label"])
    assert len(find_served(shown.training_set, [log], keys, CONFIG).places) == 0
