"""Snapshots made from a few rows, by the contract alone: no ingest."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import Snapshot, SnapshotFile, SnapshotManifest, event_schema

Row = dict[str, Any]
WriteSnapshot = Callable[..., Snapshot]


def _is_positive(row: Row, kind: LogKind) -> bool:
    return bool(row.get("clicked")) if kind is LogKind.IMPRESSIONS else True


@pytest.fixture(scope="session")
def write_snapshot(tmp_path_factory: pytest.TempPathFactory) -> WriteSnapshot:
    """A function (mapping, rows, as_of=None) -> Snapshot; rows are dicts, absent columns null, in any order of time."""

    def write(mapping: Mapping, rows: list[Row], as_of: datetime | None = None) -> Snapshot:
        path = tmp_path_factory.mktemp("snapshot")
        schema = event_schema(mapping)
        rows = sorted(rows, key=lambda row: row["event_timestamp"])
        rows = [dict.fromkeys(schema.names) | row | {"event_id": i} for i, row in enumerate(rows)]
        files = []
        for date, day in groupby(rows, key=lambda row: row["event_timestamp"].date()):
            table = pa.Table.from_pylist(list(day), schema=schema)
            file = Path("events") / f"date={date}" / "part-00000.parquet"
            (path / file).parent.mkdir(parents=True)
            pq.write_table(table, path / file)
            files.append(SnapshotFile(path=str(file), rows=table.num_rows, sha256=sha256_file(path / file)))
        last = rows[-1]["event_timestamp"]
        SnapshotManifest(
            mapping=mapping,
            as_of=as_of or last.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1),
            rows=len(rows),
            num_users=len({row["user_id"] for row in rows} - {None}),
            num_items=len({row["item_id"] for row in rows} - {None}),
            num_positives=sum(_is_positive(row, mapping.kind) for row in rows),
            first_event=rows[0]["event_timestamp"],
            last_event=last,
            files=tuple(files),
            quarantined={},
        ).write(path / Snapshot.MANIFEST)
        return Snapshot.load(path, verify=True)

    return write
