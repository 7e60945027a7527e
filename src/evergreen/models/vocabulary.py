"""Categories become rows of an embedding table: values are hashed, frequent ones own a row, all others share a few.

Nothing but 32-bit hashes is kept, so a model package holds no user or item id in clear. Python touches the distinct
values of a column, each once; rows are looked up by their place in the list of distinct values.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError

MISSING = 0
"""Local row of a null."""
NO_ROW = -1
"""In place of a second local row where one row says all."""

# 32 bits of a hash: of 1 million values about 100 pairs collide, and 0.02 % of unseen values are taken for a known one.
_SPARSE_DICTIONARY = 4  # times as many entries as rows: a slice of a large table, most entries are not in it


def hash_strings(values: pa.Array, *, seed: int) -> NDArray[np.uint32]:
    """Hash strings with xxHash64 on their UTF-8 bytes, cut to 32 bits: equal on every machine and in every run.

    Args:
        values: (n,) strings without nulls; pass distinct ones.
        seed: of the hash.
    """
    digests = map(xxhash.xxh64_intdigest, values.cast(pa.binary()).to_pylist(), repeat(seed))
    return np.fromiter(digests, dtype=np.uint64, count=len(values)).astype(np.uint32)  # keeps the low bits


@dataclass(frozen=True)
class HashedColumn:
    """A column as places in a list of hashes."""

    codes: NDArray[np.int32]
    """(n,) place of each value in `hashes`; len(hashes) for a null."""
    hashes: NDArray[np.uint32]
    """(num_distinct,) in no order; entries may be unused."""


class ColumnHasher:
    """Hashes the chunks of one column. A dictionary that comes again, as Parquet readers return it, is hashed once."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed
        self._distinct: pa.Array | None = None
        self._hashes = np.empty(0, np.uint32)

    def hash(self, array: pa.Array) -> HashedColumn:
        """Hash a chunk: (n,) anything that can be cast to string; nulls are allowed.

        Raises:
            pa.ArrowNotImplementedError: the values have no text form (lists, structs).
        """
        codes, distinct = _dictionary(array)
        if self._distinct is None or not distinct.equals(self._distinct):
            self._distinct, self._hashes = distinct, hash_strings(distinct, seed=self._seed)
        return HashedColumn(codes, self._hashes)


@dataclass(frozen=True)
class Vocabulary:
    """The values of one field that own a row, and where all other values go.

    Local rows: 0 is missing, 1 to `oov_buckets` are shared by rare and unseen values (chosen by hash), and one row for
    each kept value follows.

    With `num_hashes` 2, a value without a row of its own is the sum of two shared rows: of B rows, two values are the
    same once in B**2 / 2 rather than once in B.

    Source: Svenstrup et al. 2017, Hash embeddings; deviates: both rows weigh 1, as in Serrà and Karatzoglou 2017. The
    quotient-remainder trick (Shi et al. 2020) tells all values apart only if they are numbered, which unseen ones are
    not; of a hash code its quotients reach few rows when B**2 exceeds the codes, and two hashes reach all.
    """

    hashes: NDArray[np.uint32]
    """(num_kept,) sorted hashes of the values that own a row."""
    oov_buckets: int = 1
    num_hashes: int = 1

    @classmethod
    def fit(
        cls,
        columns: Sequence[HashedColumn],
        *,
        min_count: int,
        max_size: int,
        oov_buckets: int = 1,
        num_hashes: int = 1,
        previous: NDArray[np.uint32] | None = None,
    ) -> Vocabulary:
        """Keep the values that occur at least `min_count` times; of more than `max_size`, the most frequent.

        Args:
            columns: chunks of the training column.
            min_count: rarer values share the rows of unseen ones, which is how those rows are trained.
            max_size: the most rows a field may own.
            oov_buckets: rows for rare and unseen values.
            num_hashes: how many of these a value is the sum of, 1 or 2.
            previous: (num_previous,) hashes that are kept however rare they are now, unless `max_size` is exceeded.
        """
        old = np.empty(0, np.uint32) if previous is None else previous
        hashes, counts = [old], [np.zeros(len(old), np.int64)]
        for column in columns:
            hashes.append(column.hashes)
            counts.append(np.bincount(column.codes, minlength=len(column.hashes) + 1)[:-1])
        known, total = _sum_by_hash(np.concatenate(hashes), np.concatenate(counts))
        kept = total >= min_count
        if len(old):
            kept |= np.isin(known, old)
        known, total = known[kept], total[kept]
        if len(known) > max_size:
            newcomers = ~np.isin(known, old)
            known = np.sort(known[np.lexsort((newcomers, -total))[:max_size]])
        return cls(known, oov_buckets, num_hashes)

    @property
    def num_rows(self) -> int:
        """Rows that the field needs in a table."""
        return 1 + self.oov_buckets + len(self.hashes)

    @property
    def has_second_rows(self) -> bool:
        """Whether some values are the sum of two rows."""
        return self.num_hashes == 2 and self.oov_buckets > 1

    def has_meaning(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each local row tells of its value: it belongs to one kept value.

        Where no value owns a row and values are spread over many (hashing alone), each row but the missing one does.
        """
        hashing_alone = len(self.hashes) == 0 and self.oov_buckets > 1
        meaningful: NDArray[np.bool_] = rows > (MISSING if hashing_alone else self.oov_buckets)
        return meaningful

    def rows(self, column: HashedColumn) -> NDArray[np.int32]:
        """(n,) local row of each value, in [0, num_rows)."""
        return np.take(self.row_of(column.hashes), column.codes)

    def row_of(self, hashes: NDArray[np.uint32]) -> NDArray[np.int32]:
        """(len(hashes) + 1,) local row of each hash; the last is that of a null."""
        row_of = np.empty(len(hashes) + 1, dtype=np.int32)
        row_of[-1] = MISSING
        row_of[:-1] = 1 + hashes % np.uint32(self.oov_buckets)
        place, hit = self._find(hashes)
        row_of[:-1][hit] = 1 + self.oov_buckets + place[hit]
        return row_of

    def second_row_of(self, hashes: NDArray[np.uint32]) -> NDArray[np.int32]:
        """(len(hashes) + 1,) the second local row of each hash; NO_ROW where one says all, as for a null."""
        row_of = np.full(len(hashes) + 1, NO_ROW, dtype=np.int32)
        if self.has_second_rows:
            _, hit = self._find(hashes)
            row_of[:-1] = np.where(hit, NO_ROW, 1 + (_mix(hashes) % np.uint32(self.oov_buckets)).astype(np.int32))
        return row_of

    def _find(self, hashes: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Place of each hash among the kept ones, and whether it is one."""
        place = np.searchsorted(self.hashes, hashes)
        if len(self.hashes) == 0:
            return place, np.zeros(len(hashes), dtype=np.bool_)
        place[place == len(self.hashes)] = 0
        return place, self.hashes[place] == hashes

    def to_text(self) -> str:
        """The kept hashes as base64 of little-endian uint32."""
        return base64.b64encode(self.hashes.astype("<u4").tobytes()).decode()

    @classmethod
    def from_text(cls, text: str, *, oov_buckets: int, num_hashes: int = 1) -> Vocabulary:
        """The inverse of `to_text`."""
        hashes = np.frombuffer(base64.b64decode(text), dtype="<u4").astype(np.uint32)
        return cls(hashes, oov_buckets, num_hashes)


def _sum_by_hash(hashes: NDArray[np.uint32], counts: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Sorted distinct hashes and the sums of their counts."""
    if len(hashes) == 0:
        return hashes, counts
    # Hash and count in one word: numpy sorts words five times as fast as it finds their order.
    words = np.sort(hashes.astype(np.uint64) << np.uint64(32) | counts.astype(np.uint64))
    keys = (words >> np.uint64(32)).astype(np.uint32)
    first = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat((words & np.uint64(0xFFFFFFFF)).astype(np.int64), first)


def _mix(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A second hash made of the first, so that what a vocabulary keeps gives both (murmur3's 32-bit finalizer)."""
    mixed: NDArray[np.uint32] = hashes ^ (hashes >> np.uint32(16))
    mixed = mixed * np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed = mixed * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _dictionary(array: pa.Array) -> tuple[NDArray[np.int32], pa.Array]:
    """Codes (n,) of a column and its distinct strings; a null's code is the number of distinct strings."""
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    elif array.dictionary.null_count or len(array.dictionary) > _SPARSE_DICTIONARY * len(array):
        array = array.cast(array.type.value_type).dictionary_encode()
    indices, distinct = array.indices.cast(pa.int32()), array.dictionary
    if not pa.types.is_string(distinct.type):
        distinct = distinct.cast(pa.string())
    # Not pc.fill_null: pa.scalar imports pandas.
    codes: NDArray[np.int32] = np.frombuffer(indices.buffers()[1], np.int32)[indices.offset :][: len(indices)]
    if indices.null_count:
        codes = np.where(indices.is_valid().to_numpy(zero_copy_only=False), codes, np.int32(len(distinct)))
    return codes, distinct


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
