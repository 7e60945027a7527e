"""The click log: what was clicked, to be joined with what was shown.

Parquet or CSV, a row for each click. Columns: request_id, click_timestamp (UTC where it has no offset) and, where there
are any, item_id, rating and dwell_seconds; others are ignored. With a column `clicked`, rows that are not are left out:
the events of a snapshot will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from evergreen.contracts.errors import InputError

CLICK_COLUMNS = ("request_id", "item_id", "click_timestamp", "clicked", "rating", "dwell_seconds")

_BATCH_ROWS = 100_000


def read_clicks(path: str) -> Iterator[pa.Table]:
    """Tables of a click log, at most 100,000 rows at a time.

    Args:
        path: file, folder or fsspec URL; in a folder all files but hidden ones, and those that start with `_`.

    Yields:
        (num_rows) CLICK_COLUMNS as text, null where the log has no such column, and `source` and `line`.

    Raises:
        InputError: nothing is there, a file cannot be read or lacks a column.
    """
    fs, root = url_to_fs(path)
    if not fs.exists(root):
        raise InputError(f"{path}: no such file or folder of clicks")
    files = sorted(f for f in fs.find(root) if f == root or not f.rpartition("/")[2].startswith((".", "_")))
    for file in files:
        name = file.removeprefix(root).lstrip("/") or file.rpartition("/")[2]
        try:
            with fs.open(file, "rb") as stream:
                line = 1
                for batch in _batches(stream, file):
                    columns = {name: _text(batch, name) for name in CLICK_COLUMNS}
                    source = pa.array([name], pa.string()).take(pa.array([0] * batch.num_rows))
                    yield pa.table({**columns, "source": source, "line": row_numbers(line, batch.num_rows)})
                    line += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: cannot be read as clicks: {str(error).splitlines()[0]}") from error


def _batches(stream: Any, file: str) -> Iterator[pa.RecordBatch]:
    if file.endswith(".parquet"):
        parquet = pq.ParquetFile(stream)
        columns = _present(parquet.schema_arrow.names, file)
        yield from parquet.iter_batches(_BATCH_ROWS, columns=columns)
        return
    names = pa_csv.open_csv(stream).schema.names
    stream.seek(0)
    # As text: an id of digits is not a number.
    types = dict.fromkeys(_present(names, file), pa.string())
    yield from pa_csv.open_csv(
        stream,
        convert_options=pa_csv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=True
        ),
    )


def _present(names: Sequence[str], file: str) -> list[str]:
    if missing := [name for name in ("request_id", "click_timestamp") if name not in names]:
        raise InputError(f"{file}: a click log needs a column {missing[0]!r}, this one has {', '.join(names)}")
    return [name for name in CLICK_COLUMNS if name in names]


def _text(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        return pa.nulls(batch.num_rows, pa.string())
    return batch.column(name).cast(pa.string())


def is_true(clicked: pa.ChunkedArray) -> pa.ChunkedArray:
    """(num_rows) whether a row is a click, of the column `clicked`; null, for want of such a column, is true."""
    return pc.is_in(pc.utf8_lower(clicked.fill_null("true")), pa.array(["true", "1"]))


def row_numbers(first: int, count: int) -> pa.Array:
    """(count,) int64 from `first` on."""
    return pa.array(np.arange(first, first + count, dtype=np.int64))
