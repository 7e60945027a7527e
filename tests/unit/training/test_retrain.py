"""Retraining: the way that validates best is kept, and a way that cannot be gone is told and stands in nobody's way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.training_set import (
    ROW_FIELDS,
    SPLITS,
    ColumnKind,
    Feature,
    FeatureOrigin,
    SplitInfo,
    TrainingSet,
    TrainingSetManifest,
)
from evergreen.models.package import ModelPackage
from evergreen.training import retrain as retraining
from evergreen.training.config import TrainingConfig
from evergreen.training.retrain import MIN_GAIN, Retrained, Way, retrain, rows_since
from evergreen.training.trainer import train_model

START = datetime(2025, 3, 3, tzinfo=UTC)
DAYS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
X = Feature(name="x", kind=ColumnKind.NUMERIC, origin=FeatureOrigin.CONTEXT)
ITEM = Feature(name="item_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ITEM)
CONFIG = TrainingConfig(model="logistic_regression", max_epochs=3, export_program=False)
_LABEL = {
    LogKind.IMPRESSIONS: '[label]\ncolumn = "click"',
    LogKind.RATINGS: '[rating]\ncolumn = "rating"\nminimum = -9\nmaximum = 9',
}

Slope = Callable[[np.ndarray], np.ndarray]


def day(number: float) -> datetime:
    return START + timedelta(days=number)


def steady(days: np.ndarray) -> np.ndarray:
    return np.full(len(days), 2.0)


def turned(days: np.ndarray) -> np.ndarray:
    """What was liked is disliked from day 6 on."""
    return np.where(days < 6, 2.0, -2.0)


def written(
    path: Path,
    slope: Slope,
    *,
    kind: LogKind = LogKind.IMPRESSIONS,
    train_rows: int = 2_000,
    features: tuple[Feature, ...] = (X, ITEM),
    until: float = 8.0,
    clicks: bool = True,
    seed: int = 0,
) -> TrainingSet:
    """Rows of ten days whose clicks follow `slope(day) * x` and the item; rows to train on end at the day `until`."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    appeal = np.random.default_rng(99).normal(size=30)
    info = {}
    for split, (first, last) in DAYS.items():
        n = train_rows if split == "train" else 800
        days = np.linspace(first, min(last, until) if split == "train" else last, n, endpoint=False)
        x, item = rng.normal(size=n), rng.integers(0, len(appeal), n)
        logit = slope(days) * x + appeal[item] - 1
        if kind is LogKind.RATINGS:
            label = logit + rng.normal(size=n)
        else:
            label = ((rng.random(n) < 1 / (1 + np.exp(-logit))) & (clicks or split != "train")).astype(float)
        columns = {
            "row_id": np.arange(n),
            "event_timestamp": [day(moment) for moment in days],
            "item_id": [f"i{number}" for number in item],
            "label": label,
        }
        rows = {
            f.name: pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in ROW_FIELDS
        }
        pq.write_table(pa.table(rows | {"x": x}), path / f"{split}.parquet")
        positives = n if kind is LogKind.RATINGS else int(label.sum())
        info[split] = SplitInfo(
            start=day(first), end=day(last), rows=n, positives=positives, label_mean=float(label.mean())
        )
    TrainingSetManifest(
        snapshot_id="5" * 64,
        mapping=Mapping.load(
            f'name = "by_hand"\nkind = "{kind}"\n[timestamp]\ncolumn = "t"\n'
            f'[columns]\nuser_id = "u"\nitem_id = "i"\n{_LABEL[kind]}'
        ),
        as_of=day(10),
        feature_service="ranker_v1",
        embargo_seconds=0,
        splits=info,
        features=features,
        dropped_features={},
        left_out={},
    ).write(path / TrainingSet.MANIFEST)
    return TrainingSet.load(path)


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return written(tmp_path_factory.mktemp("stable") / "rows", steady)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return written(tmp_path_factory.mktemp("changed") / "rows", turned)


@pytest.fixture(scope="module")
def incumbent(stable: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    """Of the world before the change."""
    return train_model(stable, tmp_path_factory.mktemp("incumbent") / "model", config=CONFIG)


def values(trained: Retrained) -> dict[Way, float]:
    return {c.way: c.value for c in trained.candidates if c.value is not None}


def test_first_model_is_trained_from_scratch(stable: TrainingSet, tmp_path: Path) -> None:
    trained = retrain(stable, tmp_path / "model", config=CONFIG)
    assert [candidate.way for candidate in trained.candidates] == [Way.SCRATCH]
    assert trained.way is Way.SCRATCH and trained.package.path == tmp_path / "model"
    assert trained.candidates[0].train_rows == trained.package.info.train_rows == 2_000
    same = train_model(stable, tmp_path / "same", config=CONFIG)
    assert trained.package.digest == same.digest, "it is the model that a plain training gives"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "same"}, "candidates leave nothing behind"


def test_after_a_change_the_model_of_the_rows_since_is_kept(
    changed: TrainingSet, incumbent: ModelPackage, tmp_path: Path
) -> None:
    trained = retrain(changed, tmp_path / "model", config=CONFIG, incumbent=incumbent, changed_at=day(6))
    rows = {candidate.way: candidate.train_rows for candidate in trained.candidates}
    assert rows == {Way.SCRATCH: 2_000, Way.SINCE_CHANGE: 500, Way.WARM_START: 500}
    found = values(trained)
    assert found[Way.SINCE_CHANGE] < 0.95 < found[Way.SCRATCH], "most of the older rows teach the opposite"
    assert trained.way is min(found, key=found.__getitem__) is not Way.SCRATCH
    assert trained.package.metrics["validation_normalized_entropy"] == found[trained.way]
    assert trained.package.info.train_rows == 500


def test_other_way_must_be_better_by_more_than_the_least_gain(
    stable: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change all rows are the other way: what the old world taught must prove itself."""
    chosen = {}
    gain = 0.0
    for name in ("as it is", "just below", "just above"):
        if name != "as it is":
            monkeypatch.setattr(retraining, "MIN_GAIN", gain - 1e-6 if name == "just below" else gain + 1e-6)
        trained = retrain(stable, tmp_path / name, config=CONFIG, changed_at=day(7.5))
        chosen[name] = trained.way
        gain = 1 - values(trained)[Way.SCRATCH] / values(trained)[Way.SINCE_CHANGE]
    assert gain > MIN_GAIN
    assert chosen == {"as it is": Way.SCRATCH, "just below": Way.SCRATCH, "just above": Way.SINCE_CHANGE}


def test_what_has_learned_from_the_new_world_is_gone_on_from(
    changed: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ways are as good as each other on what was shown, which is what the incumbent chose."""
    monkeypatch.setattr(retraining, "MIN_GAIN", 0.9)
    new = train_model(changed, tmp_path / "incumbent", config=CONFIG)
    old = replace(new, info=new.info.model_copy(update={"as_of": day(5)}))
    chosen = {}
    for name, incumbent in (("of the old world", old), ("of the new world", new)):
        trained = retrain(changed, tmp_path / name, config=CONFIG, incumbent=incumbent, changed_at=day(6))
        chosen[name] = trained.way
    assert chosen == {"of the old world": Way.SINCE_CHANGE, "of the new world": Way.WARM_START}


def test_in_a_world_that_did_not_change_all_rows_are_worth_more_than_the_newest(
    stable: TrainingSet, tmp_path: Path
) -> None:
    trained = retrain(stable, tmp_path / "model", config=CONFIG, changed_at=day(7.5))
    assert [candidate.way for candidate in trained.candidates] == [Way.SCRATCH, Way.SINCE_CHANGE]
    assert trained.way is Way.SCRATCH and trained.package.info.train_rows == 2_000


def test_few_new_rows_are_learned_best_by_what_serves(incumbent: ModelPackage, tmp_path: Path) -> None:
    few = written(tmp_path / "rows", steady, train_rows=60, seed=1)
    trained = retrain(few, tmp_path / "model", config=CONFIG, incumbent=incumbent)
    assert [candidate.train_rows for candidate in trained.candidates] == [60, 60]
    assert trained.way is Way.WARM_START
    assert values(trained)[Way.WARM_START] < 0.9 * values(trained)[Way.SCRATCH]


@pytest.mark.parametrize("moment", [day(-3), day(0), day(8), day(9.5)])
def test_change_outside_the_rows_to_learn_from_is_no_way(stable: TrainingSet, tmp_path: Path, moment: datetime) -> None:
    trained = retrain(stable, tmp_path / "model", config=CONFIG, changed_at=moment)
    assert [candidate.way for candidate in trained.candidates] == [Way.SCRATCH]


def test_model_of_another_name_is_no_start(stable: TrainingSet, incumbent: ModelPackage, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model": "popularity"})
    trained = retrain(stable, tmp_path / "model", config=config, incumbent=incumbent)
    assert [candidate.way for candidate in trained.candidates] == [Way.SCRATCH]
    assert trained.package.info.name == "popularity"


def test_model_that_reads_other_features_is_passed_over_with_the_reason(
    incumbent: ModelPackage, tmp_path: Path
) -> None:
    rows = written(tmp_path / "rows", steady, features=(ITEM,))
    trained = retrain(rows, tmp_path / "model", config=CONFIG, incumbent=incumbent)
    scratch, warm = trained.candidates
    assert trained.way is scratch.way is Way.SCRATCH
    assert warm.way is Way.WARM_START and warm.value is None and "feature" in warm.reason


def test_model_of_other_settings_is_passed_over_with_the_reason(
    stable: TrainingSet, incumbent: ModelPackage, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"encoder": CONFIG.encoder.model_copy(update={"oov_buckets": 7})})
    trained = retrain(stable, tmp_path / "model", config=config, incumbent=incumbent)
    assert trained.way is Way.SCRATCH
    assert "encodes its features otherwise" in trained.candidates[1].reason


def test_change_since_which_nothing_was_seen_stops_no_training(incumbent: ModelPackage, tmp_path: Path) -> None:
    """What was broken is left out, so there may be no row between the change and the validation split."""
    rows = written(tmp_path / "rows", steady, until=6.0)
    trained = retrain(rows, tmp_path / "model", config=CONFIG, incumbent=incumbent, changed_at=day(7))
    scratch, since, warm = trained.candidates
    assert (scratch.train_rows, since.train_rows, warm.train_rows) == (2_000, 0, 2_000)
    assert since.value is None and "no training row from 2025-03-10" in since.reason
    assert scratch.value is not None and warm.value is not None


def test_where_nothing_can_be_trained_the_reason_is_told_and_nothing_is_left(
    incumbent: ModelPackage, tmp_path: Path
) -> None:
    rows = written(tmp_path / "rows", steady, clicks=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "of before").touch()
    with pytest.raises(TrainingError, match=r"train split has 2000 rows and all have label 0; .* take a longer log"):
        retrain(rows, tmp_path / "model", config=CONFIG, incumbent=incumbent, changed_at=day(6))
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows", "model"}
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["of before"]


def test_rows_since_a_moment_are_counted_anew_and_other_splits_stay(stable: TrainingSet, tmp_path: Path) -> None:
    newest = rows_since(stable, day(6), tmp_path / "newest")
    rows, before = newest.read("train"), stable.read("train")
    assert rows.equals(before.filter(pc.greater_equal(before["event_timestamp"], day(6))))
    info = newest.manifest.splits["train"]
    assert (info.start, info.end) == (day(6), day(8)) and info.rows == rows.num_rows == 500
    assert info.positives == pc.sum(rows["label"]).as_py() > 0
    assert info.label_mean == pytest.approx(info.positives / info.rows)
    for split in SPLITS[1:]:
        assert newest.read(split).equals(stable.read(split))
        assert newest.manifest.splits[split] == stable.manifest.splits[split]
    assert newest.manifest.features == stable.manifest.features
    with pytest.raises(ArtifactError, match="no training row from 2025-03-11"):
        rows_since(stable, day(8), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_rows_since_reach_another_file_system(stable: TrainingSet, tmp_path: Path) -> None:
    """On a cluster a step's output may lie on another volume than its input."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == stable.path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    out = elsewhere / f"evergreen-{tmp_path.name}-{id(tmp_path)}"
    try:
        assert rows_since(stable, day(6), out).read("test").equals(stable.read("test"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_ratings_are_compared_by_their_error(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows", turned, kind=LogKind.RATINGS)
    trained = retrain(rows, tmp_path / "model", config=CONFIG, changed_at=day(6))
    assert trained.way is Way.SINCE_CHANGE
    assert values(trained)[Way.SINCE_CHANGE] == trained.package.metrics["validation_rmse"]
    newest = rows_since(rows, day(6), tmp_path / "newest").manifest.splits["train"]
    assert newest.positives == newest.rows == 500
