"""Cutting in time: order, embargo, and refusals that help."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import TrainingError
from evergreen.contracts.instant import from_micros, to_micros
from evergreen.contracts.mapping import Split
from evergreen.contracts.training_set import SPLITS
from evergreen.training.split import split_boundaries

START = to_micros(datetime(2025, 1, 1, tzinfo=UTC))
HOUR = 3_600_000_000


def test_micros_round_trip_is_exact() -> None:
    moment = datetime(2038, 1, 19, 3, 14, 7, 999_999, tzinfo=UTC)
    assert from_micros(to_micros(moment)) == moment


def test_fractions_are_of_rows() -> None:
    time = START + np.arange(10_000) * HOUR // 10
    boundaries = split_boundaries(
        time, Split(validation_fraction=0.2, test_fraction=0.1), as_of=from_micros(time[-1] + HOUR)
    )
    sizes = np.bincount(boundaries.assign(time))
    assert sizes / 10_000 == pytest.approx([0.7, 0.2, 0.1], abs=0.01)


def test_cuts_fall_on_full_hours_in_a_long_log() -> None:
    time = START + np.arange(10_000) * 7 * 60 * 1_000_000
    boundaries = split_boundaries(time, Split(), as_of=from_micros(time[-1] + HOUR))
    assert boundaries.ranges["test"][0] % HOUR == 0


@given(
    gaps=st.lists(st.integers(1, 5 * HOUR), min_size=60, max_size=200),
    window=st.integers(0, 30 * 60),
)
def test_every_row_of_a_later_split_is_an_embargo_younger(gaps: list[int], window: int) -> None:
    time = START + np.cumsum(np.array(gaps))
    split = Split(attribution_window=timedelta(seconds=window))
    try:
        boundaries = split_boundaries(time, split, as_of=from_micros(time[-1] + HOUR))
    except TrainingError:
        return
    place = boundaries.assign(time)
    ends = [time[place == index].max() for index in range(3)]
    starts = [time[place == index].min() for index in range(3)]
    for earlier, later in ((0, 1), (1, 2)):
        assert starts[later] - ends[earlier] > window * 1_000_000


def test_rows_in_the_embargo_are_in_no_split() -> None:
    time = START + np.arange(1000) * HOUR // 4
    split = Split(attribution_window=timedelta(hours=5))
    boundaries = split_boundaries(time, split, as_of=from_micros(time[-1] + 1))
    place = boundaries.assign(time)
    assert (place == -1).sum() == 3 * 5 * 4
    assert set(SPLITS) == set(boundaries.ranges)


def test_too_short_a_log_names_the_split_and_the_way_out() -> None:
    time = START + np.arange(20) * 1_000_000
    with pytest.raises(TrainingError, match=r"the train split is empty.*attribution_window"):
        split_boundaries(time, Split(attribution_window=timedelta(days=1)), as_of=from_micros(time[-1] + 1))


def test_no_rows_at_all_is_an_error_for_people() -> None:
    with pytest.raises(TrainingError, match="0 rows"):
        split_boundaries(np.array([], dtype=np.int64), Split(), as_of=datetime(2025, 1, 1, tzinfo=UTC))
