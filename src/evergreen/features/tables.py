"""Build the feature tables of a snapshot.

The values are Ibis expressions (`activity`, `profile`), which run on any engine that Ibis speaks to. Here DuckDB runs
them, and writes Parquet sorted by key and time: the same snapshot gives the same bytes, however many threads there are.
"""

from __future__ import annotations

import logging
import tempfile
from datetime import datetime
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow.parquet as pq

from evergreen.contracts.artifact import atomic_directory
from evergreen.contracts.feature_tables import JOIN_KEYS, FeatureTables, FeatureTablesManifest
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.activity import (
    activity,
    full_hours,
    global_prior,
    history_pages,
    last_full_hour,
    with_history,
    with_labels,
)
from evergreen.features.engines import duckdb_engine
from evergreen.features.profile import profile
from evergreen.features.recent import recent
from evergreen.features.schema import ACTIVITY_PREFIXES, PROFILE_PREFIXES, feature_table_schemas, profile_sources

_ROW_GROUP_ROWS = 102_400  # a multiple of DuckDB's vectors, so that a group never ends in the middle of one

_logger = logging.getLogger(__name__)


def feature_table_expressions(
    events: ir.Table, mapping: Mapping, *, as_of: datetime, start: datetime | None = None
) -> dict[str, ir.Table]:
    """Every feature table as an expression over the events of a snapshot.

    Args:
        events: the snapshot's rows (`event_schema`), on an engine whose session time zone is UTC.
        mapping: of the snapshot.
        as_of: no row is later, and activity ends at the last full hour not later.
        start: a full hour; no row is earlier. `events` must go back to the first one all the same: what is last known
            of a key may be as old as the log.

    Returns:
        By table name: rows in no particular order, with the columns of `feature_table_schema`.
    """
    schemas = feature_table_schemas(mapping)
    lag = full_hours(mapping.split.attribution_window)
    kind = mapping.kind
    first_hour = None if start is None else last_full_hour(start)
    last_hour = last_full_hour(as_of)
    labelled = with_labels(events, kind)
    prior = global_prior(labelled, kind=kind, lag=lag, last_hour=last_hour, first_hour=first_hour)
    expressions: dict[str, ir.Table] = {}
    for name, prefix in ACTIVITY_PREFIXES.items():
        values = activity(
            labelled, prior, JOIN_KEYS[name], prefix, kind=kind, lag=lag, last_hour=last_hour, first_hour=first_hour
        )
        if name == "user_activity":
            values = with_history(values, history_pages(labelled))
        expressions[name] = values.mutate(event_timestamp=(values["T"] * 3600).as_timestamp("s"))
    for name, prefix in PROFILE_PREFIXES.items():
        sources = profile_sources(name, mapping)
        expressions[name] = profile(events, JOIN_KEYS[name][0], f"{prefix}_first_seen", sources)
    expressions["user_recent"] = recent(labelled, mapping, end=as_of)
    tables = {name: expressions[name].select(schemas[name].names) for name in JOIN_KEYS}
    if start is None:
        return tables
    first, last = (ibis.literal(moment, "timestamp('UTC')") for moment in (start, as_of))
    return {name: table.filter(table.event_timestamp.between(first, last)) for name, table in tables.items()}


def build_feature_tables(
    snapshot: Snapshot, out: Path, *, memory_limit: str = "4GB", threads: int | None = None
) -> FeatureTables:
    """Build the feature tables of a snapshot.

    A log without user ids, item ids or categories gives tables without rows where they would be the key.

    Args:
        snapshot: what to read.
        out: directory to write; replaced when it exists, and whole or absent at any time.
        memory_limit: how much DuckDB may hold before it spills to a scratch directory beside `out`.
        threads: of DuckDB. Default: one a core. The result does not depend on it.

    Returns:
        The tables, opened.
    """
    manifest = snapshot.manifest
    rows: dict[str, int] = {}
    with (
        atomic_directory(Path(out)) as scratch,
        tempfile.TemporaryDirectory(prefix="duckdb-", dir=scratch) as spill,
        duckdb_engine(Path(spill), memory_limit=memory_limit, threads=threads) as engine,
    ):
        events = engine.read(snapshot.files)
        for name, table in feature_table_expressions(events, manifest.mapping, as_of=manifest.as_of).items():
            file = scratch / f"{name}.parquet"
            table.order_by([*JOIN_KEYS[name], "event_timestamp"]).to_parquet(
                file, compression="zstd", row_group_size=_ROW_GROUP_ROWS
            )
            rows[name] = pq.read_metadata(file).num_rows
            _logger.info("%s: %d rows from %d events", name, rows[name], manifest.rows)
        FeatureTablesManifest(
            snapshot_id=snapshot.id,
            mapping=manifest.mapping,
            as_of=manifest.as_of,
            first_event=manifest.first_event,
            rows=rows,
        ).write(scratch / FeatureTables.MANIFEST)
    return FeatureTables.load(out)
