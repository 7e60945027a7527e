"""The document says what the server takes and answers; tests/integration/test_openapi.py asks schemathesis, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from evergreen.serving.server import serving_in_background
from evergreen.serving.settings import ServeSettings

KINDS = ["impressions", "interactions", "ratings", "no_users", "context_only"]
V2 = "/v2/models/evergreen/infer"


class Described:
    """A server, and the schemas of its own document."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.document = http.get("/openapi.json").json()

    def check(self, value: object, schema: str) -> None:
        rules = {"$ref": f"#/components/schemas/{schema}", "components": self.document["components"]}
        jsonschema_rs.Draft202012Validator(rules).validate(value)


@pytest.fixture(scope="module", params=KINDS)
def described(request: pytest.FixtureRequest, parts: Callable[[str], Any]) -> Any:
    recommender = parts(request.param).other()  # closed with the server

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("model"), feature_store=Path("store"), host="127.0.0.1", port=0)
    with (
        serving_in_background(settings, open_model) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http,
    ):
        yield Described(http)


def test_answers_of_every_kind_of_log_fit_the_document(described: Described) -> None:
    rules = described.document["components"]["schemas"]["PredictRequest"]["properties"]["instances"]["items"]
    instance: dict[str, Any] = {"user_id": "u1"} if "user_id" in rules.get("required", ()) else {}
    for call in ({"instances": [instance]}, {"instances": [instance | {"candidates": ["item-1", "new"], "k": 1}]}):
        described.check(call, "PredictRequest")
        response = described.http.post("/v1/models/evergreen:predict", json=call)
        assert response.status_code == 200, response.text
        described.check(response.json(), "PredictResponse")
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}
        for name, value in {"context": "{}", **instance}.items()
    ]
    described.check({"inputs": inputs}, "InferenceRequest")
    response = described.http.post(V2, json={"inputs": inputs})
    assert response.status_code == 200, response.text
    described.check(response.json(), "InferenceResponse")
    described.check(described.http.get("/v2/models/evergreen").json(), "ModelMetadata")
    described.check(described.http.post(V2, json={}).json(), "Error")


def test_inputs_of_the_metadata_are_those_of_the_document(described: Described) -> None:
    tensors = described.document["components"]["schemas"]["InferenceRequest"]["properties"]["inputs"]["items"]["anyOf"]
    names = [tensor["properties"]["name"]["const"] for tensor in tensors]
    assert names == [tensor["name"] for tensor in described.http.get("/v2/models/evergreen").json()["inputs"]]


@pytest.fixture
def document(parts: Callable[[str], Any]) -> dict[str, Any]:
    recommender = parts("impressions").other()

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("model"), feature_store=Path("store"), host="127.0.0.1", port=0)
    with serving_in_background(settings, open_model) as server:
        found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
        return found


def test_document_names_the_context_features_of_the_log(document: dict[str, Any]) -> None:
    request = document["components"]["schemas"]["PredictRequest"]["properties"]["instances"]["items"]
    assert request["properties"]["context"]["properties"].keys() == {"device", "battery", "coupons"}
    assert request["required"] == ["user_id"] and request["additionalProperties"] is False
    validator = jsonschema_rs.Draft202012Validator(request)
    for good in ({"user_id": "u", "context": {"battery": "-0.5e3"}}, {"user_id": "u", "k": 3, "diversity": 0}):
        assert validator.is_valid(good), good
    for bad in (
        {},
        {"user_id": ""},
        {"user_id": "u", "k": 501},
        {"user_id": "u", "candidates": ["a", "a"]},
        {"user_id": "u", "context": {"battery": "much"}},
        {"user_id": "u", "event_timestamp": "2026-02-30T00:00:00Z"},
        {"user_id": "u", "diversity": 1.5},
    ):
        assert not validator.is_valid(bad), bad


def test_document_leaves_out_what_is_not_offered(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    for word in ("explain", "openai", "/generate", "timeseries"):
        assert word not in text
    assert document["paths"].keys() >= {"/v1/models/{model_name}:predict", "/v2/models/{model_name}/infer", "/metrics"}
