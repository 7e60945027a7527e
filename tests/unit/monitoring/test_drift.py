"""The drift report finds what was planted and nothing else, on real Evidently."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import (
    ROW_FIELDS,
    ColumnKind,
    Feature,
    FeatureOrigin,
    SplitInfo,
    TrainingSet,
    TrainingSetManifest,
)
from evergreen.monitoring.drift import drift_report, sample_split

START = datetime(2024, 1, 1, tzinfo=UTC)
FEATURES = {
    "user_id": ColumnKind.CATEGORICAL,
    "steady": ColumnKind.NUMERIC,
    "shifted": ColumnKind.NUMERIC,
    "mostly_missing": ColumnKind.NUMERIC,
    "constant": ColumnKind.NUMERIC,
    "device": ColumnKind.CATEGORICAL,
    "country": ColumnKind.CATEGORICAL,
    "campaign": ColumnKind.CATEGORICAL,
    "user_history": ColumnKind.SEQUENCE,
}


def rows(split: str, n: int) -> pa.Table:
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    is_test = split == "test"
    day = {"train": 0, "validation": 10, "test": 20}[split]
    known = {
        "row_id": np.arange(n),
        "event_timestamp": pa.array(
            [START + timedelta(days=day, seconds=i) for i in range(n)], pa.timestamp("us", tz="UTC")
        ),
        "user_id": [f"u{i}" for i in range(n)],
        "label": pa.array(rng.random(n) < (0.4 if is_test else 0.1), pa.float32()),
        "steady": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.2),
        "shifted": rng.normal(size=n) + (0.5 if is_test else 0),
        "mostly_missing": pa.array(rng.normal(size=n), mask=np.arange(n) > 20),
        "constant": np.ones(n),
        "device": rng.choice(["phone", "desk"], n),
        "country": pa.array(
            rng.choice(["br", "de"], n, p=[0.8, 0.2] if is_test else [0.2, 0.8]), mask=np.arange(n) % 9 == 0
        ),
        "campaign": [f"c{i}" for i in rng.integers(0, 300, n)],
        "user_history": pa.array([["i1"]] * n, pa.list_(pa.string())),
    }
    fields = {f.name: pa.nulls(n, f.type) for f in ROW_FIELDS}
    return pa.table({**fields, **known})


def write(path, kind: str = "impressions", num_rows: int = 2_000) -> TrainingSet:
    path.mkdir(parents=True, exist_ok=True)
    label = {"impressions": '[label]\ncolumn = "click"', "interactions": ""}[kind]
    mapping = Mapping.load(
        f'name = "drifting"\nkind = "{kind}"\n[timestamp]\ncolumn = "t"\n'
        f'[columns]\nuser_id = "u"\nitem_id = "i"\n{label}'
    )
    splits = {}
    for split, day in {"train": 0, "validation": 10, "test": 20}.items():
        table = rows(split, num_rows)
        pq.write_table(table, path / f"{split}.parquet")
        bounds = {"start": START + timedelta(days=day), "end": START + timedelta(days=day + 10)}
        splits[split] = SplitInfo(**bounds, rows=num_rows, positives=0, label_mean=0)
    features = tuple(Feature(name=n, kind=k, origin=FeatureOrigin.CONTEXT) for n, k in FEATURES.items())
    TrainingSetManifest(
        snapshot_id="0" * 64,
        mapping=mapping,
        as_of=START + timedelta(days=30),
        feature_service="ranker_v1",
        embargo_seconds=0,
        splits=splits,
        features=features,
        dropped_features={},
        left_out={},
    ).write(path / TrainingSet.MANIFEST)
    return TrainingSet.load(path)


@pytest.fixture(scope="module")
def training_set(tmp_path_factory) -> TrainingSet:
    return write(tmp_path_factory.mktemp("drift") / "training_set")


@pytest.fixture(scope="module")
def report(training_set, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "drift.html"
    return drift_report(training_set, page, sample_rows=1_500), page


def test_planted_drift_is_found_and_nothing_else(report):
    summary, _ = report
    assert set(summary.drifted) == {"shifted", "country"}
    assert summary.num_drifted == 2
    assert set(summary.columns) == {"steady", "shifted", "device", "country"}
    assert summary.columns["shifted"].distance == pytest.approx(0.5, abs=0.1)  # in standard deviations
    assert (summary.reference_rows, summary.current_rows) == (1_500, 1_500)


def test_label_drift_is_told_apart_from_data_drift(report):
    summary, _ = report
    assert summary.label.drifted
    assert "label" not in summary.columns


def test_columns_that_cannot_be_compared_are_left_out_with_a_reason(report):
    reasons = report[0].left_out
    assert reasons["user_id"] == "an id"
    assert reasons["user_history"] == "a sequence column"
    assert "known values" in reasons["mostly_missing"]
    assert reasons["constant"] == "one value in both samples"
    assert "categories in the samples, which are large enough for 15" in reasons["campaign"]
    assert report[0].columns.keys() | reasons.keys() == FEATURES.keys()


def test_the_page_is_small_enough_to_open_and_names_the_columns(report):
    _, page = report
    assert page.stat().st_size < 10_000_000
    assert "shifted" in page.read_text()


def test_drawn_labels_of_interactions_are_not_compared(tmp_path):
    summary = drift_report(write(tmp_path / "set", "interactions"), tmp_path / "d.html", sample_rows=500)
    assert summary.label is None


def test_samples_are_drawn_by_seed_and_stay_in_time_order(training_set):
    one, again, other = (
        sample_split(training_set, "train", ["shifted", "row_id"], sample_rows=100, seed=seed) for seed in (1, 1, 2)
    )
    assert one.equals(again) and not one.equals(other)
    ids = one["row_id"].to_pylist()
    assert ids == sorted(set(ids)) and len(ids) == 100


def test_a_small_split_is_taken_whole(training_set):
    assert sample_split(training_set, "test", ["row_id"], sample_rows=10_000, seed=0).num_rows == 2_000


def test_an_empty_split_is_an_error(tmp_path):
    training_set = write(tmp_path / "set")
    pq.write_table(training_set.read("test").slice(0, 0), training_set.file("test"))
    with pytest.raises(ArtifactError, match="the test split has no rows"):
        drift_report(training_set, tmp_path / "d.html")


def test_splits_too_small_to_compare_give_a_page_that_says_so(tmp_path):
    summary = drift_report(write(tmp_path / "set", num_rows=30), tmp_path / "d.html")
    assert summary.num_columns == summary.num_drifted == 0
    assert summary.left_out["shifted"].endswith("at least 100 are needed")
    page = (tmp_path / "d.html").read_text()
    assert "30 training rows and 30 test rows are too few" in page
    assert "shifted" in page
