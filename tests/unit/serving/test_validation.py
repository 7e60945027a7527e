from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import RequestError
from evergreen.contracts.training_set import ColumnKind
from evergreen.serving.schema import MAX_CANDIDATES, MAX_INSTANCES, RankingRequest
from evergreen.serving.validation import (
    RequestRules,
    decode_json,
    describe,
    instance_field,
    refuse_repeated_keys,
)

RULES = RequestRules(
    context={"device": ColumnKind.CATEGORICAL, "battery": ColumnKind.NUMERIC, "coupons": ColumnKind.MULTI},
    unused_context=frozenset({"coupons"}),
    has_users=True,
    has_items=True,
)


def parse(body: object) -> list[RankingRequest]:
    return RULES.parse_body(orjson.dumps(body))


def refusal(body: object) -> str:
    with pytest.raises(RequestError) as caught:
        parse(body)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body is a list: send an object"),
        (3, "the body is a number"),
        (None, "the body is null"),
        ({}, "instances: missing"),
        ({"inputs": []}, "instances: missing: send {\"instances\": [...]}, not ['inputs']"),
        ({"instances": {}}, "instances={}: must be a list of objects"),
        ({"instances": []}, "0 instances: must be between 1 and 64"),
        ({"instances": [{"user_id": "u"}] * (MAX_INSTANCES + 1)}, "65 instances: must be between 1 and 64"),
        ({"instances": [{"user_id": "u"}], "k": 3}, "'k': unknown field of the body; known: instances"),
        ({"instances": ["u1"]}, "instances[0]='u1': must be an object"),
    ],
)
def test_body_of_the_wrong_form_is_refused(body: object, message: str) -> None:
    assert refusal(body).startswith(message)


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({}, "instances[1].user_id: missing"),
        ({"user_id": None}, "instances[1].user_id: missing"),
        ({"user_id": 42}, "instances[1].user_id=42: must be a string of 1 to 1000 characters"),
        ({"user_id": ""}, "instances[1].user_id='': must be a string of 1 to 1000 characters"),
        ({"user_id": "a\x00b"}, "instances[1].user_id='a\\x00b': must be a string"),
        ({"user_id": "\ud800"}, "instances[1].user_id='\\ud800': must be a string"),
        ({"user_id": "x" * 1001}, "instances[1].user_id='xxx"),
        ({"user_id": "u", "k": 0}, "instances[1].k=0: must be between 1 and 500"),
        ({"user_id": "u", "k": 501}, "instances[1].k=501: must be between 1 and 500"),
        ({"user_id": "u", "k": True}, "instances[1].k=True: must be between 1 and 500"),
        ({"user_id": "u", "k": 2.5}, "instances[1].k=2.5: must be between 1 and 500"),
        ({"user_id": "u", "k": "3"}, "instances[1].k='3': must be between 1 and 500"),
        ({"user_id": "u", "k": 10**400}, "instances[1].k=1000"),
        (
            {"user_id": "u", "candidates": []},
            "instances[1].candidates: a list of 0: must be a list of 1 to 500 item ids",
        ),
        ({"user_id": "u", "candidates": "i"}, "instances[1].candidates='i': must be a list of 1 to 500 item ids"),
        ({"user_id": "u", "candidates": ["i", 3]}, "instances[1].candidates[1]=3: must be a string"),
        ({"user_id": "u", "candidates": ["i", ""]}, "instances[1].candidates[1]='': must be a string"),
        ({"user_id": "u", "candidates": ["i", "j", "i"]}, "instances[1].candidates[2]='i': given twice"),
        (
            {"user_id": "u", "candidates": [str(n) for n in range(MAX_CANDIDATES + 1)]},
            "instances[1].candidates: a list of 501: must be a list of 1 to 500 item ids",
        ),
        (
            {"user_id": "u", "usr": 1},
            "instances[1].usr: unknown field; known: user_id, candidates, k, context, event_ti",
        ),
        ({"user_id": "u", "candidates": ["i", "x" * 1001]}, "instances[1].candidates[1]='xxx"),
        ({"user_id": "u", "candidates": ["i", "a\x00"]}, "instances[1].candidates[1]='a\\x00': must be a string"),
        ({"user_id": "u", "candidates": ["i", "\ud800"]}, "instances[1].candidates[1]='\\ud800': must be a string"),
        ({"user_id": "u", "candidates": {"i": 1}}, "instances[1].candidates={'i': 1}: must be a list of 1 to 500"),
        ({"user_id": "u", "exclude_seen": 1}, "instances[1].exclude_seen=1: must be true or false"),
        ({"user_id": "u", "diversity": 1.5}, "instances[1].diversity=1.5: must be a number from 0 to 1"),
        ({"user_id": "u", "diversity": True}, "instances[1].diversity=True: must be a number from 0 to 1"),
        ({"user_id": "u", "diversity": "0.5"}, "instances[1].diversity='0.5': must be a number from 0 to 1"),
        ({"user_id": "u", "diversity": float("nan")}, "instances[1].diversity=nan: must be a number from 0 to 1"),
        ({"user_id": "u", "context": []}, "instances[1].context: a list of 0: must be an object of context features"),
        (
            {"user_id": "u", "context": {"colour": 1}},
            "instances[1].context.colour: no such context feature; the model's log",
        ),
        ({"user_id": "u", "context": {"a\nb": 1}}, "instances[1].context.'a\\nb': no such context feature"),
        ({"user_id": "u", "context": {"device": 3}}, "instances[1].context.device=3: must be a string"),
        ({"user_id": "u", "context": {"device": "x" * 1001}}, "instances[1].context.device='xxx"),
        ({"user_id": "u", "context": {"coupons": ["a"] * 1001}}, "instances[1].context.coupons=['a', 'a', 'a', ...]: "),
        ({"user_id": "u", "context": {"device": "\ud800"}}, "instances[1].context.device='\\ud800': must be a string"),
        (
            {"user_id": "u", "context": {"battery": "full"}},
            "instances[1].context.battery='full': must be a finite number",
        ),
        (
            {"user_id": "u", "context": {"battery": "1_0"}},
            "instances[1].context.battery='1_0': must be a finite",
        ),
        ({"user_id": "u", "context": {"battery": "١"}}, "instances[1].context.battery='١': must be a finite number"),
        (
            {"user_id": "u", "context": {"battery": "inf"}},
            "instances[1].context.battery='inf': must be a finite",
        ),
        ({"user_id": "u", "context": {"battery": True}}, "instances[1].context.battery=True: must be a finite number"),
        (
            {"user_id": "u", "context": {"battery": float("nan")}},
            "instances[1].context.battery=nan: must be a finite number",
        ),
        ({"user_id": "u", "context": {"battery": 10**400}}, "instances[1].context.battery=1000"),
        ({"user_id": "u", "context": {"coupons": "a"}}, "instances[1].context.coupons='a': must be a list of at most"),
        ({"user_id": "u", "context": {"coupons": ["a", 1]}}, "instances[1].context.coupons=['a', 1]: must be a list"),
        (
            {"user_id": "u", "event_timestamp": "yesterday"},
            "instances[1].event_timestamp='yesterday': must be an ISO 8601",
        ),
        (
            {"user_id": "u", "event_timestamp": "2026-03-01T00:00:00"},
            "instances[1].event_timestamp='2026-03-01T00:00:00'",
        ),
        ({"user_id": "u", "event_timestamp": 1_700_000_000}, "instances[1].event_timestamp=1700000000: must be an ISO"),
        ({"user_id": "u", "event_timestamp": "0001-01-01T00:00:00+14:00"}, "instances[1].event_timestamp='0001-01-01"),
    ],
)
def test_refusal_names_the_place_the_value_and_the_rule(instance: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        RULES.parse([{"user_id": "fine"}, instance], instance_field)
    assert str(caught.value).startswith(message)


def test_good_request_is_taken_as_it_is() -> None:
    instance = {
        "user_id": "ü 1",
        "candidates": ["a", "b"],
        "k": 2,
        "context": {"device": "phone", "battery": 1, "coupons": ["x"]},
        "event_timestamp": "2026-03-01T02:00:00+02:00",
    }
    [request] = parse({"instances": [instance]})
    assert request.user_id == "ü 1" and request.candidates == ["a", "b"] and request.k == 2
    assert request.context == {"device": "phone", "battery": 1.0, "coupons": ["x"]}
    assert request.event_timestamp is not None and request.event_timestamp.isoformat() == "2026-03-01T00:00:00+00:00"


@pytest.mark.parametrize(("text", "number"), [("0.25", 0.25), ("-3", -3.0), ("+.5", 0.5), ("1e-3", 0.001), ("7.", 7.0)])
def test_number_may_be_written_as_text(text: str, number: float) -> None:
    [request] = parse({"instances": [{"user_id": "u", "context": {"battery": text}}]})
    assert request.context == {"battery": number}


def test_wishes_about_the_answer_are_taken() -> None:
    [request] = parse({"instances": [{"user_id": "u", "exclude_seen": False, "diversity": 1}]})
    assert request.exclude_seen is False and request.diversity == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the text is not valid JSON"),
        (b"{} {}", "the text is not valid JSON"),
        (b"\xef\xbb\xbf{}", "the text is not valid JSON"),
        (b'"\xff"', "the text is not valid JSON"),
        (b"NaN", "the text is not valid JSON"),
        (b"-Infinity", "the text is not valid JSON"),
        (b'"\\ud800"', "the text is not valid JSON"),
        (b"[" * 10**5, "the text is not valid JSON: depth"),
        (b"[" + b"[]," * 150_000 + b"[]]", "the text has more than 150000 lists, objects and keys"),
    ],
)
def test_what_is_no_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_json(text, "the text")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"instances": [{"user_id": "u"}], "instances": [{"user_id": "u"}]}', "instances"),
        (b'{"instances": [{"user_id": "u", "user_id": "v"}]}', "user_id"),
        (b'{"instances": [{"user_id": "u", "\\u0075ser_id" : "v"}]}', "user_id"),
        (b'{"instances": [{"user_id": "u", "context": {"device": "a", "device": "b"}}]}', "device"),
        (b'{"instances": [{"user_id": "::", "candidates": ["a:b"], "k": 1, "k": 2}]}', "k"),
    ],
)
def test_key_that_is_given_twice_is_refused(body: bytes, key: str) -> None:
    with pytest.raises(RequestError, match=f"^the body gives the key '{key}' twice in one object$"):
        RULES.parse_body(body)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", '"', "\\", ":", ""]), st.sampled_from(["x", '":', "1:2", '" ']))),
    st.sampled_from([(",", ":"), (", ", ": "), (",", " :"), (",", "\n:\t")]),
)
def test_key_is_told_from_text_however_it_is_written(pairs: list[tuple[str, str]], separators: tuple[str, str]) -> None:
    between, after = separators
    text = "{" + between.join(f"{json.dumps(key)}{after}{json.dumps(value)}" for key, value in pairs) + "}"
    num_keys = len({key for key, _ in pairs})
    if num_keys == len(pairs):
        refuse_repeated_keys(text, num_keys, "the body")
    else:
        with pytest.raises(RequestError, match="twice in one object"):
            refuse_repeated_keys(text.encode(), num_keys, "the body")


def test_colons_in_text_are_no_keys() -> None:
    instance = {"user_id": "a:b", "candidates": ["::", ":"], "context": {"device": "x:", "coupons": [":"]}}
    [request] = parse({"instances": [instance]})
    assert request.user_id == "a:b" and request.candidates == ["::", ":"]
    assert RULES.parse_body(b'{"instances" :[ {"user_id"\n: ":"} ]}')[0].user_id == ":"


def test_null_is_the_same_as_left_out() -> None:
    fields = dict.fromkeys(["candidates", "k", "event_timestamp"])
    [request] = parse({"instances": [{"user_id": "u", **fields, "context": {"battery": None}}]})
    assert request.candidates is None and RULES.notes(request) == ("context taken as missing: battery, device",)


def test_log_without_users_needs_no_user() -> None:
    rules = RequestRules(context={}, unused_context=frozenset(), has_users=False, has_items=True)
    assert rules.parse_body(b'{"instances": [{}]}')[0].user_id is None


def test_description_of_a_huge_or_deep_value_is_short() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**5)), 10**4000, {str(n): n for n in range(10**4)}):
        assert len(describe(value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
INSTANCE = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from(["u", ""]) | JSON,
        "candidates": st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=3) | JSON,
        "k": st.integers(-1, 502) | JSON,
        "exclude_seen": st.booleans() | JSON,
        "diversity": st.floats() | JSON,
        "context": st.dictionaries(st.sampled_from(["device", "battery", "coupons", "x"]), JSON, max_size=2) | JSON,
        "event_timestamp": st.datetimes().map(str) | JSON,
    },
)


@given(st.fixed_dictionaries({"instances": st.lists(INSTANCE | JSON, max_size=3) | JSON}) | JSON)
def test_any_json_is_either_understood_or_refused_with_a_reason(body: object) -> None:
    try:
        requests = RULES.parse_body(json.dumps(body).encode())
    except RequestError as error:
        assert re.search(r"instances|body", str(error)) and len(str(error)) < 600
    else:
        for request in requests:
            assert request.user_id and len(set(request.candidates or ())) == len(request.candidates or ())
            assert request.context.keys() <= RULES.context.keys() and (request.k or 1) in range(1, 501)
