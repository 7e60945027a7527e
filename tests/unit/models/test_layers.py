"""Networks against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from evergreen.models.inputs import PAD, BagInput, CategoricalInput, InputSpec, NumericInput
from evergreen.models.layers import FirstOrder, SharedTable

SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="a", side=Side.USER, start=1, num_rows=5),
        CategoricalInput(name="b", side=Side.ITEM, start=6, num_rows=4),
    ),
    numeric=(
        NumericInput(name="x", side=Side.USER, missing=2, zero=0.0, boundaries=(-0.5, 0.5)),
        NumericInput(name="y", side=Side.ITEM, missing=None, zero=0.0, boundaries=(0.0,)),
    ),
    num_indicators=1,
    bags=(BagInput(name="h", side=Side.USER, kind=ColumnKind.SEQUENCE, width=3),),
    num_embeddings=10,
    untrained_rows=(0, 1, 2, 6, 7),
)


def test_factorization_machine_is_the_sum_over_all_pairs() -> None:
    torch.manual_seed(0)
    model = FactorizationMachine(FactorizationMachineConfig(embedding_dim=4, init_std=0.5, history_exponent=1.0), SPEC)
    categorical, numeric = torch.tensor([[3, 8]]), torch.tensor([[0.7, -1.2, 0.0]])
    bags = torch.tensor([[4, 5, PAD]])
    table = model.table.weight.detach().numpy()[:, 1:]
    assert model.numeric_vectors is not None
    vectors = [table[3], table[8], (table[4] + table[5]) / 2]
    vectors += [x * v for x, v in zip(numeric[0].tolist(), model.numeric_vectors.detach().numpy(), strict=True)]
    expected = sum(left @ right for left, right in itertools.combinations(vectors, 2))
    assert model(categorical, numeric, bags).item() == pytest.approx(expected, rel=1e-4)


def test_rows_that_training_may_not_see_start_at_zero_and_padding_stays_there() -> None:
    table = SharedTable(SPEC, 4, init_std=0.5)
    assert not table.weight.detach()[[0, 1, 2, 6, 7]].any()
    table.pool(torch.tensor([[4, PAD, PAD]]), exponent=0.5).sum().backward()
    assert table.weight.grad is not None
    assert not table.weight.grad[PAD].any()
    assert table.weight.grad[4].all()


def test_long_history_counts_by_the_root_of_its_length() -> None:
    table = SharedTable(SPEC, 4, init_std=0.5)
    pooled = table.pool(torch.tensor([[3, 4, 5], [PAD, PAD, PAD]]), exponent=0.5)
    np.testing.assert_allclose(pooled[0, 0].detach(), table.weight.detach()[[3, 4, 5]].sum(0) / 3**0.5, rtol=1e-5)
    assert not pooled[1].any()


def test_number_finds_the_weight_of_its_bin() -> None:
    layer = FirstOrder(SPEC)
    with torch.no_grad():
        layer.bin_table.copy_(torch.arange(6.0)[:, None])  # x: bins 0 to 2; y: bins 3 to 5, of which 5 is never reached
    numeric = torch.tensor([[-9.0, -9.0, 0], [0.0, 0.0, 0], [9.0, 9.0, 0]])
    assert layer(numeric).tolist() == [0 + 3, 1 + 4, 2 + 4]
