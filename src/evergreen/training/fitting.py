"""The training loop: mini-batches over encoded rows in memory, early stopping on validation, the best weights kept."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.errors import TrainingError
from evergreen.models.base import RankingModel, score_rows
from evergreen.models.inputs import EncodedRows, ModelInputs
from evergreen.training.config import TrainingConfig

logger = logging.getLogger(__name__)

_ID_FIELDS = ("user_id", "item_id")

Loss = Callable[[Tensor, Tensor], Tensor]
"""(N,) scores and (N,) labels to the mean loss."""


@dataclass(frozen=True)
class Examples:
    """Encoded rows, and what is known of each beside its features. All arrays are (num_rows,)."""

    rows: EncodedRows
    labels: NDArray[np.float32]
    positions: NDArray[np.int32] | None = None
    """Where on the page it was shown, from 1; 0 where unknown. None when the log has no positions."""
    propensities: NDArray[np.float32] | None = None
    """Probability that the logging policy showed it; nan where unknown."""
    outcomes: NDArray[np.float32] | None = None
    """Of the second task, standardised; nan where there is none."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation: mean training loss since the one before, and validation loss."""

    step: int
    epoch: float
    train_loss: float | None
    """None before the first step."""
    validation_loss: float


def click_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits."""
    return functional.binary_cross_entropy_with_logits(scores, labels)


def rating_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared error."""
    return functional.mse_loss(scores, labels)


def fit_by_gradient(
    model: RankingModel, train: Examples, validation: Examples, config: TrainingConfig, *, loss: Loss
) -> list[CurvePoint]:
    """Train until validation stops getting better; leaves the best weights in the model.

    Args:
        model: fresh, with its output set to the base rate.
        train: rows to learn from.
        validation: rows that decide when to stop.
        config: how.
        loss: mean loss of scores and labels; for ratings it is divided by the labels' variance.

    Returns:
        The learning curve; the first point, step 0, is the base rate.

    Raises:
        TrainingError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    batch_size = min(config.batch_size, max(16, math.ceil(len(train) / config.min_steps_per_epoch)))
    steps_per_epoch = math.ceil(len(train) / batch_size)
    interval = max(1, steps_per_epoch // config.evaluations_per_epoch)
    optimizers = _optimizers(model, config)
    labels = torch.from_numpy(train.labels)
    unit = float(model.scale) ** 2
    watched = thin(validation, config.max_validation_rows)

    def validation_loss() -> float:
        return float(loss(torch.from_numpy(score_rows(model, watched.rows)), torch.from_numpy(watched.labels)))

    curve = [CurvePoint(0, 0.0, None, validation_loss())]
    best, best_weights = sys.float_info.max, _copy(model)
    waited, step, summed, started = 0, 0, 0.0, time.perf_counter()
    for batch in _batches(len(train), batch_size, config.max_epochs, generator):
        model.train()
        inputs = _drop_ids(train.rows, train.rows.inputs(batch.numpy()), config.id_dropout, generator)
        value = loss(model(*inputs), labels[batch])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (value / unit).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        summed += value.item()
        if step % interval:
            continue
        train_loss = summed / interval
        point = CurvePoint(step, step / steps_per_epoch, train_loss, validation_loss())
        curve.append(point)
        if not (math.isfinite(train_loss) and math.isfinite(point.validation_loss)):
            raise TrainingError(
                f"model {config.model}: the loss is {train_loss} in training and {point.validation_loss} on "
                f"validation at step {step}: lower learning_rate ({config.learning_rate}) and embedding_learning_rate "
                f"({config.embedding_learning_rate}), or look for extreme values in the labels"
            )
        rate = step * batch_size / (time.perf_counter() - started)
        logger.info(
            "%s epoch %.2f: loss %.5f, validation %.5f, %.0f samples/s",
            config.model, point.epoch, train_loss, point.validation_loss, rate,
        )  # fmt: skip
        summed = 0.0
        waited = 0 if point.validation_loss < best - config.min_improvement * abs(best) else waited + 1
        if point.validation_loss < best:
            best, best_weights = point.validation_loss, _copy(model)
        if waited >= config.patience:
            break
    model.load_state_dict(best_weights)
    return curve


def _optimizers(model: RankingModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Adagrad for parameters of which a batch looks up some rows, Adam for the others."""
    tables: list[nn.Parameter] = []
    bins: list[nn.Parameter] = []
    dense: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = tables if name.startswith("table.") else bins if name.endswith("bin_table") else dense
        group.append(parameter)
    groups = [(tables, config.embedding_learning_rate), (bins, config.bin_learning_rate)]
    adagrad = [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=config.learning_rate)]
    if adagrad:
        optimizers.append(torch.optim.Adagrad(adagrad, initial_accumulator_value=config.initial_accumulator))
    return optimizers


def _batches(num_rows: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.split(torch.randperm(num_rows, generator=generator), batch_size)


def _drop_ids(rows: EncodedRows, inputs: ModelInputs, rate: float, generator: torch.Generator) -> ModelInputs:
    """Read a share of user and item ids as unseen."""
    if rate == 0:
        return inputs
    categorical = inputs.categorical
    for place, field in enumerate(rows.spec.categorical):
        if field.name in _ID_FIELDS:
            dropped = torch.rand(len(categorical), generator=generator) < rate
            categorical[dropped, place] = field.unseen
    return inputs


def thin(examples: Examples, max_rows: int) -> Examples:
    """Every n-th row, such that at most `max_rows` are left."""
    step = math.ceil(len(examples) / max_rows)
    if step == 1:
        return examples
    return Examples(examples.rows.take(np.arange(0, len(examples), step)), examples.labels[::step])


def _copy(model: RankingModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
