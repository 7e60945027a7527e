"""How each feature of the service `ranker_v1` is typed for a model, and where its value comes from at serving time.

The single place that says so: the training set takes its columns from here and the server decides by `origin` whether
a value is the user's, the item's, the request's or computed.
"""

from __future__ import annotations

import pyarrow as pa

from evergreen.contracts.feature_tables import JOIN_KEYS, RANKER_TABLES
from evergreen.contracts.mapping import FeatureType, Mapping, Role
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.features.request import CALENDAR_FEATURES, REQUEST_SCHEMA
from evergreen.features.schema import feature_table_schema

_TABLE_ORIGINS = {
    "user_activity": FeatureOrigin.USER,
    "item_activity": FeatureOrigin.ITEM,
    "user_category_activity": FeatureOrigin.USER_CATEGORY,
    "user_profile": FeatureOrigin.USER,
    "item_profile": FeatureOrigin.ITEM,
}

_FEATURE_KINDS = {
    FeatureType.NUMERIC: ColumnKind.NUMERIC,
    FeatureType.CATEGORICAL: ColumnKind.CATEGORICAL,
    FeatureType.MULTI: ColumnKind.MULTI,
}


def feature_columns(mapping: Mapping) -> tuple[Feature, ...]:
    """Every column that a model may read for a log with this mapping.

    Returns:
        user_id and item_id, the columns of `ranker_v1` in its order without raw timestamps (their recency and age
        stand for them), then the mapping's context features.
    """
    features = [
        Feature(name="user_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.USER),
        Feature(name="item_id", kind=ColumnKind.CATEGORICAL, origin=FeatureOrigin.ITEM),
    ]
    for name in RANKER_TABLES:
        for field in feature_table_schema(name, mapping):
            if field.name in JOIN_KEYS[name] or pa.types.is_timestamp(field.type):
                continue
            features.append(Feature(name=field.name, kind=_kind(field, mapping), origin=_TABLE_ORIGINS[name]))
    for name in REQUEST_SCHEMA.names:
        kind = ColumnKind.CATEGORICAL if name in CALENDAR_FEATURES else ColumnKind.NUMERIC
        features.append(Feature(name=name, kind=kind, origin=FeatureOrigin.ON_DEMAND))
    for name, column in mapping.features(Role.CONTEXT).items():
        features.append(Feature(name=name, kind=_FEATURE_KINDS[column.type], origin=FeatureOrigin.CONTEXT))
    return tuple(features)


def _kind(field: pa.Field, mapping: Mapping) -> ColumnKind:
    if column := mapping.all_features.get(field.name):
        return _FEATURE_KINDS[column.type]
    if pa.types.is_list(field.type):  # Evergreen's only list is the user's history
        return ColumnKind.SEQUENCE
    return ColumnKind.CATEGORICAL if pa.types.is_string(field.type) else ColumnKind.NUMERIC
