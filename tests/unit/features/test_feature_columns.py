"""How features are typed for a model."""

from __future__ import annotations

import pytest

from evergreen.contracts.feature_tables import RANKER_TABLES
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.training_set import ColumnKind, FeatureOrigin
from evergreen.features.columns import feature_columns
from evergreen.features.request import REQUEST_SCHEMA
from evergreen.features.schema import feature_table_schema


def mapping(**features: dict[str, str]) -> Mapping:
    return Mapping.model_validate(
        {
            "name": "log",
            "kind": "interactions",
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
            **features,
        }
    )


def test_every_service_column_but_raw_timestamps_is_offered() -> None:
    log = mapping()
    keys = {"user_id", "item_id", "category", "event_timestamp"}
    columns = {column for name in RANKER_TABLES for column in feature_table_schema(name, log).names} - keys
    timestamps = {name for name in columns if name.endswith(("_timestamp", "_first_seen"))}
    offered = {feature.name for feature in feature_columns(log)}
    assert offered == (columns - timestamps) | {"user_id", "item_id"} | set(REQUEST_SCHEMA.names)
    assert timestamps


@pytest.mark.parametrize(
    ("name", "kind", "origin"),
    [
        ("user_id", ColumnKind.CATEGORICAL, FeatureOrigin.USER),
        ("item_id", ColumnKind.CATEGORICAL, FeatureOrigin.ITEM),
        ("item_category", ColumnKind.CATEGORICAL, FeatureOrigin.ITEM),
        ("user_history", ColumnKind.SEQUENCE, FeatureOrigin.USER),
        ("user_events_7d", ColumnKind.NUMERIC, FeatureOrigin.USER),
        ("item_rate_1h", ColumnKind.NUMERIC, FeatureOrigin.ITEM),
        ("user_category_rate_30d", ColumnKind.NUMERIC, FeatureOrigin.USER_CATEGORY),
        ("hour", ColumnKind.CATEGORICAL, FeatureOrigin.ON_DEMAND),
        ("item_age_seconds", ColumnKind.NUMERIC, FeatureOrigin.ON_DEMAND),
        ("age", ColumnKind.NUMERIC, FeatureOrigin.USER),
        ("tags", ColumnKind.MULTI, FeatureOrigin.ITEM),
        ("device", ColumnKind.CATEGORICAL, FeatureOrigin.CONTEXT),
    ],
)
def test_kind_and_origin(name: str, kind: ColumnKind, origin: FeatureOrigin) -> None:
    log = mapping(
        user_features={"age": "numeric"}, item_features={"tags": "multi"}, context_features={"device": "categorical"}
    )
    features = {feature.name: feature for feature in feature_columns(log)}
    assert (features[name].kind, features[name].origin) == (kind, origin)


def test_names_are_unique_and_ids_come_first() -> None:
    names = [feature.name for feature in feature_columns(mapping(context_features={"device": "categorical"}))]
    assert len(names) == len(set(names))
    assert names[:2] == ["user_id", "item_id"]
    assert names[-1] == "device"
