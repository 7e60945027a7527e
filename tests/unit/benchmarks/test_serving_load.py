"""The load generator counts what it sends, and reads what comes back however it is cut."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from benchmarks.serving.load import NO_ANSWER, Connection, Reply, ask, closed_loop, http_request, sequential

Handler = Callable[[bytes, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextmanager
def server(handler: Handler) -> Iterator[int]:
    """An HTTP server of a few lines in a thread; the handler gets each body and writes the answer."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await handler(await reader.readexactly(length), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    listening = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()


def answer(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def echo(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(body))


REQUESTS = [http_request("/", f"request {n}".encode()) for n in range(7)]


def test_every_request_is_sent_in_turn_and_no_more_than_asked() -> None:
    seen: list[bytes] = []

    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(body)
        await echo(body, writer)

    with server(handler) as port:
        measured = closed_loop(port, REQUESTS, clients=3, number=20)
        assert sorted(seen) == sorted(f"request {n % 7}".encode() for n in range(20))
        seen.clear()
        one = sequential(port, REQUESTS, 9)
        assert seen == [f"request {n % 7}".encode() for n in range(9)]
    assert (len(measured.seconds), measured.failures) == (20, 0)
    assert (len(one.seconds), one.failures) == (9, 0)


def test_answer_in_pieces_is_read_whole() -> None:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        whole = answer(body * 100)
        for place in range(0, len(whole), 37):
            writer.write(whole[place : place + 37])
            await writer.drain()
            await asyncio.sleep(0)

    async def send(port: int) -> list[Reply]:
        connection = await Connection.open("127.0.0.1", port)
        replies = [await connection.send(request) for request in REQUESTS]
        connection.close()
        return replies

    with server(handler) as port:
        assert [reply.body for reply in uvloop.run(send(port))] == [f"request {n}".encode() * 100 for n in range(7)]
        assert ask(port, REQUESTS[3]).body == b"request 3" * 100


def test_status_and_marker_are_told_of_each_answer() -> None:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(body, 503 if body.endswith(b"3") else 200))

    with server(handler) as port:
        measured = closed_loop(port, REQUESTS, number=7, marker=b"request 5")
        assert ask(port, REQUESTS[3]).status == 503
    assert measured.status.tolist() == [200, 200, 200, 503, 200, 200, 200]
    assert measured.marked.tolist() == [n == 5 for n in range(7)]
    assert measured.failures == 1
    assert measured.refused[0].body == b"request 3"


def test_server_that_hangs_up_is_a_failure_and_is_asked_again() -> None:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        if body.endswith(b"2"):
            writer.close()
        else:
            await echo(body, writer)

    with server(handler) as port:
        measured = closed_loop(port, REQUESTS, number=7)
    assert measured.status.tolist() == [200, 200, NO_ANSWER, 200, 200, 200, 200]


def test_nobody_listening_is_a_failure() -> None:
    with server(echo) as port:
        pass
    assert closed_loop(port, REQUESTS, number=3).failures == 3


def test_answer_without_a_length_ends_with_its_connection() -> None:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\nInvalid")
        writer.close()

    async def send(port: int) -> Reply:
        return await (await Connection.open("127.0.0.1", port)).send(REQUESTS[0])

    with server(handler) as port:
        reply = uvloop.run(send(port))
    assert (reply.status, reply.body) == (400, b"Invalid")


def test_load_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="give number or seconds"):
        closed_loop(1, REQUESTS)
