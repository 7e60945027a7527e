"""Values decoded from Feast's bytes are what Feast makes of them, and what was encoded."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from feast.protos.feast.types.Value_pb2 import DoubleList, StringList, Value
from feast.type_map import feast_value_type_to_python_type
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError
from evergreen.features.value_decoding import RowDecoder, decode_instant
from evergreen.features.value_encoding import as_list, encode_instants, encode_values

MICROS = pa.timestamp("us", tz="UTC")
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
INSTANTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))
COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "int64": (pa.int64(), st.none() | INT64),
    "double": (pa.float64(), st.none() | st.floats(allow_nan=False)),
    "string": (pa.string(), st.none() | TEXT),
    "timestamp": (MICROS, st.none() | INSTANTS),
    "strings": (pa.list_(pa.string()), st.none() | st.lists(TEXT, max_size=5)),
}
AT = b"whatever time"


def decoder(*kinds: str) -> RowDecoder:
    return RowDecoder("taste", pa.schema([(kind, COLUMNS[kind][0]) for kind in kinds]))


def as_feast(cell: bytes) -> Any:
    value = feast_value_type_to_python_type(Value.FromString(cell))
    return math.floor(value.timestamp()) if isinstance(value, datetime) else value


@pytest.mark.parametrize("kind", COLUMNS)
@given(data=st.data())
def test_what_was_encoded_is_decoded_as_feast_does(kind: str, data: st.DataObject) -> None:
    dtype, values = COLUMNS[kind]
    column = pa.array(data.draw(st.lists(values, max_size=20)), dtype)
    cells = as_list(encode_values(column, kind))
    decoded = [decoder(kind).values([AT, cell])[0] for cell in cells]
    assert decoded == [as_feast(cell) for cell in cells]
    whole = pc.floor_temporal(column, unit="second") if dtype == MICROS else column
    assert decoder(kind).table([[AT, cell] for cell in cells])[kind].combine_chunks().equals(whole)


@given(st.lists(st.tuples(st.none() | INT64, st.none() | st.floats(), st.none() | INT64), max_size=20))
def test_numbers_are_those_of_each_row(rows: list[tuple[int, float, int]]) -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.float64()), ("c", pa.int64())])
    columns = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(schema)]
    cells = [as_list(encode_values(column, "x")) for column in columns]
    stored = [[AT, *(cell or None for cell in row)] for row in zip(*cells, strict=True)]
    expected = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)
    numbers = RowDecoder("taste", schema).numbers(stored)
    np.testing.assert_array_equal(numbers, expected.reshape(len(rows), 3))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("int64", Value(int32_val=-7), -7),
        ("int64", Value(int64_val=300), 300),
        ("double", Value(float_val=0.5), 0.5),
        ("double", Value(int64_val=3), 3.0),
        ("double", Value(int32_val=-3), -3.0),
        ("string", Value(string_val=""), ""),
        ("strings", Value(string_list_val=StringList(val=[])), []),
        ("timestamp", Value(unix_timestamp_val=-1), -1),
        ("timestamp", Value(unix_timestamp_val=-(2**63)), None),
        ("double", Value(), None),
    ],
)
def test_other_types_that_feast_writes_are_read_too(kind: str, value: Value, expected: object) -> None:
    assert decoder(kind).values([AT, value.SerializeToString()]) == [expected]


def test_nan_that_feast_wrote_is_no_null() -> None:
    cell = Value(double_val=math.nan).SerializeToString()
    (read,) = decoder("double").table([[AT, cell], [AT, None]]).columns
    assert read.null_count == 1
    assert math.isnan(read[0].as_py())


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize(
    "value", [Value(bool_val=True), Value(bytes_val=b"x"), Value(double_list_val=DoubleList(val=[1.0]))]
)
def test_value_of_another_type_is_named(kind: str, value: Value) -> None:
    cell = value.SerializeToString()
    message = rf"view 'taste', feature '{kind}': .*materialize the store again"
    with pytest.raises(ArtifactError, match=message):
        decoder(kind).values([AT, cell])
    with pytest.raises(ArtifactError, match=message):
        decoder(kind).table([[AT, None], [AT, cell]])
    if kind in ("int64", "double"):
        with pytest.raises(ArtifactError, match=message):
            decoder(kind).numbers([[AT, None], [AT, cell]])


@pytest.mark.parametrize("kind", COLUMNS)
@given(data=st.data())
def test_broken_bytes_are_refused_or_read_as_protobuf_reads_them(kind: str, data: st.DataObject) -> None:
    dtype, values = COLUMNS[kind]
    (cell,) = as_list(encode_values(pa.array([data.draw(values)], dtype), kind))
    place = data.draw(st.integers(0, len(cell)))
    broken = cell[:place] + data.draw(st.binary(max_size=3)) + cell[place + data.draw(st.integers(0, 3)) :]
    try:
        (read,) = decoder(kind).values([AT, broken])
    except ArtifactError:
        return
    value = Value.FromString(broken)
    expected = feast_value_type_to_python_type(value) if kind != "timestamp" else value.unix_timestamp_val
    if kind == "timestamp" and read is None:
        assert expected == -(2**63) or not broken
    elif kind == "double" and read is not None and math.isnan(read):
        assert math.isnan(expected)
    else:
        assert read == expected


def test_text_among_the_numbers_is_refused() -> None:
    cells = as_list(encode_values(pa.array(["three"]), "x"))
    with pytest.raises(ArtifactError, match=r"view 'taste': a feature among .*'string'.* is no number"):
        decoder("int64", "string").numbers([[AT, None, cells[0]]])


def test_feature_of_a_type_that_no_store_holds_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"'price' is decimal"):
        RowDecoder("taste", pa.schema([("price", pa.decimal128(5, 2))]))


def test_no_rows_are_an_empty_table() -> None:
    assert decoder(*COLUMNS).table([]).num_rows == 0
    assert decoder("int64").numbers([]).shape == (0, 1)


@given(st.lists(INSTANTS, min_size=1, max_size=10))
def test_event_times_are_those_that_were_encoded(moments: list[datetime]) -> None:
    micros = pa.array(moments, MICROS).cast(pa.int64()).to_numpy()
    assert [decode_instant(cell) for cell in as_list(encode_instants(micros))] == pytest.approx(micros / 1e6, abs=1e-6)


@pytest.mark.parametrize("cell", [b"\x08", b"\x1a\x00", b"\x08\xff"])
def test_bytes_that_are_no_event_time_are_refused(cell: bytes) -> None:
    with pytest.raises(ValueError, match="no serialized Timestamp"):
        decode_instant(cell)
