from __future__ import annotations

import numpy as np
import pytest

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import CRAWLER, PERSON, SILENT_BOT, draw_users, midnight
from evergreen.simulator.traffic import draw_requests, events_on

CONFIG = SimulatorConfig(num_users=500, num_days=14, events_per_day=5_000)
USERS = draw_users(CONFIG)


@pytest.mark.parametrize(("num_days", "events_per_day"), [(1, 100), (3, 101), (30, 10_000), (365, 777)])
def test_days_add_up_to_the_events_asked_for(num_days, events_per_day):
    config = SimulatorConfig(num_days=num_days, events_per_day=events_per_day)
    assert sum(events_on(config, day) for day in range(num_days)) == num_days * events_per_day


def test_weekends_are_busier():
    saturday, monday = 3, 5  # 2025-01-01 is a Wednesday
    assert events_on(CONFIG, saturday) > 1.1 * events_on(CONFIG, monday)


@pytest.mark.parametrize("day", [0, 3, 13, 40])
def test_requests_are_in_order_within_their_day_and_fill_it(day):
    requests = draw_requests(CONFIG, USERS, day)
    assert (np.diff(requests.times) >= np.timedelta64(0, "us")).all()
    assert requests.times[0] >= midnight(CONFIG, day) and requests.times[-1] < midnight(CONFIG, day + 1)
    assert requests.slate_sizes.sum() == events_on(CONFIG, day)
    assert requests.slate_sizes.min() == 5 and requests.slate_sizes.max() == 10


def test_people_come_in_sessions():
    requests = draw_requests(CONFIG, USERS, 0)
    person = USERS.kind[requests.users] == PERSON
    users, times = requests.users[person], requests.times[person]
    order = np.lexsort((times, users))
    gaps = np.diff(times[order])[np.diff(users[order]) == 0] / np.timedelta64(1, "s")
    assert (gaps < 300).mean() > 0.5
    assert (gaps > 3_600).any()


def test_a_session_keeps_its_device():
    requests = draw_requests(CONFIG, USERS, 0)
    person = USERS.kind[requests.users] == PERSON
    users, times, devices = requests.users[person], requests.times[person], requests.devices[person]
    order = np.lexsort((times, users))
    same = (np.diff(users[order]) == 0) & (np.diff(times[order]) < np.timedelta64(60, "s"))
    assert (np.diff(devices[order])[same] == 0).mean() > 0.95


def test_some_people_are_far_more_active_than_others():
    users = np.concatenate([draw_requests(CONFIG, USERS, day).users for day in range(14)])
    counts = np.sort(np.bincount(users[USERS.kind[users] == PERSON], minlength=500))[::-1]
    assert counts[:50].sum() > 0.35 * counts.sum()


def test_night_is_quiet():
    hours = draw_requests(CONFIG, USERS, 0).times.astype("datetime64[h]").astype(int) % 24
    assert np.isin(hours, [1, 2, 3]).mean() < 0.1 < np.isin(hours, [18, 19, 20]).mean()


def test_newcomers_do_not_come_before_their_day():
    assert (USERS.first_day > 0).sum() > 50
    for day in (0, 6):
        requests = draw_requests(CONFIG, USERS, day)
        assert (USERS.first_day[requests.users] <= day).all()


def test_crawler_comes_on_one_night_a_week_and_is_quick():
    crawler = USERS.of_kind(CRAWLER)
    nights = [np.isin(draw_requests(CONFIG, USERS, day).users, crawler) for day in range(14)]
    assert [day for day, seen in enumerate(nights) if seen.any()] == [3, 10]
    times = draw_requests(CONFIG, USERS, 3).times[nights[3]]
    assert (np.diff(times) < np.timedelta64(3, "s")).all()


def test_silent_bot_looks_all_day_long():
    requests = draw_requests(CONFIG, USERS, 0)
    times = requests.times[np.isin(requests.users, USERS.of_kind(SILENT_BOT))]
    assert len(times) >= 10
    assert np.diff(times).max() < np.timedelta64(5, "h")


def test_a_log_without_bots_has_none():
    config = SimulatorConfig(num_users=100, num_days=4, num_crawlers=0, num_silent_bots=0)
    users = draw_users(config)
    assert (users.kind == PERSON).all()
    assert draw_requests(config, users, 3).slate_sizes.sum() == events_on(config, 3)
