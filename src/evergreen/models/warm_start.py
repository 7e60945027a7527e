"""Warm start: which table row of an older model each row of a newer one goes on from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.models.encoding import Encoder, check_same_features
from evergreen.models.inputs import PAD
from evergreen.models.vocabulary import Vocabulary


def row_mapping(old: Encoder, new: Encoder) -> NDArray[np.int64]:
    """(new.spec.num_embeddings,) for each row of the new table, the row of the old one that its value was read from.

    Values keep their row, missing and shared rows map to their like, and a value that owns a row for the first time
    maps to the shared row of before. So a table copied by the mapping, plus `second_row_mapping`, gives every value of
    a field the embedding that it had. Two things may change: a value that lost its row to more frequent ones
    (`max_categories`) falls back to a shared row, and a value that is new to the vocabulary now also counts in bags,
    which leave unseen values out.

    Args:
        old: encoder of the model to start from.
        new: made by `old.extended`.

    Raises:
        ArtifactError: the encoders differ in features, seed or shared rows.
    """
    return _mapping(old, new)[0]


def second_row_mapping(old: Encoder, new: Encoder) -> NDArray[np.int64]:
    """(new.spec.num_embeddings,) for each row of the new table, the old row to add; PAD, which is zero, for most.

    Other than PAD only with `num_hashes` 2, for values that own a row for the first time: they were the sum of two.
    Arguments and errors as of `row_mapping`.
    """
    return _mapping(old, new)[1]


def _mapping(old: Encoder, new: Encoder) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    check_same_features(old.features, new.features)
    first = np.full(new.spec.num_embeddings, -1, dtype=np.int64)
    second = np.full(new.spec.num_embeddings, PAD, dtype=np.int64)
    first[PAD] = PAD
    for field in new.fields:
        if field.state.vocabulary is None:
            continue  # it has the rows of another field
        before, vocabulary = old.field(field.state.name), field.vocabulary
        if _hashing(old, before.vocabulary) != _hashing(new, vocabulary):
            raise ArtifactError(
                f"feature {field.state.name}: seed, shared rows and hashes of a value are "
                f"{_hashing(old, before.vocabulary)} in the model to start from and {_hashing(new, vocabulary)} now: "
                "extend its encoder instead of fitting another, or train from the beginning"
            )
        num_shared = 1 + vocabulary.oov_buckets
        start, end = field.start, field.start + vocabulary.num_rows
        first[start : start + num_shared] = before.start + np.arange(num_shared)
        first_rows, second_rows = before.table_rows(vocabulary.hashes)
        first[start + num_shared : end], second[start + num_shared : end] = first_rows[:-1], second_rows[:-1]
    return first, second


def _hashing(encoder: Encoder, vocabulary: Vocabulary) -> tuple[int, int, int]:
    return encoder.config.seed, vocabulary.oov_buckets, vocabulary.num_hashes
