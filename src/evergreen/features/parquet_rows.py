"""Rows of a Parquet table by where they lie: a query finds them by narrow columns, and the wide ones are read after it.

Reading a wide row through a join moves its values several times; taking it by number, once. Row groups without a
wanted row are not read at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

_SLICE_ROWS = 131_072  # rows of the result at a time: the text of a chunk must stay below 2 GiB
_MAX_ARRAY_BYTES = 2**31 - 1  # what 32-bit offsets reach


class ParquetRows:
    """A Parquet file, or a folder of them, as one table whose rows are numbered through all files."""

    FILES = "read_parquet($files, hive_partitioning = false)"
    """The table in DuckDB's SQL; `file_index` and `file_row_number` say where a row lies. $files is a parameter."""

    def __init__(self, path: str) -> None:
        dataset = ds.dataset(path, format="parquet")
        self.schema: pa.Schema = dataset.schema
        """Columns of the table, in the types of its first file. The date in a folder's name is no column."""
        self.files: list[str] = dataset.files
        self._groups = [fragment.split_by_row_group() for fragment in dataset.get_fragments()]
        sizes = [[group.row_groups[0].num_rows for group in groups] for groups in self._groups]
        self._file_starts = np.cumsum([0, *map(sum, sizes)])

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return int(self._file_starts[-1])

    def numbers(self, file_index: NDArray[np.integer], file_row_number: NDArray[np.integer]) -> NDArray[np.int64]:
        """(num_rows,) numbers of rows, given the file of each and its number within."""
        numbers: NDArray[np.int64] = self._file_starts[file_index] + file_row_number
        return numbers

    def take(self, numbers: NDArray[np.int64], columns: Mapping[str, str]) -> pa.Table:
        """Read rows.

        Args:
            numbers: (n,) of the rows, in any order and any number of times; below 0: a row of nulls.
            columns: column of the result → column of the table.

        Returns:
            (n) rows in the order of the numbers, in the types of the table.
        """
        wanted = np.zeros(self.num_rows, bool)
        wanted[numbers[numbers >= 0]] = True
        schema = pa.schema([self.schema.field(name) for name in dict.fromkeys(columns.values())])
        distinct = self._read(wanted, schema)
        place = np.cumsum(wanted, dtype=np.int32 if self.num_rows < 2**31 else np.int64) - 1
        index = pa.array(place[numbers] if self.num_rows else np.zeros(len(numbers), np.int64), mask=numbers < 0)
        taken = {name: _take(distinct[name], index) for name in schema.names}
        fields = [pa.field(new, schema.field(old).type) for new, old in columns.items()]
        return pa.table([taken[old] for old in columns.values()], schema=pa.schema(fields))

    def _read(self, wanted: NDArray[np.bool_], schema: pa.Schema) -> pa.Table:
        """The wanted rows in their order; one row group at a time, so that no more than it is held beside them."""
        tables = [schema.empty_table()]
        for file_start, groups in zip(self._file_starts, self._groups, strict=False):
            start = file_start
            for group in groups:
                end = start + group.row_groups[0].num_rows
                if (mask := wanted[start:end]).any():
                    rows = group.to_table(columns=schema.names, schema=schema)
                    tables.append(rows if mask.all() else rows.filter(pa.array(mask)))
                start = end
        return pa.concat_tables(tables)


def _take(column: pa.ChunkedArray, index: pa.Array) -> pa.ChunkedArray:
    dtype = column.type
    if column.nbytes > _MAX_ARRAY_BYTES:  # as one array it needs wider offsets
        column = column.cast(_large(dtype))
    values = pa.concat_arrays(column.chunks)
    slices = [values.take(index.slice(start, _SLICE_ROWS)) for start in range(0, len(index), _SLICE_ROWS)]
    return pa.chunked_array([taken.cast(dtype) for taken in slices], dtype)


def _large(dtype: pa.DataType) -> pa.DataType:
    """The same type with 64-bit offsets."""
    if pa.types.is_list(dtype):
        return pa.large_list(_large(dtype.value_type))
    return {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(dtype, dtype)
