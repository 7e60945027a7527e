"""Visits in virtual time: who asks when, and what they do with what they are shown.

A page shows what the server answers, best first. A share `explore` of the pages the shop fills by itself, with k items
drawn at random from all that are published; of the server it wants their order alone, and what the server does not know
comes last. Without that, an item that is published after the model was trained would be in no log, so that no catalogue
would ever hold it; and a model that shows what people used to like would never see what they like now. So the server's
impression log holds all that was shown, as it was shown, but for what it does not know: that is in the click log alone.

Chance is keyed: whether a user clicks on an item of a request depends on (seed, day, request, item) and the true click
probability alone. Two loops over one world so see the same users at the same times, and where they show the same they
get the same clicks. Beside what happens stands what was to be expected, free of that luck: the expected clicks of each
page, of the best page there could be (an oracle's, who knows every relevance), and of a page drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from pydantic import Field

from evergreen.contracts.errors import InputError
from evergreen.simulator.asking import Ask
from evergreen.simulator.changing_world import ChangingWorld
from evergreen.simulator.clicks import delays_of
from evergreen.simulator.config import ExplainedModel, SimulatorConfig
from evergreen.simulator.policy import Slates
from evergreen.simulator.population import DEVICES, PERSON, Bools, Floats, Ints, Times
from evergreen.simulator.scenarios import Scenario
from evergreen.simulator.streams import KeyedDraws
from evergreen.simulator.traffic import Requests, draw_requests, together
from evergreen.simulator.world import Draws, Outcomes

_PAIRS_PER_BLOCK = 1_000_000
_NAMED = 5


class VisitPlan(ExplainedModel):
    """Which world is visited, and how. Equal plans and equal answers give equal visits.

    Raises:
        InputError: a value is out of its range.
    """

    log: SimulatorConfig
    """Of the log that the world goes on from: the same people and items."""
    scenario: Scenario = Scenario(name="stable")
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Decides all that comes after the log."""
    first_day: int | None = Field(default=None, ge=0)
    """Day of the log that is the world's day 0; None: the one after the last."""
    requests_per_day: int = Field(default=1_000, ge=10, le=5_000_000)
    """Mean of people and the log's bots; weekends are busier."""
    k: int = Field(default=10, ge=1, le=20)
    """Items that a page asks for."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """Share of the pages that the shop fills at random."""

    @property
    def day_zero(self) -> int:
        """Day of the log that is the world's day 0."""
        return self.log.num_days if self.first_day is None else self.first_day

    def date(self, day: int) -> datetime:
        """Midnight (UTC) of a day of the world."""
        return self.log.start + timedelta(days=self.day_zero + day)

    def _check(self) -> None:
        if self.day_zero > self.log.num_days:
            raise ValueError(f"first_day={self.first_day}: the log ends after {self.log.num_days} days; leave no gap")


@dataclass(frozen=True)
class DayRequests:
    """What is asked for on a day, in time order."""

    day: int
    """Of the world, from 0."""
    requests: Requests
    """R of them."""
    asks: list[Ask]
    drawn: Ints
    """(R, k) the items that the shop drew for the page, -1 where it leaves the page to the server."""

    @property
    def explored(self) -> Bools:
        """(R,) whether the shop fills the page."""
        filled: Bools = self.drawn[:, 0] >= 0
        return filled

    @property
    def named(self) -> Ints:
        """(R, k + 1) the items that the page itself names: those drawn, or the one whose page it is; -1 for none."""
        return np.column_stack([self.drawn, self.requests.asked_for])


@dataclass(frozen=True)
class DayOutcomes:
    """What came of a day. R requests, n shown items."""

    slates: Slates
    """What was shown, in the order of requests and positions."""
    served: Bools
    """(n,) whether the server answered the item; False for one that it does not know."""
    outcomes: Outcomes
    click_delays: Floats
    """(n,) seconds from the impression to the click; NaN: not clicked."""
    measured: Bools
    """(R,) whether it is a person's page and the server's choice; what follows is NaN for others."""
    expected_clicks: Floats
    """(R,) of what was shown."""
    oracle_clicks: Floats
    """(R,) expected of the k items of the highest relevance, of all that are published, best first."""
    random_clicks: Floats
    """(R,) expected of k items drawn at random."""

    def clicks(self) -> Ints:
        """(R,) clicks that happened."""
        clicked = self.slates.requests[self.outcomes.clicked]
        counts: Ints = np.bincount(clicked, minlength=len(self.measured))
        return counts


class Visits:
    """The visits of a world, day by day; there is no way back."""

    def __init__(self, plan: VisitPlan, *, num_days: int = 60) -> None:
        """Make the world and live through the days of its log.

        Args:
            plan: decides everything.
            num_days: how long the world lasts; it does not change what happens on a day.
        """
        self.plan = plan
        self.num_days = num_days
        self.world = ChangingWorld(plan.log, plan.scenario, plan.seed, plan.day_zero, num_days)
        self._index = {item_id: index for index, item_id in enumerate(self.world.items.ids.tolist())}
        # Sorted by time, the items that are published at a moment are the first so many.
        self._by_publication = np.argsort(self.world.items.published, kind="stable")
        self._published = self.world.items.published[self._by_publication]
        page = {"slate_size_min": plan.k, "slate_size_max": plan.k}
        self._traffic = plan.log.model_copy(
            update={"seed": plan.seed, "events_per_day": plan.requests_per_day * plan.k, **page}
        )
        self._bounds: tuple[int, Floats, Floats] | None = None

    def day(self, day: int) -> DayRequests:
        """Go to a day of the world, and see who asks: whatever was shown before, it is the same.

        Raises:
            InputError: the world does not last so long.
            ValueError: the day is over.
        """
        if not 0 <= day < self.num_days:
            raise InputError(f"day {day}: the world lasts {self.num_days} days, from 0 to {self.num_days - 1}")
        world, plan = self.world, self.plan
        if plan.day_zero + day < world.day:
            raise ValueError(f"day {day} is over: the world is on day {world.day - plan.day_zero}; make new Visits")
        while world.day < plan.day_zero + day:
            world.advance()
        requests = together(draw_requests(self._traffic, world.users, world.day), world.bots.requests(world.day))
        if plan.scenario.attackers and plan.scenario.is_on(day):
            requests = together(requests, world.attack.requests(day - plan.scenario.begins))
        requests = replace(requests, slate_sizes=np.where(requests.asked_for < 0, plan.k, 1))
        drawn = self._drawn(requests)
        return DayRequests(day, requests, self._asks(requests, drawn), drawn)

    def respond(self, asked: DayRequests, shown: Sequence[Sequence[str]]) -> DayOutcomes:
        """Show the pages, and see what happens. It changes nothing: other answers may be tried.

        Args:
            asked: of the world's current day.
            shown: (R,) the ids of the items that were answered, best first.

        Raises:
            InputError: an item is none of this world, is yet to be published, or has no place on its page.
        """
        requests, world = asked.requests, self.world
        slates, served = self._pages(asked, shown)
        row = slates.requests
        draws, pair = self._draws("clicks"), (row, slates.items)
        luck = Draws(
            click=draws.uniform(*pair),
            dwell=self._draws("dwell").normal(*pair),
            bot_dwell=self._draws("dwell of bots").uniform(*pair),
            rates=self._draws("rates").uniform(*pair),
            rating=self._draws("rating").normal(*pair),
        )
        users = requests.users[row]
        outcomes = world.outcomes(
            luck, users, slates.items, slates.positions, requests.times[row], requests.devices[row]
        )
        delays = delays_of(self._draws("click delays").normal(*pair), world.users.kind[users], outcomes.clicked)
        by_person = world.users.kind[requests.users] == PERSON
        measured = by_person & ~asked.explored & (requests.asked_for < 0)
        expected = np.bincount(row, outcomes.click_probability, minlength=len(requests))
        oracle, at_random = self._page_bounds(asked, measured)
        return DayOutcomes(
            slates, served, outcomes, delays, measured, np.where(measured, expected, np.nan), oracle, at_random
        )

    def _drawn(self, requests: Requests) -> Ints:
        """(R, k) different items for the pages that the shop fills, -1 for the others."""
        drawn = np.full((len(requests), self.plan.k), -1)
        lucky = self._draws("explore").uniform(np.arange(len(requests))) < self.plan.explore
        rows, draws = np.flatnonzero(lucky & (requests.asked_for < 0)), self._draws("explored items")
        num_published = np.searchsorted(self._published, requests.times, side="right")
        for place in range(self.plan.k):
            waiting, attempt = rows, 0
            while len(waiting):
                keys = (waiting, np.full(len(waiting), place), np.full(len(waiting), attempt))
                items = self._by_publication[(draws.uniform(*keys) * num_published[waiting]).astype(np.int64)]
                is_new = (drawn[waiting] != items[:, None]).all(axis=1)
                drawn[waiting[is_new], place] = items[is_new]
                waiting, attempt = waiting[~is_new], attempt + 1
        return drawn

    def _asks(self, requests: Requests, drawn: Ints) -> list[Ask]:
        user_ids = self.world.users.ids[requests.users].tolist()
        times: list[datetime] = requests.times.tolist()
        prefix = f"w{self.plan.seed}-d{self.world.day}"
        item_ids, candidates = self.world.items.ids, dict[int, tuple[str, ...]]()
        for named in (drawn, requests.asked_for[:, None]):
            rows = np.flatnonzero(named[:, 0] >= 0)
            candidates |= dict(zip(rows.tolist(), map(tuple, item_ids[named[rows]].tolist()), strict=True))
        columns = zip(user_ids, times, requests.devices, requests.slate_sizes, strict=True)
        return [
            Ask(
                request_id=f"{prefix}-{number}",
                user_id=user_id,
                event_timestamp=time.replace(tzinfo=UTC),
                k=int(size),
                context={"device": DEVICES[device]},
                candidates=candidates.get(number),
            )
            for number, (user_id, time, device, size) in enumerate(columns)
        ]

    def _pages(self, asked: DayRequests, shown: Sequence[Sequence[str]]) -> tuple[Slates, Bools]:
        """What is on the pages, and whether the server answered it."""
        num, requests = len(asked.requests), asked.requests
        if len(shown) != num:
            raise ValueError(f"{len(shown)} pages for {num} requests")
        answered = np.fromiter(map(len, shown), dtype=np.int64, count=num)
        row = np.repeat(np.arange(num), answered)
        ids = [item_id for page in shown for item_id in page]
        items = np.fromiter((self._index.get(item_id, -1) for item_id in ids), dtype=np.int64, count=len(ids))
        self._check_pages(asked, row, items, ids)

        # Last on a page that names its items: what the server does not know.
        page, place = np.nonzero(asked.named >= 0)
        named = asked.named[page, place]
        left = ~np.isin(self._pair(page, named), self._pair(row, items))
        rows = np.concatenate([row, page[left]])
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=num)
        num_published = np.searchsorted(self._published, requests.times, side="right")
        by_shop = self.plan.explore * self.plan.k / num_published
        propensity = np.where(asked.explored, by_shop, np.where(requests.asked_for < 0, 1 - self.plan.explore, 1.0))
        slates = Slates(
            requests=rows[order],
            items=np.concatenate([items, named[left]])[order],
            positions=np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1,
            propensity=propensity[rows[order]],
        )
        return slates, np.repeat([True, False], [len(row), left.sum()])[order]

    def _check_pages(self, asked: DayRequests, row: Ints, items: Ints, ids: list[str]) -> None:
        requests = asked.requests
        published: Times = self.world.items.published[items]
        is_repeated = np.ones(len(items), dtype=np.bool_)
        is_repeated[np.unique(self._pair(row, items), return_index=True)[1]] = False
        allowed = asked.named[row]
        is_bound = (allowed >= 0).any(axis=1)
        too_many = np.bincount(row, minlength=len(requests))[row] > requests.slate_sizes[row]
        for wrong, what, way_out in (
            (items < 0, "none of this world", "is the served model trained on this world's log?"),
            (published > requests.times[row], "yet to be published", "does a feature table know the future?"),
            (is_bound & (allowed != items[:, None]).all(axis=1), "not among the candidates", "rank what is asked for"),
            (is_repeated, "on the page already", "an answer must have each item once"),
            (too_many, "more than the page asked for", "is it another one's answer?"),
        ):
            if wrong.any():
                first = np.flatnonzero(wrong)[:_NAMED]
                names = ", ".join(f"{ids[n]} for {asked.asks[row[n]].request_id}" for n in first)
                more = f" and {wrong.sum() - len(first)} more" if wrong.sum() > len(first) else ""
                raise InputError(f"shown items are {what}: {names}{more}; {way_out}")

    def _pair(self, row: Ints, items: Ints) -> Ints:
        return row * (len(self._index) + 1) + items

    def _page_bounds(self, asked: DayRequests, measured: Bools) -> tuple[Floats, Floats]:
        """(R,) expected clicks of the oracle's page and of one at random; computed once a day."""
        if self._bounds is None or self._bounds[0] != asked.day:
            self._bounds = (asked.day, *self._compute_bounds(asked.requests, np.flatnonzero(measured)))
        return self._bounds[1:]

    def _compute_bounds(self, requests: Requests, measured: Ints) -> tuple[Floats, Floats]:
        world = self.world
        items = self._by_publication[: np.searchsorted(self._published, requests.times.max(), side="right")]
        examined = np.arange(1, self.plan.k + 1) ** -world.config.position_bias_exponent
        oracle, at_random = np.full(len(requests), np.nan), np.full(len(requests), np.nan)
        step = max(_PAIRS_PER_BLOCK // len(items), 1)
        for first in range(0, len(measured), step):
            rows = measured[first : first + step]
            column = requests.rows(rows)
            times, published = column.times[:, None], world.items.published[items]
            # What is published later that day has its relevance at that time, and is left out below.
            relevance = world.relevance(
                column.users[:, None], items, np.maximum(times, published), column.devices[:, None]
            )
            relevance[times < published] = 0.0
            best = -np.partition(-relevance, self.plan.k - 1, axis=1)[:, : self.plan.k]
            oracle[rows] = -np.sort(-best, axis=1) @ examined
            at_random[rows] = relevance.sum(axis=1) / (times >= published).sum(axis=1) * examined.sum()
        return oracle, at_random

    def _draws(self, name: str) -> KeyedDraws:
        return KeyedDraws(self.plan.seed, f"visits: {name}", self.world.day)
