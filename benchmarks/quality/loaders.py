"""Readers of the files that published results were made on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from evergreen.contracts.errors import InputError

LABEL_NAMES = ("label", "y", "click", "clicked", "target")
USER_NAMES = ("user", "user_id", "userid", "uid")
ITEM_NAMES = ("item", "item_id", "itemid", "movie", "movie_id", "movieid", "iid")
TIME_NAMES = ("timestamp", "time", "ts", "date")
DELIMITERS = ("::", "\t", ",", ";", " ")


@dataclass(frozen=True)
class LabelledRows:
    """Rows of categories with a label of 0 or 1."""

    features: pa.Table
    """A column of strings for each feature."""
    labels: NDArray[np.float32]
    """(num_rows,)."""


def load_labelled_rows(path: Path) -> LabelledRows:
    """Read libfm lines (`1 451:1 4149:1 …`) or CSV (`label,feature,…`, with or without a header).

    Features of libfm lines are known by their place in the line and must all have the value 1. Labels above 0 count
    as 1, the others (0 or -1) as 0.

    Raises:
        InputError: the file is missing or empty, lines differ in length, a label is not a number.
    """
    first = _first_line(path)
    libfm = re.fullmatch(r"\S+(\s+\S+:\S+)+\s*", first) is not None
    names = None if libfm else _header(first, ",")
    table = _read(path, delimiter=" " if libfm else ",", has_header=names is not None)
    names = names or ["label", *[f"feature_{place}" for place in range(1, table.num_columns)]]
    table = table.rename_columns([name.strip().lower() for name in names])
    label = next((name for name in table.column_names if name in LABEL_NAMES), table.column_names[0])
    if table.num_columns < 2:
        raise InputError(f"{path}: line 1 has a label and no features: {first!r}")
    features = table.drop_columns([label])
    if libfm:
        features = pa.table({name: _indices(path, features[name]) for name in features.column_names})
    return LabelledRows(features, (_numbers(path, label, table[label]) > 0).astype(np.float32))


def load_interactions(path: Path, *, min_count: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) users and (n,) items in time order.

    Read are `user item` lines in time order, `user item rating time` lines (u.data, ratings.dat with `::`), and tables
    with a header that names user, item and possibly a timestamp, by which they are sorted.

    Args:
        path: the file.
        min_count: items that occur less often are left out, then users with fewer items.

    Raises:
        InputError: the file is missing or empty, or its columns cannot be told apart.
    """
    first = _first_line(path)
    delimiter = next((mark for mark in DELIMITERS if mark in first.strip()), " ")
    names = _header(first, delimiter)
    if delimiter == "::":
        table = _read(path, delimiter=":", has_header=names is not None)
        table = table.select(table.column_names[::2])
    else:
        table = _read(path, delimiter=delimiter, has_header=names is not None)
    width = table.num_columns
    if names is None:
        if width not in (2, 4):
            raise InputError(
                f"{path}: {width} columns without a header: give `user item` in time order, `user item rating time`, "
                "or a header that names user, item and timestamp"
            )
        names = ["user", "item", "rating", "timestamp"][:width]
    clean = [name.strip().strip('"').split(":")[0].lower() for name in names]  # RecBole writes user_id:token
    places = {
        role: next((clean.index(name) for name in known if name in clean), None)
        for role, known in (("user", USER_NAMES), ("item", ITEM_NAMES), ("time", TIME_NAMES))
    }
    if places["user"] is None or places["item"] is None:
        raise InputError(f"{path}: the header has no user and item, but {', '.join(clean)}")
    users, items = (_codes(table.column(places[role])) for role in ("user", "item"))
    if places["time"] is not None:
        order = np.argsort(_numbers(path, "timestamp", table.column(places["time"])), kind="stable")
        users, items = users[order], items[order]
    often = np.bincount(items)[items] >= min_count
    users, items = users[often], items[often]
    often = np.bincount(users, minlength=1)[users] >= min_count
    return users[often], items[often]


def _first_line(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open(encoding="utf-8") as file:
        line = file.readline().rstrip("\n")
    if not line.strip():
        raise InputError(f"{path}: the file is empty")
    return line


def _header(line: str, delimiter: str) -> list[str] | None:
    """Names of the columns, or None when the first line holds numbers."""
    parts = line.split(delimiter)
    return None if any(re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", part) for part in parts) else parts


def _read(path: Path, *, delimiter: str, has_header: bool) -> pa.Table:
    """All columns as strings."""
    try:
        with pa_csv.open_csv(
            path,
            read_options=pa_csv.ReadOptions(autogenerate_column_names=not has_header),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter),
        ) as reader:
            names = reader.schema.names
        return pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(autogenerate_column_names=not has_header),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: lines differ in length or cannot be read: {error}") from error


def _indices(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`451` of `451:1`."""
    parts = pc.split_pattern(column, ":", max_splits=1)
    value = pc.list_element(parts, 1)
    if not pc.all(pc.is_in(value, pa.array(["1", "1.0"]))).as_py():
        other = pc.filter(column, pc.invert(pc.is_in(value, pa.array(["1", "1.0"]))))[0]
        raise InputError(f"{path}: {other}: only features with the value 1 are read, as in `451:1`")
    return pc.list_element(parts, 0)


def _numbers(path: Path, name: str, column: pa.ChunkedArray) -> NDArray[np.float64]:
    try:
        values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: column {name} is not a number: {error}") from error
    return values


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Numbers from 0 for distinct strings, those that are numbers in numeric order."""
    values = column.to_numpy()
    try:
        values = values.astype(np.int64)
    except ValueError:
        values = values.astype(str)
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
