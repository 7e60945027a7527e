"""Cutting a log in time: train, then validation, then test, with an embargo before each cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.instant import from_micros, to_micros
from evergreen.contracts.mapping import Split
from evergreen.contracts.training_set import SPLITS

_HOUR = 3_600_000_000


@dataclass(frozen=True)
class SplitBoundaries:
    """Half-open ranges [start, end) of the three splits, in microseconds since 1970."""

    ranges: dict[str, tuple[int, int]]

    def assign(self, time: NDArray[np.int64]) -> NDArray[np.int8]:
        """The place in SPLITS of each row, or -1 for rows in an embargo. Shape (n,)."""
        place = np.full(len(time), -1, dtype=np.int8)
        for index, split in enumerate(SPLITS):
            start, end = self.ranges[split]
            place[(time >= start) & (time < end)] = index
        return place


def split_boundaries(
    time: NDArray[np.int64], split: Split, *, as_of: datetime, leave_out: Sequence[tuple[datetime, datetime]] = ()
) -> SplitBoundaries:
    """Where to cut so that validation and test hold their fractions of the rows.

    A split with a span covers that time. Other cuts fall on full hours where the log is long enough for that. The
    embargo (the attribution window) is taken from the end of each earlier split, and from the end of the test split:
    labels younger than it are not final yet.

    Args:
        time: (n,) event times in microseconds, ascending.
        split: the fractions and the attribution window.
        as_of: the moment up to which the log is known.
        leave_out: half-open ranges of time whose rows are not there: a span reaches as much farther back, or what was
            broken yesterday would leave a split of yesterday empty.

    Raises:
        TrainingError: there are too few rows, or too short a time, for three splits.
    """
    embargo = split.attribution_window // timedelta(microseconds=1)
    end = to_micros(as_of)
    n = len(time)
    missing = [(to_micros(start), to_micros(stop)) for start, stop in leave_out]
    test = _cut(time, split.test_fraction) if split.test_span is None else _back(end, split.test_span, missing)
    if split.validation_span is None:
        validation = _cut(time, split.validation_fraction + split.test_fraction)
    else:
        validation = _back(test, split.validation_span, missing)
    ranges = {
        "train": (int(time[0]) if n else 0, validation - embargo),
        "validation": (validation, test - embargo),
        "test": (test, end - embargo),
    }
    boundaries = SplitBoundaries(ranges)
    sizes = np.bincount(boundaries.assign(time) + 1, minlength=4)[1:]
    for name, size in zip(SPLITS, sizes, strict=True):
        if size == 0:
            raise TrainingError(
                f"the {name} split is empty: {n} rows from {from_micros(time[0]) if n else '-'} to {as_of}, "
                f"validation {split.validation_span or f'fraction {split.validation_fraction}'}, "
                f"test {split.test_span or f'fraction {split.test_fraction}'}, embargo "
                f"{split.attribution_window}. Give a longer log, larger fractions or a shorter attribution_window in "
                "the mapping's [split]"
            )
    return boundaries


def with_spans_of_at_most(split: Split, span: timedelta) -> Split:
    """The same cuts with shorter spans; a fraction stays a fraction, and so does what is short enough."""
    longer = {
        name: span
        for name in ("validation_span", "test_span")
        if (given := getattr(split, name)) is not None and given > span > timedelta(0)
    }
    return split.model_copy(update=longer)


def _back(end: int, span: timedelta, missing: Sequence[tuple[int, int]]) -> int:
    """The moment from which on there is a span of time before `end` that is not missing."""
    left = span // timedelta(microseconds=1)
    for start, stop in sorted(missing, key=itemgetter(1), reverse=True):
        if (there := max(end - stop, 0)) >= left:
            break
        left -= there
        end = min(end, start)
    return end - left


def _cut(time: NDArray[np.int64], fraction: float) -> int:
    """Where the last fraction of all rows begins."""
    n = len(time)
    if not n:
        return 0
    cut = int(time[min(n - 1, int(n * (1 - fraction)))])
    on_hour = cut - cut % _HOUR
    # An hour's rounding may not move more than a tenth of the split.
    moved = np.searchsorted(time, cut) - np.searchsorted(time, on_hour)
    return on_hour if moved <= 0.1 * fraction * n else cut
