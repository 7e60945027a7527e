"""Requests and answers as Open Inference Protocol (V2) tensors.

n requests go into one call; dimension 0 of every input is n (a second dimension of 1 is allowed where there is none).

    input            datatype  shape            meaning
    user_id          BYTES     [n]              left out for a log without users
    candidates       BYTES     [n, m] or [n]    m item ids each ("" pads shorter lists), or each a JSON list of item ids
    k                INT64     [n]              how many items to return
    context          BYTES     [n]              each a JSON object of context features
    event_timestamp  BYTES     [n]              ISO 8601 with an offset
    request_id       BYTES     [n]              left out: each gets a new UUID

    output           datatype  shape            meaning
    item_id          BYTES     [n, w]           best first, w the longest answer; "" beyond num_items
    probability      FP32      [n, w]           of the item beside it; 0 beyond num_items. `rating` for a log of ratings
    num_items        INT64     [n]              length of each answer
    known_user       BOOL      [n]              whether the features know the user
    notes            BYTES     [n]              each a JSON object: request_id, unknown_items, notes, event_timestamp

A log without items answers with probability [n, 1] and no item_id. Tensors travel as JSON, flat or nested; the binary
tensor extension is not offered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evergreen.contracts.errors import RequestError
from evergreen.serving.schema import MAX_CANDIDATES, MAX_INSTANCES, Recommendation
from evergreen.serving.validation import describe

_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")
_DATATYPES = {
    "user_id": ("BYTES",),
    "candidates": ("BYTES",),
    "k": _INTEGERS,
    "context": ("BYTES",),
    "event_timestamp": ("BYTES",),
    "request_id": ("BYTES",),
}


@dataclass(frozen=True)
class Tensor:
    """A named tensor.

    Attributes:
        name: of the input or output.
        datatype: of the protocol, e.g. BYTES (strings here), INT64, FP32, BOOL.
        shape: dimensions; -1 stands for any in metadata.
        data: values in row-major order; inputs may nest them.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Sequence[Any]


def tensor_field(index: int, field: str) -> str:
    """Where a field of the n-th request is in a V2 body."""
    return f"inputs.{field}[{index}]" if field else f"inputs[{index}]"


def input_types(*, has_users: bool, has_items: bool) -> list[dict[str, Any]]:
    """Metadata of the inputs that a model takes."""
    types = [("user_id", "BYTES", [-1])] if has_users else []
    if has_items:
        types += [("candidates", "BYTES", [-1, -1]), ("k", "INT64", [-1])]
    types += [("context", "BYTES", [-1]), ("event_timestamp", "BYTES", [-1]), ("request_id", "BYTES", [-1])]
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in types]


def output_types(value_name: str, *, has_items: bool) -> list[dict[str, Any]]:
    """Metadata of the outputs that a model gives."""
    types = [("item_id", "BYTES", [-1, -1])] if has_items else []
    types += [(value_name, "FP32", [-1, -1]), ("num_items", "INT64", [-1]), ("known_user", "BOOL", [-1])]
    types.append(("notes", "BYTES", [-1]))
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in types]


def instances_of(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The requests that input tensors hold, in the form of V1 instances; their values are not checked yet.

    Raises:
        RequestError: a tensor is unknown, given twice, of a wrong datatype or shape, or holds text that is not JSON.
    """
    if not tensors:
        raise RequestError(f"inputs: empty: give one tensor at least, of {', '.join(_DATATYPES)}")
    columns: dict[str, list[Any]] = {}
    for tensor in tensors:
        if tensor.name not in _DATATYPES:
            raise RequestError(f"inputs: no such input {describe(tensor.name)}; known: {', '.join(_DATATYPES)}")
        if tensor.name in columns:
            raise RequestError(f"inputs.{tensor.name}: given twice")
        if tensor.datatype not in (allowed := _DATATYPES[tensor.name]):
            raise RequestError(f"inputs.{tensor.name}: datatype {describe(tensor.datatype)}: must be {allowed[0]}")
        columns[tensor.name] = _rows(tensor)
    lengths = {name: len(rows) for name, rows in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError(f"inputs: the first dimensions differ: {lengths}; every tensor has one entry a request")
    num_instances = next(iter(lengths.values()))
    return [{name: rows[i] for name, rows in columns.items()} for i in range(num_instances)]


def outputs_of(answers: Sequence[Recommendation], value_name: str, *, has_items: bool) -> list[Tensor]:
    """The output tensors of some answers."""
    num_answers = len(answers)
    width = max((len(answer.items) for answer in answers), default=0) if has_items else 1
    outputs, values = [], []
    if has_items:
        ids = []
        for answer in answers:
            ids += _padded([item.item_id for item in answer.items], width, "")
            values += _padded([getattr(item, value_name) for item in answer.items], width, 0.0)
        outputs.append(Tensor("item_id", "BYTES", (num_answers, width), ids))
    else:
        values = [getattr(answer, value_name) for answer in answers]
    told = {"request_id", "unknown_items", "notes", "event_timestamp"}
    notes = [answer.model_dump_json(include=told) for answer in answers]
    return [
        *outputs,
        Tensor(value_name, "FP32", (num_answers, width), values),
        Tensor("num_items", "INT64", (num_answers,), [len(answer.items) for answer in answers]),
        Tensor("known_user", "BOOL", (num_answers,), [answer.known_user for answer in answers]),
        Tensor("notes", "BYTES", (num_answers,), notes),
    ]


def _rows(tensor: Tensor) -> list[Any]:
    """One value a request, shape and JSON checked."""
    name, shape = tensor.name, tensor.shape
    data = _flat(tensor)
    if name == "candidates" and len(shape) == 2:
        if shape[1] > MAX_CANDIDATES:
            raise RequestError(f"inputs.candidates: shape {list(shape)}: at most {MAX_CANDIDATES} candidates a request")
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
    data = list(tensor.data)
    if len(shape) == 2 and data and all(isinstance(row, list) for row in data):
        if len(data) != shape[0] or any(len(row) != shape[1] for row in data):
            raise RequestError(f"inputs.{name}: the lists in data do not have the shape {describe(list(shape))}")
        data = [value for row in data for value in row]
    if len(data) != math.prod(shape):
        raise RequestError(f"inputs.{name}: {len(data)} values in data do not fill the shape {describe(list(shape))}")
    return data


def _json(name: str, index: int, value: object) -> Any:
    if not isinstance(value, str):
        raise RequestError(f"{tensor_field(index, name)}={describe(value)}: must be a string that holds JSON")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{tensor_field(index, name)}={describe(value)}: not JSON: {error}") from error


def _without_padding(ids: list[Any]) -> list[Any]:
    while ids and ids[-1] == "":
        ids.pop()
    return ids


def _padded(values: list[Any], width: int, filler: object) -> list[Any]:
    return values + [filler] * (width - len(values))
