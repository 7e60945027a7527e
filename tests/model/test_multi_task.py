"""Two tasks trained together: each is learned, and a rich second outcome helps clicks that are few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Side
from evergreen.metrics.binary import auc
from evergreen.models.base import score_rows
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec
from evergreen.models.multi_task import MultiTaskDeepFM, MultiTaskDeepFMConfig, OutcomeScale, standardise_outcomes
from evergreen.training.config import TrainingConfig
from evergreen.training.fitting import fit_by_gradient
from evergreen.training.task import Examples

NUM_USERS, NUM_ITEMS = 60, 40
SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="user_id", side=Side.USER, start=1, num_rows=NUM_USERS),
        CategoricalInput(name="item_id", side=Side.ITEM, start=1 + NUM_USERS, num_rows=NUM_ITEMS),
    ),
    numeric=(),
    num_indicators=0,
    bags=(),
    num_embeddings=1 + NUM_USERS + NUM_ITEMS,
    untrained_rows=(0,),
)


@dataclass(frozen=True)
class Log:
    rows: EncodedRows
    label: NDArray[np.float32]
    seconds: NDArray[np.float64]
    """nan without a click."""
    suits: NDArray[np.float64]
    """How well the item suits the user, which drives both outcomes."""


def logged(num_rows: int, seed: int) -> Log:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(NUM_USERS, size=num_rows), rng.integers(NUM_ITEMS, size=num_rows)
    suits = np.resize([-1.0, 1.0], NUM_USERS)[user] * np.resize([-1.0, 1.0, 1.0, -1.0], NUM_ITEMS)[item]
    clicked = rng.random(num_rows) < 1 / (1 + np.exp(1.5 - 0.7 * suits))
    seconds = np.exp(3 + suits + rng.normal(scale=0.4, size=num_rows))
    categorical = np.stack([1 + user, 1 + NUM_USERS + item], axis=1).astype(np.int32)
    rows = EncodedRows(SPEC, categorical, np.empty((num_rows, 0), np.float32), ())
    return Log(rows, clicked.astype(np.float32), np.where(clicked, seconds, np.nan), suits)


def trained(log: Log, *, second_task_weight: float) -> tuple[MultiTaskDeepFM, OutcomeScale]:
    torch.manual_seed(0)
    model = MultiTaskDeepFM(MultiTaskDeepFMConfig(embedding_dim=8, hidden=(16,), dropout=0.0, init_std=0.1), SPEC)
    model.set_output(bias=float(np.log(log.label.mean() / (1 - log.label.mean()))), scale=1.0)
    outcomes, scale = standardise_outcomes(log.seconds, log=True)
    examples = Examples(log.rows, log.label, outcomes=outcomes)
    held_out = np.arange(len(log.label)) % 5 == 0
    train, validation = (examples.take(np.flatnonzero(part)) for part in (~held_out, held_out))
    config = TrainingConfig(
        model="multi_task_deepfm", second_task_weight=second_task_weight, batch_size=500, learning_rate=0.01,
        embedding_learning_rate=0.03, id_dropout=0.0, max_epochs=20, patience=30, device="cpu",
    )  # fmt: skip
    fit_by_gradient(model, train, validation, config, kind=LogKind.IMPRESSIONS)
    return model.eval(), scale


@pytest.fixture(scope="module")
def fresh() -> Log:
    return logged(20_000, seed=2)


def test_both_outcomes_are_learned(fresh: Log) -> None:
    model, scale = trained(logged(8_000, seed=1), second_task_weight=0.3)
    with torch.no_grad():
        seconds = scale.restore(model.both(*fresh.rows.inputs())[1].numpy())
    for suits in (-1, 1):
        assert np.median(seconds[fresh.suits == suits]) == pytest.approx(np.exp(3 + suits), rel=0.25)
    assert auc(fresh.label, score_rows(model, fresh.rows)) > auc(fresh.label, fresh.suits) - 0.03


def test_second_outcome_finds_taste_where_clicks_are_too_few(fresh: Log) -> None:
    log = logged(4_000, seed=1)
    alone, together = (
        auc(fresh.label, score_rows(trained(log, second_task_weight=weight)[0], fresh.rows)) for weight in (0.0, 0.3)
    )
    assert together > alone + 0.05
