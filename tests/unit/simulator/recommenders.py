"""Recommenders that need no model: what they answer is known, so what comes of it can be checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evergreen.simulator.asking import Ask, Served
from evergreen.simulator.visits import Visits


class Fixed:
    """The same items for everybody."""

    def __init__(self, item_ids: Sequence[str], version: str = "fixed") -> None:
        self.item_ids, self.version = tuple(item_ids), version

    def __call__(self, asks: Sequence[Ask], /) -> list[Served]:
        return [Served(ask.request_id, ask.candidates or self.item_ids[: ask.k], self.version) for ask in asks]


class AtRandom:
    """Items at random, of those that were published before the world's first day: it knows no others."""

    def __init__(self, visits: Visits, seed: int = 0) -> None:
        self.known, self.rng = known_items(visits), np.random.default_rng(seed)

    def __call__(self, asks: Sequence[Ask], /) -> list[Served]:
        return [Served(ask.request_id, self._page(ask), "random") for ask in asks]

    def _page(self, ask: Ask) -> tuple[str, ...]:
        if ask.candidates is not None:
            return tuple(item_id for item_id in ask.candidates if item_id in self.known)
        return tuple(self.rng.choice(self.known, ask.k, replace=False).tolist())


def known_items(visits: Visits) -> list[str]:
    """Ids of the items that were published before the world's first day."""
    items, start = visits.world.items, np.datetime64(visits.plan.date(0).replace(tzinfo=None), "us")
    known: list[str] = items.ids[items.published <= start].tolist()
    return known
