"""From features to inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.encoding import Encoder, EncoderConfig
from evergreen.models.inputs import PAD


def feature(name: str, kind: ColumnKind) -> Feature:
    return Feature(name=name, kind=kind, origin=FeatureOrigin.CONTEXT)


FEATURES = (
    feature("item_id", ColumnKind.CATEGORICAL),
    feature("device", ColumnKind.CATEGORICAL),
    feature("count", ColumnKind.NUMERIC),
    feature("user_history", ColumnKind.SEQUENCE),
    feature("tags", ColumnKind.MULTI),
)
TABLE = pa.table(
    {
        "item_id": ["a", "a", "b", "b", "rare", None],
        "device": ["x", "y", "x", "y", "x", "y"],
        "count": [0.0, 1.0, 2.0, 3.0, None, 5000.0],
        "user_history": [["a"], ["a", "b"], [], None, ["rare", "b"], ["a", "b", "a"]],
        "tags": [["t"], ["t", "s"], ["s"], None, [], ["t"]],
    }
)
CONFIG = EncoderConfig(history_length=2)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(TABLE, FEATURES, CONFIG)


def encode(encoder: Encoder, **columns: object) -> dict[str, np.ndarray]:
    """Inputs by name for one row with the given values; the others are null."""
    row = {name: [columns.get(name)] for name in TABLE.column_names}
    inputs = encoder.transform(pa.table({n: pa.array(v, TABLE.schema.field(n).type) for n, v in row.items()})).inputs()
    categorical = {field.name: inputs.categorical[0, i] for i, field in enumerate(encoder.spec.categorical)}
    numeric = {column.name: inputs.numeric[0, i] for i, column in enumerate(encoder.spec.numeric)}
    bags, start = {}, 0
    for bag in encoder.spec.bags:
        bags[bag.name] = inputs.bags[0, start : start + bag.width].numpy()
        start += bag.width
    return categorical | numeric | bags | {"indicators": inputs.numeric[0, len(numeric) :].numpy()}


def test_missing_unseen_and_known_values_have_rows_of_their_own(encoder: Encoder) -> None:
    missing, unseen, rare, known, other = (
        int(encode(encoder, item_id=value)["item_id"]) for value in (None, "never", "rare", "a", "b")
    )
    assert len({missing, unseen, known, other}) == 4
    assert rare == unseen  # seen once: it trains the row that unseen items will use
    field = encoder.spec.categorical[0]
    assert (missing, unseen) == (field.start, field.unseen)


def test_fields_do_not_share_rows(encoder: Encoder) -> None:
    item, device = encoder.spec.categorical
    assert item.start + item.num_rows <= device.start
    assert device.start + device.num_rows <= encoder.spec.num_embeddings


def test_history_uses_the_rows_of_items_and_keeps_the_last(encoder: Encoder) -> None:
    a, b = (int(encode(encoder, item_id=value)["item_id"]) for value in "ab")
    assert encode(encoder, user_history=["a", "a", "b"])["user_history"].tolist() == [a, b]
    assert encode(encoder, user_history=["b"])["user_history"].tolist() == [b, PAD]


def test_unseen_items_take_no_place_in_a_history(encoder: Encoder) -> None:
    a, b = (int(encode(encoder, item_id=value)["item_id"]) for value in "ab")
    assert encode(encoder, user_history=["a", "b", "never", "never"])["user_history"].tolist() == [a, b]


def test_multi_valued_feature_keeps_its_first_values(encoder: Encoder) -> None:
    first, second = encode(encoder, tags=["t", "s", "t"])["tags"]
    assert [first, second] == [encode(encoder, tags=["t"])["tags"][0], encode(encoder, tags=["s"])["tags"][0]]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_missing_number_is_the_mean_with_an_indicator(encoder: Encoder, value: float | None) -> None:
    row = encode(encoder, count=value)
    assert row["count"] == 0
    assert row["indicators"].tolist() == [1.0]
    assert encode(encoder, count=1.0)["indicators"].tolist() == [0.0]


def test_counts_with_a_heavy_tail_are_seen_by_their_logarithm() -> None:
    counts = np.random.default_rng(0).lognormal(2, 2, 5000)
    encoder = Encoder.fit(pa.table({"count": counts}), [feature("count", ColumnKind.NUMERIC)])
    encoded = encoder.transform(pa.table({"count": counts})).numeric[:, 0]
    assert encoded.mean() == pytest.approx(0, abs=1e-4)
    assert encoded.std() == pytest.approx(1, abs=1e-3)
    assert encoded.max() < 5  # the raw one lies 30 standard deviations out


def test_state_survives_json(encoder: Encoder, tmp_path: Path) -> None:
    encoder.write(tmp_path / "encoder.json")
    again = Encoder.read(tmp_path / "encoder.json")
    assert again.spec == encoder.spec
    for left, right in zip(again.transform(TABLE).inputs(), encoder.transform(TABLE).inputs(), strict=True):
        assert left.equal(right)


def test_chunks_and_slices_are_encoded_as_one_table(encoder: Encoder) -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2, 1), TABLE.slice(3)])
    for left, right in zip(encoder.transform(chunked).inputs(), encoder.transform(TABLE).inputs(), strict=True):
        assert left.equal(right)


def test_chosen_rows_are_those_of_the_whole(encoder: Encoder) -> None:
    encoded = encoder.transform(TABLE)
    rows = np.array([5, 0, 3])
    for left, right in zip(encoded.take(rows).inputs(), encoded.inputs(), strict=True):
        assert left.equal(right[rows])
    for left, right in zip(encoded.inputs(rows), encoded.inputs(), strict=True):
        assert left.equal(right[rows])


def test_dictionary_encoded_columns_are_read(encoder: Encoder) -> None:
    place = TABLE.schema.get_field_index("device")
    table = TABLE.set_column(place, "device", TABLE["device"].dictionary_encode())
    assert encoder.transform(table).inputs().categorical.equal(encoder.transform(TABLE).inputs().categorical)


def test_sequence_without_item_id_has_rows_of_its_own() -> None:
    encoder = Encoder.fit(TABLE, [feature("user_history", ColumnKind.SEQUENCE)], CONFIG)
    assert encoder.spec.categorical == ()
    assert (encoder.transform(TABLE).inputs().bags[1].numpy() > PAD).all()


def test_absent_column_is_named(encoder: Encoder) -> None:
    with pytest.raises(ArtifactError, match=r"lack 1 of the 5 features.*tags"):
        encoder.transform(TABLE.drop_columns(["tags"]))


def test_list_feature_that_holds_no_lists_is_named(encoder: Encoder) -> None:
    place = TABLE.schema.get_field_index("tags")
    with pytest.raises(ArtifactError, match="'tags': has type string"):
        encoder.transform(TABLE.set_column(place, "tags", pa.array(["t"] * 6)))


def test_number_that_is_always_missing_is_left_out() -> None:
    table = pa.table({"x": pa.nulls(3, pa.float64()), "y": [1.0, 2.0, 3.0]})
    features = [feature("x", ColumnKind.NUMERIC), feature("y", ColumnKind.NUMERIC)]
    assert [column.name for column in Encoder.fit(table, features).spec.numeric] == ["y"]
    with pytest.raises(TrainingError, match="all 1 features are missing"):
        Encoder.fit(table, features[:1])
