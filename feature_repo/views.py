"""Feature views: one for each feature table."""

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from entities import category, item, user
from feast import FeatureView, Field
from feast.types import Array, FeastType, Float64, Int64, String, UnixTimestamp
from sources import (
    item_activity_table,
    item_profile_table,
    recent_clicks,
    user_activity_table,
    user_category_activity_table,
    user_profile_table,
)

from evergreen.contracts.feature_tables import JOIN_KEYS, RECENT_WINDOWS_MINUTES, WINDOWS_HOURS, FeatureTables

# The tables are sparse in time: a row holds until the next one of its key, however long that takes. A ttl would turn
# the features of everybody who was quiet for longer into nulls.
UNTIL_NEXT_ROW = timedelta(0)


def windowed(prefix: str) -> list[Field]:
    """Counts and the smoothed rate over every window."""
    types = {"events": Int64, "positives": Int64, "rate": Float64}
    return [Field(name=f"{prefix}_{what}_{w}", dtype=dtype) for what, dtype in types.items() for w in WINDOWS_HOURS]


def attributes(name: str) -> list[Field]:
    """Fields of a profile table, from its Parquet files: which attributes there are differs from log to log.

    Feast can infer a schema too, but does not know the lists that Parquet holds.
    """
    schema = FeatureTables.load(Path(__file__).parent / "data").schema(name)
    keys = (*JOIN_KEYS[name], "event_timestamp")
    return [Field(name=field.name, dtype=feast_type(field.type)) for field in schema if field.name not in keys]


def feast_type(dtype: pa.DataType) -> FeastType:
    """Feast's name for the types that a profile may have."""
    if pa.types.is_timestamp(dtype):
        return UnixTimestamp
    if pa.types.is_list(dtype):
        return Array(String)
    return Float64 if pa.types.is_floating(dtype) else String


user_activity = FeatureView(
    name="user_activity",
    entities=[user],
    ttl=UNTIL_NEXT_ROW,
    schema=[
        *windowed("user"),
        Field(name="user_last_event_timestamp", dtype=UnixTimestamp),
        Field(name="user_last_positive_timestamp", dtype=UnixTimestamp),
        Field(name="user_history", dtype=Array(String), description="Last items chosen, oldest first."),
    ],
    source=user_activity_table,
)

item_activity = FeatureView(
    name="item_activity",
    entities=[item],
    ttl=UNTIL_NEXT_ROW,
    schema=[*windowed("item"), Field(name="item_last_positive_timestamp", dtype=UnixTimestamp)],
    source=item_activity_table,
)

user_category_activity = FeatureView(
    name="user_category_activity",
    entities=[user, category],
    ttl=UNTIL_NEXT_ROW,
    schema=windowed("user_category"),
    source=user_category_activity_table,
)

user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    ttl=UNTIL_NEXT_ROW,
    schema=attributes("user_profile"),
    source=user_profile_table,
)

item_profile = FeatureView(
    name="item_profile",
    entities=[item],
    ttl=UNTIL_NEXT_ROW,
    schema=attributes("item_profile"),
    source=item_profile_table,
)

user_recent = FeatureView(
    name="user_recent",
    entities=[user],
    ttl=UNTIL_NEXT_ROW,
    schema=[
        *(
            Field(name=f"user_recent_{what}_{w}", dtype=Int64)
            for what in ("events", "positives")
            for w in RECENT_WINDOWS_MINUTES
        ),
        Field(name="user_recent_items", dtype=Array(String), description="Last items chosen, oldest first."),
    ],
    source=recent_clicks,
)
