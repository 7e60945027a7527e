"""Position effects and examination, against worlds in which both are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evergreen.models.position import PositionEffect, PositionEffects, examination_by_position, examination_weights

SEEN = 1 / np.arange(1, 9)  # P(examined) of positions 1 to 8


def logged(num_rows: int = 400_000, *, good_on_top: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Two kinds of items, of relevance 0.1 and 0.4; a policy that may put the good ones on top."""
    rng = np.random.default_rng(seed)
    position = rng.integers(1, 9, num_rows)
    chance = np.where(position <= 4, 0.8, 0.2) if good_on_top else np.full(num_rows, 0.5)
    item = (rng.random(num_rows) < chance).astype(np.int64)
    clicked = rng.random(num_rows) < SEEN[position - 1] * np.array([0.1, 0.4])[item]
    propensity = np.where(item == 1, chance, 1 - chance)
    return {"positions": position, "labels": clicked.astype(np.float32), "items": item, "propensities": propensity}


def unit_of(effect: PositionEffect) -> float:
    """What a parameter of 1 is worth."""
    with torch.no_grad():
        effect.bin_table[1] = 1.0
        return effect(torch.tensor([1])).item()


def test_effect_starts_at_zero_and_unknown_positions_stay_there() -> None:
    effect = PositionEffect(3)
    optimizer = torch.optim.SGD(effect.parameters(), lr=1.0)
    assert not effect(torch.tensor([0, 1, 3])).any()
    (effect(torch.tensor([0, 2])).sum() + effect.penalty(10)).backward()
    optimizer.step()
    moved = effect(torch.tensor([0, 1, 2, 3])).tolist()
    assert moved[2] < -0.5
    assert [moved[0], moved[1], moved[3]] == [0, 0, 0]


def test_positions_beyond_the_last_are_like_the_last() -> None:
    effect = PositionEffect(3)
    unit = unit_of(effect)
    with torch.no_grad():
        effect.bin_table.copy_(torch.tensor([[0.0], [3.0], [2.0], [1.0]]) / unit)
    assert effect(torch.tensor([3, 4, 500, -1])).tolist() == pytest.approx([1, 1, 1, 0])
    effects = effect.centred(np.array([2, 2]))
    assert effects.at(np.array([1, 2, 3, 4, 500])).tolist() == pytest.approx([1, 0, -1, -1, -1], abs=1e-6)


def test_constant_keeps_the_number_of_rare_clicks_and_centring_takes_it_out() -> None:
    effect = PositionEffect(3)
    unit = unit_of(effect)
    with torch.no_grad():
        effect.bin_table.copy_(torch.tensor([[0.0], [3.0], [2.0], [1.0]]) / unit)
    positions, known = np.array([0, 1, 1, 2, 9, 0]), np.array([3, 3, 2, 1])
    rare = -9.0
    clicks = 1 / (1 + np.exp(-(rare + known)))
    assert 1 / (1 + np.exp(-(rare + effect.constant(positions)))) == pytest.approx(clicks.mean(), rel=0.005)
    effects = effect.centred(positions)
    assert np.exp(effects.at(np.array([1, 1, 2, 3]))).mean() == pytest.approx(1)
    assert effects.at(np.array([0])).tolist() == [0]
    assert effect.constant(np.zeros(5, np.int32)) == 0


def test_effects_are_written_and_read(tmp_path: Path) -> None:
    effects = PositionEffects(effects=(0.0, 0.7, -0.1))
    effects.write(tmp_path / "positions.json")
    assert PositionEffects.read(tmp_path / "positions.json") == effects


def test_prior_binds_a_rare_position_and_not_a_frequent_one() -> None:
    effect = PositionEffect(2)
    positions = torch.tensor([1] * 2_000 + [2] * 4)
    labels = torch.tensor([0.0] * 500 + [1.0] * 1_500 + [1.0] * 4)
    optimizer = torch.optim.LBFGS(effect.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(effect(positions), labels)
        value = entropy + effect.penalty(len(labels))
        value.backward()
        return value

    optimizer.step(loss)
    frequent, rare = effect(torch.tensor([1, 2])).tolist()
    assert frequent == pytest.approx(np.log(3), rel=0.01)
    assert 0.2 < rare < 1.5  # four clicks in four views would be infinite


def test_examination_is_found_where_positions_hold_alike_items() -> None:
    log = logged(good_on_top=False)
    found = examination_by_position(log["positions"], log["labels"])
    np.testing.assert_allclose(found[1:], SEEN, rtol=0.08)


@pytest.mark.parametrize("known", ["propensities", "items"])
def test_good_items_on_top_do_not_mislead_who_knows_propensities_or_items(known: str) -> None:
    log = logged(good_on_top=True)
    naive = examination_by_position(log["positions"], log["labels"])
    found = examination_by_position(log["positions"], log["labels"], **{known: log[known]})
    assert naive[8] < 0.7 * SEEN[7]
    np.testing.assert_allclose(found[1:], SEEN, rtol=0.1)


def test_propensities_that_are_all_unknown_leave_it_to_the_items() -> None:
    log = logged(good_on_top=True)
    by_items = examination_by_position(log["positions"], log["labels"], items=log["items"])
    unknown = np.full(len(log["labels"]), np.nan)
    both = examination_by_position(log["positions"], log["labels"], propensities=unknown, items=log["items"])
    assert both.tolist() == by_items.tolist()


def test_one_click_of_tiny_propensity_does_not_decide() -> None:
    positions, labels = np.repeat([1, 2], 1_000), np.tile(np.arange(1_000) % 20 == 0, 2).astype(np.float32)
    propensities = np.full(2_000, 0.1)
    propensities[1_000] = 1e-6  # of a click at position 2
    found = examination_by_position(positions, labels, propensities=propensities)
    assert found[2] == pytest.approx(1, abs=0.25)


def test_position_with_few_views_is_pulled_towards_the_top() -> None:
    positions = np.array([1] * 1_000 + [2] * 3)
    labels = (np.arange(1_003) % 4 == 0).astype(np.float32)
    labels[-3:] = 0
    assert 0.8 < examination_by_position(positions, labels)[2] < 1


def test_position_without_rows_is_like_the_one_above() -> None:
    positions = np.array([1] * 1_000 + [4] * 1_000)
    labels = np.concatenate([np.arange(1_000) % 2 == 0, np.arange(1_000) % 10 == 0]).astype(np.float32)
    found = examination_by_position(positions, labels)
    assert found[:4].tolist() == [1, 1, 1, 1]
    assert found[4] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("known", [{}, {"items": np.array([0, 0, 1])}, {"propensities": np.full(3, np.nan)}])
def test_log_that_tells_nothing_gives_equal_weights(known: dict[str, np.ndarray]) -> None:
    for positions, labels in (([0, 0, 0], [1, 0, 1]), ([1, 2, 3], [0, 0, 0])):
        found = examination_weights(np.array(positions), np.array(labels, np.float32), **known)
        assert found.weights.tolist() == [1, 1, 1]


def test_clicks_weigh_by_how_seldom_their_position_is_seen() -> None:
    log = logged(good_on_top=False)
    found = examination_weights(log["positions"], log["labels"], max_weight=5.0)
    clicked = log["labels"] == 1
    assert (found.weights[~clicked] == 1).all()
    assert found.weights[clicked].mean() == pytest.approx(1, rel=1e-4)
    by_position = [found.weights[clicked & (log["positions"] == k)][0] for k in (1, 2, 4, 8)]
    np.testing.assert_allclose(np.array(by_position) / by_position[0], [1, 2, 4, 5], rtol=0.08)  # 8 is cut at 5


def test_effective_clicks_fall_as_weights_part() -> None:
    log = logged(good_on_top=False)
    even = examination_weights(log["positions"], log["labels"], max_weight=1.0)
    uneven = examination_weights(log["positions"], log["labels"])
    assert even.effective_clicks == pytest.approx(log["labels"].sum())
    assert uneven.effective_clicks < 0.8 * even.effective_clicks


def test_maximum_weight_below_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"max_weight=0\.5"):
        examination_weights(np.array([1]), np.array([1.0]), max_weight=0.5)
