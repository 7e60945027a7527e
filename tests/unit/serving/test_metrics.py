"""What is counted, under which names."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from evergreen.serving import metrics
from evergreen.serving.answer import Answer
from evergreen.serving.metrics import CountCalls, CountRequests, endpoint_of, observe_answer


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models/evergreen:predict", ("v1", "predict")),
        ("/v2/models/evergreen/infer", ("v2", "infer")),
        ("/v2/models/evergreen/versions/x/infer", ("v2", "infer")),
        ("/v2/repository/models/evergreen/load", ("v2", "repository")),
        ("/v2/repository/index", ("v2", "repository")),
        ("/v2/health/ready", ("v2", "health")),
        ("/v2/models/evergreen/ready", ("v2", "health")),
        ("/v1/models/evergreen", ("v1", "metadata")),
        ("/v2", ("v2", "metadata")),
        ("/v2/whatever", ("v2", "other")),
        ("/", ("http", "health")),
        ("/metrics", ("http", "metrics")),
        ("/admin.php", ("http", "other")),
        ("", ("http", "other")),
    ],
)
def test_path_is_counted_under_its_endpoint(path: str, expected: tuple[str, str]) -> None:
    assert endpoint_of(path) == expected


def answer_with(status: int | None, path: str, *, fails: bool = False) -> None:
    """Have an application answer one request behind the counter."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert value("evergreen_requests_in_flight") == 1
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
        if fails:
            raise RuntimeError("broken")

    async def nothing(*_: Any) -> Any:
        return None

    asyncio.run(CountRequests(app)({"type": "http", "path": path}, nothing, nothing))


@pytest.mark.parametrize(("status", "label"), [(200, "2xx"), (404, "4xx"), (503, "5xx"), (None, "none")])
def test_request_is_counted_by_the_class_of_its_status(status: int | None, label: str) -> None:
    labels = {"protocol": "v1", "endpoint": "predict"}
    counted = value("evergreen_requests_total", **labels, status=label)
    timed = value("evergreen_request_seconds_count", **labels)
    answer_with(status, "/v1/models/m:predict")
    assert value("evergreen_requests_total", **labels, status=label) == counted + 1
    assert value("evergreen_request_seconds_count", **labels) == timed + 1
    assert value("evergreen_requests_in_flight") == 0


def test_failure_without_an_answer_is_counted_as_ours() -> None:
    labels = {"protocol": "v2", "endpoint": "infer", "status": "5xx"}
    before = value("evergreen_requests_total", **labels)
    with pytest.raises(RuntimeError, match="broken"):
        answer_with(None, "/v2/models/m/infer", fails=True)
    assert value("evergreen_requests_total", **labels) == before + 1
    assert value("evergreen_requests_in_flight") == 0


def test_grpc_call_is_counted_by_its_status() -> None:
    async def run() -> None:
        async def infer(request: bytes, context: Any) -> bytes:
            if request == b"bad":
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad")
            if request == b"broken":
                raise RuntimeError("broken")
            return request

        server = grpc.aio.server(interceptors=[CountCalls()])
        handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.Service", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary("/inference.Service/ModelInfer")
            assert await ask(b"good") == b"good"
            for request in (b"bad", b"broken"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await ask(request)
        await server.stop(0)

    labels = {"protocol": "grpc", "endpoint": "ModelInfer"}
    statuses = ("ok", "invalid_argument", "unknown")
    before = [value("evergreen_requests_total", **labels, status=status) for status in statuses]
    asyncio.run(run())
    assert [value("evergreen_requests_total", **labels, status=s) for s in statuses] == [n + 1 for n in before]
    assert value("evergreen_requests_in_flight") == 0


def an_answer(**changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "request_id": "r",
        "user_id": "u",
        "known_user": True,
        "model_version": "v",
        "event_timestamp": datetime(2026, 1, 1, tzinfo=UTC),
        "value_name": "probability",
        "item_ids": ["a", "b"],
        "scores": np.array([0.25, 0.5]),
    }
    return Answer(**fields | changes)


def test_answer_is_counted_by_what_it_is() -> None:
    names = {
        "evergreen_answers_total": {"degraded": "false"},
        "evergreen_unknown_users_total": {},
        "evergreen_unknown_items_total": {},
        "evergreen_filtered_items_total": {"rule": "blocked"},
        "evergreen_score_count": {},
        "evergreen_score_sum": {},
    }

    def read() -> list[float]:
        return [value(name, **labels) for name, labels in names.items()]

    before = read()
    observe_answer(an_answer(known_user=False, unknown_items=("x", "y"), filtered_items={"blocked": ["z"]}))
    assert [after - b for after, b in zip(read(), before, strict=True)] == [1, 1, 2, 1, 1, 0.5]


def test_degraded_answer_is_no_unknown_user() -> None:
    degraded, unknown = value("evergreen_answers_total", degraded="true"), value("evergreen_unknown_users_total")
    observe_answer(an_answer(known_user=False, degraded=True))
    assert value("evergreen_answers_total", degraded="true") == degraded + 1
    assert value("evergreen_unknown_users_total") == unknown


def test_answer_without_items_has_no_score() -> None:
    before = value("evergreen_score_count")
    observe_answer(an_answer(item_ids=[], scores=np.empty(0)))
    assert value("evergreen_score_count") == before


def test_only_the_model_that_answers_is_told() -> None:
    metrics.tell_model("deepfm-1")
    metrics.tell_model("deepfm-2")
    assert [sample.labels for sample in next(iter(metrics.MODEL.collect())).samples] == [{"version": "deepfm-2"}]
