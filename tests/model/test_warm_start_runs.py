"""Incremental retraining: a run starts where the champion is, and goes on from there on newer rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.training_set import ColumnKind, TrainingSet
from evergreen.models.encoding import EncoderConfig
from evergreen.models.package import ModelPackage
from evergreen.training.trainer import TrainingConfig, train_model

KINDS = {"user_id": ColumnKind.CATEGORICAL, "item_id": ColumnKind.CATEGORICAL, "price": ColumnKind.NUMERIC}
FAST = {"max_epochs": 2, "export_program": False, "learning_rate": 0.01}
SMALL = {"embedding_dim": 4}
HASHED = EncoderConfig(min_count=5, oov_buckets=8, num_hashes=2)


def log(items: range, seed: int, num_rows: int = 4000) -> tuple[dict[str, object], np.ndarray]:
    """Every item has a click rate of its own, which its number decides."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(30, size=num_rows), rng.choice(np.array(items), size=num_rows)
    price = rng.normal(size=num_rows)
    p = 1 / (1 + np.exp(1.5 - 2.0 * np.where(item % 2 == 0, 1, -1) - 0.5 * price))
    columns = {"user_id": [f"u{i}" for i in user], "item_id": [f"i{i}" for i in item], "price": price}
    return columns, (rng.random(num_rows) < p).astype(np.float32)


@pytest.fixture
def older(make_training_set) -> TrainingSet:
    return make_training_set(*log(range(20), seed=0), KINDS, name="older")


@pytest.fixture
def newer(make_training_set) -> TrainingSet:
    """Half of the items came after the older log."""
    return make_training_set(*log(range(10, 30), seed=1), KINDS, name="newer")


def loss_on(package: ModelPackage, training_set: TrainingSet, split: str) -> float:
    rows = training_set.read(split)
    scores = package.scores(rows).astype(np.float64)
    return float(log_loss(rows["label"].to_numpy(), 1 / (1 + np.exp(-scores))))


@pytest.mark.parametrize("model", ["logistic_regression", "deepfm"])
@pytest.mark.parametrize("encoder", [EncoderConfig(), HASHED], ids=["own rows", "hashed"])
def test_first_point_of_the_curve_is_the_champion_on_the_new_rows(
    model: str, encoder: EncoderConfig, older: TrainingSet, newer: TrainingSet, tmp_path: Path
) -> None:
    config = TrainingConfig(model=model, encoder=encoder, **FAST)
    champion = train_model(older, tmp_path / "champion", config=config)
    package = train_model(newer, tmp_path / "package", config=config, warm_start=champion)
    start = package.metrics["curve"][0]["validation_loss"]
    assert start == pytest.approx(loss_on(champion, newer, "validation"), rel=1e-5)


def test_thinned_run_starts_where_the_champion_is_as_well(
    older: TrainingSet, newer: TrainingSet, tmp_path: Path
) -> None:
    champion = train_model(older, tmp_path / "champion", config=TrainingConfig(**FAST))
    config = TrainingConfig(negative_rate=0.2, **FAST)
    package = train_model(newer, tmp_path / "package", config=config, warm_start=champion)
    start = package.metrics["curve"][0]["validation_loss"]
    assert start == pytest.approx(loss_on(champion, newer, "validation"), rel=1e-5)
    assert package.predict(newer.read("test")).mean() == pytest.approx(
        newer.read("test")["label"].to_numpy().mean(), rel=0.1
    )


def test_new_items_are_learned_and_old_ones_kept(older: TrainingSet, newer: TrainingSet, tmp_path: Path) -> None:
    champion = train_model(older, tmp_path / "champion", config=TrainingConfig(**FAST))
    package = train_model(newer, tmp_path / "package", config=TrainingConfig(**FAST), warm_start=champion)
    rows = newer.read("test")
    items = np.array([int(name[1:]) for name in rows["item_id"].to_pylist()])
    label = rows["label"].to_numpy()

    def auc(scored: ModelPackage, chosen: np.ndarray) -> float:
        return float(roc_auc_score(label[chosen], scored.scores(rows)[chosen]))

    assert auc(champion, items >= 20) < 0.75  # price alone
    assert auc(package, items >= 20) > 0.83
    assert auc(package, items < 20) > 0.83
    # Items that the newer rows lack are not forgotten.
    old_rows = older.read("test")
    gone = np.array([int(name[1:]) < 10 for name in old_rows["item_id"].to_pylist()])
    scores = package.scores(old_rows)[gone]
    assert roc_auc_score(old_rows["label"].to_numpy()[gone], scores) > 0.8


def test_champion_is_kept_when_no_step_beats_it(
    older: TrainingSet, newer: TrainingSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion = train_model(older, tmp_path / "champion", config=TrainingConfig(**FAST))
    worse = TrainingConfig(**FAST | {"learning_rate": 0.3, "embedding_learning_rate": 1.0})
    package = train_model(older, tmp_path / "package", config=worse, warm_start=champion)
    assert package.metrics["best_step"] == 0
    assert "the weights to start from are kept" in caplog.text
    rows = older.read("test")
    np.testing.assert_allclose(package.scores(rows), champion.scores(rows), atol=1e-5)


def test_warm_run_gives_equal_bytes_twice_and_a_checkpoint_of_a_cold_one_is_refused(
    older: TrainingSet, newer: TrainingSet, tmp_path: Path
) -> None:
    config = TrainingConfig(model="logistic_regression", **FAST)
    champion = train_model(older, tmp_path / "champion", config=config)
    packages = [train_model(newer, tmp_path / name, config=config, warm_start=champion) for name in "ab"]
    assert packages[0].digest == packages[1].digest

    checkpoint = tmp_path / "run.ckpt"
    with pytest.MonkeyPatch.context() as patch:  # a run that ends before it tidies up
        patch.setattr("evergreen.training.checkpoint.Checkpoint.remove", lambda self: None)
        train_model(newer, tmp_path / "cold", config=config, checkpoint=checkpoint, checkpoint_seconds=0.0)
    with pytest.raises(ArtifactError, match="of another run"):
        train_model(newer, tmp_path / "c", config=config, warm_start=champion, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "deepfm"}, r"is a logistic_regression, not a deepfm: train a logistic_regression, or start afresh"),
        ({"model": "factorization_machine"}, r"is a logistic_regression, not a factorization_machine"),
    ],
)
def test_other_model_is_refused_before_anything_is_written(
    change: dict[str, object], message: str, older: TrainingSet, tmp_path: Path
) -> None:
    champion = train_model(older, tmp_path / "champion", config=TrainingConfig(model="logistic_regression", **FAST))
    with pytest.raises(TrainingError, match=message):
        train_model(older, tmp_path / "package", config=TrainingConfig(**change, **FAST), warm_start=champion)
    assert not (tmp_path / "package").exists()


def test_other_hyperparameters_are_refused_by_name(older: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(model="factorization_machine", **FAST)
    champion = train_model(older, tmp_path / "champion", config=config)
    other = config.model_copy(update={"hyperparameters": SMALL})
    with pytest.raises(TrainingError, match=r"has embedding_dim=16 \(asked: 4\): take its hyper-parameters, or start"):
        train_model(older, tmp_path / "package", config=other, warm_start=champion)


def test_other_features_are_refused_by_name(older: TrainingSet, make_training_set, tmp_path: Path) -> None:
    config = TrainingConfig(model="logistic_regression", **FAST)
    champion = train_model(older, tmp_path / "champion", config=config)
    columns, label = log(range(20), seed=2)
    columns["age"] = columns.pop("price")
    other = make_training_set(
        columns, label, {**{k: v for k, v in KINDS.items() if k != "price"}, "age": ColumnKind.NUMERIC}, name="other"
    )
    with pytest.raises(ArtifactError, match=r"gone: price; new: age"):
        train_model(other, tmp_path / "package", config=config, warm_start=champion)
