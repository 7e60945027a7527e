"""Who and what there is: people, bots and items with the attributes that never change.

Shapes: U users, I items, C categories, S segments, P publishers, D devices, K countries, d taste dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.streams import stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Times = NDArray[np.datetime64]
"""datetime64[us], UTC."""

DEVICES = ("mobile", "desktop", "tablet")
DEVICE_SHARES = np.array([0.62, 0.30, 0.08])
COUNTRIES = ("DE", "FR", "GB", "ES", "PL", "FI")
COUNTRY_SHARES = np.array([0.30, 0.22, 0.18, 0.14, 0.11, 0.05])
COUNTRY_UTC_OFFSET_HOURS = np.array([1, 1, 0, 1, 1, 2])

KINDS = ("person", "crawler", "silent_bot", "fast_crawler", "farm_account", "mimic")
"""Kinds of user, by their index. The kind is in no column of the log."""
PERSON, CRAWLER, SILENT_BOT, FAST_CRAWLER, FARM_ACCOUNT, MIMIC = range(len(KINDS))

_ACTIVITY_SIGMA = 1.1
_OLDEST_ITEM_DAYS = 30.0
_UNKNOWN_USER_ATTRIBUTE = 0.05
_UNKNOWN_PRICE = 0.03
_QUALITY_SIGMA = 0.45


@dataclass(frozen=True)
class Users:
    """People and bots; row u is user u."""

    ids: NDArray[np.str_]
    kind: Ints
    """(U,) indexes into `KINDS`; planted bots are the last users."""
    segment: Ints
    country: Ints
    segment_known: Bools
    """(U,) False: the log does not know the user's segment (the user has one all the same)."""
    country_known: Bools
    main_device: Ints
    activity: Floats
    """(U,) weight of the user in traffic; lognormal: the busiest tenth makes about 40 % of it. Bots: 0."""
    eagerness: Floats
    """(U,) the user's own shift of every click, in log-odds."""
    first_day: Ints
    """(U,) day of the log from which the user may come."""

    def of_kind(self, kind: int) -> Ints:
        """Indexes of the users of one kind."""
        return np.flatnonzero(self.kind == kind)


@dataclass(frozen=True)
class Items:
    """The catalogue, future items included; row i is item i."""

    ids: NDArray[np.str_]
    category: Ints
    publisher: Ints
    published: Times
    """(I,) publication time; an item is shown to nobody before."""
    price: Floats
    """(I,) in euros; NaN: the log does not know it (and no click depends on it)."""
    price_z: Floats
    """(I,) standardised log price; 0 where unknown."""
    quality: Floats
    """(I,) the item's own shift of every click, in log-odds."""
    vector: Floats
    """(I, d) what the item is about; squared length 1 in the mean."""


@dataclass(frozen=True)
class Themes:
    """What items are made of. Directions of length 1."""

    categories: Floats
    """(C, d)"""
    publishers: Floats
    """(P, d)"""


Population = TypeVar("Population", Users, Items)


def draw_users(config: SimulatorConfig) -> Users:
    """Draw the users of a world. People are the same whether or not bots are planted among them."""
    users = _draw_people(config)
    return _with_planted_bots(config, users) if config.num_accounts > config.num_users else users


def _draw_people(config: SimulatorConfig) -> Users:
    """Draw the users of `config.num_users`: people, and the two bots of the default world."""
    rng = stream(config.seed, "users")
    num = config.num_users
    kind = np.full(num, PERSON, dtype=np.int64)
    # Bots have ordinary ids somewhere in the middle: nothing but behaviour gives them away.
    bots = rng.choice(num, config.num_crawlers + config.num_silent_bots, replace=False)
    kind[bots[: config.num_crawlers]] = CRAWLER
    kind[bots[config.num_crawlers :]] = SILENT_BOT
    is_bot = kind != PERSON
    comes_later = (rng.random(num) < config.new_user_fraction) & ~is_bot
    return Users(
        ids=_ids("u", num),
        kind=kind,
        **_profiles(config, rng, num),
        activity=np.where(is_bot, 0.0, rng.lognormal(0.0, _ACTIVITY_SIGMA, num)),
        eagerness=rng.normal(0.0, 0.35, num),
        first_day=np.where(comes_later, rng.integers(0, config.num_days, num), 0),
    )


def draw_new_people(config: SimulatorConfig, rng: np.random.Generator, num: int, day: int) -> Users:
    """People who come for the first time on a day of the log; they have no ids yet, see `joined`."""
    return Users(
        ids=np.full(num, ""),
        kind=np.full(num, PERSON),
        **_profiles(config, rng, num),
        activity=rng.lognormal(0.0, _ACTIVITY_SIGMA, num),
        eagerness=rng.normal(0.0, 0.35, num),
        first_day=np.full(num, day),
    )


def draw_bots(config: SimulatorConfig, rng: np.random.Generator, num_of_kinds: Sequence[int]) -> Users:
    """Bots to plant, so many fast crawlers, farm accounts and mimics; they have no ids yet, see `joined`.

    They fill in what people fill in, and come in no traffic but their own.
    """
    kind = np.repeat((FAST_CRAWLER, FARM_ACCOUNT, MIMIC), num_of_kinds)
    num = len(kind)
    return Users(
        ids=np.full(num, ""),
        kind=kind.astype(np.int64),
        **_profiles(config, rng, num),
        activity=np.zeros(num),
        eagerness=np.zeros(num),
        first_day=np.zeros(num, dtype=np.int64),
    )


def _profiles(config: SimulatorConfig, rng: np.random.Generator, num: int) -> dict[str, Any]:
    """What every user fills in."""
    return {
        "segment": _choose(rng, _falling_shares(config.num_segments), num),
        "country": _choose(rng, COUNTRY_SHARES, num),
        "segment_known": rng.random(num) >= _UNKNOWN_USER_ATTRIBUTE,
        "country_known": rng.random(num) >= _UNKNOWN_USER_ATTRIBUTE,
        "main_device": _choose(rng, DEVICE_SHARES, num),
    }


def _with_planted_bots(config: SimulatorConfig, people: Users) -> Users:
    """Append the planted bots."""
    nums = (config.num_fast_crawlers, config.num_farm_accounts, config.num_mimics)
    users = joined(people, draw_bots(config, stream(config.seed, "planted bots"), nums))
    return replace(users, ids=_ids("u", config.num_accounts))


def joined(first: Population, *others: Population) -> Population:
    """All users, or all items; who has no id yet is given the next number."""
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in (first, *others)]) for field in fields(first)
    }
    # As wide as the first ones, whatever follows: the id of a user must not depend on how long the world is watched.
    letter, width = first.ids[0][0], len(first.ids[0]) - 1
    ids = [f"{letter}{number:0{width}d}" for number in range(len(first.ids), len(columns["ids"]))]
    return replace(first, **columns | {"ids": np.concatenate([first.ids, np.array(ids, dtype=np.str_)])})


def draw_themes(config: SimulatorConfig) -> Themes:
    """What the items of a world are made of."""
    return _draw_items(config)[1]


def draw_items(config: SimulatorConfig) -> Items:
    """Draw the items of a world: those on sale at the start, and those published during the log."""
    return _draw_items(config)[0]


def draw_new_items(
    config: SimulatorConfig, themes: Themes, rng: np.random.Generator, num: int, first: np.datetime64, seconds: float
) -> Items:
    """Items that are published within so many seconds from a time on; they have no ids yet, see `joined`."""
    items, _ = _items(config, rng, num, themes)
    after = np.floor(rng.uniform(0.0, seconds, num) * 1e6).astype(np.int64)
    return replace(
        items, published=first + after.astype("timedelta64[us]"), quality=rng.normal(0.0, _QUALITY_SIGMA, num)
    )


def _draw_items(config: SimulatorConfig) -> tuple[Items, Themes]:
    rng = stream(config.seed, "items")
    items, themes = _items(config, rng, config.num_items)
    published = _publication_times(config, rng)
    quality = rng.normal(0.0, _QUALITY_SIGMA, config.num_items)
    return replace(items, ids=_ids("i", config.num_items), published=published, quality=quality), themes


def _items(
    config: SimulatorConfig, rng: np.random.Generator, num: int, themes: Themes | None = None
) -> tuple[Items, Themes]:
    """Items that are yet to be published, and the themes, which are drawn if none are given."""
    dimensions = config.taste_dimensions
    category = _choose(rng, _falling_shares(config.num_categories), num)
    publisher = _choose(rng, _falling_shares(config.num_publishers), num)
    log_price = rng.normal(3.0, 0.6, num)
    price_known = rng.random(num) >= _UNKNOWN_PRICE
    if themes is None:
        themes = Themes(
            unit_rows(rng, config.num_categories, dimensions), unit_rows(rng, config.num_publishers, dimensions)
        )
    # 60 % of what an item is about is its category, 20 % its publisher's style, 20 % its own.
    vector = (
        np.sqrt(0.6) * themes.categories[category]
        + np.sqrt(0.2) * themes.publishers[publisher]
        + np.sqrt(0.2) * unit_rows(rng, num, dimensions)
    )
    items = Items(
        ids=np.full(num, ""),
        category=category,
        publisher=publisher,
        published=np.full(num, np.datetime64("NaT", "us")),
        price=np.where(price_known, np.round(np.exp(log_price), 2), np.nan),
        price_z=np.where(price_known, (log_price - 3.0) / 0.6, 0.0),
        quality=np.zeros(num),
        vector=vector,
    )
    return items, themes


def unit_rows(rng: np.random.Generator, rows: int, dimensions: int) -> Floats:
    """(rows, dimensions) random directions of length 1."""
    vectors = rng.normal(size=(rows, dimensions))
    directions: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return directions


def midnight(config: SimulatorConfig, day: int) -> np.datetime64:
    """The first moment of a day of the log, as datetime64[us]."""
    return np.datetime64((config.start + timedelta(days=day)).replace(tzinfo=None), "us")


def _publication_times(config: SimulatorConfig, rng: np.random.Generator) -> Times:
    """(I,) a share of the items is published during the log, evenly; the others in the month before."""
    num_new = round(config.num_items * config.new_item_fraction)
    days = np.concatenate(
        [
            rng.uniform(0.0, config.num_days, num_new),
            -np.minimum(rng.exponential(config.item_age_days, config.num_items - num_new), _OLDEST_ITEM_DAYS),
        ]
    )
    microseconds = np.floor(rng.permutation(days) * 86_400e6).astype(np.int64)
    return midnight(config, 0) + microseconds.astype("timedelta64[us]")


def _falling_shares(num: int) -> Floats:
    """(num,) shares that fall as rank ** -0.5: a few large ones and a tail."""
    weights = np.arange(1, num + 1, dtype=np.float64) ** -0.5
    shares: Floats = weights / weights.sum()
    return shares


def _choose(rng: np.random.Generator, shares: Floats, size: int) -> Ints:
    return rng.choice(len(shares), size, p=shares / shares.sum()).astype(np.int64)


def _ids(prefix: str, num: int) -> NDArray[np.str_]:
    width = max(4, len(str(num - 1)))
    return np.array([f"{prefix}{index:0{width}d}" for index in range(num)])
