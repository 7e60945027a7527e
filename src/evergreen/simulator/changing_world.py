"""A world that goes on after its log, and in which a scenario happens.

Up to the log's last day it is the world of the log. From then on its seed decides, so that one log can go on in many
ways: new people and items keep coming, and tastes step on, as far as the scenario has it. Who comes and what happens on
a day does not depend on how many days the world is watched.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np

from evergreen.simulator.bots import PlantedBots
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import (
    Floats,
    Ints,
    draw_bots,
    draw_items,
    draw_new_items,
    draw_new_people,
    draw_themes,
    draw_users,
    joined,
    midnight,
    unit_rows,
)
from evergreen.simulator.scenarios import Scenario
from evergreen.simulator.streams import stream
from evergreen.simulator.world import Utility, World, drift

_SATURDAY = 5
_DAY_SECONDS, _HOUR_SECONDS = 86_400.0, 3_600.0
_ATTACKERS_OF_KINDS = np.array([0.1, 0.7, 0.2])
"""Fast crawlers, farm accounts, mimics."""
_LONGEST_ATTACK_DAYS = 30


class ChangingWorld(World):
    """The world of a log, and how it goes on."""

    def __init__(self, config: SimulatorConfig, scenario: Scenario, seed: int, first_day: int, num_days: int) -> None:
        """Make the world on the log's first day.

        Args:
            config: of the log.
            scenario: what happens from `first_day` on; a weekend's taste is that of the log as well.
            seed: decides what happens from `first_day` on.
            first_day: day of the log on which the scenario's days begin.
            num_days: how long new people and items come from then on.
        """
        self.scenario, self.seed, self.first_day = scenario, seed, first_day
        users, items = draw_users(config), draw_items(config)
        # The attackers first: how many people come later must not change who they are.
        nums = np.maximum(np.rint(scenario.attackers * config.num_users * _ATTACKERS_OF_KINDS), 1).astype(int)
        nums = nums if scenario.attackers else np.zeros(3, dtype=int)
        attackers = np.arange(nums.sum()) + len(users.ids)
        users = joined(users, draw_bots(config, stream(seed, "attackers"), nums.tolist()))
        self._first_arrival = len(users.ids)

        themes, dimensions = draw_themes(config), config.taste_dimensions
        tastes, new_people, new_items = [], [], []
        for day in range(num_days):
            rng = stream(seed, "arrivals", day)
            # The log brings its own as long as it lasts.
            pace = scenario.arrivals / config.num_days if first_day + day >= config.num_days else 0.0
            num_people = rng.poisson(pace * config.new_user_fraction * config.num_users)
            num_items = rng.poisson(pace * config.new_item_fraction * config.num_items)
            start = midnight(config, first_day + day)
            new_items.append(draw_new_items(config, themes, rng, num_items, start, _DAY_SECONDS))
            if day == scenario.begins:
                num_people += round(scenario.new_users * config.num_users)
                num_items = round(scenario.new_items * config.num_items)
                new_items.append(draw_new_items(config, themes, rng, num_items, start, _HOUR_SECONDS))
            new_people.append(draw_new_people(config, rng, num_people, first_day + day))
            tastes.append(rng.normal(size=(num_people, dimensions)))
        super().__init__(config, joined(users, *new_people), joined(items, *new_items))
        if tastes:
            self._personal_taste[self._first_arrival :] = np.concatenate(tastes)
        self._weekend_taste = np.sqrt(dimensions) * unit_rows(
            stream(config.seed, "weekend tastes"), config.num_segments, dimensions
        )
        self.attack = self._planned_attack(attackers, nums)

    def advance(self) -> None:
        """Go to the next day: tastes and trends take their step, and what happens overnight happens."""
        day = self.day + 1 - self.first_day
        if day < 0:
            super().advance()
            return
        scenario, half_life = self.scenario, self.config.taste_half_life_days
        if scenario.taste_half_life_days is not None and scenario.is_on(day):
            half_life = scenario.taste_half_life_days
        self._step(stream(self.seed, "drift", self.day + 1), half_life)
        arrived = slice(self._first_arrival, None)
        rng = stream(self.seed, "drift of arrivals", self.day)
        self._personal_taste[arrived] = drift(rng, self._personal_taste[arrived], half_life)
        if scenario.taste_shift and day == scenario.begins:
            turn = stream(self.seed, "taste shift").integers(1, self.config.num_segments)
            others = np.roll(self._segment_taste, turn, axis=0)
            self._segment_taste = _mixed(self._segment_taste, others, scenario.taste_shift)

    def _segment_tastes(self) -> Floats:
        """(S, d) of the segments today."""
        weekday = (self.config.start + timedelta(days=self.day)).weekday()
        if weekday < _SATURDAY or not self.scenario.weekend_taste:
            return self._segment_taste
        return _mixed(self._segment_taste, self._weekend_taste, self.scenario.weekend_taste)

    def _relevance(self, users: Ints, items: Ints, utility: Utility) -> Floats:
        return self.attack.relevance(users, items, super()._relevance(users, items, utility))

    def _planned_attack(self, attackers: Ints, nums: Ints) -> PlantedBots:
        """Bots whose first day is the scenario's."""
        crawlers, farm_accounts, mimics = (int(num) for num in nums)
        plan = self.config.model_copy(
            update={
                "seed": self.seed,
                "start": self.config.start + timedelta(days=self.first_day + self.scenario.begins),
                "num_days": self.scenario.lasts or _LONGEST_ATTACK_DAYS,
                "num_fast_crawlers": crawlers,
                "num_farm_accounts": farm_accounts,
                "num_mimics": mimics,
            }
        )
        return PlantedBots(plan, self.users, self.items, accounts=attackers, quiet_days=0)


def _mixed(one: Floats, other: Floats, share_of_other: float) -> Floats:
    """Both, by their share of the variance."""
    mixed: Floats = np.sqrt(1 - share_of_other) * one + np.sqrt(share_of_other) * other
    return mixed
