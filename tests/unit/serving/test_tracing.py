"""Spans, received by a collector of our own over real OTLP/HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.server import serving_in_background
from evergreen.serving.settings import ServeSettings
from evergreen.serving.stages import Stage, timed
from evergreen.serving.tracing import TraceCalls, TraceRequests, Tracing, trace_id

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: uv sync --extra tracing")

CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """URL of a collector, and the spans that it has got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            bodies.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    def spans() -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]
        return [s for r in requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", spans
    server.shutdown()
    thread.join()
    server.server_close()


def ask(tracing: Tracing, path: str, seen: list[str], **options: Any) -> None:
    async def answer(request: Request) -> Response:
        with timed(Stage.PARSE):
            seen.append(trace_id())
        with timed(Stage.SCORE):
            pass
        return Response(status_code=int(request.query_params.get("status", "200")))

    async def run() -> None:
        app = TraceRequests(Starlette(routes=[Route("/{path:path}", answer)]), tracing)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await client.get(path, **options)

    asyncio.run(run())


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_request_is_a_span_in_the_callers_trace_and_each_stage_its_child(
    collector: tuple[str, Callable[[], list[Any]]],
) -> None:
    url, spans = collector
    tracing = Tracing(url, service_name="evergreen")
    seen: list[str] = []
    ask(tracing, "/v2/models/evergreen/infer", seen, headers={"traceparent": TRACEPARENT})
    tracing.close()
    by_name = {span.name: span for span in spans()}
    assert by_name.keys() == {"GET v2 infer", "parse", "score"}
    request = by_name["GET v2 infer"]
    assert {span.trace_id.hex() for span in spans()} == {CALLER_TRACE} == set(seen)
    assert request.parent_span_id.hex() == CALLER_SPAN
    assert {by_name[name].parent_span_id for name in ("parse", "score")} == {request.span_id}
    assert attributes(request) == {
        "http.request.method": "GET",
        "url.path": "/v2/models/evergreen/infer",
        "http.response.status_code": 200,
    }
    for name in ("parse", "score"):
        stage = by_name[name]
        assert request.start_time_unix_nano <= stage.start_time_unix_nano <= stage.end_time_unix_nano
        assert stage.end_time_unix_nano <= request.end_time_unix_nano


def test_request_without_a_trace_begins_one_and_failures_of_ours_are_marked(
    collector: tuple[str, Callable[[], list[Any]]],
) -> None:
    url, spans = collector
    tracing = Tracing(url, service_name="evergreen")
    seen: list[str] = []
    for status in (400, 503):
        ask(tracing, f"/v1/models/m:predict?status={status}", seen)
    ask(tracing, "/v2/health/ready", seen)
    tracing.close()
    requests = [span for span in spans() if span.name == "GET v1 predict"]
    assert [span.trace_id.hex() for span in requests] == seen[:2] and seen[0] != seen[1]
    assert [span.status.code for span in requests] == [0, 2], "a caller's mistake is no error of the server"
    assert not any("health" in span.name for span in spans()), "probes would drown the rest"


def test_grpc_call_is_a_span_in_the_callers_trace(collector: tuple[str, Callable[[], list[Any]]]) -> None:
    url, spans = collector
    tracing = Tracing(url, service_name="evergreen")

    async def run() -> None:
        async def infer(request: bytes, context: Any) -> bytes:
            if request == b"ready?":
                return request
            with timed(Stage.SCORE):
                return request

        server = grpc.aio.server(interceptors=[TraceCalls(tracing)])
        handlers = {name: grpc.unary_unary_rpc_method_handler(infer) for name in ("ModelInfer", "ModelReady")}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method, request in (("ModelInfer", b"x"), ("ModelReady", b"ready?")):
                ask = channel.unary_unary(f"/inference/{method}")
                await ask(request, metadata=(("traceparent", TRACEPARENT),))
        await server.stop(0)

    asyncio.run(run())
    tracing.close()
    call = next(span for span in spans() if span.name == "inference/ModelInfer")
    assert call.trace_id.hex() == CALLER_TRACE and call.parent_span_id.hex() == CALLER_SPAN
    assert [s.parent_span_id for s in spans() if s.name == "score"] == [call.span_id]
    assert not any("ModelReady" in span.name for span in spans())


def test_answer_of_a_server_is_traced_through_all_its_stages(
    parts: Callable[[str], Any], collector: tuple[str, Callable[[], list[Any]]]
) -> None:
    url, spans = collector
    tracing = Tracing(url, service_name="evergreen")
    recommender = parts("impressions").other()

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("m"), feature_store=Path("f"), host="127.0.0.1", port=0)
    with serving_in_background(settings, open_model, tracing) as server:
        body = {"instances": [{"user_id": "u1"}]}
        response = httpx.post(
            f"{server.url}/v1/models/evergreen:predict",
            json=body,
            headers={"traceparent": TRACEPARENT},
            trust_env=False,
        )
        assert response.status_code == 200
    tracing.close()
    by_name = {span.name: span for span in spans()}
    assert by_name.keys() == {"POST v1 predict", *(stage.value for stage in Stage)}
    assert {span.trace_id.hex() for span in by_name.values()} == {CALLER_TRACE}


def test_stages_are_timed_with_and_without_traces() -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("evergreen_stage_seconds_count", {"stage": "rules"}) or 0

    before = count()
    with pytest.raises(KeyError), timed(Stage.RULES):
        raise KeyError
    assert count() == before + 1 and trace_id() == ""


def test_collector_that_is_away_fails_no_request(unused_port: int) -> None:
    tracing = Tracing(f"http://127.0.0.1:{unused_port}", service_name="evergreen", timeout_seconds=0.1)
    seen: list[str] = []
    ask(tracing, "/v1/models/m:predict", seen)
    tracing.close()
    assert len(seen[0]) == 32 and trace_id() == ""


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_missing_opentelemetry_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(EvergreenError, match=r"http://c:4318 need OpenTelemetry .* install evergreen\[tracing\]"):
        Tracing("http://c:4318", service_name="evergreen")


def test_without_traces_opentelemetry_is_not_imported() -> None:
    code = "import sys, evergreen.serving.tracing; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
