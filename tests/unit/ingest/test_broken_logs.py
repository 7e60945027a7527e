"""Files that are broken as a whole: each stops with an error that says what and what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import InputError
from evergreen.ingest.log import ingest_log

HEADER = "time,user,item,click\n"
ROWS = "".join(f"2024-01-{1 + i % 28:02d}T00:00:00Z,u{i % 7},i{i % 5},{i % 2}\n" for i in range(2000))
LOG = (HEADER + ROWS).encode()


def _refused(ingest: Any, mapping: Any, data: bytes | str | Path, file: str = "log.csv") -> str:
    with pytest.raises(InputError) as error:
        ingest(mapping, data, file)
    return str(error.value)


def test_empty_file(ingest: Any, clicks: Any) -> None:
    assert "log.csv: the file is empty" in _refused(ingest, clicks(), b"")


def test_blank_lines_only(ingest: Any, clicks: Any) -> None:
    assert "log.csv: no header" in _refused(ingest, clicks(), b"\n\n\r\n")


def test_header_only(ingest: Any, clicks: Any) -> None:
    assert "no rows" in _refused(ingest, clicks(), HEADER)
    assert "no rows" in _refused(ingest, clicks(), HEADER.strip())


def test_missing_file_suggests_its_neighbour(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    (tmp_path / "clicks.csv").write_bytes(LOG)
    assert "did you mean clicks.csv?" in _refused(ingest, clicks(), tmp_path / "click.csv")


def test_missing_column_suggests_near_names(ingest: Any, clicks: Any) -> None:
    message = _refused(ingest, clicks(), "time,User,item_id,click,b\n1,2,3,4,5\n")
    assert "2 columns are missing" in message
    assert "'user' (columns.user_id): did you mean 'User'?" in message
    assert "It has 5: 'time', 'User', 'item_id', 'click', 'b'" in message


def test_wrong_delimiter(ingest: Any, clicks: Any) -> None:
    assert "is the delimiter ';'?" in _refused(ingest, clicks(), LOG.replace(b",", b";"))


def test_column_twice(ingest: Any, clicks: Any) -> None:
    assert "column 'user' (columns.user_id) appears twice" in _refused(ingest, clicks(), "time,user,user,item,click\n")


def test_a_name_twice_that_nobody_asks_for_is_fine(ingest: Any, clicks: Any) -> None:
    result = ingest(clicks(), "time,x,user,x,item,click\n2024-01-01,1,u,2,i,0\n")
    assert result.column("item_id") == ["i"]


def test_binary_file(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "log.db") as database:
        database.execute("CREATE TABLE t (x)")
    assert "log.db: not text" in _refused(ingest, clicks(), tmp_path / "log.db")


def test_utf16_without_saying_so(ingest: Any, clicks: Any) -> None:
    assert "set source.encoding = 'utf-16'" in _refused(ingest, clicks(), LOG.decode().encode("utf-16"))


def test_text_without_line_ends(ingest: Any, clicks: Any) -> None:
    assert "is this delimited text?" in _refused(ingest, clicks(), b"x" * (2 << 20))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip", ".zst"])
def test_compressed_file_that_is_cut_short(ingest: Any, clicks: Any, suffix: str) -> None:
    whole = _compressed(LOG * 20, suffix)
    assert "log.csv" + suffix in _refused(ingest, clicks(), whole[: len(whole) * 2 // 3], "log.csv" + suffix)


def test_name_that_lies_about_compression(ingest: Any, clicks: Any) -> None:
    assert "is named as gzip but is not" in _refused(ingest, clicks(), LOG, "log.csv.gz")


def test_tar_archive(ingest: Any, clicks: Any) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("log.csv")
        info.size = len(LOG)
        tar.addfile(info, io.BytesIO(LOG))
    assert "tar://MEMBER::" in _refused(ingest, clicks(), buffer.getvalue(), "log.tar.gz")


def test_archive_of_several_files(ingest: Any, clicks: Any) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.csv", LOG)
        archive.writestr("b.csv", LOG)
    assert "an archive of 2 files (a.csv, b.csv): choose with zip://MEMBER::" in _refused(
        ingest, clicks(), buffer.getvalue(), "logs.zip"
    )


def test_parquet_that_is_cut_short(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"time": ["2024-01-01"] * 100}), path)
    for size in (4, 50, path.stat().st_size - 5):
        message = _refused(ingest, clicks(), path.read_bytes()[:size], "log.parquet")
        assert "log.parquet: cannot be read as Parquet" in message


def test_text_named_parquet(ingest: Any, clicks: Any) -> None:
    assert "log.parquet: cannot be read as Parquet" in _refused(ingest, clicks(), LOG, "log.parquet")


def test_folder_without_a_match(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    (tmp_path / "logs" / "day").mkdir(parents=True)
    (tmp_path / "logs" / "day" / "a.csv").write_bytes(LOG)
    (tmp_path / "logs" / "_SUCCESS").touch()
    message = _refused(ingest, clicks(source={"pattern": "*.csv"}), tmp_path / "logs")
    assert "no file matches source.pattern = '*.csv'; the folder holds day/a.csv" in message


def test_folder_of_mixed_schema_is_refused_before_a_row_is_read(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").write_bytes(LOG)
    (tmp_path / "logs" / "b.csv").write_text("when,user,item,click\n")
    assert _refused(ingest, clicks(), tmp_path / "logs").startswith("b.csv: a column is missing")


def test_no_path(clicks: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path of the log is empty"):
        ingest_log(clicks(), "", tmp_path / "snapshot")


def test_unknown_protocol(clicks: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nope://bucket/log\.csv: cannot be opened"):
        ingest_log(clicks(), "nope://bucket/log.csv", tmp_path / "snapshot")


def test_nothing_is_left_of_a_refused_log(ingest: Any, clicks: Any, tmp_path: Path) -> None:
    _refused(ingest, clicks(), HEADER + "x,y,z,0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def _compressed(data: bytes, suffix: str) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(data)
        case ".bz2":
            return bz2.compress(data)
        case ".xz":
            return lzma.compress(data)
        case ".zst":
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            return sink.getvalue().to_pybytes()
        case _:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("log.csv", data)
            return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip", ".zst"])
def test_compression_changes_nothing(ingest: Any, clicks: Any, suffix: str) -> None:
    plain = ingest(clicks(), LOG).snapshot.id
    assert ingest(clicks(), _compressed(LOG, suffix), "log.csv" + suffix).snapshot.id == plain
