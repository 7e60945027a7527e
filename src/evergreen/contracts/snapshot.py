"""The snapshot: an immutable copy of a log in the event schema.

snapshot/
  manifest.json
  events/date=2016-03-14/part-00000.parquet   rows in (event_timestamp, source order)
  quarantine/rejected.csv                     source, line, reason, row: what broke the schema
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel, canonical_json, sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import FeatureType, LogKind, Mapping

SCHEMA_VERSION = 2
"""2: `click_timestamp`. Snapshots of version 1 are read as well; they lack that column."""

_READABLE_VERSIONS = (1, SCHEMA_VERSION)
TIMESTAMP_TYPE = pa.timestamp("us", tz="UTC")  # microseconds: Spark cannot read nanoseconds

EVENT_FIELDS = (
    pa.field("event_id", pa.int64(), nullable=False),
    pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
    pa.field("request_id", pa.string()),
    pa.field("user_id", pa.string()),
    pa.field("item_id", pa.string()),
    pa.field("category", pa.string()),
    pa.field("position", pa.int32()),
    pa.field("clicked", pa.bool_()),
    pa.field("click_timestamp", TIMESTAMP_TYPE),
    pa.field("rating", pa.float32()),
    pa.field("dwell_seconds", pa.float32()),
    pa.field("propensity", pa.float32()),
)
"""Columns of every snapshot. `event_id` is the row's place in time order, from 0."""

_FEATURE_ARROW_TYPES = {
    FeatureType.NUMERIC: pa.float64(),
    FeatureType.CATEGORICAL: pa.string(),
    FeatureType.MULTI: pa.list_(pa.string()),
}


def event_schema(mapping: Mapping) -> pa.Schema:
    """Arrow schema of the snapshot of a log with this mapping: the event fields, then the mapping's features."""
    features = [pa.field(name, _FEATURE_ARROW_TYPES[f.type]) for name, f in mapping.all_features.items()]
    return pa.schema([*EVENT_FIELDS, *features])


class SnapshotFile(JsonModel):
    """One Parquet file of a snapshot."""

    path: str
    rows: int = Field(ge=1)
    sha256: str


class SnapshotManifest(JsonModel):
    """What a snapshot holds. Its canonical JSON is what the snapshot's id digests; no clock and no path is in it."""

    schema_version: int = SCHEMA_VERSION
    mapping: Mapping
    as_of: AwareDatetime
    """Events at or after this time are not in the snapshot. Default: the full hour after the last event."""
    rows: int = Field(ge=1)
    num_users: int
    num_items: int
    num_positives: int
    """Clicks, interactions or ratings."""
    first_event: AwareDatetime
    last_event: AwareDatetime
    files: tuple[SnapshotFile, ...]
    quarantined: dict[str, int]
    """Rows that broke the schema, by reason."""
    quarantine_sha256: str | None = None
    left_out: dict[str, int] = Field(default_factory=dict)
    """Good rows that the mapping or `as_of` leaves out, by reason."""

    @property
    def id(self) -> str:
        """sha256 of the manifest: the same input gives the same id."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk."""

    path: Path
    manifest: SnapshotManifest

    MANIFEST = "manifest.json"

    @classmethod
    def load(cls, path: Path, *, verify: bool = False) -> Snapshot:
        """Open a snapshot.

        Args:
            path: the snapshot's directory.
            verify: also read every file and compare its digest.

        Raises:
            ArtifactError: not a snapshot, of another schema version, or a file is missing or altered.
        """
        path = Path(path)
        manifest = SnapshotManifest.read(path / cls.MANIFEST)
        if manifest.schema_version not in _READABLE_VERSIONS:
            raise ArtifactError(
                f"{path}: schema version {manifest.schema_version}, this Evergreen reads {SCHEMA_VERSION}: ingest again"
            )
        for file in manifest.files:
            if not (path / file.path).is_file():
                raise ArtifactError(f"{path}: {file.path} is missing: ingest again")
            if verify and sha256_file(path / file.path) != file.sha256:
                raise ArtifactError(f"{path}: {file.path} was altered after it was written: ingest again")
        return cls(path, manifest)

    @property
    def id(self) -> str:
        """The snapshot's digest."""
        return self.manifest.id

    @property
    def mapping(self) -> Mapping:
        """The mapping that the log was read with."""
        return self.manifest.mapping

    @property
    def kind(self) -> LogKind:
        """The kind of log."""
        return self.manifest.mapping.kind

    @property
    def as_of(self) -> datetime:
        """The moment up to which the snapshot knows the world."""
        return self.manifest.as_of

    @property
    def files(self) -> list[str]:
        """Absolute paths of the event files, oldest first."""
        return [str(self.path / file.path) for file in self.manifest.files]
