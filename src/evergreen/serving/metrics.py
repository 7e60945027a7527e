"""What Prometheus is told of the server as a whole; other modules count what is theirs alone (`stages`, `impressions`).

KServe counts what it calls preprocess, predict and postprocess. It counts no errors and knows no endpoints.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import lru_cache
from typing import Any

import grpc
from prometheus_client import Counter, Gauge, Histogram, Info
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evergreen.serving.answer import Answer

REQUESTS = Counter("evergreen_requests", "Calls answered.", ["protocol", "endpoint", "status"])
SECONDS = Histogram(
    "evergreen_request_seconds",
    "Seconds from a call's first byte to its answer's last.",
    ["protocol", "endpoint"],
    buckets=(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)
IN_FLIGHT = Gauge("evergreen_requests_in_flight", "Calls that are being answered.")
MODEL = Info("evergreen_model", "The model that answers.")
ANSWERS = Counter("evergreen_answers", "Requests answered; a call may hold several.", ["degraded"])
UNKNOWN_USERS = Counter("evergreen_unknown_users", "Requests of users whom the features do not know.")
UNKNOWN_ITEMS = Counter("evergreen_unknown_items", "Candidates that are not in the catalogue.")
FILTERED_ITEMS = Counter("evergreen_filtered_items", "Candidates that a rule took out.", ["rule"])
SCORES = Histogram(
    "evergreen_score",
    "Score of the best item of an answer: a probability, or a rating.",
    buckets=(
        *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        *(1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 10.0),
    ),
)
ITEMS = Gauge("evergreen_items", "Items that the item table knows.")
ITEM_TABLE_AGE = Gauge("evergreen_item_table_age_seconds", "Seconds since the item table was last read.")
REFRESH_FAILURES = Counter("evergreen_refresh_failures", "Readings of the item table that failed; the old one stays.")
LOADS = Counter("evergreen_model_loads", "Models that callers asked for.", ["outcome"])


class Load(StrEnum):
    """What became of a caller's wish for another model."""

    LOADED = "loaded"
    ROLLED_BACK = "rolled_back"  # to the one that was kept in memory
    UNCHANGED = "unchanged"  # it answers already
    FAILED = "failed"  # the package is broken or does not fit; the old one keeps serving
    REFUSED = "refused"  # not allowed, no such version, or another load is under way


for _degraded in ("false", "true"):  # a counter that does not exist until its first loss cannot be alarmed on
    ANSWERS.labels(_degraded)
for _outcome in Load:
    LOADS.labels(_outcome.value)

_num_in_flight = 0
IN_FLIGHT.set_function(lambda: _num_in_flight)
_FRESH, _DEGRADED = ANSWERS.labels("false"), ANSWERS.labels("true")
_OBSERVED_PATHS = 256


def observe_answer(answer: Answer) -> None:
    """Count an answer by what it is, and its best score."""
    (_DEGRADED if answer.degraded else _FRESH).inc()
    if not (answer.known_user or answer.degraded or answer.user_id is None):
        UNKNOWN_USERS.inc()
    if answer.unknown_items:
        UNKNOWN_ITEMS.inc(len(answer.unknown_items))
    for rule, items in answer.filtered_items.items():
        FILTERED_ITEMS.labels(rule).inc(len(items))
    if len(answer.scores):
        SCORES.observe(float(answer.scores.max()))  # diversity may put another first


def tell_model(version: str) -> None:
    """Say which version answers from now on."""
    MODEL.info({"version": version})


@lru_cache(maxsize=_OBSERVED_PATHS)
def endpoint_of(path: str) -> tuple[str, str]:
    """Protocol and endpoint of a URL's path: few names, whatever callers ask for."""
    protocol, _, rest = path.lstrip("/").partition("/")
    if path in ("/", "/metrics"):
        return "http", protocol or "health"
    if protocol not in ("v1", "v2"):
        return "http", "other"
    if rest.startswith("repository/"):
        return protocol, "repository"
    if rest.startswith("health/") or rest.endswith("/ready"):
        return protocol, "health"
    if rest.endswith(":predict"):
        return protocol, "predict"
    if rest.endswith("/infer"):
        return protocol, "infer"
    return protocol, "metadata" if rest in ("", "models") or rest.startswith("models/") else "other"


class _Observed:
    """Counter and histogram of the calls to one endpoint, looked up once each."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}

    def __call__(self, protocol: str, endpoint: str, status: str, seconds: float) -> None:
        key = protocol, endpoint, status
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = REQUESTS.labels(*key), SECONDS.labels(protocol, endpoint)
        found[0].inc()
        found[1].observe(seconds)


_observe = _Observed()
_STATUS_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")


class CountRequests:
    """Counts and times HTTP requests, around an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        global _num_in_flight
        status = 0  # the caller went away before there was an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        _num_in_flight += 1
        started = time.perf_counter()
        try:
            await self._app(scope, receive, watched)
        except BaseException:
            status = status or 500
            raise
        finally:
            _num_in_flight -= 1
            _observe(*endpoint_of(scope["path"]), _STATUS_CLASSES[status // 100], time.perf_counter() - started)


class CountCalls(grpc.aio.ServerInterceptor):
    """Counts and times gRPC calls, by the name of the status that each ended with."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        answer, endpoint = handler.unary_unary, handler_call_details.method.rpartition("/")[2]

        async def counted(request: Any, context: Any) -> Any:
            global _num_in_flight
            _num_in_flight += 1
            started = time.perf_counter()
            failed = True
            try:
                answered = await answer(request, context)
                failed = False
                return answered
            finally:
                _num_in_flight -= 1
                code = context.code() or (grpc.StatusCode.UNKNOWN if failed else grpc.StatusCode.OK)
                name = code.name if isinstance(code, grpc.StatusCode) else grpc_status_name(code)
                _observe("grpc", endpoint, name.lower(), time.perf_counter() - started)

        return grpc.unary_unary_rpc_method_handler(
            counted, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


def grpc_status_name(code: int) -> str:
    """Name of a status that gRPC gives as a number."""
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), "UNKNOWN")
