"""Features that exist only when somebody asks: what hour it is, and how long ago the last things happened.

The one body behind Feast's on-demand view `request_context`, the point-in-time join and the server, so that a model is
served what it was trained on. Both times are cut to whole seconds before they are subtracted, because Feast's online
store keeps timestamps in seconds: a recency would otherwise differ between training and serving by up to a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd

REQUEST_TIMESTAMP = "request_timestamp"
"""What the request brings, in UTC."""

CALENDAR_FEATURES = ("hour", "weekday")
"""Strings: "0" to "23", and "0" (Monday) to "6", both in UTC."""

ELAPSED_FEATURES = {
    "user_recency_seconds": "user_last_event_timestamp",
    "user_positive_recency_seconds": "user_last_positive_timestamp",
    "user_age_seconds": "user_first_seen",
    "item_recency_seconds": "item_last_positive_timestamp",
    "item_age_seconds": "item_first_seen",
}
"""Seconds from a stored timestamp to the request."""

USER_ELAPSED_FEATURES = {name: then for name, then in ELAPSED_FEATURES.items() if name.startswith("user_")}
ITEM_ELAPSED_FEATURES = {name: then for name, then in ELAPSED_FEATURES.items() if name.startswith("item_")}

REQUEST_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in CALENDAR_FEATURES]
    + [pa.field(name, pa.float64()) for name in ELAPSED_FEATURES]
)
"""Columns of `request_features`, in the order in which they are served."""

_HOURS = pa.array([str(hour) for hour in range(24)])
_WEEKDAYS = pa.array([str(day) for day in range(7)])
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday


def request_features(request_timestamp: datetime | pa.Array | pa.ChunkedArray, stored: pa.Table) -> pa.Table:
    """Calendar and elapsed-time features of each row.

    Args:
        request_timestamp: of every row (num_rows), or one for all; a timestamp without a zone is UTC.
        stored: (num_rows) the timestamp columns that `ELAPSED_FEATURES` names; other columns are ignored.

    Returns:
        (num_rows) with REQUEST_SCHEMA. Elapsed times are whole seconds, null where either time is unknown. A stored
        timestamp after the request counts as just now (0): the store may be ahead of a late request, and that
        something has just happened is the closest truth a model has seen.

    Raises:
        ArtifactError: a timestamp column is missing; names it.
    """
    num_rows = stored.num_rows
    if missing := [name for name in ELAPSED_FEATURES.values() if name not in stored.column_names]:
        raise ArtifactError(f"request features need the column {missing[0]!r}, the rows have {stored.column_names}")
    now, now_unknown = _request_seconds(request_timestamp, num_rows)
    columns: list[pa.Array] = [
        _labels(_HOURS, now // 3600 % 24, now_unknown),
        _labels(_WEEKDAYS, (now // 86400 + _EPOCH_WEEKDAY) % 7, now_unknown),
    ]
    for name in ELAPSED_FEATURES.values():
        then, then_unknown = _seconds(stored[name])
        elapsed = elapsed_seconds(now, then).astype(np.float64)
        columns.append(pa.array(elapsed, mask=now_unknown | then_unknown))
    return pa.Table.from_arrays(columns, schema=REQUEST_SCHEMA)


def elapsed_seconds(now: NDArray[Any] | int, then: NDArray[Any]) -> NDArray[Any]:
    """Seconds from `then` to `now`, in whole Unix seconds; 0 for what is still to come, nan stays nan."""
    elapsed: NDArray[Any] = np.maximum(now - then, 0)
    return elapsed


def user_request_features(now: int, stored: Mapping[str, Any]) -> dict[str, str | float | None]:
    """`request_features` of one user at once: the calendar, and the elapsed times that begin with `user_`.

    Args:
        now: of the request, in whole Unix seconds.
        stored: the user's timestamps in whole Unix seconds, by name; None or absent where unknown.
    """
    values: dict[str, str | float | None] = {
        "hour": str(now // 3600 % 24),
        "weekday": str((now // 86400 + _EPOCH_WEEKDAY) % 7),
    }
    for name, timestamp in USER_ELAPSED_FEATURES.items():
        then = stored.get(timestamp)
        values[name] = None if then is None else float(max(now - then, 0))
    return values


def request_features_frame(inputs: pd.DataFrame) -> pd.DataFrame:
    """`request_features` for pandas, with the request's time in the column `request_timestamp`: Feast's form."""
    columns = [REQUEST_TIMESTAMP, *ELAPSED_FEATURES.values()]
    table = pa.Table.from_pandas(inputs[columns], preserve_index=False)
    frame: pd.DataFrame = request_features(table[REQUEST_TIMESTAMP], table).to_pandas()
    return frame


def _request_seconds(
    request_timestamp: datetime | pa.Array | pa.ChunkedArray, num_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if not isinstance(request_timestamp, datetime):
        return _seconds(request_timestamp)
    zoned = request_timestamp if request_timestamp.tzinfo else request_timestamp.replace(tzinfo=UTC)
    seconds = np.full(num_rows, int(zoned.timestamp() // 1), dtype=np.int64)
    return seconds, np.zeros(num_rows, dtype=np.bool_)


def whole_seconds(timestamps: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """(num_rows,) whole Unix seconds, rounded down, nan where there is no timestamp."""
    seconds, unknown = _seconds(timestamps)
    return np.where(unknown, np.nan, seconds)


def _seconds(timestamps: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Whole Unix seconds, rounded down, and where there is no timestamp."""
    if isinstance(timestamps, pa.ChunkedArray):
        timestamps = timestamps.combine_chunks()
    micros = timestamps.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    unknown = micros.is_null().to_numpy(zero_copy_only=False)
    return np.floor_divide(micros.fill_null(0).to_numpy(), 1_000_000), unknown


def _labels(names: pa.Array, index: NDArray[np.int64], unknown: NDArray[np.bool_]) -> pa.Array:
    return names.take(pa.array(index, mask=unknown))
