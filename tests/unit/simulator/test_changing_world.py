"""The world after its log: the same people and items, others that come, and what each scenario changes in the truth."""

from __future__ import annotations

import numpy as np
import pytest

from evergreen.simulator.changing_world import ChangingWorld
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import PERSON, Floats
from evergreen.simulator.scenarios import SCENARIOS, Scenario
from evergreen.simulator.world import World

CONFIG = SimulatorConfig(num_users=400, num_items=200, num_days=10)
FIRST = CONFIG.num_days
"""2025-01-11, a Saturday."""


def _world(scenario: str | Scenario = "stable", day: int = 0, *, seed: int = 0, num_days: int = 20) -> ChangingWorld:
    """On a day of the world."""
    chosen = SCENARIOS[scenario] if isinstance(scenario, str) else scenario
    world = ChangingWorld(CONFIG, chosen, seed, FIRST, num_days)
    for _ in range(FIRST + day):
        world.advance()
    return world


def _relevance(world: World) -> Floats:
    """(people, items of the first day) in log-odds, at noon."""
    people = np.flatnonzero(world.users.kind[: CONFIG.num_users] == PERSON)[:, None]
    items = np.flatnonzero(world.items.published <= np.datetime64(CONFIG.start.replace(tzinfo=None)))
    relevance = world.relevance(people, items, world.midnight + np.timedelta64(12, "h"), np.zeros_like(people))
    return np.log(relevance / (1 - relevance))


def _agreement(one: World, other: World) -> float:
    return float(np.corrcoef(_relevance(one).ravel(), _relevance(other).ravel())[0, 1])


def _likeness(one: World, other: World) -> float:
    """Of the tastes alone."""
    people = np.flatnonzero(one.users.kind[: CONFIG.num_users] == PERSON)
    return float(np.corrcoef(one.tastes(people).ravel(), other.tastes(people).ravel())[0, 1])


def test_until_its_log_ends_it_is_the_logs_world_whatever_the_seed_and_the_scenario():
    plain, changing = World(CONFIG), ChangingWorld(CONFIG, SCENARIOS["new-catalogue"], 5, FIRST, 20)
    for _ in range(FIRST - 1):
        plain.advance()
        changing.advance()
    assert np.array_equal(_relevance(plain), _relevance(changing))
    assert np.array_equal(plain.users.ids, changing.users.ids[: CONFIG.num_users])
    assert np.array_equal(plain.items.ids, changing.items.ids[: CONFIG.num_items])


def test_with_the_logs_seed_tastes_drift_as_a_longer_logs_do():
    plain = World(CONFIG)
    for _ in range(FIRST + 3):
        plain.advance()
    assert np.array_equal(_relevance(plain), _relevance(_world(day=3)))


def test_another_seed_goes_on_another_way():
    one, other = _world(day=10), _world(day=10, seed=1)
    assert not np.array_equal(_relevance(one), _relevance(other))
    assert 0.5 < _agreement(one, other) < 0.99


@pytest.mark.parametrize("scenario", ["new-catalogue", "bot-attack"])
def test_what_happens_does_not_depend_on_how_long_the_world_is_watched(scenario: str):
    short, long = _world(scenario, 6, num_days=7), _world(scenario, 6, num_days=20)
    for name in ("ids", "kind", "segment", "activity", "first_day"):
        values = getattr(short.users, name)
        assert np.array_equal(values, getattr(long.users, name)[: len(values)]), name
    for name in ("ids", "category", "published", "quality"):
        values = getattr(short.items, name)
        assert np.array_equal(values, getattr(long.items, name)[: len(values)]), name
    everybody = np.arange(len(short.users.ids))
    assert np.array_equal(short.tastes(everybody), long.tastes(everybody))


def test_people_and_items_arrive_every_day_at_the_pace_of_the_log():
    world = _world(num_days=60)
    days = world.users.first_day[CONFIG.num_users :] - FIRST
    assert len(days) == pytest.approx(60 * CONFIG.new_user_fraction * CONFIG.num_users / CONFIG.num_days, rel=0.15)
    assert set(days) == set(range(60))
    published = world.items.published[CONFIG.num_items :]
    assert len(published) == pytest.approx(60 * CONFIG.new_item_fraction * CONFIG.num_items / CONFIG.num_days, rel=0.15)
    assert published.min() >= np.datetime64("2025-01-11")


def test_nobody_arrives_where_arrivals_are_zero():
    world = _world(Scenario(name="closed", arrivals=0.0))
    assert (len(world.users.ids), len(world.items.ids)) == (CONFIG.num_users, CONFIG.num_items)


def test_tastes_shift_overnight_and_main_effects_do_not():
    stable, before, after = _world(day=4), _world("taste-shift", 4), _world("taste-shift", 5)
    assert np.array_equal(_relevance(stable), _relevance(before))
    assert _agreement(stable, _world(day=5)) > 0.97
    assert _agreement(before, after) < 0.7
    one, other = (
        world.utility(np.arange(50), np.full(50, 3), np.full(50, world.midnight), np.zeros(50, dtype=int)).main
        for world in (after, _world(day=5))
    )
    assert np.array_equal(one, other)
    assert _relevance(after).std() == pytest.approx(_relevance(before).std(), rel=0.15)


def _turn(seed: int) -> int:
    """By how many segments tastes have gone round after a shift; each segment's must be unlike its own of before."""
    tastes = []
    for scenario in ("stable", "taste-shift"):
        world = _world(scenario, 5, seed=seed)
        people = [np.flatnonzero(world.users.segment[: CONFIG.num_users] == segment) for segment in range(6)]
        tastes.append(np.array([world.tastes(users).mean(axis=0) for users in people]))
    stable, shifted = tastes
    likeness = [
        np.mean([np.corrcoef(shifted[segment], stable[(segment - turn) % 6])[0, 1] for segment in range(6)])
        for turn in range(6)
    ]
    assert max(likeness) > 0.8 and likeness[0] < 0.5
    return int(np.argmax(likeness))


def test_after_a_shift_each_segment_likes_what_another_one_liked_and_the_seed_says_whose():
    turns = {_turn(seed) for seed in range(6)}
    assert len(turns) > 1 and 0 not in turns


def test_slow_fade_is_no_jump_but_soon_leaves_the_stable_world_behind():
    start = _world(day=0)
    assert _agreement(start, _world("slow-fade", 1)) > 0.9
    assert _agreement(start, _world(day=14)) > 0.8 > 0.7 > _agreement(start, _world("slow-fade", 14))


def test_weekends_come_and_go_in_the_log_too():
    saturday, sunday, monday, next_saturday = (_world("seasonal", day) for day in (0, 1, 2, 7))
    friday = _world("seasonal", -1)
    assert friday.midnight == np.datetime64("2025-01-10")
    assert _likeness(friday, monday) > 0.9
    assert _likeness(saturday, sunday) > 0.9 and _likeness(saturday, next_saturday) > 0.8
    assert _likeness(friday, saturday) < 0.8 and _likeness(sunday, monday) < 0.8
    in_the_log = ChangingWorld(CONFIG, SCENARIOS["seasonal"], 0, FIRST, 0)
    for _ in range(3):
        in_the_log.advance()  # to 2025-01-04, a Saturday
    assert _likeness(in_the_log, saturday) > 0.8


def test_new_catalogue_brings_items_and_people_on_its_day():
    new, stable = _world("new-catalogue"), _world()
    more_items = np.sum(new.items.published >= np.datetime64("2025-01-16")) - np.sum(
        stable.items.published >= np.datetime64("2025-01-16")
    )
    assert more_items == pytest.approx(0.4 * CONFIG.num_items, abs=25)
    in_its_hour = (new.items.published >= np.datetime64("2025-01-16")) & (
        new.items.published < np.datetime64("2025-01-16T01")
    )
    assert in_its_hour.sum() >= 0.4 * CONFIG.num_items
    assert np.sum(new.users.first_day == FIRST + 5) >= 0.3 * CONFIG.num_users


@pytest.mark.parametrize("scenario", ["broken-feature", "logging-outage", "click-outage"])
def test_what_breaks_on_our_side_leaves_the_world_stable(scenario: str):
    assert np.array_equal(_relevance(_world(day=6)), _relevance(_world(scenario, 6)))
