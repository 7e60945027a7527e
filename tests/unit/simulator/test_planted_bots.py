"""Planted bots: what each kind does, that only the truth tells, and that people are the same with and without them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from evergreen.contracts.errors import InputError
from evergreen.simulator.bots import PlantedBots
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import EVENTS, simulate_log
from evergreen.simulator.population import FARM_ACCOUNT, FAST_CRAWLER, KINDS, MIMIC, draw_items, draw_users
from evergreen.simulator.traffic import draw_requests

WORLD = {"num_users": 400, "num_items": 200, "num_days": 12, "events_per_day": 3_000}
BOTS = {"num_fast_crawlers": 6, "num_farm_accounts": 60, "num_mimics": 10}
CONFIG = SimulatorConfig(**WORLD, **BOTS)
MINUTE = np.timedelta64(60, "s")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Events beside their truth."""
    path = tmp_path_factory.mktemp("bots") / "log"
    simulate_log(CONFIG, path)
    events, truth = (
        pa.concat_tables(ds.dataset(file).to_table() for file in sorted((path / name).iterdir()))
        for name in ("events", "truth")
    )
    for name in ("click_probability", "user_kind", "is_bot"):
        events = events.append_column(name, truth[name])
    return events


def _of(log: pa.Table, kind: int) -> pa.Table:
    return log.filter(pa.array([name == KINDS[kind] for name in log["user_kind"].to_pylist()]))


def _requests_by_user(events: pa.Table) -> dict[str, np.ndarray]:
    """Sorted times of each user's requests."""
    users, times = np.array(events["user_id"].to_pylist()), events["event_timestamp"].to_numpy()
    return {user: np.unique(times[users == user]) for user in set(users)}


def test_planted_bots_come_on_top_of_the_events_asked_for(log: pa.Table) -> None:
    planted = np.isin(log["user_kind"].to_pylist(), [KINDS[kind] for kind in (FAST_CRAWLER, FARM_ACCOUNT, MIMIC)])
    assert (~planted).sum() == CONFIG.num_days * CONFIG.events_per_day
    assert planted.sum() > 1_000
    assert (planted <= np.array(log["is_bot"].to_pylist())).all()
    assert len({log["user_id"][row].as_py() for row in np.flatnonzero(planted)}) == 76


def test_people_and_their_requests_are_the_same_with_and_without_bots() -> None:
    plain = SimulatorConfig(**WORLD)
    people, all_users = draw_users(plain), draw_users(CONFIG)
    for name in ("ids", "kind", "segment", "country", "activity", "eagerness", "first_day"):
        assert np.array_equal(getattr(people, name), getattr(all_users, name)[: plain.num_users]), name
    for day in (0, 7):
        one, other = draw_requests(plain, people, day), draw_requests(CONFIG, all_users, day)
        assert np.array_equal(one.times, other.times) and np.array_equal(one.users, other.users)


def test_a_log_without_planted_bots_asks_for_no_item() -> None:
    config = SimulatorConfig(**WORLD)
    users = draw_users(config)
    assert len(PlantedBots(config, users, draw_items(config)).requests(3)) == 0
    assert (draw_requests(config, users, 3).asked_for == -1).all()


def test_crawlers_are_fast_see_much_and_click_all_or_nothing(log: pa.Table) -> None:
    crawlers = _of(log, FAST_CRAWLER)
    for user, times in _requests_by_user(crawlers).items():
        assert np.median(np.diff(times)) < np.timedelta64(3, "s")
        own = crawlers.filter(pa.array([name == user for name in crawlers["user_id"].to_pylist()]))
        assert len(set(own["item_id"].to_pylist())) > 100
        assert not 0.02 < own["clicked"].to_numpy().mean() < 0.94
    rates = {u: r for u, r in zip(crawlers["user_id"].to_pylist(), crawlers["clicked"].to_pylist(), strict=True) if r}
    assert len(rates) == 3


def test_farm_accounts_come_at_once_click_the_same_few_items_and_never_come_again(log: pa.Table) -> None:
    farm = _of(log, FARM_ACCOUNT)
    requests = _requests_by_user(farm)
    assert len(requests) == 60
    starts = np.sort([times[0] for times in requests.values()])
    campaigns = np.split(starts, np.flatnonzero(np.diff(starts) > np.timedelta64(2, "h")) + 1)
    assert all(campaign[-1] - campaign[0] <= np.timedelta64(1, "h") for campaign in campaigns)
    assert max(times[-1] - times[0] for times in requests.values()) < 10 * MINUTE
    clicked = farm.filter(farm["clicked"])
    assert len(set(clicked.filter(pa.array(clicked["position"].to_numpy() == 1))["item_id"].to_pylist())) <= 6
    assert clicked.num_rows > 0.9 * sum(len(times) for times in requests.values())


def test_farm_accounts_keep_the_pace_of_their_script(log: pa.Table) -> None:
    spreads = [
        np.diff(times).astype(float).std() / np.diff(times).astype(float).mean()
        for times in _requests_by_user(_of(log, FARM_ACCOUNT)).values()
    ]
    assert max(spreads) < 0.06


def test_an_item_that_was_asked_for_is_shown_first_with_propensity_one(log: pa.Table) -> None:
    farm = _of(log, FARM_ACCOUNT)
    first = farm["position"].to_numpy() == 1
    propensity = farm["propensity"].to_numpy()
    assert (propensity[first] == 1).all() and (propensity[~first] < 1).all()
    pairs = zip(farm["request_id"].to_pylist(), farm["item_id"].to_pylist(), strict=True)
    assert len(set(pairs)) == farm.num_rows


def test_mimics_click_at_their_rate_whatever_the_position_and_keep_peoples_hours(log: pa.Table) -> None:
    mimics = _of(log, MIMIC)
    clicked, position = mimics["clicked"].to_numpy(), mimics["position"].to_numpy()
    assert (mimics["click_probability"].to_numpy() == CONFIG.mimic_click_rate).all()
    for rows in (position <= 2, position >= 5):
        assert clicked[rows].mean() == pytest.approx(CONFIG.mimic_click_rate, abs=0.04)
    hours = mimics["event_timestamp"].to_numpy().astype("datetime64[h]").astype(int) % 24
    assert np.isin(hours, [1, 2, 3]).mean() < 0.1 < np.isin(hours, [17, 18, 19, 20]).mean()
    gaps = np.concatenate([np.diff(times) for times in _requests_by_user(mimics).values()])
    assert np.median(gaps[gaps < 30 * MINUTE]) > np.timedelta64(20, "s")


def test_no_column_of_the_log_tells_a_bot(log: pa.Table) -> None:
    assert not {"is_bot", "user_kind"} & set(EVENTS.names)
    for name in ("user_segment", "user_country", "device"):
        bots = set(log.filter(log["is_bot"])[name].to_pylist())
        assert bots <= set(log[name].to_pylist())
        assert name == "device" or bots >= {None} or len(bots) > 2


@pytest.mark.parametrize(
    "values", [{"num_mimics": -1}, {"mimic_click_rate": 0.0}, {"accounts_per_campaign": 1}, {"num_farm_accounts": "x"}]
)
def test_numbers_of_bots_that_cannot_be_are_named(values: dict) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        SimulatorConfig(**values)
