"""Feast's online values as bytes, encoded a column at a time.

Feast makes a protobuf object for every value and serializes it; that is most of what materialization costs. Here a
column becomes one binary array by Arrow's and NumPy's kernels. The bytes are Feast's own to the last bit.

Source: the protobuf wire format, Feast's `types/Value.proto`, and `serialize_entity_key` version 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError

_STRING_TYPE = 2  # Feast's ValueType.STRING, in entity keys
# Tags of the wire format: field number of Value.proto, shifted by three, and the wire type.
_STRING, _INT64, _DOUBLE, _TIME, _STRING_LIST = b"\x12", b"\x20", b"\x29", b"\x40", b"\x62"
_LIST_ITEM = b"\x0a"
_SECONDS, _NANOS = b"\x08", b"\x10"  # of google.protobuf.Timestamp
_NO_TIME = np.iinfo(np.int64).min  # Feast's null among timestamps; other nulls are an empty Value
_MICROS = 1_000_000


def encode_values(column: pa.Array, name: str) -> pa.BinaryArray:
    """Serialized Feast `Value`s of a column.

    Args:
        column: (num_rows) string, int64, float64, timestamp or list of strings. Like Feast, a NaN counts as null, a
            timestamp is cut to whole seconds, and a null inside a list is an empty string.
        name: of the column, for errors.

    Returns:
        (num_rows) binary without nulls.

    Raises:
        ArtifactError: the column has another type.
    """
    dtype = column.type
    if pa.types.is_timestamp(dtype):
        seconds = pc.fill_null(pa.array(instants(column) // _MICROS, mask=_mask(column)), _NO_TIME)
        return _varints(seconds.to_numpy(), _TIME)
    if pa.types.is_int64(dtype):
        return _or_empty(_varints(pc.fill_null(column, 0).to_numpy(), _INT64), column)
    if pa.types.is_float64(dtype):
        numbers = column.to_numpy(zero_copy_only=False)
        return _or_empty(_fixed(_DOUBLE, numbers), pa.array(numbers, from_pandas=True))
    if pa.types.is_string(dtype):
        return _or_empty(_with_length(_STRING, pc.fill_null(column, "").cast(pa.binary())), column)
    if pa.types.is_list(dtype) and pa.types.is_string(dtype.value_type):
        return _or_empty(_with_length(_STRING_LIST, _string_lists(column)), column)
    raise ArtifactError(
        f"feature {name!r} is {dtype}: an online store takes string, int64, double, timestamp and list<string>"
    )


def value_texts(column: pa.Array) -> list[str | None]:
    """What Feast's SQLite store keeps in value_text: strings and numbers as text, None for all else."""
    dtype = column.type
    if pa.types.is_string(dtype) or pa.types.is_int64(dtype):
        texts: list[str | None] = column.cast(pa.string()).to_pylist()
        return texts
    if pa.types.is_float64(dtype):
        return [None if number != number else str(number) for number in column.to_numpy(zero_copy_only=False).tolist()]
    return [None] * len(column)


def encode_entity_keys(table: pa.Table | pa.RecordBatch, join_keys: Sequence[str]) -> pa.BinaryArray:
    """Serialized Feast entity keys (version 3) of rows.

    Args:
        table: (num_rows) with the join keys as strings.
        join_keys: names of the key columns, in any order: Feast sorts them.

    Raises:
        ArtifactError: a key is null or no string.
    """
    names = sorted(join_keys)
    head = len(names).to_bytes(4, "little")
    for name in names:
        head += _STRING_TYPE.to_bytes(4, "little") + len(name.encode()).to_bytes(4, "little") + name.encode()
    parts: list[pa.Array | pa.Scalar] = [pa.scalar(head, pa.binary())]
    for name in names:
        column = _flat(table[name])
        if not pa.types.is_string(column.type) or column.null_count:
            raise ArtifactError(f"key {name!r} is {column.type} with {column.null_count} nulls: it must be a string")
        sizes = np.empty((len(column), 2), dtype="<u4")
        sizes[:, 0] = _STRING_TYPE
        sizes[:, 1] = pc.binary_length(column).to_numpy()
        parts += [_rows(sizes.view(np.uint8).reshape(len(column), 8)), column.cast(pa.binary())]
    return _concatenated(*parts)


def encode_instants(micros: NDArray[np.int64]) -> pa.BinaryArray:
    """Serialized `google.protobuf.Timestamp`s of microseconds since 1970."""
    seconds, fraction = np.divmod(micros, _MICROS)
    parts = []
    for tag, numbers in ((_SECONDS, seconds), (_NANOS, fraction * 1000)):
        parts.append(pc.if_else(pa.array(numbers != 0), _varints(numbers, tag), pa.scalar(b"", pa.binary())))
    return _concatenated(*parts)


def instants(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Microseconds since 1970, 0 where null; a timestamp without a zone is UTC."""
    micros = _flat(column).cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    numbers: NDArray[np.int64] = pc.fill_null(micros, 0).to_numpy()
    return numbers


def as_list(values: pa.BinaryArray) -> list[bytes]:
    """Python's bytes of an array; several times faster than `to_pylist`."""
    items: list[bytes] = values.to_numpy(zero_copy_only=False).tolist()
    return items


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _mask(column: pa.Array) -> NDArray[np.bool_]:
    missing: NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return missing


def _or_empty(encoded: pa.BinaryArray, column: pa.Array) -> pa.BinaryArray:
    """The empty `Value` where the column is null."""
    return encoded if column.null_count == 0 else pc.if_else(column.is_valid(), encoded, pa.scalar(b"", pa.binary()))


def _concatenated(*parts: pa.Array | pa.Scalar) -> pa.BinaryArray:
    return _flat(pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.binary())))


def _with_length(tag: bytes, payload: pa.BinaryArray) -> pa.BinaryArray:
    return _concatenated(_varints(pc.binary_length(payload).to_numpy().astype(np.int64), tag), payload)


def _string_lists(column: pa.ListArray) -> pa.BinaryArray:
    """The serialized inside of `StringList`: the items of a row lie one after the other already."""
    items = _with_length(_LIST_ITEM, pc.fill_null(column.flatten(), "").cast(pa.binary()))
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
    item_offsets = np.concatenate([[0], np.cumsum(pc.binary_length(items).to_numpy())])
    offsets = item_offsets[np.concatenate([[0], ends])]
    return _binary(offsets, items.buffers()[2])


def _fixed(tag: bytes, numbers: NDArray[np.float64]) -> pa.BinaryArray:
    cells = np.empty((len(numbers), 9), dtype=np.uint8)
    cells[:, 0] = ord(tag)
    cells[:, 1:] = numbers.astype("<f8").view(np.uint8).reshape(len(numbers), 8)
    return _rows(cells)


def _rows(cells: NDArray[np.uint8]) -> pa.BinaryArray:
    """(num_rows, width) bytes as binary, all of one length."""
    return _binary(np.arange(len(cells) + 1) * cells.shape[1], pa.py_buffer(np.ascontiguousarray(cells)))


def _varints(numbers: NDArray[np.int64], tag: bytes) -> pa.BinaryArray:
    """A tag and a varint: seven bits a byte, lowest first, the top bit set on all but the last."""
    rest = numbers.astype(np.uint64)  # a negative number is its two's complement, ten bytes long
    groups = [rest]
    while (rest := rest >> np.uint64(7)).any():
        groups.append(rest)
    stacked = np.stack(groups, axis=1)
    more = np.zeros(stacked.shape, dtype=np.bool_)
    more[:, :-1] = stacked[:, 1:] != 0
    cells = np.empty((len(numbers), len(groups) + 1), dtype=np.uint8)
    cells[:, 0] = ord(tag)
    cells[:, 1:] = (stacked & np.uint64(0x7F)).astype(np.uint8) | (more.astype(np.uint8) << 7)
    used = np.ones(cells.shape, dtype=np.bool_)
    used[:, 2:] = more[:, :-1]
    return _binary(np.concatenate([[0], np.cumsum(used.sum(axis=1))]), pa.py_buffer(cells[used]))


def _binary(offsets: NDArray[np.int64], data: pa.Buffer) -> pa.BinaryArray:
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), data]
    return pa.BinaryArray.from_buffers(pa.binary(), len(offsets) - 1, buffers)
