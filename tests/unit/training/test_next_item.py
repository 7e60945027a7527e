"""Sequences, their batches, and the losses and ranks of next-item models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD
from evergreen.training.next_item import (
    NextItemConfig,
    NextItemModel,
    evaluate_counts,
    evaluate_next_item,
    ranking_report,
    train_next_item,
)
from evergreen.training.next_item_losses import SoftmaxLoss, gbce_loss
from evergreen.training.sequences import Holdout, Sequences, batches, latest, leave_one_out, windows


def sequences_of(*users: list[int]) -> Sequences:
    owner = np.repeat(np.arange(len(users)), [len(user) for user in users])
    return Sequences.from_interactions(owner, np.concatenate(users))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_interactions_are_grouped_by_user_in_time_order() -> None:
    sequences = Sequences.from_interactions(["b", "a", "b", "a"], [30, 10, 20, 30])
    assert sequences.num_items == 3
    assert sequences.items.values.tolist() == [1, 3, 3, 2]  # a: 10, 30; b: 30, 20
    assert sequences.lengths.tolist() == [2, 2]


def test_last_item_is_for_test_and_the_one_before_for_validation() -> None:
    train, validation, test = leave_one_out(sequences_of([1, 2, 3, 4], [5, 6], [4, 1, 3]))
    assert train.items.values.tolist() == [1, 2, 4]
    assert validation.targets.tolist() == [3, 1]
    assert test.targets.tolist() == [4, 3]
    assert test.histories.items.values.tolist() == [1, 2, 3, 4, 1]
    assert train.num_items == 6


def test_users_with_too_few_items_are_refused_in_words() -> None:
    with pytest.raises(TrainingError, match="none of 2 users has three items"):
        leave_one_out(sequences_of([1, 2], [3]))
    with pytest.raises(TrainingError, match="no interactions"):
        Sequences.from_interactions([], [])


def test_every_item_but_the_first_is_predicted_once_an_epoch() -> None:
    lengths = [1, 2, 9, 10, 11, 12, 47]
    sequences = sequences_of(*[list(range(100 * user, 100 * user + n)) for user, n in enumerate(lengths)])
    expected = np.setdiff1d(np.arange(1, sequences.num_items + 1), sequences.items.values[sequences.items.offsets[:-1]])
    source = generator()
    for _ in range(5):
        predicted = np.concatenate(
            [targets[targets != PAD].numpy() for _, targets in batches(
                sequences, max_length=10, batch_positions=25, generator=source
            )]
        )  # fmt: skip
        assert sorted(predicted.tolist()) == expected.tolist()


def test_targets_are_the_items_that_follow() -> None:
    sequences = sequences_of([1, 2, 3, 4, 5, 6, 7], [2, 4, 6])
    follows = {1: {2}, 2: {3, 4}, 3: {4}, 4: {5, 6}, 5: {6}, 6: {7}}
    for inputs, targets in batches(sequences, max_length=3, batch_positions=100, generator=generator()):
        assert ((inputs == PAD) == (targets == PAD)).all()
        for item, target in zip(inputs[inputs != PAD].tolist(), targets[targets != PAD].tolist(), strict=True):
            assert target in follows[item]


def test_windows_fit_and_batches_keep_to_their_size() -> None:
    sequences = sequences_of(*[list(range(n)) for n in range(1, 60)])
    assert windows(sequences, 8, generator())[:, 1].max() <= 9
    made = batches(sequences, max_length=8, batch_positions=64, generator=generator())
    assert max(inputs.numel() for inputs, _ in made) <= 64
    padding = np.mean([(inputs == PAD).float().mean().item() for inputs, _ in made])
    assert padding < 0.1


def test_long_sequences_are_cut_elsewhere_in_the_next_epoch() -> None:
    sequences, source = sequences_of(list(range(100))), generator()
    assert windows(sequences, 30, source).tolist() != windows(sequences, 30, source).tolist()


def test_latest_items_are_kept_with_padding_after() -> None:
    sequences = sequences_of([1, 2, 3, 4], [2])
    assert latest(sequences, np.arange(2), 3).tolist() == [[2, 3, 4], [2, PAD, PAD]]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_softmax_loss_and_gradients_are_those_of_cross_entropy(bfloat16: bool) -> None:
    torch.manual_seed(0)
    states, items = torch.randn(150, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets = torch.randint(1, 40, (150,))
    expected = functional.cross_entropy(states @ items[1:].t(), targets - 1)
    expected_gradients = torch.autograd.grad(2 * expected, (states, items))
    loss = SoftmaxLoss.apply(states, items, targets, bfloat16)
    tolerance = {"rtol": 0.1, "atol": 2e-3} if bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, expected, **tolerance)
    for gradient, wanted in zip(torch.autograd.grad(2 * loss, (states, items)), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, **tolerance)


def test_gbce_without_calibration_is_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    states, items = torch.randn(3, 4), torch.randn(11, 4)
    targets, negatives = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 3])
    logits = states @ items.t() - math.log(3)  # one positive in four: zero vectors predict the base rate
    expected = functional.softplus(-logits[[0, 1, 2], targets]).sum() + functional.softplus(logits[:, [5, 6]]).sum()
    expected = expected + functional.softplus(logits[[0, 1], [3, 3]]).sum()  # 3 is the third row's own target
    torch.testing.assert_close(gbce_loss(states, items, targets, negatives, t=0.0), expected / 3)


def test_full_calibration_weighs_the_positive_by_the_share_of_items_drawn() -> None:
    states, items = torch.zeros(1, 1), torch.ones(12, 1)
    targets, negatives = torch.tensor([1]), torch.tensor([2, 3])
    base = torch.tensor(math.log(0.2 / 2))
    negative = 2 * functional.softplus(base)
    positive = gbce_loss(states, items, targets, negatives, t=1.0) - negative
    torch.testing.assert_close(positive, 0.2 * functional.softplus(-base))


def test_seen_items_are_no_candidates_and_ties_count_half() -> None:
    holdout = Holdout(sequences_of([1, 2], [3, 4, 5, 6]), np.array([3, 1]))
    counts = np.array([0, 2, 9, 2, 2, 2, 1])
    report = evaluate_counts(counts, holdout)
    # First user: items 1 and 2 are out; 3 ties with 4 and 5: rank 1. Second user: 1 stands behind 2 alone: rank 1.
    assert report["hr@10"] == 1.0
    assert report["ndcg@10"] == pytest.approx(1 / np.log2(3))


def test_report_tells_warm_from_cold_items() -> None:
    warm = np.array([False, True, False])
    report = ranking_report(np.array([0.0, 10.0, 99.0]), np.array([1, 2, 1]), warm=warm)
    assert report["users"] == 3
    assert report["hr@10"] == pytest.approx(1 / 3)
    assert report["warm_items_hr@10"] == 0.5
    assert report["cold_items_hr@10"] == 0.0
    assert report["cold_items_ndcg@100"] == pytest.approx(1 / np.log2(12))


def test_padding_is_never_recommended_and_never_trained() -> None:
    sequences = sequences_of(*[[1, 2, 3, 4, 5]] * 4)
    train, validation, _ = leave_one_out(sequences)
    model, _ = train_next_item(train, validation, NextItemConfig(width=4, layers=1, heads=1, epochs=2, max_length=4))
    assert not model.items[PAD].detach().any()
    assert model(torch.tensor([[1, 2, PAD]]))[0, PAD] == -torch.inf


def test_evaluation_reads_no_more_than_the_model_can() -> None:
    torch.manual_seed(0)
    model = NextItemModel(9, NextItemConfig(width=4, layers=1, heads=1, max_length=3))
    holdout = Holdout(sequences_of(list(range(8)), [8]), np.array([9, 3]))
    assert 0 <= evaluate_next_item(model, holdout)["ndcg@10"] <= 1


@pytest.mark.parametrize("loss", ["softmax", "gbce"])
def test_equal_seeds_give_equal_weights(loss: str) -> None:
    rng = np.random.default_rng(0)
    sequences = Sequences.from_interactions(rng.integers(30, size=400), rng.integers(20, size=400))
    train, validation, _ = leave_one_out(sequences)
    config = NextItemConfig(width=8, epochs=2, max_length=10, batch_positions=64, negatives=8, loss=loss)
    one, other = (train_next_item(train, validation, config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(TrainingError, match="width=8 cannot be shared by heads=3"):
        NextItemModel(5, NextItemConfig(width=8, heads=3))
