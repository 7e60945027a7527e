"""Feature tables: what the Feast views read. Every value is known strictly before its event_timestamp.

    feature_tables/
      manifest.json
      user_activity.parquet  item_activity.parquet  user_category_activity.parquet
      user_profile.parquet  item_profile.parquet

A table is sparse in time: it has a row for a key only where a value changes, and a row holds until the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import Mapping

WINDOWS_HOURS = {"1h": 1, "1d": 24, "7d": 168, "30d": 720}
"""The windows that activity is counted over, in hours."""

HISTORY_LENGTH = 50
"""How many of a user's last items are kept."""

JOIN_KEYS = {
    "user_activity": ("user_id",),
    "item_activity": ("item_id",),
    "user_category_activity": ("user_id", "category"),
    "user_profile": ("user_id",),
    "item_profile": ("item_id",),
}
"""Name and entity columns of every feature table; every table also has `event_timestamp`."""


class FeatureTablesManifest(JsonModel):
    """What made the tables, and how many rows each has."""

    snapshot_id: str
    mapping: Mapping
    as_of: AwareDatetime
    first_event: AwareDatetime
    rows: dict[str, int]


@dataclass(frozen=True)
class FeatureTables:
    """Feature tables on disk."""

    path: Path
    manifest: FeatureTablesManifest

    MANIFEST = "manifest.json"

    @classmethod
    def load(cls, path: Path) -> FeatureTables:
        """Open feature tables.

        Raises:
            ArtifactError: not feature tables, or a table is missing.
        """
        path = Path(path)
        tables = cls(path, FeatureTablesManifest.read(path / cls.MANIFEST))
        for name in JOIN_KEYS:
            if not tables.table(name).is_file():
                raise ArtifactError(f"{path}: {name}.parquet is missing: build the feature tables again")
        return tables

    def table(self, name: str) -> Path:
        """Path of one table's Parquet file."""
        return self.path / f"{name}.parquet"
