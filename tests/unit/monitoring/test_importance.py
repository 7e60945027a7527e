"""Importance says what the predictions depend on: no more, no less, and the same again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind
from evergreen.metrics.binary import log_loss
from evergreen.models.encoding import EncoderConfig
from evergreen.models.package import ModelPackage
from evergreen.monitoring.importance import Importance, cached_importance, permutation_importance
from tests.unit.models.small_package import FEATURES, make_package, some_table


@pytest.fixture(scope="module")
def package() -> ModelPackage:
    return make_package("deepfm")


def test_every_feature_has_a_weight_and_weights_add_up_to_one(package: ModelPackage) -> None:
    weights = permutation_importance(package, some_table(600)).weights
    assert weights.keys() == {feature.name for feature in FEATURES}
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) > 0  # its weights are random: it reads them all


def test_what_a_model_does_not_read_has_no_weight() -> None:
    weights = permutation_importance(make_package("popularity"), some_table(600)).weights
    numbers = {feature.name for feature in FEATURES if feature.kind is ColumnKind.NUMERIC}
    assert {name for name, weight in weights.items() if weight > 0} == numbers  # it knows no categories


@pytest.mark.parametrize("feature", [feature.name for feature in FEATURES])
def test_all_that_encodes_a_feature_is_shuffled_together(feature: str) -> None:
    """With one value in all rows there is nothing to shuffle; an indicator left behind would show."""
    package = make_package("deepfm", config=EncoderConfig(history_length=6, num_hashes=2, oov_buckets=8))
    table = some_table(300)
    known = next(value for value in table[feature].to_pylist() if value is not None)
    for value in (known, None):
        constant = pa.array([value] * table.num_rows, table.schema.field(feature).type)
        same = table.set_column(table.column_names.index(feature), feature, constant)
        assert permutation_importance(package, same).losses[feature] == pytest.approx(0, abs=1e-12)
    assert permutation_importance(package, table).losses[feature] > 0


def test_it_is_the_loss_that_labels_would_show_if_there_were_enough(package: ModelPackage) -> None:
    table = some_table(3_000)
    importance = permutation_importance(package, table, seed=5)
    heaviest = max(importance.losses, key=lambda name: importance.losses[name])
    rng = np.random.default_rng(0)
    shuffled = table.set_column(
        table.column_names.index(heaviest), heaviest, table[heaviest].take(pa.array(rng.permutation(table.num_rows)))
    )
    before, after = package.predict(table), package.predict(shuffled)
    increases = []
    for _ in range(30):
        labels = (rng.random(len(before)) < before).astype(float)
        increases.append(log_loss(labels, after) - log_loss(labels, before))
    assert importance.losses[heaviest] == pytest.approx(np.mean(increases), rel=0.15)


def test_ratings_are_measured_by_their_squared_change() -> None:
    losses = permutation_importance(make_package("deepfm", kind=LogKind.RATINGS), some_table(600)).losses
    assert 0 < max(losses.values()) <= 1.0  # ratings lie within 1 of each other


def test_the_same_seed_gives_the_same_and_another_nearly(package: ModelPackage) -> None:
    one, again, other = (permutation_importance(package, some_table(2_000), seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert max(abs(one.weights[name] - other.weights[name]) for name in one.weights) < 0.05
    assert permutation_importance(package, some_table(2_000), max_rows=100).rows == 100


def test_it_is_measured_once_a_model(package: ModelPackage, tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    first = cached_importance(path, package, some_table(200))
    marked = first.model_copy(update={"losses": {**first.losses, "price": 123.0}})
    marked.write(path)
    assert cached_importance(path, package, some_table(200)) == marked
    other = make_package("popularity")
    assert cached_importance(path, other, some_table(200)).model_version == other.version
    assert Importance.read(path).model_version == other.version


def test_one_row_cannot_be_shuffled(package: ModelPackage) -> None:
    with pytest.raises(ArtifactError, match="1 rows: importance is measured by shuffling"):
        permutation_importance(package, some_table(1))
