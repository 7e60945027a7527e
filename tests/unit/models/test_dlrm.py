"""DLRM against its definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evergreen.models.dlrm import DLRM, DLRMConfig
from evergreen.models.export import export_program
from evergreen.models.inputs import PAD, InputSpec, ModelInputs
from tests.unit.models.small_spec import SPEC, some_rows, without_zeros


def model_without_zeros(spec: InputSpec = SPEC, **settings: object) -> DLRM:
    """A model in which every part has a say: as after training."""
    torch.manual_seed(0)
    return without_zeros(DLRM(DLRMConfig(embedding_dim=4, **settings), spec))


def inputs_of(spec: InputSpec, num_rows: int) -> ModelInputs:
    inputs = some_rows(num_rows)
    return ModelInputs(
        inputs.categorical[:, : spec.categorical_width],
        inputs.numeric[:, : spec.numeric_width],
        inputs.bags[:, : spec.bag_width],
    )


def network(layers: torch.nn.Sequential, x: NDArray[np.float32], *, last_relu: bool) -> NDArray[np.float32]:
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for place, layer in enumerate(linear):
        x = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
        if last_relu or place < len(linear) - 1:
            x = np.maximum(x, 0.0)
    return x


@pytest.mark.parametrize("settings", [{"bottom": (5,), "top": (6, 3)}, {"bottom": (), "top": ()}])
def test_score_is_weights_and_weighted_dot_products_and_a_network_over_both(settings: dict[str, object]) -> None:
    model = model_without_zeros(history_exponent=1.0, **settings)
    table = model.table.weight.detach().numpy()
    assert model.bottom is not None
    assert model.top is not None
    numeric = np.array([0.7, -1.2, 0.0], np.float32)
    rows = [table[3], table[8], (table[4] + table[5]) / 2]
    numbers = network(model.bottom, numeric, last_relu=True)
    vectors = [*(row[1:] for row in rows), numbers]
    dots = np.array([left @ right for left, right in itertools.combinations(vectors, 2)], np.float32)
    expected = sum(row[0] for row in rows) + model.first_order(torch.from_numpy(numeric)[None]).item()
    expected += dots @ model.pair_weights.detach().numpy()
    expected += network(model.top, np.concatenate([numbers, dots]), last_relu=False)[0]
    score = model(torch.tensor([[3, 8]]), torch.from_numpy(numeric)[None], torch.tensor([[4, 5, PAD]]))
    assert score.item() == pytest.approx(expected + model.bias.item(), rel=1e-4)


def test_training_starts_from_the_sum_of_all_dot_products() -> None:
    torch.manual_seed(0)
    model = DLRM(DLRMConfig(embedding_dim=4, init_std=0.5), SPEC)
    inputs = some_rows(20)
    assert model.bottom is not None
    vectors = [
        *model.table.lookup(inputs.categorical).unbind(1),
        *model.table.pool(inputs.bags, exponent=0.5).unbind(1),
    ]
    vectors = [vector[:, 1:] for vector in vectors] + [model.bottom(inputs.numeric.clamp(-3, 3))]
    expected = sum((left * right).sum(dim=1) for left, right in itertools.combinations(vectors, 2))
    torch.testing.assert_close(model(*inputs), expected)


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.to_dense().any())  # the table's gradient is sparse


def test_every_parameter_learns() -> None:
    model = model_without_zeros()
    model(*some_rows(50)).square().sum().backward()
    dead = [name for name, parameter in model.named_parameters() if not has_gradient(parameter)]
    assert dead == []


def test_score_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = model_without_zeros()
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
    inputs = some_rows(1)
    rows = [tensor.expand(2, -1) for tensor in (inputs.categorical, inputs.bags)]
    with torch.no_grad():
        model.first_order.weight.zero_()
    at_limit, beyond = model(rows[0], torch.tensor([[0.0, 3.0, 0.0], [0.0, 10.0, 0.0]]), rows[1])
    assert at_limit.item() == pytest.approx(beyond.item())


LACKING = {
    "numbers": {"numeric": (), "num_indicators": 0},
    "bags": {"bags": ()},
    "fields": {"categorical": ()},
    "fields_and_bags": {"categorical": (), "bags": ()},
    "all_but_a_field": {"categorical": SPEC.categorical[:1], "numeric": (), "num_indicators": 0, "bags": ()},
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_log_may_lack_a_kind_of_feature(lacking: str, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update=LACKING[lacking])
    model = model_without_zeros(spec)
    inputs = inputs_of(spec, 5)
    scores = model(*inputs)
    assert len(scores.detach().unique()) > 1
    scores.square().sum().backward()
    # Pairs are of fields, bags and the numbers' vector: of a single one there is none.
    unused = {name for name, parameter in model.named_parameters() if parameter.numel() and parameter.grad is None}
    assert unused == set()


@pytest.mark.parametrize("lacking", [None, *LACKING])
def test_exported_program_scores_alike_for_any_number_of_rows(lacking: str | None, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update=LACKING[lacking] if lacking else {})
    model = model_without_zeros(spec)
    export_program(model, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for num_rows in (1, 2, 70):
        inputs = inputs_of(spec, num_rows)
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"embedding_dim": 0}, {"dropout": 1.0}, {"init_std": 0}, {"widths": [3]}])
def test_impossible_hyperparameters_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DLRMConfig.model_validate(settings)
