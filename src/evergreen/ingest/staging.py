"""Keep checked rows on disk until all are read, then hand them out in time order.

A log whose rows are already in order is only copied. Any other is sorted by DuckDB within a fixed amount of memory,
on disk where that does not suffice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evergreen.ingest.blocks import int64_array, int64_values
from evergreen.ingest.schema import ORDINAL, TIME_US

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1 << 15


class Staging:
    """Rows on disk, in the order in which they came.

    Args:
        folder: scratch folder; what is written there is nobody else's.
        schema: columns of the rows; one is TIME_US.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.path = folder / "staged.arrow"
        self.num_rows = 0
        self.num_clicked = 0
        self.in_order = True
        self._last = -(2**63)
        self._schema = schema
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        self._writer = pa.ipc.new_stream(str(self.path), schema, options=options)

    def add(self, rows: pa.Table) -> None:
        """Append rows."""
        if len(rows) == 0:
            return
        times = int64_values(rows[TIME_US].combine_chunks())
        self.in_order = self.in_order and bool(self._last <= times[0] and (times[1:] >= times[:-1]).all())
        self._last = int(times[-1])
        self.num_rows += len(rows)
        self.num_clicked += pc.sum(rows["clicked"]).as_py() or 0
        self._writer.write_table(rows, max_chunksize=_BATCH_ROWS)

    def close(self) -> None:
        """End writing; afterwards rows can be read."""
        self._writer.close()

    def sorted_batches(self, connection: duckdb.DuckDBPyConnection) -> Iterator[pa.RecordBatch]:
        """All rows by time; rows of the same time in the order in which they came."""
        if self.in_order:
            yield from self._batches()
            return
        logger.info("sorting %d rows by time", self.num_rows)
        connection.execute("SET preserve_insertion_order = false")  # ORDER BY says it all; keeping both takes memory
        connection.register("staged", self._numbered())
        names = ", ".join(f'"{name}"' for name in self._schema.names)
        query = f"SELECT {names} FROM staged ORDER BY {TIME_US}, {ORDINAL}"
        yield from connection.sql(query).to_arrow_reader(_BATCH_ROWS)
        connection.unregister("staged")

    def count_distinct(self, connection: duckdb.DuckDBPyConnection, *columns: str) -> tuple[int, ...]:
        """Number of distinct values of each column, NULL not counted."""
        schema = pa.schema([self._schema.field(column) for column in columns])
        batches = (batch.select(list(columns)) for batch in self._batches())
        connection.register("staged", pa.RecordBatchReader.from_batches(schema, batches))
        counts = ", ".join(f'count(DISTINCT "{column}")' for column in columns)
        (row,) = connection.sql(f"SELECT {counts} FROM staged").fetchall()
        connection.unregister("staged")
        return tuple(map(int, row))

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_stream(file) as reader:
            yield from reader

    def _numbered(self) -> pa.RecordBatchReader:
        """The rows with their place as a column: a stream of batches, so that only one is in memory."""
        schema = self._schema.append(pa.field(ORDINAL, pa.int64()))

        def batches() -> Iterator[pa.RecordBatch]:
            start = 0
            for batch in self._batches():
                places = int64_array(np.arange(start, start + len(batch)))
                yield pa.RecordBatch.from_arrays([*batch.columns, places], schema=schema)
                start += len(batch)

        return pa.RecordBatchReader.from_batches(schema, batches())
