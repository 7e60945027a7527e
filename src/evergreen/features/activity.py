"""Activity tables as Ibis expressions: how often, how well and how lately, per user, item and user x category.

Time is a grid of full hours, which is what an hourly batch job can know. An event of the hour [b, b+1) is counted from
T = b+1 on, and leaves a window of w hours at T = b+1+w; a row (key, T) thus counts the events in [T-w, T). A label
(click, rating) is known only when it has matured, `lag` hours later, so it enters at b+1+lag and leaves at b+1+lag+w.

Both are written as deltas: +n where an event enters a window, -n where it leaves. A running sum over the deltas is the
value of the window, and the deltas' times are exactly the times at which a value can change, so nothing else is
stored. (Frames over a range of hours say the same, but Spark computes them anew for each row.)

Sums are over integers: adding floats in another order gives other last bits, and then the future would change the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import ibis
import ibis.expr.types as ir

from evergreen.contracts.feature_tables import HISTORY_LENGTH, WINDOWS_HOURS
from evergreen.contracts.mapping import LogKind

SMOOTHING_STRENGTH = 20
"""How many events the prior counts for in a smoothed rate: below it the prior speaks, above it the key itself."""

RATING_UNITS = 1_000_000
"""Ratings are summed as whole millionths, which is exact."""

_HOUR_SECONDS = 3600

_LABEL_SUMS = {
    LogKind.IMPRESSIONS: {"labels": "labels", "positives": "positives", "label_units": "positives"},
    LogKind.INTERACTIONS: {"labels": "positives", "positives": "positives", "label_units": "positives"},
    LogKind.RATINGS: {"labels": "positives", "positives": "positives", "label_units": "label_units"},
}
"""Which column of `with_labels` to sum for a quantity: where two are equal by definition, one sum does for both."""


def full_hours(window: timedelta) -> int:
    """A duration in hours, rounded up."""
    return -(-window // timedelta(hours=1))


def last_full_hour(moment: datetime) -> int:
    """The last full hour not later than a moment, in hours since 1970."""
    return int(moment.timestamp() // _HOUR_SECONDS)


def with_labels(events: ir.Table, kind: LogKind) -> ir.Table:
    """Add to each event its hour and what it counts for, all int64.

    Adds `hour` (since 1970), `labels` (1 where a label exists), `positives` (1 for a click, an interaction or a
    rating) and `label_units` (the label, in `label_unit(kind)`ths).
    """
    one = ibis.literal(1, "int64")
    if kind is LogKind.IMPRESSIONS:
        labels = events.clicked.notnull().cast("int64")
        positives = label_units = events.clicked.fill_null(False).cast("int64")
    elif kind is LogKind.RATINGS:
        labels = positives = events.rating.notnull().cast("int64")
        label_units = (events.rating.cast("float64") * RATING_UNITS).round().cast("int64").fill_null(0)
    else:
        labels = positives = label_units = one
    hour = (events.event_timestamp.epoch_seconds() // _HOUR_SECONDS).cast("int64")
    return events.mutate(hour=hour, labels=labels, positives=positives, label_units=label_units)


def label_unit(kind: LogKind) -> int:
    """How many `label_units` a label of 1.0 is."""
    return RATING_UNITS if kind is LogKind.RATINGS else 1


def _whole(total: ir.IntegerValue) -> ir.IntegerValue:
    """A sum as int64. DuckDB's is an int128; Ibis takes it for an int64 already and drops a cast to just that."""
    return total.cast("!int64")


def _shifts(lag: int) -> ir.Table:
    """When an event counts, in hours after the end of its own hour: the sign it enters (+1) or leaves (-1) with.

    Columns: shift; event_{w} and label_{w} for each window; event_seen and label_seen, 1 at the first time of each.
    """
    windows = WINDOWS_HOURS.items()
    times = sorted({start + hours for start in (0, lag) for hours in (0, *WINDOWS_HOURS.values())})
    columns: dict[str, list[int]] = {"shift": times}
    for clock, start in (("event", 0), ("label", lag)):
        columns[f"{clock}_seen"] = [int(t == start) for t in times]
        for window, hours in windows:
            columns[f"{clock}_{window}"] = [int(t == start) - int(t == start + hours) for t in times]
    return ibis.memtable(columns, schema=dict.fromkeys(columns, "int64"))


def _deltas(hourly: ir.Table, *, lag: int, last_hour: int, first_hour: int | None) -> ir.Table:
    """Each hour's sums at every time T at which they enter or leave a window, beside the signs of `_shifts`.

    All that happened before `first_hour` is put into the hour before it: one row a key carries a whole history.
    """
    deltas = hourly.cross_join(_shifts(lag)).mutate(T=lambda t: t.hour + 1 + t.shift)
    deltas = deltas.filter(deltas["T"] <= last_hour)
    return deltas if first_hour is None else deltas.mutate(T=ibis.greatest(deltas["T"], first_hour - 1))


def _running_values(
    events: ir.Table, keys: Sequence[str], *, kind: LogKind, lag: int, last_hour: int, first_hour: int | None
) -> ir.Table:
    """What each window holds from T on: the running sums of the deltas, a row for each key and T.

    Columns: the keys, T, {measure}_{w} for `events` and each column that `_LABEL_SUMS` names, last_event,
    last_positive, history_end.
    """
    events = events.filter([events[key].notnull() for key in keys])
    hourly = events.group_by([*keys, "hour"]).agg(
        events=events.count(),
        labels=_whole(events.labels.sum()),
        positives=_whole(events.positives.sum()),
        label_units=_whole(events.label_units.sum()),
        chosen=_whole((events.positives * events.item_id.notnull().cast("int64")).sum()),
        last_event=events.event_timestamp.max(),
        last_positive=events.event_timestamp.max(where=events.positives == 1),
    )
    deltas = _deltas(hourly, lag=lag, last_hour=last_hour, first_hour=first_hour)
    clocks = {"events": "event"} | dict.fromkeys(_LABEL_SUMS[kind].values(), "label")
    changes = deltas.group_by([*keys, "T"]).agg(
        **{
            f"{measure}_{window}": _whole((deltas[measure] * deltas[f"{clock}_{window}"]).sum())
            for measure, clock in clocks.items()
            for window in WINDOWS_HOURS
        },
        history_end=_whole((deltas.chosen * deltas.label_seen).sum()),
        last_event=deltas.last_event.max(where=deltas.event_seen == 1),
        last_positive=deltas.last_positive.max(where=deltas.label_seen == 1),
    )
    latest = ("last_event", "last_positive")
    summed = [column for column in changes.columns if column not in (*keys, "T", *latest)]
    so_far = ibis.cumulative_window(group_by=keys, order_by="T")
    values = changes.select(
        *keys,
        "T",
        **{column: _whole(changes[column].sum().over(so_far)) for column in summed},
        **{column: changes[column].max().over(so_far) for column in latest},
    )
    return values if first_hour is None else values.filter(values["T"] >= first_hour)


def global_prior(
    events: ir.Table, *, kind: LogKind, lag: int, last_hour: int, first_hour: int | None = None
) -> ir.Table:
    """Mean label of all events matured by each hour that a row of an activity table can have.

    Args:
        events: from `with_labels`.
        kind: of the log.
        lag: hours until a label has matured.
        last_hour: rows go no further.
        first_hour: rows before it are of no interest; but for one with all that was known by then, there is none.

    Returns:
        T (int64, hours since 1970), prior (float64, null while no label has matured). One row a T.
    """
    hourly = events.group_by("hour").agg(
        labels=_whole(events.labels.sum()), label_units=_whole(events.label_units.sum())
    )
    deltas = _deltas(hourly, lag=lag, last_hour=last_hour, first_hour=first_hour)
    known = deltas.group_by("T").agg(
        labels=_whole((deltas.labels * deltas.label_seen).sum()),
        label_units=_whole((deltas.label_units * deltas.label_seen).sum()),
    )
    so_far = ibis.cumulative_window(order_by="T")
    known = known.mutate(
        labels=_whole(known.labels.sum().over(so_far)), label_units=_whole(known.label_units.sum().over(so_far))
    )
    mean = known.label_units.cast("float64") / label_unit(kind) / known.labels.nullif(0)
    return known.select("T", prior=mean)


def activity(
    events: ir.Table,
    prior: ir.Table,
    keys: Sequence[str],
    prefix: str,
    *,
    kind: LogKind,
    lag: int,
    last_hour: int,
    first_hour: int | None = None,
) -> ir.Table:
    """Counts and smoothed rates per key on the hourly grid.

    The smoothed rate of a window is (sum of its matured labels + strength x prior) / (their number + strength), null
    while no label of the whole log has matured: there is no prior yet.

    Args:
        events: from `with_labels`.
        prior: from `global_prior`.
        keys: the entity's columns; events where one is null count for nobody.
        prefix: of the columns' names.
        kind: of the log.
        lag: hours until a label has matured.
        last_hour: rows go no further.
        first_hour: rows start here, with all that was known by then. Default: at the first event.

    Returns:
        The keys, T (int64, hours since 1970), {prefix}_events_{w}, {prefix}_positives_{w} (int64), {prefix}_rate_{w}
        (float64), {prefix}_last_event_timestamp, {prefix}_last_positive_timestamp, and history_end (int64): how many
        positive events with an item are known.
    """
    values = _running_values(events, keys, kind=kind, lag=lag, last_hour=last_hour, first_hour=first_hour)
    values = values.join(prior, "T", how="left")
    sums, unit, strength = _LABEL_SUMS[kind], label_unit(kind), SMOOTHING_STRENGTH
    rates = {}
    for window in WINDOWS_HOURS:
        matured = values[f"{sums['labels']}_{window}"]
        total = values[f"{sums['label_units']}_{window}"].cast("float64") / unit
        rates[f"{prefix}_rate_{window}"] = (total + strength * values.prior) / (matured + strength)
    return values.select(
        *keys,
        "T",
        **{f"{prefix}_events_{window}": values[f"events_{window}"] for window in WINDOWS_HOURS},
        **{f"{prefix}_positives_{window}": values[f"positives_{window}"] for window in WINDOWS_HOURS},
        **rates,
        **{f"{prefix}_last_event_timestamp": values.last_event},
        **{f"{prefix}_last_positive_timestamp": values.last_positive},
        history_end=values.history_end,
    )


def history_pages(events: ir.Table) -> ir.Table:
    """Every user's positive items in order, cut into overlapping pages.

    Page p holds the positives of rank [(p-1) x length, (p+1) x length): a run of `HISTORY_LENGTH` that ends in the
    second half of a page lies wholly in it. So a history is stored once and cut out where a row is written, which
    takes two items a positive event; a list a row would take fifty.

    Args:
        events: from `with_labels`.

    Returns:
        user_id, page (int64), items (array<string>, oldest first). One row a user and page.
    """
    positives = events.filter(events.positives == 1, events.user_id.notnull(), events.item_id.notnull())
    in_order = ibis.window(group_by="user_id", order_by=["event_timestamp", "event_id"])
    positives = positives.select("user_id", "item_id", rank=ibis.row_number().over(in_order))
    halves = ibis.memtable({"half": [0, 1]}, schema={"half": "int64"})
    placed = positives.cross_join(halves).mutate(page=lambda t: (t["rank"] // HISTORY_LENGTH).cast("int64") + t.half)
    # Sorting structs, not collect(order_by=...), which Spark lacks.
    items = ibis.struct({"rank": placed["rank"], "item_id": placed.item_id}).collect().sort().map(lambda s: s.item_id)
    return placed.group_by(["user_id", "page"]).agg(items=items)


def with_history(values: ir.Table, pages: ir.Table) -> ir.Table:
    """Add `user_history`: the last `HISTORY_LENGTH` positive items known at T, oldest first, empty when there is none.

    Args:
        values: from `activity` over user_id.
        pages: from `history_pages`.
    """
    end = values.history_end
    values = values.mutate(page=((end - 1) // HISTORY_LENGTH).cast("int64"))
    joined = values.join(pages, ["user_id", "page"], how="left")
    first_rank = ibis.greatest((joined.page - 1) * HISTORY_LENGTH, 0)
    start = ibis.greatest(joined.history_end - HISTORY_LENGTH, 0) - first_rank
    history = joined["items"][start : joined.history_end - first_rank]
    none = ibis.literal([], "array<string>")
    return joined.mutate(user_history=history.fill_null(none)).drop("page", "items")
