"""What training minimises: mean losses of a batch, with row weights, class weights, focal loss and a second task.

A weighted loss is the sum of weight x loss over the number of rows, not over the sum of the weights: it is an unbiased
estimate for a batch of any size, where a division by the batch's own weights would pull rare heavy rows towards the
others, and the exact correction of scores with it. Weights that are 1 on average over the training rows keep losses
comparable. Losses are computed in float32 whatever the precision of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from evergreen.training.config import TrainingConfig

Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(N,) scores, (N,) labels and (N,) row weights, or None for all ones, to the mean loss, a scalar."""

TwoTaskObjective: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(N,) scores, labels, predictions of the second outcome, second outcomes (nan: unknown) and row weights or None, to
the loss of both tasks, a scalar."""


def click_objective(config: TrainingConfig) -> Objective:
    """Cross-entropy of log-odds or the focal loss; rows with a click count `positive_weight` times.

    Source: Lin et al. 2017, Focal loss for dense object detection, equation 4 and its alpha as a class weight.
    """
    gamma = config.focal_gamma if config.click_loss == "focal" else 0.0
    positive_weight = config.positive_weight

    def objective(scores: Tensor, labels: Tensor, row_weights: Tensor | None = None) -> Tensor:
        scores = scores.float()
        losses = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        if gamma > 0:
            # 1 - p of what happened, from its logarithm: exact where p is so near 1 that 1 - p would be 0.
            losses = losses * torch.exp(gamma * functional.logsigmoid(scores * (1 - 2 * labels)))
        if positive_weight != 1:
            losses = losses * (1 + (positive_weight - 1) * labels)
        return _mean(losses, row_weights)

    return objective


def rating_objective(scores: Tensor, labels: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Squared error; an `Objective`."""
    return _mean((scores.float() - labels).square(), row_weights)


def two_task_objective(config: TrainingConfig) -> TwoTaskObjective:
    """Loss of the click plus `second_task_weight` times that of the second outcome.

    Source: Caruana 1997, Multitask learning.
    """
    click = click_objective(config)
    weight = config.second_task_weight

    def objective(
        scores: Tensor, labels: Tensor, predicted: Tensor, outcomes: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        return click(scores, labels, row_weights) + weight * second_task_loss(predicted, outcomes)

    return objective


def second_task_loss(predicted: Tensor, outcomes: Tensor) -> Tensor:
    """Mean squared error over the rows whose outcome is known; 0, with gradients of 0, where none is.

    Args:
        predicted: (N,) standardised predictions.
        outcomes: (N,) standardised outcomes, nan where unknown.
    """
    known = ~torch.isnan(outcomes)
    # The unknown are replaced before they meet a prediction: nan times 0 is nan in the gradient, too.
    errors = torch.where(known, predicted.float() - torch.where(known, outcomes, 0.0), 0.0)
    return errors.square().sum() / known.sum().clamp(min=1)


def _mean(losses: Tensor, row_weights: Tensor | None) -> Tensor:
    return losses.mean() if row_weights is None else (losses * row_weights).mean()
