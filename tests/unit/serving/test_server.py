"""The real HTTP server on loopback, with a stand-in model behind it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.bad_calls import KINDS, bad_calls
from benchmarks.serving.bad_requests import fire
from evergreen.contracts.errors import EvergreenError, RequestError
from evergreen.serving.client import RecommenderClient
from evergreen.serving.schema import Recommendation
from evergreen.serving.server import Background, listen_on, serving_in_background
from evergreen.serving.settings import MAX_BODY_BYTES, ServeSettings

V1, V2 = "/v1/models/evergreen:predict", "/v2/models/evergreen/infer"
JSON = {"content-type": "application/json"}
BINARY = {"content-type": "application/octet-stream"}


@dataclass(frozen=True)
class Served:
    url: str
    http: httpx.Client
    server: Background
    parts: Any

    def v1(self, **instance: Any) -> httpx.Response:
        return self.http.post(V1, json={"instances": [instance]})


@pytest.fixture(scope="module")
def served(parts: Callable[[str], Any]) -> Iterator[Served]:
    serving = parts("impressions")
    recommender = serving.other()  # closed with the server

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("model"), feature_store=Path("store"), host="127.0.0.1", port=0)
    with (
        serving_in_background(settings, open_model) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http,
    ):
        yield Served(server.url, http, server, serving)


def test_loaded_model_is_ready(served: Served) -> None:
    assert served.http.get("/v2/health/ready").json() == {"ready": True}
    assert served.http.get("/v1/models/evergreen").json() == {"name": "evergreen", "ready": True}
    assert served.http.get("/v2/models/evergreen/ready").json() == {"name": "evergreen", "ready": True}


def test_v1_answers_every_instance_in_order(served: Served) -> None:
    response = served.http.post(V1, json={"instances": [{"user_id": "u1", "k": 2}, {"user_id": "u2", "k": 3}]})
    assert response.status_code == 200
    first, second = response.json()["predictions"]
    assert (first["user_id"], len(first["items"]), second["user_id"], len(second["items"])) == ("u1", 2, "u2", 3)
    assert first["items"][0].keys() == {"item_id", "rank", "probability"}
    assert first["degraded"] is False and first["request_id"] != second["request_id"]


def test_v2_answers_as_v1_does(served: Served) -> None:
    inputs = [{"name": "user_id", "datatype": "BYTES", "shape": [2], "data": ["u1", "u2"]}]
    body = served.http.post(V2, json={"id": "42", "inputs": inputs}).json()
    outputs = {output["name"]: output for output in body["outputs"]}
    predictions = served.http.post(V1, json={"instances": [{"user_id": "u1"}, {"user_id": "u2"}]}).json()["predictions"]
    assert body["id"] == "42" and body["model_version"] == served.parts.package.version
    assert body["parameters"] == {"model_version": served.parts.package.version}
    assert outputs["item_id"]["data"] == [item["item_id"] for p in predictions for item in p["items"]]
    expected = [item["probability"] for p in predictions for item in p["items"]]
    assert outputs["probability"]["data"] == pytest.approx(expected, abs=1e-6)
    assert outputs["probability"]["shape"] == [2, 10] and outputs["probability"]["datatype"] == "FP32"
    assert outputs["degraded"]["data"] == [False, False] and len(set(outputs["request_id"]["data"])) == 2


def test_v2_gives_only_the_outputs_asked_for(served: Served) -> None:
    inputs = [{"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]
    body = served.http.post(V2, json={"inputs": inputs, "outputs": [{"name": "item_id"}]}).json()
    assert [output["name"] for output in body["outputs"]] == ["item_id"]
    refused = served.http.post(V2, json={"inputs": inputs, "outputs": [{"name": "logits"}]})
    assert refused.status_code == 400 and "no such output 'logits'" in refused.json()["error"]


def test_metadata_describes_the_tensors(served: Served) -> None:
    metadata = served.http.get("/v2/models/evergreen").json()
    assert metadata["versions"] == [served.parts.package.version] and metadata["platform"] == "evergreen"
    assert {"name": "candidates", "datatype": "BYTES", "shape": [-1, -1]} in metadata["inputs"]
    assert {"name": "probability", "datatype": "FP32", "shape": [-1, -1]} in metadata["outputs"]
    assert "binary_tensor_data" in served.http.get("/v2").json()["extensions"]


def test_unknown_model_is_404(served: Served) -> None:
    for response in (
        served.http.post("/v1/models/other:predict", json={"instances": [{"user_id": "u1"}]}),
        served.http.post("/v2/models/other/infer", json={"inputs": []}),
        served.http.get("/v2/models/other"),
    ):
        assert response.status_code == 404 and "other" in response.json()["error"]


def test_model_cannot_be_unloaded_by_a_caller(served: Served) -> None:
    for action in ("load", "unload"):
        assert served.http.post(f"/v2/repository/models/evergreen/{action}").status_code == 403
    assert served.http.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"{", JSON, "the body is not valid JSON: unexpected end of data"),
        (b"", JSON, "the body is not valid JSON"),
        (b"\xff\xfe", JSON, "the body is not valid JSON"),
        (b"[" * 100_000, JSON, "the body is not valid JSON"),
        (b"[" * 500 + b"]" * 500, JSON, "the body is a list: send an object"),
        (b'{"instances": [{"user_id": NaN}]}', JSON, "the body is not valid JSON"),
        (b'{"instances": [{"user_id": -Infinity}]}', JSON, "the body is not valid JSON"),
        (b'{"instances": [{"user_id": "\\ud800"}]}', JSON, "the body is not valid JSON"),
        (b'{"instances": [{"user_id": "u", "user_id": "v"}]}', JSON, "the body gives the key 'user_id' twice"),
        (b"[]", JSON, "the body is a list"),
        (
            b'{"instances": [{"user_id": "u"}], "signature_name": 1}',
            JSON,
            "'signature_name': unknown field of the body",
        ),
        (b'{"instances": [{"user_id": "u", "k": 0}]}', JSON, "instances[0].k=0: must be between 1 and 500"),
        (b'{"instances": [{"user_id": "u", "k": 1' + b"0" * 5000 + b"}]}", JSON, "the body is not valid JSON"),
        (b'{"instances": [{"user_id": "u", "k": 1' + b"0" * 50 + b"}]}", JSON, "instances[0].k=1e+50: must be between"),
        (b"user_id=u1", {"content-type": "application/x-www-form-urlencoded"}, "the body is not valid JSON"),
        (b'{"instances": [{"user_id": "u"}]}', {"content-type": "text/plain"}, "Content-Type 'text/plain': send JSON"),
        (
            b'{"instances": [{"user_id": "u"}]}',
            BINARY | {"inference-header-content-length": "3"},
            "Content-Type 'application/octet-stream': send JSON",
        ),
        (
            b"x",
            JSON | {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "t", "ce-source": "s"},
            "the body is not valid JSON",
        ),
    ],
)
def test_v1_mistake_is_400_with_the_reason(served: Served, body: bytes, headers: dict[str, str], message: str) -> None:
    response = served.http.post(V1, content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]


def tensor(**changes: Any) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u1"]} | changes]}
    ).encode()


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"{", JSON, "the body is not valid JSON"),
        (b"", JSON, "the body is not valid JSON"),
        (b"\xff\xfe", JSON, "the body is not valid JSON"),
        (b"[" * 100_000, JSON, "the body is not valid JSON"),
        (b"[]", JSON, "the body: []: must be an object with inputs"),
        (b'"text"', JSON, "the body: 'text': must be an object with inputs"),
        (b"{}", JSON, "inputs: missing"),
        (b'{"inputs": []}', JSON, "inputs: empty"),
        (b'{"inputs": {}}', JSON, "inputs={}: must be a list of tensors"),
        (b'{"inputs": [{}]}', JSON, "inputs[0].name: missing"),
        (b'{"inputs": [3]}', JSON, "inputs[0]: 3: must be an object with name, datatype, shape"),
        (b'{"inputs": [], "parameters": {"\\ud800": []}}', JSON, "the body is not valid JSON"),
        (b'{"inputs": [], "parameters": {"a": []}}', JSON, "parameters.a=[]: must be a string, a number or a boolean"),
        (b'{"inputs": [], "model": 1}', JSON, "the body: unknown field 'model'; known: inputs, id"),
        (tensor()[:-1] + b', "id": "1", "id": "2"}', JSON, "the body gives the key 'id' twice"),
        (b'{"inputs": [' + b"0," * 9 + b"0]}", JSON, "inputs: 10 tensors: there are 9, and each is given once"),
        (
            b'{"inputs": [], "outputs": [{"name": "item_id"}, {"name": "item_id"}]}',
            JSON,
            "'item_id' is asked for twice",
        ),
        (tensor(shape="x"), JSON, "inputs[0].shape='x': must be a list of integers"),
        (tensor(shape=[1.5]), JSON, "inputs[0].shape=[1.5]: must be a list of at most 8 integers"),
        (tensor(shape=[True]), JSON, "inputs[0].shape=[True]: must be a list of at most 8 integers"),
        (tensor(shape=[2]), JSON, "inputs.user_id: 1 values in data do not fill the shape [2]"),
        (tensor(shape=[10**18]), JSON, "inputs.user_id: shape [1000"),
        (tensor(datatype="FP16"), JSON, "inputs.user_id: datatype 'FP16': must be BYTES"),
        (tensor(name="users"), JSON, "inputs: no such input 'users'"),
        (tensor(data="u1"), JSON, "inputs[0].data='u1': must be a list"),
        (tensor()[:-1] + b', "id": "a\\nb"}', JSON, "id='a\\nb': must be printable text"),
        (tensor()[:-1] + b', "id": 3}', JSON, "id=3: must be a string"),
        (tensor(data=[None]), JSON, "inputs.user_id: null in data"),
        (tensor(data=[float("nan")]), JSON, "the body is not valid JSON"),
        (tensor(data=[10**4200]), JSON, "the body is not valid JSON"),
        (tensor(name="k", datatype="INT64", data=[1]), JSON, "inputs.user_id[0]: missing"),
        (tensor(), BINARY, "send JSON with Content-Type: application/json; binary data needs the header"),
        (
            tensor()[:-1] + b', "parameters": {"binary_data_output": 1}}',
            JSON,
            "parameters.binary_data_output=1: must be true or false",
        ),
    ],
)
def test_v2_mistake_is_400_with_the_reason(served: Served, body: bytes, headers: dict[str, str], message: str) -> None:
    response = served.http.post(V2, content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]


def binary(header: dict[str, Any], data: bytes = b"", **headers: str) -> dict[str, Any]:
    text = json.dumps(header).encode()
    return {"content": text + data, "headers": BINARY | {"inference-header-content-length": str(len(text))} | headers}


def raw(name: str, datatype: str, shape: list[int], size: object) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


USER = b"\x02\0\0\0u1"


def test_binary_and_json_tensors_go_together(served: Served) -> None:
    inputs = [
        raw("user_id", "BYTES", [1], len(USER)),
        {"name": "k", "datatype": "INT64", "shape": [1], "data": [2]},
        raw("diversity", "FP32", [1], 4),
    ]
    outputs = [{"name": "item_id"}, {"name": "probability", "parameters": {"binary_data": True}}]
    response = served.http.post(V2, **binary({"inputs": inputs, "outputs": outputs}, USER + struct.pack("<f", 0.5)))
    assert response.status_code == 200 and response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["inference-header-content-length"])
    by_name = {output["name"]: output for output in json.loads(response.content[:length])["outputs"]}
    expected = served.parts.ask(user_id="u1", k=2, diversity=0.5)
    assert by_name["item_id"]["data"] == expected.item_ids
    assert by_name["probability"]["parameters"] == {"binary_data_size": 8}
    assert struct.unpack("<2f", response.content[length:]) == pytest.approx(expected.scores.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, USER, **{"inference-header-content-length": "x"}),
            "'x'",
        ),
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, USER, **{"inference-header-content-length": "-1"}),
            "inference-header-content-length='-1': must be the length of the JSON",
        ),
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, USER, **{"inference-header-content-length": "9999"}),
            "inference-header-content-length='9999': must be the length of the JSON, at most that of the body",
        ),
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, USER, **{"inference-header-content-length": "5"}),
            "the body is not valid JSON",
        ),
        (binary({"inputs": [raw("user_id", "BYTES", [1], 7)]}, USER), "at most 6, the bytes that are left"),
        (binary({"inputs": [raw("user_id", "BYTES", [1], -1)]}, USER), "binary_data_size=-1: must be an integer"),
        (binary({"inputs": [raw("user_id", "BYTES", [1], True)]}, USER), "binary_data_size=True: must be an integer"),
        (binary({"inputs": [raw("user_id", "BYTES", [1], 5)]}, USER), "6 bytes follow the JSON, 5 are those of"),
        (binary({"inputs": [raw("user_id", "BYTES", [1], 6) | {"data": ["u"]}]}, USER), "has data and binary_data_siz"),
        (binary({"inputs": [raw("user_id", "BYTES", [2], 6)]}, USER), "its binary data ends after 1 of 2 strings"),
        (binary({"inputs": [raw("user_id", "FP16", [1], 6)]}, USER), "datatype 'FP16': must be BYTES"),
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, b"\x02\0\0\0\xff\xff"),
            "inputs.user_id: string 0 is not UTF-8",
        ),
        (
            binary({"inputs": [raw("user_id", "BYTES", [1], 6)]}, b"\x02\0\0\0\0a"),
            "inputs.user_id[0]='\\x00a': must be a string of 1 to 1000 characters without zero bytes",
        ),
    ],
)
def test_broken_binary_data_is_400_with_the_reason(served: Served, call: dict[str, Any], message: str) -> None:
    response = served.http.post(V2, **call)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]


def test_version_in_the_path_has_to_be_the_one_that_is_served(served: Served) -> None:
    version = served.parts.package.version
    of = "/v2/models/evergreen/versions"
    assert served.http.post(f"{of}/{version}/infer", content=tensor(), headers=JSON).status_code == 200
    assert served.http.get(f"{of}/{version}/ready").json() == {"name": "evergreen", "ready": True}
    assert served.http.get(f"{of}/{version}").json() == served.http.get("/v2/models/evergreen").json()
    for response in (
        served.http.post(f"{of}/7/infer", content=tensor(), headers=JSON),
        served.http.get(f"{of}/7/ready"),
        served.http.get(f"{of}/7"),
    ):
        assert response.status_code == 404
        assert response.json()["error"] == f"version '7': not served; version {version} is"


def test_too_large_a_body_is_413(served: Served) -> None:
    for path in (V1, V2):
        response = served.http.post(path, content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
        assert response.status_code == 413 and "larger than 4194304 bytes" in response.json()["error"]


def test_too_large_a_body_is_refused_before_it_is_sent(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for head in ("Content-Length: 99999999", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(f"POST {V1} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            if "chunked" in head:
                chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
                connection.sendall(chunk * 5)
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_caller_that_goes_away_in_the_middle_is_no_failure(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"POST {V1} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert served.v1(user_id="u1").status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_json_by_any_of_its_names_is_json(served: Served) -> None:
    body = b'{"instances": [{"user_id": "u1"}]}'
    curl_default = "application/x-www-form-urlencoded"
    for content_type in (
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/vnd.shop+json",
        curl_default,
    ):
        assert served.http.post(V1, content=body, headers={"content-type": content_type}).status_code == 200


def test_wrong_method_or_path_is_told_as_json(served: Served) -> None:
    response = served.http.delete(V1)
    assert response.status_code == 405 and response.json()["error"] and "POST" in response.headers["allow"]
    response = served.http.get("/nowhere")
    assert response.status_code == 404 and response.json() == {"error": "Not Found"}
    response = served.http.post("/v1/models/evergreen:explain", json={"instances": []})
    assert response.status_code == 501 and response.json() == {"error": "explanations are not offered"}


def test_failure_of_ours_is_500_that_tells_nothing_and_is_logged_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(requests: Any) -> Any:
        raise RuntimeError("the secret path")

    monkeypatch.setattr(served.server.server.slot.recommender, "answer", fail)
    response = served.http.post(V1, json={"instances": [{"user_id": "u1"}]}, headers={"x-request-id": "r-42"})
    assert response.status_code == 500 and response.json() == {"error": "internal error, request id r-42"}
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1 and "the secret path" in str(logged[0].exc_info)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    """Something that looks like a request often enough to get past the first check."""
    scalars = [
        None,
        True,
        0,
        -1,
        3,
        10**30,
        1.5,
        "",
        "u1",
        "item-3",
        "\x00",
        "\u00e9\U0001f600",
        "2026-03-01T00:00:00Z",
    ]
    names = [
        "instances",
        "inputs",
        "user_id",
        "candidates",
        "k",
        "context",
        "event_timestamp",
        "name",
        "shape",
        "datatype",
    ]
    names += ["data", "parameters", "outputs", "id", "battery", "device", "specversion", "type", "source", "time", ""]
    roll = rng.random()
    if depth > 5 or roll < 0.35:
        return rng.choice(scalars)
    if roll < 0.6:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(names): random_json(rng, depth + 1) for _ in range(rng.randrange(6))}


def random_body(rng: random.Random, path: str) -> bytes:
    roll = rng.random()
    if roll < 0.4:
        instance = {n: random_json(rng, 4) for n in ("user_id", "candidates", "k", "context") if rng.random() < 0.3}
        value: Any = {"instances": [instance | ({"user_id": "u1"} if rng.random() < 0.7 else {})]}
        if path == V2:
            fields = {"user_id": "BYTES", "candidates": "BYTES", "k": "INT64", "context": "BYTES"}
            inputs = [
                {
                    "name": name,
                    "datatype": datatype if rng.random() < 0.9 else "FP32",
                    "shape": [1] if rng.random() < 0.8 else rng.choice([[1, 1], [2], []]),
                    "data": [rng.choice(["u1", "{}", '["a"]', 3, random_json(rng, 5)])],
                }
                for name, datatype in fields.items()
                if name == "user_id" or rng.random() < 0.3
            ]
            value = {"inputs": inputs}
    else:
        value = random_json(rng)
    body = bytearray(json.dumps(value).encode())
    if rng.random() < 0.15 and body:
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def test_no_body_makes_the_server_fail(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(20261123)
    seen = set()
    for _ in range(200):
        for path in (V1, V2):
            body = random_body(rng, path)
            response = served.http.post(path, content=body, headers=JSON)
            assert response.status_code in (200, 400), (path, body, response.text)
            assert response.status_code == 200 or response.json()["error"]
            seen.add((path, response.status_code))
    assert len(seen) == 4, "the bodies reach both sides of every check"


def test_wrong_calls_of_every_kind_are_refused(served: Served) -> None:
    calls = bad_calls(8 * len(KINDS), seed=7, users=["u1", "u2"], items=["item-1", "item-2", "item-3"])
    outcome = asyncio.run(fire(int(served.url.rsplit(":", 1)[1]), calls))
    assert not outcome.num_wrong, {kind: (call.data[:300], reply) for kind, (call, reply) in outcome.wrong.items()}
    assert outcome.statuses.keys() == set(KINDS)
    assert served.v1(user_id="u1").status_code == 200


def test_client_brings_its_token(parts: Callable[[str], Any], tmp_path: Path) -> None:
    recommender = parts("impressions").other()  # closed with the server

    async def open_model(path: Path) -> Any:
        return recommender

    (tmp_path / "tokens").write_text("0123456789abcdef\n")
    settings = ServeSettings(
        model=Path("m"), feature_store=Path("f"), host="127.0.0.1", port=0, token_file=tmp_path / "tokens"
    )
    with serving_in_background(settings, open_model) as server:
        with RecommenderClient(server.url, token="0123456789abcdef") as client:
            assert client.recommend("u1").user_id == "u1"
        with RecommenderClient(server.url) as client, pytest.raises(RequestError, match="token"):
            client.recommend("u1")


def test_mistakes_write_nothing_to_the_log(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.v1(user_id="")
    served.http.post(V1, content=b"{", headers=JSON)
    served.http.post(V2, content=b"{", headers=JSON)
    served.http.post("/v1/models/other:predict", json={})
    served.http.post("/v2/models/evergreen/versions/2/infer", content=tensor(), headers=JSON)
    served.v1(user_id="u1")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_health_is_answered_while_a_large_call_is_ranked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking, release = threading.Event(), threading.Event()
    recommender = served.server.server.slot.recommender
    answers = recommender._answers

    def slow(*arguments: Any) -> Any:
        ranking.set()
        assert release.wait(timeout=20)
        return answers(*arguments)

    monkeypatch.setattr("evergreen.serving.recommender._INLINE_PAIRS", 0)
    monkeypatch.setattr(recommender, "_answers", slow)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(served.v1, user_id="u1")
        assert ranking.wait(timeout=20)
        with httpx.Client(base_url=served.url, trust_env=False, timeout=5) as http:
            assert http.get("/v2/health/live").status_code == 200
            assert http.get("/v2/models/evergreen/ready").status_code == 200
        release.set()
        assert call.result().status_code == 200


@pytest.mark.parametrize("protocol", ["v1", "v2", "v2-binary"])
def test_client_gets_what_the_recommender_answers(served: Served, protocol: Any) -> None:
    at = datetime(2026, 3, 12, 5, tzinfo=UTC)
    with RecommenderClient(served.url) as client:
        client.wait_until_ready(timeout=5)
        context = {"device": "phone", "battery": 0.5}
        wanted = {
            "k": 2,
            "candidates": ["item-1", "item-2", "new"],
            "context": context,
            "event_timestamp": at,
            "request_id": "r1",
            "exclude_seen": True,
            "diversity": 0.3,
        }
        answer = client.recommend("u1", **wanted, protocol=protocol)
        expected = Recommendation.model_validate(served.parts.ask(user_id="u1", **wanted).to_json())
        assert [i.item_id for i in answer.items] == [i.item_id for i in expected.items]
        assert [i.probability for i in answer.items] == pytest.approx([i.probability for i in expected.items], abs=1e-6)
        assert answer.model_copy(update={"items": ()}) == expected.model_copy(update={"items": ()})
        with pytest.raises(RequestError, match=r"k.*=0: must be between 1 and 500"):
            client.recommend("u1", k=0, protocol=protocol)


def test_client_says_when_there_is_no_such_model_or_server(served: Served) -> None:
    with pytest.raises(RequestError, match="other does not exist"):
        RecommenderClient(served.url, model_name="other").recommend("u1")
    with listen_on("127.0.0.1", 0) as nobody:
        client = RecommenderClient(f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(EvergreenError, match="cannot be reached"):
            client.recommend("u1")
        with pytest.raises(TimeoutError, match="not ready after 0"):
            client.wait_until_ready(timeout=0)
        with pytest.raises(TimeoutError, match="the server has ended"):
            client.wait_until_ready(timeout=60, still_alive=lambda: False)


def test_client_is_quick_to_import() -> None:
    code = (
        "import sys, evergreen.serving.client; "
        "print([m for m in ('kserve', 'torch', 'feast', 'pyarrow', 'pandas', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
