from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import RequestError
from evergreen.serving.tensors import Tensor, input_types, instances_of, output_types, outputs_of, to_binary
from tests.serving import make_answer


def test_tensors_hold_the_same_requests_as_instances() -> None:
    tensors = [
        Tensor("user_id", "BYTES", (2,), ["u1", "u2"]),
        Tensor("candidates", "BYTES", (2, 3), ["a", "b", "", "c", "d", "e"]),
        Tensor("k", "INT64", (2, 1), [[1], [2]]),
        Tensor("context", "BYTES", (2,), ['{"device": "phone"}', "{}"]),
        Tensor("event_timestamp", "BYTES", (2,), ["2026-03-01T00:00:00Z"] * 2),
    ]
    at = "2026-03-01T00:00:00Z"
    assert instances_of(tensors) == [
        {"user_id": "u1", "candidates": ["a", "b"], "k": 1, "context": {"device": "phone"}, "event_timestamp": at},
        {"user_id": "u2", "candidates": ["c", "d", "e"], "k": 2, "context": {}, "event_timestamp": at},
    ]


def test_candidates_may_be_nested_or_json() -> None:
    nested = instances_of([Tensor("candidates", "BYTES", (2, 2), [["a", "b"], ["c", "d"]])])
    assert nested == instances_of([Tensor("candidates", "BYTES", (2,), ['["a", "b"]', '["c", "d"]'])])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "inputs: empty"),
        ([Tensor("users", "BYTES", (1,), ["u"])], "inputs: no such input 'users'; known: user_id, candidates, k"),
        ([Tensor("k", "INT64", (1,), [1])] * 2, "inputs.k: given twice"),
        ([Tensor("k", "FP32", (1,), [1.0])], "inputs.k: datatype 'FP32': must be INT64"),
        ([Tensor("user_id", "INT64", (1,), [1])], "inputs.user_id: datatype 'INT64': must be BYTES"),
        ([Tensor("k", "INT64", (), [1])], "inputs.k: shape []: must be [n]"),
        ([Tensor("k", "INT64", (1, 2), [1, 2])], "inputs.k: shape [1, 2]: must be [n]"),
        (
            [Tensor("candidates", "BYTES", (1, 1, 1), ["a"])],
            "inputs.candidates: shape [1, 1, 1]: must be [n, m] or [n]",
        ),
        ([Tensor("k", "INT64", (0,), [])], "inputs.k: shape [0]: dimension 0 must be 1 to 64 requests"),
        ([Tensor("k", "INT64", (-1,), [1])], "inputs.k: shape [-1]: dimension 0 must be 1 to 64 requests"),
        ([Tensor("k", "INT64", (10**30,), [1])], "inputs.k: shape [1000"),
        ([Tensor("k", "INT64", (2,), [1, None])], "inputs.k: null in data: leave the tensor out"),
        ([Tensor("k", "INT64", (2,), [1])], "inputs.k: 1 values in data do not fill the shape [2]"),
        ([Tensor("candidates", "BYTES", (1, -1), ["a"])], "inputs.candidates: shape [1, -1]: dimension 1 must be"),
        (
            [Tensor("candidates", "BYTES", (1, 501), ["a"] * 501)],
            "inputs.candidates: shape [1, 501]: dimension 1 must be at most 500 candidates",
        ),
        ([Tensor("candidates", "BYTES", (2, 2), [["a"], ["b"]])], "inputs.candidates: the lists in data do not have"),
        ([Tensor("context", "BYTES", (1,), ["{"])], "inputs.context[0] is not valid JSON: unexpected end"),
        ([Tensor("context", "BYTES", (1,), ["[" * 100_000])], "inputs.context[0] is not valid JSON: depth"),
        (
            [Tensor("context", "BYTES", (1,), ['{"a": 1, "a": 2}'])],
            "inputs.context[0] gives the key 'a' twice in one object",
        ),
        ([Tensor("context", "BYTES", (1,), [{}])], "inputs.context[0]={}: must be a string that holds JSON"),
        (
            [Tensor("k", "INT64", (1,), [1]), Tensor("user_id", "BYTES", (2,), ["a", "b"])],
            "inputs: the first dimensions differ: {'k': 1, 'user_id': 2}",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        instances_of(tensors)
    assert str(caught.value).startswith(message)


def binary(values: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)


@pytest.mark.parametrize(
    ("datatype", "numpy_type", "values"),
    [(f"INT{bits}", f"<i{bits // 8}", [1, 100]) for bits in (8, 16, 32, 64)]
    + [(f"UINT{bits}", f"<u{bits // 8}", [1, 100]) for bits in (8, 16, 32, 64)],
)
def test_binary_integers_are_those_of_json(datatype: str, numpy_type: str, values: list[int]) -> None:
    tensor = Tensor("k", datatype, (2,), np.array(values, numpy_type).tobytes())
    assert instances_of([tensor]) == instances_of([Tensor("k", datatype, (2,), values)])


@pytest.mark.parametrize(("datatype", "numpy_type"), [("FP32", "<f4"), ("FP64", "<f8")])
def test_binary_floats_are_those_of_json(datatype: str, numpy_type: str) -> None:
    tensor = Tensor("diversity", datatype, (2,), np.array([0.5, 0.25], numpy_type).tobytes())
    assert instances_of([tensor]) == [{"diversity": 0.5}, {"diversity": 0.25}]


def test_binary_booleans_are_those_of_json() -> None:
    assert instances_of([Tensor("exclude_seen", "BOOL", (2,), b"\x01\x00")]) == [
        {"exclude_seen": True},
        {"exclude_seen": False},
    ]


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=4))
def test_binary_strings_are_those_of_json(rows: list[list[str]]) -> None:
    flat = [value for row in rows for value in row]
    data = binary(flat)
    shape = (len(rows), 2)
    found = instances_of([Tensor("candidates", "BYTES", shape, data)])
    assert found == instances_of([Tensor("candidates", "BYTES", shape, flat)])
    assert to_binary(Tensor("item_id", "BYTES", shape, flat)) == data


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            Tensor("k", "INT64", (2,), bytes(8)),
            "inputs.k: 8 bytes of binary data: datatype INT64 and shape [2] take",
        ),
        (Tensor("k", "INT32", (1,), bytes(8)), "inputs.k: 8 bytes of binary data: datatype INT32 and shape [1] take 4"),
        (
            Tensor("exclude_seen", "BOOL", (1,), b"\x02"),
            "inputs.exclude_seen: a byte of 2 in binary data: a BOOL",
        ),
        (Tensor("user_id", "BYTES", (1,), b""), "inputs.user_id: its binary data ends after 0 of 1 strings"),
        (Tensor("user_id", "BYTES", (1,), b"\x01\0\0"), "inputs.user_id: its binary data ends after 0 of 1 strings"),
        (Tensor("user_id", "BYTES", (2,), binary(["a"])), "inputs.user_id: its binary data ends after 1 of 2 strings"),
        (
            Tensor("user_id", "BYTES", (1,), b"\x05\0\0\0abc"),
            "inputs.user_id: 1 strings take 9 bytes by their length",
        ),
        (
            Tensor("user_id", "BYTES", (1,), b"\xff\xff\xff\xffa"),
            "inputs.user_id: 1 strings take 4294967299 bytes",
        ),
        (
            Tensor("user_id", "BYTES", (1,), binary(["a", "b"])),
            "inputs.user_id: 1 strings take 5 bytes by",
        ),
        (Tensor("user_id", "BYTES", (1,), b"\x01\0\0\0\xff"), "inputs.user_id: string 0 is not UTF-8"),
    ],
)
def test_binary_data_that_does_not_fit_is_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        instances_of([tensor])
    assert str(caught.value).startswith(message)


@given(
    st.binary(max_size=40),
    st.integers(1, 4),
    st.sampled_from(["user_id", "candidates", "context", "k", "exclude_seen"]),
)
def test_any_binary_data_is_either_read_or_refused_with_a_reason(data: bytes, num_requests: int, name: str) -> None:
    tensor = Tensor(name, {"k": "INT64", "exclude_seen": "BOOL"}.get(name, "BYTES"), (num_requests,), data)
    try:
        assert len(instances_of([tensor])) == num_requests
    except RequestError as error:
        assert str(error).startswith(f"inputs.{name}")


def test_answers_of_different_length_are_padded() -> None:
    answers = [make_answer("a", "b", "c", request_id="r1"), make_answer("d", request_id="r2", degraded=True)]
    outputs = {o.name: o for o in outputs_of(answers, "probability", has_items=True)}
    assert outputs["item_id"].shape == (2, 3) and outputs["item_id"].data == ["a", "b", "c", "d", "", ""]
    assert np.asarray(outputs["probability"].data).tolist() == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert np.asarray(outputs["num_items"].data).tolist() == [3, 1]
    assert np.asarray(outputs["degraded"].data).tolist() == [False, True]
    assert outputs["request_id"].data == ["r1", "r2"]
    assert json.loads(outputs["notes"].data[0]) == {
        "unknown_items": [],
        "filtered_items": {},
        "notes": [],
        "event_timestamp": "2026-03-09T12:00:00+00:00",
    }
    declared = {t["name"]: t["datatype"] for t in output_types("probability", has_items=True)}
    assert declared == {name: output.datatype for name, output in outputs.items()}
    assert to_binary(outputs["probability"]) == struct.pack("<6f", 0.5, 0.5, 0.5, 0.5, 0, 0)
    assert to_binary(outputs["num_items"]) == struct.pack("<2q", 3, 1)
    assert to_binary(outputs["degraded"]) == b"\0\1"


def test_metadata_leaves_out_what_the_log_does_not_have() -> None:
    names = [t["name"] for t in input_types(has_users=False, has_items=False)]
    assert names == ["context", "event_timestamp", "request_id", "shown"]
    assert "item_id" not in [t["name"] for t in output_types("probability", has_items=False)]
