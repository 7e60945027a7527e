"""What the stream knows of one user, and what `user_recent` says of it at a moment.

The values are a function of the events alone, in whatever order they came: a late event takes the place that it would
have had. `features.recent` says the same of a whole log, and a test holds both to the same values.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

import orjson

from evergreen.contracts.feature_tables import RECENT_ITEMS, RECENT_WINDOWS_MINUTES

WINDOWS_US = {window: minutes * 60_000_000 for window, minutes in RECENT_WINDOWS_MINUTES.items()}
HORIZON_US = max(WINDOWS_US.values())
"""What is older counts in no window."""


@dataclass(frozen=True, slots=True)
class Event:
    """A good event. All times are microseconds since 1970."""

    user_id: str
    item_id: str | None
    at: int
    known: int | None
    """When it is known to be a positive; None: it is none."""
    seen: int
    """The latest time that the event itself tells of: its own, or its click's."""
    offset: int
    """Its place in its partition, which decides between positives of one instant as the order of rows does in a log."""
    request_id: str | None = None
    clicked_at: int | None = None
    """When it was clicked, where the log knows it."""


@dataclass(slots=True)
class UserState:
    """The events of the last hour, and the last items.

    Memory: a pair of numbers for each distinct time of an event within the hour, and RECENT_ITEMS items.
    """

    events: list[list[int]] = field(default_factory=list)
    """[time, how many], by time."""
    positives: list[list[int]] = field(default_factory=list)
    """[time known, how many], by time; also those that will be known."""
    items: list[list[Any]] = field(default_factory=list)
    """[time known, event's time, offset, item], in this order; the last ones known, and those that will be."""

    def add(self, event: Event) -> None:
        """Take an event in."""
        _count(self.events, event.at)
        if event.known is not None:
            _count(self.positives, event.known)
            if event.item_id is not None:
                insort(self.items, [event.known, event.at, event.offset, event.item_id])

    def forget(self, now: int) -> None:
        """Drop what can no longer count at `now` or later."""
        for counts in (self.events, self.positives):
            del counts[: bisect_left(counts, [now - HORIZON_US])]
        num_known = bisect_left(self.items, [now])
        del self.items[: max(num_known - RECENT_ITEMS, 0)]

    def values(self, now: int) -> dict[str, int | list[str]]:
        """The features of `schema.RECENT_FIELDS`: what was known strictly before `now`."""
        known = self.items[: bisect_left(self.items, [now])]
        return {
            **{f"user_recent_events_{w}": _between(self.events, now - us, now) for w, us in WINDOWS_US.items()},
            **{f"user_recent_positives_{w}": _between(self.positives, now - us, now) for w, us in WINDOWS_US.items()},
            "user_recent_items": [item for *_, item in known[-RECENT_ITEMS:]],
        }

    def next_change(self, now: int) -> int | None:
        """The first time after `now` at which the values change if nothing else happens."""
        changes = []
        for counts in (self.events, self.positives):
            for delay in (0, *WINDOWS_US.values()):
                # What happens at t takes effect at t + delay + 1.
                place = bisect_left(counts, [now - delay])
                if place < len(counts):
                    changes.append(counts[place][0] + delay + 1)
        return min(changes, default=None)

    def to_bytes(self) -> bytes:
        """As JSON."""
        return orjson.dumps([self.events, self.positives, self.items])

    @classmethod
    def from_bytes(cls, data: bytes) -> UserState:
        """Read back."""
        return cls(*orjson.loads(data))


def _count(counts: list[list[int]], at: int) -> None:
    place = bisect_left(counts, [at])
    if place < len(counts) and counts[place][0] == at:
        counts[place][1] += 1
    else:
        counts.insert(place, [at, 1])


def _between(counts: list[list[int]], start: int, end: int) -> int:
    """How many lie in [start, end)."""
    return sum(number for _, number in counts[bisect_left(counts, [start]) : bisect_left(counts, [end])])
