"""Build the feature tables of a snapshot.

The values are Ibis expressions (`activity`, `profile`); here DuckDB runs them and they are written as Parquet: sorted
by key and time, so that the same snapshot gives the same bytes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
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
from evergreen.features.profile import profile
from evergreen.features.schema import ACTIVITY_PREFIXES, PROFILE_PREFIXES, feature_table_schemas, profile_sources

_ROW_GROUP_ROWS = 100_000
_logger = logging.getLogger(__name__)


def feature_table_expressions(events: ir.Table, mapping: Mapping, *, last_hour: int) -> dict[str, ir.Table]:
    """Every feature table as an expression over the events of a snapshot, on any engine that Ibis speaks to.

    Args:
        events: the snapshot's rows (`event_schema`), with UTC timestamps in a session whose time zone is UTC.
        mapping: of the snapshot.
        last_hour: the last full hour of the snapshot's as_of, in hours since 1970; no row is later.

    Returns:
        By table name: unsorted rows with the columns of `feature_table_schema`.
    """
    schemas = feature_table_schemas(mapping)
    lag = full_hours(mapping.split.attribution_window)
    labelled = with_labels(events, mapping.kind)
    prior = global_prior(labelled, kind=mapping.kind, lag=lag, last_hour=last_hour)
    expressions: dict[str, ir.Table] = {}
    for name, prefix in ACTIVITY_PREFIXES.items():
        values = activity(
            labelled, prior, JOIN_KEYS[name], prefix, kind=mapping.kind, lag=lag, last_hour=last_hour
        )
        if name == "user_activity":
            values = with_history(values, history_pages(labelled))
        expressions[name] = values.mutate(event_timestamp=(values["T"] * 3600).as_timestamp("s"))
    for name, prefix in PROFILE_PREFIXES.items():
        sources = profile_sources(name, mapping)
        expressions[name] = profile(events, JOIN_KEYS[name][0], f"{prefix}_first_seen", sources)
    return {name: expressions[name].select(schemas[name].names) for name in JOIN_KEYS}


def build_feature_tables(
    snapshot: Snapshot, out: Path, *, threads: int | None = None, memory_limit: str = "4GB"
) -> FeatureTables:
    con = ibis.duckdb.connect(memory_limit=memory_limit, threads=threads or int(__import__('os').environ.get('TH','2')))
    with atomic_directory(Path(out)) as d:
        con.raw_sql(f"SET temp_directory='{d}/tmp'")
        con.raw_sql("SET TimeZone='UTC'")
        ev = con.read_parquet(snapshot.files, hive_partitioning=False)
        rows = {}
        schemas = feature_table_schemas(snapshot.mapping)
        for name, e in feature_table_expressions(ev, snapshot.mapping, last_hour=last_full_hour(snapshot.as_of)).items():
            t = time.perf_counter()
            n = 0
            e.order_by([*JOIN_KEYS[name], "event_timestamp"]).to_parquet(d / f"{name}.parquet", compression="zstd", row_group_size=_ROW_GROUP_ROWS)
            n = pq.read_metadata(d / f"{name}.parquet").num_rows
            rows[name] = n
            print(name, n, time.perf_counter() - t, (d / f"{name}.parquet").stat().st_size / 1e6)
        FeatureTablesManifest(snapshot_id=snapshot.id, mapping=snapshot.mapping, as_of=snapshot.as_of, first_event=snapshot.manifest.first_event, rows=rows).write(d / "manifest.json")
        shutil.rmtree(d / "tmp", ignore_errors=True)
    return FeatureTables.load(out)
