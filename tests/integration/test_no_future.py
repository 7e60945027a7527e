"""No feature knows its future: planted ones are caught, and the real tables do not change when the future does."""

import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from evergreen.contracts.errors import LeakageError
from evergreen.contracts.feature_tables import FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.leakage import check_point_in_time, middle_midnight, past_of
from evergreen.features.tables import build_feature_tables
from evergreen.ingest.log import ingest_log
from evergreen.simulator.log import SimulatorConfig, simulate_log

CUT = datetime(2025, 1, 4, tzinfo=UTC)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("no_future")
    simulate_log(SimulatorConfig(num_users=60, num_items=50, num_days=5, events_per_day=400, seed=3), folder / "log")
    return ingest_log(Mapping.load("simulated"), str(folder / "log"), folder / "snapshot")


def _with_planted(snapshot: Snapshot, out: Path, query: str) -> FeatureTables:
    """Build the real tables, then replace one of them by what `query` makes of it."""
    tables = build_feature_tables(snapshot, out)
    target = tables.table("item_activity")
    events = f"(SELECT * FROM read_parquet({snapshot.files}))"
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        select = query.format(table=f"read_parquet('{target}')", events=events)
        connection.execute(f"CREATE TABLE planted AS {select}")
        connection.execute(f"COPY (FROM planted ORDER BY item_id, event_timestamp) TO '{target}' (FORMAT parquet)")
    return tables


def test_the_real_tables_know_nothing_of_the_future(snapshot: Snapshot, tmp_path: Path) -> None:
    tables = build_feature_tables(snapshot, tmp_path / "tables")
    check_point_in_time(snapshot, tables, cut=CUT, build=build_feature_tables)


def test_clicks_of_the_coming_day_are_caught(snapshot: Snapshot, tmp_path: Path) -> None:
    query = """
        SELECT t.*, (SELECT count(*) FROM {events} e WHERE e.item_id = t.item_id AND e.clicked
                     AND e.event_timestamp BETWEEN t.event_timestamp AND t.event_timestamp + INTERVAL 1 DAY)
                    AS item_clicks_tomorrow
        FROM {table} t"""

    def build(source: Snapshot, out: Path) -> FeatureTables:
        return _with_planted(source, out, query)

    tables = build(snapshot, tmp_path / "tables")
    with pytest.raises(LeakageError, match=r"'item_clicks_tomorrow' of item_activity knows the future: for item_id="):
        check_point_in_time(snapshot, tables, cut=CUT, build=build)


def test_a_mean_over_the_whole_log_is_caught(snapshot: Snapshot, tmp_path: Path) -> None:
    query = """
        SELECT t.*, (SELECT avg(e.clicked::INT) FROM {events} e WHERE e.item_id = t.item_id) AS item_click_rate
        FROM {table} t"""

    def build(source: Snapshot, out: Path) -> FeatureTables:
        return _with_planted(source, out, query)

    tables = build(snapshot, tmp_path / "tables")
    with pytest.raises(LeakageError, match="'item_click_rate' of item_activity knows the future"):
        check_point_in_time(snapshot, tables, cut=CUT, build=build)


def test_by_default_the_cut_halves_the_log(snapshot: Snapshot) -> None:
    assert middle_midnight(snapshot) == datetime(2025, 1, 3, tzinfo=UTC)


def test_a_log_of_one_date_cannot_be_cut(snapshot: Snapshot) -> None:
    one_date = snapshot.manifest.model_copy(update={"files": snapshot.manifest.files[:1]})
    assert middle_midnight(Snapshot(snapshot.path, one_date)) is None


def test_the_past_of_a_snapshot_ends_at_the_cut(snapshot: Snapshot) -> None:
    past = past_of(snapshot, cut=CUT)
    assert 0 < past.manifest.rows < snapshot.manifest.rows
    assert past.as_of == CUT
    assert past.id != snapshot.id


@pytest.mark.parametrize("cut", [datetime(2025, 1, 4, 12, tzinfo=UTC), datetime(2024, 1, 4, tzinfo=UTC)])
def test_a_cut_that_makes_no_sense_is_refused(snapshot: Snapshot, cut: datetime) -> None:
    with pytest.raises(LeakageError, match=re.escape(f"cut {cut}")):
        past_of(snapshot, cut=cut)
