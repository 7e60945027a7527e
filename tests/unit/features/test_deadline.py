"""A limit on how long others take, whatever this loop does meanwhile."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
import uvloop

from evergreen.features.deadline import store_deadline

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


def run(main: Callable[[], object], loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())  # type: ignore[arg-type]


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_what_takes_too_long_is_ended(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with store_deadline(0.01):
                await asyncio.sleep(60)
        async with store_deadline(0.01):
            pass
        await asyncio.sleep(0.05)  # a timer that is left behind would strike here

    run(main, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_caller_who_goes_away_is_not_taken_for_the_deadline(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def wait() -> None:
        async with store_deadline(60):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_answer_that_lies_in_the_socket_is_read_though_the_loop_was_busy(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=here)

        async def read() -> bytes:
            return await reader.readexactly(4)

        async def ask() -> bytes:
            async with store_deadline(0.02):
                return await asyncio.ensure_future(read())  # by another task, as a connection that is shared

        task = asyncio.ensure_future(ask())
        await asyncio.sleep(0)
        there.sendall(b"here")
        time.sleep(0.1)
        assert await task == b"here"
        writer.close()
        there.close()

    run(main, loop_factory)
