"""Where position and quality are confounded, correcting for position moves the ranking towards quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evergreen.contracts.training_set import Side
from evergreen.models.base import score_rows
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec
from evergreen.models.logistic_regression import LogisticRegression, LogisticRegressionConfig
from evergreen.models.position import PositionEffect, examination_weights
from evergreen.training.config import TrainingConfig
from evergreen.training.objective import click_objective

NUM_ITEMS, NUM_POSITIONS, NUM_SLATES = 40, 8, 15_000
SPEC = InputSpec(
    categorical=(CategoricalInput(name="item_id", side=Side.ITEM, start=1, num_rows=NUM_ITEMS),),
    numeric=(),
    num_indicators=0,
    bags=(),
    num_embeddings=1 + NUM_ITEMS,
    untrained_rows=(0,),
)


@dataclass(frozen=True)
class Log:
    """Impressions, (n,) each, and the quality of the items, (NUM_ITEMS,): the log-odds of a click once looked at."""

    item: NDArray[np.int64]
    position: NDArray[np.int64]
    label: NDArray[np.float32]
    quality: NDArray[np.float64]

    @property
    def rows(self) -> EncodedRows:
        item = (1 + self.item[:, None]).astype(np.int32)
        return EncodedRows(SPEC, item, np.empty((len(item), 0), np.float32), ())


@pytest.fixture(scope="module")
def log() -> Log:
    """Slates sorted by an old opinion of the items, which knows little of their quality, and some noise."""
    rng = np.random.default_rng(0)
    quality, opinion = rng.normal(-2.0, 0.7, NUM_ITEMS), rng.normal(size=NUM_ITEMS)
    slates = np.argsort(rng.random((NUM_SLATES, NUM_ITEMS)), axis=1)[:, :NUM_POSITIONS]
    placed = np.argsort(-(opinion[slates] + rng.normal(scale=0.7, size=slates.shape)), axis=1)
    item = np.take_along_axis(slates, placed, axis=1).ravel()
    position = np.tile(np.arange(1, NUM_POSITIONS + 1), NUM_SLATES)
    p = 1 / position / (1 + np.exp(-quality[item]))
    return Log(item, position, (rng.random(len(p)) < p).astype(np.float32), quality)


def item_scores(log: Log, method: str) -> NDArray[np.float32]:
    """(NUM_ITEMS,) scores of a logistic regression on the item that was trained by `method`."""
    torch.manual_seed(0)
    model, effect = LogisticRegression(LogisticRegressionConfig(), SPEC), PositionEffect(NUM_POSITIONS)
    model.set_output(bias=float(np.log(log.label.mean())), scale=1.0)
    weights = None
    if method == "inverse_propensity":
        weights = torch.from_numpy(examination_weights(log.position, log.label, items=log.item).weights)
    objective = click_objective(TrainingConfig())
    inputs, labels, positions = log.rows.inputs(), torch.from_numpy(log.label), torch.from_numpy(log.position)
    trained = [*model.parameters(), *(effect.parameters() if method == "effect" else [])]
    optimizer = torch.optim.LBFGS(trained, max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective(model(*inputs) + effect(positions), labels, weights) + effect.penalty(len(labels))
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        model.bias += effect.constant(log.position)
    items = np.arange(NUM_ITEMS)
    return score_rows(model, Log(items, items, labels.numpy(), log.quality).rows)


@pytest.fixture(scope="module")
def scores(log: Log) -> dict[str, NDArray[np.float32]]:
    return {method: item_scores(log, method) for method in ("ignore", "effect", "inverse_propensity")}


def test_position_ignored_ranks_items_by_where_they_were_shown(
    log: Log, scores: dict[str, NDArray[np.float32]]
) -> None:
    mean_position = np.bincount(log.item, log.position) / np.bincount(log.item)
    assert spearmanr(scores["ignore"], -mean_position).statistic > 0.6
    assert spearmanr(scores["ignore"], log.quality).statistic < 0.8


@pytest.mark.parametrize("method", ["effect", "inverse_propensity"])
def test_correction_moves_the_ranking_towards_quality(
    method: str, log: Log, scores: dict[str, NDArray[np.float32]]
) -> None:
    before, after = (spearmanr(scores[name], log.quality).statistic for name in ("ignore", method))
    assert after > before + 0.15
    assert after > 0.9


@pytest.mark.parametrize("method", ["effect", "inverse_propensity"])
def test_scores_without_a_position_predict_as_many_clicks_as_there_are(
    method: str, log: Log, scores: dict[str, NDArray[np.float32]]
) -> None:
    mean = (1 / (1 + np.exp(-scores[method][log.item].astype(np.float64)))).mean()
    assert mean == pytest.approx(log.label.mean(), rel=0.05)
