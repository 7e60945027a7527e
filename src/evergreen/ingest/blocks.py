"""What the readers hand on: some rows of one file, as Arrow columns, and those that could not be read at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def int64_array(values: NDArray[np.int64]) -> pa.Array:
    """The same integers as an Arrow array, without a copy. (`pa.array(values)` imports pandas, half a second.)"""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def int64_values(array: pa.Array) -> NDArray[np.int64]:
    """The integers of an Arrow array without nulls, without a copy. (`array.to_numpy()` imports pandas.)"""
    values: NDArray[np.int64] = np.from_dlpack(array).view(np.int64)
    return values


@dataclass(frozen=True)
class Reject:
    """A row that broke the schema."""

    line: int
    """Line of the file that the row starts on, from 1; of a Parquet file the row number, from 1."""
    reason: str
    row: str


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file.

    `table` has the columns that the mapping uses, under the log's names, each of one of the types string, int64,
    double, bool, timestamp[us] (naive), timestamp[us, UTC] or list<string>.
    """

    table: pa.Table
    lines: NDArray[np.int64]
    """(num_rows,) the line each row starts on."""
    ordinals: NDArray[np.int64]
    """(num_rows,) each row's place among all rows of the file, unreadable ones included, from 0."""
    row_text: Callable[[int], str]
    """The log's own text of the i-th row of `table`."""
    rejects: list[Reject] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        """Rows of the log in this block, unreadable ones included."""
        return len(self.lines) + len(self.rejects)
