"""Feature tables by date: a range holds what the whole log gives; a run that fails or dies is noticed and mended."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, DateRange, FeatureTables
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot
from evergreen.features.engines import DuckDBEngine, Engine, duckdb_engine
from evergreen.features.leakage import check_point_in_time
from evergreen.features.partitions import build_feature_partitions
from evergreen.features.point_in_time import join_features
from evergreen.features.tables import build_feature_tables

WriteSnapshot = Callable[..., Snapshot]
START = datetime(2026, 3, 1, tzinfo=UTC)
FIRST, LAST = date(2026, 3, 1), date(2026, 3, 6)


@pytest.fixture(scope="module")
def log(write_snapshot: WriteSnapshot) -> Snapshot:
    """Five days of clicks, some in the last microsecond of a day; as_of is a midnight, which has rows of its own."""
    mapping = Mapping.model_validate(
        {
            "name": "log",
            "kind": "impressions",
            "label": {"column": "click"},
            "timestamp": {"column": "t"},
            "columns": {"user_id": "u", "item_id": "i", "category": "c"},
            "split": {"attribution_window": "90m"},
            "user_features": {"country": "categorical"},
            "item_features": {"tags": "multi"},
        }
    )
    times = [START + timedelta(minutes=23 * k) for k in range(300)]
    times += [START + timedelta(days=day, microseconds=-1) for day in (1, 2, 5)]
    rows = [
        {
            "event_timestamp": at,
            "user_id": f"u{k % 7}",
            "item_id": f"i{k % 11}",
            "category": f"c{k % 3}",
            "clicked": k % 4 == 0,
            "country": "de" if k % 20 < 11 else "fr",
            "tags": [f"t{k % 2}", "t"],
        }
        for k, at in enumerate(sorted(times))
    ]
    return write_snapshot(mapping, rows, as_of=START + timedelta(days=5))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBEngine]:
    with duckdb_engine(tmp_path_factory.mktemp("spill"), threads=2) as duckdb:
        yield duckdb


@pytest.fixture(scope="module")
def whole(log: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    """The same features, one file a table."""
    return build_feature_tables(log, tmp_path_factory.mktemp("whole") / "tables")


@pytest.fixture(scope="module")
def built(log: Snapshot, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> FeatureTables:
    """The same features by date. Tests that change them take `by_date`."""
    return build_feature_partitions(log, tmp_path_factory.mktemp("built") / "tables", engine=engine)


@pytest.fixture
def by_date(built: FeatureTables, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(built.path, tmp_path / "by_date"))


def rows(tables: FeatureTables, name: str, first: date = FIRST, last: date = LAST) -> pa.Table:
    """A table's rows of some dates, by key and time."""
    start, end = (datetime(d.year, d.month, d.day, tzinfo=UTC) for d in (first, last + timedelta(days=1)))
    at = ds.field("event_timestamp")
    found = ds.dataset(tables.table(name), format="parquet").to_table(filter=(at >= start) & (at < end))
    return found.sort_by([(key, "ascending") for key in (*JOIN_KEYS[name], "event_timestamp")]).combine_chunks()


def assert_equal(tables: FeatureTables, whole: FeatureTables, first: date = FIRST, last: date = LAST) -> None:
    for name in JOIN_KEYS:
        found = rows(tables, name)
        assert found.equals(rows(whole, name, first, last)), name
        assert tables.manifest.rows[name] == found.num_rows, name


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that is not hidden: which one it is on the disk, and its bytes."""
    found = (p for p in folder.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.parts))
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.read_bytes()) for p in sorted(found)}


def day(n: int) -> date:
    return FIRST + timedelta(days=n)


BREAKS = """
import os, resource, sys
from datetime import date
from pathlib import Path
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.snapshot import Snapshot
from evergreen.features import partitions
from evergreen.features.engines import DuckDBEngine, duckdb_engine

def before(table, method, action):
    def wrapper(*arguments, **options):
        if table in map(str, arguments) or any(isinstance(a, Path) and a.name == table for a in arguments):
            action()
        return method(*arguments, **options)
    return wrapper

def disk_is_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

def dies():
    os._exit(9)

snapshot, out, spill, first, action = sys.argv[1:]
exec(action)
with duckdb_engine(Path(spill)) as engine:
    try:
        log = Snapshot.load(Path(snapshot))
        partitions.build_feature_partitions(log, Path(out), engine=engine, first=date.fromisoformat(first))
    except ArtifactError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
"""
WRITING = "DuckDBEngine.write_by_date = before({!r}, DuckDBEngine.write_by_date, {})"
REPLACING = "partitions._replace = before({!r}, partitions._replace, {})"


def broken_run(log: Snapshot, out: Path, spill: Path, action: str, first: date = FIRST) -> tuple[int, str]:
    """Compute the dates from `first` on in a process to which something happens: its exit status and what it says."""
    spill.mkdir()
    arguments = [str(log.path), str(out), str(spill), str(first), action]
    run = subprocess.run([sys.executable, "-c", BREAKS, *arguments], capture_output=True, text=True, timeout=120)
    return run.returncode, run.stderr


def test_partitions_hold_the_rows_of_the_single_files_each_on_its_date(
    built: FeatureTables, whole: FeatureTables
) -> None:
    tables = FeatureTables.load(built.path)
    assert tables.manifest == built.manifest
    assert tables.manifest.partitions == DateRange(first=FIRST, last=LAST)
    assert_equal(tables, whole)
    for name in JOIN_KEYS:
        assert tables.schema(name) == whole.schema(name)
        for partition in tables.table(name).glob("date=*"):
            times = ds.dataset(partition, format="parquet").to_table()["event_timestamp"].to_pylist()
            assert {str(time.date()) for time in times} == {partition.name.removeprefix("date=")}


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 2), (1, 1), (2, 4), (3, 5), (5, 5)])
def test_range_holds_what_the_whole_history_gives(
    log: Snapshot, engine: Engine, whole: FeatureTables, tmp_path: Path, first: int, last: int
) -> None:
    tables = build_feature_partitions(log, tmp_path, engine=engine, first=day(first), last=day(last))
    assert_equal(tables, whole, day(first), day(last))


def test_range_does_not_know_the_days_after_it(log: Snapshot, engine: Engine, tmp_path: Path) -> None:
    def build(snapshot: Snapshot, out: Path) -> FeatureTables:
        build_feature_partitions(snapshot, out, engine=engine, last=day(1))
        return build_feature_partitions(snapshot, out, engine=engine, first=day(2))

    check_point_in_time(log, build(log, tmp_path / "t"), build=build, cut=START + timedelta(days=3))


def test_rerun_replaces_exactly_its_dates(log: Snapshot, engine: Engine, by_date: Path) -> None:
    before = files(by_date)
    for name in JOIN_KEYS:
        stale = by_date / f"{name}.parquet" / f"date={day(2)}" / "part-of-an-older-run.parquet"
        stale.parent.mkdir(exist_ok=True)
        pq.write_table(rows(FeatureTables.load(by_date), name).slice(0, 1), stale)
    build_feature_partitions(log, by_date, engine=engine, first=day(2), last=day(3))
    after = files(by_date)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    renewed = {name for name, (inode, _) in after.items() if inode != before[name][0]}
    in_range = {name for name in before if f"date={day(2)}" in name or f"date={day(3)}" in name}
    assert in_range <= renewed
    assert {Path(name).name for name in renewed - in_range} == {"schema.parquet", "manifest.json"}


def test_tables_are_refused_until_every_date_is_there(
    log: Snapshot, engine: Engine, whole: FeatureTables, tmp_path: Path
) -> None:
    build_feature_partitions(log, tmp_path, engine=engine, first=day(2), last=day(3))
    with pytest.raises(ArtifactError, match="for 2026-03-03 to 2026-03-04 only, and the log is of 2026-03-01 to"):
        FeatureTables.load(tmp_path)
    with pytest.raises(ArtifactError, match="take dates that leave no gap"):
        build_feature_partitions(log, tmp_path, engine=engine, first=day(0), last=day(0))
    build_feature_partitions(log, tmp_path, engine=engine, first=day(4))
    build_feature_partitions(log, tmp_path, engine=engine, last=day(1))
    assert_equal(FeatureTables.load(tmp_path), whole)


def test_full_disk_leaves_the_old_partitions(
    log: Snapshot, by_date: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = files(by_date)
    full = WRITING.format("item_activity", "disk_is_full")
    status, said = broken_run(log, by_date, tmp_path_factory.mktemp("child") / "spill", full)
    assert (status, "item_activity cannot be computed: DuckDB says: [Errno 27] " in said) == (1, True), said
    assert files(by_date) == before
    assert [p.name for p in by_date.glob(".*")] == [".lock"]
    FeatureTables.load(by_date)


def test_run_killed_while_it_computes_changes_nothing(
    log: Snapshot, engine: Engine, by_date: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = files(by_date)
    dies = WRITING.format("user_profile", "dies")
    assert broken_run(log, by_date, tmp_path_factory.mktemp("child") / "spill", dies)[0] == 9
    assert files(by_date) == before
    assert list(by_date.glob(".partial-*"))
    build_feature_partitions(log, by_date, engine=engine, first=day(5))
    assert not list(by_date.glob(".partial-*"))


def test_run_killed_while_it_replaces_is_noticed_and_mended(
    log: Snapshot, engine: Engine, whole: FeatureTables, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build_feature_partitions(log, tmp_path, engine=engine, last=day(3))
    dies = REPLACING.format("user_profile", "dies")
    assert broken_run(log, tmp_path, tmp_path_factory.mktemp("child") / "spill", dies, first=day(2))[0] == 9
    with pytest.raises(ArtifactError, match="broke off while it replaced 2026-03-03 to 2026-03-06: compute these"):
        FeatureTables.load(tmp_path)
    with pytest.raises(ArtifactError, match="dates 2026-03-04 to 2026-03-06: a run broke off while it replaced"):
        build_feature_partitions(log, tmp_path, engine=engine, first=day(3))
    build_feature_partitions(log, tmp_path, engine=engine, first=day(2))
    assert_equal(FeatureTables.load(tmp_path), whole)


def test_tables_of_something_else_are_not_touched(
    log: Snapshot, engine: Engine, whole: FeatureTables, write_snapshot: WriteSnapshot, by_date: Path
) -> None:
    before = files(by_date)
    other = write_snapshot(log.mapping, [{"event_timestamp": START, "user_id": "u", "clicked": True}])
    with pytest.raises(ArtifactError, match=f"holds features of snapshot {log.id[:12]} .* not of {other.id[:12]}"):
        build_feature_partitions(other, by_date, engine=engine)
    assert files(by_date) == before
    with pytest.raises(ArtifactError, match="one file each and have no partitions"):
        build_feature_partitions(log, whole.path, engine=engine)
    shutil.rmtree(by_date)
    by_date.mkdir()
    (by_date / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"holds notes.txt and no manifest.json: choose an empty folder"):
        build_feature_partitions(log, by_date, engine=engine)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (-1, 2, "dates 2026-02-28 to 2026-03-03: the snapshot's features are of 2026-03-01 to 2026-03-06"),
        (2, 6, "dates 2026-03-03 to 2026-03-07: the snapshot's features are of"),
        (2, 1, "dates 2026-03-03 to 2026-03-02: the first is after the last"),
    ],
)
def test_dates_outside_the_snapshot_are_refused(
    log: Snapshot, engine: Engine, tmp_path: Path, first: int, last: int, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        build_feature_partitions(log, tmp_path / "t", engine=engine, first=day(first), last=day(last))
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_at_once(log: Snapshot, engine: Engine, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another run is writing there"):
            build_feature_partitions(log, tmp_path, engine=engine)


def test_table_without_rows_keeps_its_columns(write_snapshot: WriteSnapshot, engine: Engine, tmp_path: Path) -> None:
    mapping = Mapping.model_validate(
        {"name": "log", "kind": "impressions", "label": {"column": "click"}, "timestamp": {"column": "t"}}
    )
    anonymous = write_snapshot(mapping, [{"event_timestamp": START, "clicked": True}])
    tables = build_feature_partitions(anonymous, tmp_path / "by_date", engine=engine)
    single = build_feature_tables(anonymous, tmp_path / "single")
    for name in JOIN_KEYS:
        assert tables.schema(name) == single.schema(name)
        assert rows(tables, name).num_rows == 0


def test_join_does_not_care_how_tables_are_laid_out(log: Snapshot, built: FeatureTables, whole: FeatureTables) -> None:
    spine = ds.dataset(log.files, format="parquet").to_table(
        columns=["event_timestamp", "user_id", "item_id", "category"]
    )
    assert join_features(spine, built).equals(join_features(spine, whole))
