"""Who may ask: callers with a bearer token, or those whom an authenticating proxy names in a header.

Where both are asked for, both must be there: the token proves the proxy, the header names whom it speaks for. A header
alone is as good as the network policy that lets nobody but the proxy reach the server.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from evergreen.contracts.errors import InputError

MIN_TOKEN_LENGTH = 16

_PROBES = {"ServerLive", "ServerReady", "ModelReady"}


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """The tokens in a file, one a line; two while one takes the place of the other.

    Raises:
        InputError: the file cannot be read, or holds no token or one that is too short. Tells no token.
    """
    try:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"{path}: the tokens cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if line and (len(line) < MIN_TOKEN_LENGTH or not line.isascii() or b" " in line):
            raise InputError(
                f"{path}, line {number}: a token is {MIN_TOKEN_LENGTH} ASCII characters or more, without spaces; "
                "make one with: openssl rand -hex 32"
            )
    tokens = tuple(line for line in lines if line)
    if not tokens:
        raise InputError(f"{path}: no token in it; make one with: openssl rand -hex 32")
    return tokens


@dataclass(frozen=True)
class Gate:
    """What a caller must bring; nothing by default.

    Attributes:
        tokens: any of these as `Authorization: Bearer …`; empty: none is asked for.
        trusted_header: must be there once and not be empty; lower case.
    """

    tokens: tuple[bytes, ...] = ()
    trusted_header: bytes | None = None

    @classmethod
    def of(cls, token_file: Path | None, trusted_header: str | None) -> Gate:
        """The gate that settings ask for.

        Raises:
            InputError: see `read_tokens`.
        """
        header = trusted_header.lower().encode("ascii") if trusted_header else None
        return cls(read_tokens(token_file) if token_file else (), header)

    @property
    def is_open(self) -> bool:
        """Whether everyone may pass."""
        return not self.tokens and self.trusted_header is None

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a caller with these headers may pass. How long it takes tells nothing of the tokens."""
        given = named = None
        for name, value in headers:
            if name == b"authorization":
                if given is not None:
                    return False
                given = value
            elif name == self.trusted_header:
                if named is not None:
                    return False
                named = value
        if self.trusted_header is not None and not (named and named.strip()):
            return False
        if not self.tokens:
            return True
        scheme, _, token = (given or b"").partition(b" ")
        equal = [hmac.compare_digest(token.strip(), known) for known in self.tokens]
        return scheme.lower() == b"bearer" and any(equal)

    @property
    def asks_for(self) -> str:
        """For the answer to who may not pass."""
        parts = ["Authorization: Bearer <token>"] if self.tokens else []
        if self.trusted_header is not None:
            parts.append("the header of the authenticating proxy")
        return "send " + " and ".join(parts)


class RequireAuth:
    """Answers 401 to HTTP requests that the gate does not admit, but for probes; around an ASGI application."""

    def __init__(self, app: ASGIApp, gate: Gate, *, model_name: str, protect_metrics: bool = False) -> None:
        """Wrap an application.

        Args:
            app: that answers those who are admitted.
            gate: who is.
            model_name: whose readiness everyone may ask for.
            protect_metrics: whether /metrics is not for everyone.
        """
        self._app = app
        self._gate = gate
        self._open = {"/", "/v2/health/live", "/v2/health/ready", f"/v2/models/{model_name}/ready"}
        if not protect_metrics:
            self._open.add("/metrics")
        self._refusal = orjson.dumps({"error": f"unauthorized: {gate.asks_for}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or self._gate.admits(scope["headers"]) or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._refusal)).encode()),
            (b"www-authenticate", b'Bearer realm="evergreen"'),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": self._refusal})

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in self._open and scope["method"] in ("GET", "HEAD")


class RequireAuthCalls(grpc.aio.ServerInterceptor):
    """Ends gRPC calls that the gate does not admit as UNAUTHENTICATED, but for probes."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Hand on the call, or refuse it."""
        metadata = handler_call_details.invocation_metadata or ()
        headers = [(key.encode(), value.encode() if isinstance(value, str) else value) for key, value in metadata]
        method = handler_call_details.method.rpartition("/")[2]
        if method in _PROBES or self._gate.admits(headers):
            return await continuation(handler_call_details)

        async def refuse(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, self._gate.asks_for)

        return grpc.unary_unary_rpc_method_handler(refuse)
