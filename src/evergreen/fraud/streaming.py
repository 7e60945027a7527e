"""The rules of `rules` as state: feed a log's events in order, and get for each the verdict that the batch gives.

What is kept is bounded: of a user, the requests of the last hour up to the limit, the last clicks and a few counts; of
an item, the votes of the last hour; and no more users and items than asked for, the longest unseen forgotten first.

A stream that is split by user gives the batch's verdicts too, but for `account_burst`, which needs all clicks on an
item: there each part sees a burst only when its own share of it is one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from evergreen.contracts.mapping import LogKind
from evergreen.fraud.rules import DAY, HOUR, MINUTE, RECENT_CLICKS, SAME_PAGE_MS, Limits, Reason, evidence

_VOTES = 4_096
"""Votes of an item that are kept: the limit is passed long before."""


@dataclass(frozen=True, slots=True)
class Event:
    """What the rules need to know of an event. Times are microseconds since 1970."""

    user_id: str
    item_id: str | None
    request_id: str | None
    t: int
    clicked: bool
    """A click, an interaction or a rating."""
    clicked_at: int | None = None
    """When it was clicked, where the log knows it."""


@dataclass(slots=True)
class _User:
    """A user's state."""

    first_seen: int
    requests: deque[int]
    day: int = -1
    shown_today: int = 0
    clicks_today: int = 0
    shown: int = 0
    has_clicked: bool = False
    last_click: int | None = None
    gaps: deque[int] = field(default_factory=deque)
    recent: deque[tuple[str, str | None]] = field(default_factory=lambda: deque(maxlen=RECENT_CLICKS))
    """(request, item) of the last clicks."""


class EventRules:
    """The rules' state over all users. Not for several threads at once.

    Attributes:
        forgotten: users whose state was dropped to stay within `max_users`; one who comes back counts as new.
        late: events that were older than their user's last one, and were judged as if they came with it.
    """

    def __init__(
        self, limits: Limits, kind: LogKind, *, max_users: int = 1_000_000, max_items: int = 1_000_000
    ) -> None:
        self.limits = limits
        self.forgotten = 0
        self.late = 0
        self._counts_impressions = kind is LogKind.IMPRESSIONS and limits.click_rate > 0
        self._users: _Recent[_User] = _Recent(max_users)
        self._votes: _Recent[deque[tuple[int, bool]]] = _Recent(max_items)
        self._hours: OrderedDict[int, list[int]] = OrderedDict()

    def update(self, event: Event) -> tuple[Reason, ...]:
        """Take an event in.

        Returns:
            The rules that it breaks, in the order of `Reason`; empty: none.
        """
        user = self._users.get(event.user_id)
        if user is None:
            user = _User(event.t, deque(maxlen=max(self.limits.requests_per_hour, self.limits.requests_per_minute) + 1))
            self.forgotten += self._users.put(event.user_id, user)
        t = event.t
        if user.requests and t < user.requests[-1]:
            self.late += 1
            t = user.requests[-1]
        return tuple(self._broken(user, event, t))

    def _broken(self, user: _User, event: Event, t: int) -> Iterator[Reason]:
        if self._is_fast(user, t):
            yield Reason.VELOCITY
        if self._counts_impressions:
            yield from self._click_rates(user, event, t)
        if not event.clicked:
            return
        request = event.request_id if event.request_id is not None else str(event.t)
        key = (request, event.item_id)
        voted = any(item == event.item_id for _, item in user.recent)
        if self._is_regular(user, event.clicked_at if event.clicked_at is not None else event.t):
            yield Reason.REGULAR_CLICKS
        user.recent.append(key)
        if user.recent.count(key) > self.limits.repeats:
            yield Reason.REPEATED_CLICK
        if event.item_id is not None and self._is_burst(user, event.item_id, t, voted):
            yield Reason.ACCOUNT_BURST

    def _is_fast(self, user: _User, t: int) -> bool:
        requests, limits = user.requests, self.limits
        if not requests or requests[-1] != t:
            requests.append(t)
        while requests[0] <= t - HOUR:
            requests.popleft()
        if len(requests) > limits.requests_per_hour:
            return True
        place = len(requests) - 1 - limits.requests_per_minute
        return place >= 0 and requests[place] > t - MINUTE

    def _click_rates(self, user: _User, event: Event, t: int) -> Iterator[Reason]:
        if t // DAY != user.day:
            user.day, user.shown_today, user.clicks_today = t // DAY, 0, 0
        user.shown += 1
        user.shown_today += 1
        user.clicks_today += event.clicked
        user.has_clicked |= event.clicked
        rate = self.limits.highest_rate
        if rate < 1 and evidence(user.clicks_today, user.shown_today, rate) > self.limits.evidence:
            yield Reason.CLICK_RATE
        if not user.has_clicked and user.shown > self.limits.silence:
            yield Reason.NO_CLICKS

    def _is_regular(self, user: _User, clicked_at: int) -> bool:
        limits = self.limits
        longest = limits.longest_gap_seconds * 1000
        gap = 0 if user.last_click is None else min(abs(clicked_at - user.last_click) // 1000, longest + 1)
        user.last_click = clicked_at
        if gap < SAME_PAGE_MS:
            return False
        gaps = user.gaps
        gaps.append(gap)
        if len(gaps) > limits.regular_gaps:
            gaps.popleft()
        if len(gaps) < limits.regular_gaps or max(gaps) > longest:
            return False
        total = sum(gaps)
        return len(gaps) * sum(gap * gap for gap in gaps) - total * total < limits.regular_spread**2 * (total * total)

    def _is_burst(self, user: _User, item: str, t: int, voted: bool) -> bool:
        if voted:
            return False
        limits, hour = self.limits, t // HOUR
        is_new = t - user.first_seen < limits.new_account_hours * HOUR
        before = [counts for at, counts in self._hours.items() if hour - 24 <= at < hour]
        share = (sum(counts[1] for counts in before) + 1) / (sum(counts[0] for counts in before) + 1)
        counts = self._hours.setdefault(hour, [0, 0])
        counts[0] += 1
        counts[1] += is_new
        while len(self._hours) > 26:  # 24 full hours, the one that runs, and one for what comes late
            del self._hours[min(self._hours)]
        votes = self._votes.get(item)
        if votes is None:
            self._votes.put(item, votes := deque(maxlen=_VOTES))
        votes.append((t, is_new))
        while votes[0][0] <= t - HOUR:
            votes.popleft()
        fresh = sum(new for _, new in votes)
        if not is_new or fresh < limits.burst_accounts or share >= 1:
            return False
        return evidence(fresh, len(votes), share) > limits.evidence


T = TypeVar("T")


class _Recent(Generic[T]):
    """A mapping that forgets what was not asked for for longest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: T) -> int:
        """Add, and return how many were forgotten for it."""
        self._values[key] = value
        if len(self._values) <= self._size:
            return 0
        self._values.popitem(last=False)
        return 1
