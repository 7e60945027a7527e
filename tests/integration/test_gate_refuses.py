"""A challenger that has learned the future, against what a real server had: the gate with the real log of serving."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.gate import GateReport
from evergreen.contracts.impressions import read_impressions
from evergreen.contracts.training_set import SPLITS, ColumnKind, Feature, FeatureOrigin, TrainingSet
from evergreen.evaluation.gate import GateConfig, gate_challenger
from evergreen.evaluation.served import NOT_LOGGED, is_skewed
from evergreen.features.point_in_time import join_features
from evergreen.models.package import ModelPackage
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import train_model
from tests.pages import ask_again
from tests.small_world import SmallWorld

CONFIG = GateConfig(latency_budget_ms=10_000, min_positives=20)  # other tests run beside
MODEL = TrainingConfig(model="logistic_regression", max_epochs=2, export_program=False)
FILLED_IN = Feature(name="session_value", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.CONTEXT)


@pytest.fixture(scope="module")
def served(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pages of the test rows, answered by the incumbent with the features of the midnight before."""
    return ask_again(small_world, small_world.package("logistic_regression"), tmp_path_factory.mktemp("served"))


def gate(small_world: SmallWorld, rows: TrainingSet, challenger: ModelPackage, log: str | None) -> GateReport:
    """The gate on a challenger that learned from these rows; what serves is an honest model."""
    served = read_impressions(log) if log is not None else None
    incumbent = small_world.package("logistic_regression")
    return gate_challenger(rows, challenger, incumbent, config=CONFIG, served=served)


def changed(small_world: SmallWorld, out: Path, change: Callable[[pa.Table], pa.Table], *new: Feature) -> TrainingSet:
    """The training set with a mistake in all of its splits, as mistakes in features are."""
    honest = small_world.training_set
    shutil.copytree(honest.path, out)
    for split in SPLITS:
        pq.write_table(change(pq.read_table(honest.file(split))), out / f"{split}.parquet")
    features = (*honest.manifest.features, *new)
    honest.manifest.model_copy(update={"features": features}).write(out / TrainingSet.MANIFEST)
    return TrainingSet.load(out)


def test_column_that_is_filled_in_after_the_click_is_refused(
    small_world: SmallWorld, served: str, tmp_path: Path
) -> None:
    def fill_in(table: pa.Table) -> pa.Table:
        value = table["label"].to_numpy() * np.random.default_rng(1).gamma(2.0, 10.0, table.num_rows)
        return table.append_column(FILLED_IN.name, pa.array(value, pa.float64()))

    rows = changed(small_world, tmp_path / "rows", fill_in, FILLED_IN)
    challenger = train_model(rows, tmp_path / "model", config=MODEL)
    assert gate(small_world, rows, challenger, None).passed, "its own test rows have it, too"
    report = gate(small_world, rows, challenger, served)
    assert not report.passed and report.reason.startswith("leans on session_value, which no server has logged")


def test_features_that_are_joined_by_date_are_refused(small_world: SmallWorld, served: str, tmp_path: Path) -> None:
    """Each row has the activity of its whole day, its own click included."""

    def join_by_date(table: pa.Table) -> pa.Table:
        midnight = pc.ceil_temporal(table["event_timestamp"], unit="day", ceil_is_strictly_greater=True)
        spine = pa.table(
            [midnight, table["user_id"], table["item_id"], table["item_category"]],
            ["event_timestamp", "user_id", "item_id", "category"],
        )
        later = join_features(spine, small_world.tables, only=("user_activity", "user_category_activity"))
        for name in (name for name in later.column_names if "_positives_" in name and name in table.column_names):
            if not name.startswith("item_"):
                place = table.column_names.index(name)
                table = table.set_column(place, name, later[name].cast(table.schema.field(name).type))
        return table

    rows = changed(small_world, tmp_path / "rows", join_by_date)
    challenger = train_model(rows, tmp_path / "model", config=MODEL)
    assert gate(small_world, rows, challenger, None).passed, "its own test rows have it, too"
    report = gate(small_world, rows, challenger, served)
    assert not report.passed and report.reason.startswith("training-serving skew")
    assert report.served is not None and any("positives" in name for name in report.served.skew_by_feature)


def test_honest_challenger_is_served_what_it_was_trained_on(small_world: SmallWorld, served: str) -> None:
    """But for what happened since midnight, which costs it next to nothing."""
    report = gate(small_world, small_world.training_set, small_world.package("popularity"), served)
    assert report.served is not None and report.served.never_served == () and "skew" not in report.reason
    assert report.served.skew.value != 0.0 and not is_skewed(report.served, CONFIG)
    assert report.served.left_out.keys() == {NOT_LOGGED}, "items that were new on that day"
    assert report.served.rows > 0.9 * report.rows
