"""The point-in-time join: to every row, the features that were known at its time. DuckDB's ASOF JOIN, without Feast.

Feast's own joins pair each row with every earlier feature row of its key and then de-duplicate; with hundreds of
change points a key that explodes. An ASOF join sorts both sides once. It runs here on keys and times alone and finds
where in the Parquet files the matching row lies; the wide values are read after it, for matched rows only.

A feature row counts as known from its own event_timestamp on (`<=`): the tables already hold, at T, only what was
known strictly before T. Times are compared in microseconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.feature_tables import JOIN_KEYS, RANKER_TABLES, FeatureTables
from evergreen.contracts.instant import to_micros
from evergreen.contracts.snapshot import TIMESTAMP_TYPE
from evergreen.features.parquet_rows import ParquetRows
from evergreen.features.request import REQUEST_SCHEMA, request_features

EVENT_TIMESTAMP = "event_timestamp"

_MATCHES_AT_A_TIME = 1_000_000
_MEMORY_LIMIT = "3GB"  # beyond it DuckDB spills to disk
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class AsofSource:
    """Feature rows in Parquet, and how they meet the spine."""

    path: str
    """A Parquet file, or a folder of them."""
    keys: Mapping[str, str]
    """Column of the file → column of the spine. Without any, a row holds for everybody."""
    features: Mapping[str, str]
    """Column of the result → column of the file."""
    timestamp: str = EVENT_TIMESTAMP
    created: str | None = None
    """Of rows with equal key and timestamp, the one created last counts. Without it, any one of them."""
    ttl: timedelta = field(default=timedelta(0))
    """How long a row holds; 0: until the next one."""


def join_features(spine: pa.Table, tables: FeatureTables, *, only: Collection[str] = RANKER_TABLES) -> pa.Table:
    """Append the columns of feature service `ranker_v1`, as known at each row's time.

    Args:
        spine: rows with event_timestamp, user_id, item_id and category; keys may be null. Anything else is kept.
        tables: the feature tables.
        only: names of the tables to read; the columns of the others are null.

    Returns:
        The spine's rows in the spine's order; its columns, then those of the tables in the order of RANKER_TABLES, then
        `request_features` of the row's own time. A null or unknown key gives null features.

    Raises:
        ArtifactError: the spine lacks a key column, or already has a column of the service.
    """
    check_spine(spine, {key for name in RANKER_TABLES for key in JOIN_KEYS[name]})
    joined = []
    for name in RANKER_TABLES:
        source = table_source(tables, name)
        joined.append(asof_features(spine, source) if name in only else _no_features(spine.num_rows, source))
    stored = pa.Table.from_arrays(
        [column for table in joined for column in table.columns],
        schema=pa.schema([column for table in joined for column in table.schema]),
    )
    on_demand = request_features(spine[EVENT_TIMESTAMP], stored)
    features = {name: table[name] for table in (stored, on_demand) for name in table.column_names}
    if taken := sorted(features.keys() & set(spine.column_names)):
        raise ArtifactError(f"the spine already has {taken[0]!r}, a column of ranker_v1: rename or drop it")
    for name, column in features.items():
        spine = spine.append_column(name, column)
    return spine


def items_as_of(tables: FeatureTables, as_of: datetime) -> pa.Table:
    """The catalogue at a moment: (item_id, category, item_first_seen), sorted by item_id.

    An item is in it from its first profile row on, with the category that it had then last.
    """
    path = str(tables.table("item_profile"))
    items = latest_rows(path, keys=["item_id"], columns=["item_id", "item_category", "item_first_seen"], end=as_of)
    return items.rename_columns({"item_category": "category"})


def latest_rows(
    path: str,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    end: datetime,
    start: datetime | None = None,
    timestamp: str = EVENT_TIMESTAMP,
    created: str | None = None,
) -> pa.Table:
    """The last row of every key in a time range, sorted by key.

    Args:
        path: a Parquet file, or a folder of them.
        keys: columns that make a key; none: all rows have the same.
        columns: what to return.
        end: rows after it do not count; rows at it do.
        start: rows before it do not count.
        timestamp: the time column.
        created: of rows with equal key and timestamp, the one created last counts. Without it, any one of them.
    """
    order = ", ".join(f"{quoted(name)} DESC NULLS LAST" for name in (timestamp, created) if name)
    partition = f"PARTITION BY {', '.join(quoted(name) for name in keys)}" if keys else ""
    in_range = f"epoch_us({quoted(timestamp)}) <= {to_micros(end)}"
    if start is not None:
        in_range += f" AND epoch_us({quoted(timestamp)}) >= {to_micros(start)}"
    query = f"""
        SELECT file_index AS file, file_row_number AS row FROM {ParquetRows.FILES} WHERE {in_range}
        QUALIFY row_number() OVER ({partition} ORDER BY {order}) = 1
        ORDER BY {", ".join(quoted(name) for name in [*keys, timestamp])}
    """
    table = ParquetRows(path)
    with connection() as db:
        latest = db.sql(query, params={"files": table.files}).to_arrow_table()
    numbers = table.numbers(latest["file"].to_numpy(), latest["row"].to_numpy())
    return table.take(numbers, {name: name for name in columns})


def service_columns(tables: FeatureTables) -> list[str]:
    """Names of the columns that `join_features` appends, in order."""
    stored = [name for table in RANKER_TABLES for name in table_source(tables, table).features]
    return [*stored, *REQUEST_SCHEMA.names]


def asof_features(spine: pa.Table, source: AsofSource, *, timestamp: str = EVENT_TIMESTAMP) -> pa.Table:
    """Features of one source for every row of the spine.

    Args:
        spine: rows with the source's key columns and a timestamp; other columns are not read.
        source: the feature rows.
        timestamp: the spine's time column; a timestamp without a zone is UTC.

    Returns:
        (num_rows) the source's features alone, in the spine's order.

    Raises:
        ArtifactError: the source lacks a column, or a key is text on one side only.
    """
    table = ParquetRows(source.path)
    _check_source(spine, source, table.schema)
    columns = {f"key_{i}": spine[name] for i, name in enumerate(source.keys.values())}
    # A column of nothing but nulls has no type of its own, and DuckDB would take it for integers.
    columns = {name: c.cast(pa.string()) if pa.types.is_null(c.type) else c for name, c in columns.items()}
    if not columns:
        columns["key_0"] = pa.array(np.zeros(spine.num_rows, np.int8))
    columns["at"] = spine[timestamp].cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    columns["ordinal"] = pa.array(np.arange(spine.num_rows))
    numbers = np.full(spine.num_rows, -1)
    with connection() as db:
        db.register("spine", pa.table(columns))
        for match in db.sql(asof_query(source), params={"files": table.files}).to_arrow_reader(_MATCHES_AT_A_TIME):
            ordinal, file, row = (column.to_numpy() for column in match.columns)
            numbers[ordinal] = table.numbers(file, row)
    return table.take(numbers, source.features)


def asof_query(source: AsofSource) -> str:
    """The SQL of `asof_features`: where the row of a spine's row lies, for those that have one.

    Relation `spine` has key_0 …, at (microseconds) and ordinal; $files is a parameter.
    """
    # DuckDB 2.0 fails to plan an ASOF JOIN of a window's rows without an equality: without keys, all have the same.
    columns = [quoted(column) for column in source.keys] or ["0::TINYINT"]
    keys = ", ".join(f"{column} AS key_{i}" for i, column in enumerate(columns))
    last_created = ""
    if source.created:
        partition = ", ".join([*columns, quoted(source.timestamp)])
        order = f"{quoted(source.created)} DESC NULLS LAST"
        last_created = f"QUALIFY row_number() OVER (PARTITION BY {partition} ORDER BY {order}) = 1"
    equal_keys = " AND ".join(f"s.key_{i} = f.key_{i}" for i in range(len(columns)))
    fresh = f"WHERE s.at - f.at <= {source.ttl // _MICROSECOND}" if source.ttl else ""
    return f"""
        WITH known AS (
            SELECT {keys}, epoch_us({quoted(source.timestamp)}) AS at, file_index AS file, file_row_number AS row
            FROM {ParquetRows.FILES} {last_created}
        )
        SELECT s.ordinal, f.file, f.row FROM spine s ASOF JOIN known f ON {equal_keys} AND s.at >= f.at {fresh}
    """


@contextmanager
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, in UTC, with bounded memory and its spill files out of the way."""
    with tempfile.TemporaryDirectory(prefix="evergreen-duckdb-") as spill, duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.execute(f"SET memory_limit = '{_MEMORY_LIMIT}'")
        db.execute("SET temp_directory = $spill", {"spill": spill})
        db.execute("SET preserve_insertion_order = false")  # every query here says its order
        yield db


class Timeline:
    """A feature table of one key over a stretch of time, in memory: what holds at a moment, for many keys, fast.

    Holds the rows of the stretch and, of each key, the last one before it. Looking up K keys takes about as long as
    reading K numbers; an ASOF join would sort them first.
    """

    def __init__(self, tables: FeatureTables, name: str, *, start: datetime, end: datetime) -> None:
        """Read a table.

        Args:
            tables: the feature tables.
            name: of a table with one key.
            start: the first moment that will be asked for.
            end: the last.
        """
        source = table_source(tables, name)
        (key,) = source.keys
        columns = [key, EVENT_TIMESTAMP, *source.features]
        before = latest_rows(source.path, keys=[key], columns=columns, end=start)
        at = ds.field(EVENT_TIMESTAMP)
        during = ds.dataset(source.path, format="parquet").to_table(
            columns=columns, filter=(at > pa.scalar(start, TIMESTAMP_TYPE)) & (at <= pa.scalar(end, TIMESTAMP_TYPE))
        )
        rows = pa.concat_tables([before, during]).sort_by([(key, "ascending"), (EVENT_TIMESTAMP, "ascending")])
        keys = rows[key].combine_chunks().dictionary_encode()
        self.features = rows.select(list(source.features)).combine_chunks()
        """(num_rows,) the table's features."""
        self._keys = keys.dictionary
        self._times = rows[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
        codes = keys.indices.to_numpy(zero_copy_only=False)
        self._starts = np.searchsorted(codes, np.arange(len(self._keys)))  # codes rise: sorted by key
        self._range = (start, end)

    def rows_at(self, moment: datetime, keys: pa.Array | pa.ChunkedArray) -> pa.Array:
        """(num_keys,) int64 rows of `features` that hold for each key at a moment; null where nothing is known.

        Raises:
            ValueError: the moment is outside the stretch.
        """
        start, end = self._range
        if not start <= moment <= end:
            raise ValueError(f"moment {moment}: this timeline holds {start} to {end}")
        if len(self._keys) == 0:
            return pa.nulls(len(keys), pa.int64())
        known = np.where(self._times <= to_micros(moment), np.arange(len(self._times)), -1)
        latest = np.maximum.reduceat(known, self._starts)
        rows = pa.array(latest, mask=latest < 0)
        places = pc.index_in(keys, value_set=self._keys, skip_nulls=True)
        found = rows.take(places)
        return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def check_spine(spine: pa.Table, keys: set[str]) -> None:
    """Raise ArtifactError unless the spine has an event_timestamp and all key columns."""
    for name in [EVENT_TIMESTAMP, *sorted(keys)]:
        if name not in spine.column_names:
            raise ArtifactError(
                f"the spine has no column {name!r}, only {spine.column_names}: add it (null where unknown)"
            )


def table_source(tables: FeatureTables, name: str) -> AsofSource:
    """The rows of one feature table, all of its features under their own names."""
    keys = JOIN_KEYS[name]
    features = [column for column in tables.schema(name).names if column not in (*keys, EVENT_TIMESTAMP)]
    return AsofSource(
        path=str(tables.table(name)), keys={key: key for key in keys}, features={column: column for column in features}
    )


def _check_source(spine: pa.Table, source: AsofSource, types: pa.Schema) -> None:
    """Raise ArtifactError unless the source has its columns, and keys that can equal those of the spine."""
    for name in [
        *source.keys,
        source.timestamp,
        *([source.created] if source.created else []),
        *source.features.values(),
    ]:
        if name not in types.names:
            raise ArtifactError(f"{source.path}: no column {name!r}, only {types.names}: correct its definition")
    for column, key in source.keys.items():
        stored, asked = types.field(column).type, spine.schema.field(key).type
        # DuckDB would compare them as numbers, and "007" with 7 as equal.
        if not pa.types.is_null(asked) and _is_text(stored) != _is_text(asked):
            raise ArtifactError(
                f"{source.path}: {column} is {stored}, but {key} of the rows to join is {asked}: give it the same type"
            )


def _is_text(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return dtype in (pa.string(), pa.large_string(), pa.string_view())


def _no_features(num_rows: int, source: AsofSource) -> pa.Table:
    """Rows without a match."""
    types = ds.dataset(source.path, format="parquet").schema
    return pa.table({name: pa.nulls(num_rows, types.field(column).type) for name, column in source.features.items()})


def quoted(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'
