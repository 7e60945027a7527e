"""KServe's REST server on an application and a socket of its own, counted, guarded, and drained before it stops.

`kserve.ModelServer.start` would listen on every address, end the process when the port is taken, and stop at once when
it is told to; so its REST server is run by itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import warnings
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import fastapi
import uvicorn
from kserve.model_repository import ModelRepository
from kserve.protocol.rest.server import RESTServer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evergreen.serving.auth import Gate, RequireAuth
from evergreen.serving.endpoints import install_endpoints
from evergreen.serving.logs import IdentifyRequests
from evergreen.serving.metrics import CountRequests
from evergreen.serving.protocol import RecommenderDataPlane
from evergreen.serving.repository import Repository, repository_routes
from evergreen.serving.settings import ServeSettings
from evergreen.serving.tracing import TraceRequests, Tracing

_TICK_SECONDS = 0.05

logger = logging.getLogger(__name__)


class RestServer(RESTServer):  # type: ignore[misc]  # kserve has no type information
    """KServe's REST server: its routes behind ours, and none of its middleware."""

    def __init__(
        self,
        data_plane: RecommenderDataPlane,
        repository: Repository,
        settings: ServeSettings,
        gate: Gate,
        tracing: Tracing | None,
        *,
        stop_others: Callable[[float], Coroutine[Any, Any, None]],
    ) -> None:
        """Assemble the application.

        Args:
            data_plane: of KServe, with the model.
            repository: loads other models.
            settings: of the server.
            gate: whom to answer.
            tracing: makes spans; None: none.
            stop_others: stops other servers of the process when this one stops, within some seconds.
        """
        # kserve 0.21 answers in a way that this FastAPI deprecates; nobody who reads the log can do anything about it.
        warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
        super().__init__("", data_plane, repository, http_port=settings.port, grace_period=int(settings.grace_seconds))
        self._data_plane = data_plane
        app = fastapi.FastAPI(
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            telemetry={"tracing": False, "metrics": False, "logs": False},  # `tracing` knows the stages, too
        )
        inner = install_endpoints(app, data_plane, max_body_bytes=settings.max_body_bytes)
        app.router.routes.extend(repository_routes(repository))
        self._register_endpoints(app)
        config = self.config
        config.app = self._around(inner, settings, gate, tracing)
        # Both would look at every request: who asks, and that the server is uvicorn, is no matter of ours.
        config.proxy_headers = config.server_header = False
        config.lifespan = "off"  # there is nothing to start or stop in the application
        self._server = _DrainingServer(config, self._begin_drain, settings, stop_others)

    async def run_on(self, listener: socket.socket) -> None:
        """Answer requests until the process is told to stop and has drained."""
        await self._server.serve(sockets=[listener])

    @property
    def started(self) -> bool:
        """Whether it listens."""
        return bool(self._server.started)

    @property
    def draining(self) -> bool:
        """Whether it was told to stop."""
        return self._data_plane.draining

    @property
    def forced(self) -> bool:
        """Whether it was told to stop at once."""
        return bool(self._server.force_exit)

    def stop(self) -> None:
        """Begin to drain; called again: stop at once. Safe to call from a signal handler and from other threads."""
        self._server.stop()

    def _begin_drain(self) -> None:
        self._data_plane.draining = True

    def _around(self, app: ASGIApp, settings: ServeSettings, gate: Gate, tracing: Tracing | None) -> ASGIApp:
        """Wrap an application in what concerns every request; the innermost first."""
        app = _CloseWhileDraining(app, self._data_plane)
        if not gate.is_open:
            app = RequireAuth(app, gate, model_name=settings.name, protect_metrics=settings.protect_metrics)
        app = IdentifyRequests(app, access_log_sampling=settings.access_log_sampling)
        if tracing is not None:
            app = TraceRequests(app, tracing)
        return CountRequests(app)


class _CloseWhileDraining:
    """Ends connections with their next answer while the server drains, so that callers go to another one."""

    def __init__(self, app: ASGIApp, data_plane: RecommenderDataPlane) -> None:
        self._app = app
        self._data_plane = data_plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            # Asked now: the server may have been told to stop while this request was answered.
            if message["type"] == "http.response.start" and self._data_plane.draining:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, closing if scope["type"] == "http" else send)


class _DrainingServer(uvicorn.Server):
    """Goes on answering for a while after it is told to stop, and then lets requests in flight end.

    uvicorn by itself stops listening at once, and raises the signal again when it is done, which would end the process
    before the impressions are written.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        begin_drain: Callable[[], None],
        settings: ServeSettings,
        stop_others: Callable[[float], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(config)
        self._begin_drain = begin_drain
        self._drain_seconds = settings.drain_seconds
        self._grace_seconds = settings.grace_seconds
        self._stop_others = stop_others
        self._stop_at: float | None = None
        self._told = False

    def stop(self) -> None:
        # Nothing is logged here: a signal may come while the log is written to.
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._drain_seconds
            self._begin_drain()
        else:
            self.should_exit = self.force_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None and not self._told:
            self._told = True
            logger.info("told to stop: not ready from now on, answering for another %g s", self._drain_seconds)
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.gather(super().shutdown(sockets), self._stop_others(self._grace_seconds))
        while not ending.done() and not self.force_exit:
            await asyncio.wait([ending], timeout=_TICK_SECONDS)
        if not ending.done():
            logger.warning("told to stop at once: %d requests are cut off", len(self.server_state.tasks))
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # no stack trace for each of them
            ending.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            return
        ending.result()


def registry_of(name: str, model: Any, port: int) -> ModelRepository:
    """KServe's registry with one model in it."""
    import kserve

    server = kserve.ModelServer(http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False)
    server.register_model(model, name)
    return server.registered_models
