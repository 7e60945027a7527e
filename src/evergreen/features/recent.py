"""What a user did in the last minutes, to the microsecond: the batch side of what the stream keeps.

An event counts from its own time on for the length of a window. A positive counts from the moment on at which it is
known: the event itself, or for impressions its click, or where the log does not say when that was, the end of the
attribution window. The value at T is what was known strictly before T, so a window w at T holds what happened in
[T-w, T): it takes effect one microsecond after what it knows, and ends one microsecond after w has passed.

As in `activity`, what enters and leaves is written as deltas, and a running sum over them is the value; their times are
those at which a value can change. `evergreen.stream.state` computes the same, one event at a time.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import ibis
import ibis.expr.types as ir

from evergreen.contracts.feature_tables import RECENT_ITEMS, RECENT_WINDOWS_MINUTES
from evergreen.contracts.mapping import LogKind, Mapping

_MICROSECOND = timedelta(microseconds=1)
_MOMENT = "timestamp('UTC', 6)"
_WINDOWS = {window: timedelta(minutes=minutes) for window, minutes in RECENT_WINDOWS_MINUTES.items()}


def recent(events: ir.Table, mapping: Mapping, *, end: datetime) -> ir.Table:
    """Counts over the last minutes and the last items of every user.

    Args:
        events: the snapshot's rows, with `positives` from `activity.with_labels`.
        mapping: of the snapshot.
        end: no row is later.

    Returns:
        user_id, event_timestamp, `schema.RECENT_FIELDS`. One row for each user and time at which a value can change.
    """
    events = events.filter(events.user_id.notnull())
    positives = events.filter(events.positives == 1).mutate(known=lambda t: _known(t, mapping))
    zero, one = ibis.literal(0, "!int64"), ibis.literal(1, "!int64")
    happened = ibis.union(
        events.select("user_id", at=events.event_timestamp.cast(_MOMENT), events=one, positives=zero, items=zero),
        positives.select(
            "user_id",
            at=positives.known.cast(_MOMENT),
            events=zero,
            positives=one,
            items=positives.item_id.notnull().cast("!int64"),
        ),
    )
    # All that a user was shown at once is one row from here on.
    happened = happened.group_by(["user_id", "at"]).agg(
        **{name: _whole(happened[name].sum()) for name in ("events", "positives", "items")}
    )
    values = _running_values(happened, end)
    values = values.left_join(_last_items(positives), ["user_id", "items"])
    none = ibis.literal([], "array<string>")
    return values.select(
        "user_id",
        event_timestamp=values["T"],
        **{f"user_recent_{what}_{w}": values[f"{what}_{w}"] for what in ("events", "positives") for w in _WINDOWS},
        user_recent_items=values.last_items.fill_null(none),
    )


def _known(positives: ir.Table, mapping: Mapping) -> ir.TimestampValue:
    """When a positive is known."""
    if mapping.kind is not LogKind.IMPRESSIONS:
        return positives.event_timestamp
    matured = positives.event_timestamp + _interval(mapping.split.attribution_window)
    if "click_timestamp" not in positives.columns:  # a snapshot of schema version 1
        return matured
    return ibis.coalesce(positives.click_timestamp, matured)


def _running_values(happened: ir.Table, end: datetime) -> ir.Table:
    """user_id, T, {events,positives}_{w}, and `items`: how many positive items were known before T."""
    no_change = {
        f"{what}_{window}": ibis.literal(0, "!int64") for what in ("events", "positives") for window in _WINDOWS
    }
    entries = {name: happened[name.split("_")[0]] for name in no_change}
    deltas = happened.select("user_id", "items", T=happened["at"] + _interval(_MICROSECOND), **entries)
    for window, length in _WINDOWS.items():
        exits = {f"{what}_{window}": _whole(-happened[what]) for what in ("events", "positives")}
        leaving = happened.select(
            "user_id",
            items=ibis.literal(0, "!int64"),
            T=happened["at"] + _interval(length + _MICROSECOND),
            **(no_change | exits),
        )
        deltas = ibis.union(deltas, leaving)
    deltas = deltas.filter(deltas["T"] <= ibis.literal(end, _MOMENT))
    sums = ("items", *no_change)
    changes = deltas.group_by(["user_id", "T"]).agg(**{name: _whole(deltas[name].sum()) for name in sums})
    so_far = ibis.cumulative_window(group_by="user_id", order_by="T")
    return changes.select("user_id", "T", **{name: _whole(changes[name].sum().over(so_far)) for name in sums})


def _last_items(positives: ir.Table) -> ir.Table:
    """user_id, items (a number n from 1), and last_items: the user's n-th positive item and those before it."""
    chosen = positives.filter(positives.item_id.notnull())
    in_order = ibis.window(group_by="user_id", order_by=["known", "event_id"])
    up_to_ten = ibis.window(group_by="user_id", order_by=["known", "event_id"], preceding=RECENT_ITEMS - 1, following=0)
    return chosen.select(
        "user_id",
        items=(ibis.row_number().over(in_order) + 1).cast("int64"),
        last_items=chosen.item_id.collect().over(up_to_ten),
    )


def _interval(duration: timedelta) -> ir.IntervalScalar:
    return ibis.interval(microseconds=duration // _MICROSECOND)


def _whole(total: ir.IntegerValue) -> ir.IntegerValue:
    """A sum as int64. DuckDB's is an int128; Ibis takes it for an int64 already and drops a cast to just that."""
    return total.cast("!int64")
