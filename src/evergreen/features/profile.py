"""Profile tables as Ibis expressions: the attributes of users and items as they were last seen in the log."""

from __future__ import annotations

from collections.abc import Mapping

import ibis
import ibis.expr.types as ir


def profile(events: ir.Table, key: str, first_seen: str, sources: Mapping[str, str]) -> ir.Table:
    """A row for each key when it is first seen, and whenever an attribute changes.

    A row's event_timestamp is one microsecond after the event that showed it: an event never sees what it itself
    brought. A null does not overwrite a value that is known: logs leave out what they do not know. Of several events
    of a key at one instant, the last in the log wins.

    Args:
        events: rows of a snapshot; those where the key is null are skipped.
        key: the entity's column.
        first_seen: name of the column for the time of the key's first event.
        sources: attribute's name in the result, and its column in `events`.

    Returns:
        The key, event_timestamp, first_seen, and the attributes.
    """
    in_order = ["event_timestamp", "event_id"]
    seen = events.filter(events[key].notnull()).select(
        key, *in_order, **{name: events[source] for name, source in sources.items()}
    )
    # Nearly all events repeat what is known: drop them first, and the windows below are over few rows.
    rows = _keep_changes(seen, key, in_order, tuple(sources))
    rows = _fill_forward(rows, key, in_order, tuple(sources))
    later = rows.event_timestamp.lead().over(ibis.window(group_by=key, order_by=in_order))
    rows = rows.mutate(later=later).filter(lambda t: (t.later != t.event_timestamp).fill_null(True)).drop("later")
    rows = _keep_changes(rows, key, in_order, tuple(sources))
    first = rows.event_timestamp.min().over(ibis.window(group_by=key))
    return rows.select(
        key,
        *sources,
        event_timestamp=rows.event_timestamp + ibis.interval(microseconds=1),
        **{first_seen: first},
    )


def _keep_changes(rows: ir.Table, key: str, in_order: list[str], attributes: tuple[str, ...]) -> ir.Table:
    """The rows that differ from the key's row before in some attribute, and each key's first."""
    window = ibis.window(group_by=key, order_by=in_order)
    changed = ibis.row_number().over(window) == 0
    for name in attributes:
        changed = changed | ~rows[name].identical_to(rows[name].lag().over(window))
    return rows.mutate(changed=changed).filter(lambda t: t.changed).drop("changed")


def _fill_forward(rows: ir.Table, key: str, in_order: list[str], attributes: tuple[str, ...]) -> ir.Table:
    """Replace each null by the key's last value before it."""
    # Ibis 12 drops IGNORE NULLS from last() over a window on DuckDB. So: rows since the last value form a run, which
    # starts with that value.
    so_far = ibis.cumulative_window(group_by=key, order_by=in_order)
    rows = rows.mutate(**{f"_run_{name}": rows[name].count().over(so_far) for name in attributes})
    filled = {
        name: rows[name].first(include_null=True).over(ibis.window(group_by=[key, f"_run_{name}"], order_by=in_order))
        for name in attributes
    }
    return rows.mutate(**filled).drop(*(f"_run_{name}" for name in attributes))
