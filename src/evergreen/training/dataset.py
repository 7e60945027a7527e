"""The training set: events (and drawn negatives) joined with the features that were known before them, cut in time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import TrainingError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.instant import from_micros, to_micros
from evergreen.contracts.mapping import LogKind, Mapping, Role
from evergreen.contracts.snapshot import Snapshot
from evergreen.contracts.training_set import (
    ROW_FIELDS,
    SPLITS,
    ColumnKind,
    Feature,
    SplitInfo,
    TrainingSet,
    TrainingSetManifest,
)
from evergreen.features.columns import feature_columns
from evergreen.features.point_in_time import items_as_of
from evergreen.training.negatives import draw_negatives
from evergreen.training.split import SplitBoundaries, split_boundaries, with_spans_of_at_most

logger = logging.getLogger(__name__)

EMBARGO = "in the embargo between two splits or before as_of"
REPEAT = "interaction with an item that the user already knew"
NOT_IN_CATALOGUE = "first interaction of its item: nobody could have recommended it"

BEFORE_START = "before the time that is learned from"
BROKEN = "of a time in which the data was broken"

_OF_THE_SLATE = ("position", "propensity")
"""They belong to what was shown. Interactions lose them: drawn negatives have none, so they would tell the label."""
_JOINED_ROWS = 2_000_000
"""How many rows are joined and held at once: about 2 GB a million, most of it users' histories."""
_ROW_GROUP_ROWS = 128 * 1024

_OUTCOMES = ("rating", "dwell_seconds")
"""What came of an event; a drawn negative has none."""


class HistoricalFeatures(Protocol):
    """What joins features to a spine: the Feast store, through one feature service."""

    def historical(self, spine: pa.Table, service: str = "ranker_v1", *, known_at: pa.Array | None = None) -> pa.Table:
        """The spine's rows, in order, with the service's features as known strictly before each, or at `known_at`."""
        ...


@dataclass(frozen=True)
class RowsToLearnFrom:
    """Rows that become a training set: the table, in time order, and what was left out and why."""

    table: pa.Table
    left_out: dict[str, int]

    def chosen(
        self, *, start: datetime | None = None, leave_out: Sequence[tuple[datetime, datetime]] = ()
    ) -> RowsToLearnFrom:
        """The rows from `start` on that lie in no half-open range of `leave_out`; the others are counted."""
        time, left_out = _micros(self.table), dict(self.left_out)
        keep = np.ones(len(time), dtype=np.bool_)
        for reason, of_reason in (
            (BEFORE_START, time < (to_micros(start) if start is not None else 0)),
            (BROKEN, _inside(time, leave_out)),
        ):
            if count := int((keep & of_reason).sum()):
                left_out[reason] = count
            keep &= ~of_reason
        return self if keep.all() else RowsToLearnFrom(self.table.filter(pa.array(keep)), left_out)


def build_training_set(
    snapshot: Snapshot,
    tables: FeatureTables,
    store: HistoricalFeatures,
    out: Path,
    *,
    service: str = "ranker_v1",
    seed: int = 0,
    start: datetime | None = None,
    leave_out: Sequence[tuple[datetime, datetime]] = (),
    batch: timedelta | None = None,
    changed_at: datetime | None = None,
) -> TrainingSet:
    """Join, split and write the training set of a snapshot.

    Args:
        snapshot: the log.
        tables: its feature tables, for the catalogue of each moment.
        store: joins the feature service to the rows.
        out: where the training set goes; written whole or not at all.
        service: the feature service that the models read.
        seed: of the drawn negatives (interactions only).
        start: rows before it are not learned from; their features know them all the same. None: all rows.
        leave_out: half-open ranges of time in which the data was broken; likewise.
        batch: how often the features that serve are materialized, counted from midnight (UTC): a row then knows what
            was known at the last time before it, as the server will. None: what was known just before it, as where
            features are streamed.
        changed_at: since when the world is another one. Of the time since then a split with a span takes a sixth at
            most, or nothing of what is new would be left to learn from. None: nothing is known of a change.

    Raises:
        TrainingError: a split is empty, or no feature says anything.
    """
    if tables.manifest.snapshot_id != snapshot.id:
        raise TrainingError(
            f"feature tables were built from snapshot {tables.manifest.snapshot_id[:12]}, not from {snapshot.id[:12]}: "
            "build them again"
        )
    rows = rows_to_learn_from(snapshot, tables, seed=seed).chosen(start=start, leave_out=leave_out)
    time = _micros(rows.table)
    split = snapshot.mapping.split
    if changed_at is not None:
        split = with_spans_of_at_most(split, (snapshot.as_of - changed_at) / 6)
    boundaries = split_boundaries(time, split, as_of=snapshot.as_of, leave_out=leave_out)
    table = rows.table.filter(pa.array(boundaries.assign(time) >= 0))
    left_out = dict(rows.left_out)
    if embargoed := rows.table.num_rows - table.num_rows:
        left_out[EMBARGO] = embargoed
    return write_training_set(
        _joined(table.append_column("row_id", pa.array(np.arange(table.num_rows))), store, service, batch),
        out,
        boundaries=boundaries,
        snapshot_id=snapshot.id,
        mapping=snapshot.mapping.model_copy(update={"split": split}),
        as_of=snapshot.as_of,
        service=service,
        left_out=left_out,
    )


def _joined(rows: pa.Table, store: HistoricalFeatures, service: str, batch: timedelta | None) -> Iterator[pa.Table]:
    """In time order: what is joined at once is what has to be held at once."""
    for first in range(0, rows.num_rows, _JOINED_ROWS):
        part = rows.slice(first, _JOINED_ROWS)
        logger.info("joining %s to rows %d to %d of %d", service, first, first + len(part), rows.num_rows)
        yield store.historical(part, service=service, known_at=_last_batch(part, batch) if batch is not None else None)


def _last_batch(rows: pa.Table, batch: timedelta) -> pa.Array:
    micros, length = _micros(rows), batch // timedelta(microseconds=1)
    return pa.array(micros - micros % length).cast(rows["event_timestamp"].type)


def write_training_set(
    joined: Iterable[pa.Table],
    out: Path,
    *,
    boundaries: SplitBoundaries,
    snapshot_id: str,
    mapping: Mapping,
    as_of: datetime,
    service: str = "ranker_v1",
    left_out: dict[str, int] | None = None,
) -> TrainingSet:
    """Write rows with features as a training set, each row to its split; those of no split are counted.

    Args:
        joined: tables in time order, with a `row_id`, `ROW_FIELDS` and the columns of the service.
        out: where the training set goes; written whole or not at all.
        boundaries: of the splits.
        snapshot_id: of the log.
        mapping: of the log.
        as_of: the moment up to which the rows know the world.
        service: the feature service of the columns.
        left_out: rows that are not there, by reason.

    Raises:
        TrainingError: no feature says anything.
    """
    counts = Counter(left_out or {})
    with atomic_directory(out) as scratch:
        with closing(_SplitFiles(scratch, feature_columns(mapping), boundaries, mapping.kind)) as splits:
            for part in joined:
                place = boundaries.assign(_micros(part))
                counts[EMBARGO] += int((place < 0).sum())
                splits.write(part, place)
        features, dropped = splits.informative()
        TrainingSetManifest(
            snapshot_id=snapshot_id,
            mapping=mapping,
            as_of=as_of,
            feature_service=service,
            embargo_seconds=mapping.split.attribution_window.total_seconds(),
            splits=splits.info(),
            features=tuple(features),
            dropped_features=dropped,
            left_out={reason: count for reason, count in counts.items() if count},
        ).write(scratch / TrainingSet.MANIFEST)
    return TrainingSet.load(out)


def _inside(time: NDArray[np.int64], ranges: Sequence[tuple[datetime, datetime]]) -> NDArray[np.bool_]:
    inside = np.zeros(len(time), dtype=np.bool_)
    for start, end in ranges:
        inside |= (time >= to_micros(start)) & (time < to_micros(end))
    return inside


def _micros(table: pa.Table) -> NDArray[np.int64]:
    micros: NDArray[np.int64] = table["event_timestamp"].cast(pa.int64()).to_numpy()
    return micros


def _read_events(snapshot: Snapshot) -> pa.Table:
    """Columns of the events that a row to learn from needs, in time order."""
    context = list(snapshot.mapping.features(Role.CONTEXT))
    columns = ["event_timestamp", "request_id", "user_id", "item_id", "category", *_OF_THE_SLATE, *_OUTCOMES, *context]
    label = ["clicked"] if snapshot.kind is LogKind.IMPRESSIONS else []
    return ds.dataset(snapshot.files, format="parquet").to_table(columns=columns + label)


def rows_to_learn_from(snapshot: Snapshot, tables: FeatureTables, *, seed: int = 0) -> RowsToLearnFrom:
    """Every impression or rating of a log, or every interaction with the items drawn against it, before features.

    Args:
        snapshot: the log.
        tables: its feature tables, for the catalogue of each moment (interactions only).
        seed: of the drawn negatives (interactions only).
    """
    if snapshot.kind is LogKind.INTERACTIONS:
        return _interactions(snapshot, tables, seed)
    events = _read_events(snapshot)
    source = "clicked" if snapshot.kind is LogKind.IMPRESSIONS else "rating"
    return RowsToLearnFrom(events.append_column("label", events[source].cast(pa.float32())), {})


def _interactions(snapshot: Snapshot, tables: FeatureTables, seed: int) -> RowsToLearnFrom:
    """Every interaction that could have been recommended is a positive row; drawn items are the negatives."""
    events = _read_events(snapshot)
    items = items_as_of(tables, snapshot.as_of)
    time = _micros(events)
    first_seen = items["item_first_seen"].cast(pa.int64()).to_numpy()
    item = pc.index_in(events["item_id"], value_set=items["item_id"].combine_chunks()).to_numpy().astype(np.int64)
    user = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)

    left_out = {}
    keep = first_seen[item] < time
    left_out[NOT_IN_CATALOGUE] = int((~keep).sum())
    if not snapshot.mapping.recommend_seen_items:
        _, first = np.unique(user * len(first_seen) + item, return_index=True)
        is_first = np.zeros(len(user), dtype=bool)
        is_first[first] = True
        left_out[REPEAT] = int((keep & ~is_first).sum())
        keep &= is_first
    # Draw with all interactions known, so that what a user met before is never a negative for him.
    drawn = draw_negatives(
        user,
        item,
        time,
        first_seen,
        per_positive=snapshot.mapping.negatives_per_positive,
        rng=np.random.default_rng(seed),
    )
    kept = keep[drawn.positive]
    positive_row = np.flatnonzero(keep)
    negative_row, negative_item = drawn.positive[kept], drawn.item[kept]

    rows = events.take(pa.array(np.concatenate([positive_row, negative_row])))
    item_code = pa.array(np.concatenate([item[positive_row], negative_item]))
    for name in ("item_id", "category"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, items[name].take(item_code))
    is_drawn = pa.array(np.repeat([False, True], [len(positive_row), len(negative_row)]))
    for name in (*_OF_THE_SLATE, *_OUTCOMES):
        empty = pa.nulls(rows.num_rows, rows.schema.field(name).type)
        kept_values = rows[name] if name in _OUTCOMES else empty
        rows = rows.set_column(rows.schema.get_field_index(name), name, pc.if_else(is_drawn, empty, kept_values))
    label = np.concatenate([np.ones(len(positive_row)), np.zeros(len(negative_row))]).astype(np.float32)
    rows = rows.append_column("label", pa.array(label))
    order = np.argsort(np.concatenate([positive_row, negative_row]), kind="stable")
    return RowsToLearnFrom(rows.take(pa.array(order)), {reason: n for reason, n in left_out.items() if n})


class _SplitFiles:
    """The Parquet files of the splits while they are written, and what is learned of their columns on the way."""

    def __init__(self, folder: Path, features: tuple[Feature, ...], boundaries: SplitBoundaries, kind: LogKind) -> None:
        self._folder = folder
        self._features = features
        self._boundaries = boundaries
        self._kind = kind
        names = [field.name for field in ROW_FIELDS]
        self._names = [*names, *(feature.name for feature in features if feature.name not in names)]
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._rows = dict.fromkeys(SPLITS, 0)
        self._label_sums = dict.fromkeys(SPLITS, 0.0)
        self._values: dict[str, _Values] = {feature.name: _Values() for feature in features}

    def close(self) -> None:
        """Finish the files."""
        for writer in self._writers.values():
            writer.close()

    def write(self, joined: pa.Table, place: NDArray[np.int8]) -> None:
        """Append rows, each to its split."""
        joined = joined.select(self._names)
        for index, split in enumerate(SPLITS):
            rows = joined.filter(pa.array(place == index))
            if split not in self._writers:
                path = self._folder / f"{split}.parquet"
                self._writers[split] = pq.ParquetWriter(path, rows.schema, compression="zstd")
            if rows.num_rows == 0:
                continue
            self._writers[split].write_table(rows, row_group_size=_ROW_GROUP_ROWS)
            self._rows[split] += rows.num_rows
            self._label_sums[split] += float(pc.sum(rows["label"]).as_py() or 0.0)
            if split == "train":
                for feature in self._features:
                    self._values[feature.name].add(rows[feature.name], feature.kind)

    def info(self) -> dict[str, SplitInfo]:
        """What was written."""
        return {
            split: SplitInfo(
                start=from_micros(start),
                end=from_micros(end),
                rows=self._rows[split],
                positives=self._rows[split] if self._kind is LogKind.RATINGS else int(self._label_sums[split]),
                label_mean=self._label_sums[split] / self._rows[split] if self._rows[split] else 0.0,
            )
            for split, (start, end) in self._boundaries.ranges.items()
        }

    def informative(self) -> tuple[list[Feature], dict[str, str]]:
        """Features that take at least two values in the training rows, and why the others do not.

        Raises:
            TrainingError: there are none.
        """
        dropped = {name: reason for name, values in self._values.items() if (reason := values.says_nothing())}
        if len(dropped) == len(self._features):
            raise TrainingError(
                "no feature says anything about this log: every column is constant or missing. Name feature columns in "
                "the mapping ([user_features], [item_features], [context_features])"
            )
        if dropped:
            logger.info(
                "%d features say nothing on this log and are not read: %s", len(dropped), ", ".join(sorted(dropped))
            )
        return [feature for feature in self._features if feature.name not in dropped], dropped


@dataclass
class _Values:
    """What a column has held so far."""

    first: pa.Scalar | None = None
    has_missing: bool = False
    varies: bool = False

    def add(self, column: pa.ChunkedArray, kind: ColumnKind) -> None:
        """Look at more rows."""
        if self.varies:
            return
        if kind in (ColumnKind.SEQUENCE, ColumnKind.MULTI):
            self.varies = bool(pc.any(pc.greater(pc.list_value_length(column), 0)).as_py())
            return
        known = column.drop_null()
        if len(known) and self.first is None:
            self.first = known[0]
        self.has_missing |= len(known) < len(column)
        if self.first is not None:
            self.varies = self.has_missing or bool(pc.any(pc.not_equal(known, self.first)).as_py())

    def says_nothing(self) -> str | None:
        """Why the column is of no use; None: it is."""
        if self.varies:
            return None
        if self.first is None:
            return "no value in the training rows"
        return f"constant in the training rows: {self.first.as_py()!r}"
