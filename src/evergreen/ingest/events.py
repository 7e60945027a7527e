"""Write rows that come in time order as `events/date=YYYY-MM-DD/part-00000.parquet`, always with the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.snapshot import TIMESTAMP_TYPE, SnapshotFile
from evergreen.ingest.blocks import int64_array, int64_values
from evergreen.ingest.schema import TIME_US

ROW_GROUP_ROWS = 1 << 17
_DAY_US = 86_400_000_000


def write_events(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path) -> list[SnapshotFile]:
    """Write the event files of a snapshot.

    Args:
        batches: rows by time, with TIME_US in place of `event_id` and `event_timestamp`; how they are cut into batches
            has no influence on the files.
        schema: the snapshot's.
        folder: the snapshot's.

    Returns:
        The files, oldest first.
    """
    files: list[SnapshotFile] = []
    writer: pq.ParquetWriter | None = None
    current, event_id, rows = -1, 0, 0

    def finish() -> None:
        if writer is not None:
            writer.close()
            path = _path(current)
            files.append(SnapshotFile(path=path, rows=rows, sha256=sha256_file(folder / path)))

    for day, group in _row_groups(batches):
        if day != current:
            finish()
            current, rows = day, 0
            path = folder / _path(day)
            path.parent.mkdir(parents=True)
            writer = pq.ParquetWriter(path, schema, compression="zstd")
        assert writer is not None
        writer.write_table(_events(group, event_id, schema), row_group_size=ROW_GROUP_ROWS)
        event_id += len(group)
        rows += len(group)
    finish()
    return files


def _path(day: int) -> str:
    date = datetime.fromtimestamp(day * 86_400, tz=UTC).date()
    return f"events/date={date.isoformat()}/part-00000.parquet"


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Pairs of (days since 1970, rows): ROW_GROUP_ROWS of them, fewer only at the end of a day."""
    pending: list[pa.RecordBatch] = []
    num_pending, current = 0, -1
    for day, piece in _days(batches):
        if pending and day != current:
            yield current, pa.Table.from_batches(pending)
            pending, num_pending = [], 0
        current = day
        while num_pending + len(piece) >= ROW_GROUP_ROWS:
            room = ROW_GROUP_ROWS - num_pending
            yield current, pa.Table.from_batches([*pending, piece.slice(0, room)])
            pending, num_pending, piece = [], 0, piece.slice(room)
        if len(piece):
            pending.append(piece)
            num_pending += len(piece)
    if pending:
        yield current, pa.Table.from_batches(pending)


def _days(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches cut where a new day begins."""
    for batch in batches:
        if len(batch) == 0:
            continue
        days = int64_values(batch.column(TIME_US)) // _DAY_US
        cuts = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(batch)]
        for start, end in pairwise(cuts):
            yield int(days[start]), batch.slice(start, end - start)


def _events(rows: pa.Table, first_id: int, schema: pa.Schema) -> pa.Table:
    times = rows[TIME_US].combine_chunks().cast(TIMESTAMP_TYPE)
    ids = int64_array(np.arange(first_id, first_id + len(rows)))
    others = [rows[name].combine_chunks().cast(schema.field(name).type) for name in schema.names[2:]]
    return pa.table([ids, times, *others], schema=schema)
