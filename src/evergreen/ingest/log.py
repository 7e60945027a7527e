"""Ingest a log: read, check, sort, write. The result is whole or absent, and the same for the same input."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.errors import InputError
from evergreen.contracts.instant import from_micros
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import Snapshot, SnapshotManifest, event_schema
from evergreen.ingest.blocks import Block, Reject, int64_array
from evergreen.ingest.columns import check_columns, check_mapping, needed_columns
from evergreen.ingest.engine import connect
from evergreen.ingest.events import write_events
from evergreen.ingest.parquet import read_names, read_parquet
from evergreen.ingest.quarantine import Quarantine
from evergreen.ingest.schema import BLOCK, LEFT_OUT, ORDINAL, REASON, ROW, TIME_US, block_query, value_schema
from evergreen.ingest.sources import SourceFile, list_files
from evergreen.ingest.staging import Staging
from evergreen.ingest.text import read_header, read_text

logger = logging.getLogger(__name__)

_HOUR = timedelta(hours=1)
_PROGRESS_ROWS = 1_000_000


def ingest_log(mapping: Mapping, data: str, out: Path, *, as_of: datetime | None = None) -> Snapshot:
    """Turn a log into a snapshot.

    Args:
        mapping: how the log's columns become the event schema.
        data: path or fsspec URL of a file or a folder; CSV, TSV or Parquet, compressed or not.
        out: directory of the snapshot; whatever it held is replaced.
        as_of: with an offset; events at or after it are left out and counted. Default: the full hour after the last
            event.

    Returns:
        The snapshot. Rows that break the schema are in its quarantine, with source, line and reason.

    Raises:
        MappingError: the mapping names what does not exist (a time zone, an encoding, a time format).
        InputError: the log is missing, empty or damaged, lacks a column, or none of its rows fits the schema.
    """
    if as_of is not None and as_of.tzinfo is None:
        raise InputError(f"as_of = {as_of.isoformat()}: has no offset: write {as_of.isoformat()}+00:00 if it is UTC")
    check_mapping(mapping)
    with atomic_directory(Path(out)) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        with closing(connect(mapping, scratch)) as connection, Quarantine(folder) as quarantine:
            sources = [_open(file, mapping, scratch) for file in list_files(data, mapping.source)]
            staging = Staging(scratch, value_schema(mapping))
            left_out = _stage(sources, mapping, as_of, staging, quarantine, connection, scratch)
            _check_rows(data, staging, quarantine, left_out, as_of)
            manifest = _write(mapping, as_of, folder, staging, quarantine, left_out, connection)
        shutil.rmtree(scratch)
        manifest.write(folder / Snapshot.MANIFEST)
    snapshot = Snapshot(Path(out), manifest)
    logger.info("snapshot %s: %d rows in %d files", snapshot.id[:12], manifest.rows, len(manifest.files))
    return snapshot


@dataclass(frozen=True)
class _Source:
    file: SourceFile
    names: tuple[str, ...]

    def blocks(self, mapping: Mapping, scratch: Path) -> Iterator[Block]:
        columns = list(needed_columns(mapping))
        if self.file.format == "parquet":
            with self.file.open_seekable(scratch) as file:
                yield from read_parquet(file, self.file.name, columns)
        else:
            with self.file.open() as file:
                yield from read_text(file, self.file.name, mapping.source, self.names, columns)


def _open(file: SourceFile, mapping: Mapping, scratch: Path) -> _Source:
    """Read a file's column names and check them: before the first row, a wrong last file is known."""
    if file.format == "parquet":
        with file.open_seekable(scratch) as stream:
            names = read_names(stream, file.name)
    else:
        with file.open() as stream:
            names = read_header(stream, file.name, mapping.source)
    check_columns(mapping, names, file.name)
    return _Source(file, names)


def _stage(
    sources: Iterable[_Source],
    mapping: Mapping,
    as_of: datetime | None,
    staging: Staging,
    quarantine: Quarantine,
    connection: duckdb.DuckDBPyConnection,
    scratch: Path,
) -> Counter[str]:
    """Read and check all rows. Returns the numbers of those that are left out, by reason."""
    left_out: Counter[str] = Counter()
    num_records = 0
    schema = value_schema(mapping)
    for source in sources:
        logger.debug("reading %s", source.file.name)
        before = num_records
        with closing(_ahead(source.blocks(mapping, scratch))) as blocks:
            for block in blocks:
                rows = _checked(block, before, mapping, as_of, connection)
                refused = rows.filter(pc.is_valid(rows[REASON])).select([ROW, REASON]).to_pylist()
                rejects = [Reject(int(block.lines[r[ROW]]), r[REASON], block.row_text(r[ROW])) for r in refused]
                for reject in sorted(block.rejects + rejects, key=lambda reject: reject.line):
                    quarantine.add(source.file.name, reject)
                rows = _without(rows, REASON)
                left_out.update(rows[LEFT_OUT].drop_null().to_pylist())
                staging.add(_without(rows, LEFT_OUT).select(schema.names).cast(schema))
                if num_records // _PROGRESS_ROWS != (num_records + block.num_records) // _PROGRESS_ROWS:
                    logger.info("%d rows read, %d in quarantine", num_records + block.num_records, quarantine.total)
                num_records += block.num_records
    staging.close()
    return left_out


def _checked(
    block: Block, before: int, mapping: Mapping, as_of: datetime | None, connection: duckdb.DuckDBPyConnection
) -> pa.Table:
    """The block's rows with REASON, LEFT_OUT and the values of the schema."""
    table = block.table.append_column(ROW, int64_array(np.arange(len(block.table))))
    table = table.append_column(ORDINAL, int64_array(block.ordinals + before))
    connection.register(BLOCK, table)
    rows = connection.sql(block_query(mapping, block.table.schema, as_of)).to_arrow_table()
    connection.unregister(BLOCK)
    return rows


def _without(rows: pa.Table, reason: str) -> pa.Table:
    """The rows that have no such reason."""
    return rows if rows[reason].null_count == len(rows) else rows.filter(pc.is_null(rows[reason]))


def _ahead(blocks: Iterator[Block]) -> Generator[Block, None, None]:
    """The same blocks, read by another thread one ahead: reading and checking both release the interpreter's lock."""
    handed: queue.Queue[Block | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: Block | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                handed.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for block in blocks:
                put(block)
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  (raised again by the consumer)
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=read, name="evergreen-ingest", daemon=True)
    thread.start()
    try:
        while (item := handed.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _check_rows(
    data: str, staging: Staging, quarantine: Quarantine, left_out: Counter[str], as_of: datetime | None
) -> None:
    """Refuse a log of which nothing is left, and warn of one of which most is lost."""
    total = staging.num_rows + quarantine.total + left_out.total()
    if total == 0:
        raise InputError(f"{data}: no rows: there is a header and nothing else")
    if staging.num_rows == 0 and not left_out:
        raise InputError(f"{data}: none of the {total} rows fits the schema:\n{quarantine.describe()}")
    if staging.num_rows == 0:
        listed = ", ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
        raise InputError(f"{data}: no row is left: {listed}; {quarantine.total} in quarantine (as_of = {as_of})")
    if quarantine.total:
        message = "%d of %d rows (%.2g %%) are in quarantine:\n%s"
        level = logging.WARNING if quarantine.total > total / 2 else logging.INFO
        logger.log(level, message, quarantine.total, total, 100 * quarantine.total / total, quarantine.describe())


def _write(
    mapping: Mapping,
    as_of: datetime | None,
    folder: Path,
    staging: Staging,
    quarantine: Quarantine,
    left_out: Counter[str],
    connection: duckdb.DuckDBPyConnection,
) -> SnapshotManifest:
    """Write the events in time order, and say in the manifest what they are."""
    range_us = _Range()
    files = write_events(range_us.observe(staging.sorted_batches()), event_schema(mapping), folder)
    assert range_us.first is not None
    first, last = from_micros(range_us.first), from_micros(range_us.last)
    impressions = mapping.kind is LogKind.IMPRESSIONS
    num_positives = staging.num_clicked if impressions else staging.num_rows
    if num_positives in (0, staging.num_rows) and impressions:
        logger.warning("%d of %d impressions are clicked: is label.positive right?", num_positives, staging.num_rows)
    return SnapshotManifest(
        mapping=mapping,
        as_of=as_of.astimezone(UTC) if as_of else last.replace(minute=0, second=0, microsecond=0) + _HOUR,
        rows=staging.num_rows,
        num_users=staging.count_distinct(connection, "user_id"),
        num_items=staging.count_distinct(connection, "item_id"),
        num_positives=num_positives,
        first_event=first,
        last_event=last,
        files=tuple(files),
        quarantined=quarantine.counts(),
        quarantine_sha256=quarantine.sha256(),
        left_out=dict(sorted(left_out.items())),
    )


class _Range:
    """First and last time of rows that pass by in order."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.last = 0

    def observe(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if len(batch):
                times = batch.column(TIME_US)
                self.first = times[0].as_py() if self.first is None else self.first
                self.last = times[len(times) - 1].as_py()
            yield batch
