"""The history's encoder and the ranking model that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.base import RankingModel
from evergreen.models.export import export_program
from evergreen.models.inputs import PAD, BagInput, CategoricalInput, InputSpec, ModelInputs, NumericInput
from evergreen.models.transformer import CausalEncoder, Transformer, TransformerConfig, last_states

TAGS = BagInput(name="tags", side=Side.ITEM, kind=ColumnKind.MULTI, width=2)
HISTORY = BagInput(name="user_history", side=Side.USER, kind=ColumnKind.SEQUENCE, width=5)
SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="user_id", side=Side.USER, start=1, num_rows=5),
        CategoricalInput(name="item_id", side=Side.ITEM, start=6, num_rows=8),
    ),
    numeric=(NumericInput(name="x", side=Side.USER, missing=None, zero=0.0, boundaries=(-0.5, 0.5)),),
    num_indicators=0,
    bags=(TAGS, HISTORY),
    num_embeddings=17,
    untrained_rows=(0, 1, 2, 6, 7, 14),
)


def awake(model: RankingModel) -> RankingModel:
    """All weights away from zero, so that every part of the model has a say."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if isinstance(model, Transformer):
            model.table.weight[PAD] = 0.0
    return model.eval()


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return awake(Transformer(TransformerConfig(embedding_dim=4, width=8, layers=2, hidden=(8,)), SPEC))


def row(history: list[int], *, item: int = 9) -> ModelInputs:
    bag = [15, PAD, *history, *[PAD] * (5 - len(history))]
    return ModelInputs(torch.tensor([[3, item]]), torch.tensor([[0.5]]), torch.tensor([bag]))


def test_a_state_does_not_know_later_items() -> None:
    torch.manual_seed(0)
    encoder = CausalEncoder(8, layers=2, heads=2, dropout=0.5, max_length=6).eval()
    vectors = torch.randn(1, 6, 8)
    changed = vectors.clone()
    changed[:, 4:] = torch.randn(1, 2, 8)
    lengths = torch.tensor([6])
    before, after = encoder(vectors, lengths), encoder(changed, lengths)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-3


def test_positions_are_counted_from_the_end_so_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = CausalEncoder(8, layers=2, heads=2, dropout=0.0, max_length=6)
    vectors = torch.randn(1, 3, 8)
    padded = torch.cat([vectors, torch.randn(1, 3, 8)], dim=1)
    lengths = torch.tensor([3])
    torch.testing.assert_close(encoder(vectors, lengths), encoder(padded, lengths)[:, :3])


def test_last_state_is_that_of_the_latest_item_and_zero_without_any() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    assert last_states(states, torch.tensor([2, 0])).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_order_of_the_history_matters(model: Transformer) -> None:
    one, other = model(*row([8, 9, 10])), model(*row([10, 9, 8]))
    assert abs(one.item() - other.item()) > 1e-3


def test_history_meets_the_candidate(model: Transformer) -> None:
    with torch.no_grad():
        for parameter in model.first_order.parameters():
            parameter.zero_()
    gain = model(*row([8], item=9)) - model(*row([10], item=9))
    other = model(*row([8], item=11)) - model(*row([10], item=11))
    assert abs((gain - other).item()) > 1e-3


def test_empty_history_is_scored(model: Transformer) -> None:
    assert torch.isfinite(model(*row([])))


def test_tags_are_not_taken_for_history(model: Transformer) -> None:
    inputs = row([8, 9])
    other = ModelInputs(inputs.categorical, inputs.numeric, inputs.bags.clone())
    other.bags[0, 0] = 16
    torch.testing.assert_close(model.history_states(inputs.bags)[:, :2], model.history_states(other.bags)[:, :2])


def test_states_of_one_history_serve_all_candidates_of_a_request(model: Transformer) -> None:
    rows = [row([8, 12, 10], item=item) for item in (8, 9, 13)]
    inputs = ModelInputs(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    states = model.history_states(inputs.bags[:1]).expand(3, -1, -1)
    torch.testing.assert_close(model.combine(*inputs, states), model.response(*inputs))


def test_training_starts_from_the_factorization_machine() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(embedding_dim=4, width=8, init_std=0.5), SPEC).eval()
    inputs = row([8, 9])
    weights, vectors = model.rows(inputs.categorical, inputs.bags)
    torch.testing.assert_close(model.response(*inputs), model.interactions(weights, vectors, inputs.numeric))


def test_gradients_reach_the_rows_of_the_history_and_never_padding(model: Transformer) -> None:
    model.history_states(row([8, 9]).bags).sum().backward()
    gradient = model.table.weight.grad
    assert gradient is not None
    dense = gradient.to_dense()
    assert dense[8].any() and dense[9].any()
    assert not dense[PAD].any()


def test_exported_program_scores_alike_for_any_number_of_rows(model: Transformer, tmp_path: Path) -> None:
    export_program(model, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    rows = [row([8, 12, 10]), row([]), row([9]), row([13, 12, 11, 10, 9], item=13), row([8])]
    inputs = ModelInputs(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=0)


def test_log_without_history_is_refused_with_the_reason() -> None:
    with pytest.raises(TrainingError, match="no feature of kind sequence"):
        Transformer(TransformerConfig(), SPEC.model_copy(update={"bags": (TAGS,)}))


def test_log_without_a_category_of_the_candidate_is_refused() -> None:
    with pytest.raises(TrainingError, match="no categorical feature describes the candidate"):
        Transformer(TransformerConfig(), SPEC.model_copy(update={"categorical": SPEC.categorical[:1]}))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="width=32 cannot be shared by heads=5"):
        TransformerConfig(heads=5)
