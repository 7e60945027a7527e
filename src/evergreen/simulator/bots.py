"""Bots to plant in a log: who they are, when they come and what they click. By default there are none.

    fast crawler  comes for two runs in a month, a request every second or two, over the whole catalogue. Every other
                  one clicks 97 % of what it is shown, the rest nothing.
    farm account  is made for a campaign: dozens of them come within an hour, open the pages of the same three items
                  in turn, one each twenty seconds or so as their script says, and click them.
    mimic         keeps the sessions, pace and hours of people, but clicks `mimic_click_rate` of whatever it is shown,
                  at any position and regardless of taste.

They come on top of the people, whose attributes, tastes and requests stay the same; what people are shown may differ,
for the logging policy learns from every click.
"""

from __future__ import annotations

import numpy as np

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import (
    DEVICES,
    FARM_ACCOUNT,
    FAST_CRAWLER,
    MIMIC,
    PERSON,
    Floats,
    Ints,
    Items,
    Users,
    midnight,
)
from evergreen.simulator.streams import stream
from evergreen.simulator.traffic import Requests, in_time_order, sessions

_RUNS_PER_MONTH = 2
_RUN_REQUESTS = (30, 90)
_RUN_GAP_SECONDS = (0.8, 2.5)
_CRAWLER_CLICK_PROBABILITY = 0.97

_TARGETS = 3
_VISITS = (6, 12)
_VISIT_GAP_SECONDS = (12.0, 30.0)
_VISIT_GAP_NOISE = 0.02
_CAMPAIGN_SECONDS = 3_600.0
_TARGET_CLICK_PROBABILITY = 0.98
_OTHER_CLICK_PROBABILITY = 0.01

_MIMIC_EVENTS_PER_DAY = 15.0
_DAY_SECONDS = 86_400.0
_DESKTOP = DEVICES.index("desktop")


class PlantedBots:
    """The planted bots of a world. Everything follows from the configuration."""

    def __init__(
        self, config: SimulatorConfig, users: Users, items: Items, *, accounts: Ints | None = None, quiet_days: int = 7
    ) -> None:
        """Plan what the bots do.

        Args:
            config: its seed and its days are those of the bots.
            users: of the world.
            items: of the world.
            accounts: the users that these bots are; None: all of the planted kinds.
            quiet_days: before the first campaign of a farm, where there are as many.
        """
        self.config = config
        self.users = users
        mine = np.isin(np.arange(len(users.ids)), accounts) if accounts is not None else np.True_
        self._kind = np.where(mine, users.kind, PERSON)
        self.crawlers, self.farm, self.mimics = (
            np.flatnonzero(self._kind == kind) for kind in (FAST_CRAWLER, FARM_ACCOUNT, MIMIC)
        )
        rng = stream(config.seed, "campaigns")
        num_campaigns = -(-len(self.farm) // config.accounts_per_campaign)
        self.campaign = np.full(len(users.ids), -1)
        self.campaign[self.farm] = np.arange(len(self.farm)) // config.accounts_per_campaign
        # A service has a history before a farm comes: new accounts on the first days are nothing new.
        first_day = min(quiet_days, config.num_days - 1)
        self.campaign_day = rng.integers(first_day, config.num_days, num_campaigns)
        self.campaign_start = rng.uniform(0.0, _DAY_SECONDS - 2 * _CAMPAIGN_SECONDS, num_campaigns)
        known = np.flatnonzero(items.published <= midnight(config, 0))
        self.targets = rng.choice(known, (num_campaigns, min(_TARGETS, len(known))))

    def requests(self, day: int) -> Requests:
        """What the planted bots ask for on a day, in time order."""
        rng = stream(self.config.seed, "planted traffic", day)
        parts = [self._runs(day, rng), self._visits(day, rng), self._sessions(rng)]
        seconds, users, devices, sizes, asked_for = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return in_time_order(self.config, day, (seconds, users, devices, sizes), asked_for)

    def relevance(self, users: Ints, items: Ints, of_people: Floats) -> Floats:
        """(...) click probabilities: the planted bots' own, and for everybody else the given ones."""
        if not len(self.crawlers) + len(self.farm) + len(self.mimics):
            return of_people
        kind, campaign = self._kind[users], self.campaign[users]
        clicks_all = users % 2 == 0
        result = np.where(kind == FAST_CRAWLER, _CRAWLER_CLICK_PROBABILITY * clicks_all, of_people)
        if len(self.farm):
            aimed_at = (self.targets[campaign] == items[..., None]).any(axis=-1)
            farm = np.where(aimed_at, _TARGET_CLICK_PROBABILITY, _OTHER_CLICK_PROBABILITY)
            result = np.where(kind == FARM_ACCOUNT, farm, result)
        return np.where(kind == MIMIC, self.config.mimic_click_rate, result)

    def _runs(self, day: int, rng: np.random.Generator) -> _Rows:
        """Crawlers' runs: on average two in thirty days, at any hour."""
        config = self.config
        if config.num_days <= 30:  # a short log has its two runs as well
            days = stream(config.seed, "runs").integers(0, config.num_days, (len(self.crawlers), _RUNS_PER_MONTH))
            who = self.crawlers[(days == day).any(axis=1)]
        else:
            who = self.crawlers[rng.random(len(self.crawlers)) < _RUNS_PER_MONTH / 30]
        lengths = rng.integers(*_RUN_REQUESTS, len(who), endpoint=True)
        gaps = rng.uniform(*_RUN_GAP_SECONDS, int(lengths.sum()))
        start = rng.uniform(0.0, _DAY_SECONDS - _RUN_REQUESTS[1] * _RUN_GAP_SECONDS[1], len(who))
        return self._rows(rng, who, lengths, start, gaps, np.full(len(gaps), -1))

    def _visits(self, day: int, rng: np.random.Generator) -> _Rows:
        """The click farm's campaigns of the day: every account opens the targets' pages in turn."""
        who = self.farm[self.campaign_day[self.campaign[self.farm]] == day]
        lengths = rng.integers(*_VISITS, len(who), endpoint=True)
        campaign = self.campaign[who]
        start = self.campaign_start[campaign] + rng.uniform(0.0, _CAMPAIGN_SECONDS, len(who))
        pace = stream(self.config.seed, "paces").uniform(*_VISIT_GAP_SECONDS, len(self.campaign_day))
        gaps = np.repeat(pace[campaign], lengths) * np.exp(rng.normal(0.0, _VISIT_GAP_NOISE, int(lengths.sum())))
        turn = _within(lengths) % self.targets.shape[1]
        return self._rows(rng, who, lengths, start, gaps, self.targets[np.repeat(campaign, lengths), turn])

    def _sessions(self, rng: np.random.Generator) -> _Rows:
        """Mimics come as people come."""
        events = round(_MIMIC_EVENTS_PER_DAY * len(self.mimics))
        if not events:
            none = np.zeros(0, dtype=np.int64)
            return none.astype(np.float64), none, none, none, none
        weights = np.isin(np.arange(len(self.users.ids)), self.mimics).astype(np.float64)
        part = sessions(self.config, self.users, weights, rng, events)
        return *part, np.full(len(part[0]), -1)

    def _rows(
        self, rng: np.random.Generator, who: Ints, lengths: Ints, start: Floats, gaps: Floats, asked_for: Ints
    ) -> _Rows:
        """Requests one after the other: row r of user `who[i]` comes `gaps[r]` seconds after the one before."""
        elapsed = np.cumsum(gaps)
        first = np.cumsum(lengths) - lengths
        seconds = np.repeat(start, lengths) + elapsed - np.repeat(elapsed[first] if len(who) else elapsed, lengths)
        sizes = rng.integers(self.config.slate_size_min, self.config.slate_size_max, len(gaps), endpoint=True)
        return seconds, np.repeat(who, lengths), np.full(len(gaps), _DESKTOP), sizes, asked_for


_Rows = tuple[Floats, Ints, Ints, Ints, Ints]
"""Seconds since midnight, users, devices, slate sizes, items asked for; each (r,)."""


def _within(lengths: Ints) -> Ints:
    """0, 1, … within each run of the given lengths."""
    ends = np.cumsum(lengths)
    counted: Ints = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
    return counted
