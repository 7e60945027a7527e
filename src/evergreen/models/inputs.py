"""What flows into a model: the shape of its inputs, encoded rows as they lie in memory, and one batch of tensors.

Shapes: N rows, C categorical fields, M numeric columns, L positions of all bags together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.training_set import ColumnKind, Side

PAD = 0
"""Row of the shared table that stands for no value; it is never trained."""


class CategoricalInput(JsonModel):
    """A field: the rows [start, start + num_rows) of the shared table. The first is missing, the second unseen."""

    name: str
    side: Side
    start: int
    num_rows: int
    num_shared: int = 1
    """Rows from `unseen` on that rare and unseen values share, chosen by hash."""

    @property
    def unseen(self) -> int:
        """Table row that unseen values use; the first of `num_shared`."""
        return self.start + 1


class NumericInput(JsonModel):
    """A numeric column, standardised. A missing value is 0, which is the mean."""

    name: str
    side: Side
    missing: int | None
    """Place of the column that says 1 where this one is missing; None where training rows never were."""
    zero: float
    """What a raw 0 looks like after encoding."""
    boundaries: tuple[float, ...]
    """Inner quantiles of the training rows after encoding, ascending and distinct."""


class BagInput(JsonModel):
    """Several values of one field, padded with PAD to `width`."""

    name: str
    side: Side
    kind: ColumnKind
    width: int


class InputSpec(JsonModel):
    """The inputs of a model; all fields share one table of `num_embeddings` rows, row 0 is padding."""

    categorical: tuple[CategoricalInput, ...]
    second_rows: tuple[int, ...] = ()
    """Places of the fields that have a second column of table rows, after the first ones: values that share rows by
    hash are the sum of two, so that hardly any two values are the same. PAD where one row says all."""
    numeric: tuple[NumericInput, ...]
    num_indicators: int
    """Columns that follow the numeric ones and say where those are missing."""
    bags: tuple[BagInput, ...]
    num_embeddings: int
    untrained_rows: tuple[int, ...]
    """Rows that may see few training rows or none (padding, missing, a field's only unseen row); they start at zero."""

    @property
    def categorical_width(self) -> int:
        """Columns of the categorical input, second rows included."""
        return len(self.categorical) + len(self.second_rows)

    @property
    def numeric_width(self) -> int:
        """Columns of the numeric input, indicators included."""
        return len(self.numeric) + self.num_indicators

    @property
    def bag_width(self) -> int:
        """Positions of all bags together."""
        return sum(bag.width for bag in self.bags)


class ModelInputs(NamedTuple):
    """One batch of tensors, the arguments of a model's forward."""

    categorical: Tensor
    """(N, C + X) int64 rows of the shared table; see `InputSpec.second_rows`."""
    numeric: Tensor
    """(N, M) float32."""
    bags: Tensor
    """(N, L) int64 rows of the shared table, one bag after the other, PAD where a bag is shorter than its width."""

    def to(self, device: torch.device) -> ModelInputs:
        """The same batch on a device."""
        return ModelInputs(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class Bag:
    """Ragged rows: the values of row i are values[offsets[i]:offsets[i + 1]]; no memory goes into padding."""

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Bag:
        """The chosen rows, in the order chosen."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        place = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Bag(self.values[place], offsets)

    def padded(self, rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """The chosen rows as (len(rows), width) table rows, padded with PAD."""
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        place = np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)
        padded = np.full((len(rows), width), PAD, dtype=np.int64)
        padded[np.arange(width) < length[:, None]] = self.values[place]
        return padded


RowSelection: TypeAlias = slice | NDArray[np.int64]


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows in memory: 4 bytes a value."""

    spec: InputSpec
    categorical: NDArray[np.int32]
    """(N, C + X) rows of the shared table."""
    numeric: NDArray[np.float32]
    """(N, M)."""
    bags: tuple[Bag, ...]

    def __len__(self) -> int:
        return len(self.numeric)

    def take(self, rows: NDArray[np.int64]) -> EncodedRows:
        """The chosen rows, in the order chosen."""
        bags = tuple(bag.take(rows) for bag in self.bags)
        # np.take is three times as fast as indexing with an array.
        return EncodedRows(
            self.spec, np.take(self.categorical, rows, axis=0), np.take(self.numeric, rows, axis=0), bags
        )

    def inputs(self, selection: RowSelection = slice(None)) -> ModelInputs:
        """The chosen rows as tensors."""
        if isinstance(selection, slice):
            rows = np.arange(len(self))[selection]
            categorical, numeric = self.categorical[selection], self.numeric[selection]
        else:
            rows = selection
            categorical, numeric = np.take(self.categorical, rows, axis=0), np.take(self.numeric, rows, axis=0)
        bags: Sequence[NDArray[np.int64]] = [
            bag.padded(rows, spec.width) for bag, spec in zip(self.bags, self.spec.bags, strict=True)
        ]
        padded = np.concatenate(bags, axis=1) if bags else np.empty((len(rows), 0), dtype=np.int64)
        return ModelInputs(
            torch.from_numpy(categorical.astype(np.int64)), torch.from_numpy(numeric), torch.from_numpy(padded)
        )


def with_user_side(rows: EncodedRows, users: EncodedRows, user_of: NDArray[np.int64]) -> EncodedRows:
    """Rows with the user's side of other rows.

    Args:
        rows: (num_rows,).
        users: (num_users,), of the same spec.
        user_of: (num_rows,) which of `users` each row takes its user's side from.
    """
    spec = rows.spec
    fields = [place for place, field in enumerate(spec.categorical) if field.side is Side.USER]
    fields += [len(spec.categorical) + x for x, place in enumerate(spec.second_rows) if place in fields]
    numbers = [place for place, column in enumerate(spec.numeric) if column.side is Side.USER]
    numbers += [missing for place in numbers if (missing := spec.numeric[place].missing) is not None]
    categorical, numeric = rows.categorical.copy(), rows.numeric.copy()
    categorical[:, fields] = users.categorical[:, fields][user_of]
    numeric[:, numbers] = users.numeric[:, numbers][user_of]
    bags = tuple(
        users.bags[place].take(user_of) if bag.side is Side.USER else rows.bags[place]
        for place, bag in enumerate(spec.bags)
    )
    return EncodedRows(spec, categorical, numeric, bags)
