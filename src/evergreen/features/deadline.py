"""A time limit for what is outside of the event loop."""

from __future__ import annotations

import asyncio
from types import TracebackType

# One to read the socket, one to wake who waits, and two for an answer that takes another turn, as of another task.
_LOOP_PASSES = 4


class store_deadline:  # noqa: N801  (a context manager, used like `asyncio.timeout`)
    """`asyncio.timeout`, but for what the store takes: not for what the event loop does meanwhile.

    While the loop computes another request's scores, an answer may lie in the socket longer than the deadline. So when
    the time is over, the loop first turns some times more, and reads what is there.
    """

    __slots__ = ("_seconds", "_timeout", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle = loop.call_later(self._seconds, self._turn, loop, _LOOP_PASSES)

    def _turn(self, loop: asyncio.AbstractEventLoop, left: int) -> None:
        if left:
            self._timer = loop.call_soon(self._turn, loop, left - 1)
        else:
            self._timeout.reschedule(loop.time())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)
