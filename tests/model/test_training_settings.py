"""Each setting of a training run does what it says, from rows to package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, TrainingSet
from evergreen.models.calibration import IsotonicCalibration
from evergreen.models.encoding import EncoderConfig
from evergreen.models.package import ModelPackage
from evergreen.models.registry import MODEL_NAMES
from evergreen.training.trainer import TrainingConfig, train_model

CATEGORY, NUMBER = ColumnKind.CATEGORICAL, ColumnKind.NUMERIC
NUM_ITEMS = 20


@pytest.fixture
def run(tmp_path: Path):
    """Trains fast; each package has a folder of its own."""

    def run(training_set: TrainingSet, model: str, **settings: object) -> ModelPackage:
        out = tmp_path / f"package {len(list(tmp_path.iterdir()))}"
        config = TrainingConfig(
            **{"model": model, "export_program": False, "device": "cpu", "max_epochs": 3, **settings}
        )
        return train_model(training_set, out, config=config)

    return run


def quick_set(make_training_set, kind: LogKind = LogKind.IMPRESSIONS, num_rows: int = 1600) -> TrainingSet:
    """All kinds of features, so that every model can be trained: users like items of their own half."""
    rng = np.random.default_rng(4)
    user, item = rng.integers(40, size=num_rows), rng.integers(NUM_ITEMS, size=num_rows)
    fits = user % 2 == item % 2
    label = (rng.random(num_rows) < np.where(fits, 0.5, 0.1)).astype(np.float32)
    if kind is LogKind.RATINGS:
        label = np.clip(np.where(fits, 4.0, 2.0) + rng.normal(scale=0.5, size=num_rows), 1, 5).astype(np.float32)
    liked = [[f"i{i}" for i in range(u % 2, u % 8 + 2, 2)] for u in user]
    columns = {
        "user_id": [f"u{i}" for i in user],
        "item_id": [f"i{i}" for i in item],
        "user_history": liked,
        "item_positives_7d": rng.poisson(3, num_rows).astype(float),
        "match": np.where(rng.random(num_rows) < 0.1, np.nan, fits + rng.normal(scale=0.5, size=num_rows)),
    }
    kinds = {
        "user_id": CATEGORY,
        "item_id": CATEGORY,
        "user_history": ColumnKind.SEQUENCE,
        "item_positives_7d": NUMBER,
        "match": NUMBER,
    }
    return make_training_set(columns, label, kinds, kind, name=kind.value)


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_every_model_gives_equal_bytes_twice_and_learns(model: str, make_training_set, run) -> None:
    training_set = quick_set(make_training_set)
    first, second = (run(training_set, model, learning_rate=0.01) for _ in range(2))
    assert first.digest == second.digest
    rows = training_set.read("test")
    predicted, label = first.predict(rows), rows["label"].to_numpy()
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    if model not in ("popularity", "two_tower"):  # what popularity sees says nothing here; towers do not see `match`
        assert roc_auc_score(label, predicted) > 0.65


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_every_model_predicts_ratings_within_their_range(model: str, make_training_set, run) -> None:
    training_set = quick_set(make_training_set, LogKind.RATINGS)
    rows = training_set.read("test")
    label, predicted = rows["label"].to_numpy(), run(training_set, model).predict(rows)
    assert predicted.min() >= 1
    assert predicted.max() <= 5
    error = np.sqrt(np.square(predicted - label).mean())
    assert error < (1.05 if model in ("popularity", "two_tower") else 0.9) * label.std()


@pytest.mark.parametrize(
    "settings",
    [
        {"negative_rate": 0.1},
        {"positive_weight": 10.0},
        {"negative_rate": 0.3, "positive_weight": 3.0},
        {"click_loss": "focal"},
        {"click_loss": "focal", "negative_rate": 0.3},
        {"calibration": "isotonic"},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_mean_prediction_is_the_click_rate_whatever_is_minimised(
    settings: dict[str, object], linear_set: TrainingSet, run
) -> None:
    package = run(linear_set, "factorization_machine", max_epochs=2, **settings)
    rows = linear_set.read("validation")
    label, predicted = rows["label"].to_numpy(), package.predict(rows)
    assert predicted.mean() == pytest.approx(label.mean(), rel=0.02)
    assert roc_auc_score(label, predicted) > 0.75
    if settings.get("click_loss") != "focal":  # and before calibration, too
        raw = 1 / (1 + np.exp(-package.scores(rows).astype(np.float64)))
        assert raw.mean() == pytest.approx(label.mean(), rel=0.2)


def test_isotonic_calibration_is_loaded_with_its_package(linear_set: TrainingSet, run) -> None:
    package = run(linear_set, "logistic_regression", calibration="isotonic", max_epochs=1)
    assert isinstance(package.calibration, IsotonicCalibration)
    rows = linear_set.read("test")
    order = np.argsort(package.scores(rows), kind="stable")
    predicted = ModelPackage.load(package.path).predict(rows)
    assert (np.diff(predicted[order]) >= 0).all()
    assert len(np.unique(predicted)) > 50
    np.testing.assert_array_equal(predicted, package.predict(rows))


def test_bfloat16_stays_near_float32(linear_set: TrainingSet, run) -> None:
    exact, rounded = (run(linear_set, "deepfm", max_epochs=1, precision=name) for name in ("float32", "bfloat16"))
    rows = linear_set.read("test")
    assert exact.digest != rounded.digest
    difference = np.abs(exact.predict(rows) - rounded.predict(rows))
    assert difference.max() < 0.1
    assert difference.mean() < 0.01


def shown_set(make_training_set, num_rows: int = 16_000) -> tuple[TrainingSet, np.ndarray, np.ndarray]:
    """Items in an order that has nothing to do with how good they are, looked at less the further down they are.

    Returns:
        The rows, the items' log-odds of a click once seen, and the log of how often each position is seen.
    """
    rng = np.random.default_rng(5)
    quality = rng.permutation(np.linspace(-2.5, -0.5, NUM_ITEMS))
    item = rng.integers(NUM_ITEMS, size=num_rows)
    position = 1 + np.clip(np.round(item / 5 + rng.normal(scale=0.8, size=num_rows)), 0, 3).astype(int)
    seen = np.log(1.0 / np.arange(1, 5))
    p = np.exp(seen[position - 1]) / (1 + np.exp(-quality[item]))
    label = (rng.random(num_rows) < p).astype(np.float32)
    training_set = make_training_set(
        {"item_id": [f"i{i}" for i in item]}, label, {"item_id": CATEGORY}, name="shown", fields={"position": position}
    )
    return training_set, quality, seen


def item_scores(package: ModelPackage, training_set: TrainingSet) -> np.ndarray:
    """(NUM_ITEMS,)."""
    rows = training_set.read("train", ["item_id"])
    items = np.array([int(name[1:]) for name in rows["item_id"].to_pylist()])
    _, first = np.unique(items, return_index=True)
    return package.scores(rows)[first]


def test_position_effect_is_learned_apart_from_the_items_and_left_out_when_serving(make_training_set, run) -> None:
    training_set, quality, seen = shown_set(make_training_set)
    settings = {"max_epochs": 12, "patience": 1000, "id_dropout": 0.0, "embedding_learning_rate": 0.05}
    ignoring, package = (
        run(training_set, "logistic_regression", position=position, **settings) for position in ("ignore", "effect")
    )
    assert ignoring.position is None
    assert package.position is not None
    effects = np.array(package.position.effects)
    assert effects[0] == 0
    np.testing.assert_allclose(effects[1:] - effects[1], seen, atol=0.45)  # a product of odds is not one of chances
    before, after = (spearmanr(item_scores(p, training_set), quality).statistic for p in (ignoring, package))
    assert after > 0.93
    assert after > before + 0.02

    rows = training_set.read("test")
    encoded, position = package.encoder.transform(rows), rows["position"].to_numpy()
    label, served, shown = rows["label"].to_numpy(), package.predict(rows), package.predict_encoded(encoded, position)
    np.testing.assert_array_equal(served, package.predict_encoded(encoded))
    for place in range(1, 5):
        assert shown[position == place].mean() == pytest.approx(label[position == place].mean(), rel=0.25)
    assert served.mean() == pytest.approx(label.mean(), rel=0.1)
    assert roc_auc_score(label, shown) > roc_auc_score(label, served) + 0.02
    np.testing.assert_array_equal(package.predict_encoded(encoded, np.zeros_like(position)), served)
    beyond = package.predict_encoded(encoded, np.full_like(position, 99))
    np.testing.assert_array_equal(beyond, package.predict_encoded(encoded, np.full_like(position, 4)))


def test_inverse_propensity_weighs_clicks_further_down_and_serves_without_positions(make_training_set, run) -> None:
    training_set, quality, _ = shown_set(make_training_set)
    settings = {"max_epochs": 4, "id_dropout": 0.0}
    ignoring, weighed = (
        run(training_set, "logistic_regression", position=position, **settings)
        for position in ("ignore", "inverse_propensity")
    )
    assert weighed.position is None
    before, after = (spearmanr(item_scores(p, training_set), quality).statistic for p in (ignoring, weighed))
    assert after > before


def test_log_without_positions_has_no_position_effect(linear_set: TrainingSet, run) -> None:
    package = run(linear_set, "logistic_regression", position="effect", max_epochs=1)
    assert package.position is None
    rows = linear_set.read("test").slice(0, 10)
    encoded = package.encoder.transform(rows)
    np.testing.assert_array_equal(package.predict_encoded(encoded, np.arange(10)), package.predict(rows))


def dwelling_set(make_training_set, known: float = 1.0, num_rows: int = 6000) -> TrainingSet:
    """How long a user stays after a click depends on the item, and nothing else is known of those who did not click."""
    rng = np.random.default_rng(6)
    item = rng.integers(NUM_ITEMS, size=num_rows)
    label = (rng.random(num_rows) < 0.4).astype(np.float32)
    dwell = np.expm1(2.0 + 1.5 * (item % 2) + rng.normal(scale=0.2, size=num_rows))
    dwell = np.where((label > 0) & (rng.random(num_rows) < known), dwell, np.nan)
    return make_training_set(
        {"item_id": [f"i{i}" for i in item], "noise": rng.normal(size=num_rows)},
        label,
        {"item_id": CATEGORY, "noise": NUMBER},
        name="dwelling",
        fields={"dwell_seconds": dwell},
    )


def test_second_outcome_is_learned_and_comes_back_in_the_unit_of_the_log(make_training_set, run) -> None:
    training_set = dwelling_set(make_training_set)
    settings = {"max_epochs": 15, "patience": 1000, "second_task_weight": 1.0, "id_dropout": 0.0}
    package = run(training_set, "multi_task_deepfm", hyperparameters={"hidden": [16], "dropout": 0.0}, **settings)
    assert package.outcome is not None
    assert package.outcome.log
    rows = training_set.read("test")
    seconds = package.predict_outcome(package.encoder.transform(rows))
    odd = np.array([int(name[1:]) % 2 == 1 for name in rows["item_id"].to_pylist()])
    assert np.median(seconds[odd]) == pytest.approx(np.expm1(3.5), rel=0.3)
    assert np.median(seconds[~odd]) == pytest.approx(np.expm1(2.0), rel=0.3)
    assert (
        package.metrics["validation_dwell_seconds_rmse"]
        < 0.7 * package.metrics["validation_dwell_seconds_rmse_of_mean"]
    )
    np.testing.assert_array_equal(
        ModelPackage.load(package.path).predict_outcome(package.encoder.transform(rows)), seconds
    )


def test_outcome_that_is_hardly_known_is_left_alone(make_training_set, run, caplog) -> None:
    package = run(dwelling_set(make_training_set, known=0.01), "multi_task_deepfm", max_epochs=1)
    assert "dwell_seconds is known of fewer than 100 training rows: it learns one task alone" in caplog.text
    assert package.outcome is None
    with pytest.raises(ArtifactError, match="has learned no second outcome"):
        package.predict_outcome(package.encoder.transform(pa.table({"item_id": ["i1"], "noise": [0.0]})))


def test_two_towers_are_trained_by_their_own_loss_and_calibrated(make_training_set, run) -> None:
    """Users choose among items of their own half: towers find it from ids and histories."""
    training_set = quick_set(make_training_set, num_rows=6000)
    package = run(training_set, "two_tower", max_epochs=6)
    curve = package.metrics["curve"]
    assert min(point["validation_loss"] for point in curve[1:]) < 0.95 * curve[0]["validation_loss"]
    rows = training_set.read("test")
    predicted, label = package.predict(rows), rows["label"].to_numpy()
    assert roc_auc_score(label, predicted) > 0.65
    assert predicted.mean() == pytest.approx(label.mean(), rel=0.1)


def test_table_that_cannot_fit_into_memory_is_refused_with_its_size(linear_set: TrainingSet, run) -> None:
    encoder = EncoderConfig(max_categories=0, oov_buckets=500_000_000)
    with pytest.raises(TrainingError, match=r"table of embeddings has [\d,]{9,} rows of 65 numbers: .* GiB"):
        run(linear_set, "factorization_machine", encoder=encoder, hyperparameters={"embedding_dim": 64})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_label_that_is_no_number_is_named_with_its_row(split: str, make_training_set, run) -> None:
    label = (np.arange(1000) % 3 == 0).astype(np.float32)
    training_set = make_training_set({"x": np.arange(1000.0)}, label, {"x": NUMBER})
    rows = training_set.read(split)
    spoilt = rows["label"].to_numpy().copy()
    spoilt[5] = np.nan
    rows = rows.set_column(rows.column_names.index("label"), "label", pa.array(spoilt))
    pq.write_table(rows, training_set.file(split))
    with pytest.raises(TrainingError, match=rf"the {split} split has label nan at row 5: build the training set again"):
        run(training_set, "deepfm")


def test_constant_number_is_named(make_training_set, run, caplog) -> None:
    label = (np.arange(1000) % 3 == 0).astype(np.float32)
    training_set = make_training_set(
        {"x": np.arange(1000.0), "tax": np.full(1000, 19.0)}, label, {"x": NUMBER, "tax": NUMBER}
    )
    run(training_set, "logistic_regression", max_epochs=1)
    assert "feature tax is constant in the training rows (19 in all 700 that have it)" in caplog.text
    assert "feature x" not in caplog.text


def test_gpu_that_is_not_there_is_refused(linear_set: TrainingSet, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError, match=r'device="cuda": torch finds no GPU'):
        run(linear_set, "deepfm", device="cuda")
