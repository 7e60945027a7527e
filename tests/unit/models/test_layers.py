"""Networks against their definitions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from evergreen.contracts.errors import TrainingError
from evergreen.models import layers
from evergreen.models.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from evergreen.models.inputs import PAD
from evergreen.models.layers import FirstOrder, SharedTable
from tests.unit.models.small_spec import SPEC


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
    gradient = table.weight.grad.to_dense()
    assert not gradient[PAD].any()
    assert gradient[4].all()


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


def test_field_with_a_second_row_is_the_sum_of_both() -> None:
    spec = SPEC.model_copy(update={"second_rows": (1,)})
    table = SharedTable(spec, 4, init_std=0.5)
    weight = table.weight.detach()
    looked_up = table.lookup(torch.tensor([[3, 8, 9], [4, 8, PAD]]))
    expected = [torch.stack([weight[3], weight[8] + weight[9]]), torch.stack([weight[4], weight[8]])]
    torch.testing.assert_close(looked_up.detach(), torch.stack(expected))
    looked_up[0].sum().backward()
    assert table.weight.grad is not None
    touched = table.weight.grad.to_dense().any(dim=1)
    assert touched.nonzero().flatten().tolist() == [3, 8, 9]


def test_gradients_hold_the_rows_of_the_batch_alone() -> None:
    table = SharedTable(SPEC, 4, init_std=0.5)
    looked_up, pooled = table.lookup(torch.tensor([[3, 8]])), table.pool(torch.tensor([[4, 5, PAD]]), exponent=1.0)
    (looked_up.sum() + pooled.sum()).backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert sorted(table.weight.grad._indices()[0].tolist()) == [3, 4, 5, 8]


def test_table_takes_short_and_long_integers_alike() -> None:
    table = SharedTable(SPEC, 4, init_std=0.5)
    fields, bags = torch.tensor([[3, 8]]), torch.tensor([[4, 5, PAD]])
    assert torch.equal(table.lookup(fields), table.lookup(fields.int()))
    assert torch.equal(table.pool(bags, exponent=0.5), table.pool(bags.int(), exponent=0.5))


def test_equal_seeds_give_equal_tables() -> None:
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        tables.append(SharedTable(SPEC, 4, init_std=0.5).weight.detach())
    assert torch.equal(*tables)
    assert tables[0][[3, 4, 5, 8, 9]].std().item() == pytest.approx(0.5, rel=0.5)


def test_exported_table_gives_the_same_rows_for_any_number_of_inputs() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = SharedTable(SPEC.model_copy(update={"second_rows": (0,)}), 4, init_std=0.5)

        def forward(self, fields: torch.Tensor, bags: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.table.lookup(fields), self.table.pool(bags, exponent=0.5)], dim=1)

    module, rows = Both().eval(), torch.export.Dim("rows", min=1)
    example = (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64))
    program = torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}))
    fields, bags = torch.randint(10, (7, 3)), torch.randint(10, (7, 3))
    torch.testing.assert_close(program.module()(fields, bags), module(fields, bags))


def test_table_larger_than_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "available_memory", lambda: 3 * 2**30)
    spec = SPEC.model_copy(update={"num_embeddings": 10**12})  # 62 TiB: making it would fail in another way
    with pytest.raises(TrainingError, match=r"1,000,000,000,000 rows of 17.*3\.0 GiB.*max_categories.*embedding_dim"):
        SharedTable(spec, 17, init_std=0.02)


def test_copies_count_towards_the_memory_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "available_memory", lambda: 10 * 4 * 4)
    layers.check_table_memory(10, 4)
    with pytest.raises(TrainingError, match=r"2 x 0\.0 GiB"):
        layers.check_table_memory(10, 4, copies=2)


@pytest.mark.parametrize(
    ("limit", "used", "key"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_of_a_container_is_its_limit_less_what_it_cannot_give_back(
    limit: str, used: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_CGROUP", tmp_path)
    for name, text in ((limit, "5000\n"), (used, "3000\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / used).with_name("memory.stat").write_text(f"anon 2500\n{key} 400\n")
    assert layers.available_memory() == 5000 - 3000 + 400


def test_container_without_a_limit_has_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert layers.available_memory() > 2**20
