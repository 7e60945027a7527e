"""Does a feature know its future? Build the tables from the past alone and see whether the past looks the same."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from evergreen.contracts.errors import LeakageError
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables
from evergreen.contracts.snapshot import Snapshot

logger = logging.getLogger(__name__)

_DATE_PREFIX = "events/date="


def past_of(snapshot: Snapshot, *, cut: datetime) -> Snapshot:
    """The snapshot as it would have been at midnight `cut`: the same files, without those of that date and later.

    Raises:
        LeakageError: `cut` is not a UTC midnight, or there is no event before it.
    """
    if cut != cut.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0):
        raise LeakageError(f"cut {cut}: a snapshot can be cut at a UTC midnight only")
    manifest = snapshot.manifest
    files = tuple(f for f in manifest.files if f.path.removeprefix(_DATE_PREFIX)[:10] < cut.date().isoformat())
    if not files:
        raise LeakageError(f"cut {cut}: the first event is of {manifest.first_event}, nothing lies before the cut")
    rows = sum(file.rows for file in files)
    last = min(manifest.last_event, cut - timedelta(microseconds=1))
    return Snapshot(
        snapshot.path, manifest.model_copy(update={"files": files, "rows": rows, "as_of": cut, "last_event": last})
    )


def middle_midnight(snapshot: Snapshot) -> datetime | None:
    """The UTC midnight that halves the dates of a log; None for a log of a single date."""
    dates = [file.path.removeprefix(_DATE_PREFIX)[:10] for file in snapshot.manifest.files]
    middle = dates[len(dates) // 2]
    return datetime.fromisoformat(middle).replace(tzinfo=UTC) if middle != dates[0] else None


def check_point_in_time(
    snapshot: Snapshot,
    tables: FeatureTables,
    *,
    build: Callable[[Snapshot, Path], FeatureTables],
    cut: datetime | None = None,
) -> None:
    """Raise unless every feature value up to `cut` is the same when nothing after `cut` has happened yet.

    Args:
        snapshot: what the tables were built from.
        tables: the tables to check.
        build: what built them.
        cut: a UTC midnight inside the log. Default: the one that halves it; a log of one date is not checked.

    Raises:
        LeakageError: a value before the cut depends on events after it; names table, column and key.
    """
    cut = cut or middle_midnight(snapshot)
    if cut is None:
        logger.info("point in time: not checked, the log has events of one date only")
        return
    with tempfile.TemporaryDirectory() as scratch:
        past = build(past_of(snapshot, cut=cut), Path(scratch) / "past")
        for name, keys in JOIN_KEYS.items():
            whole, alone = (_until(t.table(name), keys, cut) for t in (tables, past))
            if not whole.equals(alone):
                raise LeakageError(_difference(name, keys, whole, alone, cut))
    logger.info("point in time: values up to %s do not depend on later events", cut.date())


def _until(path: Path, keys: tuple[str, ...], cut: datetime) -> pa.Table:
    """Rows of a table until `cut`, by key and time, as they are in a file; those of a folder are by date first."""
    rows = ds.dataset(path, format="parquet").to_table(filter=ds.field("event_timestamp") <= cut)
    if path.is_dir():
        rows = rows.sort_by([(name, "ascending") for name in (*keys, "event_timestamp")])
    return rows.combine_chunks()


def _difference(name: str, keys: tuple[str, ...], whole: pa.Table, alone: pa.Table, cut: datetime) -> str:
    way_out = "compute it from events strictly before event_timestamp"
    if whole.num_rows != alone.num_rows:
        return (
            f"feature table {name}: {whole.num_rows} rows up to {cut} in the whole log, but {alone.num_rows} when the "
            f"log ends there: which rows exist depends on the future; {way_out}"
        )
    for column in whole.column_names:
        left, right = whole[column].to_pylist(), alone[column].to_pylist()
        row = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        if row is not None:
            key = ", ".join(f"{k}={whole[k][row].as_py()!r}" for k in keys)
            moment = whole["event_timestamp"][row].as_py()
            return (
                f"feature {column!r} of {name} knows the future: for {key} at {moment} it is {left[row]!r} "
                f"in the whole log, but {right[row]!r} when the log ends at {cut}; {way_out}"
            )
    return f"feature table {name}: its schema depends on the future: {whole.schema} against {alone.schema}"
