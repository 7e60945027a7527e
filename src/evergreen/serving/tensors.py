"""Requests and answers as Open Inference Protocol (V2) tensors.

n requests go into one call; dimension 0 of every input is n (a second dimension of 1 is allowed where there is none).

    input            datatype  shape            meaning
    user_id          BYTES     [n]              left out for a log without users
    candidates       BYTES     [n, m] or [n]    m item ids each ("" pads shorter lists), or each a JSON list of item ids
    k                INT64     [n]              how many items to return
    context          BYTES     [n]              each a JSON object of context features
    event_timestamp  BYTES     [n]              ISO 8601 with an offset
    request_id       BYTES     [n]              left out: each gets a new UUID
    exclude_seen     BOOL      [n]              whether items that the user chose before are left out
    diversity        FP32      [n]              from 0 to 1, how much the order avoids repeating a category; FP64 too
    shown            BOOL      [n]              false: nobody is shown the answer; it is not logged

    output           datatype  shape            meaning
    item_id          BYTES     [n, w]           best first, w the longest answer; "" beyond num_items
    probability      FP32      [n, w]           of the item beside it; 0 beyond num_items. `rating` for a log of ratings
    num_items        INT64     [n]              length of each answer
    known_user       BOOL      [n]              whether the features know the user
    degraded         BOOL      [n]              whether defaults stand for the user's features
    request_id       BYTES     [n]              the request's own, or the new one
    notes            BYTES     [n]              each a JSON object: unknown_items, filtered_items, notes and
                                               event_timestamp

A log without items answers with probability [n, 1] and no item_id. Tensors travel as JSON, flat or nested, or as binary
data: little-endian numbers, one byte for a BOOL, for BYTES the length of each string in four bytes before it. `calls`
says where in a call they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from evergreen.contracts.errors import RequestError
from evergreen.serving.answer import Answer
from evergreen.serving.schema import MAX_CANDIDATES, MAX_INSTANCES
from evergreen.serving.validation import decode_json, describe, refuse_repeated_keys

_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")
INPUT_DATATYPES = {
    "user_id": ("BYTES",),
    "candidates": ("BYTES",),
    "k": _INTEGERS,
    "context": ("BYTES",),
    "event_timestamp": ("BYTES",),
    "request_id": ("BYTES",),
    "exclude_seen": ("BOOL",),
    "diversity": ("FP32", "FP64"),
    "shown": ("BOOL",),
}
"""Datatypes that each input may have, the usual one first."""
_NUMPY = {
    f"{sign}INT{bits}": f"<{kind}{bits // 8}" for sign, kind in (("", "i"), ("U", "u")) for bits in (8, 16, 32, 64)
}
_NUMPY |= {"FP32": "<f4", "FP64": "<f8", "BOOL": "u1"}
_LENGTH = struct.Struct("<I")
_length_at = _LENGTH.unpack_from


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor.

    Attributes:
        name: of the input or output.
        datatype: of the protocol, e.g. BYTES (strings here), INT64, FP32, BOOL.
        shape: dimensions; -1 stands for any in metadata.
        data: values in row-major order, which inputs may nest, or the bytes of an input's binary data.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | NDArray[Any] | bytes


def tensor_field(index: int, field: str) -> str:
    """Where a field of the n-th request is in a V2 body."""
    return f"inputs.{field}[{index}]" if field else f"inputs[{index}]"


def input_types(*, has_users: bool, has_items: bool) -> list[dict[str, Any]]:
    """Metadata of the inputs that a model takes."""
    types = [("user_id", "BYTES", [-1])] if has_users else []
    if has_items:
        types += [("candidates", "BYTES", [-1, -1]), ("k", "INT64", [-1])]
        types += [("exclude_seen", "BOOL", [-1]), ("diversity", "FP32", [-1])]
    types += [("context", "BYTES", [-1]), ("event_timestamp", "BYTES", [-1]), ("request_id", "BYTES", [-1])]
    types += [("shown", "BOOL", [-1])]
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in types]


def output_types(value_name: str, *, has_items: bool) -> list[dict[str, Any]]:
    """Metadata of the outputs that a model gives."""
    types = [("item_id", "BYTES", [-1, -1])] if has_items else []
    types += [(value_name, "FP32", [-1, -1]), ("num_items", "INT64", [-1]), ("known_user", "BOOL", [-1])]
    types += [("degraded", "BOOL", [-1]), ("request_id", "BYTES", [-1]), ("notes", "BYTES", [-1])]
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in types]


def instances_of(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The requests that input tensors hold, in the form of V1 instances; their values are not checked yet.

    Raises:
        RequestError: a tensor is unknown, given twice, of a wrong datatype or shape, or holds text that is not JSON.
    """
    if not tensors:
        raise RequestError(f"inputs: empty: give one tensor at least, of {', '.join(INPUT_DATATYPES)}")
    columns: dict[str, list[Any]] = {}
    for tensor in tensors:
        if tensor.name not in INPUT_DATATYPES:
            raise RequestError(f"inputs: no such input {describe(tensor.name)}; known: {', '.join(INPUT_DATATYPES)}")
        if tensor.name in columns:
            raise RequestError(f"inputs.{tensor.name}: given twice")
        if tensor.datatype not in (allowed := INPUT_DATATYPES[tensor.name]):
            raise RequestError(f"inputs.{tensor.name}: datatype {describe(tensor.datatype)}: must be {allowed[0]}")
        columns[tensor.name] = _rows(tensor)
    lengths = {name: len(rows) for name, rows in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError(f"inputs: the first dimensions differ: {lengths}; every tensor has one entry a request")
    num_instances = next(iter(lengths.values()))
    return [{name: rows[i] for name, rows in columns.items()} for i in range(num_instances)]


def outputs_of(answers: Sequence[Answer], value_name: str, *, has_items: bool) -> list[Tensor]:
    """The output tensors of some answers: arrays of numbers, lists of strings."""
    num_answers = len(answers)
    lengths = [len(answer.item_ids or ()) for answer in answers]
    width = max(lengths, default=0) if has_items else 1
    values = np.zeros((num_answers, width), np.float32)
    ids: list[str] = []
    for answer, row in zip(answers, values, strict=True):
        row[: len(answer.scores)] = answer.scores
        ids += answer.item_ids or ()
        ids += [""] * (width - len(answer.item_ids or ()))
    one_each = (num_answers,)
    return [
        *([Tensor("item_id", "BYTES", values.shape, ids)] if has_items else []),
        Tensor(value_name, "FP32", values.shape, values.ravel()),
        Tensor("num_items", "INT64", one_each, np.array(lengths, np.int64)),
        Tensor("known_user", "BOOL", one_each, np.array([answer.known_user for answer in answers])),
        Tensor("degraded", "BOOL", one_each, np.array([answer.degraded for answer in answers])),
        Tensor("request_id", "BYTES", one_each, [answer.request_id for answer in answers]),
        Tensor("notes", "BYTES", one_each, [_notes(answer) for answer in answers]),
    ]


def to_binary(tensor: Tensor) -> bytes:
    """An output as binary data."""
    if isinstance(tensor.data, np.ndarray):
        return tensor.data.astype(_NUMPY[tensor.datatype], copy=False).tobytes()
    length_of = _LENGTH.pack
    encoded = [str(text).encode() for text in tensor.data]
    return b"".join([part for text in encoded for part in (length_of(len(text)), text)])


def _notes(answer: Answer) -> str:
    notes = {
        "unknown_items": answer.unknown_items,
        "filtered_items": answer.filtered_items,
        "notes": answer.notes,
        "event_timestamp": answer.event_timestamp.isoformat(),
    }
    return orjson.dumps(notes).decode()


def _rows(tensor: Tensor) -> list[Any]:
    """One value a request, shape and JSON checked."""
    name, shape = tensor.name, tensor.shape
    data = _flat(tensor)
    if name == "candidates" and len(shape) == 2:
        lists = [list(data[i * shape[1] : (i + 1) * shape[1]]) for i in range(shape[0])]
        return [_without_padding(ids) for ids in lists]
    if name in ("candidates", "context"):
        return [_json(name, i, value) for i, value in enumerate(data)]
    return data


def _flat(tensor: Tensor) -> list[Any]:
    name, shape = tensor.name, tensor.shape
    wanted = "[n, m] or [n]" if name == "candidates" else "[n]"
    if not (len(shape) == 1 or (len(shape) == 2 and (name == "candidates" or shape[1] == 1))):
        raise RequestError(f"inputs.{name}: shape {describe(list(shape))}: must be {wanted}")
    if not 1 <= shape[0] <= MAX_INSTANCES:
        raise RequestError(
            f"inputs.{name}: shape {describe(list(shape))}: dimension 0 must be 1 to {MAX_INSTANCES} requests"
        )
    if len(shape) == 2 and not 0 <= shape[1] <= MAX_CANDIDATES:
        raise RequestError(
            f"inputs.{name}: shape {describe(list(shape))}: dimension 1 must be at most {MAX_CANDIDATES} candidates"
        )
    if isinstance(tensor.data, bytes):
        return _from_binary(tensor, tensor.data)
    data = list(tensor.data)
    if len(shape) == 2 and data and all(isinstance(row, list) for row in data):
        if len(data) != shape[0] or any(len(row) != shape[1] for row in data):
            raise RequestError(f"inputs.{name}: the lists in data do not have the shape {describe(list(shape))}")
        data = [value for row in data for value in row]
    if len(data) != math.prod(shape):
        raise RequestError(f"inputs.{name}: {len(data)} values in data do not fill the shape {describe(list(shape))}")
    if None in data:
        raise RequestError(f"inputs.{name}: null in data: leave the tensor out, or ask in a call of its own")
    return data


def _from_binary(tensor: Tensor, data: bytes) -> list[Any]:
    """The values of binary data, for a shape that is checked already."""
    num_values = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        return _strings(tensor, data, num_values)
    dtype = np.dtype(_NUMPY[tensor.datatype])
    if len(data) != num_values * dtype.itemsize:
        raise RequestError(
            f"inputs.{tensor.name}: {len(data)} bytes of binary data: datatype {tensor.datatype} and shape "
            f"{describe(list(tensor.shape))} take {describe(num_values * dtype.itemsize)}"
        )
    values = np.frombuffer(data, dtype)
    if tensor.datatype != "BOOL":
        return values.tolist()  # type: ignore[no-any-return]  # of one dimension, it is a list
    if values.max(initial=0) > 1:
        raise RequestError(f"inputs.{tensor.name}: a byte of {values.max()} in binary data: a BOOL is 0 or 1")
    return values.astype(np.bool_).tolist()  # type: ignore[no-any-return]


def _strings(tensor: Tensor, data: bytes, num_values: int) -> list[str]:
    # Of ASCII, lengths included, bytes and characters are at the same places.
    text = data.decode("ascii") if data.isascii() else None
    strings, end = [], 0
    try:
        for _ in range(num_values):
            start = end + _LENGTH.size
            end = start + _length_at(data, end)[0]
            strings.append(data[start:end].decode() if text is None else text[start:end])
    except struct.error:
        raise RequestError(
            f"inputs.{tensor.name}: its binary data ends after {len(strings)} of {num_values} strings"
        ) from None
    except UnicodeDecodeError:
        raise RequestError(f"inputs.{tensor.name}: string {len(strings)} is not UTF-8") from None
    if end != len(data):
        raise RequestError(
            f"inputs.{tensor.name}: {num_values} strings take {end} bytes by their lengths, {len(data)} are given"
        )
    return strings


def _json(name: str, index: int, text: object) -> Any:
    place = tensor_field(index, name)
    if not isinstance(text, str):
        raise RequestError(f"{place}={describe(text)}: must be a string that holds JSON")
    value = decode_json(text, place)
    if isinstance(value, dict) and not any(map(_holds_objects, value.values())):
        refuse_repeated_keys(text, len(value), place)
    return value


def _holds_objects(value: object) -> bool:
    """Whether there are, or may be, objects in a value; none of those may be in a request."""
    return isinstance(value, dict) or (isinstance(value, list) and not all(type(entry) is str for entry in value))


def _without_padding(ids: list[Any]) -> list[Any]:
    while ids and ids[-1] == "":
        ids.pop()
    return ids
