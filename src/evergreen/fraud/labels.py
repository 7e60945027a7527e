"""Suspicious events: which rows of a snapshot no person made. Labels beside the snapshot; nothing is deleted.

suspicious/
  manifest.json
  suspicious.parquet   event_id, user_id, reasons, score; sorted by event_id
  users.parquet        user_id, events, positives, suspicious_events, reasons, score; the most suspicious first
  report.html          for people
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from evergreen.contracts.artifact import JsonModel, sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.fraud.rules import Limits

SUSPICIOUS_EVENTS = pa.schema(
    [
        pa.field("event_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("reasons", pa.list_(pa.string()), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)
"""A row for each suspicious event. `score` is in [0, 1]: 1 where a rule was broken, otherwise the share of people who
look less suspicious."""

SUSPICIOUS_USERS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("events", pa.int64(), nullable=False),
        pa.field("positives", pa.int64(), nullable=False),
        pa.field("suspicious_events", pa.int64(), nullable=False),
        pa.field("reasons", pa.list_(pa.string()), nullable=False),
        pa.field("score", pa.float64()),  # null: too few events to judge, and no rule was broken
    ]
)
"""A row for each user of the snapshot. `score` is the highest of the user's events, suspicious or not."""


class ReasonCount(JsonModel):
    """How much a reason labels. An event may have several."""

    events: int = Field(ge=0)
    users: int = Field(ge=0)


class SuspiciousManifest(JsonModel):
    """What was labelled, why, and by which limits."""

    snapshot_id: str
    limits: Limits
    """Of the rules, calibrated on this snapshot; what a stream needs to judge alike."""
    false_positive_share: float
    window_days: int
    events: int
    users: int
    without_user: int
    """Events without a user id: no rule can judge them."""
    windows: int
    windows_left_out: int
    """Users' windows with too few events for the detector."""
    suspicious_events: int
    suspicious_positives: int
    suspicious_users: int
    reasons: dict[str, ReasonCount]
    sha256: str
    """Of suspicious.parquet."""


@dataclass(frozen=True)
class SuspiciousEvents:
    """Labels on disk."""

    path: Path
    manifest: SuspiciousManifest

    MANIFEST = "manifest.json"
    EVENTS = "suspicious.parquet"
    USERS = "users.parquet"
    REPORT = "report.html"

    @classmethod
    def load(cls, path: Path) -> SuspiciousEvents:
        """Open labels.

        Raises:
            ArtifactError: not labels, or the events were altered after they were written.
        """
        path = Path(path)
        manifest = SuspiciousManifest.read(path / cls.MANIFEST)
        if not (path / cls.EVENTS).is_file():
            raise ArtifactError(f"{path}: {cls.EVENTS} is missing: filter the events again")
        if sha256_file(path / cls.EVENTS) != manifest.sha256:
            raise ArtifactError(f"{path}: {cls.EVENTS} was altered after it was written: filter the events again")
        return cls(path, manifest)

    def events(self) -> pa.Table:
        """The labelled events, as `SUSPICIOUS_EVENTS`."""
        return pq.read_table(self.path / self.EVENTS)

    def users(self) -> pa.Table:
        """All users with their scores, as `SUSPICIOUS_USERS`."""
        return pq.read_table(self.path / self.USERS)
