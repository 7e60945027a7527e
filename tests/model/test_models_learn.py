"""Each model learns what it should, and what it cannot learn it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from evergreen.contracts.training_set import ColumnKind, TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.monitoring.importance import permutation_importance
from evergreen.training.trainer import TrainingConfig, train_model

Train = Callable[[TrainingSet, str], ModelPackage]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A trained model; what several tests look at is trained once."""
    packages: dict[tuple[Path, str], ModelPackage] = {}

    def trained(training_set: TrainingSet, model: str) -> ModelPackage:
        key = (training_set.path, model)
        if key not in packages:
            config = TrainingConfig(model=model, export_program=False)
            packages[key] = train_model(training_set, tmp_path_factory.mktemp(model) / "package", config=config)
        return packages[key]

    return trained


def auc_on_test_rows(package: ModelPackage, training_set: TrainingSet) -> float:
    rows = training_set.read("test")
    return float(roc_auc_score(rows["label"].to_numpy(), package.scores(rows)))


@pytest.mark.parametrize("model", ["factorization_machine", "deepfm"])
def test_products_of_features_are_learned_by_models_that_multiply(
    model: str, interaction_set: TrainingSet, train: Train
) -> None:
    assert auc_on_test_rows(train(interaction_set, model), interaction_set) > 0.75


def test_features_that_tell_something_weigh_and_noise_does_not(interaction_set: TrainingSet, train: Train) -> None:
    package = train(interaction_set, "factorization_machine")
    weights = permutation_importance(package, interaction_set.read("validation")).weights
    assert weights.keys() == {"user_id", "item_id", "noise"}
    assert weights["noise"] < 0.05 < min(weights["user_id"], weights["item_id"])


def test_logistic_regression_cannot_learn_products(interaction_set: TrainingSet, train: Train) -> None:
    assert auc_on_test_rows(train(interaction_set, "logistic_regression"), interaction_set) < 0.56


@pytest.mark.parametrize("model", ["logistic_regression", "factorization_machine", "deepfm"])
def test_linear_signal_is_learned_as_well_as_by_scikit_learn(model: str, linear_set: TrainingSet, train: Train) -> None:
    package = train(linear_set, model)
    train_rows, test_rows = (package.encoder.transform(linear_set.read(split)) for split in ("train", "test"))
    num_rows = package.encoder.spec.num_embeddings

    def one_hot(rows: np.ndarray) -> np.ndarray:
        return np.eye(num_rows, dtype=np.float32)[rows].sum(axis=1)

    reference = LogisticRegression(max_iter=300).fit(
        np.hstack([train_rows.numeric, one_hot(train_rows.categorical)]), linear_set.read("train")["label"].to_numpy()
    )
    scores = reference.decision_function(np.hstack([test_rows.numeric, one_hot(test_rows.categorical)]))
    expected = roc_auc_score(linear_set.read("test")["label"].to_numpy(), scores)
    assert expected > 0.75
    assert auc_on_test_rows(package, linear_set) > expected - 0.02


@pytest.mark.parametrize("model", ["popularity", "logistic_regression", "factorization_machine", "deepfm"])
def test_mean_probability_is_the_click_rate_of_validation_rows(
    model: str, linear_set: TrainingSet, train: Train
) -> None:
    package = train(linear_set, model)
    rows = linear_set.read("validation")
    predicted = package.predict(rows)
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    assert predicted.mean() == pytest.approx(rows["label"].to_numpy().mean(), rel=0.02)


def test_popularity_picks_the_window_that_tells_most(linear_set: TrainingSet, train: Train) -> None:
    package = train(linear_set, "popularity")
    assert package.metrics["chosen"] == "item_positives_7d"
    rows = linear_set.read("test")
    column = rows["item_positives_7d"].to_numpy(zero_copy_only=False)
    order = np.argsort(np.nan_to_num(column, nan=0.0), kind="stable")
    assert (np.diff(package.scores(rows)[order]) >= 0).all()  # and an item without a row has had no positives


def test_popularity_without_item_activity_answers_with_the_base_rate(
    interaction_set: TrainingSet, train: Train
) -> None:
    package = train(interaction_set, "popularity")
    assert package.metrics["chosen"] is None
    assert np.ptp(package.predict(interaction_set.read("test"))) == 0


@pytest.mark.parametrize("model", ["popularity", "logistic_regression", "factorization_machine", "deepfm"])
def test_ratings_are_predicted_better_than_by_their_mean_and_within_range(
    model: str, rating_set: TrainingSet, train: Train
) -> None:
    package = train(rating_set, model)
    rows = rating_set.read("test")
    label, predicted = rows["label"].to_numpy(), package.predict(rows)
    assert np.sqrt(np.square(predicted - label).mean()) < 0.85 * label.std()
    assert package.calibration is None
    assert predicted.min() >= 1
    assert predicted.max() <= 5


def test_user_history_ranks_items_for_users_that_training_never_saw(make_training_set, train: Train) -> None:
    rng = np.random.default_rng(3)
    num_rows, num_items = 24_000, 40
    camp = rng.integers(2, size=num_rows)
    item = rng.integers(num_items, size=num_rows)
    history = [[f"i{i}" for i in rng.choice(np.arange(c, num_items, 2), 5, replace=False)] for c in camp]
    label = (rng.random(num_rows) < np.where(item % 2 == camp, 0.3, 0.05)).astype(np.float32)
    training_set = make_training_set(
        {"user_id": [f"u{i}" for i in range(num_rows)], "item_id": [f"i{i}" for i in item], "user_history": history},
        label,
        {
            "user_id": ColumnKind.CATEGORICAL,
            "item_id": ColumnKind.CATEGORICAL,
            "user_history": ColumnKind.SEQUENCE,
        },
    )
    best = 0.715  # of the true probabilities
    assert auc_on_test_rows(train(training_set, "factorization_machine"), training_set) > best - 0.02
