"""The bad calls are the same again, of every kind, and bad where they say so."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from benchmarks.serving.bad_calls import KINDS, Maker, bad_calls
from benchmarks.serving.load import V1_PATH, Reply
from benchmarks.serving.requests import Asked, make_requests, read_v1, read_v2
from evergreen.contracts.errors import RequestError
from evergreen.contracts.training_set import ColumnKind
from evergreen.serving.validation import RequestRules

USERS, ITEMS = [f"u{n}" for n in range(5)], [f"i{n}" for n in range(40)]
AT = datetime(2026, 3, 1, tzinfo=UTC)
RULES = RequestRules({"device": ColumnKind.CATEGORICAL}, frozenset(), has_users=True, has_items=True)


def body_of(call: bytes) -> bytes:
    return call.partition(b"\r\n\r\n")[2]


def test_equal_seeds_give_equal_calls_and_others_others() -> None:
    first, again, other = (list(bad_calls(200, seed=seed, users=USERS, items=ITEMS)) for seed in (3, 3, 4))
    assert first == again
    assert sum(a.data != b.data for a, b in zip(first, other, strict=True)) > 100
    assert {call.kind for call in first} == set(KINDS)


def test_length_is_that_of_the_body_unless_http_itself_is_broken() -> None:
    for call in bad_calls(300, users=USERS, items=ITEMS):
        head, _, body = call.data.partition(b"\r\n\r\n")
        if call.kind != "wrong_http" and b"chunked" not in head:
            assert int(head.split(b"\r\nContent-Length: ")[1].split(b"\r\n")[0]) == len(body), call.kind


def test_every_v1_call_is_refused_by_the_rules_of_requests() -> None:
    """So that 4xx is the right answer, whatever the server makes of it."""
    num_calls = 0
    for call in bad_calls(600, users=USERS, items=ITEMS):
        if call.kind in ("mutated", "wrong_http", "wrong_content_type", "wrong_address", "too_large", "chunked"):
            continue
        if not call.data.startswith(b"POST " + V1_PATH.encode() + b" "):
            continue
        num_calls += 1
        with pytest.raises(RequestError):
            RULES.parse_body(body_of(call.data))
    assert num_calls > 200


def test_what_the_calls_are_made_of_is_good() -> None:
    maker = Maker(0, USERS, ITEMS)
    assert len(RULES.parse_body(orjson.dumps({"instances": [maker.good() for _ in range(50)]}))) == 50


def test_answers_of_every_protocol_read_alike() -> None:
    scores = {"i2": 0.5, "i1": 0.25}
    items = [{"item_id": item, "rank": rank, "probability": p} for rank, (item, p) in enumerate(scores.items(), 1)]
    v1 = Reply(200, orjson.dumps({"predictions": [{"items": items}]}))
    outputs = [
        {"name": "item_id", "datatype": "BYTES", "shape": [1, 3], "data": ["i2", "i1", ""]},
        {"name": "probability", "datatype": "FP32", "shape": [1, 3], "data": [0.5, 0.25, 0.0]},
        {"name": "num_items", "datatype": "INT64", "shape": [1], "data": [2]},
    ]
    v2 = Reply(200, orjson.dumps({"outputs": outputs}))
    blocks = [
        b"\x02\0\0\0i2\x02\0\0\0i1\0\0\0\0",
        b"\0\0\0\x3f\0\0\x80\x3e\0\0\0\0",
        b"\x02\0\0\0\0\0\0\0",
    ]
    binary = [
        {name: value for name, value in output.items() if name != "data"}
        | {"parameters": {"binary_data_size": len(block)}}
        for output, block in zip(outputs, blocks, strict=True)
    ]
    head = orjson.dumps({"outputs": binary})
    headers = b"HTTP/1.1 200 OK\r\ninference-header-content-length: %d" % len(head)
    assert read_v1(v1) == read_v2(v2) == read_v2(Reply(200, head + b"".join(blocks), headers)) == scores


def test_requests_differ_and_are_the_same_again() -> None:
    asked = make_requests(USERS, ITEMS, 10, 50, AT)
    assert asked == make_requests(USERS, ITEMS, 10, 50, AT)
    assert asked != make_requests(USERS, ITEMS, 10, 50, AT, seed=1)
    assert len({request.candidates for request in asked}) == 50
    assert all(len(set(request.candidates or ())) == 10 for request in asked)


def test_request_says_the_same_in_every_protocol() -> None:
    request = Asked("u1", ("i1", "é"), "phone", AT, k=2)
    instance = orjson.loads(body_of(request.v1()))["instances"][0]
    tensors = {tensor["name"]: tensor for tensor in orjson.loads(body_of(request.v2_json()))["inputs"]}
    assert tensors["candidates"]["data"] == instance["candidates"] == ["i1", "é"]
    assert tensors["k"]["data"] == [instance["k"]] == [2]
    assert orjson.loads(tensors["context"]["data"][0]) == instance["context"]
    body = body_of(request.v2_binary())
    assert body.endswith(b"\x02\0\0\0i1\x02\0\0\0\xc3\xa9" + b"\x02" + bytes(7))
