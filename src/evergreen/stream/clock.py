"""What time it is for a partition. It never goes back: a row that was written is never older than the one before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from enum import StrEnum


class ClockKind(StrEnum):
    """Where the time comes from."""

    WALL = "wall"
    """The machine's clock, for live traffic: windows run out on time, whether or not anything happens."""
    EVENT = "event"
    """The events themselves, for a log that is played back: time stands where the newest event of the partition is.

    A function of the partition's events up to an offset, so that a replay gives the same times, however it is cut.
    """


Clock = Callable[[int, Iterable[int]], int]
"""(the partition's time until now, the times that its new events tell of) → its time now, in microseconds."""


def wall_micros() -> int:
    """The machine's time in microseconds since 1970."""
    return time.time_ns() // 1000


def wall_clock(before: int, seen: Iterable[int]) -> int:
    """The machine's time; when that jumps back, the partition's stands still but for a microsecond a step."""
    return max(before + 1, wall_micros())


def event_clock(before: int, seen: Iterable[int]) -> int:
    """Just after the newest event; a microsecond more for each event that is not newer, so that no two are alike."""
    for at in seen:
        before = max(before, at) + 1
    return before


CLOCKS: dict[ClockKind, Clock] = {ClockKind.WALL: wall_clock, ClockKind.EVENT: event_clock}
