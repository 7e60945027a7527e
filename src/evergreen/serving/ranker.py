"""Ranking: what the model reads of one user and many items, put together from what is stored, and its scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Feature, FeatureOrigin
from evergreen.features.online_user import OnlineUser
from evergreen.features.request import ITEM_ELAPSED_FEATURES, elapsed_seconds, user_request_features
from evergreen.models.split.request import PairColumns
from evergreen.serving.items import ItemTable

ContextValue = float | str | list[str] | None


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


class Package(Protocol):
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


@dataclass(frozen=True, slots=True)
class Places:
    """Which items are candidates, and which of the asked categories each belongs to.

    Attributes:
        rows: (m,) of the item table, ascending; -1 for the one row of a log without items.
        of: (m,) row of `OnlineUser.by_category`, -1 for none.
    """

    rows: NDArray[np.int64]
    of: NDArray[np.int64]


class Ranker:
    """Scores items for a user."""

    def __init__(
        self,
        package: Package,
        items: ItemTable,
        *,
        user_features: Collection[str],
        pair_features: Collection[str],
        context: Collection[str],
    ) -> None:
        """Check that every feature of the model can be had.

        Args:
            package: the model.
            items: the catalogue.
            user_features: that the online store has of a user.
            pair_features: that it has of a user and a category, in the order of `OnlineUser.by_category`.
            context: names of the context features of the log.

        Raises:
            ArtifactError: the model reads a feature that the feature store does not hold; names it.
        """
        self._path = package.path
        features = package.info.features
        known = {
            FeatureOrigin.USER: {"user_id", *user_features},
            FeatureOrigin.ITEM: {"item_id", *items.table.column_names},
            FeatureOrigin.USER_CATEGORY: set(pair_features),
        }
        for feature in features:
            if feature.origin in known and feature.name not in known[feature.origin]:
                raise ArtifactError(
                    f"{package.path}: the model reads {feature.name!r}, which the feature store does not hold: "
                    "serve it with the feature store of its own run"
                )
        read = {feature.name for feature in features}
        self._pair_names = tuple(pair_features)
        self._reads_ages = not read.isdisjoint(ITEM_ELAPSED_FEATURES)
        self._no_context = dict.fromkeys(context)
        self.reads_pairs = any(feature.origin is FeatureOrigin.USER_CATEGORY for feature in features)
        """Whether the model reads features of a user and a category."""

    def user_values(
        self, user_id: str | None, user: OnlineUser, context: Mapping[str, ContextValue], event_timestamp: datetime
    ) -> dict[str, Any]:
        """Every feature of the user's side, by name: who asks, when and where."""
        now = int(event_timestamp.timestamp() // 1)
        calendar = user_request_features(now, user.values)
        return {**user.values, **calendar, **self._no_context, **context, "user_id": user_id}

    def pairs(self, items: ItemTable, places: Places, user: OnlineUser, event_timestamp: datetime) -> list[PairColumns]:
        """The features of the user with each candidate."""
        parts = []
        if self.reads_pairs:
            parts.append(PairColumns(self._pair_names, user.by_category, places.of))
        if self._reads_ages:
            now = int(event_timestamp.timestamp() // 1)
            parts.append(PairColumns(items.ages, elapsed_seconds(now, items.seconds[places.rows])))
        return parts

    def checked(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scores, if they are numbers.

        Raises:
            ArtifactError: one is not.
        """
        if not np.isfinite(scores).all():
            raise ArtifactError(f"{self._path}: the model gives scores that are not finite: train it again")
        return scores
