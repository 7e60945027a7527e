"""The logging policy: the older recommender that chose what the log shows. It learns from its own log every night.

It knows nothing of the truth. For a request of user u, each place of the slate goes to item i with probability

    q(i | u) = w_popular  pop_i
             + w_personal P(c_i | u) pop_i / pop(c_i)
             + w_explore  1 / (number of items published)

    pop_i   proportional to (smoothed click rate of i) ** 1.5, over the items published by now
    P(c|u)  proportional to (smoothed click rate of u in category c) ** 1.5, over the categories that have items

and no item twice: the slate is q's items in the order in which they are drawn, repeats skipped (Plackett-Luce). So the
propensity of the item at a place, given those above it, is exact:  q(i) / (1 - sum of q over the items above).
Click counts fade by a tenth each night. The bots' clicks count too: the policy does not know them either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.population import Floats, Ints, Items

_GREED = 1.5
_PRIOR_CLICK_RATE = 0.02
_ITEM_PRIOR_VIEWS = 100.0
_USER_CATEGORY_PRIOR_VIEWS = 20.0
_FADE = 0.9


@dataclass(frozen=True)
class Slates:
    """R slates, laid out in rows. Arrays of shape (n,), n = sum of the slate sizes."""

    requests: Ints
    """Index of the request."""
    items: Ints
    positions: Ints
    """From 1."""
    propensity: Floats
    """Probability that the policy put this item here, given the items above."""


class LoggingPolicy:
    """Click counts per item and per user x category, and slates drawn by them."""

    def __init__(self, config: SimulatorConfig, catalogue: Items) -> None:
        self.config = config
        self.catalogue = catalogue
        self.item_views = np.zeros(config.num_items)
        self.item_clicks = np.zeros(config.num_items)
        self.user_views = np.zeros((config.num_accounts, config.num_categories), dtype=np.float32)
        self.user_clicks = np.zeros((config.num_accounts, config.num_categories), dtype=np.float32)

    def observe(self, users: Ints, items: Ints, clicked: NDArray[np.bool_]) -> None:
        """Learn from a day's rows; the days before fade."""
        cells = users * self.config.num_categories + self.catalogue.category[items]
        for counts, keys in (
            (self.item_views, items),
            (self.item_clicks, items[clicked]),
            (self.user_views, cells),
            (self.user_clicks, cells[clicked]),
        ):
            counts *= _FADE
            counts += np.bincount(keys, minlength=counts.size).reshape(counts.shape)

    def slates(
        self,
        rng: np.random.Generator,
        users: Ints,
        sizes: Ints,
        now: np.datetime64,
        asked_for: Ints | None = None,
    ) -> Slates:
        """Draw one slate for each request.

        Args:
            rng: decides the draws.
            users: (R,) who asks.
            sizes: (R,) how many items, at least 1 and at most the number of items published.
            now: items published at this time or before may be shown.
            asked_for: (R,) item that the request itself names: it is shown first, with propensity 1; -1: none.
        """
        draw = _Draw(self, users, now)
        width = int(sizes.max())
        # One stream of draws a request, repeats skipped. Most requests have enough after 2.5 draws an item.
        chosen = np.full((len(users), width), -1, dtype=np.int64)
        filled = np.zeros(len(users), dtype=np.int64)
        asked = np.flatnonzero(asked_for >= 0) if asked_for is not None else np.zeros(0, dtype=np.int64)
        if asked_for is not None:
            chosen[asked, 0] = asked_for[asked]
            filled[asked] = 1
        open_rows = np.flatnonzero(filled < sizes)
        while len(open_rows):
            drawn = draw.items(rng, open_rows, max(4, 5 * width // 2))
            for column in drawn.T:
                new = (chosen[open_rows] != column[:, None]).all(axis=1) & (filled[open_rows] < sizes[open_rows])
                rows = open_rows[new]
                chosen[rows, filled[rows]] = column[new]
                filled[rows] += 1
            open_rows = open_rows[filled[open_rows] < sizes[open_rows]]
        place = np.arange(width)
        shown = place < sizes[:, None]
        probability = np.where(shown, draw.probability(chosen), 0.0)
        above = np.cumsum(probability, axis=1) - probability
        requests, places = np.nonzero(shown)
        # Rounding can push a propensity just above 1 when a slate takes all items there are.
        propensity = np.minimum(probability / (1.0 - above), 1.0)
        propensity[asked, 0] = 1.0
        return Slates(requests, chosen[shown], places + 1, propensity[shown])


class _Draw:
    """q(i | u) for a set of requests at one moment."""

    def __init__(self, policy: LoggingPolicy, users: Ints, now: np.datetime64) -> None:
        config, catalogue = policy.config, policy.catalogue
        num_categories = config.num_categories
        self.category = catalogue.category
        self.published = np.flatnonzero(catalogue.published <= now)
        # Sorted by category, one cumulative sum serves to draw from all items and from those of one category.
        self.published = self.published[np.argsort(self.category[self.published], kind="stable")]
        self.explore = config.exploration_fraction
        self.personal = config.personalised_fraction
        self.popular = 1.0 - self.explore - self.personal

        rate = _smoothed(policy.item_clicks, policy.item_views, _PRIOR_CLICK_RATE, _ITEM_PRIOR_VIEWS)
        weight = rate[self.published] ** _GREED
        self.cumulated = np.cumsum(weight / weight.sum())
        self.popularity = np.zeros(config.num_items)
        self.popularity[self.published] = np.diff(self.cumulated, prepend=0.0)
        self.category_mass = np.bincount(self.category, self.popularity, minlength=num_categories)
        self.category_start = np.cumsum(self.category_mass) - self.category_mass

        clicks, views = policy.user_clicks[users], policy.user_views[users]
        affinity = _smoothed(clicks, views, _PRIOR_CLICK_RATE, _USER_CATEGORY_PRIOR_VIEWS) ** _GREED
        affinity = np.where(self.category_mass > 0, affinity, 0.0)
        self.category_share = affinity / affinity.sum(axis=1, keepdims=True)

    def items(self, rng: np.random.Generator, rows: Ints, width: int) -> Ints:
        """(len(rows), width) independent draws from q."""
        shape = (len(rows), width)
        arm, point, chooser = rng.random(shape), rng.random(shape), rng.random(shape)
        category_bounds = np.cumsum(self.category_share[rows], axis=1)[:, None, :-1]
        category = (chooser[:, :, None] >= category_bounds).sum(axis=2)
        in_category = self.category_start[category] + point * self.category_mass[category]
        by_popularity = np.searchsorted(self.cumulated, np.where(arm < self.personal, in_category, point), side="right")
        at_random = (point * len(self.published)).astype(np.int64)
        place = np.where(arm >= 1.0 - self.explore, at_random, by_popularity)
        return self.published[np.minimum(place, len(self.published) - 1)]

    def probability(self, chosen: Ints) -> Floats:
        """(R, width) q of the chosen items; row r belongs to request r."""
        popularity, category = self.popularity[chosen], self.category[chosen]
        share = np.take_along_axis(self.category_share, category, axis=1)
        mass = self.category_mass[category]
        personal = np.divide(share * popularity, mass, out=np.zeros_like(popularity), where=mass > 0)
        probability: Floats = self.popular * popularity + self.personal * personal + self.explore / len(self.published)
        return probability


def _smoothed(
    clicks: NDArray[np.floating], views: NDArray[np.floating], prior_rate: float, prior_views: float
) -> Floats:
    """Click rate pulled towards a prior that weighs `prior_views` views."""
    rate: Floats = (clicks.astype(np.float64) + prior_rate * prior_views) / (views + prior_views)
    return rate
