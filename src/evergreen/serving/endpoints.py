"""The routes that recommendations are asked on, in place of KServe's, and errors as `{"error": "…"}`.

KServe's own two routes decode by pydantic unions and write by FastAPI's encoder, which takes longer than a ranking; see
docs/adr/0012. These call the same data plane with the bytes as they came, and send what comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import fastapi
import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evergreen.serving import logs
from evergreen.serving.calls import HEADER_LENGTH, JSON, Call, Reply, V1Call, V2Call
from evergreen.serving.openapi import describe_api
from evergreen.serving.protocol import KNOWN_ERRORS, RecommenderDataPlane, error_of
from evergreen.serving.settings import MAX_BODY_BYTES

MAX_CALLS_IN_FLIGHT = 256
"""Calls that are answered at once; more are told to come back."""
BODY_SECONDS = 30
"""Within which all of a body has to be there."""

logger = logging.getLogger(__name__)

MakeCall = Callable[[bytes, Mapping[str, str], str | None], Call]
"""A call of its body, its headers and the version of the model in its path."""


def install_endpoints(
    app: fastapi.FastAPI,
    data_plane: RecommenderDataPlane,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_calls_in_flight: int = MAX_CALLS_IN_FLIGHT,
) -> ASGIApp:
    """Put our routes before an application, have it answer errors as ours do, and bound what comes in.

    Args:
        app: what KServe's own endpoints are, or will be, on.
        data_plane: what answers.
        max_body_bytes: of one call; a larger one is refused (413) before it is read.
        max_calls_in_flight: further ones are refused (503).

    Returns:
        What is to be served in place of `app`.
    """
    metadata = _VersionedMetadata(data_plane)
    model, version = "/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"
    in_flight = _InFlight(max_calls_in_flight)
    v2 = _Inference(data_plane, lambda body, headers, version: V2Call(version, body=body, headers=headers), in_flight)
    v1 = _Inference(data_plane, lambda body, headers, _: V1Call(body, headers), in_flight)
    for kind in (*KNOWN_ERRORS, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _tell)
    app.add_exception_handler(Exception, _fail)
    routes: list[BaseRoute] = [
        Route("/v1/models/{model_name}:predict", v1, methods=["POST"]),
        Route(f"{model}/infer", v2, methods=["POST"]),
        Route(f"{version}/infer", v2, methods=["POST"]),
        Route(version, metadata.describe, methods=["GET"]),
        Route(f"{version}/ready", metadata.ready, methods=["GET"]),
        Route("/v1/models/{model_name}:explain", _explain, methods=["POST"]),
        Route("/openapi.json", _Document(data_plane), methods=["GET"]),
    ]
    return Guard(app, Router(routes, default=app, redirect_slashes=False), max_body_bytes=max_body_bytes)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in KServe's form."""
    return Response(orjson.dumps({"error": message}), status, headers, media_type=JSON)


class _InFlight:
    """Counts calls."""

    __slots__ = ("limit", "now")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.now = 0

    def __enter__(self) -> None:
        if self.now >= self.limit:
            raise HTTPException(503, "too many calls at once: try again", {"Retry-After": "1"})
        self.now += 1

    def __exit__(self, *_: object) -> None:
        self.now -= 1


class _Inference:
    """One route, plain ASGI."""

    def __init__(self, data_plane: RecommenderDataPlane, make_call: MakeCall, in_flight: _InFlight) -> None:
        self._data_plane = data_plane
        self._make_call = make_call
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        with self._in_flight:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            path = scope["path_params"]
            call = self._make_call(body, headers, path.get("model_version"))
            reply: Reply = (await self._data_plane.infer(path["model_name"], call, headers))[0]
            given = [(b"content-type", reply.media_type.encode()), (b"content-length", b"%d" % len(reply.body))]
            if reply.header_length is not None:
                given.append((HEADER_LENGTH.encode(), b"%d" % reply.header_length))
            await send({"type": "http.response.start", "status": 200, "headers": given})
            await send({"type": "http.response.body", "body": reply.body})


async def _read(receive: Receive) -> bytes | None:
    """A body; None if the caller went away before all of it was there."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return bytes(message.get("body", b""))
    parts = []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(parts)
                message = await receive()
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    return None


class _VersionedMetadata:
    """What KServe has routes for and answers with 501."""

    def __init__(self, data_plane: RecommenderDataPlane) -> None:
        self._data_plane = data_plane

    async def describe(self, request: Request) -> Response:
        """Metadata of a model's version."""
        path = request.path_params
        metadata = await self._data_plane.model_metadata(path["model_name"], path["model_version"])
        return Response(orjson.dumps(metadata), media_type=JSON)

    async def ready(self, request: Request) -> Response:
        """Whether a model's version is ready."""
        path = request.path_params
        name = path["model_name"]
        if not await self._data_plane.model_ready(name, version=path["model_version"]):
            return error_response(503, f"Model with name {name} is not ready.")
        return Response(orjson.dumps({"name": name, "ready": True}), media_type=JSON)


class _Document:
    """The OpenAPI document of what is served now."""

    def __init__(self, data_plane: RecommenderDataPlane) -> None:
        self._data_plane = data_plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(orjson.dumps(describe_api(self._data_plane)), media_type=JSON)
        await response(scope, receive, send)


async def _explain(_: Request) -> Response:
    return error_response(501, "explanations are not offered")


class Guard:
    """Bounds the size of a body, answers errors, and 500 for a failure of ours, which is logged once with its stack."""

    def __init__(self, app: ASGIApp, router: ASGIApp, max_body_bytes: int) -> None:
        """Wrap an application.

        Args:
            app: that is told when the server starts and stops.
            router: that answers requests.
            max_body_bytes: a larger body is refused when that much of it was read, or before if its length is told.
        """
        self._app = app
        self._router = router
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, size, started = self._max_body_bytes, 0, False

        async def bounded_receive() -> Message:
            nonlocal size
            if not size and _declared_length(scope) > limit:
                raise _too_large(limit)
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        scope["app"] = self._app  # by it Starlette's routes know that somebody answers their errors
        try:
            await self._router(scope, bounded_receive, noting_send)
        except Exception as error:
            known = isinstance(error, (*KNOWN_ERRORS, HTTPException))
            if not known:
                logger.exception("%s %s failed", scope["method"], scope["raw_path"].decode("latin-1"))
            if not started:
                response = await (_tell if known else _fail)(None, error)
                await response(scope, receive, send)


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else 0
    return 0


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes: send fewer requests a call")


async def _tell(_: Request | None, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):  # of KServe's routes; ours say more
        return error_response(400, "the body or the path is not what this endpoint takes")
    told = error_of(error)
    assert told is not None
    return error_response(*told, headers=getattr(error, "headers", None))


async def _fail(_: Request | None, error: Exception) -> Response:
    return error_response(500, f"internal error, request id {logs.request_id()}")
