"""What is minimised, and what validation is measured by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Side
from evergreen.models.base import RankingModel
from evergreen.models.inputs import EncodedRows, InputSpec, ModelInputs, NumericInput
from evergreen.training.config import TrainingConfig
from evergreen.training.task import Examples, TrainingTask

SPEC = InputSpec(
    categorical=(),
    numeric=(NumericInput(name="x", side=Side.ITEM, missing=None, zero=0.0, boundaries=()),),
    num_indicators=0,
    bags=(),
    num_embeddings=1,
    untrained_rows=(0,),
)
CPU = torch.device("cpu")


class Line(RankingModel):
    """score = bias + scale * x."""

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        return numeric[:, 0]


class TwoLines(Line):
    """And predicts 2 x of the second outcome."""

    def both(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> tuple[Tensor, Tensor]:
        return self(categorical, numeric, bags), 2 * numeric[:, 0]


class CountsClicks(Line):
    """A loss of its own: the mean of x over rows with a click."""

    prepared = 0

    def prepare(self, train: EncodedRows, labels: np.ndarray) -> None:
        self.prepared = len(labels)

    def training_loss(self, inputs: ModelInputs, labels: Tensor) -> Tensor:
        assert not self.training
        return inputs.numeric[labels > 0, 0].mean()


def examples(x: list[float], labels: list[float], **more: np.ndarray) -> Examples:
    numeric = np.array(x, np.float32)[:, None]
    rows = EncodedRows(SPEC, np.empty((len(x), 0), np.int32), numeric, ())
    return Examples(rows, np.array(labels, np.float32), **more)


def task(model: RankingModel, train: Examples, kind: LogKind = LogKind.IMPRESSIONS, **settings: object) -> TrainingTask:
    return TrainingTask(model, TrainingConfig(**settings), kind, train)


def losses(made: TrainingTask, train: Examples) -> tuple[float, float]:
    rows = np.arange(len(train))
    value, minimised = made.loss(train.rows.inputs(rows), train.targets(rows, CPU))
    return value.item(), minimised.item()


def cross_entropy(scores: list[float], labels: list[float]) -> float:
    return float(functional.binary_cross_entropy_with_logits(torch.Tensor(scores), torch.Tensor(labels)))


def test_clicks_are_measured_by_cross_entropy() -> None:
    train = examples([0.0, 1.0, -2.0], [1, 0, 1])
    assert losses(task(Line(SPEC), train), train) == pytest.approx((cross_entropy([0, 1, -2], [1, 0, 1]),) * 2)


def test_ratings_are_minimised_in_units_of_their_variance() -> None:
    train = examples([0.0, 1.0], [1.0, 5.0])
    model = Line(SPEC)
    model.set_output(bias=3.0, scale=2.0)
    assert losses(task(model, train, LogKind.RATINGS), train) == pytest.approx((2.0, 2.0 / 4))


def test_row_weights_count_in_training_and_not_in_validation() -> None:
    x, labels = [0.5, 1.0, -2.0], [1.0, 0.0, 1.0]
    train = examples(x, labels, weights=np.array([3.0, 0.0, 0.0], np.float32))
    made = task(Line(SPEC), train)
    assert losses(made, train)[0] == pytest.approx(cross_entropy([0.5], [1]))
    assert made.evaluate(train, batch_size=2) == pytest.approx((3 * cross_entropy(x, labels), 3))


def test_validation_corrects_scores_for_thinned_negatives_and_weighted_positives() -> None:
    train = examples([0.0, 1.0, -2.0], [1, 0, 1])
    made = task(Line(SPEC), train, negative_rate=0.25, positive_weight=2.0)
    shift = math.log(0.25 / 2)
    assert made.correction == pytest.approx(shift)
    expected = cross_entropy([shift, 1 + shift, shift - 2], [1, 0, 1])
    assert made.evaluate(train, batch_size=2)[0] == pytest.approx(3 * expected)


def test_focal_scores_and_ratings_are_not_corrected() -> None:
    train = examples([0.0, 1.0], [1, 0])
    assert task(Line(SPEC), train, negative_rate=0.25, click_loss="focal").correction == 0
    assert task(Line(SPEC), train, LogKind.RATINGS, negative_rate=0.25).correction == 0


def test_position_adds_to_scores_and_its_prior_to_what_is_minimised() -> None:
    train = examples([0.0, 1.0], [1, 0], positions=np.array([2, 0], np.int32))
    made = task(Line(SPEC), train)
    assert made.position is not None
    with torch.no_grad():
        made.position.bin_table[2] = 0.3
    effect = made.position(torch.tensor([2])).item()
    value, minimised = losses(made, train)
    assert value == pytest.approx(cross_entropy([effect, 1], [1, 0]))  # an unknown position adds nothing
    assert minimised == pytest.approx(value + effect**2 / (2 * 2))
    assert made.evaluate(train, batch_size=2)[0] == pytest.approx(2 * value)


def test_positions_that_are_all_unknown_have_no_effect() -> None:
    train = examples([0.0, 1.0], [1, 0], positions=np.zeros(2, np.int32))
    assert task(Line(SPEC), train).position is None


def test_second_outcome_adds_its_squared_error_where_it_is_known() -> None:
    train = examples([0.0, 1.0], [1, 0], outcomes=np.array([np.nan, 5.0], np.float32))
    value, minimised = losses(task(TwoLines(SPEC), train, second_task_weight=0.5), train)
    assert value == pytest.approx(cross_entropy([0, 1], [1, 0]))
    assert minimised == pytest.approx(value + 0.5 * (5 - 2) ** 2)


def test_model_with_one_task_leaves_outcomes_alone() -> None:
    train = examples([0.0, 1.0], [1, 0], outcomes=np.array([np.nan, 5.0], np.float32))
    value, minimised = losses(task(Line(SPEC), train), train)
    assert minimised == value


def test_loss_of_a_models_own_is_measured_per_click_in_batches() -> None:
    train = examples([1.0, 9.0, 3.0, 5.0, 9.0, 9.0], [1, 0, 1, 1, 0, 0])
    model = CountsClicks(SPEC)
    made = task(model, train)
    made.train()
    assert model.prepared == 6
    assert made.evaluate(train, batch_size=2) == pytest.approx((1 + 3 + 5, 3))  # and no nan of the last two rows
    assert made.training


def test_ratings_are_not_measured_by_a_models_own_loss() -> None:
    train = examples([1.0, 2.0], [1, 5])
    made = task(CountsClicks(SPEC), train, LogKind.RATINGS)
    assert made.own_loss is None
    assert made.evaluate(train, batch_size=2) == pytest.approx((9, 2))


def test_no_rows_have_no_loss() -> None:
    train = examples([1.0, 2.0], [1, 0])
    none = train.take(np.empty(0, np.int64))
    assert task(Line(SPEC), train).evaluate(none, batch_size=2) == (0, 0)


def test_examples_are_taken_with_all_that_is_known_of_them() -> None:
    more = {name: np.array([1, 2, 3], np.float32) for name in ("weights", "outcomes")}
    train = examples([0.0, 1.0, 2.0], [1, 0, 1], positions=np.array([1, 2, 3], np.int32), **more)
    taken = train.take(np.array([2, 0]))
    assert taken.rows.numeric[:, 0].tolist() == [2, 0]
    for column in (taken.positions, taken.weights, taken.outcomes):
        assert column is not None
        assert column.tolist() == [3, 1]
