"""A trained and loaded package scores a request in halves as it scores whole rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.training_set import Side, TrainingSet
from evergreen.models.package import ModelPackage
from evergreen.models.registry import MODEL_NAMES
from evergreen.models.split.halves import half_of
from evergreen.models.split.scorer import SplitScorer
from evergreen.training.config import TrainingConfig
from evergreen.training.trainer import train_model


def check(package: ModelPackage, table: pa.Table) -> None:
    """Score 100 items for each of 20 users, who are rows of the table just as the items are."""
    features = package.info.features
    items = table.slice(0, 100)
    rows = np.arange(100)
    scorer = SplitScorer.prepare(package, items)
    many = scorer.score_many([(table.slice(200 + row, 1), items, rows) for row in range(20)])
    for row in range(20):
        user = table.slice(200 + row, 1)
        of_user = user.take(pa.array(np.zeros(100, np.int64)))
        whole = pa.table({f.name: (of_user if half_of(f) is Side.USER else items)[f.name] for f in features})
        scores = scorer.score(user, items, rows)
        np.testing.assert_allclose(scores, package.predict(whole), rtol=0, atol=1e-5)
        np.testing.assert_allclose(many[row], scores, rtol=0, atol=1e-6)
        assert np.ptp(scores) > 0


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_trained_model_scores_alike_in_halves(name: str, linear_set: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(model=name, max_epochs=1, export_program=False)
    package = train_model(linear_set, tmp_path / name, config=config)
    check(ModelPackage.load(package.path), linear_set.read("test"))


@pytest.mark.parametrize("name", ["logistic_regression", "deepfm"])
def test_ratings_are_alike_in_halves(name: str, rating_set: TrainingSet, tmp_path: Path) -> None:
    config = TrainingConfig(model=name, max_epochs=1, export_program=False)
    check(train_model(rating_set, tmp_path / name, config=config), rating_set.read("test"))
