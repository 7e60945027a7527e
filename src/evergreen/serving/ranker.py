"""Ranking: the features of one user and many items, as the model was trained on them, then scores, then an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.request import ELAPSED_FEATURES, request_features
from evergreen.serving.items import ItemTable
from evergreen.serving.users import UserFeatures, UserLookup

ContextValue = float | str | list[str] | None

_ARROW_TYPES = {
    ColumnKind.CATEGORICAL: pa.string(),
    ColumnKind.NUMERIC: pa.float64(),
    ColumnKind.SEQUENCE: pa.list_(pa.string()),
    ColumnKind.MULTI: pa.list_(pa.string()),
}


class PackageInfo(Protocol):
    """What serving reads of `models.package.ModelInfo`."""

    @property
    def kind(self) -> LogKind:
        """Decides what the scores mean."""

    @property
    def feature_service(self) -> str:
        """Name of the Feast feature service."""

    @property
    def features(self) -> tuple[Feature, ...]:
        """Columns that the model reads."""


class Scorer(Protocol):
    """What serving needs of `models.package.ModelPackage`."""

    @property
    def path(self) -> Path:
        """Where the package is."""

    @property
    def info(self) -> PackageInfo:
        """What the package says of itself."""

    @property
    def version(self) -> str:
        """Names the package for good."""

    def predict(self, table: pa.Table) -> NDArray[np.floating]:
        """Calibrated probability or rating of each row, (num_rows)."""


class Ranker:
    """Scores items for a user."""

    def __init__(self, package: Scorer, items: ItemTable, users: UserLookup) -> None:
        """Check that every feature of the model can be had.

        Raises:
            ArtifactError: the model reads a feature that the feature store does not hold; names it.
        """
        self._package = package
        self._items = items
        self._users = users
        user, item = users.nobody, items.table
        known = {
            FeatureOrigin.USER: {"user_id", *user.row.column_names},
            FeatureOrigin.ITEM: {"item_id", *item.column_names},
            FeatureOrigin.USER_CATEGORY: set(user.by_category.column_names),
        }
        for feature in package.info.features:
            if feature.origin in known and feature.name not in known[feature.origin]:
                raise ArtifactError(
                    f"{package.path}: the model reads {feature.name!r}, which the feature store does not hold: "
                    "serve it with the feature store of its own run"
                )
        self._needs_request = any(f.origin is FeatureOrigin.ON_DEMAND for f in package.info.features)

    def assemble(
        self,
        *,
        user_id: str | None,
        user: UserFeatures,
        item_ids: Sequence[str] | None,
        rows: pa.Array,
        context: Mapping[str, ContextValue],
        event_timestamp: datetime,
    ) -> pa.Table:
        """The model's input, as `point_in_time.join_features` gives it offline.

        Args:
            user_id: as the model knows the user; None for a log without users.
            user: the user's features.
            item_ids: (num_items) ids; None for a log without items, which has one row.
            rows: (num_items) rows of the item table, null for items that are not in it.
            context: context features by name.
            event_timestamp: of the request.

        Returns:
            (num_items) one column for each of the model's features, in their order.
        """
        num_items = len(rows)
        items = self._items.take(rows)
        everyone = pa.array(np.zeros(num_items, dtype=np.int64))
        users = user.row.take(everyone)
        categories = user.by_category.take(self._users.places(items["category"]))
        request = None
        if self._needs_request:
            stored = {n: (users if n in users.column_names else items)[n] for n in ELAPSED_FEATURES.values()}
            request = request_features(event_timestamp, pa.table(stored))
        columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        for feature in self._package.info.features:
            name = feature.name
            if name == "user_id":
                columns[name] = pa.array([user_id] * num_items, pa.string())
            elif name == "item_id":
                columns[name] = (
                    pa.nulls(num_items, pa.string()) if item_ids is None else pa.array(item_ids, pa.string())
                )
            elif feature.origin is FeatureOrigin.USER:
                columns[name] = users[name]
            elif feature.origin is FeatureOrigin.ITEM:
                columns[name] = items[name]
            elif feature.origin is FeatureOrigin.USER_CATEGORY:
                columns[name] = categories[name]
            elif feature.origin is FeatureOrigin.ON_DEMAND and request is not None:
                columns[name] = request[name]
            else:
                columns[name] = pa.array([context.get(name)] * num_items, _ARROW_TYPES[feature.kind])
        return pa.table(columns)

    def score(self, table: pa.Table) -> NDArray[np.float64]:
        """Probability or rating of each row of an assembled table, (num_rows).

        Raises:
            ArtifactError: the model gives something that is no number.
        """
        scores = np.asarray(self._package.predict(table), dtype=np.float64)
        if scores.shape != (table.num_rows,) or not np.isfinite(scores).all():
            raise ArtifactError(f"{self._package.path}: the model gives scores that are not finite: train it again")
        return scores


def best_first(scores: NDArray[np.float64], item_ids: Sequence[str], k: int) -> list[int]:
    """Places of the k best items: by score, and items of equal score by id, so that an order is never chance."""
    table = pa.table({"score": scores, "item_id": pa.array(item_ids, pa.string())})
    order = pc.sort_indices(table, sort_keys=[("score", "descending"), ("item_id", "ascending")])
    places: list[int] = order.slice(0, k).to_pylist()
    return places
