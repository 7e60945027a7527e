"""Visits: who comes does not depend on what is shown, equal answers have equal luck, the truth beside it is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evergreen.contracts.errors import InputError
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import DEVICES, FARM_ACCOUNT, PERSON
from evergreen.simulator.scenarios import SCENARIOS
from evergreen.simulator.visits import DayOutcomes, DayRequests, VisitPlan, Visits
from tests.unit.simulator.recommenders import AtRandom, Fixed, known_items

LOG = SimulatorConfig(num_users=300, num_items=120, num_days=6, click_rate=0.1)
PLAN = VisitPlan(log=LOG, seed=4, requests_per_day=400, k=8)


def _pages(asked: DayRequests, recommend: Fixed | AtRandom) -> list[tuple[str, ...]]:
    return [answer.item_ids for answer in recommend(asked.asks)]


def _live(plan: VisitPlan = PLAN, day: int = 0) -> tuple[Visits, DayRequests, DayOutcomes]:
    """A day on which everybody is shown items at random."""
    visits = Visits(plan, num_days=20)
    asked = visits.day(day)
    return visits, asked, visits.respond(asked, _pages(asked, AtRandom(visits)))


@pytest.fixture(scope="module")
def lived() -> tuple[Visits, DayRequests, DayOutcomes]:
    """A day of many pages."""
    return _live(PLAN.model_copy(update={"requests_per_day": 6_000}))


def test_users_come_at_the_same_times_whatever_they_were_shown():
    one, other = Visits(PLAN, num_days=3), Visits(PLAN, num_days=9)
    for day, recommend in ((0, Fixed(known_items(one))), (1, AtRandom(one))):
        asked = one.day(day)
        one.respond(asked, _pages(asked, recommend))
    assert one.day(2).asks == other.day(2).asks


def test_a_question_says_who_asks_when_and_on_which_device(lived):
    visits, asked, _ = lived
    assert len(asked.asks) == pytest.approx(6_000, rel=0.2)
    times = [ask.event_timestamp for ask in asked.asks]
    assert times == sorted(times)
    assert visits.plan.date(0) <= times[0] and times[-1] < visits.plan.date(1)
    assert [ask.request_id for ask in asked.asks[:2]] == ["w4-d6-0", "w4-d6-1"]
    assert {ask.k for ask in asked.asks} == {8}
    assert {device for ask in asked.asks for device in ask.context.values()} == set(DEVICES)
    assert {ask.user_id for ask in asked.asks} <= set(visits.world.users.ids.tolist())


def test_equal_answers_have_equal_outcomes():
    (_, _, one), (_, _, other) = _live(), _live()
    assert np.array_equal(one.slates.items, other.slates.items)
    assert np.array_equal(one.outcomes.clicked, other.outcomes.clicked)
    assert np.array_equal(one.click_delays, other.click_delays, equal_nan=True)
    assert np.array_equal(one.outcomes.rating, other.outcomes.rating, equal_nan=True)


def test_the_luck_of_an_item_on_a_page_does_not_depend_on_the_rest_of_the_page():
    """Higher up, an item keeps its clicks and may gain others."""
    visits = Visits(PLAN.model_copy(update={"explore": 0.0}), num_days=1)
    asked, ids = visits.day(0), known_items(visits)
    high = visits.respond(asked, [ids[:2]] * len(asked.asks))
    low = visits.respond(asked, [[ids[5], ids[6], ids[7], ids[1], ids[0]]] * len(asked.asks))

    def clicked(outcomes: DayOutcomes, item: int) -> np.ndarray:
        return outcomes.outcomes.clicked[outcomes.slates.items == item]

    first = visits.world.items.ids.tolist().index(ids[0])
    assert (clicked(low, first) <= clicked(high, first)).all()
    assert clicked(low, first).sum() < clicked(high, first).sum()


def test_trying_answers_changes_nothing():
    visits = Visits(PLAN, num_days=2)
    asked = visits.day(0)
    pages = _pages(asked, Fixed(known_items(visits)))
    assert len({tuple(page) for page in pages}) > 20, "some pages the shop fills"
    before = visits.respond(asked, pages).clicks()
    visits.respond(asked, _pages(asked, AtRandom(visits)))
    assert np.array_equal(visits.respond(asked, pages).clicks(), before)


def test_people_examine_positions_as_the_world_says(lived):
    visits, asked, outcomes = lived
    by_person = (visits.world.users.kind[asked.requests.users] == PERSON)[outcomes.slates.requests]
    examined = outcomes.outcomes.click_probability[by_person] / outcomes.outcomes.relevance[by_person]
    assert np.allclose(examined, outcomes.slates.positions[by_person] ** -LOG.position_bias_exponent)
    for position in range(1, 9):
        at = by_person & (outcomes.slates.positions == position)
        expected = outcomes.outcomes.click_probability[at].sum()
        assert abs(outcomes.outcomes.clicked[at].sum() - expected) < 4.5 * np.sqrt(expected)


def test_clicks_follow_after_seconds_and_never_outlive_the_attribution_window(lived):
    delays = lived[2].click_delays[lived[2].outcomes.clicked]
    assert np.isnan(lived[2].click_delays[~lived[2].outcomes.clicked]).all()
    assert 4 < np.median(delays) < 8 and delays.min() > 0 and delays.max() < 600


def test_expected_clicks_are_those_of_peoples_pages_that_the_server_chose(lived):
    visits, asked, outcomes = lived
    measured = outcomes.measured
    by_person = visits.world.users.kind[asked.requests.users] == PERSON
    assert np.array_equal(measured, by_person & ~asked.explored) and 0.7 < measured.mean() < 0.85
    sums = np.bincount(outcomes.slates.requests, outcomes.outcomes.click_probability)
    assert np.allclose(outcomes.expected_clicks[measured], sums[measured])
    for values in (outcomes.expected_clicks, outcomes.oracle_clicks, outcomes.random_clicks):
        assert np.array_equal(np.isnan(values), ~measured)
    total = outcomes.expected_clicks[measured].sum()
    assert abs(outcomes.clicks()[measured].sum() - total) < 4.5 * np.sqrt(total)


def test_no_page_is_better_than_the_oracles(lived):
    visits, asked, outcomes = lived
    people = np.flatnonzero(outcomes.measured)
    assert (outcomes.oracle_clicks[people] > outcomes.expected_clicks[people] - 1e-12).all()
    # One page by hand: everything that is published, ranked by its true relevance.
    request = people[len(people) // 2]
    column = asked.requests.rows(np.array([request]))
    items = np.flatnonzero(visits.world.items.published <= column.times)
    relevance = visits.world.relevance(column.users, items, column.times, column.devices)
    best = visits.world.items.ids[items[np.argsort(-relevance)[:8]]].tolist()
    pages = _pages(asked, Fixed([]))
    pages[request] = tuple(best)
    assert visits.respond(asked, pages).expected_clicks[request] == pytest.approx(outcomes.oracle_clicks[request])


def test_pages_at_random_have_the_clicks_expected_of_them(lived):
    outcomes, people = lived[2], lived[2].measured
    # The recommender knows the items of the first day alone; the others are a few.
    assert outcomes.expected_clicks[people].mean() == pytest.approx(outcomes.random_clicks[people].mean(), rel=0.05)


def test_the_shop_fills_its_share_of_the_pages_with_items_at_random(lived):
    visits, asked, _ = lived
    assert asked.explored.mean() == pytest.approx(visits.plan.explore, abs=0.015)
    drawn = asked.drawn[asked.explored]
    assert all(len(set(page)) == 8 for page in drawn.tolist())
    times = asked.requests.times[asked.explored]
    assert (visits.world.items.published[drawn] <= times[:, None]).all()
    # Items that were there all day: 4.5 standard deviations of a Poisson count.
    counts = np.bincount(drawn.ravel(), minlength=len(visits.world.items.ids))
    num_published = (visits.world.items.published[:, None] <= times).sum(axis=0)
    mean = (8 / num_published).sum()
    there = np.isin(visits.world.items.ids, known_items(visits))
    assert np.abs(counts[there] - mean).max() < 4.5 * np.sqrt(mean)


def test_the_server_orders_a_page_that_the_shop_fills_and_what_it_does_not_know_comes_last(lived):
    visits, asked, _ = lived
    pages = _pages(asked, Fixed(known_items(visits)))
    request = int(np.flatnonzero(asked.explored)[3])
    drawn = visits.world.items.ids[asked.drawn[request]].tolist()
    assert list(asked.asks[request].candidates) == drawn
    pages[request] = (drawn[5], drawn[2], drawn[7])
    outcomes = visits.respond(asked, pages)
    of_page = outcomes.slates.requests == request
    shown = visits.world.items.ids[outcomes.slates.items[of_page]].tolist()
    assert shown == [drawn[n] for n in (5, 2, 7, 0, 1, 3, 4, 6)]
    assert outcomes.slates.positions[of_page].tolist() == list(range(1, 9))
    assert outcomes.served[of_page].tolist() == [True] * 3 + [False] * 5
    assert outcomes.served[~of_page].all()


def test_a_row_has_the_probability_of_its_policy(lived):
    visits, asked, outcomes = lived
    by_shop = asked.explored[outcomes.slates.requests]
    assert (outcomes.slates.propensity[~by_shop] == 1 - visits.plan.explore).all()
    published = (visits.world.items.published <= asked.requests.times[asked.explored][0]).sum()
    assert outcomes.slates.propensity[by_shop][0] == pytest.approx(visits.plan.explore * 8 / published, rel=1e-9)


@pytest.mark.parametrize(("explore", "seen"), [(0.0, 0.0), (0.2, 0.9)])
def test_without_exploration_new_items_are_in_no_log(explore: float, seen: float):
    plan = PLAN.model_copy(update={"scenario": SCENARIOS["new-catalogue"], "explore": explore})
    _, _, outcomes = _live(plan, day=5)
    visits, _, after = _live(plan, day=6)
    new = np.flatnonzero(visits.world.items.published >= np.datetime64("2025-01-12"))
    new = new[visits.world.items.published[new] < np.datetime64("2025-01-12T01")]
    shown = np.concatenate([outcomes.slates.items, after.slates.items])
    assert len(new) >= 48
    assert np.isin(new, shown).mean() >= seen
    assert seen or not np.isin(new, shown).any()


def test_attackers_come_on_their_days_and_a_farm_asks_for_the_pages_of_its_items():
    plan = PLAN.model_copy(update={"scenario": SCENARIOS["bot-attack"]})
    visits = Visits(plan, num_days=12)
    kinds = visits.world.users.kind
    bots = []
    for day in range(11):
        asked = visits.day(day)
        who = kinds[asked.requests.users]
        bots.append(int(np.isin(who, [FARM_ACCOUNT, FARM_ACCOUNT - 1, FARM_ACCOUNT + 1]).sum()))
        outcomes = visits.respond(asked, _pages(asked, Fixed(known_items(visits))))
        for request in np.flatnonzero(who == FARM_ACCOUNT):
            ask = asked.asks[request]
            assert ask.k == 1 and ask.candidates is not None
            assert not outcomes.measured[request] and not asked.explored[request]
        farm = who[outcomes.slates.requests] == FARM_ACCOUNT
        if farm.any():
            assert outcomes.outcomes.clicked[farm].mean() > 0.9
            assert (outcomes.slates.propensity[farm] == 1).all()
            nothing = visits.respond(asked, [()] * len(asked.asks))
            of_farm = who[nothing.slates.requests] == FARM_ACCOUNT
            assert of_farm.sum() == farm.sum() and not nothing.served.any(), "a page shows its item, known or not"
    assert [day for day, count in enumerate(bots) if count] == [5, 6, 7, 8]
    assert (kinds[: LOG.num_users] <= 2).all()


def test_people_come_as_without_the_attack():
    plain, attacked = Visits(PLAN, num_days=6), Visits(PLAN.model_copy(update={"scenario": SCENARIOS["bot-attack"]}))
    one, other = plain.day(5).asks, attacked.day(5).asks
    assert len(one) < len(other)
    attackers = set(attacked.world.users.ids[np.flatnonzero(attacked.world.users.kind > 2)].tolist())
    assert len(attackers) == 15
    people = [ask.event_timestamp for ask in other if ask.user_id not in attackers]
    assert people == [ask.event_timestamp for ask in one]


def test_new_people_come(lived):
    visits = Visits(PLAN, num_days=10)
    new = set(visits.world.users.ids[LOG.num_users :].tolist())
    assert any(ask.user_id in new for ask in visits.day(9).asks)


def _shown_instead(visits: Visits, page: Sequence[str], request: int = 7) -> tuple[DayRequests, list[tuple[str, ...]]]:
    asked = visits.day(0)
    pages = _pages(asked, Fixed(known_items(visits)[:3]))
    assert asked.explored[request] == (request != 7)
    pages[request] = tuple(page)
    return asked, pages


def test_items_of_another_world_are_named():
    visits = Visits(PLAN, num_days=1)
    with pytest.raises(
        InputError, match="none of this world: nothing for w4-d6-7, i9 for w4-d6-7; is the served model"
    ):
        visits.respond(*_shown_instead(visits, ["nothing", "i9"]))


def test_an_item_that_is_yet_to_be_published_is_named():
    visits = Visits(PLAN, num_days=3)
    future = visits.world.items.ids[np.argmax(visits.world.items.published)]
    with pytest.raises(InputError, match=f"yet to be published: {future} for w4-d6-7; does a feature table know"):
        visits.respond(*_shown_instead(visits, [str(future)]))


def test_an_item_twice_on_a_page_is_named():
    visits = Visits(PLAN, num_days=1)
    item = known_items(visits)[0]
    with pytest.raises(InputError, match=f"on the page already: {item} for w4-d6-7"):
        visits.respond(*_shown_instead(visits, [item, item]))


def test_more_items_than_the_page_has_room_for_are_named():
    visits = Visits(PLAN, num_days=1)
    with pytest.raises(InputError, match=r"more than the page asked for: .* for w4-d6-7"):
        visits.respond(*_shown_instead(visits, known_items(visits)[:9]))


def test_an_item_that_is_not_among_the_candidates_is_named():
    visits = Visits(PLAN, num_days=1)
    asked = visits.day(0)
    request = int(np.flatnonzero(asked.explored)[0])
    other = next(item for item in known_items(visits) if item not in asked.asks[request].candidates)
    with pytest.raises(InputError, match=f"not among the candidates: {other} for w4-d6-{request}; rank what"):
        visits.respond(*_shown_instead(visits, [other], request))


def test_there_is_no_way_back_and_the_world_ends():
    visits = Visits(PLAN, num_days=3)
    visits.day(2)
    with pytest.raises(ValueError, match="day 1 is over: the world is on day 2"):
        visits.day(1)
    with pytest.raises(InputError, match="day 3: the world lasts 3 days, from 0 to 2"):
        visits.day(3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"first_day": 7}, "first_day=7: the log ends after 6 days; leave no gap"),
        ({"k": 21}, "k=21: input should be less than or equal to 20"),
        ({"explore": 1.5}, "explore=1.5"),
        ({"requests": 3}, "requests: no such setting; there are log, scenario, seed"),
    ],
)
def test_a_plan_that_cannot_be_is_explained(values: dict, told: str):
    with pytest.raises(InputError) as error:
        VisitPlan(log=LOG, **values)
    assert told in str(error.value)


def test_a_world_may_begin_within_its_log():
    visits = Visits(VisitPlan(log=LOG, first_day=4, requests_per_day=50), num_days=3)
    asked = visits.day(0)
    assert asked.asks[0].request_id == "w0-d4-0" and visits.plan.date(0).day == 5
    assert (visits.world.users.kind == PERSON).sum() > LOG.num_users - 5
    # Who arrives on the log's own days is the log's; later ones are the world's.
    assert visits.world.users.first_day[LOG.num_users :].min() >= 6
