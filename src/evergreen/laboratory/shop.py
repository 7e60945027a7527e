"""What the people of a world ask: the model that a loop has released, in process or over HTTP, with its impression log.

Both give the same answers. In process nothing is sent, which many worlds need; over HTTP it is KServe's protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import httpx

from evergreen.contracts.loop_state import LoopState
from evergreen.serving.impression_sinks import open_sink
from evergreen.serving.impressions import ImpressionLog
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest
from evergreen.serving.server import opener, serving_in_background
from evergreen.serving.settings import ServeSettings
from evergreen.simulator.asking import Ask, Recommend, Served
from evergreen.simulator.served_model import ServedModel

_DEADLINE_SECONDS = 20.0
"""A laboratory waits for its features: a busy machine must not make answers of defaults."""


class Shop(Protocol):
    """Answers the pages of a day."""

    def open(self) -> AbstractContextManager[Recommend]:
        """Answer for one day, with the model and the features that are there in the morning; then all is logged."""
        ...


class InProcess:
    """The recommender without a server."""

    def __init__(self, state: LoopState, impressions: Path) -> None:
        self._state, self._impressions = state, impressions

    @contextmanager
    def open(self) -> Iterator[Recommend]:
        """See `Shop.open`."""
        with ImpressionLog(open_sink(str(self._impressions))) as log, asyncio.Runner() as runner:
            recommender = Recommender.load(
                self._state.releases / "current",
                self._state.feature_store,
                deadline_seconds=_DEADLINE_SECONDS,
                impressions=log,
            )

            def recommend(asks: Sequence[Ask], /) -> list[Served]:
                requests = [RankingRequest.model_validate(ask.instance()) for ask in asks]
                return [
                    Served(answer.request_id, tuple(answer.item_ids or ()), answer.model_version, answer.degraded)
                    for answer in runner.run(recommender.answer(requests))
                ]

            try:
                yield recommend
            finally:
                runner.run(recommender.close())


class OverHttp:
    """A server for every day, in a thread, asked over KServe's V1 protocol."""

    def __init__(self, state: LoopState, impressions: Path) -> None:
        self._state, self._impressions = state, impressions

    @contextmanager
    def open(self) -> Iterator[Recommend]:
        """See `Shop.open`."""
        with (
            ImpressionLog(open_sink(str(self._impressions))) as log,
            serving(self._state.releases / "current", self._state.feature_store, log) as url,
            ServedModel(url) as recommend,
        ):
            yield recommend


ShopMaker = Callable[[LoopState, Path], Shop]


@contextmanager
def serving(package: Path, feature_store: Path, impressions: ImpressionLog | None = None) -> Iterator[str]:
    """The URL of a server of a package, on a free port of this machine, until the block ends."""
    settings = ServeSettings.of(
        model=package,
        feature_store=feature_store,
        host="127.0.0.1",
        port=0,
        deadline_ms=_DEADLINE_SECONDS * 1000,
    )
    with serving_in_background(settings, opener(settings, None, impressions)) as server:
        yield server.url


@contextmanager
def client(package: Path, feature_store: Path) -> Iterator[httpx.Client]:
    """Likewise, a client of it: for a canary, whose questions nobody asked and no log must hold."""
    with serving(package, feature_store) as url, httpx.Client(base_url=url, trust_env=False) as http:
        yield http
