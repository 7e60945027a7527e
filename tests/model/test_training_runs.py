"""What a training run promises: the same bytes twice, and errors that name the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.training_set import ColumnKind, TrainingSet
from evergreen.models.registry import MODEL_NAMES
from evergreen.training.trainer import TrainingConfig, train_model

FAST = {"max_epochs": 1, "export_program": False}
NUMBER = {"x": ColumnKind.NUMERIC}
PARTICULAR = {"two_tower": "no feature is called item_id", "transformer": "has no feature of kind sequence"}
"""Models that need certain features, and what they say without."""


@pytest.mark.parametrize("model", ["popularity", "deepfm"])
def test_training_twice_gives_the_same_package(model: str, linear_set: TrainingSet, tmp_path: Path) -> None:
    first = train_model(linear_set, tmp_path / "a", config=TrainingConfig(model=model, **FAST))
    torch.manual_seed(99)  # the state of the global generator is no input
    second = train_model(linear_set, tmp_path / "b", config=TrainingConfig(model=model, **FAST))
    assert first.version == second.version


def test_another_seed_gives_another_package(linear_set: TrainingSet, tmp_path: Path) -> None:
    versions = {
        train_model(linear_set, tmp_path / str(seed), config=TrainingConfig(seed=seed, **FAST)).digest
        for seed in (0, 1)
    }
    assert len(versions) == 2


def test_early_stopping_keeps_the_best_weights(linear_set: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(model="deepfm", max_epochs=8, embedding_learning_rate=0.5, export_program=False)
    package = train_model(linear_set, tmp_path / "p", config=config)
    curve = package.metrics["curve"]
    best = min(curve[1:], key=lambda point: point["validation_loss"])
    assert curve[-1]["step"] > best["step"] == package.metrics["best_step"]
    rows = linear_set.read("validation")
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(package.scores(rows)), torch.from_numpy(rows["label"].to_numpy().copy())
    )
    assert float(loss) == pytest.approx(best["validation_loss"], rel=1e-6)


def test_number_of_threads_is_given_back(linear_set: TrainingSet, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train_model(linear_set, tmp_path / "p", config=TrainingConfig(num_threads=2, model="popularity", **FAST))
    assert torch.get_num_threads() == before


def test_unknown_model_is_named_with_the_choice(linear_set: TrainingSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'deepfn'.*deepfm"):
        train_model(linear_set, tmp_path / "p", config=TrainingConfig(model="deepfn"))


def test_unknown_hyperparameter_is_named(linear_set: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(hyperparameters={"embeding_dim": 8})
    with pytest.raises(TrainingError, match=r"embeding_dim=8.*embedding_dim"):
        train_model(linear_set, tmp_path / "p", config=config)


def test_split_with_one_class_is_named(make_training_set, tmp_path: Path) -> None:
    label = np.zeros(1000, np.float32)
    label[:50] = 1  # clicks in the training rows only
    training_set = make_training_set({"x": np.arange(1000.0)}, label, NUMBER)
    with pytest.raises(TrainingError, match="validation split has 150 rows and all have label 0"):
        train_model(training_set, tmp_path / "p", config=TrainingConfig(**FAST))


def test_empty_split_is_named(make_training_set, tmp_path: Path) -> None:
    training_set = make_training_set({"x": np.arange(3.0)}, np.array([0, 1, 0], np.float32), NUMBER)
    with pytest.raises(TrainingError, match="validation split is empty"):
        train_model(training_set, tmp_path / "p", config=TrainingConfig(**FAST))


def test_features_that_are_all_missing_are_named(make_training_set, tmp_path: Path) -> None:
    label = (np.arange(1000) % 3 == 0).astype(np.float32)
    training_set = make_training_set({"x": np.full(1000, np.nan)}, label, NUMBER)
    with pytest.raises(TrainingError, match=r"all 1 features are missing.*x"):
        train_model(training_set, tmp_path / "p", config=TrainingConfig(**FAST))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_diverging_loss_names_the_learning_rate(rating_set: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(model="factorization_machine", learning_rate=1e12, embedding_learning_rate=1e12, **FAST)
    with pytest.raises(TrainingError, match=r"lower learning_rate \(1000000000000.0\)"):
        train_model(rating_set, tmp_path / "p", config=config)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("model", [name for name in MODEL_NAMES if name not in PARTICULAR])
@pytest.mark.parametrize("kind", list(ColumnKind))
def test_a_handful_of_rows_with_one_feature_is_enough_to_run(
    model: str, kind: ColumnKind, make_training_set, tmp_path: Path
) -> None:
    label = (np.arange(40) % 2 == 0).astype(np.float32)
    values = {
        ColumnKind.NUMERIC: np.arange(40.0),
        ColumnKind.CATEGORICAL: [str(i % 3) for i in range(40)],
        ColumnKind.SEQUENCE: [[str(i % 3)] for i in range(40)],
        ColumnKind.MULTI: [[str(i % 3)] for i in range(40)],
    }
    training_set = make_training_set({"x": values[kind]}, label, {"x": kind})
    package = train_model(training_set, tmp_path / "p", config=TrainingConfig(model=model, **FAST))
    assert np.isfinite(package.predict(training_set.read("test"))).all()


@pytest.mark.parametrize("model", PARTICULAR)
def test_a_handful_of_rows_with_the_features_it_needs_is_enough_to_run(
    model: str, make_training_set, tmp_path: Path
) -> None:
    label = (np.arange(40) % 2 == 0).astype(np.float32)
    names = [str(i % 3) for i in range(40)]
    kinds = {
        "user_id": ColumnKind.CATEGORICAL,
        "item_id": ColumnKind.CATEGORICAL,
        "user_history": ColumnKind.SEQUENCE,
    }
    columns = {"user_id": names, "item_id": names, "user_history": [[name] for name in names]}
    training_set = make_training_set(columns, label, kinds)
    package = train_model(training_set, tmp_path / "p", config=TrainingConfig(model=model, **FAST))
    assert np.isfinite(package.predict(training_set.read("test"))).all()


@pytest.mark.parametrize("model", PARTICULAR)
def test_model_without_the_features_it_needs_names_them(model: str, make_training_set, tmp_path: Path) -> None:
    label = (np.arange(40) % 2 == 0).astype(np.float32)
    training_set = make_training_set({"x": np.arange(40.0)}, label, NUMBER)
    with pytest.raises(TrainingError, match=PARTICULAR[model]):
        train_model(training_set, tmp_path / "p", config=TrainingConfig(model=model, **FAST))


def test_features_that_say_nothing_are_reported(make_training_set, tmp_path: Path, caplog) -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(2000) < 0.5).astype(np.float32)
    label[1400:1700] = label[1400:1700][::-1]
    training_set = make_training_set({"x": np.where(np.arange(2000) < 1400, label, 1 - label)}, label, NUMBER)
    train_model(training_set, tmp_path / "p", config=TrainingConfig(model="logistic_regression", **FAST))
    assert "no step beat the start on validation rows" in caplog.text
