"""Each parameter is trained by what suits it, and a saved state takes the same steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evergreen.contracts.training_set import Side
from evergreen.models.inputs import PAD, CategoricalInput, InputSpec
from evergreen.models.layers import SharedTable
from evergreen.training.config import TrainingConfig
from evergreen.training.optimizers import Optimizers

SPEC = InputSpec(
    categorical=(CategoricalInput(name="item_id", side=Side.ITEM, start=1, num_rows=9),),
    numeric=(),
    num_indicators=0,
    bags=(),
    num_embeddings=10,
    untrained_rows=(PAD,),
)
CONFIG = TrainingConfig(
    learning_rate=0.01, embedding_learning_rate=0.2, bin_learning_rate=0.05, initial_accumulator=0.0
)


class Model(nn.Module):
    """One parameter of each sort, and a second table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = SharedTable(SPEC, 3, init_std=0.1)
        self.bin_table = nn.Parameter(torch.zeros(4, 1))
        self.dense = nn.Linear(3, 1, bias=False)
        self.other = SharedTable(SPEC, 5, init_std=0.1)

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(1, 10, (6, 1), generator=generator)
        scores = self.dense(self.table.lookup(rows)[:, 0]) + self.other.lookup(rows).sum(dim=(1, 2))[:, None]
        return (scores + self.bin_table[rows % 4, 0] - 1).square().mean()


def steps(model: Model, optimizers: Optimizers, seeds: range) -> None:
    for seed in seeds:
        model.loss(seed).backward()
        optimizers.step()


def test_first_steps_are_as_long_as_each_learning_rate_says() -> None:
    model, before = Model(), Model()
    (model.dense.weight.sum() + model.bin_table.sum() - model.table.lookup(torch.tensor([[4]])).sum()).backward()
    Optimizers(model, CONFIG).step()
    torch.testing.assert_close(before.dense.weight - model.dense.weight, torch.full((1, 3), 0.01))  # Adam
    torch.testing.assert_close(before.bin_table - model.bin_table, torch.full((4, 1), 0.05))  # Adagrad
    change = model.table.weight - before.table.weight
    torch.testing.assert_close(change[4], torch.full((3,), 0.2))  # row-wise Adagrad
    assert torch.equal(model.other.weight, before.other.weight)
    assert change.count_nonzero() == 3


def test_every_parameter_is_trained_once_in_the_order_of_the_module() -> None:
    model = Model()
    parameters = Optimizers(model, CONFIG).parameters
    expected = [model.table.weight, model.other.weight, model.bin_table, model.dense.weight]
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in expected]


def test_gradients_are_gone_after_a_step() -> None:
    model = Model()
    optimizers = Optimizers(model, CONFIG)
    steps(model, optimizers, range(1))
    assert all(parameter.grad is None for parameter in optimizers.parameters)


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_learning_rates_scale_from_where_they_started(factor: float) -> None:
    model, before = Model(), Model()
    optimizers = Optimizers(model, CONFIG)
    optimizers.scale_learning_rates(0.1)
    optimizers.scale_learning_rates(factor)  # of the start, not of the 0.1
    (model.dense.weight.sum() + model.table.lookup(torch.tensor([[4]])).sum()).backward()
    optimizers.step()
    torch.testing.assert_close(before.dense.weight - model.dense.weight, torch.full((1, 3), 0.01 * factor))
    torch.testing.assert_close((before.table.weight - model.table.weight)[4], torch.full((3,), 0.2 * factor))


def test_restored_optimizers_take_the_same_steps() -> None:
    through, stopped, resumed = Model(), Model(), Model()
    steps(through, Optimizers(through, CONFIG), range(6))
    first = Optimizers(stopped, CONFIG)
    steps(stopped, first, range(3))
    state = {name: value.clone() for name, value in first.state().items()}
    assert all(isinstance(value, torch.Tensor) for value in state.values())

    resumed.load_state_dict(stopped.state_dict())
    second = Optimizers(resumed, CONFIG)
    second.restore(state)
    steps(resumed, second, range(3, 6))
    for name, value in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_no_restoring_takes_other_steps() -> None:
    through, resumed = Model(), Model()
    first = Optimizers(through, CONFIG)
    steps(through, first, range(3))
    resumed.load_state_dict(through.state_dict())
    steps(through, first, range(3, 6))
    steps(resumed, Optimizers(resumed, CONFIG), range(3, 6))
    assert not torch.equal(resumed.dense.weight, through.dense.weight)


def test_models_without_tables_or_without_bins_are_trained() -> None:
    linear = nn.Linear(2, 1)
    linear(torch.ones(1, 2)).sum().backward()
    before = linear.weight.detach().clone()
    optimizers = Optimizers(linear, CONFIG)
    optimizers.step()
    torch.testing.assert_close(before - linear.weight, torch.full((1, 2), 0.01))
    assert len(optimizers.state()) == 6  # two parameters of Adam's: step and two averages
