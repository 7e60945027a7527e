"""Losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from evergreen.training.config import TrainingConfig
from evergreen.training.objective import (
    click_objective,
    rating_objective,
    second_task_loss,
    two_task_objective,
)

SCORES = torch.tensor([-2.0, 0.5, 3.0, -0.1])
LABELS = torch.tensor([0.0, 1.0, 0.0, 1.0])


def best_probability(objective, click_rate: float) -> float:
    """The probability that an objective asks of rows with this click rate, found on a grid."""
    logit = torch.linspace(-8, 4, 24_001, dtype=torch.float64)
    losses = [
        click_rate * objective(z[None], torch.ones(1), None)
        + (1 - click_rate) * objective(z[None], torch.zeros(1), None)
        for z in logit[::20]
    ]
    return float(torch.sigmoid(logit[::20][int(torch.stack(losses).argmin())]))


def test_default_is_cross_entropy() -> None:
    expected = functional.binary_cross_entropy_with_logits(SCORES, LABELS)
    assert click_objective(TrainingConfig())(SCORES, LABELS, None) == pytest.approx(float(expected))


def test_class_weight_counts_a_click_several_times() -> None:
    weighted = click_objective(TrainingConfig(positive_weight=3.0))(SCORES, LABELS, None)
    repeated = torch.tensor([0, 1, 1, 1, 2, 3, 3, 3])
    total = functional.binary_cross_entropy_with_logits(SCORES[repeated], LABELS[repeated], reduction="sum")
    assert float(weighted) == pytest.approx(float(total) / 4)


def test_row_weight_counts_a_row_several_times_and_is_not_divided_out() -> None:
    objective = click_objective(TrainingConfig())
    assert float(objective(SCORES, LABELS, torch.full((4,), 2.0))) == pytest.approx(
        2 * float(objective(SCORES, LABELS, None))
    )
    parts = [float(objective(SCORES[i : i + 2], LABELS[i : i + 2], torch.tensor([5.0, 0.5]))) for i in (0, 2)]
    whole = float(objective(SCORES, LABELS, torch.tensor([5.0, 0.5, 5.0, 0.5])))
    assert whole == pytest.approx(sum(parts) / 2)  # the mean over batches is the mean over rows


def test_focal_loss_is_lin_et_als_formula() -> None:
    objective = click_objective(TrainingConfig(click_loss="focal", focal_gamma=1.5))
    expected = 0.0
    for score, label in zip(SCORES.tolist(), LABELS.tolist(), strict=True):
        p = 1 / (1 + math.exp(-score))
        of_what_happened = p if label else 1 - p
        expected -= (1 - of_what_happened) ** 1.5 * math.log(of_what_happened) / 4
    assert float(objective(SCORES, LABELS, None)) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_of_gamma_zero_is_cross_entropy() -> None:
    focal = click_objective(TrainingConfig(click_loss="focal", focal_gamma=0.0))
    assert float(focal(SCORES, LABELS, None)) == float(click_objective(TrainingConfig())(SCORES, LABELS, None))


def test_focal_loss_has_finite_gradients_however_sure_the_model_is() -> None:
    scores = torch.tensor([-200.0, 200.0, 200.0, -200.0], requires_grad=True)
    click_objective(TrainingConfig(click_loss="focal"))(scores, LABELS, None).backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1] == 0  # certain and right
    assert scores.grad[2] > 0  # certain and wrong: pushed down


def test_cross_entropy_asks_for_the_click_rate_and_the_focal_loss_does_not() -> None:
    assert best_probability(click_objective(TrainingConfig()), 0.1) == pytest.approx(0.1, rel=0.02)
    assert best_probability(click_objective(TrainingConfig(click_loss="focal")), 0.1) > 0.15


def test_rating_objective_is_the_squared_error() -> None:
    assert float(rating_objective(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), None)) == pytest.approx(5.0)
    weighted = rating_objective(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert float(weighted) == pytest.approx(1.0)


def test_half_precision_scores_give_a_float32_loss() -> None:
    for objective in (click_objective(TrainingConfig()), rating_objective):
        assert objective(SCORES.bfloat16(), LABELS, None).dtype is torch.float32


def test_second_task_is_the_mean_over_known_outcomes() -> None:
    outcomes = torch.tensor([float("nan"), 1.0, float("nan"), -1.0])
    assert float(second_task_loss(torch.tensor([9.0, 0.0, 9.0, 2.0]), outcomes)) == pytest.approx((1 + 9) / 2)


def test_unknown_outcomes_leave_no_trace_in_the_gradient() -> None:
    predicted = torch.tensor([9.0, 0.5], requires_grad=True)
    second_task_loss(predicted, torch.tensor([float("nan"), 0.0])).backward()
    assert predicted.grad.tolist() == [0.0, 1.0]


def test_batch_without_a_known_outcome_adds_nothing_and_can_be_differentiated() -> None:
    predicted = torch.tensor([9.0, 0.5], requires_grad=True)
    loss = second_task_loss(predicted, torch.full((2,), float("nan")))
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad.tolist() == [0.0, 0.0]


def test_two_tasks_add_up_by_their_weight() -> None:
    config = TrainingConfig(second_task_weight=0.3, positive_weight=2.0)
    outcomes = torch.tensor([float("nan"), 1.0, float("nan"), -1.0])
    predicted = torch.tensor([9.0, 0.0, 9.0, 2.0])
    total = two_task_objective(config)(SCORES, LABELS, predicted, outcomes, None)
    assert float(total) == pytest.approx(float(click_objective(config)(SCORES, LABELS, None)) + 0.3 * 5)
