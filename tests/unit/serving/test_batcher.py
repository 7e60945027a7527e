"""Requests that are scored together do not come to know of each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.models.split.scorer import SplitScorer
from evergreen.serving.batcher import ScoreBatcher
from tests.unit.models.small_package import Request, make_package

Arguments = tuple[dict[str, Any], Any, NDArray[np.int64]]


@pytest.fixture(scope="module")
def scorer() -> SplitScorer:
    return SplitScorer.prepare(make_package("deepfm"), Request.make(0).items)


def some_requests(count: int) -> list[Arguments]:
    made = [Request.make(seed, num_pairs=20 + seed).arguments for seed in range(count)]
    return [(user.to_pylist()[0], pairs, rows) for user, pairs, rows in made]


class Recording:
    """A scorer that tells what it was asked, and can be held up."""

    def __init__(self, scorer: SplitScorer) -> None:
        self._scorer = scorer
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.may_go = threading.Event()
        self.may_go.set()

    def score(self, *request: Any) -> NDArray[np.float64]:
        return self._scorer.score(*request)

    def score_many(self, requests: Any) -> list[NDArray[np.float64]]:
        self.batches.append(len(requests))
        self.threads.add(threading.current_thread().name)
        assert self.may_go.wait(20)
        return self._scorer.score_many(requests)


def run(use: Callable[[ScoreBatcher], Awaitable[None]], **settings: Any) -> None:
    """Use a batcher in an event loop, and close it."""

    async def main() -> None:
        batcher = ScoreBatcher(**settings)
        await use(batcher)
        await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_requests_of_a_window_are_scored_in_one_pass_beside_the_event_loop(scorer: SplitScorer) -> None:
    requests, recording = some_requests(6), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        scores = await asyncio.gather(*(batcher.score(recording, *request) for request in requests))
        for request, own in zip(requests, scores, strict=True):
            np.testing.assert_allclose(own, scorer.score(*request), atol=1e-6)

    run(use)
    assert recording.batches == [6]
    assert threading.current_thread().name not in recording.threads


def test_without_a_thread_what_is_ready_at_once_is_scored_in_the_event_loop(scorer: SplitScorer) -> None:
    requests, recording = some_requests(5), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        scores = await asyncio.gather(*(batcher.score(recording, *request) for request in requests))
        for request, own in zip(requests, scores, strict=True):
            np.testing.assert_allclose(own, scorer.score(*request), atol=1e-6)
        await batcher.score(recording, *requests[0])

    run(use, window_seconds=0, in_thread=False)
    assert recording.batches == [5, 1]
    assert recording.threads == {threading.current_thread().name}


def test_error_reaches_only_the_request_that_caused_it(scorer: SplitScorer) -> None:
    requests = some_requests(5)
    del requests[1][0]["device"]
    requests[3][2][0] = 99

    async def use(batcher: ScoreBatcher) -> None:
        results = await asyncio.gather(
            *(batcher.score(scorer, *request) for request in requests), return_exceptions=True
        )
        assert isinstance(results[1], ArtifactError)
        assert "device" in str(results[1])
        assert isinstance(results[3], ValueError)
        assert "99" in str(results[3])
        for place in (0, 2, 4):
            np.testing.assert_allclose(results[place], scorer.score(*requests[place]), atol=1e-6)

    run(use)


def test_cancelled_request_takes_no_part_and_leaves_the_others_alone(scorer: SplitScorer) -> None:
    requests, recording = some_requests(3), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        tasks = [asyncio.create_task(batcher.score(recording, *request)) for request in requests]
        await asyncio.sleep(0)
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        for place in (0, 2):
            np.testing.assert_allclose(results[place], scorer.score(*requests[place]), atol=1e-6)

    run(use)
    assert recording.batches == [2]


def test_request_cancelled_while_it_is_computed_leaves_the_others_alone(scorer: SplitScorer) -> None:
    requests, recording = some_requests(2), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        recording.may_go.clear()
        tasks = [asyncio.create_task(batcher.score(recording, *request)) for request in requests]
        while not recording.batches:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0)
        recording.may_go.set()
        np.testing.assert_allclose(await tasks[1], scorer.score(*requests[1]), atol=1e-6)
        assert tasks[0].cancelled()

    run(use)


def test_requests_to_the_scorer_before_a_refresh_are_not_mixed_with_those_after(scorer: SplitScorer) -> None:
    requests = some_requests(5)
    before, after = Recording(scorer), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        of = [before, after, before, after, after]
        scores = await asyncio.gather(*(batcher.score(s, *r) for s, r in zip(of, requests, strict=True)))
        for request, own in zip(requests, scores, strict=True):
            np.testing.assert_allclose(own, scorer.score(*request), atol=1e-6)

    run(use)
    assert (before.batches, after.batches) == ([2], [3])


def test_full_batch_does_not_wait_for_the_window(scorer: SplitScorer) -> None:
    requests, recording = some_requests(4), Recording(scorer)  # of 20, 21, 22 and 23 candidates

    async def use(batcher: ScoreBatcher) -> None:
        await asyncio.gather(*(batcher.score(recording, *request) for request in requests[:2]))

    run(use, window_seconds=3600, max_pairs=41)
    assert recording.batches == [2]
    run(use, window_seconds=3600, max_pairs=5)  # more than a batch may hold: alone
    assert recording.batches[1:] == [1, 1]


def test_what_comes_while_a_batch_is_computed_is_the_next_batch(scorer: SplitScorer) -> None:
    requests, recording = some_requests(9), Recording(scorer)

    async def use(batcher: ScoreBatcher) -> None:
        recording.may_go.clear()
        tasks = [asyncio.create_task(batcher.score(recording, *requests[0]))]
        while not recording.batches:
            await asyncio.sleep(0.001)
        for request in requests[1:]:
            tasks.append(asyncio.create_task(batcher.score(recording, *request)))
            await asyncio.sleep(0.001)
        recording.may_go.set()
        await asyncio.gather(*tasks)

    run(use, window_seconds=0)
    assert recording.batches == [1, 8]


def test_closing_answers_those_who_wait_and_refuses_those_who_come_later(scorer: SplitScorer) -> None:
    requests = some_requests(2)

    async def main() -> None:
        batcher = ScoreBatcher()
        waiting = asyncio.create_task(batcher.score(scorer, *requests[0]))
        await asyncio.sleep(0)
        await batcher.close()
        np.testing.assert_allclose(await waiting, scorer.score(*requests[0]), atol=1e-6)
        with pytest.raises(RuntimeError, match="shutdown"):
            await batcher.score(scorer, *requests[1])

    asyncio.run(asyncio.wait_for(main(), 30))
