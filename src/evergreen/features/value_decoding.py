"""Feast's online values from bytes: what `value_encoding` writes, and what Feast itself writes for the same types.

A server decodes some hundred values a request; a protobuf object for each would be most of its time. Every value here
is a `Value` with one field, so its first byte tells the type, and the rest is the number or the text.

Source: the protobuf wire format and Feast's `types/Value.proto`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError

Cell = bytes | None
"""A serialized `Value` as a store gives it: None where it holds nothing, empty for null."""

Row = Sequence[Any]
"""A row of a view as a store holds it: its event time, as the store writes that, and a cell for each feature."""

# First bytes: field number of Value.proto, shifted by three, and the wire type.
_STRING, _INT32, _INT64, _DOUBLE, _FLOAT, _TIME, _STRING_LIST = 0x12, 0x18, 0x20, 0x29, 0x35, 0x40, 0x62
_LIST_ITEM = 0x0A
_SECONDS, _NANOS = 0x08, 0x10  # of google.protobuf.Timestamp
_NO_TIME = -(2**63)  # Feast's null among timestamps
_NULL_DOUBLE = bytes([_DOUBLE]) + struct.pack("<d", float("nan"))
_DOUBLE_CELL = np.dtype([("tag", "u1"), ("number", "<f8")])
_REMEMBERED = 20_000  # values; counts and categories are few, and most of what is asked for
_LONGEST_REMEMBERED = 64  # bytes
_BROKEN = (ValueError, IndexError, struct.error)


class _Remembered(dict[Cell, Any]):
    """A decoder that keeps what it has decoded: looking a value up costs a tenth of decoding it."""

    def __init__(self, decode: Callable[[bytes], Any], *, null: Any = None) -> None:
        super().__init__({None: null, b"": null})
        self._decode = decode

    def __missing__(self, cell: bytes) -> Any:
        value = self._decode(cell)
        if len(self) < _REMEMBERED and len(cell) <= _LONGEST_REMEMBERED:
            self[cell] = value
        return value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at a place, as a signed 64-bit one, and the place after it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            number &= 2**64 - 1
            return (number - 2**64 if number >= 2**63 else number), place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def _integer(cell: bytes, *tags: int) -> int:
    if cell[0] not in tags:
        raise ValueError(f"a value of another type, tag {cell[0]:#x}")
    number, end = _varint(cell, 1)
    if end != len(cell):
        raise ValueError("bytes after the number")
    return number


def _text(cell: bytes) -> str:
    if cell[0] != _STRING:
        raise ValueError(f"a value of another type, tag {cell[0]:#x}")
    size, start = _varint(cell, 1)
    if size != len(cell) - start:
        raise ValueError(f"a text of {size} bytes in {len(cell) - start}")
    return cell[start:].decode()


def _texts(cell: Cell) -> list[str] | None:
    if not cell:
        return None
    if cell[0] != _STRING_LIST:
        raise ValueError(f"a value of another type, tag {cell[0]:#x}")
    size, place = _varint(cell, 1)
    end = len(cell)
    if size != end - place:
        raise ValueError(f"a list of {size} bytes in {end - place}")
    texts = []
    while place < end:
        if cell[place] != _LIST_ITEM:
            raise ValueError(f"a list of another type, tag {cell[place]:#x}")
        size, place = cell[place + 1], place + 2
        if size >= 0x80:
            size, place = _varint(cell, place - 1)
        if not 0 <= size <= end - place:
            raise ValueError("a list that is cut off")
        texts.append(cell[place : place + size].decode())
        place += size
    return texts


def _double(cell: Cell) -> float | None:
    if not cell:
        return None
    number: float
    if cell[0] == _DOUBLE and len(cell) == 9:
        (number,) = struct.unpack_from("<d", cell, 1)
    elif cell[0] == _FLOAT and len(cell) == 5:
        (number,) = struct.unpack_from("<f", cell, 1)
    else:
        number = float(_integer(cell, _INT64, _INT32))
    return number


def _time(cell: Cell) -> int | None:
    if not cell:
        return None
    seconds = _integer(cell, _TIME)
    return None if seconds == _NO_TIME else seconds


_integers = _Remembered(lambda cell: _integer(cell, _INT64, _INT32))
_whole_floats = _Remembered(lambda cell: float(_integer(cell, _INT64, _INT32)), null=np.nan)
_strings = _Remembered(_text)


def value_decoder(dtype: pa.DataType, name: str) -> Callable[[Cell], Any]:
    """A function that decodes one value of a column.

    Args:
        dtype: string, int64, float64, timestamp or list of strings.
        name: of the column, for errors.

    Returns:
        From a serialized `Value` to str, int, float, whole Unix seconds, list of str, or None for null. It raises a
        ValueError, IndexError or struct.error for bytes of another type, or of none.

    Raises:
        ArtifactError: the column has another type.
    """
    if pa.types.is_timestamp(dtype):
        return _time
    if pa.types.is_int64(dtype):
        return _integers.__getitem__
    if pa.types.is_float64(dtype):
        return _double
    if pa.types.is_string(dtype):
        return _strings.__getitem__
    if pa.types.is_list(dtype) and pa.types.is_string(dtype.value_type):
        return _texts
    raise ArtifactError(
        f"feature {name!r} is {dtype}: an online store holds string, int64, double, timestamp and list<string>"
    )


class RowDecoder:
    """Decodes rows of a view. A row is what a store holds: its event time, then a cell for each feature."""

    def __init__(self, view: str, schema: pa.Schema) -> None:
        """Prepare.

        Args:
            view: its name, for errors.
            schema: of its features, in the order of the cells.

        Raises:
            ArtifactError: a feature's type is none that an online store holds.
        """
        self._view = view
        self.schema = schema
        self._names = tuple(schema.names)
        self._decoders = [value_decoder(field.type, field.name) for field in schema]
        # Neighbours of one type are decoded at once.
        kinds = itertools.groupby(range(len(schema)), key=lambda place: pa.types.is_int64(schema.field(place).type))
        self._runs = [(whole, slice(run[0], run[-1] + 1)) for whole, run in ((w, list(r)) for w, r in kinds)]

    def values(self, row: Row) -> list[Any]:
        """Values of one row.

        Raises:
            ArtifactError: a value cannot be decoded; names view and feature.
        """
        try:
            return [decode(cell) for decode, cell in zip(self._decoders, row[1:], strict=True)]
        except _BROKEN as error:
            raise self._broken([row]) from error

    def numbers(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """Values of rows of int64 and float64 features: (num_rows, num_features), nan for null.

        Raises:
            ArtifactError: a value cannot be decoded, or a feature is no number; names view and feature.
        """
        matrix = np.empty((len(rows), len(self._names)))
        try:
            for whole, run in self._runs:
                first, end = run.start + 1, run.stop + 1
                cells = [cell for row in rows for cell in row[first:end]]
                numbers = _integer_numbers(cells) if whole else _double_numbers(cells)
                matrix[:, run] = numbers.reshape(len(rows), end - first)
        except _BROKEN as error:
            raise self._broken(rows) from error
        return matrix

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Rows as a table with the schema's types.

        Raises:
            ArtifactError: a value cannot be decoded; names view and feature.
        """
        columns = list(zip(*rows, strict=True))[1:] if rows else [()] * len(self._names)
        try:
            parts = zip(columns, self.schema, self._decoders, strict=True)
            arrays = [_column(cells, field, decode) for cells, field, decode in parts]
        except _BROKEN as error:
            raise self._broken(rows) from error
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _broken(self, rows: Sequence[Row]) -> ArtifactError:
        """Which of the values it is."""
        for row in rows:
            for name, decode, cell in zip(self._names, self._decoders, row[1:], strict=True):
                try:
                    decode(cell)
                except _BROKEN as error:
                    return ArtifactError(
                        f"view {self._view!r}, feature {name!r}: the online store holds {cell!r}, which is no "
                        f"{self.schema.field(name).type} ({error}): materialize the store again"
                    )
        return ArtifactError(f"view {self._view!r}: a feature among {self._names} is no number")


def decode_instant(cell: bytes) -> float:
    """Unix seconds of a serialized `google.protobuf.Timestamp`.

    Raises:
        ValueError: the bytes are none.
    """
    seconds = nanos = place = 0
    try:
        while place < len(cell):
            tag = cell[place]
            number, place = _varint(cell, place + 1)
            if tag == _SECONDS:
                seconds = number
            elif tag == _NANOS:
                nanos = number
            else:
                raise ValueError
    except _BROKEN:
        raise ValueError(f"{cell!r} is no serialized Timestamp") from None
    return seconds + nanos / 1e9


def _integer_numbers(cells: Sequence[Cell]) -> NDArray[np.float64]:
    return np.fromiter(map(_whole_floats.__getitem__, cells), np.float64, len(cells))


def _double_numbers(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """Doubles, all at once where each is eight bytes after its tag."""
    packed = b"".join([cell or _NULL_DOUBLE for cell in cells])
    width = _DOUBLE_CELL.itemsize
    if len(packed) == len(cells) * width and packed[::width] == _NULL_DOUBLE[:1] * len(cells):
        numbers: NDArray[np.float64] = np.frombuffer(packed, dtype=_DOUBLE_CELL)["number"]
        return numbers
    return np.array([_double(cell) for cell in cells], dtype=np.float64)


def _column(cells: Sequence[Cell], field: pa.Field, decode: Callable[[Cell], Any]) -> pa.Array:
    if pa.types.is_float64(field.type):
        return pa.array(_double_numbers(cells), mask=np.array([not cell for cell in cells], dtype=np.bool_))
    values = [*map(decode, cells)]
    if pa.types.is_timestamp(field.type):
        return pa.array(values, pa.int64()).cast(pa.timestamp("s")).cast(field.type)
    return pa.array(values, field.type)
