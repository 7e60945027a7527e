"""Feature tables: what the Feast views read. Every value is known strictly before its event_timestamp.

    feature_tables/
      manifest.json
      user_activity.parquet  item_activity.parquet  user_category_activity.parquet
      user_profile.parquet  item_profile.parquet  user_recent.parquet

A table is sparse in time: it has a row for a key only where a value changes, and a row holds until the next one.

A table is one file, or, where dates can be computed anew one by one, a folder of the same name:

    user_activity.parquet/
      schema.parquet                     no rows, only the columns: a table may have no partition at all
      date=2016-03-14/part-*.parquet     rows whose event_timestamp is of this date (UTC)
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import Mapping

WINDOWS_HOURS = {"1h": 1, "1d": 24, "7d": 168, "30d": 720}
"""The windows that activity is counted over, in hours."""

HISTORY_LENGTH = 50
"""How many of a user's last items are kept."""

RECENT_WINDOWS_MINUTES = {"10m": 10, "1h": 60}
"""The windows of the last minutes, to the microsecond."""

RECENT_ITEMS = 10
"""How many of a user's last items the last minutes keep."""

JOIN_KEYS = {
    "user_activity": ("user_id",),
    "item_activity": ("item_id",),
    "user_category_activity": ("user_id", "category"),
    "user_profile": ("user_id",),
    "item_profile": ("item_id",),
    "user_recent": ("user_id",),
}
"""Name and entity columns of every feature table; every table also has `event_timestamp`."""

RANKER_TABLES = tuple(name for name in JOIN_KEYS if name != "user_recent")
"""The tables behind the feature service `ranker_v1`. The last minutes have a service of their own, `recent_v1`."""


class DateRange(JsonModel):
    """Dates (UTC) from `first` to `last`, both included."""

    first: date
    last: date

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"


class FeatureTablesManifest(JsonModel):
    """What made the tables, and how many rows each has."""

    snapshot_id: str
    mapping: Mapping
    as_of: AwareDatetime
    first_event: AwareDatetime
    rows: dict[str, int]
    partitions: DateRange | None = None
    """The dates that were computed, where tables are folders; None where each is one file."""
    unfinished: DateRange | None = None
    """Dates whose partitions are being replaced: each is the old one, the new one, or missing."""

    @property
    def all_dates(self) -> DateRange:
        """Every date that a row can have: features change until `as_of`."""
        return DateRange(first=self.first_event.astimezone(UTC).date(), last=self.as_of.astimezone(UTC).date())


@dataclass(frozen=True)
class FeatureTables:
    """Feature tables on disk."""

    path: Path
    manifest: FeatureTablesManifest

    MANIFEST = "manifest.json"
    SCHEMA = "schema.parquet"

    @classmethod
    def load(cls, path: Path) -> FeatureTables:
        """Open feature tables.

        Raises:
            ArtifactError: not feature tables, a table is missing, or dates are: not computed yet, or not replaced yet.
        """
        path = Path(path)
        tables = cls(path, manifest := FeatureTablesManifest.read(path / cls.MANIFEST))
        for name in manifest.rows:
            if not tables.table(name).exists():
                raise ArtifactError(f"{path}: {name}.parquet is missing: build the feature tables again")
        if (dates := manifest.unfinished) is not None:
            raise ArtifactError(
                f"{path}: a run broke off while it replaced {dates}: compute these dates again "
                f"(evergreen features --from {dates.first} --to {dates.last})"
            )
        if manifest.partitions is not None and manifest.partitions != manifest.all_dates:
            raise ArtifactError(
                f"{path}: computed for {manifest.partitions} only, and the log is of {manifest.all_dates}: compute the "
                "other dates too (evergreen features --from … --to …)"
            )
        return tables

    def table(self, name: str) -> Path:
        """Path of one table: a Parquet file, or a folder of them by date."""
        return self.path / f"{name}.parquet"

    def schema(self, name: str) -> pa.Schema:
        """Columns of one table as they were written."""
        path = self.table(name)
        return pq.read_schema(path / self.SCHEMA if path.is_dir() else path)
