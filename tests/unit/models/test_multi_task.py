"""The network with two heads, and the scale of its second outcome."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.base import TwoTasks
from evergreen.models.deepfm import DeepFM, DeepFMConfig
from evergreen.models.export import export_program
from evergreen.models.inputs import PAD, BagInput, CategoricalInput, InputSpec, ModelInputs, NumericInput
from evergreen.models.multi_task import MultiTaskDeepFM, MultiTaskDeepFMConfig, OutcomeScale, standardise_outcomes

SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="a", side=Side.USER, start=1, num_rows=5),
        CategoricalInput(name="b", side=Side.ITEM, start=6, num_rows=4),
    ),
    numeric=(NumericInput(name="x", side=Side.USER, missing=None, zero=0.0, boundaries=(-0.5, 0.5)),),
    num_indicators=0,
    bags=(BagInput(name="h", side=Side.USER, kind=ColumnKind.SEQUENCE, width=3),),
    num_embeddings=10,
    untrained_rows=(0, 1, 2, 6, 7),
)
INPUTS = ModelInputs(
    torch.tensor([[3, 8], [4, 9]]), torch.tensor([[0.7], [-1.2]]), torch.tensor([[4, 5, PAD], [3, PAD, PAD]])
)


def with_random_heads(hidden: tuple[int, ...] = (8, 4)) -> MultiTaskDeepFM:
    torch.manual_seed(0)
    model = MultiTaskDeepFM(MultiTaskDeepFMConfig(embedding_dim=4, hidden=hidden, init_std=0.5), SPEC)
    for head in (model.deep[-1], model.second_head):
        torch.nn.init.normal_(head.weight)
    model.set_output(bias=-1.5, scale=2.0)
    return model.eval()


@pytest.mark.parametrize("hidden", [(8, 4), ()])
def test_score_of_both_is_that_of_forward(hidden: tuple[int, ...]) -> None:
    model = with_random_heads(hidden)
    assert isinstance(model, TwoTasks)
    score, second = model.both(*INPUTS)
    torch.testing.assert_close(score, model(*INPUTS))
    assert second.shape == (2,)
    assert second[0] != second[1]


def test_click_is_that_of_deepfm_with_the_same_weights() -> None:
    model = with_random_heads()
    single = DeepFM(DeepFMConfig(embedding_dim=4, hidden=(8, 4)), SPEC)
    single.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("second_head")})
    assert torch.equal(single.eval()(*INPUTS), model(*INPUTS))


def test_fresh_model_answers_with_the_mean_of_both_outcomes() -> None:
    model = MultiTaskDeepFM(MultiTaskDeepFMConfig(embedding_dim=4), SPEC)
    assert model.both(*INPUTS)[1].tolist() == [0, 0]


def test_second_task_trains_what_the_click_reads() -> None:
    model = with_random_heads()
    model.both(*INPUTS)[1].sum().backward()
    assert model.table.weight.grad is not None
    assert model.table.weight.grad[3].any()
    assert all(parameter.grad is not None for layer in model.deep[:-1] for parameter in layer.parameters())
    assert model.deep[-1].weight.grad is None


def test_exported_program_gives_the_scores_of_the_click_for_any_number_of_rows(tmp_path: Path) -> None:
    model = with_random_heads()
    export_program(model, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    many = ModelInputs(*(tensor.repeat(50, 1) for tensor in INPUTS))
    torch.testing.assert_close(program(*many), model(*many), rtol=0, atol=1e-5)


def test_standardised_outcomes_have_mean_0_and_variance_1_and_come_back() -> None:
    values = np.random.default_rng(0).lognormal(3, 1, 1_000).astype(np.float32)
    values[::3] = np.nan
    standardised, scale = standardise_outcomes(values, log=True)
    known = ~np.isnan(values)
    assert standardised.dtype == np.float32
    assert (np.isnan(standardised) == ~known).all()
    assert standardised[known].mean() == pytest.approx(0, abs=1e-5)
    assert standardised[known].std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scale.restore(standardised[known]), values[known], rtol=1e-4)
    np.testing.assert_allclose(scale.standardise(values), standardised)


def test_ratings_are_standardised_as_they_are() -> None:
    standardised, scale = standardise_outcomes(np.array([1.0, 5.0, np.nan]), log=False)
    assert standardised[:2].tolist() == [-1, 1]
    assert scale == OutcomeScale(mean=3.0, std=2.0, log=False)


def test_no_time_is_predicted_below_zero() -> None:
    assert OutcomeScale(mean=0.5, std=1.0, log=True).restore(np.array([-9.0])).tolist() == [0]


def test_outcomes_that_are_all_alike_stay_finite() -> None:
    assert standardise_outcomes(np.array([4.0, 4.0]), log=False)[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.nan, 3.0, np.nan], "known of 1 of 3 training rows"),
        ([3.0, np.inf, 1.0], "second outcome is inf"),
        ([3.0, -2.0, 1.0], r"second outcome is -2\.0"),
    ],
)
def test_outcomes_that_cannot_be_learned_are_named(values: list[float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        standardise_outcomes(np.array(values), log=True)
