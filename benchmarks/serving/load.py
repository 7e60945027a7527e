"""A load generator: kept-alive connections, requests written beforehand, answers read without a client library.

    python -m benchmarks.serving.load --port 8080 --bodies FILE --clients 8 --seconds 10

Closed loop: each client sends its next request when its last one was answered. FILE holds a V1 body a line. One client
is a blocking socket (`sequential`), which adds about 30 µs to a request; several are connections of one event loop
(`closed_loop`), about 40 µs of the generator's CPU a request. On two cores the server is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

MODEL_NAME = "evergreen"
"""Of the served model, in the URL."""

V1_PATH = f"/v1/models/{MODEL_NAME}:predict"
V2_PATH = f"/v2/models/{MODEL_NAME}/infer"
NO_ANSWER = 0
"""Status of a request whose connection was closed or refused, or that was not answered in time."""

ANSWER_SECONDS = 60.0


def http_request(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST."""
    lines = {"Host": "benchmark", "Content-Type": "application/json", **(headers or {}), "Content-Length": len(body)}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


@dataclass(frozen=True)
class Reply:
    """What came back for one request."""

    status: int
    body: bytes
    head: bytes = b""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._body_starts = -1
        self._end = -1
        self._reply: asyncio.Future[Reply] | None = None
        self.closed = False

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect.

        Raises:
            OSError: nobody listens.
        """
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes) -> asyncio.Future[Reply]:
        """Send a request; the future is its answer, with status NO_ANSWER when the server hangs up."""
        self._reply = asyncio.get_running_loop().create_future()
        if self.closed:
            self._reply.set_result(Reply(NO_ANSWER, b""))
        else:
            self._transport.write(request)
        return self._reply

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if self._body_starts < 0:
            if (end := self._buffer.find(b"\r\n\r\n")) < 0:
                return
            self._body_starts = end + 4
            length = header_number(self._buffer[:end], b"content-length")
            self._end = -1 if length is None else self._body_starts + length
        if 0 <= self._end <= len(self._buffer):
            self._done()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._reply is None or self._reply.done():
            return
        if self._body_starts >= 0 and self._end < 0 and error is None:  # the end of the connection is that of the body
            self._done()
        else:
            self._reply.set_result(Reply(NO_ANSWER, b""))

    def _done(self) -> None:
        reply, self._reply = self._reply, None
        buffer, start = self._buffer, self._body_starts
        self._buffer, self._body_starts, self._end = b"", -1, -1
        head = buffer[: start - 4]
        if b"\r\nconnection: close" in head.lower():
            self.closed = True
            self._transport.close()
        if reply is not None and not reply.done():
            reply.set_result(Reply(int(buffer[9:12]), buffer[start:], head))


def header_number(head: bytes, name: bytes) -> int | None:
    """The number in a header, None where it is absent.

    Raises:
        ValueError: the answer comes in chunks, which a server of ours does not send.
    """
    lower = head.lower()
    if b"\r\ntransfer-encoding:" in lower:
        raise ValueError("the answer comes in chunks: this generator reads bodies with a Content-Length")
    place = lower.find(b"\r\n" + name + b":")
    return None if place < 0 else int(lower[place + len(name) + 3 :].split(b"\r\n", 1)[0])


@dataclass(frozen=True)
class Measured:
    """What a load saw.

    Attributes:
        started: (n,) seconds on the monotonic clock when each request was sent.
        seconds: (n,) until its answer was there.
        status: (n,) HTTP status, or NO_ANSWER.
        marked: (n,) whether the marker was in the body.
        wall_seconds: of the whole load.
        client_cpu_seconds: of this process during it.
        refused: the first answers that were not 200.
    """

    started: NDArray[np.float64]
    seconds: NDArray[np.float64]
    status: NDArray[np.int64]
    marked: NDArray[np.bool_]
    wall_seconds: float
    client_cpu_seconds: float
    refused: tuple[Reply, ...]

    @property
    def failures(self) -> int:
        """Requests that were not answered with 200."""
        return int((self.status != 200).sum())

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.wall_seconds

    def percentile_ms(self, q: float) -> float:
        """Of the latency, in milliseconds."""
        return float(np.percentile(self.seconds, q) * 1e3)


def sequential(port: int, requests: Sequence[bytes], number: int) -> Measured:
    """One client, one request after the other, with as little between the clock and the server as Python has.

    Args:
        port: of the server, on the loopback address.
        requests: bytes of whole HTTP requests, sent in turn, again and again.
        number: how many to send.

    Raises:
        OSError: the server cannot be reached, or hangs up.
    """
    started, seconds, status = np.empty(number), np.empty(number), np.empty(number, np.int64)
    refused: list[Reply] = []
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun, cpu = time.perf_counter(), time.process_time()
        for place in range(number):
            request = requests[place % len(requests)]
            started[place] = time.perf_counter()
            connection.sendall(request)
            reply = _read(connection)
            seconds[place] = time.perf_counter() - started[place]
            status[place] = reply.status
            if reply.status != 200 and len(refused) < 5:
                refused.append(reply)
        wall, spent = time.perf_counter() - begun, time.process_time() - cpu
    return Measured(started, seconds, status, np.zeros(number, np.bool_), wall, spent, tuple(refused))


def ask(port: int, request: bytes) -> Reply:
    """One request on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(request)
        return _read(connection)


def _read(connection: socket.socket) -> Reply:
    """One answer that has a Content-Length."""
    data = _receive(connection)
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _receive(connection)
    length = header_number(data[:end], b"content-length")
    if length is None:
        raise ConnectionError(f"an answer without a Content-Length: {data[:end]!r}")
    parts, missing = [data[end + 4 :]], length - (len(data) - end - 4)
    while missing > 0:
        parts.append(_receive(connection))
        missing -= len(parts[-1])
    return Reply(int(data[9:12]), b"".join(parts), data[:end])


def _receive(connection: socket.socket) -> bytes:
    if not (data := connection.recv(262_144)):
        raise ConnectionError("the server hung up")
    return data


def closed_loop(
    port: int,
    requests: Sequence[bytes],
    *,
    clients: int = 1,
    number: int | None = None,
    seconds: float | None = None,
    marker: bytes | None = None,
) -> Measured:
    """Send requests and measure the answers.

    Args:
        port: of the server, on the loopback address.
        requests: bytes of whole HTTP requests, sent in turn, again and again.
        clients: connections.
        number: requests to send at most; None: no limit.
        seconds: after this time no request is sent; None: no limit.
        marker: bytes to look for in each body.
    """
    return uvloop.run(run_load(port, requests, clients=clients, number=number, seconds=seconds, marker=marker))


async def run_load(
    port: int,
    requests: Sequence[bytes],
    *,
    clients: int = 1,
    number: int | None = None,
    seconds: float | None = None,
    marker: bytes | None = None,
) -> Measured:
    """`closed_loop` within a running event loop."""
    if number is None and seconds is None:
        raise ValueError("a load without end: give number or seconds")
    begun, cpu = time.perf_counter(), time.process_time()
    until = float("inf") if seconds is None else begun + seconds
    turn: Iterator[int] = count() if number is None else iter(range(number))
    rows: list[tuple[float, float, int, bool]] = []
    refused: list[Reply] = []

    async def client() -> None:
        connection: Connection | None = None
        for place in turn:
            started = time.perf_counter()
            if started >= until:
                break
            try:
                if connection is None or connection.closed:
                    connection = await Connection.open("127.0.0.1", port)
                reply = await asyncio.wait_for(connection.send(requests[place % len(requests)]), ANSWER_SECONDS)
            except (OSError, TimeoutError) as error:
                reply = Reply(NO_ANSWER, str(error).encode())
                if connection is not None:
                    connection.close()
                    connection = None
                await asyncio.sleep(0.01)  # whoever is refused at once would otherwise ask without end
            rows.append(
                (started, time.perf_counter() - started, reply.status, marker is not None and marker in reply.body)
            )
            if reply.status != 200 and len(refused) < 5:
                refused.append(reply)
        if connection is not None:
            connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    wall, spent = time.perf_counter() - begun, time.process_time() - cpu
    columns = np.array(rows).reshape(-1, 4).T
    return Measured(
        started=columns[0],
        seconds=columns[1],
        status=columns[2].astype(np.int64),
        marked=columns[3].astype(np.bool_),
        wall_seconds=wall,
        client_cpu_seconds=spent,
        refused=tuple(refused),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bodies", type=Path, required=True)
    parser.add_argument("--path", default=V1_PATH)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    requests = [http_request(arguments.path, line) for line in arguments.bodies.read_bytes().splitlines()]
    measured = closed_loop(arguments.port, requests, clients=arguments.clients, seconds=arguments.seconds)
    print(
        f"{len(measured.seconds):,} requests, {measured.failures:,} failed, {measured.per_second:,.0f} a second; "
        f"p50 {measured.percentile_ms(50):.2f} ms, p99 {measured.percentile_ms(99):.2f} ms; "
        f"client {measured.client_cpu_seconds / len(measured.seconds) * 1e6:.0f} µs of CPU a request"
    )


if __name__ == "__main__":
    main()
