"""Read Parquet in a stream of blocks: only the columns that the mapping uses, in the few types that `Block` allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.errors import InputError
from evergreen.ingest.blocks import Block

BLOCK_ROWS = 1 << 16


def read_names(file: BinaryIO, name: str) -> tuple[str, ...]:
    """Names of the top-level columns.

    Raises:
        InputError: not a Parquet file, or one that was cut short.
    """
    with _readable(name):
        return tuple(pq.ParquetFile(file).schema_arrow.names)


def read_parquet(file: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[Block]:
    """Read a file in blocks of at most BLOCK_ROWS rows; the row number stands for the line.

    Args:
        file: with cheap seeks.
        name: what to call the file in errors.
        columns: those to read.

    Raises:
        InputError: the file is damaged, or a column is of a type that no feature can have (a struct, a map …).
    """
    with _readable(name):
        # Without a buffer size Arrow loads whole column chunks, and a row group may hold a whole log.
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        ordinal = 0
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=list(columns), use_threads=False):
            raw = pa.Table.from_batches([batch])
            table = pa.table({column: canonical(raw[column], column, name) for column in columns})
            ordinals = np.arange(ordinal, ordinal + len(table), dtype=np.int64)
            yield Block(table, ordinals + 1, ordinals, row_text=_RowText(table))
            ordinal += len(table)


class _RowText:
    """A row as JSON: Parquet has no text of its own."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __call__(self, index: int) -> str:
        row = self._table.slice(index, 1).to_pylist()[0]
        return json.dumps(row, ensure_ascii=False, default=str)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{name}: cannot be read as Parquet (damaged or cut short?): {first_line}") from error


def canonical(column: pa.ChunkedArray, column_name: str, name: str) -> pa.ChunkedArray:
    """Turn a column into one of the types that `Block` allows, without losing a digit.

    Raises:
        InputError: there is no such type for it.
    """
    type_ = column.type
    if pa.types.is_dictionary(type_):
        return canonical(column.cast(type_.value_type), column_name, name)
    if pa.types.is_boolean(type_):
        return column
    if pa.types.is_integer(type_):
        return column.cast(pa.string() if type_ == pa.uint64() else pa.int64())
    if pa.types.is_floating(type_):
        return column.cast(pa.float64())
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return _trimmed(column.cast(pa.string()))
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_):
        return _binary(column, column_name, name)
    if pa.types.is_decimal(type_) or pa.types.is_null(type_) or pa.types.is_time(type_):
        return column.cast(pa.string())
    if pa.types.is_date(type_):
        return column.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(type_):
        return column.cast(pa.timestamp("us", tz="UTC" if type_.tz else None), safe=False)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        value = type_.value_type
        if not pa.types.is_nested(value) and not pa.types.is_binary(value):
            return column.cast(pa.list_(pa.string()))
    raise InputError(
        f"{name}: column {column_name!r} is of type {type_}: no part of the event schema can be made of that"
    )


def _trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim(column, characters=" \t")


def _binary(column: pa.ChunkedArray, column_name: str, name: str) -> pa.ChunkedArray:
    """Old writers (Impala, Hive) store text as bytes."""
    try:
        return _trimmed(column.cast(pa.string()))
    except pa.ArrowInvalid as error:
        raise InputError(f"{name}: column {column_name!r} holds bytes that are not UTF-8 text") from error
