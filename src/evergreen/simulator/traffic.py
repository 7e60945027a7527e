"""Traffic: who comes when, with which device, and how many items each request asks for.

People come in sessions (2.5 requests in the mean, a minute or so apart) that start by the hour of their own country's
day; weekends are busier. A request shows one slate. Crawlers come on one night a week, silent bots all day long. What
planted bots ask for is in `bots`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import (
    COUNTRY_UTC_OFFSET_HOURS,
    CRAWLER,
    DEVICE_SHARES,
    DEVICES,
    SILENT_BOT,
    Floats,
    Ints,
    Times,
    Users,
    midnight,
)
from evergreen.simulator.streams import stream

_WEEKDAY_FACTORS = np.array([1.0, 0.97, 0.96, 0.98, 1.03, 1.12, 1.15])  # Monday first
_LOCAL_HOUR_WEIGHTS = np.array(
    [20, 12, 8, 6, 6, 10, 22, 45, 60, 62, 60, 62, 72, 68, 60, 58, 60, 68, 80, 95, 105, 100, 75, 42], dtype=np.float64
)
_MEAN_REQUESTS = 2.5
_MAX_REQUESTS = 20
_GAP_MEDIAN_SECONDS = 45.0
_DESKTOP = DEVICES.index("desktop")
_DAY_SECONDS = 86_400.0
_CRAWLER_START_SECONDS = 2 * 3_600.0
_CRAWLER_GAP_SECONDS = 1.5
_CRAWLER_PERIOD_DAYS = 7
_CRAWLER_FIRST_DAY = 3


@dataclass(frozen=True)
class Requests:
    """Requests of one day in time order. Arrays of shape (R,)."""

    times: Times
    users: Ints
    devices: Ints
    slate_sizes: Ints
    asked_for: Ints
    """Item that the request itself names and that is shown first, e.g. on a page of its own; -1: none."""

    def __len__(self) -> int:
        return len(self.times)

    def between(self, start: np.datetime64, end: np.datetime64) -> Requests:
        """The requests with start <= time < end."""
        low, high = np.searchsorted(self.times, np.array([start, end]))
        return self.rows(slice(int(low), int(high)))

    def rows(self, rows: slice | Ints) -> Requests:
        """Some of the requests."""
        columns = (self.users, self.devices, self.slate_sizes, self.asked_for)
        return Requests(self.times[rows], *(column[rows] for column in columns))


def draw_requests(config: SimulatorConfig, users: Users, day: int) -> Requests:
    """All requests of a day; their slates hold the day's share of `num_days * events_per_day` impressions exactly."""
    rng = stream(config.seed, "traffic", day)
    total = events_on(config, day)
    crawlers, silent = users.of_kind(CRAWLER), users.of_kind(SILENT_BOT)
    crawls = len(crawlers) and day % _CRAWLER_PERIOD_DAYS == min(_CRAWLER_FIRST_DAY, config.num_days - 1)
    crawler_events = max(round(total * config.crawler_share), config.slate_size_min) if crawls else 0
    silent_events = max(round(total * config.silent_bot_share), config.slate_size_min) if len(silent) else 0
    weights = np.where(users.first_day <= day, users.activity, 0.0)
    parts = [sessions(config, users, weights, rng, total - crawler_events - silent_events)]
    if crawler_events:
        parts.append(_crawl(config, crawlers, rng, crawler_events))
    if silent_events:
        parts.append(_watch(config, silent, rng, silent_events))
    seconds, who, devices, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return in_time_order(config, day, (seconds, who, devices, sizes), np.full(len(seconds), -1))


def in_time_order(config: SimulatorConfig, day: int, part: Part, asked_for: Ints) -> Requests:
    """Requests of a day, which end before midnight."""
    seconds, *columns = part
    order = np.argsort(seconds, kind="stable")
    microseconds = np.minimum(seconds[order] * 1e6, _DAY_SECONDS * 1e6 - 1).astype(np.int64)
    times = midnight(config, day) + microseconds.astype("timedelta64[us]")
    return Requests(times, *(column[order].astype(np.int64) for column in (*columns, asked_for)))


def together(one: Requests, other: Requests) -> Requests:
    """Both, in time order."""
    if not len(other):
        return one
    columns = {
        field.name: np.concatenate([getattr(one, field.name), getattr(other, field.name)]) for field in fields(Requests)
    }
    return Requests(**columns).rows(np.argsort(columns["times"], kind="stable"))


def events_on(config: SimulatorConfig, day: int) -> int:
    """Impressions of one day: `events_per_day` by the weekday's factor; over the log they add up exactly."""
    factors = _WEEKDAY_FACTORS[(config.start.weekday() + np.arange(max(config.num_days, day + 1))) % 7]
    cumulated = config.events_per_day * np.cumsum(factors) / factors[: config.num_days].mean()
    return round(float(cumulated[day])) - (round(float(cumulated[day - 1])) if day else 0)


Part = tuple[Floats, Ints, Ints, Ints]
"""Seconds since midnight, users, devices, slate sizes; each (r,)."""


def sessions(config: SimulatorConfig, users: Users, weights: Floats, rng: np.random.Generator, events: int) -> Part:
    """What people ask for on a day.

    Args:
        config: of the world.
        users: of the world.
        weights: (U,) how likely a session is each user's; 0: the user does not come.
        rng: decides.
        events: impressions of the day.
    """
    sizes = slate_sizes(config, rng, events)
    num = len(sizes)
    lengths = np.minimum(rng.geometric(1 / _MEAN_REQUESTS, num), _MAX_REQUESTS)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num)) + 1]  # the last session may be cut short
    session = np.repeat(np.arange(len(lengths)), lengths)[:num]

    cumulated = np.cumsum(weights)
    who = np.searchsorted(cumulated, rng.random(len(lengths)) * cumulated[-1], side="right")
    other_device = rng.choice(len(DEVICES), len(lengths), p=DEVICE_SHARES)
    device = np.where(rng.random(len(lengths)) < 0.8, users.main_device[who], other_device)

    local_hour = rng.choice(24, len(lengths), p=_LOCAL_HOUR_WEIGHTS / _LOCAL_HOUR_WEIGHTS.sum())
    hour = (local_hour - COUNTRY_UTC_OFFSET_HOURS[users.country[who]]) % 24
    start = (hour + rng.random(len(lengths))) * 3_600.0

    first = np.searchsorted(session, np.arange(len(lengths)))
    gaps = _GAP_MEDIAN_SECONDS * np.exp(rng.normal(0.0, 0.8, num))
    gaps[first] = 0.0
    elapsed = np.cumsum(gaps)
    elapsed -= elapsed[first][session]
    duration = np.maximum.reduceat(elapsed, first)
    # A session that would run past midnight starts earlier: a day's requests stay in its file.
    start = np.minimum(start, np.maximum(_DAY_SECONDS - 1.0 - duration, 0.0))
    return start[session] + elapsed, who[session], device[session], sizes


def _crawl(config: SimulatorConfig, crawlers: Ints, rng: np.random.Generator, events: int) -> Part:
    sizes = slate_sizes(config, rng, events)
    num = len(sizes)
    seconds = _CRAWLER_START_SECONDS + np.cumsum(_CRAWLER_GAP_SECONDS * rng.uniform(0.5, 1.5, num))
    return np.minimum(seconds, _DAY_SECONDS - 1.0), rng.choice(crawlers, num), np.full(num, _DESKTOP), sizes


def _watch(config: SimulatorConfig, silent: Ints, rng: np.random.Generator, events: int) -> Part:
    sizes = slate_sizes(config, rng, events)
    num = len(sizes)
    seconds = (np.arange(num) + rng.random(num)) * (_DAY_SECONDS / num)
    return seconds, rng.choice(silent, num), np.full(num, _DESKTOP), sizes


def slate_sizes(config: SimulatorConfig, rng: np.random.Generator, events: int) -> Ints:
    """Slate sizes that add up to `events`: uniform between the bounds, with the remainder taken from the first ones.

    Where that cannot be (all slates of one size), the last one is shorter.
    """
    smallest, largest = config.slate_size_min, config.slate_size_max
    sizes: NDArray[np.int64] = rng.integers(smallest, largest + 1, events // smallest + 1)
    last = int(np.searchsorted(np.cumsum(sizes), events))
    sizes = sizes[: last + 1]
    sizes[-1] = events - sizes[:-1].sum()
    donors = np.flatnonzero(sizes[:-1] > smallest)[: max(smallest - int(sizes[-1]), 0)]
    sizes[donors] -= 1
    sizes[-1] += len(donors)
    return sizes
