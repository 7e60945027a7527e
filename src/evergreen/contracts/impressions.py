"""The impression log: what was shown to whom, how it was scored, and the features that the scores were made of.

    impressions/
      date=2026-11-23/20261123T120130.123456Z-pod-1-7-000001.parquet   time of writing, host, process, number

A row is one shown item, so that clicks join by (request_id, item_id) and the offline store by the row's own keys. Rows
of a request are together, best first. The date is that of `served_at` (UTC); a file has the features of one model, and
files of other models may have others. In Kafka a message is a request (`to_messages`). Ids are written as they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.snapshot import TIMESTAMP_TYPE
from evergreen.contracts.training_set import ColumnKind, Feature, Side

SCHEMA_VERSION = 1

_VERSION_KEY = b"evergreen.impressions.version"
_SIDE_KEY = b"side"
_ROWS_A_TABLE = 200_000

REQUEST_FIELDS = (
    pa.field("request_id", pa.string(), nullable=False),
    pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
    pa.field("served_at", TIMESTAMP_TYPE, nullable=False),
    pa.field("user_id", pa.string()),
    pa.field("known_user", pa.bool_(), nullable=False),
    pa.field("model_version", pa.string(), nullable=False),
    pa.field("degraded", pa.bool_(), nullable=False),
    pa.field("sampling_rate", pa.float64(), nullable=False),
)
"""What the rows of a request share. `event_timestamp` is the request's own, `served_at` the server's clock.

`degraded`: some features were not to be had, and defaults stand for them. A row stands for 1 / `sampling_rate` rows.
"""

ITEM_FIELDS = (
    pa.field("item_id", pa.string()),
    pa.field("category", pa.string()),
    pa.field("position", pa.int32()),
    pa.field("score", pa.float64(), nullable=False),
)
"""What each shown item has: its category as the server knew it, its position from 1, its probability or rating.

For a log without items a request has one row, whose item_id and position are null.
"""

IDS = ("user_id", "item_id", "category")
"""Columns of the row that may be features too; they are not repeated among the features."""

_KIND_TYPES = {
    ColumnKind.CATEGORICAL: pa.string(),
    ColumnKind.NUMERIC: pa.float64(),
    ColumnKind.SEQUENCE: pa.list_(pa.string()),
    ColumnKind.MULTI: pa.list_(pa.string()),
}


def impression_schema(features: Sequence[Feature]) -> pa.Schema:
    """Columns of the impressions of a model that reads these features.

    They lie in the struct `features`: a context feature may have any name, also that of a column of the row. A model
    that reads ids alone has no such column, as Parquet knows no empty struct.
    """
    fields = [
        pa.field(f.name, _KIND_TYPES[f.kind], metadata={_SIDE_KEY: f.side.value.encode()})
        for f in features
        if f.name not in IDS
    ]
    columns = [pa.field("features", pa.struct(fields), nullable=False)] if fields else []
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION).encode()}
    return pa.schema([*REQUEST_FIELDS, *ITEM_FIELDS, *columns], metadata)


def impression_table(columns: Mapping[str, pa.Array], features: Mapping[str, pa.Array], schema: pa.Schema) -> pa.Table:
    """A table of impressions from its parts.

    Args:
        columns: (num_rows) of REQUEST_FIELDS and ITEM_FIELDS, by name.
        features: (num_rows) by name; cast to the types of the schema.
        schema: of `impression_schema`.

    Raises:
        KeyError: a feature is missing.
        pyarrow.ArrowException: a column is not of its type.
    """
    arrays = [columns[field.name] for field in (*REQUEST_FIELDS, *ITEM_FIELDS)]
    if "features" in schema.names:
        fields = list(schema.field("features").type)
        if missing := [field.name for field in fields if field.name not in features]:
            raise KeyError(f"there is no feature {missing[0]!r}, which the model reads")
        arrays.append(pa.StructArray.from_arrays([features[f.name].cast(f.type) for f in fields], fields=fields))
    return pa.Table.from_arrays(arrays, schema=schema)


def feature_table(impressions: pa.Table) -> pa.Table:
    """(num_rows) the features alone, a column each."""
    if "features" not in impressions.column_names:
        return impressions.select([])
    columns = impressions["features"].combine_chunks().flatten()
    return pa.Table.from_arrays(columns, schema=pa.schema(list(impressions.schema.field("features").type)))


def first_rows(impressions: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(num_requests,) places of each request's first row."""
    first = pc.equal(impressions["position"], 1).fill_null(True)  # null: the one row of a log without items
    return np.flatnonzero(first.to_numpy())


def read_impressions(path: str, *, start: datetime | None = None, end: datetime | None = None) -> Iterator[pa.Table]:
    """Tables of impressions, oldest file first, at most about 200,000 rows at a time.

    Args:
        path: the log: a folder or an fsspec URL of one.
        start: rows served before it are not read; None: from the first.
        end: rows served at or after it are not read; None: to the last.

    Yields:
        (num_rows) with `impression_schema`; of consecutive files with the same features.

    Raises:
        ArtifactError: no log there, a file is of another schema version, or cannot be read.
    """
    fs, root = url_to_fs(path)
    files = sorted(file for file in fs.find(root) if _is_within(PurePosixPath(file), start, end))
    if not fs.exists(root):
        raise ArtifactError(f"{path}: no such folder; give the one that the server writes its impressions to")
    parts: list[pa.Table] = []
    for file in files:
        with fs.open(file, "rb") as stream:
            try:
                table = pq.read_table(stream)
            except pa.ArrowInvalid as error:
                raise ArtifactError(f"{file}: not a whole Parquet file: {error}; remove it") from error
        version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise ArtifactError(f"{file}: impressions of version {version}, this Evergreen reads {SCHEMA_VERSION}")
        if parts and (
            parts[0].schema != table.schema or sum(part.num_rows for part in parts) + table.num_rows > _ROWS_A_TABLE
        ):
            yield pa.concat_tables(parts)
            parts = []
        if start is not None:
            table = table.filter(pc.field("served_at") >= pa.scalar(start, TIMESTAMP_TYPE))
        if end is not None:
            table = table.filter(pc.field("served_at") < pa.scalar(end, TIMESTAMP_TYPE))
        if table.num_rows:
            parts.append(table)
    if parts:
        yield pa.concat_tables(parts)


def to_messages(impressions: pa.Table) -> list[tuple[bytes, bytes]]:
    """One message a request: its key, the user's id (the request's where there is none), and its value in JSON.

    {"schema_version": 1, REQUEST_FIELDS …, ITEM_FIELDS as lists over the shown items …,
     "features": {name: value}, "item_features": {name: list over the shown items}}

    What describes the user or the moment is in `features`, once; times are ISO 8601. A number that is not finite is
    null: JSON has no other word for it.
    """
    shared = {name: _plain(impressions[name]) for name in [field.name for field in REQUEST_FIELDS]}
    items = {name: impressions[name].to_pylist() for name in [field.name for field in ITEM_FIELDS]}
    table, starts = feature_table(impressions), first_rows(impressions)
    once = {f.name for f in table.schema if (f.metadata or {}).get(_SIDE_KEY) == Side.USER.value.encode()}
    # Only the first row of a request is turned into Python where all of its rows are alike.
    of_request = {name: table[name].take(pa.array(starts)).to_pylist() for name in table.column_names if name in once}
    of_item = {name: table[name].to_pylist() for name in table.column_names if name not in once}
    messages = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], impressions.num_rows], strict=True)):
        value = {
            "schema_version": SCHEMA_VERSION,
            **{name: values[start] for name, values in shared.items()},
            **{name: values[start:end] for name, values in items.items()},
            "features": {name: values[number] for name, values in of_request.items()},
            "item_features": {name: values[start:end] for name, values in of_item.items()},
        }
        key = value["user_id"] if value["user_id"] is not None else value["request_id"]
        messages.append((str(key).encode(), orjson.dumps(value)))
    return messages


def from_message(value: bytes, features: Sequence[Feature]) -> pa.Table:
    """The rows of one message of `to_messages`.

    Args:
        value: the message's value.
        features: of the model that answered.

    Raises:
        ArtifactError: not an impression message of this version, or of a model with other features.
    """
    schema = impression_schema(features)
    try:
        message: Mapping[str, Any] = orjson.loads(value)
        if message["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(
                f"an impression message of version {message['schema_version']}, this Evergreen reads {SCHEMA_VERSION}"
            )
        num_rows = len(message["score"])
        columns = {f.name: pa.array([_value(message[f.name], f)] * num_rows, f.type) for f in REQUEST_FIELDS}
        columns |= {f.name: pa.array(message[f.name], f.type) for f in ITEM_FIELDS}
        values = {name: [value] * num_rows for name, value in message["features"].items()} | message["item_features"]
        fields = {f.name: f.type for f in schema.field("features").type} if "features" in schema.names else {}
        if unknown := sorted(values.keys() - fields.keys()):
            raise ArtifactError(f"an impression message has the feature {unknown[0]!r}, which the model does not read")
        return impression_table(
            columns, {name: pa.array(values[name], dtype) for name, dtype in fields.items()}, schema
        )
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ArtifactError(f"not an impression message of this model: {error!r}: {value[:80]!r}") from error


def _value(value: Any, field: pa.Field) -> Any:
    return datetime.fromisoformat(value) if pa.types.is_timestamp(field.type) else value


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Values for JSON; orjson writes Python's own times with a whole second as one without a fraction."""
    return [v.isoformat() if isinstance(v, datetime) else v for v in column.to_pylist()]


def _is_within(file: PurePosixPath, start: datetime | None, end: datetime | None) -> bool:
    """Whether a file may have rows of the range; what begins with a dot is not whole yet."""
    folder = file.parent.name
    if file.suffix != ".parquet" or file.name.startswith(".") or not folder.startswith("date="):
        return False
    date = folder.removeprefix("date=")
    after = start is None or date >= start.astimezone(UTC).date().isoformat()
    return after and (end is None or date <= end.astimezone(UTC).date().isoformat())
