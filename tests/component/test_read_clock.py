"""The one step that reads a clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from components.read_clock import read_clock


def test_given_time_is_handed_on() -> None:
    assert read_clock.python_func(as_of="2026-03-09T12:00:00Z", window_hours=1.0) == "2026-03-09T12:00:00+00:00"


def test_without_one_the_last_whole_window_ended() -> None:
    before = datetime.now(UTC)
    end = datetime.fromisoformat(read_clock.python_func(as_of="", window_hours=1.0))
    assert (end.minute, end.second, end.microsecond) == (0, 0, 0)
    assert before - timedelta(hours=1) < end <= datetime.now(UTC)


@pytest.mark.parametrize("as_of", ["2026-03-09T12:00:00", "2026-03-09T12:00:00.5Z"])
def test_time_that_names_no_window_ends_the_run(as_of: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_clock.python_func(as_of=as_of, window_hours=1.0)
    assert as_of in capsys.readouterr().out
