"""Row-wise Adagrad against its definition, its two implementations against each other."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD
from evergreen.training import row_wise_adagrad
from evergreen.training.row_wise_adagrad import RowWiseAdagrad, update_rows

OPTIONS = {"lr": 0.1, "initial_accumulator_value": 1e-3, "eps": 1e-8}


def table(num_rows: int = 50, width: int = 17) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)))


def zipf_ids(num_rows: int, size: int, seed: int) -> Tensor:
    """Row 1 is every fifth one or so; PAD occurs."""
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return (num_rows**uniform).long() - 1


def sparse(rows: list[int], values: list[list[float]], num_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.tensor(values), (num_rows, len(values[0])), check_invariants=True
    )


def train(parameter: nn.Parameter, optimizer: RowWiseAdagrad, seeds: range) -> None:
    """Steps with gradients of very different sizes, from a lookup and a bag."""
    for seed in seeds:
        ids = zipf_ids(len(parameter), 400, seed)
        optimizer.zero_grad()
        looked_up = functional.embedding(ids[:300], parameter, sparse=True)
        bags = functional.embedding_bag(ids[300:].reshape(20, 5), parameter, mode="sum", padding_idx=PAD, sparse=True)
        (looked_up.square().sum() + bags.exp().sum()).backward()
        optimizer.step()


@pytest.fixture(params=["compiled", "tensor operations"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tensor operations":
        monkeypatch.setattr(row_wise_adagrad, "_update_compiled", update_rows)


@pytest.mark.usefixtures("implementation")
def test_step_is_its_definition_on_the_sum_of_duplicates() -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = RowWiseAdagrad([weight], lr=0.5, initial_accumulator_value=2.0, eps=0.25)
    weight.grad = sparse([3, 1, 3], [[1.0, 2.0], [7.0, 1.0], [2.0, 2.0]], 4)
    optimizer.step()
    of_3 = 2.0 + (3.0**2 + 4.0**2) / 2  # summed first: squares of 3 and 4
    of_1 = 2.0 + (7.0**2 + 1.0**2) / 2
    step_3, step_1 = 0.5 / (of_3**0.5 + 0.25), 0.5 / (of_1**0.5 + 0.25)
    expected = [[1, 1], [1 - 7 * step_1, 1 - step_1], [1, 1], [1 - 3 * step_3, 1 - 4 * step_3]]
    np.testing.assert_allclose(weight.detach(), np.array(expected), rtol=1e-6)
    np.testing.assert_allclose(optimizer.state[weight]["accumulator"][:, 0], [2.0, of_1, 2.0, of_3], rtol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_split_columns_have_an_accumulator_of_their_own() -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = RowWiseAdagrad([weight], lr=1.0, eps=0.0, split=1)
    weight.grad = sparse([2], [[100.0, 3.0, 4.0]], 3)
    optimizer.step()
    of_rest = (12.5) ** 0.5
    np.testing.assert_allclose(weight[2].detach(), [-1.0, -3 / of_rest, -4 / of_rest], rtol=1e-6)
    np.testing.assert_allclose(optimizer.state[weight]["accumulator"][2], [10_000.0, 12.5], rtol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_padding_and_rows_without_a_gradient_stay_as_they_are() -> None:
    weight = table(5, 2)
    before = weight.detach().clone()
    optimizer = RowWiseAdagrad([weight], lr=0.1, weight_decay=0.5)
    weight.grad = sparse([PAD, 2, PAD], [[1.0, 1.0], [1.0, 2.0], [3.0, 3.0]], 5)
    optimizer.step()
    changed = (weight != before).any(dim=1)
    assert changed.tolist() == [False, False, True, False, False]
    assert optimizer.state[weight]["accumulator"].count_nonzero() == 1


@pytest.mark.usefixtures("implementation")
def test_weight_decay_is_a_gradient_of_the_rows_touched() -> None:
    weight, other = table(6, 4), table(6, 4)
    gradient = torch.zeros(6, 4)
    gradient[3] = torch.tensor([1.0, -1.0, 2.0, 0.0])
    decayed, plain = RowWiseAdagrad([weight], lr=0.1, weight_decay=0.3), RowWiseAdagrad([other], lr=0.1)
    weight.grad = gradient.to_sparse(1)
    penalty = torch.zeros(6, 4)
    penalty[3] = 0.3 * other.detach()[3]
    other.grad = (gradient + penalty).to_sparse(1)
    decayed.step()
    plain.step()
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_dense_gradient_steps_like_the_sparse_one() -> None:
    weight, other = table(6, 4), table(6, 4)
    gradient = torch.zeros(6, 4)
    gradient[[2, 5]] = torch.randn(2, 4)
    for parameter, given in ((weight, gradient), (other, gradient.to_sparse(1))):
        parameter.grad = given
        RowWiseAdagrad([parameter], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(weight, other)
    assert torch.equal(weight[[0, 1, 3, 4]], table(6, 4)[[0, 1, 3, 4]])


@pytest.mark.parametrize("width", [1, 2, 17, 33, 64])
@pytest.mark.parametrize("split", [0, 1])
def test_compiled_loop_agrees_with_tensor_operations(width: int, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, reference = table(width=width), table(width=width)
    train(compiled, RowWiseAdagrad([compiled], weight_decay=0.01, split=split, **OPTIONS), range(10))
    monkeypatch.setattr(row_wise_adagrad, "_update_compiled", update_rows)
    train(reference, RowWiseAdagrad([reference], weight_decay=0.01, split=split, **OPTIONS), range(10))
    torch.testing.assert_close(compiled, reference, rtol=1e-6, atol=1e-6)


def test_one_column_is_adagrad() -> None:
    row_wise, plain = table(width=1), table(width=1)
    with torch.no_grad():
        row_wise[PAD] = plain[PAD] = 0.0
    ours, theirs = RowWiseAdagrad([row_wise], **OPTIONS), torch.optim.Adagrad([plain], **OPTIONS)
    for seed in range(5):
        for parameter, optimizer in ((row_wise, ours), (plain, theirs)):
            optimizer.zero_grad()
            ids = zipf_ids(50, 300, seed).clamp(min=1)
            (functional.embedding(ids, parameter, sparse=True) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(row_wise, plain, rtol=1e-5, atol=1e-6)


def test_training_resumed_from_a_file_takes_the_same_steps(tmp_path: Path) -> None:
    through, stopped = table(), table()
    train(through, RowWiseAdagrad([through], split=1, **OPTIONS), range(8))
    optimizer = RowWiseAdagrad([stopped], split=1, **OPTIONS)
    train(stopped, optimizer, range(5))
    state = optimizer.state_dict()
    groups = copy.deepcopy(state["param_groups"])
    save_file({f"{key}.{name}": value for key, entry in state["state"].items() for name, value in entry.items()},
              tmp_path / "state.safetensors")  # fmt: skip

    resumed = nn.Parameter(stopped.detach().clone())
    optimizer = RowWiseAdagrad([resumed], split=1, lr=9.0)
    loaded: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(tmp_path / "state.safetensors").items():
        key, _, entry = name.partition(".")
        loaded.setdefault(int(key), {})[entry] = value
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})
    train(resumed, optimizer, range(5, 8))
    assert torch.equal(resumed, through)


def test_zipf_ids_do_not_make_it_diverge() -> None:
    """One id in five is the same: a step for each of its occurrences would be hundreds of times too long."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(200, 1))
    optimizer = RowWiseAdagrad([weight], lr=0.5)
    truth = torch.randn(200, generator=generator)
    losses = []
    for seed in range(30):
        ids = zipf_ids(200, 2000, seed)
        labels = torch.bernoulli(torch.sigmoid(truth[ids]), generator=generator)
        optimizer.zero_grad()
        scores = functional.embedding(ids, weight, sparse=True).squeeze(1)
        loss = functional.binary_cross_entropy_with_logits(scores, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) == losses[0] == pytest.approx(np.log(2))
    assert np.mean(losses[-5:]) < losses[0] - 0.05


def test_learning_rate_may_change_between_steps() -> None:
    weight = table(3, 2)
    optimizer = RowWiseAdagrad([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    weight.grad = sparse([1], [[1.0, 2.0]], 3)
    optimizer.step()
    assert torch.equal(weight, table(3, 2))


def test_what_it_cannot_update_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"shape \(3,\).*give other parameters to Adam"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(TrainingError, match=r"float16"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(3, 2, dtype=torch.float16))], lr=0.1)
    with pytest.raises(TrainingError, match=r"weight_decay=-1: must be 0 or more"):
        RowWiseAdagrad([table()], lr=0.1, weight_decay=-1)


def test_it_steps_where_numba_cannot_write_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only container: numba finds no place for its cache and says so with a RuntimeError."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    row_wise_adagrad._compiled_kernel.cache_clear()
    weight, other = table(), table()
    try:
        train(weight, RowWiseAdagrad([weight], **OPTIONS), range(2))
    finally:
        row_wise_adagrad._compiled_kernel.cache_clear()
    monkeypatch.setattr(row_wise_adagrad, "_update_compiled", update_rows)
    train(other, RowWiseAdagrad([other], **OPTIONS), range(2))
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


def test_importing_it_does_not_import_numba() -> None:
    code = "import sys, evergreen.training.row_wise_adagrad; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
