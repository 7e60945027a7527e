"""The world: who likes what today, and what they do when they are shown it.

A person u who is shown item i at position k on device e at time t

    examines it   with probability   k ** -eta                                          (position bias)
    and then clicks with probability sigmoid(main + interaction)                        (relevance)

    main        = a + eagerness_u + quality_i + trend_c(t) + device_e - 0.2 price_i - 0.9 (1 - exp(-age_i(t) / tau))
    interaction = s <taste_u(t), vector_i>            taste x item; standard deviation s
                + 0.5 (home_ui - mean home)           people like publishers of their own country
                - (thrift_g - 0.2) price_i            segments differ in how much a price puts them off
                + 0.35 cos(2 pi (hour(t) - peak_c) / 24)      each category has its hour …
                + fit_ec                                      … and its device

    g = segment of u, c = category of i, price = standardised log price, age and tau in days.

`taste_u(t) = sqrt(r) segment_taste_g(t) + sqrt(1 - r) personal_taste_u(t)`, r = `segment_taste_share`; the segments'
tastes add up to nothing, so that taste is interaction alone. Tastes and category trends step once a day,
x <- phi x + sqrt(1 - phi^2) noise with phi = 2 ** (-1 / half_life): a random walk that is pulled back, so the world
changes but its spread does not (a stationary AR(1) process). The intercept `a` is set once so that the mean click
probability on random slates of the first day is `click_rate`.

A crawler clicks with probability 0.97 at any position, a silent bot with 0; for planted bots see `bots`. After a click
a person stays for a time, and may rate the item from 1 to 5, both by how well it suits them (taste + quality), not by
what made them click.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from evergreen.simulator.bots import PlantedBots
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import (
    COUNTRIES,
    CRAWLER,
    DEVICE_SHARES,
    DEVICES,
    MIMIC,
    PERSON,
    Floats,
    Ints,
    Items,
    Times,
    Users,
    draw_items,
    draw_users,
    midnight,
    unit_rows,
)
from evergreen.simulator.streams import stream

_DEVICE_MAIN = np.array([0.1, -0.1, 0.0])
_HOME_BONUS = 0.5
_MEAN_THRIFT = 0.2
_DAYPART_AMPLITUDE = 0.35
_DEVICE_FIT_SIGMA = 0.3
_TREND_SIGMA = 0.25
_AGE_LOSS = 0.9
_CRAWLER_CLICK_PROBABILITY = 0.97
_SEGMENT_HALF_LIVES = 3.0
_CALIBRATION_SAMPLE = 50_000


@dataclass(frozen=True)
class Utility:
    """Log-odds of a click given that the item is examined, in two parts. Arrays of shape (n,)."""

    main: Floats
    """What user, item and context say each for themselves, intercept included."""
    interaction: Floats
    """What they say only together."""
    satisfaction: Floats
    """Taste + quality: drives dwell and rating."""


@dataclass(frozen=True)
class Outcomes:
    """What happened to n shown items. Arrays of shape (n,)."""

    click_probability: Floats
    relevance: Floats
    """Click probability of an item that is examined, whatever its position."""
    clicked: NDArray[np.bool_]
    rating: Floats
    """1 to 5; NaN: not rated."""
    dwell_seconds: Floats
    """NaN: not clicked."""


@dataclass(frozen=True)
class Draws:
    """What chance has in store for n shown items. Arrays of shape (n,)."""

    click: Floats
    """Uniform in [0, 1), as are `bot_dwell` and `rates`."""
    dwell: Floats
    """Standard normal, as is `rating`."""
    bot_dwell: Floats
    rates: Floats
    rating: Floats

    @classmethod
    def of(cls, rng: np.random.Generator, num: int) -> Self:
        """The next ones of a generator."""
        return cls(rng.random(num), rng.normal(size=num), rng.random(num), rng.random(num), rng.normal(size=num))


class World:
    """Users, items and the state of their tastes on one day. `advance` goes to the next day; there is no way back.

    Everything but the outcomes follows from the configuration alone: two worlds of one configuration that are on the
    same day agree, whatever each of them was asked before.
    """

    _segment_taste: Floats  # (S, d)
    _personal_taste: Floats  # (U, d)
    _trend: Floats  # (C,)

    def __init__(self, config: SimulatorConfig, users: Users | None = None, items: Items | None = None) -> None:
        """Make the world on its first day.

        Args:
            config: decides everything.
            users: those of the configuration, and after them others; None: those of the configuration alone.
            items: likewise.
        """
        self.config = config
        self.users: Users = draw_users(config) if users is None else users
        self.items: Items = draw_items(config) if items is None else items
        self.bots = PlantedBots(config, self.users, self.items, accounts=np.arange(config.num_accounts))
        self.day = 0
        self._draw_effects()
        self._draw_tastes()
        self._intercept = 0.0
        self._intercept = self._calibrated_intercept()

    @property
    def midnight(self) -> np.datetime64:
        """The first moment of the current day."""
        return midnight(self.config, self.day)

    def tastes(self, users: Ints) -> Floats:
        """(..., d) what these users like today; its inner product with an item's vector has variance 1."""
        share = self.config.segment_taste_share
        # Mean-free over people: otherwise tastes would hold a main effect of the category.
        segment_taste = self._segment_tastes()
        segment_taste = segment_taste - self._segment_shares @ segment_taste
        common = segment_taste[self.users.segment[users]]
        tastes: Floats = np.sqrt(share) * common + np.sqrt(1 - share) * self._personal_taste[users]
        return tastes

    def advance(self) -> None:
        """Go to the next day: tastes and trends take their step."""
        self._step(stream(self.config.seed, "drift", self.day + 1), self.config.taste_half_life_days)

    def _step(self, rng: np.random.Generator, half_life: float) -> None:
        self.day += 1
        people = slice(self.config.num_users)
        self._personal_taste[people] = drift(rng, self._personal_taste[people], half_life)
        self._segment_taste = drift(rng, self._segment_taste, half_life * _SEGMENT_HALF_LIVES)
        self._trend = drift(rng, self._trend, half_life, sigma=_TREND_SIGMA)

    def utility(self, users: Ints, items: Ints, times: Times, devices: Ints) -> Utility:
        """Log-odds of a click on an examined item; for people (bots have none of it).

        The arguments are broadcast against each other: (R, 1) requests and (1, I) items give all their pairs.

        Args:
            users: (n,) indexes into `self.users`.
            items: (n,) indexes into `self.items`.
            times: (n,) datetime64[us] within the current day.
            devices: (n,) indexes into `DEVICES`.

        Raises:
            ValueError: a time is outside the current day, or before an item's publication.
        """
        self._check_times(items, times)
        catalogue = self.items
        category, publisher = catalogue.category[items], catalogue.publisher[items]
        price, segment = catalogue.price_z[items], self.users.segment[users]
        age_days = (times - catalogue.published[items]) / np.timedelta64(1, "D")
        hour = (times - self.midnight) / np.timedelta64(1, "h")
        quality = catalogue.quality[items]
        likes = np.einsum("...d,...d->...", self.tastes(users), catalogue.vector[items])
        taste = self.config.interaction_strength * likes
        main = (
            self._intercept
            + self.users.eagerness[users]
            + quality
            + self._trend[category]
            + _DEVICE_MAIN[devices]
            - _MEAN_THRIFT * price
            - _AGE_LOSS * (1 - np.exp(-age_days / self.config.item_age_days))
        )
        home = self._publisher_country[publisher] == self.users.country[users]
        interaction = taste
        if self.config.interaction_strength > 0:
            interaction = (
                taste
                + _HOME_BONUS * (home - 1 / len(COUNTRIES))
                - (self._thrift[segment] - _MEAN_THRIFT) * price
                + _DAYPART_AMPLITUDE * np.cos(2 * np.pi * (hour - self._peak_hour[category]) / 24)
                + self._device_fit[devices, category]
            )
        return Utility(main, interaction, taste + quality)

    def relevance(self, users: Ints, items: Ints, times: Times, devices: Ints) -> Floats:
        """(...) probability of a click on an item that is examined. Arguments and errors as for `utility`."""
        utility = self.utility(users, items, times, devices)
        return self._relevance(users, items, utility)

    def examination(self, users: Ints, positions: Ints) -> Floats:
        """(n,) probability that a position (from 1) is examined; bots examine everything."""
        seen: Floats = np.asarray(positions, dtype=np.float64) ** -self.config.position_bias_exponent
        return np.where(self.users.kind[users] == PERSON, seen, 1.0)

    def click_probability(self, users: Ints, items: Ints, positions: Ints, times: Times, devices: Ints) -> Floats:
        """(n,) the true probability of a click: examination x relevance. Arguments and errors as for `utility`."""
        return self.examination(users, positions) * self.relevance(users, items, times, devices)

    def respond(
        self, rng: np.random.Generator, users: Ints, items: Ints, positions: Ints, times: Times, devices: Ints
    ) -> Outcomes:
        """Show n items and see what happens. Arguments and errors as for `utility`; `rng` decides the outcomes."""
        return self.outcomes(Draws.of(rng, len(users)), users, items, positions, times, devices)

    def outcomes(
        self, draws: Draws, users: Ints, items: Ints, positions: Ints, times: Times, devices: Ints
    ) -> Outcomes:
        """Show n items and see what the draws make of it. Arguments and errors as for `utility`."""
        utility = self.utility(users, items, times, devices)
        relevance = self._relevance(users, items, utility)
        click_probability = self.examination(users, positions) * relevance
        is_person = np.isin(self.users.kind[users], (PERSON, MIMIC))
        clicked = draws.click < click_probability
        dwell = np.exp(3.1 + 0.3 * utility.satisfaction + 0.7 * draws.dwell)
        dwell = np.where(is_person, dwell, 0.05 + (0.9 - 0.05) * draws.bot_dwell)
        rates = clicked & is_person & (draws.rates < self.config.rating_fraction)
        rating = np.clip(np.rint(2.4 + 0.75 * utility.satisfaction + 0.6 * draws.rating), 1, 5)
        return Outcomes(
            click_probability=click_probability,
            relevance=relevance,
            clicked=clicked,
            rating=np.where(rates, rating, np.nan),
            dwell_seconds=np.where(clicked, dwell, np.nan),
        )

    def _draw_effects(self) -> None:
        """Draw what stays: the tables behind the interactions other than taste."""
        config, rng = self.config, stream(self.config.seed, "effects")
        self._publisher_country = rng.integers(0, len(COUNTRIES), config.num_publishers)
        self._thrift = rng.normal(_MEAN_THRIFT, 0.3, config.num_segments)
        self._peak_hour = rng.uniform(0, 24, config.num_categories)
        fit = rng.normal(0.0, _DEVICE_FIT_SIGMA, (len(DEVICES), config.num_categories))
        self._device_fit = fit - DEVICE_SHARES @ fit
        counts = np.bincount(self.users.segment[: config.num_users], minlength=config.num_segments)
        self._segment_shares = counts / counts.sum()

    def _draw_tastes(self) -> None:
        """Draw the state on day 0."""
        config, rng = self.config, stream(self.config.seed, "tastes")
        dimensions = config.taste_dimensions
        # Directions of full length: with a handful of segments, normal draws would make some worlds much duller.
        self._segment_taste = np.sqrt(dimensions) * unit_rows(rng, config.num_segments, dimensions)
        self._personal_taste = np.zeros((len(self.users.ids), dimensions))  # planted bots have none
        self._personal_taste[: config.num_users] = rng.normal(size=(config.num_users, dimensions))
        self._trend = rng.normal(0.0, _TREND_SIGMA, config.num_categories)

    def _calibrated_intercept(self) -> float:
        """The intercept at which random slates of day 0 are clicked at `click_rate`, found by bisection."""
        config, rng = self.config, stream(self.config.seed, "calibration")
        weights = self.users.activity[: config.num_users]
        weights = weights / weights.sum()
        users = rng.choice(config.num_users, _CALIBRATION_SAMPLE, p=weights)
        items = rng.choice(np.flatnonzero(self.items.published <= self.midnight), _CALIBRATION_SAMPLE)
        devices = rng.choice(len(DEVICES), _CALIBRATION_SAMPLE, p=DEVICE_SHARES)
        times = self.midnight + rng.integers(0, 86_400, _CALIBRATION_SAMPLE).astype("timedelta64[s]")
        sizes = rng.integers(config.slate_size_min, config.slate_size_max + 1, _CALIBRATION_SAMPLE)
        # Slates are drawn by size, impressions are not: a slate of ten has twice the impressions of one of five.
        weight = sizes / sizes.sum()
        examined = self.examination(users, rng.integers(1, sizes + 1))
        utility = self.utility(users, items, times.astype("datetime64[us]"), devices)
        low, high = -20.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = float(weight @ (examined * _sigmoid(middle + utility.main + utility.interaction)))
            low, high = (middle, high) if mean < config.click_rate else (low, middle)
        return (low + high) / 2

    def _segment_tastes(self) -> Floats:
        """(S, d) of the segments today."""
        return self._segment_taste

    def _relevance(self, users: Ints, items: Ints, utility: Utility) -> Floats:
        kind = self.users.kind[users]
        relevance = _sigmoid(utility.main + utility.interaction)
        relevance = np.where(kind == PERSON, relevance, np.where(kind == CRAWLER, _CRAWLER_CLICK_PROBABILITY, 0.0))
        return self.bots.relevance(users, items, relevance)

    def _check_times(self, items: Ints, times: Times) -> None:
        tomorrow = midnight(self.config, self.day + 1)
        if times.size and (times.min() < self.midnight or times.max() >= tomorrow):
            raise ValueError(
                f"times from {times.min()} to {times.max()}: the world is on day {self.day} "
                f"[{self.midnight}, {tomorrow}); call advance() to go on, or make a new World to go back"
            )
        early = times < self.items.published[items]
        if early.any():
            item, time = (np.broadcast_to(values, early.shape)[early][0] for values in (items, times))
            raise ValueError(f"item {self.items.ids[item]} at {time}: published only at {self.items.published[item]}")


def drift(rng: np.random.Generator, state: Floats, half_life_days: float, sigma: float = 1.0) -> Floats:
    """One day's step of a stationary AR(1) process with standard deviation `sigma`."""
    phi = 2.0 ** (-1.0 / half_life_days)
    drifted: Floats = phi * state + np.sqrt(1 - phi**2) * rng.normal(0.0, sigma, state.shape)
    return drifted


def _sigmoid(logits: Floats) -> Floats:
    result: Floats = 1.0 / (1.0 + np.exp(-logits))
    return result
