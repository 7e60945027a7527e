"""Keep checked rows on disk until all are read, then hand them out in time order, in a bounded amount of memory.

A log whose rows are already in order is only copied. Any other is cut into ranges of time that fit in memory, which are
sorted one after the other. (DuckDB's own sort gives up when rows are wide and memory is short; this does not.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.ingest.blocks import int64_array, int64_values
from evergreen.ingest.schema import TIME_US

logger = logging.getLogger(__name__)

RANGE_BYTES = 128 << 20
"""Rows of a range of time, as Arrow has them in memory; sorting takes about three times as much."""

BATCH_ROWS = 1 << 15
_SAMPLE_EVERY = 256


class Staging:
    """Rows on disk, in the order in which they came.

    Args:
        folder: scratch folder; what is written there is nobody else's.
        schema: columns of the rows; one is TIME_US.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.num_rows = 0
        self.num_clicked = 0
        self.in_order = True
        self._folder = folder
        self._schema = schema
        self._path = folder / "staged.arrow"
        self._num_bytes = 0
        self._last = -(2**63)
        self._sample: list[NDArray[np.int64]] = []
        self._writer = _writer(self._path, schema)

    def add(self, rows: pa.Table) -> None:
        """Append rows."""
        if len(rows) == 0:
            return
        times = int64_values(rows[TIME_US].combine_chunks())
        self.in_order = self.in_order and bool(self._last <= times[0] and (times[1:] >= times[:-1]).all())
        self._last = int(times[-1])
        self._sample.append(times[-self.num_rows % _SAMPLE_EVERY :: _SAMPLE_EVERY].copy())
        self._num_bytes += rows.nbytes
        self.num_rows += len(rows)
        self.num_clicked += pc.sum(rows["clicked"]).as_py() or 0
        self._writer.write_table(rows, max_chunksize=BATCH_ROWS)

    def close(self) -> None:
        """End writing; afterwards rows can be read."""
        self._writer.close()

    def sorted_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows by time; rows of the same time in the order in which they came."""
        if self.in_order:
            yield from _read(self._path)
            return
        logger.info("sorting %d rows by time", self.num_rows)
        num_ranges = -(-self._num_bytes // RANGE_BYTES)
        if num_ranges == 1:
            yield from _sorted(_read(self._path))
            return
        for path, is_one_time in self._distribute(_cuts(np.concatenate(self._sample), num_ranges)):
            yield from _read(path) if is_one_time else _sorted(_read(path))
            path.unlink()

    def count_distinct(self, connection: duckdb.DuckDBPyConnection, column: str) -> int:
        """Number of distinct values of a column, null not counted."""
        schema = pa.schema([self._schema.field(column)])
        batches = (batch.select([column]) for batch in _read(self._path))
        connection.register("staged", pa.RecordBatchReader.from_batches(schema, batches))
        # Groups go to disk when memory is short; count(DISTINCT …) would not.
        distinct = f'SELECT "{column}" FROM staged WHERE "{column}" IS NOT NULL GROUP BY ALL'
        ((count,),) = connection.sql(f"SELECT count(*) FROM ({distinct})").fetchall()
        connection.unregister("staged")
        return int(count)

    def _distribute(self, cuts: NDArray[np.int64]) -> list[tuple[Path, bool]]:
        """Write the rows of each range of time to a file of its own; also say whether all have the same time."""
        paths = [self._folder / f"range-{i}.arrow" for i in range(len(cuts) + 1)]
        first = np.full(len(paths), np.iinfo(np.int64).max)
        last = np.full(len(paths), np.iinfo(np.int64).min)
        with ExitStack() as stack:
            writers = [stack.enter_context(_writer(path, self._schema)) for path in paths]
            for batch in _read(self._path):
                times = int64_values(batch.column(TIME_US))
                ranges = np.searchsorted(cuts, times, side="right")
                np.minimum.at(first, ranges, times)
                np.maximum.at(last, ranges, times)
                grouped = batch.take(int64_array(np.argsort(ranges, kind="stable")))
                counts = np.bincount(ranges, minlength=len(paths))
                for i in np.flatnonzero(counts).tolist():
                    writers[i].write_batch(grouped.slice(int(counts[:i].sum()), int(counts[i])))
        return [(path, bool(first[i] >= last[i])) for i, path in enumerate(paths)]


def _cuts(sample: NDArray[np.int64], num_ranges: int) -> NDArray[np.int64]:
    """Times at which ranges of about the same number of rows begin.

    A time that takes up whole ranges (logs that only know the date) gets one for itself: it needs no sorting, so that
    it need not fit in memory.
    """
    ordered = np.sort(sample)
    quantiles = ordered[np.arange(1, num_ranges) * len(ordered) // num_ranges]
    frequent = quantiles[1:][quantiles[1:] == quantiles[:-1]]
    cuts: NDArray[np.int64] = np.unique(np.concatenate([quantiles, frequent + 1]))
    return cuts


def _sorted(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    rows = pa.Table.from_batches(batches).combine_chunks()
    order = np.argsort(int64_values(rows[TIME_US].combine_chunks()), kind="stable")
    for start in range(0, len(rows), BATCH_ROWS):
        yield from rows.take(int64_array(order[start : start + BATCH_ROWS])).combine_chunks().to_batches()


def _writer(path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    return pa.ipc.new_stream(str(path), schema, options=options)


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader
