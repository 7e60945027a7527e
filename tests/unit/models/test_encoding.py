"""From features to inputs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.training_set import ColumnKind, Feature, FeatureOrigin
from evergreen.models.encoding import Encoder, EncoderConfig, FieldLimits, open_parquet
from evergreen.models.inputs import PAD, EncodedRows


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


def same_rows(left: EncodedRows, right: EncodedRows) -> bool:
    return left.spec == right.spec and all(a.equal(b) for a, b in zip(left.inputs(), right.inputs(), strict=True))


def random_table(num_rows: int, *, seed: int = 0) -> pa.Table:
    """Zipf-distributed ids with nulls, numbers of both kinds, and bags of both kinds; columns as of TABLE."""
    rng = np.random.default_rng(seed)

    def words(prefix: str, size: int) -> list[str | None]:
        return [None if i % 50 == 0 else f"{prefix}{i}" for i in rng.zipf(1.4, size)]

    return pa.table(
        {
            "item_id": words("i", num_rows),
            "device": words("d", num_rows),
            "count": pa.array(np.where(rng.random(num_rows) < 0.1, np.nan, rng.lognormal(1, 2, num_rows))),
            "user_history": [[f"i{i}" for i in rng.zipf(1.4, k % 5)] if k % 7 else None for k in range(num_rows)],
            "tags": [[f"t{i}" for i in rng.integers(9, size=k % 4)] for k in range(num_rows)],
        },
        TABLE.schema,
    )


HASHED = EncoderConfig(history_length=3, min_count=3, oov_buckets=16, num_hashes=2)


@pytest.mark.parametrize("config", [CONFIG, HASHED])
def test_fit_transform_is_fit_and_transform(config: EncoderConfig) -> None:
    table = random_table(3000)
    encoder, rows = Encoder.fit_transform(table.column, FEATURES, config)
    assert same_rows(rows, Encoder.fit(table, FEATURES, config).transform(table))
    pieces = pa.concat_tables([table.slice(0, 1000), table.slice(1000)])
    assert same_rows(rows, Encoder.fit_transform(pieces.column, FEATURES, config)[1])
    assert same_rows(rows, encoder.transform_batches(table.to_batches(max_chunksize=333), num_rows=3000))


def test_parquet_read_as_dictionaries_gives_the_same_rows(tmp_path: Path) -> None:
    table = random_table(3000)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1100)
    with open_parquet(tmp_path / "rows.parquet", FEATURES) as file:
        assert pa.types.is_dictionary(file.schema_arrow.field("item_id").type)
        encoder, rows = Encoder.fit_transform(lambda name: file.read([name])[name], FEATURES, HASHED)
        batches = encoder.transform_batches(file.iter_batches(batch_size=700), num_rows=3000)
    assert same_rows(rows, Encoder.fit(table, FEATURES, HASHED).transform(table))
    assert same_rows(rows, batches)


def test_slice_of_a_large_dictionary_is_encoded(encoder: Encoder) -> None:
    place = TABLE.schema.get_field_index("device")
    many = pa.concat_arrays([TABLE["device"].combine_chunks(), pa.array([f"other {i}" for i in range(99)])])
    table = TABLE.set_column(place, "device", many.dictionary_encode().slice(0, 6))
    assert encoder.transform(table).inputs().categorical.equal(encoder.transform(TABLE).inputs().categorical)


def test_value_without_a_row_is_the_sum_of_two_shared_rows() -> None:
    encoder = Encoder.fit(TABLE, FEATURES, HASHED)
    item, device = encoder.spec.categorical
    assert encoder.spec.second_rows == (0, 1)
    assert encoder.spec.categorical_width == 4
    assert (item.unseen, item.num_shared) == (item.start + 1, 16)
    rows = encoder.transform(TABLE).categorical
    assert rows.shape == (6, 4)
    shared = range(item.unseen, item.unseen + 16)
    assert all(row in shared for row in [*rows[:5, 0], *rows[:5, 2]])
    assert rows[5].tolist()[::2] == [item.start, PAD]  # missing
    assert rows[:, 3].tolist() == [PAD] * 6  # x and y are seen three times
    assert (rows[:, 1] >= device.unseen + 16).all()


def test_one_field_can_be_hashed_alone() -> None:
    limits = FieldLimits(max_categories=0, oov_buckets=1000)
    encoder = Encoder.fit(TABLE, FEATURES, EncoderConfig(num_hashes=2, fields={"item_id": limits}))
    item, device = encoder.spec.categorical
    assert (item.num_rows, device.num_rows) == (1001, 4)
    assert encoder.spec.second_rows == (0,)
    history = encode(encoder, user_history=["a", "never", "b"])["user_history"]
    assert (history[:3] > item.start).all()  # without rows of their own, unseen items count in a history, too
    assert history[0] == encode(encoder, item_id="a")["item_id"]


def test_rows_of_a_hashed_field_do_not_start_at_zero() -> None:
    item, device = (config := Encoder.fit(TABLE, FEATURES, CONFIG)).spec.categorical
    assert {item.start, item.unseen, device.start, device.unseen} < set(config.spec.untrained_rows)
    hashed = Encoder.fit(TABLE, FEATURES, EncoderConfig(max_categories=0, oov_buckets=1 << 18)).spec
    assert hashed.untrained_rows == (PAD, *(start for start in range(1, hashed.num_embeddings, 1 + (1 << 18))))


def test_limits_of_an_unknown_field_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"`fields` name count, itm: not among the categorical features"):
        Encoder.fit(TABLE, FEATURES, EncoderConfig(fields={"itm": FieldLimits(), "count": FieldLimits()}))


def test_limits_survive_json(tmp_path: Path) -> None:
    config = EncoderConfig(num_hashes=2, fields={"item_id": FieldLimits(max_categories=1, oov_buckets=5)})
    encoder = Encoder.fit(TABLE, FEATURES, config)
    encoder.write(tmp_path / "encoder.json")
    assert same_rows(Encoder.read(tmp_path / "encoder.json").transform(TABLE), encoder.transform(TABLE))


def test_constant_number_is_named(caplog: pytest.LogCaptureFixture) -> None:
    features = [feature("x", ColumnKind.NUMERIC), feature("y", ColumnKind.NUMERIC)]
    with caplog.at_level(logging.WARNING):
        Encoder.fit(pa.table({"x": [7.0, None, 7.0], "y": [1.0, 2.0, 3.0]}), features)
    assert [record.getMessage() for record in caplog.records] == [
        "feature x is constant in the training rows (7 in all 2 that have it): take a longer log, or drop it"
    ]


def test_category_that_holds_lists_is_named(encoder: Encoder) -> None:
    place = TABLE.schema.get_field_index("device")
    with pytest.raises(ArtifactError, match=r"'device': has type list.*the model reads strings"):
        encoder.transform(TABLE.set_column(place, "device", TABLE["tags"]))


def test_inputs_of_random_rows_are_padded_bag_by_bag() -> None:
    encoder, rows = Encoder.fit_transform((table := random_table(500)).column, FEATURES, HASHED)
    chosen = np.random.default_rng(1).integers(500, size=200)
    bags = rows.inputs(chosen).bags.numpy()
    expected = [
        [*values[start:end], *[PAD] * (bag.width - (end - start))]
        for row in chosen
        for bag, values, (start, end) in [
            (spec, bag.values, bag.offsets[row : row + 2])
            for spec, bag in zip(encoder.spec.bags, rows.bags, strict=True)
        ]
    ]
    assert bags.tolist() == [left + right for left, right in zip(expected[::2], expected[1::2], strict=True)]
    assert table.num_rows == len(rows)
