"""Training on a share of the negatives comes to the same as training on everything, at a click rate of 0.1 %."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Side
from evergreen.metrics.binary import auc
from evergreen.models.base import score_rows
from evergreen.models.calibration import sigmoid
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec, NumericInput
from evergreen.models.logistic_regression import LogisticRegression, LogisticRegressionConfig
from evergreen.training.config import TrainingConfig
from evergreen.training.fitting import fit_by_gradient
from evergreen.training.task import Examples

NUM_ROWS = 2_400_000
RATE = 0.001
TEN_TO_ONE = {"negative_rate": 10 * RATE, "batch_size": 4_000, "max_epochs": 80, "plateau_factor": 0.95}
"""Ten negatives a click; each epoch draws others."""
SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="device", side=Side.USER, start=1, num_rows=4),
        CategoricalInput(name="topic", side=Side.ITEM, start=5, num_rows=6),
    ),
    numeric=(NumericInput(name="price", side=Side.ITEM, missing=None, zero=0.0, boundaries=()),),
    num_indicators=0,
    bags=(),
    num_embeddings=11,
    untrained_rows=(0,),
)


def mean_probability(scores: np.ndarray) -> float:
    return float(sigmoid(scores.astype(np.float64)).mean())


@pytest.fixture(scope="module")
def examples() -> dict[str, Examples]:
    """Clicks that are linear in two categories and a number.

    The click of each row is random and has the row's probability, but the number of clicks in any stretch of rows is
    that expected (systematic sampling, Madow 1949): eight hundred clicks would otherwise be off by 4 % from one split
    to the next, whatever is trained.
    """
    rng = np.random.default_rng(0)
    device, topic = rng.integers(4, size=NUM_ROWS), rng.integers(6, size=NUM_ROWS)
    price = rng.normal(size=NUM_ROWS).astype(np.float32)
    logit = rng.normal(scale=0.4, size=4)[device] + rng.normal(scale=0.4, size=6)[topic] + 0.4 * price
    p = np.exp(logit)
    p *= RATE / p.mean()
    label = np.diff(np.floor(np.cumsum(p) + rng.random()), prepend=0).astype(np.float32)
    categorical = np.stack([1 + device, 5 + topic], axis=1).astype(np.int32)
    rows = EncodedRows(SPEC, categorical, price[:, None], ())
    places = {"train": np.arange(NUM_ROWS * 2 // 3), "validation": np.arange(NUM_ROWS * 2 // 3, NUM_ROWS)}
    return {split: Examples(rows.take(place), label[place]) for split, place in places.items()}


def trained(examples: dict[str, Examples], **settings: object) -> LogisticRegression:
    """Trained to the end in ever smaller steps, or the noise of the last one would be all that the tests see."""
    config = TrainingConfig(
        model="logistic_regression", learning_rate=0.005, embedding_learning_rate=0.3, patience=1_000,
        evaluations_per_epoch=1, min_steps_per_epoch=1, device="cpu", **settings,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = LogisticRegression(LogisticRegressionConfig(), SPEC)
    model.set_output(bias=float(np.log(RATE / (1 - RATE))), scale=1.0)
    # A stretch of rows, whose click rate is that of all; every fourth row would have a rate by chance, and training
    # would stop where the model met that.
    watched = examples["validation"].take(np.arange(200_000))
    fit_by_gradient(model, examples["train"], watched, config, kind=LogKind.IMPRESSIONS)
    return model


@pytest.fixture(scope="module")
def trained_on_everything(examples: dict[str, Examples]) -> LogisticRegression:
    return trained(examples, batch_size=65_536, max_epochs=6)


@pytest.mark.parametrize("seed", [0, 1])
def test_corrected_predictions_meet_the_click_rate_and_rank_as_if_trained_on_everything(
    seed: int, examples: dict[str, Examples], trained_on_everything: LogisticRegression
) -> None:
    held_out = examples["validation"]
    models = (trained(examples, seed=seed, **TEN_TO_ONE), trained_on_everything)
    scores, reference = (score_rows(model, held_out.rows) for model in models)
    assert held_out.labels.mean() == pytest.approx(RATE, rel=0.02)
    assert mean_probability(scores) == pytest.approx(held_out.labels.mean(), rel=0.02)
    assert auc(held_out.labels, scores) == pytest.approx(auc(held_out.labels, reference), abs=0.001)
    assert auc(held_out.labels, reference) > 0.65  # of 0.67 that the true probabilities have


def test_class_weight_is_taken_back_as_well(examples: dict[str, Examples]) -> None:
    model = trained(examples, positive_weight=20.0, **TEN_TO_ONE)
    assert mean_probability(score_rows(model, examples["validation"].rows)) == pytest.approx(RATE, rel=0.03)
