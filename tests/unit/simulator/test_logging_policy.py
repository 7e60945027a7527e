from __future__ import annotations

import numpy as np
import pytest

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.policy import LoggingPolicy
from evergreen.simulator.population import draw_items, midnight

CONFIG = SimulatorConfig(num_users=50, num_items=60, num_categories=4)
NOW = midnight(CONFIG, 0)


def _trained_policy() -> LoggingPolicy:
    """A policy that has seen each item at random, with very different click rates."""
    items, rng = draw_items(CONFIG), np.random.default_rng(1)
    policy = LoggingPolicy(CONFIG, items)
    users, shown = rng.integers(0, 50, 30_000), rng.integers(0, 60, 30_000)
    policy.observe(users, shown, rng.random(30_000) < 0.3 * (shown / 60) ** 2)
    return policy


def test_inverse_propensities_count_the_items_that_could_be_shown():
    """E[1 / propensity] at place k is the number of items left: true only if propensities are exact."""
    policy = _trained_policy()
    available = int((policy.catalogue.published <= NOW).sum())
    slates = policy.slates(np.random.default_rng(2), np.zeros(40_000, dtype=np.int64), np.full(40_000, 4), NOW)
    for place in (1, 2, 4):
        inverse = 1 / slates.propensity[slates.positions == place]
        error = inverse.std() / np.sqrt(len(inverse))
        assert inverse.mean() == pytest.approx(available - place + 1, abs=4 * error)


def test_items_are_drawn_as_often_as_their_propensity_says():
    policy = _trained_policy()
    slates = policy.slates(np.random.default_rng(3), np.full(40_000, 7), np.full(40_000, 2), NOW)
    first = slates.positions == 1
    for item in np.unique(slates.items[first]):
        drawn = first & (slates.items == item)
        probability = slates.propensity[drawn]
        assert np.ptp(probability) < 1e-12
        expected = 40_000 * probability[0]
        assert abs(drawn.sum() - expected) < 4.5 * np.sqrt(expected)


def test_what_was_clicked_is_shown_more():
    policy = _trained_policy()
    slates = policy.slates(np.random.default_rng(4), np.arange(50).repeat(100), np.full(5_000, 3), NOW)
    shown = np.bincount(slates.items, minlength=60)
    known = policy.catalogue.published <= NOW
    rate = policy.item_clicks / policy.item_views
    assert np.corrcoef(rate[known], shown[known])[0, 1] > 0.5


def test_a_user_is_shown_more_of_the_categories_they_click():
    items = draw_items(CONFIG)
    policy = LoggingPolicy(CONFIG, items)
    all_items = np.arange(60).repeat(5)
    policy.observe(np.zeros(300, dtype=np.int64), all_items, items.category[all_items] == 2)
    share = []
    for user in (0, 1):
        slates = policy.slates(np.random.default_rng(5), np.full(2_000, user), np.full(2_000, 3), NOW)
        share.append((items.category[slates.items] == 2).mean())
    assert share[0] > share[1] + 0.05


def test_unpublished_items_are_never_shown_and_a_slate_can_take_all_there_are():
    config = SimulatorConfig(num_users=20, num_items=50, new_item_fraction=0.5, exploration_fraction=0.05)
    items = draw_items(config)
    known = np.flatnonzero(items.published <= NOW)
    policy = LoggingPolicy(config, items)
    slates = policy.slates(np.random.default_rng(6), np.arange(20), np.full(20, len(known)), NOW)
    assert np.array_equal(np.sort(slates.items.reshape(20, -1), axis=1), np.tile(known, (20, 1)))
    assert (slates.propensity > 0).all() and slates.propensity.max() <= 1
    assert slates.propensity[slates.positions == len(known)] == pytest.approx(1.0)


def test_old_clicks_fade():
    policy = _trained_policy()
    before = policy.item_clicks.sum()
    none = np.zeros(0, dtype=np.int64)
    policy.observe(none, none, none.astype(bool))
    assert policy.item_clicks.sum() == pytest.approx(0.9 * before)
