"""A server that is told to stop, and what is around the application, over real HTTP and gRPC."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from prometheus_client import REGISTRY

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.server import Background, Server, serving_in_background
from evergreen.serving.settings import ServeSettings

PREDICT, READY = "/v1/models/evergreen:predict", "/v2/models/evergreen/ready"
BODY = {"instances": [{"user_id": "u1", "k": 2}]}


class Held:
    """A real recommender that can be made to wait before it answers, and remembers that it was closed."""

    def __init__(self, recommender: Any) -> None:
        self._recommender = recommender
        self.asked = threading.Event()
        self.release = threading.Event()
        self.release.set()
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recommender, name)

    async def answer(self, requests: Sequence[Any]) -> Any:
        self.asked.set()
        while not self.release.is_set():
            await asyncio.sleep(0.005)
        return await self._recommender.answer(requests)

    async def close(self) -> None:
        self.closed = True
        await self._recommender.close()


Started = tuple[Background, httpx.Client, Held]


@pytest.fixture
def start(parts: Callable[[str], Any]) -> Callable[..., Any]:
    """Starts a server with some settings."""

    @contextmanager
    def begin(**settings: Any) -> Iterator[Started]:
        held = Held(parts("impressions").other())

        async def open_model(path: Path) -> Any:
            return held

        defaults = {"model": Path("m"), "feature_store": Path("f"), "host": "127.0.0.1", "port": 0}
        with (
            serving_in_background(ServeSettings.of(**defaults | settings), open_model) as running,
            httpx.Client(base_url=running.url, trust_env=False, timeout=20) as http,
        ):
            yield running, http, held

    return begin


def test_server_that_drains_is_not_ready_and_answers_on(start: Callable[..., Any]) -> None:
    with start(drain_seconds=30) as (running, http, _):
        assert http.get(READY).status_code == http.get("/v2/health/ready").status_code == 200
        assert "connection" not in http.post(PREDICT, json=BODY).headers
        running.server.rest.stop()
        for path in (READY, "/v2/health/ready", "/v1/models/evergreen"):
            assert http.get(path).status_code == 503, path
        assert http.get("/v2/health/live").status_code == 200
        response = http.post(PREDICT, json=BODY)
        assert response.status_code == 200
        assert response.headers["connection"] == "close", "its caller has to go to another server"
        running.server.rest.stop()  # no need to wait for the rest of the time


def test_request_in_flight_is_answered_before_the_server_ends(start: Callable[..., Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        with start(drain_seconds=0) as (running, http, held):
            http.get(READY)  # the connection is there
            held.asked.clear()
            held.release.clear()
            answer: Future[httpx.Response] = pool.submit(http.post, PREDICT, json=BODY)
            assert held.asked.wait(10)
            running.server.rest.stop()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:  # nobody new is let in …
                try:
                    httpx.get(running.url + READY, trust_env=False)
                    time.sleep(0.02)
                except httpx.TransportError:
                    break
            else:
                pytest.fail("the server still listens")
            assert not answer.done() and not held.closed
            held.release.set()  # … and who is in is answered
            assert answer.result(timeout=10).status_code == 200
        assert held.closed


def test_told_to_stop_twice_it_waits_for_nobody(start: Callable[..., Any]) -> None:
    with ThreadPoolExecutor(1) as pool, start(drain_seconds=60, grace_seconds=60) as (running, http, held):
        held.asked.clear()
        held.release.clear()
        answer = pool.submit(http.post, PREDICT, json=BODY)
        assert held.asked.wait(10)
        running.server.rest.stop()
        running.server.rest.stop()
        with pytest.raises(httpx.TransportError):
            answer.result(timeout=10)
        assert running.server.rest.forced


def test_grpc_call_in_flight_is_answered_before_the_server_ends(start: Callable[..., Any]) -> None:
    call = pb.ModelInferRequest(model_name="evergreen", inputs=[infer_input("user_id", b"u1")])
    with (
        ThreadPoolExecutor(1) as pool,
        start(drain_seconds=0, grpc_port=0) as (running, _, held),
        grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(pb.ModelReadyRequest(name="evergreen"), timeout=10).ready
        held.asked.clear()
        held.release.clear()
        answer = pool.submit(stub.ModelInfer, call, timeout=20)
        assert held.asked.wait(10)
        running.server.rest.stop()
        time.sleep(0.2)
        assert not answer.done()
        held.release.set()
        assert answer.result(timeout=10).model_name == "evergreen"


def infer_input(name: str, *values: bytes) -> Any:
    contents = pb.InferTensorContents(bytes_contents=values)
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[len(values)], contents=contents)


def test_token_is_asked_for_over_http_and_grpc(start: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("0123456789abcdef-token\n")
    headers = {"authorization": "Bearer 0123456789abcdef-token"}
    with start(token_file=file, grpc_port=0, allow_reload=True) as (running, http, _):
        for path in (PREDICT, "/v2/repository/models/evergreen/load", "/v2/repository/index"):
            assert http.post(path, json=BODY).status_code == 401, path
        assert http.get("/openapi.json").status_code == http.get("/v2").status_code == 401
        assert http.get(READY).status_code == http.get("/metrics").status_code == 200
        assert http.post(PREDICT, json=BODY, headers=headers).status_code == 200
        call = pb.ModelInferRequest(model_name="evergreen", inputs=[infer_input("user_id", b"u1")])
        with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
            stub = GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(call, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert stub.ModelInfer(call, metadata=tuple(headers.items()), timeout=10).outputs


def test_calls_are_counted_by_protocol_endpoint_and_status(start: Callable[..., Any]) -> None:
    def count(protocol: str, endpoint: str, status: str) -> float:
        labels = {"protocol": protocol, "endpoint": endpoint, "status": status}
        return REGISTRY.get_sample_value("evergreen_requests_total", labels) or 0

    expected = [("v1", "predict", "2xx"), ("v1", "predict", "4xx"), ("grpc", "ModelInfer", "not_found")]
    before = [count(*labels) for labels in expected]
    with start(grpc_port=0) as (running, http, _):
        http.post(PREDICT, json=BODY)
        http.post(PREDICT, content=b"{")
        with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel, pytest.raises(grpc.RpcError):
            GRPCInferenceServiceStub(channel).ModelInfer(pb.ModelInferRequest(model_name="other"), timeout=10)
    assert [count(*labels) for labels in expected] == [n + 1 for n in before]


def test_reload_is_refused_unless_it_was_allowed(start: Callable[..., Any]) -> None:
    with start() as (_, http, _held):
        response = http.post("/v2/repository/models/evergreen/load")
        assert response.status_code == 403 and "deploy the other package" in response.json()["error"]
        assert http.post("/v2/repository/models/evergreen/unload").status_code == 403


def test_failure_to_load_the_first_model_ends_the_server() -> None:
    async def open_model(path: Path) -> Any:
        raise EvergreenError("broken package")

    settings = ServeSettings(model=Path("m"), feature_store=Path("f"), host="127.0.0.1", port=0)
    with pytest.raises(EvergreenError, match="broken package"), serving_in_background(settings, open_model):
        pytest.fail("it serves nothing")


def test_server_says_that_it_is_no_particular_product(start: Callable[..., Any]) -> None:
    with start() as (_, http, _held):
        assert "server" not in http.get("/v2/health/live").headers


def test_assembling_a_server_loads_nothing() -> None:
    async def open_model(path: Path) -> Any:
        pytest.fail("not yet")

    server = Server(ServeSettings(model=Path("m"), feature_store=Path("f")), open_model)
    assert not server.slot.loaded and not server.rest.started


def test_process_computes_with_the_threads_it_is_told_and_keeps_metrics_in_memory(tmp_path: Path) -> None:
    code = """
from evergreen.serving.server import _prepare_process
_prepare_process(2)
import feast.metrics, numpy, os, prometheus_client.values, pyarrow, torch
assert (torch.get_num_threads(), torch.get_num_interop_threads(), pyarrow.cpu_count()) == (2, 2, 2)
assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "2"
print(prometheus_client.values.ValueClass.__name__)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS")}
    environment["TMPDIR"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "MutexValue", "Feast would have it in files"
    assert list(tmp_path.iterdir()) == []
