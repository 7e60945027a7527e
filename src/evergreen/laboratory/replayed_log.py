"""A log that is lived through again: its rows with the features of their time, and training sets as of any moment.

log/
  snapshot/  feature_tables/    of the whole log; every value is known strictly before its time, so tables of the
                                whole log say of a moment what tables that end there say
  rows.parquet                  rows to learn from with features, in time order, and when each was clicked
  clicks.parquet                what monitoring.click_log reads
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import TIMESTAMP_TYPE, Snapshot
from evergreen.contracts.training_set import TrainingSet
from evergreen.features.point_in_time import join_features
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.training.dataset import RowsToLearnFrom, rows_to_learn_from, write_training_set
from evergreen.training.split import split_boundaries

logger = logging.getLogger(__name__)

CLICK_TIMESTAMP = "click_timestamp"

_KEY = b"evergreen.laboratory.rows"
_JOINED_ROWS = 500_000
_BATCH_ROWS = 131_072
_ROW_GROUP_ROWS = 16_384
"""A training set reads whole row groups, and throws away what is not of its time."""


@dataclass(frozen=True)
class ReplayedLog:
    """A log on disk, ready to be lived through."""

    path: Path
    snapshot: Snapshot
    left_out: dict[str, int]
    """Events that are no rows to learn from, by reason."""

    @property
    def clicks(self) -> Path:
        """The click log: every click with its time."""
        return self.path / "clicks.parquet"

    @property
    def attribution(self) -> timedelta:
        """How long after an event its label may change; joins need a time, so at least a second."""
        return max(self.snapshot.mapping.split.attribution_window, timedelta(seconds=1))

    def read(self, start: datetime, end: datetime) -> pa.Table:
        """(num_rows,) all columns of the rows in [start, end), in time order."""
        return self._rows().to_table(filter=_between(start, end))

    def training_set(
        self,
        out: Path,
        *,
        start: datetime,
        as_of: datetime,
        validation: timedelta,
        test: timedelta,
        leave_out: Sequence[tuple[datetime, datetime]] = (),
    ) -> TrainingSet:
        """What a pipeline would have learned from at a moment.

        Args:
            out: where it goes.
            start: of the rows.
            as_of: the moment. Labels younger than the attribution window are not final then, and in no split.
            validation: time that the validation split covers …
            test: … and, after it, the test split.
            leave_out: half-open ranges of time in which the data was broken.

        Raises:
            TrainingError: a split is empty.
        """
        mapping = self.snapshot.mapping
        spans = {"validation_span": validation, "test_span": test}
        mapping = mapping.model_copy(update={"split": mapping.split.model_copy(update=spans)})
        inside = _between(start, as_of)
        moments = self._rows().to_table(columns=["event_timestamp"], filter=inside)
        chosen = RowsToLearnFrom(moments, {}).chosen(leave_out=leave_out)
        time = chosen.table["event_timestamp"].cast(pa.int64()).to_numpy()

        def parts() -> Iterator[pa.Table]:
            for batch in self._rows().to_batches(filter=inside, batch_size=_BATCH_ROWS):
                if batch.num_rows:
                    yield RowsToLearnFrom(pa.Table.from_batches([batch]), {}).chosen(leave_out=leave_out).table

        return write_training_set(
            parts(),
            out,
            boundaries=split_boundaries(time, mapping.split, as_of=as_of, leave_out=leave_out),
            snapshot_id=self.snapshot.id,
            mapping=mapping,
            as_of=as_of,
            left_out=chosen.left_out,
        )

    def _rows(self) -> ds.Dataset:
        return ds.dataset(self.path / "rows.parquet", format="parquet")


def prepare_log(mapping: Mapping, data: str, out: Path, *, seed: int = 0) -> ReplayedLog:
    """Ingest a log, and join its rows with their features once. What a run before has left of the same log is kept.

    Args:
        mapping: of the log.
        data: path or fsspec URL of the log.
        out: folder to write.
        seed: of drawn negatives (interactions).

    Raises:
        MappingError: the mapping does not fit the log.
        InputError: the log cannot be read.
    """
    snapshot = ingest_log(mapping, data, out / "snapshot")
    tables = _feature_tables(snapshot, out / "feature_tables")
    rows = rows_to_learn_from(snapshot, tables, seed=seed)
    log = ReplayedLog(out, snapshot, rows.left_out)
    file, key = out / "rows.parquet", f"{snapshot.id} {seed}".encode()
    if not file.exists() or (pq.read_schema(file).metadata or {}).get(_KEY) != key:
        table = rows.table.append_column("row_id", pa.array(np.arange(rows.table.num_rows)))
        table = table.append_column(CLICK_TIMESTAMP, _click_times(snapshot, table))
        _write_clicks(table, log)
        _write_rows(table, tables, file, key)
    return log


def request_ids(rows: pa.Table, kind: LogKind) -> pa.ChunkedArray:
    """(num_rows,) the request that each row was shown in; where nobody knows it, and of drawn rows, one of its own."""
    own = pc.binary_join_element_wise("row", rows["row_id"].cast(pa.string()), "-")
    return pc.coalesce(rows["request_id"], own) if kind is LogKind.IMPRESSIONS else own


def _feature_tables(snapshot: Snapshot, path: Path) -> FeatureTables:
    try:
        tables = FeatureTables.load(path)
    except ArtifactError:
        return build_feature_tables(snapshot, path)
    return tables if tables.manifest.snapshot_id == snapshot.id else build_feature_tables(snapshot, path)


def _click_times(snapshot: Snapshot, rows: pa.Table) -> pa.ChunkedArray:
    """(num_rows,) when each row was clicked; null: never. Elsewhere than in impressions the event is the click."""
    if snapshot.kind is LogKind.RATINGS:
        return rows["event_timestamp"]
    nothing = pa.scalar(None, TIMESTAMP_TYPE)
    if snapshot.kind is LogKind.INTERACTIONS:
        return pc.if_else(pc.equal(rows["label"], 1), rows["event_timestamp"], nothing)
    window = pa.scalar(snapshot.mapping.split.attribution_window, pa.duration("us"))
    latest = pc.add(rows["event_timestamp"], window)
    events = ds.dataset(snapshot.files, format="parquet")
    known = latest
    if CLICK_TIMESTAMP in events.schema.names:  # rows of impressions are the events, one for one
        known = pc.coalesce(events.to_table(columns=[CLICK_TIMESTAMP])[CLICK_TIMESTAMP], latest)
    return pc.if_else(pc.equal(rows["label"], 1), known, nothing)


def _write_clicks(rows: pa.Table, log: ReplayedLog) -> None:
    clicked = rows.filter(pc.is_valid(rows[CLICK_TIMESTAMP]))
    columns = {name: clicked[name] for name in ("item_id", CLICK_TIMESTAMP, "rating", "dwell_seconds")}
    clicks = pa.table({"request_id": request_ids(clicked, log.snapshot.kind), **columns})
    pq.write_table(clicks.sort_by(CLICK_TIMESTAMP), log.clicks)


def _write_rows(rows: pa.Table, tables: FeatureTables, file: Path, key: bytes) -> None:
    scratch = file.with_name(f".{file.name}.partial")
    writer: pq.ParquetWriter | None = None
    try:
        for first in range(0, rows.num_rows, _JOINED_ROWS):
            joined = join_features(rows.slice(first, _JOINED_ROWS), tables)
            joined = joined.replace_schema_metadata({_KEY: key})
            writer = writer or pq.ParquetWriter(scratch, joined.schema, compression="zstd")
            writer.write_table(joined, row_group_size=_ROW_GROUP_ROWS)
    finally:
        if writer is not None:
            writer.close()
    scratch.replace(file)


def _between(start: datetime, end: datetime) -> ds.Expression:
    time = ds.field("event_timestamp")
    return (time >= pa.scalar(start, TIMESTAMP_TYPE)) & (time < pa.scalar(end, TIMESTAMP_TYPE))
