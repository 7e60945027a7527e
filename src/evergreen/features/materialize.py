"""Incremental materialization: of each view, write the keys whose latest row is not what was written last.

What was written is recorded beside the store, as a digest for each key:

    materialized/
      {view}.parquet          the join keys, event_timestamp and digest of what the online store holds
      {view}.pending.parquet  of what a run changes; it stays when the run is killed

A run compares the tables with the record, not with the clock. So it picks up rows that arrive behind the last end, and
rows that a later event corrected, and withdraws rows that the tables no longer have (a bot's, once it is found out).
The record is trusted only while the online store holds its marker, the digest of the record's file: a store that was
emptied or restored from an older copy has another, and gets every row again.

A run that is killed leaves the pending record. Any of its keys may be changed or not, so the next run writes all of
them again, and comes to the state that an undisturbed run comes to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from evergreen.contracts.artifact import sha256_file
from evergreen.features.point_in_time import EVENT_TIMESTAMP, connection, latest_rows, quoted

_DIGEST = "digest"

logger = logging.getLogger(__name__)


class ViewWriter(Protocol):
    """Where the rows of one view go."""

    def marker(self) -> str | None:
        """What `set_marker` left; None when the rows are gone."""

    def set_marker(self, marker: str) -> None:
        """Leave a marker beside the rows."""

    def write(self, rows: pa.Table) -> int:
        """Write rows; returns how many the store refused, since it holds newer ones."""

    def withdraw(self, rows: pa.Table) -> int:
        """Remove rows by key and event_timestamp, where the store still holds them; returns how many."""


@dataclass(frozen=True)
class MaterializedView:
    """What a run did to one view.

    Attributes:
        rows: keys that have a row at the run's time.
        written: of these, how many differed from what was written last.
        late: of those, how many the store refused, since a stream has written newer ones.
        withdrawn: keys whose row was removed, since the tables no longer have it. They hold an older one again if there
            is one.
    """

    rows: int
    written: int
    late: int
    withdrawn: int


@dataclass(frozen=True)
class Changes:
    """The latest rows against the record.

    Attributes:
        rows: (num_changed) the latest rows of the keys that changed.
        withdrawn: keys and event_timestamp of recorded rows that are later than any row of their key now.
        touched: keys, event_timestamp and digest of both; a withdrawn row has no digest.
        record: keys, event_timestamp and digest of all latest rows, sorted by key.
    """

    rows: pa.Table
    withdrawn: pa.Table
    touched: pa.Table
    record: pa.Table


def materialize_view(
    table: Path,
    keys: Sequence[str],
    features: Sequence[str],
    *,
    as_of: datetime,
    records: Path,
    writer: ViewWriter,
    full: bool,
) -> MaterializedView:
    """Bring the online rows of one view to what was known at a time (rows up to and including it).

    Args:
        table: the view's feature table; records are named after it.
        keys: its join keys.
        features: the columns to write.
        as_of: the time.
        records: the folder of the records.
        writer: the online store.
        full: write every row, whatever the record says: for a store that lost some rows and kept its marker.
    """
    latest = latest_rows(str(table), keys=keys, columns=[*keys, EVENT_TIMESTAMP, *features], end=as_of)
    records.mkdir(exist_ok=True)
    written, pending = records / f"{table.stem}.parquet", records / f"{table.stem}.pending.parquet"
    marker = writer.marker()
    trusted = not full and written.is_file() and sha256_file(written) == marker
    if written.is_file() and not trusted:
        logger.info("%s: writing every row: %s", table.stem, _why_full(marker, full=full))
    before = _read(pending)
    changes = find_changes(latest, keys, written=_read(written), pending=before, trusted=trusted)
    # What an earlier run may have changed stays pending until a run comes to its end.
    _write(changes.touched if before is None else pa.concat_tables([before, changes.touched]), pending)
    withdrawn = writer.withdraw(changes.withdrawn)
    late = writer.write(changes.rows)
    _write(changes.record, written)
    writer.set_marker(sha256_file(written))  # killed before this, a run leaves an old marker: the next one is full
    pending.unlink()
    return MaterializedView(latest.num_rows, changes.rows.num_rows, late, withdrawn)


def find_changes(
    latest: pa.Table, keys: Sequence[str], *, written: pa.Table | None, pending: pa.Table | None, trusted: bool
) -> Changes:
    """Compare the latest rows with what is recorded.

    Args:
        latest: (num_rows) one row a key: the keys, event_timestamp, and the features.
        keys: names of the key columns.
        written: what the online store holds, or None.
        pending: what a killed run may have written, or None.
        trusted: whether the store holds what `written` says. Otherwise every row counts as changed.
    """
    fields = [*(latest.schema.field(name) for name in (*keys, EVENT_TIMESTAMP)), pa.field(_DIGEST, pa.uint64())]
    nothing = pa.schema(fields).empty_table()
    key = ", ".join(quoted(name) for name in keys)
    # The names are part of the digest: a feature that is new must reach keys whose values are equal otherwise.
    columns = ", ".join(quoted(name) for name in latest.column_names)
    names = "'" + columns.replace("'", "''") + "'"
    with connection() as db:
        for name, table in {"latest": latest, "written": written, "pending": pending}.items():
            db.register(name, nothing if table is None else table)
        record = db.sql(
            f"SELECT {key}, {EVENT_TIMESTAMP}, hash({names}, {columns}) AS {_DIGEST} FROM latest ORDER BY {key}"
        ).to_arrow_table()
        db.register("record", record)
        known = f"FROM written ANTI JOIN pending USING ({key}) WHERE {str(trusted).lower()}"
        changed = f"FROM record ANTI JOIN ({known}) USING ({key}, {_DIGEST})"
        rows = latest
        if trusted:  # otherwise it is all of them
            rows = db.sql(f"FROM latest SEMI JOIN ({changed}) USING ({key}) ORDER BY {key}").to_arrow_table()
        withdrawn = f"""
            SELECT DISTINCT {key}, r.{EVENT_TIMESTAMP} FROM (FROM written UNION ALL FROM pending) r
            LEFT JOIN record n USING ({key})
            WHERE n.{EVENT_TIMESTAMP} IS NULL OR n.{EVENT_TIMESTAMP} < r.{EVENT_TIMESTAMP}
        """
        return Changes(
            rows=rows.cast(latest.schema),
            withdrawn=db.sql(f"{withdrawn} ORDER BY ALL").to_arrow_table(),
            touched=db.sql(f"{changed} UNION ALL SELECT *, NULL FROM ({withdrawn})").to_arrow_table(),
            record=record,
        )


def _why_full(marker: str | None, *, full: bool) -> str:
    if full:
        return "asked for"
    return "the online store was emptied" if marker is None else "the online store holds another run's rows"


def _read(record: Path) -> pa.Table | None:
    return pq.read_table(record) if record.is_file() else None


def _write(record: pa.Table, path: Path) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(record, partial, compression="zstd")
    partial.replace(path)
