"""Cutting in time: order, embargo, and refusals that help."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import MappingError, TrainingError
from evergreen.contracts.instant import from_micros, to_micros
from evergreen.contracts.mapping import Mapping, Split
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


SPANS = Split(validation_span=timedelta(days=1), test_span=timedelta(days=2))
DAYS = np.array([START + hour * HOUR for hour in range(24 * 20)])
AS_OF = from_micros(START + 24 * 20 * HOUR)


def day(number: float) -> datetime:
    return from_micros(START) + timedelta(days=number)


def test_spans_are_of_time() -> None:
    ranges = split_boundaries(DAYS, SPANS, as_of=AS_OF).ranges
    assert [from_micros(ranges[name][0]) for name in SPLITS] == [day(0), day(17), day(18)]


@pytest.mark.parametrize(
    ("broken", "validation", "test"),
    [
        ([(19, 20)], 16, 17),  # yesterday
        ([(17.5, 18.5)], 16, 17),  # across the cut
        ([(16.5, 17), (17, 17.5), (17, 18)], 15.5, 18),  # they may touch, and overlap
        ([(2, 3), (19, 40)], 16, 17),  # far away, and beyond the end
        ([(15.5, 20), (17, 18)], 12.5, 13.5),
    ],
)
def test_spans_reach_past_what_is_left_out(broken: list[tuple[float, float]], validation: float, test: float) -> None:
    leave_out = [(day(start), day(end)) for start, end in broken]
    inside = np.zeros(len(DAYS), dtype=bool)
    for start, end in leave_out:
        inside |= (to_micros(start) <= DAYS) & (to_micros(end) > DAYS)
    boundaries = split_boundaries(DAYS[~inside], SPANS, as_of=AS_OF, leave_out=leave_out)
    starts = [from_micros(boundaries.ranges[name][0]) for name in ("validation", "test")]
    assert starts == [day(validation), day(test)]
    sizes = np.bincount(boundaries.assign(DAYS[~inside]))
    assert sizes[1:].tolist() == [24, 48], "as many rows as if nothing were missing"


def test_mapping_gives_spans_in_the_place_of_fractions() -> None:
    text = """
name = "reads"
kind = "interactions"
timestamp = { column = "at" }
columns = { user_id = "who", item_id = "what" }
[split]
validation_span = "12h"
test_span = "2d"
"""
    split = Mapping.load(text).split
    assert (split.validation_span, split.test_span) == (timedelta(hours=12), timedelta(days=2))
    assert Mapping.load(
        text.replace("_span", "_fraction").replace('"12h"', "0.1").replace('"2d"', "0.2")
    ).split == Split(validation_fraction=0.1, test_fraction=0.2)
    ranges = split_boundaries(DAYS, split, as_of=AS_OF).ranges
    assert [from_micros(ranges[name][0]) for name in SPLITS] == [day(0), day(17.5), day(18)]
    with pytest.raises(MappingError, match=r"split\.test_span"):
        Mapping.load(text.replace("2d", "two days"))


def test_embargo_lies_before_each_span() -> None:
    split = SPANS.model_copy(update={"attribution_window": timedelta(hours=5)})
    ranges = split_boundaries(DAYS, split, as_of=AS_OF).ranges
    ends = [from_micros(ranges[name][1]) for name in SPLITS]
    assert ends == [moment - timedelta(hours=5) for moment in (day(17), day(18), day(20))]


def test_one_split_may_be_a_span_and_the_other_a_fraction() -> None:
    span_of_test = Split(validation_fraction=0.2, test_fraction=0.1, test_span=timedelta(hours=6))
    ranges = split_boundaries(DAYS, span_of_test, as_of=AS_OF).ranges
    assert from_micros(ranges["test"][0]) == day(19.75)
    assert from_micros(ranges["validation"][0]) == day(14), "its share of the rows, and the one that the test had"
    span_of_validation = Split(test_fraction=0.1, validation_span=timedelta(hours=6))
    ranges = split_boundaries(DAYS, span_of_validation, as_of=AS_OF).ranges
    assert [from_micros(ranges[name][0]) for name in SPLITS[1:]] == [day(17.75), day(18)]


def test_span_that_leaves_nothing_to_learn_from_is_named() -> None:
    split = SPANS.model_copy(update={"validation_span": timedelta(days=19)})
    with pytest.raises(TrainingError, match=r"the train split is empty: .* validation 19 days, 0:00:00, test 2 days"):
        split_boundaries(DAYS, split, as_of=AS_OF)
