"""Join the impression log with the clicks that came later, and keep what was known when.

A click belongs to the impression of its request and item when it comes at or after the impression and not later than
the attribution window; of several the first counts. Time is `event_timestamp` on both sides: the server's own clock
(`served_at`) runs beside it where a log is replayed. DuckDB does the work on disk, a date at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.impressions import feature_table, read_impressions
from evergreen.contracts.instant import to_micros
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.outcomes import (
    FEATURE_PREFIX,
    QUARANTINE_FIELDS,
    Delay,
    Join,
    Outcomes,
    OutcomesManifest,
    Revision,
    outcome_schema,
)
from evergreen.monitoring.click_log import is_true, read_clicks, row_numbers

NO_REQUEST = "request_id: missing"
NO_TIME = "click_timestamp: not a time"
NO_IMPRESSION = "no impression of this request and item"
TOO_EARLY = "before the impression"
TOO_LATE = "after the attribution window"
DUPLICATE = "the impression was clicked before"
"""Why a click is in quarantine."""

AFTER_AS_OF = "after as_of"
BEFORE_START = "before start"
EARLIER_DATE = "of an impression before start"
NOT_CLICKED = "not clicked"
"""Why a row of the click log is left out."""

SAME_ITEM_TWICE = "the request has this item already"
"""Why an impression is left out, beside AFTER_AS_OF and BEFORE_START."""

DELAY_QUANTILES = (0.5, 0.9, 0.99)
DELAY_PARTS = (0.1, 0.5, 0.9)

_MEMORY_LIMIT = "800MB"  # beyond it DuckDB works on disk
_MAX_THREADS = 4
_BATCH_ROWS = 100_000
_CLICK = "click"  # the verdict on a click that is attributed
_OF_CLICK = ("clicked", "click_timestamp", "rating", "dwell_seconds")

logger = logging.getLogger(__name__)


def join_outcomes(
    impressions: str,
    clicks: str,
    out: Path,
    *,
    window: timedelta,
    as_of: datetime,
    start: datetime | None = None,
    served_since: datetime | None = None,
    mapping: Mapping | None = None,
) -> OutcomesManifest:
    """Bring outcomes up to a moment. A run that was killed leaves nothing; run again, it does the same.

    Args:
        impressions: folder or fsspec URL of the log, see `contracts.impressions`.
        clicks: file, folder or fsspec URL, see `monitoring.click_log`.
        out: the outcomes; made by the first join, and added to by each later one.
        window: attribution window, the same in every join.
        as_of: impressions before and clicks until this moment are known; not before the last join's. For the very
            moment of the last join nothing is done.
        start: joins no date before this one's again: what is late for them stays out, and is counted. It moves back to
            where the last join ended and where labels were open.
        served_since: impressions that the server wrote before are not even read: for a long log of a server whose
            requests are about the present.
        mapping: of the log that the model was trained on: its features are kept as served, to be trained on again.

    Returns:
        The manifest. `joins[-1]` counts what was left out and quarantined.

    Raises:
        ArtifactError: `out` has another window or mapping, knows more already, or the impression log is broken.
        InputError: the clicks cannot be read, or lack a column.
        ValueError: the window is not positive, or a moment has no time zone.
    """
    if window <= timedelta(0):
        raise ValueError(f"window={window}: must be positive")
    for name, moment in (("as_of", as_of), ("start", start), ("served_since", served_since)):
        if moment is not None and moment.tzinfo is None:
            raise ValueError(f"{name}={moment.isoformat()}: has no offset: write {moment.isoformat()}+00:00 for UTC")
    out = Path(out)
    manifest = _open(out, window, mapping)
    if manifest.joins and as_of <= (last := manifest.joins[-1].as_of):
        if as_of == last:
            return manifest
        raise ArtifactError(f"{out}: knows the clicks until {last} already; to know less, read it as of {as_of}")
    first = _first_date(manifest, start)
    scratch = out / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with duckdb.connect(str(scratch / "join.duckdb")) as db:
            db.execute("SET TimeZone = 'UTC'")
            db.execute("SET enable_progress_bar = false")
            db.execute(f"SET memory_limit = '{_MEMORY_LIMIT}'")
            db.execute(f"SET threads = {min(os.cpu_count() or 1, _MAX_THREADS)}")
            db.execute("SET preserve_insertion_order = false")  # every query here says its order
            manifest = _Join(db, out, scratch, manifest, as_of, first).run(impressions, clicks, served_since)
        manifest.write(scratch / Outcomes.MANIFEST)
        (scratch / Outcomes.MANIFEST).replace(out / Outcomes.MANIFEST)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    join = manifest.joins[-1]
    logger.info(
        "%d impressions, %d clicks attributed, %d quarantined, %d dates written",
        join.impressions,
        join.attributed,
        sum(join.quarantined.values()),
        join.written,
    )
    return manifest


def _open(out: Path, window: timedelta, mapping: Mapping | None) -> OutcomesManifest:
    if not (out / Outcomes.MANIFEST).exists():
        return OutcomesManifest(window_seconds=window.total_seconds(), mapping=mapping)
    manifest = Outcomes.load(out).manifest
    if manifest.window != window or manifest.mapping != mapping:
        joined_with, asked_for = (m and f"{m.name} {m.digest[:12]}" for m in (manifest.mapping, mapping))
        raise ArtifactError(
            f"{out}: was joined with the mapping {joined_with} and a window of {manifest.window}, now asked for "
            f"{asked_for} and {window}: give another folder"
        )
    return manifest


def _first_date(manifest: OutcomesManifest, start: datetime | None) -> date | None:
    """The first date to be joined; None: all."""
    if start is None:
        return None
    # By induction all is final that was before the last join by more than the window.
    open_since = [manifest.joins[-1].as_of - manifest.window] if manifest.joins else []
    return min(moment.astimezone(UTC).date() for moment in (start, *open_since))


class _Join:
    """One run. Tables: `clicks` and `impressions` as read, and `found`: which click is of which impression."""

    def __init__(
        self,
        db: duckdb.DuckDBPyConnection,
        out: Path,
        scratch: Path,
        manifest: OutcomesManifest,
        as_of: datetime,
        first: date | None,
    ) -> None:
        self.db, self.out, self.scratch, self.manifest, self.first = db, out, scratch, manifest, first
        self.as_of = as_of.astimezone(UTC)
        self.start = datetime(first.year, first.month, first.day, tzinfo=UTC) if first else None
        self.schema = outcome_schema(manifest.mapping)
        self.latest = {revision.date: revision for revision in manifest.latest()}
        self.clicks_left_out: Counter[str] = Counter()
        self.impressions_left_out: Counter[str] = Counter()
        for name, micros in (
            ("as_of", to_micros(self.as_of)),
            ("first", to_micros(self.start) if self.start else -(2**62)),
            ("attribution", manifest.window // timedelta(microseconds=1)),
        ):
            db.execute(f"SET VARIABLE {name} = {micros}")
            db.execute(f"CREATE MACRO {name}() AS getvariable('{name}')")

    def run(self, impressions: str, clicks: str, served_since: datetime | None) -> OutcomesManifest:
        """Join, write what is new beside what is there, and say what the manifest is to be."""
        num_clicks = self._read_clicks(clicks)
        self._read_impressions(impressions, served_since)
        self.db.execute("CREATE TABLE found (click BIGINT, place BIGINT, date DATE, verdict VARCHAR, lag BIGINT)")
        revisions = []
        for (day,) in self._query("SELECT DISTINCT date FROM impressions ORDER BY date"):
            self._find_clicks(day)
            if (self.first is None or day >= self.first) and (revision := self._write(day)) is not None:
                revisions.append(revision)
        quarantined = self._judge_clicks()
        ((rows, lowest_rate),) = self._query(
            "SELECT count(*), min(sampling_rate) FROM impressions WHERE event_us >= first()"
        )
        ((attributed,),) = self._query(f"SELECT count(*) FROM found WHERE verdict = '{_CLICK}' AND {self._is_joined}")
        join = Join(
            as_of=self.as_of,
            start=self.start,
            impressions=rows - self.impressions_left_out[SAME_ITEM_TWICE],
            impressions_left_out=_counts(self.impressions_left_out),
            clicks=num_clicks,
            attributed=attributed,
            clicks_left_out=_counts(self.clicks_left_out),
            quarantined=quarantined,
            lowest_sampling_rate=lowest_rate,
            delay=self._delay(),
            written=len(revisions),
        )
        joins, known = (*self.manifest.joins, join), (*self.manifest.revisions, *revisions)
        return self.manifest.model_copy(update={"joins": joins, "revisions": known})

    @property
    def _is_joined(self) -> str:
        """SQL: the date is one of those that are joined, and not just looked into for the first one's clicks."""
        return f"date >= DATE '{self.first or date.min}'"

    def _query(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self.db.execute(sql, parameters or None).fetchall()
        return rows

    def _insert(self, table: str, rows: pa.Table, select: str) -> None:
        self.db.register("given", rows)
        self.db.execute(f"INSERT INTO {table} SELECT {select} FROM given")
        self.db.unregister("given")

    def _read_clicks(self, path: str) -> int:
        """Fill `clicks`. Returns the number of rows of the log."""
        self.db.execute(
            "CREATE TABLE clicks (click BIGINT, source VARCHAR, line BIGINT, request_id VARCHAR, item_id VARCHAR, "
            "written VARCHAR, click_us BIGINT, rating FLOAT, dwell_seconds FLOAT)"
        )
        total = 0
        for rows in read_clicks(path):
            rows = rows.append_column("click", row_numbers(total, rows.num_rows))
            total += rows.num_rows
            clicked = rows.filter(is_true(rows["clicked"]))
            self.clicks_left_out[NOT_CLICKED] += rows.num_rows - clicked.num_rows
            self._insert(
                "clicks",
                clicked,
                "click, source, line, request_id, item_id, click_timestamp, "
                "epoch_us(TRY_CAST(click_timestamp AS TIMESTAMPTZ)), "
                "TRY_CAST(rating AS FLOAT), TRY_CAST(dwell_seconds AS FLOAT)",
            )
        for reason, condition in ((AFTER_AS_OF, "click_us > as_of()"), (BEFORE_START, "click_us < first()")):
            deleted = self._query(f"DELETE FROM clicks WHERE {condition}")
            self.clicks_left_out[reason] += deleted[0][0]
        return total

    def _read_impressions(self, path: str, served_since: datetime | None) -> None:
        """Fill `impressions`, also with those of one window before the start: clicks after it may be theirs."""
        names = [name for name in self.schema.names if name not in _OF_CLICK]
        schema = pa.schema([self.schema.field(name) for name in names])
        selected = ", ".join(f'"{name}"' for name in names)
        select = f"place, CAST(event_timestamp AS DATE) AS date, epoch_us(event_timestamp) AS event_us, {selected}"
        self.db.register("given", schema.empty_table().append_column("place", row_numbers(0, 0)))
        self.db.execute(f"CREATE TABLE impressions AS SELECT {select} FROM given")
        self.db.unregister("given")
        place = 0
        for table in read_impressions(path, start=served_since):
            rows = _flat(table, schema)
            self._insert("impressions", rows.append_column("place", row_numbers(place, rows.num_rows)), select)
            place += rows.num_rows
        for reason, condition in (
            (AFTER_AS_OF, "event_us >= as_of()"),
            (BEFORE_START, "event_us < first() - attribution()"),
        ):
            deleted = self._query(f"DELETE FROM impressions WHERE {condition}")
            self.impressions_left_out[reason] += deleted[0][0]
        ((earlier,),) = self._query("SELECT count(*) FROM impressions WHERE event_us < first()")
        self.impressions_left_out[BEFORE_START] += earlier

    def _find_clicks(self, day: date) -> None:
        """Fill `day` with the impressions of a date, and add to `found` the clicks that name one of them."""
        self.db.execute(
            """CREATE OR REPLACE TEMP TABLE day AS
            SELECT * FROM impressions WHERE date = $day AND place IN
                (SELECT min(place) FROM impressions WHERE date = $day GROUP BY request_id, item_id)""",
            {"day": day},
        )
        # A request_id that comes again on a later date takes no click from the first.
        self.db.execute(
            f"""INSERT INTO found
            WITH named AS (
                SELECT click, click_us, place, date, click_us - event_us AS lag,
                       click_us BETWEEN event_us AND event_us + attribution() AS is_within
                FROM clicks JOIN day ON clicks.request_id = day.request_id
                                    AND clicks.item_id IS NOT DISTINCT FROM day.item_id
                WHERE NOT EXISTS (FROM found WHERE found.click = clicks.click
                                  AND found.verdict IN ('{_CLICK}', '{DUPLICATE}')))
            SELECT click, place, date,
                   CASE WHEN lag < 0 THEN '{TOO_EARLY}' WHEN NOT is_within THEN '{TOO_LATE}'
                        WHEN row_number() OVER (PARTITION BY place, is_within ORDER BY click_us, click) = 1
                        THEN '{_CLICK}' ELSE '{DUPLICATE}' END,
                   lag
            FROM named WHERE click_us IS NOT NULL"""
        )

    def _write(self, day: date) -> Revision | None:
        """Write the outcomes of `day`; None if they are what is there already."""
        ((twice,),) = self._query(
            "SELECT (SELECT count(*) FROM impressions WHERE date = $day) - (SELECT count(*) FROM day)", day=day
        )
        self.impressions_left_out[SAME_ITEM_TWICE] += twice
        file = self.scratch / "revision.parquet"
        of_impression = ", ".join(f'day."{name}"' for name in self.schema.names if name not in _OF_CLICK)
        rows = self.db.sql(
            f"""SELECT {of_impression}, click IS NOT NULL AS clicked, make_timestamp(click_us) AS click_timestamp,
                       rating, dwell_seconds
            FROM day LEFT JOIN (SELECT place, click FROM found WHERE verdict = '{_CLICK}') USING (place)
                     LEFT JOIN clicks USING (click)
            ORDER BY event_us, day.request_id, position, day.item_id"""
        )
        with pq.ParquetWriter(file, self.schema, compression="zstd") as writer:
            for batch in rows.to_arrow_reader(_BATCH_ROWS):
                columns = {name: batch.column(name) for name in batch.schema.names}
                arrays = [columns[field.name].cast(field.type) for field in self.schema]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        digest, before = sha256_file(file), self.latest.get(day)
        if before is not None and before.sha256 == digest:
            return None
        number = before.number + 1 if before else 1
        ((rows_written, clicks, mature, degraded),) = self._query(
            """SELECT count(*), count(*) FILTER (clicked), count(*) FILTER (us + attribution() <= as_of()),
                      count(*) FILTER (degraded)
            FROM (SELECT *, epoch_us(event_timestamp) AS us FROM read_parquet($file))""",
            file=str(file),
        )
        revision = Revision(
            date=day,
            number=number,
            as_of=self.as_of,
            rows=rows_written,
            clicks=clicks,
            mature_rows=mature,
            corrected_rows=self._corrected(file, before) if before else 0,
            degraded_rows=degraded,
            path=f"date={day}/revision-{number:04d}.parquet",
            sha256=digest,
        )
        target = self.out / revision.path
        target.parent.mkdir(exist_ok=True)
        file.replace(target)  # a file of this name that no manifest lists is of a join that was killed
        return revision

    def _corrected(self, file: Path, before: Revision) -> int:
        """Labels of a new file that had been mature at the last join, and wrong or absent."""
        ((corrected,),) = self._query(
            """SELECT count(*) FROM read_parquet($new) AS new LEFT JOIN read_parquet($old) AS old
                ON new.request_id = old.request_id AND new.item_id IS NOT DISTINCT FROM old.item_id
            WHERE epoch_us(new.event_timestamp) + attribution() <= $then
                AND new.clicked IS DISTINCT FROM old.clicked""",
            new=str(file),
            old=str(self.out / before.path),
            then=to_micros(self.manifest.joins[-1].as_of),
        )
        return int(corrected)

    def _judge_clicks(self) -> dict[str, int]:
        """Count clicks of dates that are not joined, write those of nothing to the quarantine, and count them."""
        verdicts = ", ".join(f"'{verdict}'" for verdict in (_CLICK, DUPLICATE, TOO_LATE, TOO_EARLY))
        self.db.execute(
            f"""CREATE TABLE judged AS
            SELECT clicks.*, CASE WHEN request_id IS NULL THEN '{NO_REQUEST}' WHEN click_us IS NULL THEN '{NO_TIME}'
                                  WHEN verdict IS NULL THEN '{NO_IMPRESSION}' ELSE verdict END AS reason,
                   coalesce({self._is_joined}, TRUE) AS is_joined
            FROM clicks LEFT JOIN (
                FROM found SELECT * QUALIFY row_number() OVER
                    (PARTITION BY click ORDER BY list_position([{verdicts}], verdict), place) = 1) USING (click)"""
        )
        ((earlier,),) = self._query("SELECT count(*) FROM judged WHERE NOT is_joined")
        self.clicks_left_out[EARLIER_DATE] += earlier
        refused = f"FROM judged WHERE is_joined AND reason <> '{_CLICK}'"
        counts = dict(self._query(f"SELECT reason, count(*) {refused} GROUP BY reason"))
        target = self.out / "quarantine" / f"join-{len(self.manifest.joins) + 1:04d}.parquet"
        target.unlink(missing_ok=True)  # of a join that was killed
        if counts:
            schema = pa.schema(QUARANTINE_FIELDS)
            rows = self.db.sql(
                f"SELECT source, line, reason, request_id, item_id, written AS click_timestamp {refused} "
                "ORDER BY source, line"
            )
            target.parent.mkdir(exist_ok=True)
            file = self.scratch / "quarantine.parquet"
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for batch in rows.to_arrow_reader(_BATCH_ROWS):
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            file.replace(target)
        return _counts(Counter(counts))

    def _delay(self) -> Delay:
        quantiles = [*DELAY_QUANTILES]
        mature = f"""FROM found JOIN impressions USING (place)
            WHERE verdict = '{_CLICK}' AND found.{self._is_joined} AND event_us + attribution() <= as_of()"""
        ((clicks, values, *later),) = self._query(
            f"""SELECT count(*), quantile_cont(lag / 1e6, {quantiles}),
                {", ".join(f"avg((lag > {part} * attribution())::INT)" for part in DELAY_PARTS)} {mature}"""
        )
        if not clicks:
            return Delay(clicks=0, quantiles_seconds={}, later_than={})
        return Delay(
            clicks=clicks,
            quantiles_seconds={str(q): v for q, v in zip(DELAY_QUANTILES, values, strict=True)},
            later_than={str(part): share for part, share in zip(DELAY_PARTS, later, strict=True)},
        )


def _flat(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Impressions with the features of the schema as columns: null where the model that answered did not read one."""
    features = feature_table(table)
    arrays = []
    for field in schema:
        if field.name in table.column_names:
            column = table[field.name]
        elif (name := field.name.removeprefix(FEATURE_PREFIX)) in features.column_names:
            column = features[name].cast(field.type)
            if pa.types.is_floating(field.type):  # a log to be ingested knows no nan
                column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, field.type))
        else:
            column = pa.nulls(table.num_rows, field.type)
        arrays.append(column)
    return pa.Table.from_arrays(arrays, schema=schema)


def _counts(reasons: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(reasons.items()) if count}
