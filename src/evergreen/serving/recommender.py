"""From requests to their answers, without a server around it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError, EvergreenError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.mapping import Mapping as LogMapping
from evergreen.features.items_file import read_items
from evergreen.features.online_user import OnlineUser
from evergreen.models.split.request import PairColumns
from evergreen.serving import metrics
from evergreen.serving.answer import Answer
from evergreen.serving.impressions import ImpressionLog, PairValues, Rows, Source
from evergreen.serving.items import BuildIndex, Index, ItemSource, ItemTable, PrepareScorer
from evergreen.serving.ranker import Package, Places, Ranker
from evergreen.serving.rules import BLOCKED, SEEN, AnswerRules, Candidates, best_first
from evergreen.serving.schema import DEFAULT_K, RankingRequest
from evergreen.serving.stages import Stage, timed
from evergreen.serving.validation import RequestRules

if TYPE_CHECKING:
    from evergreen.features.online_reader import OnlineReader
    from evergreen.features.store import FeatureStore

RETRIEVED = 500
"""Candidates that are ranked of a large catalogue."""
EXACT_BELOW = 2000
"""Up to this many items all are ranked: no index finds better candidates than that."""

_INLINE_PAIRS = 5000  # with more, a call is computed beside the event loop, which answers the health checks
_NO_ROWS = np.empty(0, np.int64)
_HISTORIES = ("user_history", "user_recent_items")

logger = logging.getLogger(__name__)


def wall_clock() -> datetime:
    """Now. The one clock in Evergreen: a request without a time of its own is asked now."""
    return datetime.now(UTC)


class Users(Protocol):
    """What a recommender needs of `serving.users.UserFeatures`; see there."""

    @property
    def user_features(self) -> tuple[str, ...]:
        """What it knows of a user."""

    @property
    def pair_features(self) -> tuple[str, ...]:
        """What it knows of a user and a category."""

    def nobody(self, num_categories: int) -> OnlineUser:
        """A user of whom nothing is known."""

    async def get(self, asked: Sequence[tuple[str, Sequence[str]]]) -> tuple[Sequence[OnlineUser], bool]:
        """The users, and whether defaults stand for them."""

    async def close(self) -> None:
        """Close the connections."""


class Batcher(Protocol):
    """What a recommender needs of `serving.batcher.ScoreBatcher`; see there."""

    async def score(
        self, scorer: Any, user: Mapping[str, Any], pairs: Sequence[PairColumns], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The scores of one request, computed together with those of others."""

    async def close(self) -> None:
        """Score what waits, and stop."""


class _Catalogue(NamedTuple):
    """What is swapped in one assignment."""

    items: ItemTable
    blocked: NDArray[np.int64]  # rows of items that are never shown


class OnlineItems:
    """Items from a feature store: which there are from its folder, their features from the online store."""

    def __init__(self, store: FeatureStore, reader: OnlineReader, items_url: str | None = None) -> None:
        """See `Recommender.load`."""
        self._store, self._reader, self._items_url = store, reader, items_url
        self._was_read = False

    def catalogue(self) -> pa.Table:
        """See `ItemSource`."""
        items = self._store.items() if self._items_url is None else self._published(self._items_url)
        return items.select(["item_id", "category"])

    def _published(self, url: str) -> pa.Table:
        """The newest catalogue. Nobody may have published one when the first server starts; later it must be there."""
        try:
            items = read_items(url)
        except ArtifactError as error:
            if self._was_read:
                raise
            logger.warning("%s: the feature store's own items stand in", error)
            return self._store.items()
        self._was_read = True
        return items

    def features(self, item_ids: Sequence[str]) -> pa.Table:
        """See `ItemSource`."""
        return self._reader.read_items(item_ids)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request, before the user is known."""

    request: RankingRequest
    user_id: str | None
    event_timestamp: datetime
    places: Places | None  # None: to be retrieved
    categories: Sequence[str]  # whose features of the user are read
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """One request as the model is asked it."""

    asked: _Asked
    user: OnlineUser
    values: dict[str, Any]
    pairs: list[PairColumns]
    places: Places
    filtered: dict[str, list[str]]


class Recommender:
    """One model package and its features, ready to answer. For one event loop."""

    def __init__(
        self,
        package: Package,
        mapping: LogMapping,
        source: ItemSource,
        users: Users,
        prepare: PrepareScorer,
        *,
        build_index: BuildIndex | None = None,
        rules: AnswerRules | None = None,
        batcher: Batcher | None = None,
        impressions: ImpressionLog | None = None,
        clock: Callable[[], datetime] = wall_clock,
    ) -> None:
        """Read all items.

        Args:
            package: the model.
            mapping: of the log that the features come from.
            source: of the items.
            users: of the users' features.
            prepare: computes the items' half of the model.
            build_index: of the items, to find candidates in a large catalogue; None: all items are ranked.
            rules: of the answers; None: none.
            batcher: scores many requests at once; None: each by itself.
            impressions: where answers are logged; None: nowhere.
            clock: time of requests that bring none.

        Raises:
            ArtifactError: the model reads features that the store does not hold.
            InputError: a rule names a function that does not exist.
            OnlineStoreError: the online store is away.
        """
        self._package = package
        self._source, self._prepare, self._build_index = source, prepare, build_index
        self._users = users
        self._batcher = batcher
        self._impressions = impressions
        self._is_warm = True
        self._clock = clock
        self._rules = rules or AnswerRules()
        self._hooks = self._rules.resolve()
        self.rules = RequestRules.of(mapping, package.info.features)
        self.value_name = "rating" if package.info.kind is LogKind.RATINGS else "probability"
        self._forget_seen = mapping.kind is LogKind.INTERACTIONS and not mapping.recommend_seen_items
        items = ItemTable.read(source, prepare, build_index)
        self._catalogue = _Catalogue(items, self._rules.blocked_rows(items))
        if build_index is None and items.num_items > EXACT_BELOW:
            logger.warning("%d items and no retriever: a request without candidates ranks all", items.num_items)
        self._ranker = Ranker(
            package,
            items,
            user_features=users.user_features,
            pair_features=users.pair_features,
            context=self.rules.context,
        )
        # One thread: more would only share the same core.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranker")
        self._stop = threading.Event()
        self._refresher: threading.Thread | None = None

    @classmethod
    def load(
        cls,
        model: Path,
        feature_store: Path,
        *,
        retriever: Path | None = None,
        rules: AnswerRules | None = None,
        impressions: ImpressionLog | None = None,
        items_url: str | None = None,
        deadline_seconds: float = 0.05,
        device: str = "cpu",
    ) -> Self:
        """Open a model package and a feature store.

        Args:
            model: directory of the package; its digests are checked.
            feature_store: directory of the feature store, materialized.
            retriever: directory of a two_tower package that finds candidates in a large catalogue.
            rules: of the answers.
            impressions: where answers are logged.
            items_url: fsspec URL of a newer items.parquet than the store's own, read with every refresh.
            deadline_seconds: within which the online store has to answer a request.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            ArtifactError: one of them is missing or not whole, or they do not fit together.
            OnlineStoreError: the online store is away.
        """
        # Feast and torch take seconds to import; a caller's wrong path is told before that.
        started = time.perf_counter()
        from evergreen.features.online_reader import open_reader
        from evergreen.features.store import FeatureStore
        from evergreen.models.devices import choose_device, prepare_on
        from evergreen.models.package import ModelPackage
        from evergreen.models.split.scorer import SplitScorer
        from evergreen.serving.batcher import ScoreBatcher
        from evergreen.serving.retriever import RetrievalIndex
        from evergreen.serving.users import UserFeatures

        imported = time.perf_counter()
        store = FeatureStore.open(feature_store)
        package = ModelPackage.load(model)
        chosen = choose_device(device)
        reader = open_reader(store, package.info.feature_service, deadline_seconds=deadline_seconds)
        recommender = cls(
            package,
            store.tables.manifest.mapping,
            OnlineItems(store, reader, items_url),
            UserFeatures(reader),
            partial(prepare_on, chosen, SplitScorer.prepare, package),
            build_index=partial(RetrievalIndex.build, ModelPackage.load(retriever)) if retriever else None,
            rules=rules,
            batcher=ScoreBatcher() if chosen.type == "cuda" else None,
            impressions=impressions,
        )
        done = time.perf_counter()
        logger.info("imports took %.1f s, loading %.1f s", imported - started, done - imported)
        return recommender

    @property
    def model_version(self) -> str:
        """Version of the model package."""
        return self._package.version

    @property
    def items(self) -> ItemTable:
        """The catalogue as last read."""
        return self._catalogue.items

    async def warm_up(self) -> None:
        """Answer once in each way, so that no caller waits for lazy parts. Nothing is logged nor counted."""
        self._is_warm = False
        try:
            user_id = "" if self.rules.has_users else None
            requests = [RankingRequest.model_construct(user_id=user_id)]
            if self.rules.has_items and self.items.ids:
                requests.append(RankingRequest.model_construct(user_id=user_id, candidates=self.items.ids[:100]))
            for request in requests:
                await self.answer([request])
        finally:
            self._is_warm = True

    async def answer(self, requests: Sequence[RankingRequest]) -> list[Answer]:
        """The answers to requests that `rules` has accepted, in their order."""
        catalogue = self._catalogue  # a refresh in between does not change it
        items = catalogue.items
        asked = [self._ask(items, request) for request in requests]
        with timed(Stage.USER_FEATURES):
            users, degraded = await self._read_users(asked)
        if self._batcher is not None:
            questions = [self._question(catalogue, *one) for one in zip(asked, users, strict=True)]
            with timed(Stage.SCORE):
                scores = await asyncio.gather(
                    *(self._batcher.score(items.scorer, q.values, q.pairs, q.places.rows) for q in questions)
                )
            answers = [
                self._answer(items, question, self._ranker.checked(own), degraded)
                for question, own in zip(questions, scores, strict=True)
            ]
        elif sum(self._num_pairs(items, one) for one in asked) > _INLINE_PAIRS:
            loop = asyncio.get_running_loop()
            compute = partial(contextvars.copy_context().run, self._answers, catalogue, asked, users, degraded)
            answers = await loop.run_in_executor(self._executor, compute)
        else:
            answers = self._answers(catalogue, asked, users, degraded)
        return answers

    def start(self, refresh_seconds: float) -> None:
        """Read the items again and again, beside the requests, until `close`."""
        self._refresher = threading.Thread(
            target=self._refresh_forever, args=[refresh_seconds], name="item-refresh", daemon=True
        )
        self._refresher.start()

    async def close(self) -> None:
        """Stop refreshing and close the connections."""
        self._stop.set()
        if self._refresher is not None:
            await asyncio.to_thread(self._refresher.join)
        if self._batcher is not None:
            await self._batcher.close()
        self._executor.shutdown(wait=False)
        await self._users.close()

    def refresh(self) -> None:
        """Read the items again; the old ones stay if that fails."""
        try:
            items = self.items.refreshed(self._source, self._prepare, self._build_index)
        except EvergreenError as error:
            metrics.REFRESH_FAILURES.inc()
            logger.warning("the items are as of %.0f s ago: %s", time.time() - self.items.read_at, error)
            return
        self._catalogue = _Catalogue(items, self._rules.blocked_rows(items))

    def _refresh_forever(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            self.refresh()

    def _ask(self, items: ItemTable, request: RankingRequest) -> _Asked:
        """Find the candidates, and what has to be read for them."""
        places: Places | None = None
        categories: Sequence[str] = ()
        unknown: tuple[str, ...] = ()
        if not self.rules.has_items:
            places = Places(np.full(1, -1), np.full(1, -1))
        elif request.candidates is not None:
            rows = items.find(request.candidates)
            if len(rows) < len(request.candidates):
                unknown = tuple(item for item in request.candidates if item not in items.rows)
            asked, of = items.categories_of(rows)
            places = Places(rows, of)
            categories = [items.categories[code] for code in asked]
        else:
            categories = items.categories
        return _Asked(
            request=request,
            user_id=request.user_id if self.rules.has_users else None,
            event_timestamp=request.event_timestamp or self._clock(),
            places=places,
            categories=categories if self._ranker.reads_pairs else (),
            unknown=unknown,
        )

    def _num_pairs(self, items: ItemTable, asked: _Asked) -> int:
        if asked.places is not None:
            return len(asked.places.rows)
        return RETRIEVED if _index_of(items) is not None else items.num_items

    async def _read_users(self, asked: Sequence[_Asked]) -> tuple[Sequence[OnlineUser], bool]:
        wanted = [(one.user_id, one.categories) for one in asked if one.user_id is not None]
        if len(wanted) < len(asked):  # a log without users
            return [self._users.nobody(len(one.categories)) for one in asked], False
        return await self._users.get(wanted)

    def _answers(
        self,
        catalogue: _Catalogue,
        asked: Sequence[_Asked],
        users: Sequence[OnlineUser],
        degraded: bool,
    ) -> list[Answer]:
        questions = [self._question(catalogue, *one) for one in zip(asked, users, strict=True)]
        with timed(Stage.SCORE):
            scores = catalogue.items.scorer.score_many([(q.values, q.pairs, q.places.rows) for q in questions])
        return [
            self._answer(catalogue.items, question, self._ranker.checked(own), degraded)
            for question, own in zip(questions, scores, strict=True)
        ]

    def _question(self, catalogue: _Catalogue, asked: _Asked, user: OnlineUser) -> _Question:
        """What the model is asked: the candidates that may be shown, and the features."""
        items, blocked = catalogue
        request = asked.request
        values = self._ranker.user_values(asked.user_id, user, request.context, asked.event_timestamp)
        places = asked.places
        filtered: dict[str, list[str]] = {}
        if self.rules.has_items:
            forget = request.exclude_seen
            if forget is None:
                forget = self._forget_seen and places is None
            seen = _seen_rows(items, values) if forget else _NO_ROWS
            if places is None:
                with timed(Stage.RETRIEVE):
                    rows = _retrieve(items, values, np.union1d(seen, blocked))
                places = Places(rows, items.category_of[rows] if self._ranker.reads_pairs else rows)
            elif len(seen) or len(blocked):
                places = _without(items, places, {BLOCKED: blocked, SEEN: seen}, filtered)
            for name, hook in self._hooks.items():
                candidates = Candidates(asked.user_id, values, request.context, items, places.rows)
                places = _keep(items, places, np.asarray(hook(candidates), np.bool_), name, filtered)
        assert places is not None
        pairs = self._ranker.pairs(items, places, user, asked.event_timestamp)
        return _Question(asked, user, values, pairs, places, filtered)

    def _answer(self, items: ItemTable, question: _Question, scores: NDArray[np.float64], degraded: bool) -> Answer:
        """Put the candidates in order, and log what is shown."""
        asked, places = question.asked, question.places
        request = asked.request
        notes = self.rules.notes(request)
        item_ids, best = None, np.zeros(1, np.int64)
        if self.rules.has_items:
            with timed(Stage.RULES):
                diversity = self._rules.diversity if request.diversity is None else request.diversity
                k = request.k or (len(scores) if request.candidates else DEFAULT_K)
                categories = items.category_of[places.rows] if diversity else None
                best = best_first(scores, k, categories=categories, diversity=diversity)
                item_ids = [items.ids[row] for row in places.rows[best].tolist()]
            if not len(scores):
                notes = (*notes, "no items: none of the candidates may be shown, or there are none")
        answer = Answer(
            request_id=request.request_id or uuid.uuid4().hex,
            user_id=request.user_id,
            known_user=question.user.updated_at is not None,
            model_version=self.model_version,
            event_timestamp=asked.event_timestamp,
            value_name=self.value_name,
            item_ids=item_ids,
            scores=scores[best],
            degraded=degraded,
            unknown_items=asked.unknown,
            filtered_items=question.filtered if request.candidates else {},
            notes=notes,
        )
        is_shown = self._is_warm and request.shown is not False
        if is_shown:
            metrics.observe_answer(answer)
        if self._impressions is not None and is_shown:
            shown = (PairValues.of(part, best) for part in question.pairs)
            sources: list[Source] = [question.values, *shown, Rows(items.table, places.rows[best])]
            self._impressions.record(answer, self._package.info.features, sources)
        return answer


def _index_of(items: ItemTable) -> Index | None:
    """What finds candidates; None: every item is one."""
    return items.index if items.num_items > EXACT_BELOW else None


def _retrieve(items: ItemTable, values: dict[str, Any], exclude: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the items to rank for a request that brings no candidates."""
    if (index := _index_of(items)) is not None:
        return np.sort(index.search(values, RETRIEVED, exclude))
    keep = np.ones(items.num_items, np.bool_)
    keep[exclude] = False
    return np.flatnonzero(keep)


def _seen_rows(items: ItemTable, values: dict[str, Any]) -> NDArray[np.int64]:
    """Rows of the items that the user chose before, as far as the features remember."""
    return items.find([item for name in _HISTORIES for item in values.get(name) or ()])


def _without(
    items: ItemTable, places: Places, taken_out: dict[str, NDArray[np.int64]], filtered: dict[str, list[str]]
) -> Places:
    for name, rows in taken_out.items():
        if len(rows):
            places = _keep(items, places, np.isin(places.rows, rows, invert=True), name, filtered)
    return places


def _keep(
    items: ItemTable, places: Places, keep: NDArray[np.bool_], name: str, filtered: dict[str, list[str]]
) -> Places:
    """The candidates that a rule leaves; the others are told under its name."""
    if keep.all():
        return places
    filtered[name] = [items.ids[row] for row in places.rows[~keep].tolist()]
    return Places(places.rows[keep], places.of[keep])
