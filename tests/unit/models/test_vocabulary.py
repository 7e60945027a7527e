"""Hashed categories."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from evergreen.models.vocabulary import MISSING, Vocabulary, hash_strings


def test_hash_is_the_same_on_every_machine() -> None:
    # xxh64 of the UTF-8 bytes, low 32 bits; the empty string with seed 0 is the specification's test vector.
    assert hash_strings(pa.array([""]), seed=0).tolist() == [0xEF46DB3751D8E999 & 0xFFFFFFFF]
    assert hash_strings(pa.array(["é"]), seed=1).tolist() != hash_strings(pa.array(["é"]), seed=2).tolist()


def test_most_frequent_values_own_the_rows() -> None:
    column = pa.array(["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2 + ["e"])
    vocabulary = Vocabulary.fit([column], seed=0, min_count=2, max_size=3)
    rows = vocabulary.rows(pa.array(["a", "b", "c", "d", "e", None]))
    assert vocabulary.num_rows == 5
    assert len(set(rows[:3])) == 3
    assert rows[3:].tolist() == [1, 1, MISSING]
    assert vocabulary.is_known(rows).tolist() == [True] * 3 + [False] * 3


def test_rare_values_spread_over_their_rows() -> None:
    vocabulary = Vocabulary.fit([pa.array(["a", "a"])], seed=0, min_count=2, max_size=10, oov_buckets=4)
    rows = vocabulary.rows(pa.array([f"new {i}" for i in range(200)]))
    assert set(rows) == {1, 2, 3, 4}


def test_counts_add_up_over_chunks() -> None:
    chunks = [pa.array(["a", "b"]), pa.array(["a"]), pa.array([], pa.string())]
    vocabulary = Vocabulary.fit(chunks, seed=0, min_count=2, max_size=10)
    assert vocabulary.is_known(vocabulary.rows(pa.array(["a", "b"]))).tolist() == [True, False]


@pytest.mark.parametrize("array", [pa.array([3, None, 3]), pa.array(["3", None, "3"], pa.large_string())])
def test_values_are_compared_as_text(array: pa.Array) -> None:
    vocabulary = Vocabulary.fit([pa.array(["3", "3"])], seed=0, min_count=1, max_size=10)
    assert vocabulary.rows(array).tolist() == [2, MISSING, 2]


def test_text_form_is_the_vocabulary() -> None:
    vocabulary = Vocabulary.fit([pa.array([str(i) for i in range(500)])], seed=7, min_count=1, max_size=1000)
    again = Vocabulary.from_text(vocabulary.to_text(), seed=7, oov_buckets=1)
    np.testing.assert_array_equal(again.hashes, vocabulary.hashes)
    assert len(again.hashes) == 500
