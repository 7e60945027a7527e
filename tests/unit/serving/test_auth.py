"""Who passes the gate: bearer tokens, a proxy's header, and probes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from evergreen.contracts.errors import InputError
from evergreen.serving.auth import Gate, RequireAuth, RequireAuthCalls, read_tokens

TOKEN, OTHER = b"0123456789abcdef-first", b"0123456789abcdef-second"


def bearer(token: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + token


def test_any_of_the_tokens_is_admitted() -> None:
    gate = Gate((TOKEN, OTHER))
    assert gate.admits([(b"host", b"h"), bearer(TOKEN)])
    assert gate.admits([bearer(OTHER)])
    assert gate.admits([(b"authorization", b"bearer  " + TOKEN)]), "the scheme is case-insensitive (RFC 9110)"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [bearer(b"")],
        [bearer(TOKEN[:-1])],
        [bearer(TOKEN + b"x")],
        [bearer(TOKEN.upper())],
        [bearer(b"\xff\xfe" * 8)],
        [(b"authorization", TOKEN)],
        [(b"authorization", b"Basic " + TOKEN)],
        [(b"x-authorization", b"Bearer " + TOKEN)],
        [bearer(b"wrong"), bearer(TOKEN)],  # which of two counts is for nobody to guess
        [bearer(TOKEN), bearer(TOKEN)],
    ],
)
def test_anything_but_one_right_token_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert not Gate((TOKEN, OTHER)).admits(headers)


def test_trusted_header_must_be_there_once_and_say_something() -> None:
    gate = Gate.of(None, "X-Forwarded-User")
    assert gate.admits([(b"x-forwarded-user", b"ada")])
    for headers in ([], [(b"x-forwarded-user", b" ")], [(b"x-forwarded-user", b"a"), (b"x-forwarded-user", b"b")]):
        assert not gate.admits(headers)


def test_token_and_header_are_both_needed_where_both_are_asked_for() -> None:
    gate = Gate((TOKEN,), b"x-user")
    assert gate.admits([bearer(TOKEN), (b"x-user", b"ada")])
    assert not gate.admits([bearer(TOKEN)])
    assert not gate.admits([(b"x-user", b"ada")])
    assert gate.asks_for == "send Authorization: Bearer <token> and the header of the authenticating proxy"


def test_nothing_asked_for_is_an_open_gate() -> None:
    assert Gate().is_open and Gate().admits([])
    assert not Gate((TOKEN,)).is_open and not Gate((), b"x-user").is_open


def test_token_file_holds_a_token_a_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(b"\n" + TOKEN + b"  \r\n\n" + OTHER)
    assert read_tokens(file) == (TOKEN, OTHER)


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", TOKEN + b"\nshort", b"two words of a token", "schlüssel-schlüssel".encode()]
)
def test_broken_token_file_is_refused_without_telling_a_token(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(InputError, match="openssl rand -hex 32") as caught:
        read_tokens(file)
    assert all(line.decode() not in str(caught.value) for line in content.splitlines() if line.strip())


def test_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: the tokens cannot be read: No such file"):
        read_tokens(tmp_path / "absent")


def app(gate: Gate, **options: Any) -> httpx.AsyncClient:
    async def tell(request: Request) -> PlainTextResponse:
        return PlainTextResponse("told")

    inner = Starlette(routes=[Route("/{path:path}", tell, methods=["GET", "POST"])])
    guarded = RequireAuth(inner, gate, model_name="evergreen", **options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test")


def statuses(client: httpx.AsyncClient, method: str, paths: list[str], **options: Any) -> list[int]:
    async def ask() -> list[int]:
        return [(await client.request(method, path, **options)).status_code for path in paths]

    return asyncio.run(ask())


PROBES = ["/", "/v2/health/live", "/v2/health/ready", "/v2/models/evergreen/ready"]
GUARDED = [
    "/v2/models/other/ready",
    "/v2",
    "/v2/models/evergreen",
    "/v1/models",
    "/openapi.json",
    "/v2/health/live/",
    "/metrics/",
]


def test_probes_are_open_and_all_else_is_not() -> None:
    client = app(Gate((TOKEN,)))
    assert statuses(client, "GET", [*PROBES, "/metrics"]) == [200] * 5
    assert statuses(client, "GET", GUARDED) == [401] * len(GUARDED)
    assert statuses(client, "POST", [*PROBES, "/v1/models/evergreen:predict"]) == [401] * 5
    assert statuses(client, "GET", GUARDED, headers=[bearer(TOKEN)]) == [200] * len(GUARDED)


def test_metrics_are_protected_when_that_is_wanted() -> None:
    client = app(Gate((TOKEN,)), protect_metrics=True)
    assert statuses(client, "GET", ["/metrics"]) == [401]
    assert statuses(client, "GET", ["/metrics"], headers=[bearer(TOKEN)]) == [200]


def test_refusal_says_what_to_send() -> None:
    async def ask() -> httpx.Response:
        return await app(Gate((TOKEN,))).post("/v1/models/evergreen:predict", json={}, headers=[bearer(b"wrong")])

    response = asyncio.run(ask())
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json() == {"error": "unauthorized: send Authorization: Bearer <token>"}


@pytest.fixture
def call() -> Callable[..., grpc.StatusCode]:
    """Calls a method of a real gRPC server with a gate; the status of the answer."""

    async def run(gate: Gate, method: str, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
        async def echo(request: bytes, context: Any) -> bytes:
            return request

        handlers = {name: grpc.unary_unary_rpc_method_handler(echo) for name in ("ModelInfer", "ServerReady")}
        server = grpc.aio.server(interceptors=[RequireAuthCalls(gate)])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                try:
                    assert await ask(b"x", metadata=metadata) == b"x"
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK
        finally:
            await server.stop(0)

    return lambda *arguments: asyncio.run(run(*arguments))


def test_grpc_asks_for_the_same(call: Callable[..., grpc.StatusCode]) -> None:
    gate = Gate((TOKEN,))
    good = (("authorization", f"Bearer {TOKEN.decode()}"),)
    assert call(gate, "ModelInfer", good) is grpc.StatusCode.OK
    assert call(gate, "ModelInfer", ()) is grpc.StatusCode.UNAUTHENTICATED
    assert call(gate, "ModelInfer", (("authorization", "Bearer wrong"),)) is grpc.StatusCode.UNAUTHENTICATED
    assert call(gate, "ServerReady", ()) is grpc.StatusCode.OK
