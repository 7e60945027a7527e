"""Outcomes: what was shown, and whether it was clicked, as it was known at one moment and then at the next.

outcomes/
  manifest.json                           OutcomesManifest; its lists only grow
  date=2026-11-23/revision-0001.parquet   impressions of that date by event_timestamp (UTC), by OUTCOME_FIELDS
  date=2026-11-23/revision-0002.parquet   the same date as it was known later
  quarantine/join-0002.parquet            clicks that belong to nothing, by QUARANTINE_FIELDS

A file is never changed. A click that comes in after its date was written makes a new revision, and a reader takes, of
each date, the last one that was there at the moment it reads as of; so a decision can be repeated on what it knew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime, Field

from evergreen.contracts.artifact import JsonModel, atomic_directory
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import ITEM_FIELDS, REQUEST_FIELDS
from evergreen.contracts.mapping import FeatureType, LogKind, Mapping
from evergreen.contracts.snapshot import TIMESTAMP_TYPE

SCHEMA_VERSION = 1

OUTCOME_FIELDS = (
    *REQUEST_FIELDS,
    *ITEM_FIELDS,
    pa.field("clicked", pa.bool_(), nullable=False),
    pa.field("click_timestamp", TIMESTAMP_TYPE),  # of the first click
    pa.field("rating", pa.float32()),
    pa.field("dwell_seconds", pa.float32()),
)
"""Columns of every file; then come the features of the log's mapping as served, with FEATURE_PREFIX."""

FEATURE_PREFIX = "feature_"
"""A feature may have any name, also that of a column of the row."""

MATURE = "mature"
"""Column that a reader adds: whether the attribution window was over at the moment that is read as of."""

QUARANTINE_FIELDS = (
    pa.field("source", pa.string(), nullable=False),
    pa.field("line", pa.int64(), nullable=False),  # the row's number in the file, from 1
    pa.field("reason", pa.string(), nullable=False),
    pa.field("request_id", pa.string()),
    pa.field("item_id", pa.string()),
    pa.field("click_timestamp", pa.string()),  # as it was written
)

_FEATURE_TYPES = {
    FeatureType.NUMERIC: pa.float64(),
    FeatureType.CATEGORICAL: pa.string(),
    FeatureType.MULTI: pa.list_(pa.string()),
}
_BATCH_ROWS = 200_000


def outcome_schema(mapping: Mapping | None) -> pa.Schema:
    """Columns of the outcomes of a log with this mapping; None: without features."""
    features = mapping.all_features.items() if mapping is not None else ()
    return pa.schema([*OUTCOME_FIELDS, *(pa.field(FEATURE_PREFIX + n, _FEATURE_TYPES[f.type]) for n, f in features)])


class Delay(JsonModel):
    """How long after the impression people click, of clicks on mature impressions.

    Younger impressions are left out: of their clicks only the fast ones are there. What comes after the attribution
    window is not a click here; the manifest counts it among the quarantined.
    """

    clicks: int
    quantiles_seconds: dict[str, float]
    """By share of the clicks: "0.5" is the median. Empty without a click."""
    later_than: dict[str, float]
    """Share of the clicks that came later than this part of the window, by part: "0.1", "0.5" …"""


class Revision(JsonModel):
    """One date as it was known from a moment on."""

    date: date
    number: int = Field(ge=1)
    as_of: AwareDatetime
    rows: int
    clicks: int
    mature_rows: int
    """At `as_of`."""
    corrected_rows: int
    """Labels that had been mature at the join before and were wrong or absent: late clicks, and late impressions."""
    degraded_rows: int
    path: str
    sha256: str


class Join(JsonModel):
    """One run of the join: what it read, and what became of it."""

    as_of: AwareDatetime
    start: AwareDatetime | None
    """Impressions before it were left as they are; null: none."""
    impressions: int
    impressions_left_out: dict[str, int]
    clicks: int
    """Rows of the click log."""
    attributed: int
    clicks_left_out: dict[str, int]
    """Clicks that are not of this range, by reason."""
    quarantined: dict[str, int]
    """Clicks that belong to nothing, by reason."""
    lowest_sampling_rate: float | None
    """Below 1 some requests are not logged, and their clicks are among the quarantined; null: no impressions."""
    delay: Delay
    written: int
    """New revisions."""


class OutcomesManifest(JsonModel):
    """Which revision of each date holds as of when."""

    schema_version: int = SCHEMA_VERSION
    window_seconds: float = Field(gt=0)
    mapping: Mapping | None
    """Whose features the rows have; null: none."""
    joins: tuple[Join, ...] = ()
    revisions: tuple[Revision, ...] = ()

    @property
    def window(self) -> timedelta:
        """The attribution window."""
        return timedelta(seconds=self.window_seconds)

    def latest(self, as_of: datetime | None = None) -> list[Revision]:
        """The revision of each date that was the last one at a moment, by date. None: of all."""
        known = [r for r in self.revisions if as_of is None or r.as_of <= as_of]
        return [value for _, value in sorted({r.date: r for r in known}.items())]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes on disk."""

    path: Path
    manifest: OutcomesManifest

    MANIFEST = "manifest.json"

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """Open outcomes.

        Raises:
            ArtifactError: not outcomes, of another schema version, or a file is missing.
        """
        path = Path(path)
        manifest = OutcomesManifest.read(path / cls.MANIFEST)
        if manifest.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: outcomes of version {manifest.schema_version}, this Evergreen reads {SCHEMA_VERSION}: join "
                "the logs again into another folder"
            )
        for revision in manifest.revisions:
            if not (path / revision.path).is_file():
                raise ArtifactError(f"{path}: {revision.path} is missing: join the logs again into another folder")
        return cls(path, manifest)

    @property
    def as_of(self) -> datetime | None:
        """The moment up to which clicks are known; None: nothing was joined yet."""
        return self.manifest.joins[-1].as_of if self.manifest.joins else None

    def rows(
        self,
        *,
        as_of: datetime | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        mature: bool = False,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.Table]:
        """Tables of outcomes in time order, at most 200,000 rows at a time.

        Args:
            as_of: what was known then; None: what is known.
            start: impressions before it are left aside.
            end: impressions at or after it are left aside.
            mature: only labels that can no longer change but by a late click.
            columns: those to read; default: all.

        Yields:
            (num_rows) with `columns`, then MATURE.
        """
        joined = [join.as_of for join in self.manifest.joins if as_of is None or join.as_of <= as_of]
        if not joined:
            return
        # What came after the last join nobody has looked at, so no label matures by waiting.
        matured = pa.scalar(joined[-1] - self.manifest.window, TIMESTAMP_TYPE)
        wanted = list(columns) if columns is not None else outcome_schema(self.manifest.mapping).names
        read = list(dict.fromkeys([*wanted, "event_timestamp"]))
        for revision in self.manifest.latest(as_of):
            if not _may_hold(revision.date, start, end):
                continue
            # Opened as a file, for a dataset would take the date of its folder for a column.
            with pq.ParquetFile(self.path / revision.path) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=read):
                    table = pa.Table.from_batches([batch])
                    times = table["event_timestamp"]
                    is_mature = pc.less_equal(times, matured)
                    keep = is_mature if mature else pa.array([True] * table.num_rows)
                    if start is not None:
                        keep = pc.and_(keep, pc.greater_equal(times, pa.scalar(start, TIMESTAMP_TYPE)))
                    if end is not None:
                        keep = pc.and_(keep, pc.less(times, pa.scalar(end, TIMESTAMP_TYPE)))
                    table = table.select(wanted).append_column(MATURE, is_mature).filter(keep)
                    if table.num_rows:
                        yield table

    def export_click_log(self, out: Path, *, as_of: datetime | None = None, start: date | None = None) -> Path:
        """Write a click log that `ingest_log` reads, with its mapping: the circle closes here.

        Ingest it with the same `as_of`: rows whose window is open then are neither trained on nor tested.

        Args:
            out: directory to write: `mapping.toml`, and a file a date in `events`; replaced if it exists.
            as_of: as in `rows`.
            start: dates before it are left aside.

        Returns:
            The mapping.

        Raises:
            ArtifactError: the outcomes were joined without a mapping, or no date is left.
        """
        if self.manifest.mapping is None:
            raise ArtifactError(f"{self.path}: joined without a mapping, so nothing is known of the log's features")
        revisions = [r for r in self.manifest.latest(as_of) if start is None or r.date >= start]
        if not revisions:
            raise ArtifactError(f"{self.path}: no outcomes as of {as_of or 'now'} from {start or 'the first date'} on")
        with atomic_directory(Path(out)) as scratch:
            (scratch / "events").mkdir()
            for revision in revisions:
                shutil.copyfile(self.path / revision.path, scratch / "events" / f"{revision.date}.parquet")
            text = _toml(event_mapping(self.manifest.mapping, self.manifest.window))
            (scratch / "mapping.toml").write_text(text, encoding="utf-8")
        return Path(out) / "mapping.toml"


def event_mapping(mapping: Mapping, window: timedelta) -> Mapping:
    """How outcomes become the event schema again: the mapping of the log that the model was trained on, other columns.

    Args:
        mapping: of that log.
        window: attribution window of the outcomes.
    """
    impressions = mapping.kind is LogKind.IMPRESSIONS
    return Mapping.model_validate(
        {
            **mapping.model_dump(
                mode="json", include={"name", "kind", "negatives_per_positive", "recommend_seen_items"}
            ),
            "description": f"Impressions of our own server with their clicks, in the features of {mapping.name}",
            "source": {"format": "parquet", "pattern": "**/*.parquet"},
            "timestamp": {"column": "event_timestamp"},
            "columns": {
                **{name: name for name in ("request_id", "position", "dwell_seconds")},
                **{n: n for n in ("user_id", "item_id", "category") if getattr(mapping.columns, n) is not None},
                **({"click_timestamp": "click_timestamp"} if impressions else {}),
            },
            # Elsewhere than in a log of impressions the event is the click, and what was only shown is left out.
            "label": {"column": "clicked", "positive": ["true"], "negative": ["false"]},
            "rating": {**mapping.rating.model_dump(), "column": "rating"} if mapping.rating is not None else None,
            **{
                f"{role}_features": {
                    name: {"column": FEATURE_PREFIX + name, "type": feature.type.value}
                    for name, feature in getattr(mapping, f"{role}_features").items()
                }
                for role in ("user", "item", "context")
            },
            "split": {**mapping.split.model_dump(), "attribution_window": window},
        }
    )


def _may_hold(day: date, start: datetime | None, end: datetime | None) -> bool:
    """Whether a file of this date may have rows of the range."""
    return (start is None or day >= start.astimezone(UTC).date()) and (end is None or day <= end.astimezone(UTC).date())


def _toml(mapping: Mapping) -> str:
    """A mapping as TOML, which its readers take; the standard library only reads it."""

    def value(given: Any) -> str:
        if isinstance(given, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in given.items()) + "}"
        # A string of JSON is one of TOML as long as it is not escaped to ASCII, and so are numbers and lists.
        return json.dumps(given, ensure_ascii=False)

    given = mapping.model_dump(mode="json", exclude_none=True)
    plain = [f"{key} = {value(item)}" for key, item in given.items() if not isinstance(item, dict)]
    tables = [
        "\n".join([f"\n[{key}]", *(f"{name} = {value(entry)}" for name, entry in item.items())])
        for key, item in given.items()
        if isinstance(item, dict)
    ]
    return "\n".join([*plain, *tables]) + "\n"
