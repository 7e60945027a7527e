"""From hashed values to rows of the shared table, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.training_set import ColumnKind
from evergreen.models.inputs import PAD, Bag, EncodedRows, InputSpec
from evergreen.models.vocabulary import NO_ROW, HashedColumn, Vocabulary

_BLOCK_ROWS = 2_048
_GROUP_COLUMNS = 16  # of 4 bytes: a cache line


class FieldState(JsonModel):
    """What an encoder keeps of a field."""

    name: str
    kind: ColumnKind
    vocabulary: str | None
    """Base64 of the kept hashes; None when the field shares the rows of item_id."""
    width: int
    """Values a row may have: 1 for a category."""


@dataclass(frozen=True)
class EncodedField:
    """A categorical field or a bag, and the rows of the shared table that its values have."""

    state: FieldState
    vocabulary: Vocabulary
    start: int
    """First row in the shared table."""

    def table_rows(self, hashes: NDArray[np.uint32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(len(hashes) + 1,) first and second table row of each hash; the last are those of a null."""
        second = self.vocabulary.second_row_of(hashes)
        first, none = self.start + self.vocabulary.row_of(hashes), np.int32(PAD)
        return first, np.where(second == NO_ROW, none, self.start + second)


class RowWriter:
    """`EncodedRows` while they are written, column by column or batch by batch."""

    def __init__(self, spec: InputSpec, fields: Sequence[EncodedField], num_rows: int) -> None:
        self._spec = spec
        self._categorical_fields = [field for field in fields if field.state.kind is ColumnKind.CATEGORICAL]
        self._bag_fields = [field for field in fields if field.state.kind is not ColumnKind.CATEGORICAL]
        self._looked_up: dict[int, tuple[NDArray[np.uint32], tuple[NDArray[np.int32], NDArray[np.int32]]]] = {}
        self._values: list[list[NDArray[np.int32]]] = [[] for _ in self._bag_fields]
        self._lengths: list[list[NDArray[np.int64]]] = [[] for _ in self._bag_fields]
        self.categorical = np.empty((num_rows, self._spec.categorical_width), dtype=np.int32)
        self.numeric = np.empty((num_rows, self._spec.numeric_width), dtype=np.float32)

    def write_categories(self, start: int, fields: Sequence[Sequence[HashedColumn]]) -> None:
        """Write rows from `start` on of all fields, each in one or more chunks."""
        num_rows = sum(len(chunk.codes) for chunk in fields[0]) if fields else 0
        target, num_fields = self.categorical[start : start + num_rows], len(fields)
        first = ((place, self._table_rows(place, 0, chunks)) for place, chunks in enumerate(fields))
        second = (
            (num_fields + order, self._table_rows(place, 1, fields[place]))
            for order, place in enumerate(self._spec.second_rows)
        )
        interleave(target, chain(first, second))

    def _table_rows(self, place: int, which: int, chunks: Sequence[HashedColumn]) -> NDArray[np.int32]:
        """(n,) first or second (`which` 0 or 1) table rows of a field's chunks."""
        parts = []
        for chunk in chunks:
            hashes, looked_up = self._looked_up.get(place, (None, None))
            if hashes is not chunk.hashes or looked_up is None:
                looked_up = self._categorical_fields[place].table_rows(chunk.hashes)
                self._looked_up[place] = chunk.hashes, looked_up
            parts.append(np.take(looked_up[which], chunk.codes))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])

    def append_bag(self, place: int, column: HashedColumn, lengths: NDArray[np.int64]) -> None:
        """Append rows to the bag at `place`."""
        kept, length = bag_rows(self._bag_fields[place], column, lengths)
        self._values[place].append(kept)
        self._lengths[place].append(length)

    def finish(self) -> EncodedRows:
        """The rows, all written."""
        bags = tuple(
            Bag(
                np.concatenate([np.empty(0, np.int32), *value]),
                np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.empty(0, np.int64), *length]))]),
            )
            for value, length in zip(self._values, self._lengths, strict=True)
        )
        return EncodedRows(self._spec, self.categorical, self.numeric, bags)


def interleave(out: NDArray[Any], columns: Iterable[tuple[int, NDArray[Any]]]) -> None:
    """Write columns (n,) into their places of a row-major matrix (n, width).

    A cache line's worth at a time, block by block: one by one, each column would fetch the whole matrix from memory.
    """
    rest = iter(columns)
    while group := list(islice(rest, _GROUP_COLUMNS)):
        for start in range(0, len(out), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            for place, column in group:
                out[rows, place] = column[rows]


def bag_rows(
    field: EncodedField, column: HashedColumn, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Table rows of a bag's known values, and how many each row of the table has.

    Of a history that is too long the last known items are kept, of a multi-valued feature the first known values.
    """
    rows = field.vocabulary.rows(column)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    known = field.vocabulary.has_meaning(rows)
    rows, owner = rows[known], owner[known]
    kept = np.bincount(owner, minlength=len(lengths)).astype(np.int64)
    if len(kept) and kept.max(initial=0) > field.state.width:
        end = np.cumsum(kept)
        place = np.arange(len(rows))
        if field.state.kind is ColumnKind.SEQUENCE:
            inside = end[owner] - place <= field.state.width
        else:
            inside = place - (end - kept)[owner] < field.state.width
        rows, kept = rows[inside], np.minimum(kept, field.state.width)
    return rows + np.int32(field.start), kept
