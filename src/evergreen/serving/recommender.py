"""From a request to its answer, without a server around it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.serving.impressions import ImpressionLog, Rows
from evergreen.serving.items import ItemTable, OnlineStore
from evergreen.serving.ranker import Ranker, Scorer, best_first
from evergreen.serving.retriever import CatalogueRetriever
from evergreen.serving.schema import DEFAULT_K, RankedItem, RankingRequest, Recommendation
from evergreen.serving.users import UserFeatures, UserLookup
from evergreen.serving.validation import RequestRules

logger = logging.getLogger(__name__)


def wall_clock() -> datetime:
    """Now. The one clock in Evergreen: a request without a time of its own is asked now."""
    return datetime.now(UTC)


class Recommender:
    """One model package and its features, ready to answer."""

    def __init__(
        self,
        package: Scorer,
        store: OnlineStore,
        mapping: Mapping,
        *,
        clock: Callable[[], datetime] = wall_clock,
        impressions: ImpressionLog | None = None,
    ) -> None:
        """Read all items, and answer once so that the first caller does not wait for lazy parts.

        Args:
            package: the model.
            store: its features, materialized.
            mapping: of the log that the features come from.
            clock: time of requests that bring none.
            impressions: where answers are logged; None: nowhere.

        Raises:
            ArtifactError: the model reads features that the store does not hold.
        """
        service = package.info.feature_service
        self._package = package
        self._clock = clock
        self._items = ItemTable.load(store, service)
        self._users = UserLookup(store, service, self._items.categories)
        self._ranker = Ranker(package, self._items, self._users)
        forget_seen = mapping.kind is LogKind.INTERACTIONS and not mapping.recommend_seen_items
        self._retriever = CatalogueRetriever(self._items, recommend_seen=not forget_seen)
        self.value_name = "rating" if package.info.kind is LogKind.RATINGS else "probability"
        self.rules = RequestRules.of(mapping, package.info.features)
        self._impressions: ImpressionLog | None = None  # the first answer is nobody's
        self.recommend(RankingRequest(k=1))
        self._impressions = impressions

    @classmethod
    def load(cls, model: Path, feature_store: Path, impressions: ImpressionLog | None = None) -> Recommender:
        """Open a model package and a feature store; answers are logged to `impressions`.

        Raises:
            ArtifactError: one of them is missing or not whole, or they do not fit together.
        """
        # Feast and torch take seconds to import; a caller's wrong path is told before that.
        started = time.perf_counter()
        from evergreen.features.store import FeatureStore
        from evergreen.models.package import ModelPackage

        imported = time.perf_counter()
        store = FeatureStore.open(feature_store)
        recommender = cls(ModelPackage.load(model), store, store.tables.manifest.mapping, impressions=impressions)
        done = time.perf_counter()
        logger.info("imports took %.1f s, loading %.1f s", imported - started, done - imported)
        return recommender

    @property
    def model_version(self) -> str:
        """Version of the model package."""
        return self._package.version

    def recommend(self, request: RankingRequest) -> Recommendation:
        """Answer one request, which `rules` has accepted."""
        user_id = request.user_id if self.rules.has_users else None
        user = self._users.get(user_id)
        item_ids, rows = self._candidates(request, user)
        event_timestamp = request.event_timestamp or self._clock()
        notes = self.rules.notes(request)
        if len(rows) == 0:
            notes = (*notes, "no items: the user knows the whole catalogue, or it is empty")
        table = self._ranker.assemble(
            user_id=user_id,
            user=user,
            item_ids=item_ids if self.rules.has_items else None,
            rows=rows,
            context=request.context,
            event_timestamp=event_timestamp,
        )
        scores = self._ranker.score(table) if len(rows) else np.empty(0)
        answer: dict[str, Any] = {
            "request_id": request.request_id or uuid.uuid4().hex,
            "user_id": request.user_id,
            "known_user": user.known,
            "model_version": self.model_version,
            "event_timestamp": event_timestamp,
            "notes": notes,
        }
        if not self.rules.has_items:
            recommendation = Recommendation(**answer, **{self.value_name: scores[0]})
            self._log(recommendation, [Rows(table, [0])])
            return recommendation
        k = request.k or (len(item_ids) if request.candidates else DEFAULT_K)
        best = best_first(scores, item_ids, k)
        items = tuple(
            RankedItem(item_id=item_ids[i], rank=rank, **{self.value_name: scores[i]})
            for rank, i in enumerate(best, start=1)
        )
        unknown = tuple(item for item in request.candidates or () if item not in self._items.rows)
        recommendation = Recommendation(**answer, items=items, unknown_items=unknown)
        if self._impressions is not None:
            places = pa.array(best, pa.int64())
            # The features of a whole catalogue would be too much to hold until they are logged.
            features = Rows(table, best) if request.candidates else Rows(table.take(places), range(len(best)))
            self._log(recommendation, [features, Rows(self._items.table, rows.take(places))])
        return recommendation

    def _log(self, answer: Recommendation, sources: list[Rows]) -> None:
        if self._impressions is not None:
            self._impressions.record(
                answer, self._package.info.features, sources, request_id=answer.request_id or "", degraded=False
            )

    def _candidates(self, request: RankingRequest, user: UserFeatures) -> tuple[list[str], pa.Array]:
        """What to score: ids, and their rows in the item table. A log without items has one row, of nothing."""
        if not self.rules.has_items:
            return [], pa.nulls(1, pa.int64())
        if request.candidates is not None:
            return list(request.candidates), self._items.find(request.candidates)
        rows = self._retriever.retrieve(user.history)
        return self._items.table["item_id"].take(rows).to_pylist(), rows
