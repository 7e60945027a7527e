"""The Arrow schema of every feature table, derived from a mapping. Needs pyarrow alone, so anything may import it."""

from __future__ import annotations

import pyarrow as pa

from evergreen.contracts.feature_tables import JOIN_KEYS, RECENT_WINDOWS_MINUTES, WINDOWS_HOURS
from evergreen.contracts.mapping import Mapping, Role
from evergreen.contracts.snapshot import TIMESTAMP_TYPE, event_schema

ACTIVITY_PREFIXES = {"user_activity": "user", "item_activity": "item", "user_category_activity": "user_category"}
"""Activity tables, and what the names of their columns begin with."""

PROFILE_PREFIXES = {"user_profile": "user", "item_profile": "item"}
"""Profile tables, and whose attributes they hold."""

_ACTIVITY_EXTRAS = {
    "user_activity": (
        pa.field("user_last_event_timestamp", TIMESTAMP_TYPE),
        pa.field("user_last_positive_timestamp", TIMESTAMP_TYPE),
        pa.field("user_history", pa.list_(pa.string())),
    ),
    "item_activity": (pa.field("item_last_positive_timestamp", TIMESTAMP_TYPE),),
    "user_category_activity": (),
}

RECENT_FIELDS = (
    *(
        pa.field(f"user_recent_{what}_{w}", pa.int64())
        for what in ("events", "positives")
        for w in RECENT_WINDOWS_MINUTES
    ),
    pa.field("user_recent_items", pa.list_(pa.string())),
)
"""Features of `user_recent`."""


def profile_sources(name: str, mapping: Mapping) -> dict[str, str]:
    """Attributes of a profile table: the column's name in the table, and in the snapshot."""
    prefix = PROFILE_PREFIXES[name]
    category = {"item_category": "category"} if prefix == "item" else {}
    return category | {feature: feature for feature in mapping.features(Role(prefix))}


def feature_table_schema(name: str, mapping: Mapping) -> pa.Schema:
    """Schema of one feature table: its join keys, `event_timestamp`, then its features in the order they are served.

    Args:
        name: a key of `JOIN_KEYS`.
        mapping: decides which attributes the profile tables have.
    """
    keys = [*(pa.field(key, pa.string()) for key in JOIN_KEYS[name]), pa.field("event_timestamp", TIMESTAMP_TYPE)]
    if prefix := ACTIVITY_PREFIXES.get(name):
        types = {"events": pa.int64(), "positives": pa.int64(), "rate": pa.float64()}
        counts = [pa.field(f"{prefix}_{what}_{w}", types[what]) for what in types for w in WINDOWS_HOURS]
        return pa.schema([*keys, *counts, *_ACTIVITY_EXTRAS[name]])
    if name == "user_recent":
        return pa.schema([*keys, *RECENT_FIELDS])
    events = event_schema(mapping)
    sources = profile_sources(name, mapping)
    attributes = [pa.field(column, events.field(source).type) for column, source in sources.items()]
    return pa.schema([*keys, pa.field(f"{PROFILE_PREFIXES[name]}_first_seen", TIMESTAMP_TYPE), *attributes])


def feature_table_schemas(mapping: Mapping) -> dict[str, pa.Schema]:
    """Schemas of all feature tables, by name."""
    return {name: feature_table_schema(name, mapping) for name in JOIN_KEYS}
