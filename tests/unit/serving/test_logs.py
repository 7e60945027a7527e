"""Log lines: for machines as JSON, with the request that they are about, and none for a request by default."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from evergreen.serving.logs import IdentifyCalls, IdentifyRequests, configure_logging, quiet_libraries, request_id

LIBRARIES = ("kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Configures logging to a buffer, and puts everything back."""
    loggers = [logging.getLogger(name) for name in ("", "evergreen", *LIBRARIES)]
    before = [(log, log.level, log.propagate, list(log.handlers), list(log.filters)) for log in loggers]
    buffer = io.StringIO()

    def configure(log_format: Any) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", buffer)
        configure_logging(log_format)
        return buffer

    yield configure
    for log, level, propagate, handlers, filters in before:
        log.setLevel(level)
        log.propagate, log.handlers, log.filters = propagate, handlers, filters


async def nothing(*_: Any) -> Any:
    return None


def http(app: ASGIApp, headers: tuple[tuple[bytes, bytes], ...] = (), path: bytes = b"/v1/models") -> None:
    scope = {"type": "http", "method": "GET", "path": path.decode(), "raw_path": path, "headers": headers}
    asyncio.run(app(scope, nothing, nothing))  # type: ignore[arg-type]


def app_that(does: Callable[[], Any]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        does()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return app


def test_json_lines_hold_the_message_and_the_request(lines: Callable[..., io.StringIO]) -> None:
    buffer = lines("json")
    log = logging.getLogger("evergreen.serving.test")
    log.info("loading %s", "m\nn")
    http(IdentifyRequests(app_that(lambda: log.error("lost"))), ((b"x-request-id", b"r-1"),))
    first, second = (json.loads(line) for line in buffer.getvalue().splitlines())
    assert first.pop("time") and second.pop("time")
    assert first == {"level": "INFO", "logger": "evergreen.serving.test", "message": "loading m\nn"}
    assert second == {"level": "ERROR", "logger": "evergreen.serving.test", "message": "lost", "request_id": "r-1"}


def test_json_line_of_an_error_holds_its_stack(lines: Callable[..., io.StringIO]) -> None:
    buffer = lines("json")
    try:
        raise ValueError("half a pair: \ud800")
    except ValueError:
        logging.getLogger("evergreen").exception("failed")
    (line,) = buffer.getvalue().splitlines()
    assert "ValueError: half a pair" in json.loads(line)["exc_info"]


def test_text_lines_are_the_bare_message_whoever_set_logging_up_before(lines: Callable[..., io.StringIO]) -> None:
    logging.getLogger("evergreen").propagate = False  # as pipeline_step leaves it
    buffer = lines("text")
    logging.getLogger("evergreen.serving").info("serving")
    logging.getLogger("some.library").info("chatter")
    assert buffer.getvalue() == "serving\n"


def test_libraries_say_warnings_only(lines: Callable[..., io.StringIO]) -> None:
    buffer = lines("text")
    quiet_libraries()
    for name in LIBRARIES:
        logging.getLogger(name).info("chatter")
    logging.getLogger("kserve").warning("careful")
    assert buffer.getvalue() == "careful\n"
    assert not logging.getLogger("uvicorn.access").hasHandlers(), "uvicorn would make up a line for each request"


def seen_id(*headers: bytes) -> str:
    seen: list[str] = []
    http(
        IdentifyRequests(app_that(lambda: seen.extend([request_id(), request_id()]))),
        tuple((b"x-request-id", header) for header in headers),
    )
    assert seen[0] == seen[1], "the id stays"
    return seen[0]


def test_request_keeps_the_id_that_it_brings() -> None:
    assert seen_id(b"abc-123") == "abc-123"


@pytest.mark.parametrize("given", [b"", b"two words", b"line\nbreak", b"\xe9t\xe9", b"x" * 129])
def test_request_without_a_clean_id_gets_a_new_one(given: bytes) -> None:
    first, second = seen_id(given), seen_id()
    assert len(first) == len(second) == 32 and first != second


def test_outside_of_requests_there_is_no_id() -> None:
    assert request_id() == ""


def test_requests_are_logged_when_they_are_sampled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="evergreen.serving.access")
    http(IdentifyRequests(app_that(lambda: None)), path=b"/a")
    assert not caplog.records
    http(IdentifyRequests(app_that(lambda: None), access_log_sampling=1), path=b"/v2%0Aforged")
    (record,) = caplog.records
    assert record.getMessage().startswith("GET /v2%0Aforged 200 ")
    assert record.status == 200 and record.milliseconds >= 0  # type: ignore[attr-defined]


def test_grpc_call_keeps_the_id_that_it_brings() -> None:
    async def run() -> list[str]:
        async def tell(request: bytes, context: Any) -> bytes:
            return request_id().encode()

        server = grpc.aio.server(interceptors=[IdentifyCalls()])
        handlers = {"Tell": grpc.unary_unary_rpc_method_handler(tell)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary("/test/Tell")
            answers = [await ask(b"", metadata=(("x-request-id", "r-2"),)), await ask(b"")]
        await server.stop(0)
        return [answer.decode() for answer in answers]

    given, made = asyncio.run(run())
    assert given == "r-2" and len(made) == 32
