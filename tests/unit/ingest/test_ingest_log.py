"""The snapshot as a whole: its order, its counts, and that it is the same for the same input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import InputError, MappingError
from evergreen.contracts.mapping import Mapping
from evergreen.contracts.snapshot import Snapshot, event_schema
from evergreen.ingest import engine, events, staging, text
from evergreen.ingest.log import ingest_log

HEADER = "time,user,item,click\n"


def _rows(num_rows: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [
        f"2024-01-{generator.randint(1, 5):02d}T{generator.randint(0, 23):02d}:00:00Z,"
        f"u{generator.randint(0, 50)},i{n},{generator.randint(0, 1)}"
        for n in range(num_rows)
    ]


def _log(rows: list[str]) -> str:
    return HEADER + "\n".join(rows) + "\n"


def test_rows_are_in_time_order_and_ties_in_source_order(ingest: Any, clicks: Any) -> None:
    rows = _rows(500)
    result = ingest(clicks(), _log(rows))
    expected = [row.split(",")[2] for row in sorted(rows, key=lambda row: row.split(",")[0])]
    assert result.column("item_id") == expected
    assert result.column("event_id") == list(range(500))


def test_files_are_one_a_day_and_have_the_schema_of_the_contract(ingest: Any, clicks: Any) -> None:
    snapshot = ingest(
        clicks(context_features={"item2": {"column": "item", "type": "multi"}}), _log(_rows(100))
    ).snapshot
    assert [file.path for file in snapshot.manifest.files] == [
        f"events/date=2024-01-0{day}/part-00000.parquet" for day in range(1, 6)
    ]
    assert sum(file.rows for file in snapshot.manifest.files) == 100
    for path in snapshot.files:
        assert pq.read_schema(path).equals(event_schema(snapshot.mapping))


def test_manifest_counts(ingest: Any, clicks: Any) -> None:
    rows = [
        "2024-01-01T10:00Z,a,x,1",
        "2024-01-01T11:30Z,b,x,0",
        "2024-01-02T00:00Z,a,y,1",
        "oops,a,y,1",
        "2024-01-02,a,y",
    ]
    manifest = ingest(clicks(), _log(rows)).snapshot.manifest
    assert (manifest.rows, manifest.num_users, manifest.num_items, manifest.num_positives) == (3, 2, 2, 2)
    assert manifest.first_event == datetime(2024, 1, 1, 10, tzinfo=UTC)
    assert manifest.last_event == datetime(2024, 1, 2, tzinfo=UTC)
    assert manifest.as_of == datetime(2024, 1, 2, 1, tzinfo=UTC)
    assert manifest.quarantined == {"timestamp: not a time": 1, "wrong number of fields": 1}


def test_rejected_rows_are_kept_with_source_line_and_text(ingest: Any, clicks: Any) -> None:
    log = (
        b'time,user,item,click\r\n2024-01-01,"a\nb",x,1\r\nnope,"c,d",x,1\r\n\r\n2024-01-01,\xff,x,1\r\n2024-01-01,e,x'
    )
    assert ingest(clicks(), log).rejected == [
        {"source": "log.csv", "line": "4", "reason": "timestamp: not a time", "row": 'nope,"c,d",x,1'},
        {"source": "log.csv", "line": "6", "reason": "invalid UTF-8", "row": "2024-01-01,\\xff,x,1"},
        {"source": "log.csv", "line": "7", "reason": "wrong number of fields", "row": "2024-01-01,e,x"},
    ]


def test_as_of_leaves_out_what_it_cannot_know(ingest: Any, clicks: Any) -> None:
    rows = ["2024-01-01T10:00Z,a,x,1", "2024-01-01T12:00Z,b,x,0", "2024-01-01T13:00Z,b,x,0"]
    manifest = ingest(clicks(), _log(rows), as_of=datetime(2024, 1, 1, 12, tzinfo=UTC)).snapshot.manifest
    assert (manifest.rows, manifest.left_out) == (1, {"at or after as_of": 2})
    assert manifest.as_of == datetime(2024, 1, 1, 12, tzinfo=UTC)


def test_as_of_before_the_first_event_is_an_error(ingest: Any, clicks: Any) -> None:
    with pytest.raises(InputError, match="no row is left: 1 x at or after as_of"):
        ingest(clicks(), HEADER + "2024-01-01,a,x,1\n", as_of=datetime(2023, 1, 1, tzinfo=UTC))


def test_as_of_needs_an_offset(ingest: Any, clicks: Any) -> None:
    with pytest.raises(InputError, match="has no offset"):
        ingest(clicks(), HEADER + "2024-01-01,a,x,1\n", as_of=datetime(2023, 1, 1))


def test_same_input_gives_the_same_bytes_however_it_is_worked_on(
    ingest: Any, clicks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _log([*_rows(3000), "broken", "2024-01-01,,x,1"])
    first = ingest(clicks(), log).snapshot
    monkeypatch.setattr(text, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(staging, "BATCH_ROWS", 777)
    monkeypatch.setattr(engine, "MAX_THREADS", 1)
    second = ingest(clicks(), log).snapshot
    assert second.manifest == first.manifest
    assert second.id == first.id
    Snapshot.load(second.path, verify=True)


def test_row_groups_have_a_fixed_size(ingest: Any, clicks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(staging, "BATCH_ROWS", 33)
    snapshot = ingest(clicks(), HEADER + "2024-01-01,u,i,0\n" * 250 + "2024-01-02,u,i,0\n" * 50).snapshot
    sizes = [
        pq.ParquetFile(path).metadata.row_group(n).num_rows
        for path in snapshot.files
        for n in range(3)
        if n < pq.ParquetFile(path).num_row_groups
    ]
    assert sizes == [100, 100, 50, 50]


def test_a_folder_is_read_in_the_order_of_its_names(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (logs / "b").mkdir(parents=True)
    (logs / "b" / "1.csv").write_text(HEADER + "2024-01-01,u,second,0\n")
    (logs / "a.csv").write_text("click,item,extra,user,time\n0,first,,u,2024-01-01\nx,first,,u,2024-01-01\n")
    (logs / "c.tsv").write_text((HEADER + "2024-01-01,u,third,0\n").replace(",", "\t"))
    (logs / ".hidden.csv").write_text("junk")
    (logs / "_SUCCESS").touch()
    result = ingest(clicks(source={"pattern": "**/*.?sv"}), logs)
    assert result.column("item_id") == ["first", "second", "third"]
    assert [(row["source"], row["line"]) for row in result.rejected] == [("a.csv", "3")]


def test_a_header_without_rows_among_others_is_no_error(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").write_text(HEADER)
    (tmp_path / "logs" / "b.csv").write_text(HEADER + "2024-01-01,u,i,0\n")
    assert len(ingest(clicks(), tmp_path / "logs").rows) == 1


def test_where_a_log_lies_has_no_influence(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    log = _log([*_rows(50), "broken"])
    local = ingest(clicks(), log).snapshot.id
    with fsspec.open("memory://bucket/log.csv", "w") as file:
        file.write(log)
    assert ingest_log(clicks(), "memory://bucket/log.csv", tmp_path / "remote").id == local
    assert ingest_log(clicks(), "memory://bucket/*.csv", tmp_path / "pattern").id == local


@pytest.mark.parametrize(
    ("raw", "source"),
    [
        (b"\xef\xbb\xbftime,user,item,click\n2024-01-01,\xc3\xa9,i,0\n", {}),
        (b"time,user,item,click\r\n2024-01-01,\xc3\xa9,i,0\r\n", {}),
        (b"time,user,item,click\r2024-01-01,\xc3\xa9,i,0\r", {}),
        (b"\n\ntime,user,item,click\n2024-01-01,\xc3\xa9,i,0", {}),
        (b'"time";"user";"item";"click"\n2024-01-01;"\xc3\xa9";i;0\n', {"delimiter": ";"}),
        (b"time::user::item::click\n2024-01-01::\xc3\xa9::i::0\n", {"delimiter": "::"}),
        (
            b"2024-01-01|\xc3\xa9|i|0\n",
            {"delimiter": "|", "header": False, "columns": ["time", "user", "item", "click"]},
        ),
        (b"a,b,c,d\n2024-01-01,\xc3\xa9,i,0\n", {"columns": ["time", "user", "item", "click"]}),
        (b"time,user,item,click\n2024-01-01,\xe9,i,0\n", {"encoding": "latin-1"}),
        ("time,user,item,click\n2024-01-01,é,i,0\n".encode("utf-16"), {"encoding": "utf-16"}),
        (b"time'user'item'click\n2024-01-01'\xc3\xa9'i'0\n", {"delimiter": "'", "quote": ""}),
    ],
)
def test_forms_of_delimited_text(ingest: Any, clicks: Any, raw: bytes, source: dict[str, Any]) -> None:
    (row,) = ingest(clicks(source=source), raw).rows
    assert (row["user_id"], row["item_id"], row["clicked"]) == ("é", "i", False)


def test_bytes_that_the_encoding_lacks_are_refused_by_line(ingest: Any, clicks: Any) -> None:
    mapping = clicks(source={"encoding": "cp1252"})
    result = ingest(mapping, b"time,user,item,click\n2024-01-01,\x80,i,0\n2024-01-01,\x81,i,0\n")
    assert result.column("user_id") == ["€"]
    assert result.reasons == [(3, "invalid CP1252")]


def test_mostly_refused_is_a_warning(ingest: Any, clicks: Any, caplog: pytest.LogCaptureFixture) -> None:
    ingest(clicks(), HEADER + "2024-01-01,u,i,0\n" + "x,u,i,0\n" * 3)
    assert "3 of 4 rows (75 %) are in quarantine" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": {"column": "time", "timezone": "Mars/Olympus"}}, "timestamp.timezone = 'Mars/Olympus'"),
        ({"timestamp": {"column": "time", "format": "%Q"}}, "timestamp.format = '%Q'"),
        ({"timestamp": {"column": "time", "format": "%Y", "unit": "s"}}, "both unit = 's' and a format"),
        ({"source": {"encoding": "klingon"}}, "source.encoding = 'klingon'"),
        ({"source": {"delimiter": '"'}}, "source.quote and source.delimiter"),
        ({"source": {"delimiter": "\n"}}, "a line end or NUL cannot be it"),
        ({"source": {"header": False, "columns": ["time", "user", "click"]}}, "'item' (columns.item_id)"),
        ({"columns": {"user_id": [], "item_id": "item"}}, "columns.user_id is an empty list"),
        ({"item_features": {"x": {"column": "item", "type": "multi", "separator": ""}}}, "separator is empty"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused(ingest: Any, clicks: Any, changes: Any, message: str) -> None:
    with pytest.raises(MappingError) as error:
        ingest(clicks(**changes), HEADER + "2024-01-01,u,i,0\n")
    assert message in str(error.value)


@pytest.mark.parametrize("days", [1, 2, 28])
def test_a_log_that_does_not_fit_in_memory_is_sorted_in_parts(
    ingest: Any, clicks: Any, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Also where a time is so frequent that its rows alone do not fit: `days` times and one odd row."""
    rows = [f"2024-01-{1 + n * 7919 % days:02d},u,i{n},0" for n in range(20_000)]
    log = _log([*rows, "2024-01-01T00:00:01Z,u,odd,0"][::-1])
    at_once = ingest(clicks(), log).snapshot.id
    monkeypatch.setattr(staging, "RANGE_BYTES", 100_000)
    monkeypatch.setattr(staging, "BATCH_ROWS", 1000)
    assert ingest(clicks(), log).snapshot.id == at_once


def test_a_killed_ingest_leaves_no_half_snapshot(tmp_path: Path, clicks: Any) -> None:
    mapping, log, out = tmp_path / "mapping.json", tmp_path / "log.csv", tmp_path / "snapshot"
    mapping.write_text(json.dumps(clicks().model_dump(mode="json")))
    log.write_text(_log(_rows(50_000)))
    code = (
        "import sys; from pathlib import Path; from evergreen.contracts.mapping import Mapping;"
        "from evergreen.ingest.log import ingest_log;"
        "ingest_log(Mapping.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], Path(sys.argv[3]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(mapping), str(log), str(out)], env={**os.environ})
    for _ in range(1000):
        if any((folder / ".scratch" / "staged.arrow").exists() for folder in tmp_path.glob(".snapshot.partial-*")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    ingest_log(Mapping.model_validate_json(mapping.read_text()), str(log), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "mapping.json", "snapshot"]
    assert sorted(path.name for path in out.iterdir()) == ["events", "manifest.json"]
