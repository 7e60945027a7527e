"""Categories become rows of an embedding table: values are hashed, frequent ones own a row, all others share a few.

Nothing but 32-bit hashes is kept, so a model package holds no user or item id in clear, and Python touches only the
distinct values of a column.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError

MISSING = 0
"""Local row of a null."""

_HASH_BITS = 32  # 1 million values: about 100 pairs collide, 0.02 % of unseen values are taken for a known one


def hash_strings(values: pa.Array, *, seed: int) -> NDArray[np.uint32]:
    """Hash strings with xxHash64 on their UTF-8 bytes, cut to 32 bits: equal on every machine and in every run.

    Args:
        values: (n,) strings without nulls; pass distinct ones.
        seed: of the hash.
    """
    mask = (1 << _HASH_BITS) - 1
    return np.fromiter(
        (xxhash.xxh64_intdigest(value, seed) & mask for value in values.cast(pa.binary()).to_pylist()),
        dtype=np.uint32,
        count=len(values),
    )


@dataclass(frozen=True)
class Vocabulary:
    """The values of one field that own a row, and where all other values go.

    Local rows: 0 is missing, 1 to `oov_buckets` are shared by rare and unseen values (chosen by hash), and one row for
    each kept value follows.
    """

    hashes: NDArray[np.uint32]
    """(num_kept,) sorted hashes of the values that own a row."""
    seed: int
    oov_buckets: int = 1

    @classmethod
    def fit(
        cls, arrays: Iterable[pa.Array], *, seed: int, min_count: int, max_size: int, oov_buckets: int = 1
    ) -> Vocabulary:
        """Keep the values that occur at least `min_count` times; of more than `max_size`, the most frequent.

        Args:
            arrays: chunks of the training column.
            seed: of the hash.
            min_count: rarer values share the rows of unseen ones, which is how those rows are trained.
            max_size: the most rows a field may own.
            oov_buckets: rows for rare and unseen values.
        """
        hashes, counts = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for array in arrays:
            codes, distinct = _dictionary(array)
            hashes.append(hash_strings(distinct, seed=seed))
            counts.append(np.bincount(codes[codes < len(distinct)], minlength=len(distinct)))
        known, place = np.unique(np.concatenate(hashes), return_inverse=True)
        total = np.bincount(place, weights=np.concatenate(counts), minlength=len(known))
        kept, total = known[total >= min_count], total[total >= min_count]
        if len(kept) > max_size:
            kept = np.sort(kept[np.argsort(-total, kind="stable")[:max_size]])
        return cls(kept, seed, oov_buckets)

    @property
    def num_rows(self) -> int:
        """Rows that the field needs in a table."""
        return 1 + self.oov_buckets + len(self.hashes)

    def is_known(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each local row belongs to one kept value."""
        known: NDArray[np.bool_] = rows > self.oov_buckets
        return known

    def rows(self, array: pa.Array) -> NDArray[np.int32]:
        """Local row of each value.

        Args:
            array: (n,) anything that can be cast to string; nulls are allowed.

        Returns:
            (n,) int32 in [0, num_rows).
        """
        codes, distinct = _dictionary(array)
        hashes = hash_strings(distinct, seed=self.seed)
        row_of = np.empty(len(distinct) + 1, dtype=np.int32)
        row_of[-1] = MISSING
        row_of[:-1] = 1 + hashes % np.uint32(self.oov_buckets)
        if len(self.hashes):
            place = np.searchsorted(self.hashes, hashes)
            place[place == len(self.hashes)] = 0
            hit = self.hashes[place] == hashes
            row_of[:-1][hit] = 1 + self.oov_buckets + place[hit]
        return row_of[codes]

    def to_text(self) -> str:
        """The kept hashes as base64 of little-endian uint32."""
        return base64.b64encode(self.hashes.astype("<u4").tobytes()).decode()

    @classmethod
    def from_text(cls, text: str, *, seed: int, oov_buckets: int) -> Vocabulary:
        """The inverse of `to_text`."""
        return cls(np.frombuffer(base64.b64decode(text), dtype="<u4").astype(np.uint32), seed, oov_buckets)


def _dictionary(array: pa.Array) -> tuple[NDArray[np.int32], pa.Array]:
    """Codes (n,) of a column and its distinct strings; a null's code is the number of distinct strings."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not pa.types.is_string(array.type):
        array = array.cast(pa.string())
    encoded = array.dictionary_encode()
    codes = encoded.indices
    if codes.null_count:
        codes = codes.fill_null(len(encoded.dictionary))
    return codes.to_numpy(zero_copy_only=False), encoded.dictionary


def as_list_array(name: str, array: pa.Array) -> pa.Array:
    """A column of lists as list<string>; a column that is all null becomes empty lists.

    Raises:
        ArtifactError: the column holds no lists.
    """
    if pa.types.is_null(array.type):
        return array.cast(pa.list_(pa.string()))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise ArtifactError(f"feature {name!r}: has type {array.type}, the model reads lists of strings")
    return array


def flatten_lists(name: str, array: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """The values of all lists in one array, and the length of each list (0 for null)."""
    lists = as_list_array(name, array)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.list_flatten(lists), lengths
