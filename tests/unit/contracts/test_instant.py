from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.instant import from_text, last_end

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("now", "window", "end"),
    [
        ("2026-03-09T12:05:07.5+00:00", HOUR, "2026-03-09T12:00:00+00:00"),
        ("2026-03-09T12:00:00+00:00", HOUR, "2026-03-09T12:00:00+00:00"),
        ("2026-03-09T23:59:59+00:00", 24 * HOUR, "2026-03-09T00:00:00+00:00"),
        ("2026-03-09T13:00:00+00:00", 6 * HOUR, "2026-03-09T12:00:00+00:00"),
        ("2026-03-09T01:30:00+02:00", 24 * HOUR, "2026-03-08T00:00:00+00:00"),
        ("2026-03-09T12:05:07.5+00:00", timedelta(seconds=1), "2026-03-09T12:05:07+00:00"),
    ],
)
def test_last_window_ends_at_a_multiple_of_it_from_midnight_utc(now: str, window: timedelta, end: str) -> None:
    assert last_end(datetime.fromisoformat(now), window) == datetime.fromisoformat(end)


def test_typed_time_is_read_with_its_offset() -> None:
    assert from_text("2026-03-09T12:00:00Z") == datetime(2026, 3, 9, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2026-03-09", "has no offset from UTC; write e.g. 2026-03-09T00:00:00Z"),
        ("yesterday", "not an ISO 8601 time"),
        ("[[ScheduledTime]]", "not an ISO 8601 time"),
    ],
)
def test_typed_time_that_is_none_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_text(text)
