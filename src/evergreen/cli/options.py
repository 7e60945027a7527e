"""Parameter types that several commands share."""

from __future__ import annotations

from datetime import datetime

import click


class InstantType(click.ParamType[datetime]):
    """An ISO 8601 time with an offset."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Parse, or fail naming the value and the way out."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not an ISO 8601 time; write e.g. 2025-01-30T00:00:00+00:00", param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{value!r} has no offset from UTC; write e.g. {moment.isoformat()}+00:00", param, ctx)
        return moment


INSTANT = InstantType()
