"""DCN-v2 against its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evergreen.models.dcn_v2 import DCNv2, DCNv2Config
from evergreen.models.export import export_program
from evergreen.models.factorization_machine import FactorizationMachine, FactorizationMachineConfig
from tests.unit.models.small_spec import SPEC, some_rows, without_zeros

STRUCTURES = [
    {"structure": structure, "rank": rank, "hidden": hidden}
    for structure in ("parallel", "stacked")
    for rank, hidden in ((None, (5,)), (2, (5, 3)), (None, ()))
]


def model_without_zeros(**settings: object) -> DCNv2:
    """A model in which every part has a say: as after training."""
    torch.manual_seed(0)
    return without_zeros(DCNv2(DCNv2Config(embedding_dim=4, **settings), SPEC))


def linear(layer: torch.nn.Module, x: NDArray[np.float32]) -> NDArray[np.float32]:
    weight, bias = layer.weight.detach().numpy(), layer.bias
    return weight @ x + (0.0 if bias is None else bias.detach().numpy())


@pytest.mark.parametrize("settings", STRUCTURES)
def test_score_is_the_factorization_machine_plus_cross_layers_and_deep_part(settings: dict[str, object]) -> None:
    model = model_without_zeros(cross_layers=2, **settings)
    inputs = some_rows(1)
    weights, vectors = model.rows(inputs.categorical, inputs.bags)
    x0 = np.concatenate([vectors.detach().numpy().ravel(), np.clip(inputs.numeric[0].numpy(), -3, 3)])
    x = x0
    for layer in model.cross:
        steps = [layer.linear] if settings["rank"] is None else layer.linear
        product = x
        for step in steps:
            product = linear(step, product)
        x = x0 * product + x
    deep = x0 if settings["structure"] == "parallel" else x
    for layer in model.deep:
        if isinstance(layer, torch.nn.Linear):
            deep = np.maximum(linear(layer, deep), 0.0)
    x = np.concatenate([x, deep]) if settings["structure"] == "parallel" else deep
    expected = model.interactions(weights, vectors, inputs.numeric).item() + linear(model.last, x)[0]
    assert model(*inputs).item() == pytest.approx(expected + model.bias.item(), rel=1e-4)


def test_low_rank_is_a_full_matrix_of_that_rank() -> None:
    model = model_without_zeros(rank=2)
    layer = model.cross[0]
    down, up = layer.linear
    full = (up.weight @ down.weight).detach()
    assert torch.linalg.matrix_rank(full) == 2
    x0, x = torch.randn(3, full.shape[0]), torch.randn(3, full.shape[0])
    torch.testing.assert_close(layer(x0, x), x0 * (x @ full.T + up.bias) + x)


def test_training_starts_from_the_factorization_machine() -> None:
    torch.manual_seed(0)
    model = DCNv2(DCNv2Config(embedding_dim=4, init_std=0.5), SPEC)
    machine = FactorizationMachine(
        FactorizationMachineConfig(embedding_dim=4, init_std=0.5, numeric_interactions=False), SPEC
    )
    machine.load_state_dict(model.state_dict(), strict=False)
    inputs = some_rows(20)
    torch.testing.assert_close(model(*inputs), machine(*inputs))


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.to_dense().any())  # the table's gradient is sparse


@pytest.mark.parametrize("settings", STRUCTURES)
def test_every_parameter_learns(settings: dict[str, object]) -> None:
    model = model_without_zeros(numeric_interactions=True, **settings)
    model(*some_rows(50)).square().sum().backward()
    dead = [name for name, parameter in model.named_parameters() if not has_gradient(parameter)]
    assert dead == []


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
def test_score_of_a_row_does_not_depend_on_the_rows_beside_it(structure: str) -> None:
    model = model_without_zeros(structure=structure)
    inputs = some_rows(12)
    alone = [model(*(tensor[i : i + 1] for tensor in inputs)) for i in range(12)]
    torch.testing.assert_close(model(*inputs), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_missing_number_scores_unlike_the_mean() -> None:
    model = model_without_zeros()
    inputs = some_rows(1)
    rows = [tensor.expand(2, -1) for tensor in (inputs.categorical, inputs.bags)]
    at_mean, missing = model(rows[0], torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), rows[1])
    assert abs(at_mean - missing) > 1e-3


def test_extreme_number_moves_products_no_further_than_three_standard_deviations() -> None:
    model = model_without_zeros()
    inputs = some_rows(2)
    rows = [tensor[:1].expand(2, -1) for tensor in (inputs.categorical, inputs.bags)]
    with torch.no_grad():
        model.first_order.weight.zero_()
    at_limit, beyond = model(rows[0], torch.tensor([[0.0, 3.0, 0.0], [0.0, 10.0, 0.0]]), rows[1])
    assert at_limit.item() == pytest.approx(beyond.item())


@pytest.mark.parametrize("empty", ["numeric", "bags", "fields and bags"])
def test_a_log_may_lack_a_kind_of_feature(empty: str) -> None:
    lacking = {
        "numeric": {"numeric": (), "num_indicators": 0},
        "bags": {"bags": ()},
        "fields and bags": {"categorical": (), "bags": ()},
    }[empty]
    spec = SPEC.model_copy(update=lacking)
    model = DCNv2(DCNv2Config(embedding_dim=4), spec)
    inputs = some_rows(5)
    scores = model(
        inputs.categorical[:, : spec.categorical_width],
        inputs.numeric[:, : spec.numeric_width],
        inputs.bags[:, : spec.bag_width],
    )
    assert scores.shape == (5,)
    scores.sum().backward()
    assert model.last.weight.grad is not None
    assert model.last.weight.grad.any()


@pytest.mark.parametrize("settings", [{"structure": "parallel"}, {"structure": "stacked", "rank": 2}])
def test_exported_program_scores_alike_for_any_number_of_rows(settings: dict[str, object], tmp_path: Path) -> None:
    model = model_without_zeros(**settings)
    export_program(model, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for num_rows in (1, 2, 70):
        inputs = some_rows(num_rows)
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"cross_layers": 0}, {"rank": 0}, {"structure": "mixed"}, {"dropout": 1.0}, {"widths": [3]}]
)
def test_impossible_hyperparameters_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DCNv2Config.model_validate(settings)
