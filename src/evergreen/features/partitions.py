"""Feature tables as folders of Parquet by date: computed for a range of dates, on any engine, again and again.

A date's rows come from the whole history before it. What can change within the range is computed change by change; all
that lies before is one row a key (`activity`): a day of a long log costs reading the log, not writing it again.

Everything is computed in a scratch folder first. Only when all tables are there do the new partitions take the places
of the old ones, by renames, and the manifest says in between which dates are being replaced. So

- a run that fails, or is killed while it computes, changes nothing;
- a run that is killed while it replaces leaves whole partitions, old and new, and tables that `FeatureTables.load`
  refuses until these dates are computed again;
- dates that have no rows any more lose their old partition, which Spark's own dynamic overwrite would keep.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, DateRange, FeatureTables, FeatureTablesManifest
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.engines import DATE, Engine
from evergreen.features.leakage import past_of
from evergreen.features.schema import feature_table_schemas
from evergreen.features.tables import feature_table_expressions

_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)
_SCRATCH = ".partial-"
_LOCK = ".lock"

_logger = logging.getLogger(__name__)


def build_feature_partitions(
    snapshot: Snapshot, out: Path, *, engine: Engine, first: date | None = None, last: date | None = None
) -> FeatureTables:
    """Compute the partitions of a range of dates, and replace just these.

    Args:
        snapshot: what to read.
        out: folder of the tables: new, or with tables of the same snapshot.
        engine: what computes.
        first: the first date. Default: that of the first event.
        last: the last date. Default: that of the snapshot's as_of.

    Returns:
        The tables. `FeatureTables.load` takes them once all dates are there.

    Raises:
        ArtifactError: `out` holds something else, a range is outside the snapshot or would leave a gap, another run
            writes to `out`, or the engine failed.
    """
    out = Path(out).resolve()
    fresh = FeatureTablesManifest(
        snapshot_id=snapshot.id,
        mapping=snapshot.mapping,
        as_of=snapshot.as_of,
        first_event=snapshot.manifest.first_event,
        rows=dict.fromkeys(JOIN_KEYS, 0),
    )
    dates = _range(fresh.all_dates, first, last)
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        before = _existing(out, fresh)
        covered = _union(before, dates)
        with _scratch(out) as scratch:
            _compute(snapshot, scratch, engine, dates, from_the_start=dates.first == fresh.all_dates.first)
            started = fresh.model_copy(update={"partitions": covered, "unfinished": dates})
            _write_manifest(started, out, scratch)
            for name in JOIN_KEYS:
                _replace(scratch, out, name, dates)
            rows = {name: ds.dataset(out / f"{name}.parquet", format="parquet").count_rows() for name in JOIN_KEYS}
            manifest = fresh.model_copy(update={"partitions": covered, "rows": rows})
            _write_manifest(manifest, out, scratch)
    _logger.info("%s: %d rows, %s replaced", out, sum(rows.values()), dates)
    return FeatureTables(out, manifest)


def _range(possible: DateRange, first: date | None, last: date | None) -> DateRange:
    dates = DateRange(first=first or possible.first, last=last or possible.last)
    if not all(possible.first <= day <= possible.last for day in (dates.first, dates.last)):
        raise ArtifactError(f"dates {dates}: the snapshot's features are of {possible}; take dates of these")
    if dates.first > dates.last:
        raise ArtifactError(f"dates {dates}: the first is after the last")
    return dates


def _existing(out: Path, fresh: FeatureTablesManifest) -> FeatureTablesManifest | None:
    """The manifest of the tables that are there, once it is certain that they are of the same kind."""
    path = out / FeatureTables.MANIFEST
    if not path.is_file():
        if found := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")):
            raise ArtifactError(f"{out}: holds {found[0]} and no {path.name}: choose an empty folder")
        return None
    there = FeatureTablesManifest.read(path)
    way_out = "choose another folder, or remove this one"
    if there.snapshot_id != fresh.snapshot_id:
        raise ArtifactError(
            f"{out}: holds features of snapshot {there.snapshot_id[:12]} ({there.mapping.name}, as of {there.as_of}), "
            f"not of {fresh.snapshot_id[:12]} ({fresh.mapping.name}, as of {fresh.as_of}): {way_out}"
        )
    if there.partitions is None:
        raise ArtifactError(f"{out}: its tables are one file each and have no partitions to replace: {way_out}")
    if other := there.rows.keys() ^ fresh.rows.keys():
        raise ArtifactError(f"{out}: written by an Evergreen with other tables ({', '.join(sorted(other))}): {way_out}")
    return there


def _union(there: FeatureTablesManifest | None, dates: DateRange) -> DateRange:
    """The dates that are there after `dates` were computed."""
    if there is None or there.partitions is None:
        return dates
    if (pending := there.unfinished) and not (dates.first <= pending.first and pending.last <= dates.last):
        raise ArtifactError(f"dates {dates}: a run broke off while it replaced {pending}: compute these again first")
    covered = there.partitions
    if dates.first > covered.last + _DAY or dates.last < covered.first - _DAY:
        raise ArtifactError(f"dates {dates}: {covered} are there; take dates that leave no gap")
    return DateRange(first=min(dates.first, covered.first), last=max(dates.last, covered.last))


def _compute(snapshot: Snapshot, scratch: Path, engine: Engine, dates: DateRange, *, from_the_start: bool) -> None:
    """Write the partitions of these dates into the scratch folder."""
    end = _midnight(dates.last + _DAY)
    as_of = snapshot.as_of
    if end <= as_of:  # nothing after the range is read, and midnight itself is of the next date
        snapshot, as_of = past_of(snapshot, cut=end), end - _MICROSECOND
    start = None if from_the_start else _midnight(dates.first)
    schemas = feature_table_schemas(snapshot.mapping)
    tables = feature_table_expressions(engine.read(snapshot.files), snapshot.mapping, as_of=as_of, start=start)
    for name, table in tables.items():
        started = time.perf_counter()
        order = (*JOIN_KEYS[name], "event_timestamp")
        engine.write_by_date(table, scratch / name, schema=schemas[name], order=order)
        pq.write_table(schemas[name].empty_table(), scratch / f"{name}.{FeatureTables.SCHEMA}")
        _logger.info("%s: %s computed in %.1f s", name, dates, time.perf_counter() - started)


def _replace(scratch: Path, out: Path, name: str, dates: DateRange) -> None:
    """Let the new partitions of one table take the places of the old ones."""
    table, old = out / f"{name}.parquet", scratch / f"{name}.old"
    table.mkdir(exist_ok=True)
    old.mkdir()
    (scratch / f"{name}.{FeatureTables.SCHEMA}").replace(table / FeatureTables.SCHEMA)
    for day in range((dates.last - dates.first).days + 1):
        partition = f"{DATE}={dates.first + day * _DAY}"
        if (table / partition).exists():
            (table / partition).replace(old / partition)
        if (scratch / name / partition).exists():
            (scratch / name / partition).replace(table / partition)


def _write_manifest(manifest: FeatureTablesManifest, out: Path, scratch: Path) -> None:
    manifest.write(scratch / FeatureTables.MANIFEST)
    (scratch / FeatureTables.MANIFEST).replace(out / FeatureTables.MANIFEST)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of when a process dies."""
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"{out}: another run is writing there; wait until it has ended") from error
        yield


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder inside `out`, so that renames stay on one file system; gone afterwards, as are those of killed runs."""
    for stale in out.glob(f"{_SCRATCH}*"):
        shutil.rmtree(stale)
    scratch = out / f"{_SCRATCH}{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
