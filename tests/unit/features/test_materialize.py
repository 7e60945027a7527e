"""Incremental materialization into a real SQLite store: only what changed, what came late, what went, and crashes."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.features.materialize import MaterializedView, materialize_view
from evergreen.features.online_store import GuardedOnlineStore
from tests.online_stores import FEATURES, START, SqliteBackend, feature_view, rows

VIEW = feature_view()
KEYS = ("user_id", "category")
ALWAYS = START + timedelta(days=1000)


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass
class Run:
    """One materialized view: a table, a store, and the folder of records. Kills itself where it is told."""

    folder: Path
    backend: SqliteBackend = field(init=False)
    store: GuardedOnlineStore = field(init=False)
    lives: int = 10**9

    def __post_init__(self) -> None:
        self.backend = SqliteBackend.create(self.folder, batch_rows=2)
        self.store = self.backend.open()

    def materialize(self, *values: dict[str, Any], as_of: datetime = ALWAYS, full: bool = False) -> MaterializedView:
        pq.write_table(rows(*values), self.folder / "taste.parquet")
        return materialize_view(
            self.folder / "taste.parquet",
            KEYS,
            list(FEATURES),
            as_of=as_of,
            records=self.folder / "materialized",
            writer=self,
            full=full,
        )

    def marker(self) -> str | None:
        return self.store.marker(self.backend.ours, VIEW)

    def set_marker(self, marker: str) -> None:
        self._live()
        self.store.set_marker(self.backend.ours, VIEW, marker)

    def write(self, table: pa.Table) -> int:
        late = 0
        for row in range(table.num_rows):
            self._live()
            late += self.store.write_table(self.backend.ours, VIEW, table.slice(row, 1))
        return late

    def withdraw(self, table: pa.Table) -> int:
        self._live()
        return self.store.withdraw(self.backend.ours, VIEW, table)

    def clicks(self, *users: str) -> list[int | None]:
        keys = [
            EntityKey(join_keys=list(KEYS), entity_values=[Value(string_val=user), Value(string_val="c")])
            for user in users
        ]
        read = self.store.online_read(self.backend.ours, VIEW, keys)
        return [None if values is None else values["clicks"].int64_val for _, values in read]

    def _live(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise KilledError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def row(user: str, hour: int, clicks: int, **values: Any) -> dict[str, Any]:
    return {"user_id": user, "event_timestamp": START + timedelta(hours=hour), "clicks": clicks, **values}


def test_second_run_writes_nothing(run: Run) -> None:
    table = [row("u1", 1, 1), row("u1", 2, 2, history=["i1"]), row("u2", 1, 3)]
    assert run.materialize(*table) == MaterializedView(rows=2, written=2, late=0, withdrawn=0)
    content = run.backend.content(run.backend.ours)
    assert run.materialize(*table) == MaterializedView(rows=2, written=0, late=0, withdrawn=0)
    assert run.backend.content(run.backend.ours) == content
    assert run.clicks("u1", "u2") == [2, 3]


def test_later_run_writes_the_keys_that_changed_since(run: Run) -> None:
    table = [row("u1", 1, 1), row("u1", 5, 2), row("u2", 1, 3), row("u3", 6, 4)]
    assert run.materialize(*table, as_of=START + timedelta(hours=2)).written == 2
    assert run.materialize(*table, as_of=START + timedelta(hours=5)).written == 1
    assert run.materialize(*table, as_of=START + timedelta(hours=6)).written == 1
    assert run.clicks("u1", "u2", "u3") == [2, 3, 4]


def test_first_run_starts_at_the_first_event_however_long_ago(run: Run) -> None:
    assert run.materialize(row("u1", -24 * 365 * 40, 7)).written == 1
    assert run.clicks("u1") == [7]


def test_row_that_arrives_behind_the_last_end_is_written(run: Run) -> None:
    run.materialize(row("u1", 1, 1), row("u2", 9, 2), as_of=START + timedelta(hours=10))
    late = run.materialize(
        row("u1", 1, 1), row("u1", 4, 5), row("u2", 9, 2), row("u3", 3, 6), as_of=START + timedelta(hours=10)
    )
    assert late == MaterializedView(rows=3, written=2, late=0, withdrawn=0)
    assert run.clicks("u1", "u2", "u3") == [5, 2, 6]


@pytest.mark.parametrize("correction", [{"clicks": 2}, {"history": ["i1"]}, {"rate": 0.0}])
def test_row_that_a_late_event_corrects_is_written_again(run: Run, correction: dict[str, Any]) -> None:
    run.materialize(row("u1", 1, 1), row("u2", 1, 1))
    assert run.materialize(row("u1", 1, 1) | correction, row("u2", 1, 1)).written == 1


def test_row_that_is_gone_gives_way_to_the_one_before(run: Run) -> None:
    """A filter finds out a bot: its clicks leave the tables, and the rows that they made."""
    run.materialize(row("u1", 1, 1), row("u1", 5, 99), row("bot", 3, 500))
    assert run.materialize(row("u1", 1, 1)) == MaterializedView(rows=1, written=1, late=0, withdrawn=2)
    assert run.clicks("u1", "bot") == [1, None]


def test_newer_row_of_a_stream_stays(run: Run) -> None:
    run.materialize(row("u1", 1, 1), row("u2", 1, 1))
    stream = rows(row("u1", 8, 77), row("u2", 8, 78))
    run.store.write_table(run.backend.ours, VIEW, stream)
    assert run.materialize(row("u1", 2, 2)) == MaterializedView(rows=1, written=1, late=1, withdrawn=0)
    assert run.clicks("u1", "u2") == [77, 78]
    assert run.materialize(row("u1", 9, 3)).late == 0
    assert run.clicks("u1") == [3]


def test_store_that_was_emptied_gets_every_row(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    table = [row("u1", 1, 1), row("u2", 1, 2)]
    run.materialize(*table)
    run.store.teardown(run.backend.ours, [VIEW], [])
    run.store = run.backend.open()
    with caplog.at_level(logging.INFO):
        assert run.materialize(*table).written == 2
    assert "the online store was emptied" in caplog.text
    assert run.clicks("u1", "u2") == [1, 2]


def test_store_that_was_restored_from_an_older_copy_gets_every_row(run: Run) -> None:
    database = Path(run.backend.ours.online_store.path)
    run.materialize(row("u1", 1, 1), row("u2", 1, 2))
    copy = database.read_bytes()
    run.materialize(row("u1", 2, 5), row("u2", 1, 2))
    run.store._get_conn(run.backend.ours).close()
    database.write_bytes(copy)
    run.store = run.backend.open()
    assert run.clicks("u1") == [1]
    assert run.materialize(row("u1", 2, 5), row("u2", 1, 2)).written == 2
    assert run.clicks("u1", "u2") == [5, 2]


def test_lost_keys_come_back_when_asked_for(run: Run) -> None:
    table = [row("u1", 1, 1), row("u2", 1, 2)]
    run.materialize(*table)
    run.store.withdraw(run.backend.ours, VIEW, rows(row("u1", 1, 1)))
    assert run.materialize(*table).written == 0
    assert run.materialize(*table, full=True).written == 2
    assert run.clicks("u1", "u2") == [1, 2]


def test_new_feature_reaches_keys_whose_values_are_the_same(run: Run) -> None:
    pq.write_table(rows(row("u1", 1, 1)), run.folder / "taste.parquet")
    options = {"as_of": ALWAYS, "records": run.folder / "materialized", "writer": run, "full": False}
    written = [
        materialize_view(run.folder / "taste.parquet", KEYS, names, **options).written
        for names in (["clicks", "rate", "city", "seen", "history"], ["rate", "clicks", "city", "seen", "history"])
    ]
    assert written == [1, 1]


TABLES = st.lists(
    st.dictionaries(
        st.tuples(st.sampled_from(["u1", "u2", "u3"]), st.integers(0, 3)), st.integers(0, 2), min_size=0, max_size=6
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=20, deadline=None)
@given(versions=TABLES, lives=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_runs_that_are_killed_do_no_harm(
    versions: list[dict[tuple[str, int], int]], lives: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever was killed where, on whatever tables, the next whole run gives what a new store would get."""
    run = Run(tmp_path_factory.mktemp("killed"))
    for version, life in zip(versions, lives, strict=False):
        run.lives = life
        with contextlib.suppress(KilledError):
            run.materialize(*(row(user, hour, clicks) for (user, hour), clicks in version.items()))
    run.lives = 10**9
    run.materialize(*(row(user, hour, clicks) for (user, hour), clicks in versions[-1].items()))
    fresh = Run(tmp_path_factory.mktemp("fresh"))
    fresh.materialize(*(row(user, hour, clicks) for (user, hour), clicks in versions[-1].items()))
    assert run.backend.content(run.backend.ours) == fresh.backend.content(fresh.backend.ours)
    assert not list((run.folder / "materialized").glob("*.p*artial")) + list(run.folder.glob("*/*.pending.parquet"))
