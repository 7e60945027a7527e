from __future__ import annotations

import numpy as np
import pytest

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import PERSON
from evergreen.simulator.world import World

CONFIG = SimulatorConfig(num_users=400, num_items=200, num_days=60)


def _sample(world: World, rows: int = 2_000):
    rng = np.random.default_rng(7)
    people = np.flatnonzero(world.users.kind == PERSON)
    items = np.flatnonzero(world.items.published <= world.midnight)
    times = world.midnight + rng.integers(0, 86_399, rows).astype("timedelta64[s]")
    return rng.choice(people, rows), rng.choice(items, rows), times, rng.integers(0, 3, rows)


def _on_day(config: SimulatorConfig, day: int) -> World:
    world = World(config)
    for _ in range(day):
        world.advance()
    return world


def test_worlds_of_one_config_agree_whatever_they_were_asked_before():
    one, two = World(CONFIG), World(CONFIG)
    users, items, times, devices = _sample(one)
    one.respond(np.random.default_rng(0), users, items, np.ones_like(users), times, devices)
    one.advance(), two.advance()
    users, items, times, devices = _sample(one)
    assert np.array_equal(one.relevance(users, items, times, devices), two.relevance(users, items, times, devices))


def test_tastes_change_slowly_and_keep_their_spread():
    people = np.arange(CONFIG.num_users)
    tastes = [_on_day(CONFIG, day).tastes(people) for day in (0, 1, 60)]
    correlation = [np.corrcoef(tastes[0].ravel(), later.ravel())[0, 1] for later in tastes]
    assert correlation[1] > 0.97
    assert 0.2 < correlation[2] < 0.75
    assert tastes[2].std() == pytest.approx(tastes[0].std(), rel=0.15)


def test_what_people_prefer_changes_with_their_tastes():
    first, last = _on_day(CONFIG, 0), _on_day(CONFIG, 60)
    users, items, times, devices = _sample(first)
    then = first.utility(users, items, times, devices).interaction
    now = last.utility(users, items, times + (last.midnight - first.midnight), devices).interaction
    assert np.corrcoef(then, now)[0, 1] < 0.8


def test_an_older_item_is_less_attractive():
    world = World(CONFIG)
    age = (world.midnight - world.items.published) / np.timedelta64(1, "D")
    known = np.flatnonzero(age >= 0)
    times = np.full(len(known), world.midnight)
    zeros = np.zeros(len(known), dtype=np.int64)
    rest = world.utility(zeros, known, times, zeros).main - world.items.quality[known]
    assert np.corrcoef(rest, np.exp(-age[known] / CONFIG.item_age_days))[0, 1] > 0.4


def test_click_probability_is_examination_times_relevance():
    world = World(CONFIG)
    users, items, times, devices = _sample(world)
    relevance = world.relevance(users, items, times, devices)
    positions = np.tile(np.arange(1, 11), 200)
    expected = relevance * positions**-CONFIG.position_bias_exponent
    assert np.allclose(world.click_probability(users, items, positions, times, devices), expected)


def test_bots_click_by_kind_not_by_taste():
    world = World(CONFIG)
    bots = np.flatnonzero(world.users.kind != PERSON)
    _, items, times, devices = _sample(world, len(bots))
    probability = world.click_probability(bots, items, np.full(len(bots), 9), times, devices)
    assert sorted(probability) == [0.0, 0.97]


def test_satisfied_people_stay_longer_and_rate_higher():
    world = World(CONFIG)
    users, items, times, devices = _sample(world, 60_000)
    satisfaction = world.utility(users, items, times, devices).satisfaction
    outcomes = world.respond(np.random.default_rng(0), users, items, np.ones_like(users), times, devices)
    clicked, rated = outcomes.clicked, ~np.isnan(outcomes.rating)
    assert np.corrcoef(satisfaction[clicked], np.log(outcomes.dwell_seconds[clicked]))[0, 1] > 0.3
    assert np.corrcoef(satisfaction[rated], outcomes.rating[rated])[0, 1] > 0.6


def test_interaction_strength_zero_leaves_main_effects_alone():
    world = World(CONFIG.model_copy(update={"interaction_strength": 0.0}))
    assert not world.utility(*_sample(world)).interaction.any()


def test_random_slates_are_clicked_at_the_configured_rate():
    config = SimulatorConfig(num_users=2_000, click_rate=0.1)
    world, rng = World(config), np.random.default_rng(5)
    weights = world.users.activity / world.users.activity.sum()
    users = rng.choice(config.num_users, 40_000, p=weights)
    _, items, times, devices = _sample(world, 40_000)
    sizes = np.repeat(np.arange(5, 11), np.arange(5, 11))
    positions = np.concatenate([np.arange(1, size + 1) for size in range(5, 11)])
    assert len(sizes) == len(positions)
    mean = world.click_probability(users, items, rng.choice(positions, 40_000), times, devices).mean()
    assert mean == pytest.approx(0.1, rel=0.08)


def test_time_outside_the_current_day_is_refused():
    world = World(CONFIG)
    users, items, times, devices = _sample(world)
    with pytest.raises(ValueError, match=r"the world is on day 0 .* call advance\(\)"):
        world.relevance(users, items, times + np.timedelta64(1, "D"), devices)


def test_item_before_its_publication_is_refused():
    world = World(CONFIG)
    future = np.flatnonzero(world.items.published > world.midnight)[:1]
    zero = np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match="published only at"):
        world.relevance(zero, future, np.array([world.midnight]), zero)
