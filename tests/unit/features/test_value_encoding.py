"""Values encoded by column are the bytes that Feast would write."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError
from evergreen.features.value_encoding import as_list, encode_entity_keys, encode_instants, encode_values, value_texts

MICROS = pa.timestamp("us", tz="UTC")
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
INSTANTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))
COLUMNS: dict[str, tuple[pa.DataType, ValueType, Any]] = {
    # Feast reads integers beside a null as floats, which loses digits beyond 2**53; so do not compare those.
    "int64 or null": (pa.int64(), ValueType.INT64, st.none() | st.integers(-(2**53), 2**53)),
    "int64": (pa.int64(), ValueType.INT64, INT64),
    "double": (pa.float64(), ValueType.DOUBLE, st.none() | st.floats()),
    "string": (pa.string(), ValueType.STRING, st.none() | TEXT),
    "timestamp": (MICROS, ValueType.UNIX_TIMESTAMP, st.none() | INSTANTS),
    "list of strings": (pa.list_(pa.string()), ValueType.STRING_LIST, st.none() | st.lists(TEXT, max_size=5)),
}


@pytest.mark.parametrize("kind", COLUMNS)
@given(data=st.data())
def test_values_are_feasts_bytes(kind: str, data: st.DataObject) -> None:
    dtype, feast_type, values = COLUMNS[kind]
    column = pa.array(data.draw(st.lists(values, max_size=20)), dtype)
    start = data.draw(st.integers(0, len(column)))
    column = column.slice(start)  # batches are slices of tables
    protos = python_values_to_proto_values(column.to_numpy(zero_copy_only=False), feast_type)
    assert as_list(encode_values(column, "x")) == [proto.SerializeToString() for proto in protos]


@given(st.lists(st.none() | INT64), st.lists(st.none() | st.floats()), st.lists(st.none() | TEXT))
def test_texts_are_feasts(integers: list[int], floats: list[float], strings: list[str]) -> None:
    for column, name in (
        (pa.array(integers, pa.int64()), "int64_val"),
        (pa.array(floats, pa.float64()), "double_val"),
        (pa.array(strings, pa.string()), "string_val"),
    ):
        values = [None if value != value else value for value in column.to_pylist()]
        protos = [Value() if value is None else Value(**{name: value}) for value in values]
        assert value_texts(column) == [extract_text_and_num(proto, False)[0] for proto in protos]


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=10))
def test_entity_keys_are_feasts_in_any_order_of_the_names(keys: list[tuple[str, str]]) -> None:
    table = pa.table({"user_id": [user for user, _ in keys], "category": [category for _, category in keys]})
    expected = [
        serialize_entity_key(
            EntityKey(
                join_keys=["user_id", "category"],
                entity_values=[Value(string_val=user), Value(string_val=category)],
            )
        )
        for user, category in keys
    ]
    assert as_list(encode_entity_keys(table, ["user_id", "category"])) == expected
    assert as_list(encode_entity_keys(table, ["category", "user_id"])) == expected


@given(st.lists(INSTANTS, max_size=10))
def test_instants_are_protobuf_timestamps(moments: list[datetime]) -> None:
    expected = []
    for moment in moments:
        proto = Timestamp()
        proto.FromDatetime(moment)
        expected.append(proto.SerializeToString())
    micros = pa.array(moments, MICROS).cast(pa.int64()).to_numpy()
    assert as_list(encode_instants(micros)) == expected


def test_null_in_a_list_is_an_empty_string_as_in_feast() -> None:
    column = pa.array([["a", None]], pa.list_(pa.string()))
    (proto,) = python_values_to_proto_values(column.to_numpy(zero_copy_only=False), ValueType.STRING_LIST)
    assert as_list(encode_values(column, "x")) == [proto.SerializeToString()]


def test_instants_of_a_large_batch_are_each_their_own() -> None:
    micros = np.array([0, 1, 999_999, 1_000_000, -1, 2**52], dtype=np.int64)
    parsed = [Timestamp.FromString(encoded) for encoded in as_list(encode_instants(micros))]
    assert [proto.seconds * 1_000_000 + proto.nanos // 1000 for proto in parsed] == micros.tolist()


def test_type_that_no_table_has_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match=r"'price' is decimal"):
        encode_values(pa.array([None], pa.decimal128(5, 2)), "price")


def test_null_key_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"'user_id'.*1 nulls"):
        encode_entity_keys(pa.table({"user_id": pa.array(["a", None])}), ["user_id"])
