from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.point_in_time import join_features
from tests.serving import ask


def offline(tables: FeatureTables, user_id: str | None, item_ids: list[str], at: Any) -> pa.Table:
    """The rows that training would make of the same user, items and time."""
    items = join_features(spine(None, item_ids, [None] * len(item_ids), at), tables)
    return join_features(spine(user_id, item_ids, items["item_category"].to_pylist(), at), tables)


def spine(user_id: str | None, item_ids: list[str], categories: list[str | None], at: Any) -> pa.Table:
    n = len(item_ids)
    return pa.table(
        {
            "event_timestamp": pa.array([at] * n, pa.timestamp("us", tz="UTC")),
            "user_id": pa.array([user_id] * n, pa.string()),
            "item_id": pa.array(item_ids, pa.string()),
            "category": pa.array(categories, pa.string()),
        }
    )


@pytest.mark.parametrize("kind", ["impressions", "interactions", "ratings", "no_users"])
@pytest.mark.parametrize("user_id", ["u3", "somebody new"])
def test_served_features_equal_offline_join(parts: Callable[[str], Any], kind: str, user_id: str) -> None:
    serving = parts(kind)
    at = serving.store.as_of + timedelta(microseconds=987_654)
    item_ids = sorted(f"item-{n}" for n in range(25))
    user = user_id if serving.mapping.columns.user_id else None
    context = {"battery": 0.25} if kind == "impressions" else {}
    serving.ask(user_id=user, candidates=item_ids, event_timestamp=at, context=context)
    served = serving.package.tables[-1]
    expected = offline(serving.tables, user, item_ids, at)
    assert served.column_names == [feature.name for feature in serving.package.info.features]
    assert served.num_rows == len(item_ids)
    for feature in serving.package.info.features:
        if feature.origin is FeatureOrigin.CONTEXT:
            wanted: list[Any] = [context.get(feature.name)] * len(item_ids)
        else:
            wanted = expected[feature.name].to_pylist()
        assert served[feature.name].to_pylist() == wanted, feature.name


def test_context_reaches_the_model_with_the_types_of_training(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    serving.ask(user_id="u1", context={"device": "phone", "battery": 0.25})
    table = serving.package.tables[-1]
    assert table["device"].type == pa.string() and set(table["device"].to_pylist()) == {"phone"}
    assert table["battery"].type == pa.float64() and set(table["battery"].to_pylist()) == {0.25}


def test_model_that_reads_more_than_the_store_holds_is_refused(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")
    mood = Feature(name="mood", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.USER)
    package = replace(serving.package, info=replace(serving.package.info, features=(mood,)))
    with pytest.raises(ArtifactError, match="reads 'mood', which the feature store does not hold"):
        serving.other(package=package)


def test_score_that_is_not_finite_is_not_served(parts: Callable[[str], Any]) -> None:
    serving = parts("impressions")

    class Diverged(type(serving.package)):  # type: ignore[misc]
        def predict(self, table: pa.Table) -> np.ndarray:
            return np.full(table.num_rows, np.nan)

    with pytest.raises(ArtifactError, match="not finite"):
        ask(serving.other(package=Diverged(serving.package.info)), user_id="u1")
