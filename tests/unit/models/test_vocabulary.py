"""Hashed categories."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from evergreen.models.vocabulary import MISSING, NO_ROW, ColumnHasher, HashedColumn, Vocabulary, hash_strings


def hashed(array: pa.Array | list[str | None], *, seed: int = 0) -> HashedColumn:
    return ColumnHasher(seed=seed).hash(pa.array(array, pa.string()) if isinstance(array, list) else array)


def test_hash_is_the_same_on_every_machine() -> None:
    # xxh64 of the UTF-8 bytes, low 32 bits; the empty string with seed 0 is the specification's test vector.
    assert hash_strings(pa.array([""]), seed=0).tolist() == [0xEF46DB3751D8E999 & 0xFFFFFFFF]
    assert hash_strings(pa.array(["é"]), seed=1).tolist() != hash_strings(pa.array(["é"]), seed=2).tolist()


def test_shared_rows_are_the_same_on_every_machine() -> None:
    vocabulary = Vocabulary(np.empty(0, np.uint32), oov_buckets=1 << 18, num_hashes=2)
    hashes = np.array([1, 0xFFFFFFFF], np.uint32)
    assert vocabulary.row_of(hashes).tolist() == [2, 1 << 18, MISSING]
    # murmur3's published finalizer takes 1 to 0x514E28B7 and 0xFFFFFFFF to 0x81F16F39.
    expected = [1 + (mixed & 0x3FFFF) for mixed in (0x514E28B7, 0x81F16F39)]
    assert vocabulary.second_row_of(hashes).tolist() == [*expected, NO_ROW]


def test_most_frequent_values_own_the_rows() -> None:
    column = hashed(["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2 + ["e"])
    vocabulary = Vocabulary.fit([column], min_count=2, max_size=3)
    rows = vocabulary.rows(hashed(["a", "b", "c", "d", "e", None]))
    assert vocabulary.num_rows == 5
    assert len(set(rows[:3])) == 3
    assert rows[3:].tolist() == [1, 1, MISSING]
    assert vocabulary.has_meaning(rows).tolist() == [True] * 3 + [False] * 3


def test_rare_values_spread_over_their_rows() -> None:
    vocabulary = Vocabulary.fit([hashed(["a", "a"])], min_count=2, max_size=10, oov_buckets=4)
    rows = vocabulary.rows(hashed([f"new {i}" for i in range(200)]))
    assert set(rows) == {1, 2, 3, 4}


def test_two_rows_tell_apart_many_more_values_than_there_are_rows() -> None:
    column = hashed([f"new {i}" for i in range(2000)])
    vocabulary = Vocabulary.fit([], min_count=1, max_size=0, oov_buckets=500, num_hashes=2)
    first, second = vocabulary.row_of(column.hashes)[:-1], vocabulary.second_row_of(column.hashes)[:-1]
    assert first.min() >= 1
    assert second.min() >= 1
    assert max(first.max(), second.max()) <= 500
    shared = 2000 - len({tuple(sorted(pair)) for pair in zip(first, second, strict=True)})
    assert len(set(first)) < 500  # one row alone: all values share theirs with three others
    assert shared < 40  # 2000**2 / 500**2 = 16 pairs of values share both


def test_values_with_a_row_of_their_own_and_missing_ones_have_no_second() -> None:
    vocabulary = Vocabulary.fit([hashed(["a", "a", "rare"])], min_count=2, max_size=9, oov_buckets=8, num_hashes=2)
    second = vocabulary.second_row_of(hashed(["a", "rare"]).hashes)
    assert second[0] == NO_ROW
    assert 1 <= second[1] <= 8
    assert second[2] == NO_ROW


def test_one_shared_row_needs_no_second() -> None:
    vocabulary = Vocabulary.fit([hashed(["a"])], min_count=2, max_size=9, num_hashes=2)
    assert not vocabulary.has_second_rows
    assert vocabulary.second_row_of(hashed(["a"]).hashes).tolist() == [NO_ROW, NO_ROW]


def test_no_categories_at_all_is_hashing_alone() -> None:
    vocabulary = Vocabulary.fit([hashed(["a"] * 9)], min_count=1, max_size=0, oov_buckets=4)
    rows = vocabulary.rows(hashed(["a", "b", None]))
    assert vocabulary.num_rows == 5
    assert vocabulary.has_meaning(rows).tolist() == [True, True, False]


def test_counts_add_up_over_chunks() -> None:
    chunks = [hashed(["a", "b"]), hashed(["a"]), hashed([])]
    vocabulary = Vocabulary.fit(chunks, min_count=2, max_size=10)
    assert vocabulary.has_meaning(vocabulary.rows(hashed(["a", "b"]))).tolist() == [True, False]


def test_counts_of_many_chunks_are_those_of_the_whole() -> None:
    values = np.random.default_rng(0).zipf(1.5, 20_000).astype(str)
    parts = [hashed(pa.array(part)) for part in np.array_split(values, 7)]
    vocabulary = Vocabulary.fit(parts, min_count=10, max_size=1000)
    distinct, counts = np.unique(values, return_counts=True)
    expected = hash_strings(pa.array(distinct[counts >= 10]), seed=0)
    np.testing.assert_array_equal(vocabulary.hashes, np.sort(expected))


def test_extension_keeps_what_owned_a_row_and_adds_what_is_frequent_now() -> None:
    old = Vocabulary.fit([hashed(["a", "a", "b", "b"])], min_count=2, max_size=10)
    new = Vocabulary.fit([hashed(["b", "c", "c", "d"])], min_count=2, max_size=10, previous=old.hashes)
    assert new.has_meaning(new.rows(hashed(["a", "b", "c", "d"]))).tolist() == [True, True, True, False]


def test_extension_beyond_the_limit_keeps_the_most_frequent_of_now() -> None:
    old = Vocabulary.fit([hashed(["a", "a", "b", "b"])], min_count=2, max_size=3)
    new = Vocabulary.fit([hashed(["b"] * 3 + ["c"] * 2 + ["d"] * 2)], min_count=2, max_size=3, previous=old.hashes)
    assert new.has_meaning(new.rows(hashed(["a", "b", "c", "d"]))).tolist() == [False, True, True, True]
    tie = Vocabulary.fit([hashed(["b", "b", "c", "c"])], min_count=2, max_size=1, previous=old.hashes)
    assert tie.has_meaning(tie.rows(hashed(["b", "c"]))).tolist() == [True, False]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([3, None, 3]),
        pa.array(["3", None, "3"], pa.large_string()),
        pa.array([3, None, 3]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.int8()), pa.array(["3", "3"])),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array([None, "3"])),
        pa.DictionaryArray.from_arrays(
            pa.array([199, None, 199], pa.uint8()), pa.array([f"{i}" for i in range(-196, 4)])
        ),
    ],
)
def test_values_are_compared_as_text(array: pa.Array) -> None:
    vocabulary = Vocabulary.fit([hashed(["3", "3"])], min_count=1, max_size=10)
    assert vocabulary.rows(hashed(array)).tolist() == [2, MISSING, 2]


def test_column_without_values_is_missing() -> None:
    vocabulary = Vocabulary.fit([hashed(pa.nulls(2))], min_count=1, max_size=10)
    assert vocabulary.num_rows == 2
    assert vocabulary.rows(hashed(pa.nulls(2))).tolist() == [MISSING, MISSING]


def test_dictionary_that_changes_is_hashed_again() -> None:
    hasher = ColumnHasher(seed=0)
    first, again, other = (
        hasher.hash(pa.array(values).dictionary_encode()) for values in (["a", "b"], ["a", "b"], ["a", "c"])
    )
    assert again.hashes is first.hashes
    assert other.hashes.tolist() == hash_strings(pa.array(["a", "c"]), seed=0).tolist()


def test_text_form_is_the_vocabulary() -> None:
    vocabulary = Vocabulary.fit([hashed([str(i) for i in range(500)], seed=7)], min_count=1, max_size=1000)
    again = Vocabulary.from_text(vocabulary.to_text(), oov_buckets=1)
    np.testing.assert_array_equal(again.hashes, vocabulary.hashes)
    assert len(again.hashes) == 500
