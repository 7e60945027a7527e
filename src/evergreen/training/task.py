"""What is minimised: the model, and around it what only training needs (the position's effect, a second outcome)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evergreen.contracts.mapping import LogKind
from evergreen.metrics.binary import auc
from evergreen.models.base import OwnLoss, RankingModel, TwoTasks, score_rows
from evergreen.models.inputs import EncodedRows, ModelInputs
from evergreen.models.position import PositionEffect
from evergreen.training.config import TrainingConfig
from evergreen.training.imbalance import score_correction
from evergreen.training.objective import click_objective, rating_objective, second_task_loss


@dataclass(frozen=True)
class Examples:
    """Encoded rows, and what is known of each beside its features. All arrays are (num_rows,)."""

    rows: EncodedRows
    labels: NDArray[np.float32]
    positions: NDArray[np.int32] | None = None
    """Where on the page it was shown, from 1; 0 where unknown. None: positions are not to be learned."""
    weights: NDArray[np.float32] | None = None
    """Of each row in the loss, 1 on average."""
    outcomes: NDArray[np.float32] | None = None
    """Of the second task, standardised; nan where there is none."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """The chosen rows, in the order chosen."""
        return Examples(
            self.rows.take(rows),
            self.labels[rows],
            None if self.positions is None else self.positions[rows],
            None if self.weights is None else self.weights[rows],
            None if self.outcomes is None else self.outcomes[rows],
        )

    def targets(self, rows: NDArray[np.int64], device: torch.device) -> Targets:
        """All but the features of the chosen rows, as tensors."""
        columns = (self.labels, self.positions, self.weights, self.outcomes)
        return Targets(*(None if c is None else torch.from_numpy(c[rows]).to(device) for c in columns))  # type: ignore[arg-type]


class Targets(NamedTuple):
    """See `Examples`; (N,) each."""

    labels: Tensor
    positions: Tensor | None
    weights: Tensor | None
    outcomes: Tensor | None


class TrainingTask(nn.Module):
    """A model to train, and its loss on a batch."""

    def __init__(self, model: RankingModel, config: TrainingConfig, kind: LogKind, train: Examples) -> None:
        """Decide what is minimised.

        Args:
            model: with its output set to the base rate.
            config: which losses, and how the position is read.
            kind: squared error for ratings; else that of clicks, or the model's own.
            train: rows to learn from.
        """
        super().__init__()
        self.model = model
        self.own_loss = model if kind is not LogKind.RATINGS and isinstance(model, OwnLoss) else None
        self._two_tasks = model if train.outcomes is not None and isinstance(model, TwoTasks) else None
        self._second_task_weight = config.second_task_weight
        self._click_kind = kind is not LogKind.RATINGS
        self._objective = click_objective(config) if self._click_kind else rating_objective
        self._plain_objective = (
            click_objective(config.model_copy(update={"positive_weight": 1.0}))
            if self._click_kind
            else rating_objective
        )
        self._unit = float(model.scale) ** 2
        self._num_rows = len(train)
        self.correction = 0.0
        if self._click_kind and config.click_loss == "cross_entropy" and self.own_loss is None:
            self.correction = score_correction(
                negative_rate=config.negative_rate, positive_weight=config.positive_weight
            )
        self.position: PositionEffect | None = None
        if train.positions is not None and train.positions.max(initial=0) > 0 and self.own_loss is None:
            self.position = PositionEffect(int(train.positions.max()))
        if self.own_loss is not None:
            self.own_loss.prepare(train.rows, train.labels)

    def loss(self, inputs: ModelInputs, targets: Targets) -> tuple[Tensor, Tensor]:
        """Mean loss of the batch, for people; and what is differentiated: ratings in units of their variance."""
        if self.own_loss is not None:
            value = self.own_loss.training_loss(inputs, targets.labels)
            return value, value
        extra: Tensor | float = 0.0
        if self._two_tasks is not None and targets.outcomes is not None:
            scores, predicted = self._two_tasks.both(*inputs)
            extra = self._second_task_weight * second_task_loss(predicted, targets.outcomes)
        else:
            scores = self.model(*inputs)
        if self.position is not None and targets.positions is not None:
            scores = scores + self.position(targets.positions)
            extra = extra + self.position.penalty(self._num_rows)
        value = self._objective(scores, targets.labels, targets.weights)
        return value, value / self._unit + extra

    def auc(self, examples: Examples) -> float:
        """AUC of the scores at the positions where rows were shown; 0.5 where only one class occurs."""
        scores = self._shown_scores(examples).numpy()
        value = auc(examples.labels.astype(np.float64), scores)
        return value if math.isfinite(value) else 0.5

    def _shown_scores(self, examples: Examples) -> Tensor:
        """(num_rows,) float64 scores of all rows alike, the effects of their positions included."""
        scores = torch.from_numpy(score_rows(self.model, examples.rows)).double() + self.correction
        if self.position is not None and examples.positions is not None:
            with torch.inference_mode():
                effects = self.position(torch.from_numpy(examples.positions).to(self.model.bias.device))
            scores = scores + effects.cpu()
        return scores

    def evaluate(self, examples: Examples, *, batch_size: int) -> tuple[float, float]:
        """Sum of the losses of rows as they are, neither thinned nor weighted, and the number of rows.

        A model with a loss of its own is measured by that, in batches of the size that it is trained with, and per
        row with label 1.
        """
        if len(examples) == 0:  # this process's share of a few rows
            return 0.0, 0.0
        device = self.model.bias.device
        with torch.inference_mode():
            if self.own_loss is not None:
                return self._evaluate_own_loss(self.own_loss, examples, batch_size, device)
            value = self._plain_objective(self._shown_scores(examples), torch.from_numpy(examples.labels), None)
        return float(value) * len(examples), float(len(examples))

    def _evaluate_own_loss(
        self, own_loss: OwnLoss, examples: Examples, batch_size: int, device: torch.device
    ) -> tuple[float, float]:
        training = self.training
        self.eval()
        total, count = 0.0, 0.0
        for start in range(0, len(examples), batch_size):
            rows = slice(start, start + batch_size)
            positives = float(examples.labels[rows].sum())
            if positives > 0:
                labels = torch.from_numpy(examples.labels[rows]).to(device)
                total += positives * float(own_loss.training_loss(examples.rows.inputs(rows).to(device), labels))
                count += positives
        self.train(training)
        return total, count
