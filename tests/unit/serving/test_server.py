"""The real HTTP server on loopback, with a stand-in model behind it."""

from __future__ import annotations

import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from evergreen.contracts.errors import ArtifactError, EvergreenError, RequestError
from evergreen.serving.client import RecommenderClient
from evergreen.serving.predictor import RecommenderModel
from evergreen.serving.protocol import MAX_BODY_BYTES
from evergreen.serving.server import build_server, listen_on, serve

V1, V2 = "/v1/models/evergreen:predict", "/v2/models/evergreen/infer"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Served:
    url: str
    http: httpx.Client
    model: RecommenderModel
    parts: Any

    def v1(self, **instance: Any) -> httpx.Response:
        return self.http.post(V1, json={"instances": [instance]})


@pytest.fixture(scope="module")
def served(parts: Callable[[str], Any]) -> Iterator[Served]:
    # One for the whole process: kserve keeps its application in a module.
    serving = parts("impressions")
    model = RecommenderModel("evergreen", lambda: serving.recommender)
    with listen_on("127.0.0.1", 0) as listener:
        server = build_server(model, listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            deadline = time.monotonic() + 30
            while not server._server.started and time.monotonic() < deadline:
                time.sleep(0.05)
            assert http.get("/v2/health/live").json() == {"live": True}
            assert http.get("/v2/health/ready").status_code == 503, "not ready before the model is loaded"
            assert http.get("/v1/models/evergreen").status_code == 503
            assert http.post(V1, json={"instances": [{"user_id": "u1"}]}).status_code == 503
            model.load()
            yield Served(url, http, model, serving)
        server._server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


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
    assert served.http.get("/v2").json()["extensions"] == []


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
        (b"{", JSON, "Unrecognized request format"),
        (b"", JSON, "Unrecognized request format"),
        (b"\xff\xfe", JSON, "Unrecognized request format"),
        (b"[" * 100_000, JSON, "Unrecognized request format"),
        (b'{"instances": [{"user_id": NaN}]}', JSON, "Unrecognized request format"),
        (b'{"instances": [{"user_id": "\\ud800"}]}', JSON, "Unrecognized request format"),
        (b"[]", JSON, "the body is a list"),
        (b'{"instances": [{"user_id": "u", "k": 0}]}', JSON, "instances[0].k=0: must be between 1 and 500"),
        (b'{"instances": [{"user_id": "u", "k": 1' + b"0" * 5000 + b"}]}", JSON, "Unrecognized request format"),
        (b'{"instances": [{"user_id": "u", "k": 1' + b"0" * 50 + b"}]}", JSON, "instances[0].k=1e+50: must be between"),
        (b"user_id=u1", {"content-type": "application/x-www-form-urlencoded"}, "Unrecognized request format"),
        (b'{"instances": [{"user_id": "u"}]}', {"content-type": "text/plain"}, 'Content-Type "text/plain": send JSON'),
        (
            b"x",
            JSON | {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "t", "ce-source": "s"},
            "the body is not JSON",
        ),
        (b"x", JSON | {"ce-specversion": "9", "ce-id": "1", "ce-type": "t", "ce-source": "s"}, ""),
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
        (b"", JSON, "the body: missing"),
        (b"\xff\xfe", JSON, ""),
        (b"[" * 100_000, JSON, ""),
        (b"[]", JSON, "the body: "),
        (b'"text"', JSON, "no inference request"),
        (b"{}", JSON, "inputs: missing"),
        (b'{"inputs": []}', JSON, "inputs: empty"),
        (b'{"inputs": [{}]}', JSON, "inputs[0].name: missing"),
        (b'{"inputs": [], "parameters": {"\\ud800": []}}', JSON, "parameters."),
        (tensor(shape="x"), JSON, "inputs[0].shape: "),
        (tensor(shape=[2]), JSON, "inputs.user_id: 1 values in data do not fill the shape [2]"),
        (tensor(shape=[10**25]), JSON, "inputs.user_id: shape [1000"),
        (tensor(datatype="FP16"), JSON, "FP16"),
        (tensor(datatype="\ud800"), JSON, "inputs.user_id: datatype '\\ud800': must be BYTES"),
        (tensor(name="\ud800"), JSON, "inputs: no such input '\\ud800'"),
        (tensor(data=["\ud800"]), JSON, "inputs.user_id[0]='\\ud800': must be a string"),
        (tensor()[:-1] + b', "id": "\\ud800"}', JSON, "id='\\ud800': must be printable text"),
        (tensor(data=[None]), JSON, "inputs.user_id[0]: missing"),
        (tensor(data=[float("nan")]), JSON, "inputs.user_id[0]=nan: must be a string"),
        (tensor(data=[10**4200]), JSON, "inputs.user_id[0]=1000"),
        (tensor(name="k", datatype="INT64", data=[1]), JSON, "inputs.user_id[0]: missing"),
        (tensor(parameters={"binary_data_size": 3}, data=None), JSON, "inputs[0].data: "),
        (tensor(), {"content-type": "application/octet-stream"}, "send JSON with Content-Type"),
        (tensor(), {"content-type": "application/octet-stream", "inference-header-content-length": "x"}, "send JSON"),
        (tensor(), JSON | {"inference-header-content-length": "-1"}, None),
        (b'{"inputs": [], "parameters": {"binary_data_output": true}}', JSON, "binary tensor data is not offered"),
    ],
)
def test_v2_mistake_is_400_with_the_reason(
    served: Served, body: bytes, headers: dict[str, str], message: str | None
) -> None:
    response = served.http.post(V2, content=body, headers=headers)
    if message is None:
        assert response.status_code == 200, response.text
    else:
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]


def test_too_large_a_body_is_413(served: Served) -> None:
    for path in (V1, V2):
        response = served.http.post(path, content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
        assert response.status_code == 413


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


def test_mistakes_write_nothing_to_the_log(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.v1(user_id="")
    served.http.post(V1, content=b"{", headers=JSON)
    served.http.post(V2, content=b"{", headers=JSON)
    served.http.post("/v1/models/other:predict", json={})
    served.http.post("/v2/models/evergreen/versions/2/infer", content=tensor(), headers=JSON)
    served.v1(user_id="u1")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert logging.getLogger("uvicorn.access").level == logging.getLogger("kserve.trace").level == logging.WARNING


def test_health_is_answered_while_a_long_request_is_ranked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking, release = threading.Event(), threading.Event()

    class Slow(type(served.parts.package)):  # type: ignore[misc]
        def predict(self, table: Any) -> Any:
            ranking.set()
            assert release.wait(timeout=20)
            return super().predict(table)

    monkeypatch.setattr(served.parts.recommender._ranker, "_package", Slow(served.parts.package.info))
    thread = threading.Thread(target=served.v1, kwargs={"user_id": "u1"})
    thread.start()
    assert ranking.wait(timeout=20)
    with httpx.Client(base_url=served.url, trust_env=False, timeout=5) as http:
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/v2/models/evergreen/ready").status_code == 200
    release.set()
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize("protocol", ["v1", "v2"])
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
        }
        answer = client.recommend("u1", **wanted, protocol=protocol)
        request = served.parts.recommender.rules.parse_body(
            {"instances": [{"user_id": "u1", **wanted}]},
        )[0]
        expected = served.parts.recommender.recommend(request)
        assert [i.item_id for i in answer.items] == [i.item_id for i in expected.items]
        assert [i.probability for i in answer.items] == pytest.approx([i.probability for i in expected.items], abs=1e-6)
        left = answer.model_copy(update={"items": ()})
        assert left == expected.model_copy(update={"items": ()})
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


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """What looks like a model package and a feature store from outside."""
    model, store = tmp_path / "model", tmp_path / "feature_store"
    for file in (model / "model.json", store / "feature_store.yaml"):
        file.parent.mkdir()
        file.touch()
    return model, store


def test_port_in_use_is_told_before_anything_is_loaded(directories: tuple[Path, Path]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EvergreenError, match=f"port {port} is in use: choose another with --port"):
            serve(*directories, port=port, host="127.0.0.1")


def test_missing_directory_is_named(directories: tuple[Path, Path]) -> None:
    model, store = directories
    with pytest.raises(ArtifactError, match=r"absent: no such directory; give the model package"):
        serve(model / "absent", store, port=0)
    with pytest.raises(ArtifactError, match=r"absent: no such directory; give the feature store"):
        serve(model, store / "absent", port=0)


def test_swapped_directories_are_named(directories: tuple[Path, Path]) -> None:
    model, store = directories
    with pytest.raises(ArtifactError, match=r"feature_store: no model\.json in it, so it is no model package"):
        serve(store, model, port=0)
    with pytest.raises(ArtifactError, match=r"model: no feature_store\.yaml in it, so it is no feature store"):
        serve(model, model, port=0)


def test_unknown_host_is_named() -> None:
    with pytest.raises(EvergreenError, match=r"host 'no.such.host.invalid' cannot be resolved"):
        listen_on("no.such.host.invalid", 0)
