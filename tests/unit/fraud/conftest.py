"""Events made by hand, judged by the rules in batch and as a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.mapping import LogKind, Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.fraud.rules import DAY, Limits, broken_rules
from evergreen.fraud.streaming import Event, EventRules
from evergreen.ingest.log import ingest_log

START = datetime(2025, 1, 1, tzinfo=UTC)
MAPPING = """
name = "clicks"
kind = "impressions"
[source]
format = "parquet"
[timestamp]
column = "event_timestamp"
[columns]
request_id = "request_id"
user_id = "user_id"
item_id = "item_id"
position = "position"
[label]
column = "clicked"
positive = ["true"]
negative = ["false"]
"""

Broken = set[tuple[int, str]]


def event(user: str, item: str, seconds: float, *, clicked: bool = True, request: str | None = None) -> Event:
    """An event some seconds after the first midnight of 1970."""
    return Event(user, item, request, round(seconds * 1e6), clicked)


def judge_in_batch(events: Sequence[Event], limits: Limits, kind: LogKind = LogKind.IMPRESSIONS) -> Broken:
    """(place of the event, rule) of every broken rule; events are in order of time."""
    schema = pa.schema(
        [
            ("event_id", pa.int64()),
            *((name, pa.string()) for name in ("user_id", "item_id", "request")),
            *((name, pa.int64()) for name in ("t", "day", "clicked_at")),
            ("clicked", pa.bool_()),
        ]
    )
    rows = [
        {
            "event_id": place,
            "user_id": e.user_id,
            "item_id": e.item_id,
            "request": e.request_id if e.request_id is not None else str(e.t),
            "t": e.t,
            "day": e.t // DAY,
            "clicked_at": e.t if e.clicked_at is None else e.clicked_at,
            "clicked": e.clicked,
        }
        for place, e in enumerate(events)
    ]
    with duckdb.connect() as db:
        db.register("rows", pa.Table.from_pylist(rows, schema=schema))
        db.execute("CREATE TABLE judged AS SELECT * FROM rows")
        broken_rules(db, limits, kind)
        return set(db.execute("SELECT event_id, reason FROM broken").fetchall())


def judge_as_stream(events: Sequence[Event], limits: Limits, kind: LogKind = LogKind.IMPRESSIONS) -> Broken:
    """The same by `EventRules`."""
    rules = EventRules(limits, kind)
    return {(place, reason.value) for place, e in enumerate(events) for reason in rules.update(e)}


@pytest.fixture(params=[judge_in_batch, judge_as_stream], ids=["batch", "stream"])
def judge(request: pytest.FixtureRequest) -> Callable[..., Broken]:
    return request.param


@pytest.fixture(scope="session")
def ingest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Snapshot]:
    """A function (rows, mapping=MAPPING) -> Snapshot; `at` of a row is in seconds after START."""

    def ingest(rows: list[dict[str, Any]], mapping: str = MAPPING) -> Snapshot:
        folder: Path = tmp_path_factory.mktemp("log")
        defaults = {"request_id": None, "user_id": None, "item_id": "i0", "position": 1, "clicked": False}
        table = [
            defaults
            | {name: value for name, value in row.items() if name != "at"}
            | {"event_timestamp": START + timedelta(seconds=row["at"])}
            for row in rows
        ]
        schema = pa.schema(
            [
                ("event_timestamp", pa.timestamp("us", tz="UTC")),
                ("request_id", pa.string()),
                ("user_id", pa.string()),
                ("item_id", pa.string()),
                ("position", pa.int32()),
                ("clicked", pa.bool_()),
            ]
        )
        pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / "log.parquet")
        return ingest_log(Mapping.load(mapping), str(folder / "log.parquet"), folder / "snapshot")

    return ingest
