"""Label the suspicious events of a snapshot, and make the snapshot that training reads: the same without them.

What a rule catches is more than the event that broke it, for a bot does not pause between two of its clicks: all that
the user did on that day is suspicious, and for `no_clicks` all that the user ever did. (`repeated_click` alone labels
nothing but the repeats: who reloads a page is no bot.) An account burst is also known by its end: the new accounts that
clicked the item in the hour before it was noticed belong to it. Then the detector judges what is left.

So labels know the whole log. A feature of the filtered log lacks the clicks that only later proved to be a bot's, and
which a server of that moment still counted: it is what the server should have known, not what it knew.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from evergreen.contracts.artifact import JsonModel, atomic_directory, sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.snapshot import Snapshot, SnapshotFile
from evergreen.fraud.detector import UserWindows, score_windows
from evergreen.fraud.labels import (
    SUSPICIOUS_EVENTS,
    SUSPICIOUS_USERS,
    ReasonCount,
    SuspiciousEvents,
    SuspiciousManifest,
)
from evergreen.fraud.report import Findings, write_report
from evergreen.fraud.rules import HOUR, Limits, Reason, broken_rules, calibrate, judged_events, limits_for

SUSPICIOUS = "suspicious: a rule or the detector takes it for a bot's"
"""Why an event is left out of the filtered snapshot."""

_ROW_GROUP_ROWS = 1 << 17
_USERS_IN_REPORT = 30
_EXAMPLES = 5

_logger = logging.getLogger(__name__)


class FilterConfig(JsonModel):
    """How strict the filter is."""

    limits: Limits | None = None
    """Of the rules; None: the usual ones for the kind of log. A `click_rate` of 0 becomes that of this log's people."""
    false_positive_share: float = Field(default=0.005, ge=0, le=0.2)
    """Share of people's windows that the detector may label wrongly. 0: rules alone."""
    window_days: int = Field(default=30, ge=1)
    min_events: int = Field(default=30, ge=5)
    """Events that a user's window must have for the detector to judge it."""


def filter_events(
    snapshot: Snapshot,
    out: Path,
    *,
    config: FilterConfig | None = None,
    memory_limit: str = "2GB",
    threads: int | None = None,
) -> SuspiciousEvents:
    """Label the suspicious events of a snapshot, with the reasons, and write the report.

    Args:
        snapshot: what to judge; it is not changed.
        out: directory to write; replaced when it exists, and whole or absent at any time.
        config: how strict to be.
        memory_limit: how much DuckDB may hold before it spills to a scratch directory beside `out`.
        threads: of DuckDB. Default: one a core. The result does not depend on it.

    Returns:
        The labels, opened.
    """
    config = config or FilterConfig()
    with (
        atomic_directory(Path(out)) as scratch,
        tempfile.TemporaryDirectory(prefix="duckdb-", dir=scratch) as spill,
        duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": spill}) as db,
    ):
        db.execute("SET TimeZone = 'UTC'")
        db.execute("SET enable_progress_bar = false")
        if threads is not None:
            db.execute(f"SET threads = {threads}")
        judged_events(db, snapshot.files, snapshot.kind)
        limits = _calibrated(db, snapshot.kind, config.limits or limits_for(snapshot.kind))
        broken_rules(db, limits, snapshot.kind)
        _catch(db, limits)
        windows = score_windows(db, snapshot.kind, window_days=config.window_days, min_events=config.min_events)
        events, users = _label(db, windows, config.false_positive_share)
        findings = _findings(db)
        pq.write_table(events, scratch / SuspiciousEvents.EVENTS, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        pq.write_table(users, scratch / SuspiciousEvents.USERS, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        manifest = SuspiciousManifest(
            snapshot_id=snapshot.id,
            limits=limits,
            false_positive_share=config.false_positive_share,
            window_days=config.window_days,
            events=snapshot.manifest.rows,
            users=users.num_rows,
            without_user=snapshot.manifest.rows - int(pc.sum(users["events"]).as_py() or 0),
            windows=windows.table.num_rows,
            windows_left_out=windows.left_out,
            suspicious_events=events.num_rows,
            suspicious_positives=sum(day[2] for day in findings.days),
            suspicious_users=int(pc.sum(pc.greater(users["suspicious_events"], 0)).as_py() or 0),
            reasons=_reason_counts(db),
            sha256=sha256_file(scratch / SuspiciousEvents.EVENTS),
        )
        manifest.write(scratch / SuspiciousEvents.MANIFEST)
        write_report(manifest, snapshot.manifest, findings, scratch / SuspiciousEvents.REPORT)
    _logger.info(
        "%d of %d events, by %d of %d users, are suspicious: %s",
        manifest.suspicious_events,
        manifest.events,
        manifest.suspicious_users,
        manifest.users,
        ", ".join(f"{reason} {count.events}" for reason, count in manifest.reasons.items()) or "for no reason",
    )
    return SuspiciousEvents.load(out)


def without_suspicious(snapshot: Snapshot, suspicious: SuspiciousEvents, out: Path) -> Snapshot:
    """Write the snapshot again without the suspicious events: what features, popularity and training should read.

    The events keep their `event_id`; how many are missing is in the manifest's `left_out`.

    Args:
        snapshot: which the labels were made for.
        suspicious: the labels.
        out: directory to write; replaced when it exists, and whole or absent at any time.

    Raises:
        ArtifactError: the labels belong to another snapshot, or nothing would be left.
    """
    manifest = snapshot.manifest
    if suspicious.manifest.snapshot_id != snapshot.id:
        raise ArtifactError(
            f"{suspicious.path}: labels of snapshot {suspicious.manifest.snapshot_id[:12]}, not of {snapshot.id[:12]}: "
            "filter the events again"
        )
    removed = suspicious.events()["event_id"].combine_chunks()
    if len(removed) == manifest.rows:
        raise ArtifactError(f"{suspicious.path}: all {manifest.rows} events are suspicious: loosen the filter's limits")
    with atomic_directory(Path(out)) as scratch:
        files = [
            kept
            for file in manifest.files
            if (kept := _copy_without(snapshot.path, file, removed, scratch)) is not None
        ]
        if (snapshot.path / "quarantine").is_dir():
            shutil.copytree(snapshot.path / "quarantine", scratch / "quarantine")
        with duckdb.connect() as db:
            db.execute("SET TimeZone = 'UTC'")
            judged = [str(scratch / file.path) for file in files]
            positive = {LogKind.IMPRESSIONS: "clicked", LogKind.RATINGS: "rating IS NOT NULL"}
            users, items, positives, first, last = db.execute(
                f"""SELECT count(DISTINCT user_id), count(DISTINCT item_id),
                           count(*) FILTER ({positive.get(snapshot.kind, "true")}),
                           min(event_timestamp), max(event_timestamp)
                    FROM read_parquet($1, hive_partitioning = false)""",
                [judged],
            ).fetchall()[0]
        left_out = manifest.left_out | ({SUSPICIOUS: len(removed)} if len(removed) else {})
        manifest.model_copy(
            update={
                "rows": manifest.rows - len(removed),
                "num_users": users,
                "num_items": items,
                "num_positives": positives,
                "first_event": first,
                "last_event": last,
                "files": tuple(files),
                "left_out": left_out,
            }
        ).write(scratch / Snapshot.MANIFEST)
    return Snapshot.load(out)


def _copy_without(folder: Path, file: SnapshotFile, removed: pa.Array, out: Path) -> SnapshotFile | None:
    """Copy a file's other events; None: there are none."""
    target = out / file.path
    target.parent.mkdir(parents=True)
    source = pq.ParquetFile(folder / file.path)
    if not pc.any(pc.is_in(source.read(["event_id"])["event_id"], value_set=removed)).as_py():
        shutil.copy2(folder / file.path, target)  # the same bytes have the same digest
        return file
    rows = 0
    with pq.ParquetWriter(target, source.schema_arrow, compression="zstd") as writer:
        for batch in source.iter_batches(batch_size=_ROW_GROUP_ROWS):
            kept = batch.filter(pc.invert(pc.is_in(batch["event_id"], value_set=removed)))
            if kept.num_rows:
                writer.write_batch(kept, row_group_size=_ROW_GROUP_ROWS)
            rows += kept.num_rows
    if not rows:
        shutil.rmtree(target.parent)
        return None
    return SnapshotFile(path=file.path, rows=rows, sha256=sha256_file(target))


def _calibrated(db: duckdb.DuckDBPyConnection, kind: LogKind, limits: Limits) -> Limits:
    if kind is not LogKind.IMPRESSIONS or limits.click_rate > 0:
        return limits
    users = db.sql("SELECT count(*) AS shown, count(*) FILTER (clicked) AS clicks FROM judged GROUP BY user_id")
    counts = users.to_arrow_table()
    return calibrate(counts["shown"].to_numpy(), counts["clicks"].to_numpy(), limits)


def _catch(db: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    """Create table `caught` (user_id, day, reasons): the users' days that a rule labels as a whole."""
    # A later event of the burst within the hour, on the same item, has told that it is one.
    db.execute(
        f"""INSERT INTO broken
        SELECT c.event_id, '{Reason.ACCOUNT_BURST}'
        FROM (
            SELECT *, min(t) OVER (PARTITION BY user_id) AS first_seen FROM judged
        ) c ASOF JOIN (
            SELECT item_id, t AS noticed FROM broken JOIN judged USING (event_id)
            WHERE reason = '{Reason.ACCOUNT_BURST}'
        ) b ON c.item_id = b.item_id AND c.t <= b.noticed
        WHERE c.clicked AND noticed - c.t < {HOUR} AND c.t - first_seen < {limits.new_account_hours * HOUR}"""
    )
    db.execute(
        f"""CREATE TABLE caught AS
        WITH silent AS (
            SELECT DISTINCT user_id FROM broken JOIN judged USING (event_id) WHERE reason = '{Reason.NO_CLICKS}'
        ), days AS (
            SELECT user_id, day, reason FROM broken JOIN judged USING (event_id)
            WHERE reason NOT IN ('{Reason.REPEATED_CLICK}', '{Reason.NO_CLICKS}')
            UNION ALL
            SELECT user_id, day, '{Reason.NO_CLICKS}' FROM judged JOIN silent USING (user_id)
        )
        SELECT user_id, day, list_sort(list(DISTINCT reason)) AS reasons FROM days GROUP BY user_id, day"""
    )


def _label(
    db: duckdb.DuckDBPyConnection, windows: UserWindows, false_positive_share: float
) -> tuple[pa.Table, pa.Table]:
    """Create table `labels`; returns it as `SUSPICIOUS_EVENTS`, and all users as `SUSPICIOUS_USERS`."""
    db.register("windows", windows.table)
    db.execute(
        f"""CREATE TABLE labels AS
        WITH reasons AS (
            SELECT event_id, user_id, unnest(reasons) AS reason, 1.0::DOUBLE AS score
            FROM judged JOIN caught USING (user_id, day)
            UNION ALL
            SELECT event_id, user_id, reason, 1.0 FROM broken JOIN judged USING (event_id)
            WHERE reason = '{Reason.REPEATED_CLICK}'
            UNION ALL
            SELECT event_id, user_id, '{Reason.ANOMALY}', 1 - tail
            FROM remaining JOIN windows USING (user_id, window_index) WHERE tail < {false_positive_share!r}::DOUBLE
        )
        SELECT event_id, any_value(user_id) AS user_id, list_sort(list(DISTINCT reason)) AS reasons, max(score) AS score
        FROM reasons GROUP BY event_id"""
    )
    events = db.sql("SELECT event_id, user_id, reasons, score FROM labels ORDER BY event_id").to_arrow_table()
    users = db.sql(
        """
        WITH shown AS (
            SELECT user_id, count(*) AS events, count(*) FILTER (clicked) AS positives FROM judged GROUP BY user_id
        ), suspects AS (
            SELECT user_id, count(*) AS suspicious_events, max(score) AS score,
                   list_sort(list_distinct(flatten(list(reasons)))) AS reasons
            FROM labels GROUP BY user_id
        ), scores AS (
            SELECT user_id, 1 - min(tail) AS score FROM windows GROUP BY user_id
        )
        SELECT user_id, events, positives, coalesce(suspicious_events, 0) AS suspicious_events,
               coalesce(s.reasons, []) AS reasons, greatest(s.score, w.score) AS score
        FROM shown LEFT JOIN suspects s USING (user_id) LEFT JOIN scores w USING (user_id)
        ORDER BY s.score IS NULL, suspicious_events DESC, score DESC NULLS LAST, user_id"""
    ).to_arrow_table()
    return events.cast(SUSPICIOUS_EVENTS), users.cast(SUSPICIOUS_USERS)


def _reason_counts(db: duckdb.DuckDBPyConnection) -> dict[str, ReasonCount]:
    rows = db.execute(
        """SELECT reason, count(*), count(DISTINCT user_id) FROM (SELECT user_id, unnest(reasons) AS reason FROM labels)
        GROUP BY reason"""
    ).fetchall()
    counts = {reason: ReasonCount(events=events, users=users) for reason, events, users in rows}
    return {reason: counts[reason] for reason in Reason if reason in counts}


def _findings(db: duckdb.DuckDBPyConnection) -> Findings:
    """What the report shows besides the manifest."""
    db.execute("CREATE VIEW suspicious AS SELECT * FROM labels JOIN judged USING (event_id, user_id)")
    days = db.execute(
        """SELECT make_timestamp(day * 86400000000)::DATE, count(*), count(*) FILTER (clicked)
        FROM suspicious GROUP BY day ORDER BY day"""
    ).fetchall()
    users = db.execute(
        f"""SELECT user_id, list_sort(list_distinct(flatten(list(reasons)))), count(*), count(*) FILTER (clicked),
                   count(DISTINCT item_id), make_timestamp(min(t)), make_timestamp(max(t)), max(score)
        FROM suspicious GROUP BY user_id ORDER BY count(*) DESC, user_id LIMIT {_USERS_IN_REPORT}"""
    ).fetchall()
    examples = {
        reason: db.execute(
            f"""SELECT event_id, user_id, item_id, position, clicked, make_timestamp(t), score FROM suspicious
            WHERE list_contains(reasons, $1) ORDER BY hash(event_id) LIMIT {_EXAMPLES}""",
            [reason.value],
        ).fetchall()
        for reason in Reason
    }
    return Findings(days, users, {reason: rows for reason, rows in examples.items() if rows})
