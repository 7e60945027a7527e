"""Times as whole microseconds since 1970, which is what the artifacts' timestamps hold, and as people type them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from evergreen.contracts.errors import InputError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of a moment with a time zone, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """The UTC time of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=int(micros))


def from_text(text: str) -> datetime:
    """A moment that a person typed as a parameter.

    Raises:
        InputError: not an ISO 8601 time, or without an offset.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"as_of={text!r}: not an ISO 8601 time; write e.g. 2025-01-30T00:00:00Z") from error
    if moment.tzinfo is None:
        raise InputError(f"as_of={text!r}: has no offset from UTC; write e.g. {moment.isoformat()}Z")
    return moment


def last_end(now: datetime, window: timedelta) -> datetime:
    """The end of the last whole window; windows follow one another from midnight (UTC) of a day in 1970."""
    return now - (now - _EPOCH) % window
