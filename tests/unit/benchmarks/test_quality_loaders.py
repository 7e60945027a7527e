"""The files that published results were made on are read as they come."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from evergreen.contracts.errors import InputError


@pytest.fixture(scope="module")
def loaders() -> ModuleType:
    """The script beside the benchmarks, which are no package."""
    path = Path(__file__).parents[3] / "benchmarks" / "quality" / "loaders.py"
    spec = importlib.util.spec_from_file_location("quality_loaders", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(text)
    return path


def test_libfm_lines_are_read_by_place(loaders: ModuleType, tmp_path: Path) -> None:
    rows = loaders.load_labelled_rows(write(tmp_path, "1 451:1 4149:1\n-1 451:1 7:1\n0 2:1 7:1\n"))
    assert rows.labels.tolist() == [1, 0, 0]
    assert rows.features.to_pydict() == {"feature_1": ["451", "451", "2"], "feature_2": ["4149", "7", "7"]}


def test_csv_with_a_header_keeps_its_names(loaders: ModuleType, tmp_path: Path) -> None:
    rows = loaders.load_labelled_rows(write(tmp_path, "label,user,item\n1.0,451,4149\n0.0,3,7\n"))
    assert rows.labels.tolist() == [1, 0]
    assert rows.features.to_pydict() == {"user": ["451", "3"], "item": ["4149", "7"]}


def test_label_is_found_by_name_wherever_it_stands(loaders: ModuleType, tmp_path: Path) -> None:
    rows = loaders.load_labelled_rows(write(tmp_path, "user,item,Label\n451,4149,0\n3,7,1\n"))
    assert rows.labels.tolist() == [0, 1]
    assert rows.features.column_names == ["user", "item"]


def test_csv_without_a_header_has_the_label_first(loaders: ModuleType, tmp_path: Path) -> None:
    rows = loaders.load_labelled_rows(write(tmp_path, "1,451,4149\n0,3,7\n"))
    assert rows.labels.tolist() == [1, 0]
    assert rows.features.num_columns == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 451:1 4149:1\n0 451:1\n", "lines differ in length"),
        ("1 451:0.5 4149:1\n", "451:0.5: only features with the value 1"),
        ("label,user\nyes,1\n", "column label is not a number"),
        ("", "the file is empty"),
    ],
)
def test_broken_rows_are_refused_in_words(loaders: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaders.load_labelled_rows(write(tmp_path, text))


def test_missing_file_is_named(loaders: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv: no such file"):
        loaders.load_labelled_rows(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    "text",
    [
        "1 10\n1 30\n2 20\n1 20\n",
        "1::10::5::100\n2::20::3::250\n1::30::4::200\n1::20::4::300\n",
        "1\t10\t5\t100\n2\t20\t3\t250\n1\t30\t4\t200\n1\t20\t4\t300\n",
        "userId,movieId,rating,timestamp\n1,10,5,100\n2,20,3,250\n1,30,4,200\n1,20,4,300\n",
        "user_id:token\titem_id:token\ttimestamp:float\n1\t10\t100\n2\t20\t250\n1\t30\t200\n1\t20\t300\n",
    ],
    ids=["pairs", "ratings.dat", "u.data", "csv", "recbole"],
)
def test_interactions_of_all_formats_come_in_time_order(loaders: ModuleType, tmp_path: Path, text: str) -> None:
    users, items = loaders.load_interactions(write(tmp_path, text))
    assert items[users == 0].tolist() == [0, 2, 1]
    assert items[users == 1].tolist() == [1]


def test_rare_items_and_then_users_are_left_out(loaders: ModuleType, tmp_path: Path) -> None:
    users, items = loaders.load_interactions(write(tmp_path, "1 10\n1 20\n2 20\n2 30\n1 20\n"), min_count=2)
    assert users.tolist() == [0, 0]
    assert np.unique(items).size == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 10 5\n", "3 columns without a header"), ("who,what\n1,2\n", "no user and item, but who, what")],
)
def test_unclear_columns_are_refused(loaders: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaders.load_interactions(write(tmp_path, text))
