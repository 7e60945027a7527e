from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from evergreen.contracts.errors import RequestError
from evergreen.serving.schema import RankingRequest
from evergreen.serving.tensors import Tensor, input_types, instances_of, output_types, outputs_of


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
        ([Tensor("k", "INT64", (2,), [1])], "inputs.k: 1 values in data do not fill the shape [2]"),
        ([Tensor("candidates", "BYTES", (1, -1), ["a"])], "inputs.candidates: 1 values in data do not fill"),
        ([Tensor("candidates", "BYTES", (1, 501), ["a"] * 501)], "inputs.candidates: shape [1, 501]: at most 500"),
        ([Tensor("candidates", "BYTES", (2, 2), [["a"], ["b"]])], "inputs.candidates: the lists in data do not have"),
        ([Tensor("context", "BYTES", (1,), ["{"])], "inputs.context[0]='{': not JSON"),
        ([Tensor("context", "BYTES", (1,), ["[" * 100_000])], "inputs.context[0]='[["),
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


def test_answers_of_different_length_are_padded(parts: Callable[[str], Any]) -> None:
    recommender = parts("impressions").recommender
    answers = [recommender.recommend(RankingRequest(user_id=u, k=k)) for u, k in [("u1", 3), ("nobody yet", 1)]]
    outputs = {o.name: o for o in outputs_of(answers, "probability", has_items=True)}
    first = [item.item_id for item in answers[0].items]
    assert outputs["item_id"].shape == (2, 3)
    assert outputs["item_id"].data == [*first, answers[1].items[0].item_id, "", ""]
    assert outputs["probability"].data[4:] == [0.0, 0.0]
    assert outputs["num_items"].data == [3, 1] and outputs["known_user"].data == [True, False]
    assert "notes" in json.loads(outputs["notes"].data[0])
    declared = {t["name"]: t["datatype"] for t in output_types("probability", has_items=True)}
    assert declared == {name: output.datatype for name, output in outputs.items()}


def test_metadata_leaves_out_what_the_log_does_not_have() -> None:
    names = [t["name"] for t in input_types(has_users=False, has_items=False)]
    assert names == ["context", "event_timestamp", "request_id"]
    assert "item_id" not in [t["name"] for t in output_types("probability", has_items=False)]
