"""Two towers: vectors, their dot products, and the loss against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.base import OwnLoss
from evergreen.models.export import export_program
from evergreen.models.inputs import (
    PAD,
    Bag,
    BagInput,
    CategoricalInput,
    EncodedRows,
    InputSpec,
    ModelInputs,
    NumericInput,
)
from evergreen.models.two_tower import TwoTower, TwoTowerConfig, sampled_softmax

SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="user_id", side=Side.USER, start=1, num_rows=5),
        CategoricalInput(name="item_id", side=Side.ITEM, start=6, num_rows=4),
    ),
    numeric=(
        NumericInput(name="x", side=Side.USER, missing=3, zero=0.0, boundaries=(-0.5, 0.5)),
        NumericInput(name="y", side=Side.ITEM, missing=None, zero=0.0, boundaries=(0.0,)),
        NumericInput(name="z", side=Side.PAIR, missing=None, zero=0.0, boundaries=(0.0,)),
    ),
    num_indicators=1,
    bags=(BagInput(name="h", side=Side.USER, kind=ColumnKind.SEQUENCE, width=3),),
    num_embeddings=10,
    untrained_rows=(0, 1, 2, 6, 7),
)
UNSEEN_ITEM, ITEM_A, ITEM_B = 7, 8, 9


def new_model(spec: InputSpec = SPEC, **settings: object) -> TwoTower:
    torch.manual_seed(0)
    config = TwoTowerConfig(embedding_dim=4, output_dim=3, hidden=(5,), init_std=0.5, **settings)
    return TwoTower(config, spec).eval()


def some_rows(num_rows: int) -> ModelInputs:
    rng = np.random.default_rng(1)
    length = rng.integers(0, 4, size=num_rows)
    history = np.where(np.arange(3) < length[:, None], rng.integers(6, 10, size=(num_rows, 3)), PAD)
    missing = rng.integers(0, 2, size=num_rows)
    numbers = [np.where(missing, 0.0, rng.normal(size=num_rows)), *rng.normal(size=(2, num_rows)), missing]
    return ModelInputs(
        torch.from_numpy(np.stack([rng.integers(1, 6, size=num_rows), rng.integers(6, 10, size=num_rows)], axis=1)),
        torch.from_numpy(np.stack(numbers, axis=1).astype(np.float32)),
        torch.from_numpy(history),
    )


def encoded(items: list[int], spec: InputSpec = SPEC, second: list[int] | None = None) -> EncodedRows:
    """Rows of user 3, of which only the item matters."""
    columns = [[3] * len(items), items] + ([second] if second else [])
    empty = Bag(np.empty(0, np.int32), np.zeros(len(items) + 1, np.int64))
    numeric = np.zeros((len(items), spec.numeric_width), np.float32)
    return EncodedRows(spec, np.array(columns, np.int32).T, numeric, (empty,))


def test_score_is_the_dot_product_of_the_vectors() -> None:
    model = new_model(temperature=0.2)
    model.set_output(bias=-3.0, scale=1.0)
    inputs = some_rows(20)
    users, items = model.user_vectors(inputs), model.item_vectors(inputs)
    torch.testing.assert_close(model(*inputs), model.bias + model.scale * (users * items).sum(dim=1))
    for vectors in (users, items):
        torch.testing.assert_close(vectors.norm(dim=1), torch.full((20,), 0.2**-0.5))


def test_towers_are_networks_over_the_features_of_their_side() -> None:
    model = new_model(temperature=1.0, history_exponent=1.0)
    table = model.table.weight.detach().numpy()
    inputs = ModelInputs(
        torch.tensor([[3, 8]]), torch.tensor([[0.7, -1.2, 9.0, 0.0]]), torch.tensor([[ITEM_A, ITEM_B, PAD]])
    )
    user = np.concatenate([table[3], (table[8] + table[9]) / 2, [0.7, 0.0]])  # fields, bags, numbers, indicators
    item = np.concatenate([table[8], [-1.2]])
    for features, tower, vectors in (
        (user, model.user_tower, model.user_vectors(inputs)),
        (item, model.item_tower, model.item_vectors(inputs)),
    ):
        first, last = (layer for layer in tower.network if isinstance(layer, torch.nn.Linear))
        hidden = np.maximum(first.weight.detach().numpy() @ features + first.bias.detach().numpy(), 0.0)
        expected = last.weight.detach().numpy() @ hidden + last.bias.detach().numpy()
        np.testing.assert_allclose(vectors[0].detach(), expected / np.linalg.norm(expected), rtol=1e-4)


def test_a_side_does_not_read_the_other_nor_features_of_both() -> None:
    model = new_model()
    rows, others = some_rows(8), some_rows(16)
    categorical, numeric, bags = (tensor[8:] for tensor in others)
    user, item, pair = numeric.clone(), numeric.clone(), numeric.clone()
    user[:, [0, 3]], item[:, 1], pair[:, 2] = rows.numeric[:, [0, 3]], rows.numeric[:, 1], 9.0
    same_user = ModelInputs(torch.stack([rows.categorical[:, 0], categorical[:, 1]], dim=1), user, rows.bags)
    torch.testing.assert_close(model.user_vectors(same_user), model.user_vectors(rows))
    same_item = ModelInputs(torch.stack([categorical[:, 0], rows.categorical[:, 1]], dim=1), item, bags)
    torch.testing.assert_close(model.item_vectors(same_item), model.item_vectors(rows))
    torch.testing.assert_close(model(categorical, pair, bags), model(categorical, numeric, bags))


def test_loss_is_the_softmax_over_items_with_own_columns_counted_and_frequency_removed() -> None:
    rng = np.random.default_rng(0)
    keys = np.array([4, 5, 4, -1, -1, 6, 5, 5])
    chosen, columns = np.array([0, 1, 3, 7]), np.array([0, 2, 3, 4, 5, 6, 7])
    own_scores, scores, log_q = rng.normal(size=4), rng.normal(size=(4, 7)), np.log(rng.random(8))
    expected = []
    for place, row in enumerate(chosen):
        same = {k for k in columns if k == row or keys[k] == keys[row] != -1}
        mine = len(same | {row}) * np.exp(own_scores[place] - log_q[row])
        others = sum(np.exp(scores[place, i] - log_q[k]) for i, k in enumerate(columns) if k not in same)
        expected.append(-np.log(mine / (mine + others)))
    tensors = {"chosen": chosen, "columns": columns, "keys": keys, "log_q": log_q}
    loss = sampled_softmax(
        torch.from_numpy(own_scores),
        torch.from_numpy(scores),
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
    )
    assert loss.item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("candidates", ["clicked", "not_clicked"])
def test_at_the_true_probabilities_the_loss_has_no_slope(candidates: str) -> None:
    # Two kinds of users choose among five items of very unequal popularity; candidates are drawn by frequency.
    rng = np.random.default_rng(0)
    chance = np.array([[0.60, 0.20, 0.10, 0.06, 0.04], [0.30, 0.05, 0.05, 0.10, 0.50]])
    q = chance.mean(axis=0) if candidates == "clicked" else np.array([0.1, 0.45, 0.1, 0.15, 0.2])
    num_batches = 2000
    slopes: dict[str, list[np.ndarray]] = {"corrected": [], "uncorrected": []}
    for _ in range(num_batches):
        kind = rng.integers(2)
        keys = torch.from_numpy(np.append(rng.choice(5, p=chance[kind]), rng.choice(5, size=5, p=q)))
        for name, log_q in (("corrected", np.log(q)), ("uncorrected", np.zeros(5))):
            scores = torch.from_numpy(np.log(chance)).requires_grad_()
            row = scores[kind][keys]
            columns = torch.arange(0 if candidates == "clicked" else 1, 6)
            loss = sampled_softmax(
                row[:1],
                row[columns].unsqueeze(0),
                chosen=torch.tensor([0]),
                columns=columns,
                keys=keys,
                log_q=torch.from_numpy(log_q)[keys],
            )
            slopes[name].append(torch.autograd.grad(loss, scores)[0].numpy())
    deviations = {}  # in standard errors of the mean gradient
    for name, values in slopes.items():
        gradient = np.stack(values)
        deviations[name] = np.abs(gradient.mean(axis=0) / (gradient.std(axis=0) / math.sqrt(num_batches))).max()
    assert deviations["corrected"] < 4
    assert deviations["uncorrected"] > 6


@pytest.mark.parametrize(
    ("candidates", "counts", "num_candidates"),
    [("all", (3, 3), 8), ("clicked", (1, 2), 4), ("not_clicked", (2, 1), 4)],
)
def test_frequency_is_the_share_of_candidates_since_the_item_came(
    candidates: str, counts: tuple[int, int], num_candidates: int
) -> None:
    items = [ITEM_A, ITEM_A, ITEM_A, UNSEEN_ITEM, ITEM_B, UNSEEN_ITEM, ITEM_B, ITEM_B]
    labels = np.array([1, 0, 0, 1, 1, 0, 0, 1], np.float32)
    model = new_model(candidates=candidates)
    model.prepare(encoded(items), labels)
    # A was there from the first row, B for half of the time. One count more at the average rate; the unseen: average.
    chances = (num_candidates, num_candidates / 2)
    average = sum(counts) / sum(chances)
    expected = [(count + 1) / (chance + 1 / average) for count, chance in zip(counts, chances, strict=True)]
    asked = encoded([ITEM_A, ITEM_B, UNSEEN_ITEM]).inputs().categorical
    np.testing.assert_allclose(model._log_q(model._keys(asked)).exp(), [*expected, average], rtol=1e-6)


def test_items_that_share_a_row_are_told_apart_by_their_second_row() -> None:
    spec = SPEC.model_copy(update={"second_rows": (1,), "num_embeddings": 12})
    model = new_model(spec)
    model.prepare(encoded([8, 8, 8, 9], spec, second=[11, 10, 10, PAD]), np.zeros(4, np.float32))
    keys = model._keys(torch.tensor([[3, 8, 10], [3, 8, 11], [3, 9, PAD], [3, UNSEEN_ITEM, PAD]]))
    assert len(keys.unique()) == 4
    assert keys[3] == -1
    often, seldom = model._log_q(keys)[:2]
    assert often > seldom


@pytest.mark.parametrize("candidates", ["clicked", "not_clicked", "all"])
def test_batch_loss_is_the_softmax_of_clicked_rows_against_the_candidates(candidates: str) -> None:
    model = new_model(candidates=candidates)
    assert isinstance(model, OwnLoss)
    inputs, labels = some_rows(12), torch.tensor([1.0, 0, 0, 1] * 3)
    model.prepare(encoded(inputs.categorical[:, 1].tolist()), labels.numpy())
    chosen = torch.nonzero(labels).squeeze(1)
    columns = {"clicked": chosen, "not_clicked": torch.nonzero(1 - labels).squeeze(1), "all": torch.arange(12)}[
        candidates
    ]
    keys = model._keys(inputs.categorical)
    scores = model.user_vectors(inputs) @ model.item_vectors(inputs).T
    expected = sampled_softmax(
        scores.diag()[chosen],
        scores[chosen][:, columns],
        chosen=chosen,
        columns=columns,
        keys=keys,
        log_q=model._log_q(keys),
    )
    torch.testing.assert_close(model.training_loss(inputs, labels), expected)


def gradients(model: TwoTower, inputs: ModelInputs, labels: Tensor) -> dict[str, Tensor]:
    model.training_loss(inputs, labels).backward()
    return {
        name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None
    }  # the table's is sparse


@pytest.mark.parametrize("training", [True, False])
def test_batch_without_a_click_has_no_loss_and_moves_nothing(training: bool) -> None:
    model = new_model().train(training)
    inputs, labels = some_rows(6), torch.zeros(6)
    assert model.training_loss(inputs, labels).item() == 0.0
    of_none = gradients(model, inputs, labels)
    assert not any(gradient.any() for gradient in of_none.values())
    model.zero_grad(set_to_none=True)
    assert of_none.keys() == gradients(model, inputs, torch.ones(6)).keys()


def test_every_parameter_but_the_bias_learns() -> None:
    model = new_model(candidates="all")
    learning = {name for name, gradient in gradients(model, some_rows(50), torch.ones(50)).items() if gradient.any()}
    assert learning == {name for name, _ in model.named_parameters()} - {"bias"}


def test_batch_of_one_item_has_nothing_to_tell_and_stays_finite() -> None:
    model = new_model(candidates="clicked")
    inputs = encoded([ITEM_A] * 5).inputs()
    assert model.training_loss(inputs, torch.ones(5)).item() == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, inputs, torch.ones(5)).values())


def test_ids_are_dropped_in_training_alone() -> None:
    spec = SPEC.model_copy(update={"second_rows": (1,), "num_embeddings": 12})
    model = new_model(spec, id_dropout=0.5)
    categorical = torch.tensor([[3, 8, 10]]).expand(400, -1)
    torch.testing.assert_close(model._drop_ids(categorical), categorical)
    dropped = model.train()._drop_ids(categorical)
    assert {tuple(row) for row in dropped.tolist()} == {(3, 8, 10), (2, 8, 10), (3, 7, PAD), (2, 7, PAD)}
    assert (dropped[:, 0] == 2).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_score_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = new_model()
    inputs = some_rows(12)
    alone = [model(*(tensor[i : i + 1] for tensor in inputs)) for i in range(12)]
    torch.testing.assert_close(model(*inputs), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_package_does_not_carry_the_frequencies() -> None:
    model = new_model()
    before = model.state_dict().keys()
    model.prepare(encoded([ITEM_A, ITEM_B]), np.ones(2, np.float32))
    assert model.state_dict().keys() == before
    assert not any("frequency" in name or "keys" in name for name in before)


def test_exported_program_scores_alike_for_any_number_of_rows(tmp_path: Path) -> None:
    model = new_model()
    model.prepare(encoded([ITEM_A, ITEM_B]), np.ones(2, np.float32))
    export_program(model, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for num_rows in (1, 2, 70):
        inputs = some_rows(num_rows)
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"categorical": SPEC.categorical[:1]}, "no feature is called item_id"),
        ({"categorical": SPEC.categorical[1:], "numeric": (), "bags": ()}, "no feature describes the user"),
    ],
)
def test_log_without_a_side_is_refused(lacking: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        new_model(SPEC.model_copy(update=lacking))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"id_dropout": 1.0}, {"output_dim": 0}, {"widths": [3]}])
def test_impossible_hyperparameters_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TwoTowerConfig.model_validate(settings)
