"""From the rows of an older table to those of a newer one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.encoding import Encoder, EncoderConfig
from evergreen.models.inputs import PAD
from evergreen.models.warm_start import row_mapping, second_row_mapping


def feature(name: str, kind: ColumnKind) -> Feature:
    return Feature(name=name, kind=kind, origin=FeatureOrigin.CONTEXT)


FEATURES = (
    feature("user_history", ColumnKind.SEQUENCE),
    feature("item_id", ColumnKind.CATEGORICAL),
    feature("age", ColumnKind.NUMERIC),
    feature("device", ColumnKind.CATEGORICAL),
    feature("tags", ColumnKind.MULTI),
)
values = st.one_of(st.none(), st.sampled_from("abcdefghijklmnop"))
words = st.lists(st.sampled_from("abcdefghijklmnop"), max_size=4)
rows = st.fixed_dictionaries(
    {"item_id": values, "device": values, "age": st.floats(0, 9), "user_history": words, "tags": words}
)
SCHEMA = pa.schema(
    {
        "item_id": pa.string(),
        "device": pa.string(),
        "age": pa.float64(),
        "user_history": pa.list_(pa.string()),
        "tags": pa.list_(pa.string()),
    }
)
tables = st.lists(rows, min_size=2, max_size=30).map(lambda chosen: pa.Table.from_pylist(chosen, SCHEMA))
configs = st.builds(
    EncoderConfig,
    min_count=st.integers(1, 3),
    oov_buckets=st.integers(1, 5),
    num_hashes=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
)


def fit(table: pa.Table, config: EncoderConfig) -> Encoder:
    return Encoder.fit(table, FEATURES, config)


def old_and_new(before: pa.Table, now: pa.Table, config: EncoderConfig) -> tuple[Encoder, Encoder]:
    old = fit(before, config)
    return old, old.extended(now.column, features=FEATURES)


def embeddings(encoder: Encoder, table: pa.Table, weights: np.ndarray) -> np.ndarray:
    """(num_rows, num_fields) embeddings of width 1, second rows added."""
    spec, categorical = encoder.spec, encoder.transform(table).categorical
    result = weights[categorical[:, : len(spec.categorical)]]
    for column, place in enumerate(spec.second_rows, len(spec.categorical)):
        result[:, place] += weights[categorical[:, column]]
    return result


@given(before=tables, now=tables, then=tables, config=configs)
@settings(max_examples=100, deadline=None)
def test_copied_table_gives_every_value_the_embedding_it_had(
    before: pa.Table, now: pa.Table, then: pa.Table, config: EncoderConfig
) -> None:
    old, new = old_and_new(before, now, config)
    weights = np.random.default_rng(0).normal(size=old.spec.num_embeddings)
    weights[PAD] = 0.0
    first, second = row_mapping(old, new), second_row_mapping(old, new)
    assert first.min() >= 0  # every row has an origin
    copied = weights[first] + weights[second]
    for table in (before, now, then):  # `then` has values that neither knows
        np.testing.assert_array_equal(embeddings(new, table, copied), embeddings(old, table, weights))
        np.testing.assert_array_equal(new.transform(table).numeric, old.transform(table).numeric)
    if config.num_hashes == 1 or config.oov_buckets == 1:
        assert not second.any()


@given(before=tables, now=tables, config=configs)
@settings(max_examples=30, deadline=None)
def test_copied_table_gives_known_items_of_a_history_the_embeddings_they_had(
    before: pa.Table, now: pa.Table, config: EncoderConfig
) -> None:
    old, new = old_and_new(before, now, config)
    first = row_mapping(old, new)
    assert [bag.width for bag in new.spec.bags] == [bag.width for bag in old.spec.bags]
    # What training rows showed at least three times is known to both, whatever the threshold.
    counts = before["item_id"].value_counts().to_pylist()
    known = [entry["values"] for entry in counts if entry["values"] is not None and entry["counts"] >= 3]
    table = pa.Table.from_pylist([{"user_history": known}], SCHEMA)
    for before_bag, now_bag in zip(old.transform(table).bags, new.transform(table).bags, strict=True):
        np.testing.assert_array_equal(first[now_bag.values], before_bag.values)


def column(*values: str | None) -> pa.Table:
    return pa.Table.from_pylist([{"item_id": value, "age": 1.0} for value in values], SCHEMA)


def item_row(encoder: Encoder, value: str | None) -> int:
    return int(encoder.transform(column(value)).categorical[0, 0])


def test_new_value_goes_on_from_the_row_it_was_read_from() -> None:
    old, new = old_and_new(column("a", "a"), column("b", "b"), EncoderConfig())
    mapping = row_mapping(old, new)
    assert mapping[PAD] == PAD
    assert mapping[item_row(new, "a")] == item_row(old, "a")
    assert mapping[item_row(new, "b")] == item_row(old, "b") == old.spec.categorical[0].unseen
    assert mapping[item_row(new, None)] == item_row(old, None)


def test_value_that_lost_its_row_is_read_from_the_shared_one() -> None:
    config = EncoderConfig(max_categories=1)
    old, new = old_and_new(column("a", "a"), column("b", "b"), config)
    assert item_row(new, "a") == new.spec.categorical[0].unseen
    assert row_mapping(old, new)[item_row(new, "b")] == old.spec.categorical[0].unseen


def test_extension_and_its_rows_come_from_one_reading() -> None:
    old = fit(column("a", "a"), EncoderConfig())
    new, encoded = old.extended_transform(column("b", "b", None).column, features=FEATURES)
    assert new.spec == old.extended(column("b", "b", None).column, features=FEATURES).spec
    np.testing.assert_array_equal(encoded.categorical, new.transform(column("b", "b", None)).categorical)


def test_features_that_differ_are_named() -> None:
    old = fit(column("a", "a"), EncoderConfig())
    changed = [
        *FEATURES[1:3],
        feature("device", ColumnKind.MULTI),
        *FEATURES[4:],
        feature("os", ColumnKind.CATEGORICAL),
    ]
    with pytest.raises(ArtifactError, match=r"gone: user_history; new: os; of another kind or origin: device\)"):
        old.extended(column("a").column, features=changed)
    with pytest.raises(ArtifactError, match="gone: user_history"):
        row_mapping(old, Encoder.fit(column("a"), FEATURES[1:]))


def test_order_of_features_does_not_matter() -> None:
    old = fit(column("a", "a"), EncoderConfig())
    assert old.extended(column("a").column, features=FEATURES[::-1]).features == FEATURES


def test_encoders_that_hash_otherwise_have_no_mapping() -> None:
    with pytest.raises(ArtifactError, match=r"item_id: seed, shared rows and hashes of a value are \(0, 1, 1\)"):
        row_mapping(fit(column("a"), EncoderConfig()), fit(column("a"), EncoderConfig(oov_buckets=3)))
