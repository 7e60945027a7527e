"""The training set: train, validation and test rows, split by time with an embargo.

    training_set/
      training_set.json
      train.parquet  validation.parquet  test.parquet

Rows carry ROW_FIELDS, then one column per feature. No row of a later split is older than one of an earlier: asserted
when written and when read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError, LeakageError
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import TIMESTAMP_TYPE

SPLITS = ("train", "validation", "test")

ROW_FIELDS = (
    pa.field("row_id", pa.int64(), nullable=False),
    pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
    pa.field("request_id", pa.string()),
    pa.field("user_id", pa.string()),
    pa.field("item_id", pa.string()),
    pa.field("position", pa.int32()),
    pa.field("propensity", pa.float32()),
    pa.field("rating", pa.float32()),
    pa.field("dwell_seconds", pa.float32()),
    pa.field("label", pa.float32(), nullable=False),
)
"""What every row has beside its features. user_id and item_id are features too.

rating and dwell_seconds are outcomes, known only after a click: a second task to learn from, never a feature.
"""


class ColumnKind(StrEnum):
    """How a feature column is encoded."""

    CATEGORICAL = "categorical"  # string
    NUMERIC = "numeric"  # float64, null where unknown
    SEQUENCE = "sequence"  # list<string> of item ids, oldest first; hashed as item_id is
    MULTI = "multi"  # list<string>


class FeatureOrigin(StrEnum):
    """Where the value of a feature comes from when a request is served."""

    USER = "user"
    ITEM = "item"
    USER_CATEGORY = "user_category"
    CONTEXT = "context"  # the request brings it
    ON_DEMAND = "on_demand"  # computed from the request's time and stored timestamps


class Side(StrEnum):
    """Which half of a request a feature describes: what is alike for all of its candidates, or one of them."""

    USER = "user"  # who asks, when and where
    ITEM = "item"
    PAIR = "pair"  # both at once


_SIDES = {
    FeatureOrigin.USER: Side.USER,
    FeatureOrigin.CONTEXT: Side.USER,
    FeatureOrigin.ITEM: Side.ITEM,
    FeatureOrigin.USER_CATEGORY: Side.PAIR,
}


class Feature(JsonModel):
    """One feature column of the training set."""

    name: str
    kind: ColumnKind
    origin: FeatureOrigin

    @property
    def side(self) -> Side:
        """Whom it describes; of what is computed on demand, the ages of items are the item's."""
        if self.origin is FeatureOrigin.ON_DEMAND:
            return Side.ITEM if self.name.startswith("item_") else Side.USER
        return _SIDES[self.origin]


class SplitInfo(JsonModel):
    """One split: the half-open range [start, end) that its rows lie in, and how many there are."""

    start: AwareDatetime
    end: AwareDatetime
    rows: int
    positives: int
    label_mean: float


class TrainingSetManifest(JsonModel):
    """What made the training set, its boundaries and its features."""

    snapshot_id: str
    mapping: Mapping
    as_of: AwareDatetime
    feature_service: str
    embargo_seconds: float
    splits: dict[str, SplitInfo]
    features: tuple[Feature, ...]
    dropped_features: dict[str, str]
    """Features of the service that say nothing on this log, with the reason (constant, all missing)."""
    left_out: dict[str, int]
    """Events that are in no split, by reason (embargo, item not in the catalogue yet, …)."""


@dataclass(frozen=True)
class TrainingSet:
    """A training set on disk."""

    path: Path
    manifest: TrainingSetManifest

    MANIFEST = "training_set.json"

    @classmethod
    def load(cls, path: Path) -> TrainingSet:
        """Open a training set and check that its splits do not overlap in time.

        Raises:
            ArtifactError: not a training set, or a file is missing.
            LeakageError: a row of a later split is older than one of an earlier.
        """
        path = Path(path)
        training_set = cls(path, TrainingSetManifest.read(path / cls.MANIFEST))
        training_set.check_order()
        return training_set

    @property
    def kind(self) -> LogKind:
        """The kind of log that the rows came from."""
        return self.manifest.mapping.kind

    def file(self, split: str) -> Path:
        """Path of one split's Parquet file."""
        return self.path / f"{split}.parquet"

    def read(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a split in time order; by default all columns but the features that say nothing."""
        if columns is None:
            names = {field.name for field in ROW_FIELDS}
            dropped = self.manifest.dropped_features.keys() - names
            columns = [name for name in pq.read_schema(self.file(split)).names if name not in dropped]
        return pq.read_table(self.file(split), columns=columns)

    def check_order(self) -> None:
        """Raise LeakageError unless every split lies wholly, embargo included, behind the one before."""
        previous: tuple[str, datetime] | None = None
        for split in SPLITS:
            if not self.file(split).is_file():
                raise ArtifactError(f"{self.path}: {split}.parquet is missing: build the training set again")
            times = pq.read_table(self.file(split), columns=["event_timestamp"])["event_timestamp"]
            if len(times) == 0:
                continue
            first, last = pc.min(times).as_py(), pc.max(times).as_py()
            info = self.manifest.splits[split]
            if first < info.start or last >= info.end:
                raise LeakageError(
                    f"{self.path}: {split} has rows from {first} to {last}, "
                    f"outside its range [{info.start}, {info.end})"
                )
            if previous is not None and info.start < previous[1]:
                raise LeakageError(
                    f"{self.path}: {split} starts at {info.start}, before {previous[0]} ends at {previous[1]}"
                )
            previous = (split, info.end)
