"""Log lines for people or for machines, and the request that each belongs to. No request writes one by default."""

from __future__ import annotations

import logging
import logging.config
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Literal

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogFormat = Literal["text", "json"]

_HEADER = b"x-request-id"
# It goes into the log and back to the caller: nothing that could end a line or hide in one.
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")

access_logger = logging.getLogger("evergreen.serving.access")


class _CallId:
    """A call's id, made only for the few calls that are spoken of. Threads that work for the call share it."""

    __slots__ = ("id",)

    def __init__(self, given: object) -> None:
        self.id = given if isinstance(given, str) and _PRINTABLE.fullmatch(given) else ""


_CALL: ContextVar[_CallId | None] = ContextVar("evergreen_call", default=None)


def request_id() -> str:
    """Id of the call that is being answered: its X-Request-ID, or a new one that stays; "" outside of any call."""
    call = _CALL.get()
    if call is None:
        return ""
    if not call.id:
        call.id = uuid.uuid4().hex
    return call.id


def configure_logging(log_format: LogFormat = "text") -> None:
    """Log to standard error: Evergreen from INFO on, libraries from WARNING on.

    Args:
        log_format: "text" for bare messages, "json" for a JSON object a line, with time, level, logger, message,
            request_id, trace_id and, where there is one, exc_info.
    """
    formatters: dict[LogFormat, dict[str, Any]] = {
        "text": {"format": "%(message)s"},
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": ["levelname", "name", "message"],
            "rename_fields": {"levelname": "level", "name": "logger"},
            "timestamp": "time",
        },
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"chosen": formatters[log_format]},
            "filters": {"request": {"()": RequestFields}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "chosen", "filters": ["request"]},
            },
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {"evergreen": {"level": "INFO", "propagate": True}},  # a pipeline step has it off
        }
    )


def quiet_libraries() -> None:
    """Have KServe and uvicorn say no more than warnings, through the handlers of the root logger.

    By itself KServe writes several lines a request, which cost 0.2 ms, and a stack trace for each mistake of a caller.
    """
    for name in ("kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").propagate = False  # with a handler in reach, uvicorn makes a line each time
    logging.getLogger("kserve").addHandler(logging.NullHandler())  # without any, kserve would install its own


class RequestFields(logging.Filter):
    """Gives log records the request_id and trace_id of the call that they are about, where there is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        from evergreen.serving.tracing import trace_id

        for name, value in (("request_id", request_id()), ("trace_id", trace_id())):
            if value and not hasattr(record, name):
                setattr(record, name, value)
        return True


class IdentifyRequests:
    """Gives each HTTP request its id, and some a line in the log; around an ASGI application."""

    def __init__(self, app: ASGIApp, *, access_log_sampling: float = 0.0) -> None:
        """Wrap an application.

        Args:
            app: that answers.
            access_log_sampling: share of requests that are logged, in [0, 1].
        """
        self._app = app
        self._sampling = access_log_sampling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        _CALL.set(_CallId(given.decode("latin-1")))
        if self._sampling and random.random() < self._sampling:
            await self._logged(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _logged(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = None
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            milliseconds = round(1000 * (time.perf_counter() - started), 3)
            # The path as it was sent: decoded, it could hold a line break.
            path = scope.get("raw_path", b"").decode("latin-1")
            fields = {"method": scope["method"], "path": path, "status": status, "milliseconds": milliseconds}
            request_id()  # so that the line has one
            access_logger.info("%s %s %s %s ms", *fields.values(), extra=fields)


class IdentifyCalls(grpc.aio.ServerInterceptor):
    """Gives each gRPC call its id."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Set the id; the call's handler runs in the same context."""
        given = dict(handler_call_details.invocation_metadata or ()).get(_HEADER.decode(), "")
        _CALL.set(_CallId(given))
        return await continuation(handler_call_details)
