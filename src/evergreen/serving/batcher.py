"""Requests of many callers scored together: a GPU takes as long for one as for fifty, a CPU half as long for each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Histogram

from evergreen.models.split.request import PairColumns

Request: TypeAlias = tuple[Mapping[str, Any], Sequence[PairColumns], NDArray[np.int64]]
"""The arguments of `ManyScorer.score`."""

_REQUESTS = Histogram(
    "evergreen_score_batch_requests",
    "Requests that were scored together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)


class ManyScorer(Protocol):
    """What a batcher needs of `models.split.scorer.SplitScorer`; see there."""

    def score(
        self, user: Mapping[str, Any], pairs: Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(m,) probability or rating of each candidate."""

    def score_many(self, requests: Sequence[Request]) -> list[NDArray[np.float64]]:
        """The same of many requests."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request and who waits for its scores."""

    scorer: ManyScorer
    request: Request
    arrived: float
    future: asyncio.Future[NDArray[np.float64]]


class ScoreBatcher:
    """Collects the requests of a short while and scores them in one pass.

    While a batch is computed the next one gathers, so that batches grow with the load. To be used from one event loop.
    """

    def __init__(self, *, window_seconds: float = 0.002, max_pairs: int = 65_536, in_thread: bool = True) -> None:
        """Start the thread.

        Args:
            window_seconds: how long the first request of a batch waits for others; 0: until the event loop has looked
                at what is ready now.
            max_pairs: candidates of a batch, of all its requests together; a batch that has them waits no longer.
            in_thread: whether a thread of its own scores, as a GPU needs, which takes its time without the processor.
                Otherwise the event loop does: for small batches on a CPU, where the way to a thread costs more.
        """
        self._window = window_seconds
        self._max_pairs = max_pairs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score") if in_thread else None
        self._waiting: list[_Waiting] = []
        self._full = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    async def score(
        self, scorer: ManyScorer, user: Mapping[str, Any], pairs: Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(m,) what `scorer.score(user, pairs, rows)` gives, to within 1e-6; raises what that raises.

        Other requests do not come to know of this one's error, nor of its being cancelled.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(scorer, (user, pairs, rows), loop.time(), loop.create_future())
        self._waiting.append(waiting)
        if self._is_full():
            self._full.set()
        if self._draining is None or self._draining.done():
            self._draining = loop.create_task(self._drain())
        return await waiting.future

    async def close(self) -> None:
        """Wait until everybody has been answered, and end the thread."""
        if self._draining is not None:
            await self._draining
        if self._thread is not None:
            self._thread.shutdown()

    async def _drain(self) -> None:
        """Score batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            left = self._waiting[0].arrived + self._window - loop.time()
            if left > 0 and not self._is_full():
                self._full.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), left)
            if not (batch := self._take()):
                continue
            _REQUESTS.observe(len(batch))
            requests = [waiting.request for waiting in batch]
            results: Sequence[NDArray[np.float64] | Exception]
            try:
                if self._thread is None:
                    results = _scores(batch[0].scorer, requests)
                else:
                    results = await loop.run_in_executor(self._thread, _scores, batch[0].scorer, requests)
            except RuntimeError as error:  # the thread was ended: whoever comes now must not wait for ever
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.future.done():
                    continue
                if isinstance(result, Exception):
                    waiting.future.set_exception(result)
                else:
                    waiting.future.set_result(result)

    def _is_full(self) -> bool:
        return sum(len(waiting.request[2]) for waiting in self._waiting) >= self._max_pairs

    def _take(self) -> list[_Waiting]:
        """The next batch, oldest first: of one scorer, for a refresh makes another, and of those who still wait."""
        batch: list[_Waiting] = []
        later: list[_Waiting] = []
        num_pairs = 0
        for waiting in self._waiting:
            if waiting.future.done():
                continue
            size = len(waiting.request[2])
            if batch and (waiting.scorer is not batch[0].scorer or num_pairs + size > self._max_pairs):
                later.append(waiting)
            else:
                batch.append(waiting)
                num_pairs += size
        self._waiting = later
        return batch


def _scores(scorer: ManyScorer, requests: Sequence[Request]) -> list[NDArray[np.float64] | Exception]:
    """The scores of each request, or its error."""
    try:
        return [*scorer.score_many(requests)]
    except Exception:  # noqa: BLE001  (of one of them: alone, each gets its own)
        return [_alone(scorer, request) for request in requests]


def _alone(scorer: ManyScorer, request: Request) -> NDArray[np.float64] | Exception:
    try:
        return scorer.score(*request)
    except Exception as error:  # noqa: BLE001  (handed to who waits for it)
        return error
