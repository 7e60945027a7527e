"""Rows taken from Parquet by number, against the same rows taken from the whole table in memory."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from evergreen.features import parquet_rows
from evergreen.features.parquet_rows import ParquetRows

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TYPES = {
    "number": (pa.int32(), lambda i: i),
    "rate": (pa.float32(), lambda i: i / 4),
    "flag": (pa.bool_(), lambda i: i % 3 == 0),
    "word": (pa.string(), lambda i: f"word {i}"),
    "bytes": (pa.binary(), lambda i: bytes([i])),
    "time": (pa.timestamp("us", tz="UTC"), lambda i: NOW),
    "words": (pa.list_(pa.string()), lambda i: [str(i)] * (i % 4)),
    "nested": (pa.list_(pa.list_(pa.int64())), lambda i: [[i], []]),
}


@pytest.fixture(params=["one file", "folder by date"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """100 rows, every seventh null, in row groups of ten; as a folder: in two dates, and a file without rows."""
    table = pa.table(
        {
            name: pa.array([None if i % 7 == 0 else value(i) for i in range(100)], dtype)
            for name, (dtype, value) in TYPES.items()
        }
    )
    target = tmp_path / "table.parquet"
    if request.param == "one file":
        pq.write_table(table, target, row_group_size=10)
    else:
        parts = {"schema": (0, 0), "date=2026-01-01/part-0": (0, 35), "date=2026-01-02/part-0": (35, 65)}
        for name, part in parts.items():
            file = target / f"{name}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(*part), file, row_group_size=10)
    return str(target)


@pytest.mark.parametrize(
    "numbers",
    [[], [3], [99, 0, 0, 42, -1, 99], [-1, -1], list(range(100)), np.random.default_rng(0).integers(-1, 100, 500)],
    ids=["none", "one", "some", "nulls", "all", "many"],
)
def test_rows_come_in_the_order_of_their_numbers_and_in_the_types_of_the_file(
    path: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "_SLICE_ROWS", 7)
    whole = ds.dataset(path, format="parquet").to_table()
    numbers = np.array(numbers, np.int64)
    names = {f"new {name}": name for name in TYPES} | {"again": "word"}
    taken = ParquetRows(path).take(numbers, names)
    expected = whole.take(pa.array(numbers, mask=numbers < 0))
    assert taken.column_names == list(names)
    for new, old in names.items():
        assert taken.schema.field(new).type == whole.schema.field(old).type
        assert taken[new].to_pylist() == expected[old].to_pylist()


def test_text_beyond_32_bit_offsets_is_taken_too(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.array([50, 8, -1, 99])
    names = {name: name for name in TYPES}
    usual = ParquetRows(path).take(numbers, names)
    monkeypatch.setattr(parquet_rows, "_MAX_ARRAY_BYTES", 0)
    assert ParquetRows(path).take(numbers, names).equals(usual)


def test_numbers_are_of_the_rows_that_duckdb_finds(path: str) -> None:
    table = ParquetRows(path)
    with duckdb.connect() as db:
        found = db.execute(
            f"SELECT number, file_index, file_row_number FROM {ParquetRows.FILES} WHERE number > 20",
            {"files": table.files},
        ).to_arrow_table()
    numbers = table.numbers(found["file_index"].to_numpy(), found["file_row_number"].to_numpy())
    assert len(numbers) == 67
    assert table.take(numbers, {"number": "number"})["number"].to_pylist() == found["number"].to_pylist()


def test_table_without_rows_gives_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"word": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    table = ParquetRows(str(tmp_path / "empty.parquet"))
    assert table.num_rows == 0
    assert table.take(np.array([-1, -1]), {"word": "word"}).to_pydict() == {"word": [None, None]}
