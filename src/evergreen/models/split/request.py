"""Encoding a request: one user's values, and the numbers of pairs. The same bits as `Encoder.transform`, at once.

`Encoder.transform` is made for many rows; for one row nearly all of its time goes into taking columns apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import ColumnKind, Side
from evergreen.models.encoded_fields import EncodedField
from evergreen.models.encoding import Encoder, check_columns
from evergreen.models.inputs import ModelInputs
from evergreen.models.layers import FirstOrder
from evergreen.models.numeric import CLIP, NumericColumn, numeric_values
from evergreen.models.split.halves import Halves, PartialFirstOrder, half_of

_CACHED_CATEGORIES = 16_384
_CACHED_PLANS = 16


@dataclass(frozen=True)
class PairColumns:
    """Features of the pairs that several candidates may share: those of a user and a category, say.

    Attributes:
        names: of the features.
        values: (k, len(names)) float64, nan or infinite where unknown.
        of: (m,) int64 row of `values` of each candidate, -1 where all are unknown; None: row i is candidate i's.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    of: NDArray[np.int64] | None = None

    def check(self, num_pairs: int) -> None:
        """Raise ValueError unless there is a row for each candidate."""
        if (rows := len(self.values) if self.of is None else len(self.of)) != num_pairs:
            raise ValueError(f"{', '.join(self.names)}: {rows} rows for {num_pairs} candidates")


def _joined(parts: Sequence[PairColumns]) -> PairColumns:
    """The same features of several requests, one request after the other."""
    values = np.concatenate([part.values for part in parts])
    if all(part.of is None for part in parts):
        return PairColumns(parts[0].names, values)
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    places = [np.arange(len(part.values)) if part.of is None else part.of for part in parts]
    of = [np.where(own < 0, -1, own + start) for own, start in zip(places, starts, strict=False)]
    return PairColumns(parts[0].names, values, np.concatenate(of))


class UserEncoder:
    """Encodes the user's half of one request."""

    def __init__(self, encoder: Encoder, halves: Halves, first_order: FirstOrder | None) -> None:
        self._spec = encoder.spec
        self._seed = encoder.config.seed
        own = [feature for feature in encoder.features if half_of(feature) is Side.USER]
        self.features = own
        self._names = {feature.name for feature in own}
        second = {place: len(self._spec.categorical) + x for x, place in enumerate(self._spec.second_rows)}
        self._fields = [
            (field.state.name, place, second.get(place), self._category_rows(field))
            for place, field in enumerate(encoder.categorical_fields)
            if field.state.name in self._names
        ]
        starts = np.cumsum([0, *(bag.width for bag in self._spec.bags)]).tolist()
        self._bags = [
            (field, start)
            for field, start in zip(encoder.bag_fields, starts, strict=False)
            if field.state.name in self._names
        ]
        columns = encoder.numeric_columns
        self._columns = [columns[place] for place in halves.columns(Side.USER)]
        numbers = halves.numbers(Side.USER)
        self._numbers = np.array(numbers, dtype=np.int64)
        self._encode = NumberEncoder(self._columns)
        self._first_order = None if first_order is None else PartialFirstOrder(first_order, numbers)

    def encode(self, user: Mapping[str, Any]) -> tuple[ModelInputs, float]:
        """One row, of which the other halves are padding and zeros, and the first order of its numbers.

        Args:
            user: value of each feature of the user's side; None where unknown.

        Raises:
            ArtifactError: a feature is absent, or its value is of a type that does not fit; names it.
        """
        inputs, first_order = self.encode_many([user])
        return inputs, float(first_order[0])

    def encode_many(self, users: Sequence[Mapping[str, Any]]) -> tuple[ModelInputs, NDArray[np.float32]]:
        """(num_users,) rows and first orders, each as of `encode`."""
        categorical = np.zeros((len(users), self._spec.categorical_width), np.int64)
        bags = np.zeros((len(users), self._spec.bag_width), np.int64)
        raw = np.empty((len(users), len(self._columns)))
        for row, user in enumerate(users):
            if not self._names <= user.keys():
                check_columns(self.features, list(user))
            for name, place, second, rows in self._fields:
                value = user[name]
                first_row, second_row = rows(value if value is None or type(value) is str else _as_text(name, value))
                categorical[row, place] = first_row
                if second is not None:
                    categorical[row, second] = second_row
            for field, start in self._bags:
                if values := user[field.state.name]:
                    bag = self._bag_rows(field, values)
                    bags[row, start : start + len(bag)] = bag
            raw[row] = _raw_numbers(self._columns, user)
        encoded = self._encode(raw)
        numeric = np.zeros((len(users), self._spec.numeric_width), np.float32)
        numeric[:, self._numbers] = encoded
        first_order = np.zeros(len(users), np.float32) if self._first_order is None else self._first_order(encoded)
        return ModelInputs(
            torch.from_numpy(categorical), torch.from_numpy(numeric), torch.from_numpy(bags)
        ), first_order

    def _category_rows(self, field: EncodedField) -> Callable[[str | None], tuple[int, int]]:
        """From a value to its first and second table row; devices, hours and segments come again and again."""

        @lru_cache(maxsize=_CACHED_CATEGORIES)
        def rows(value: str | None) -> tuple[int, int]:
            hashes = self._hash([] if value is None else [value])
            first, second = field.table_rows(hashes)
            return int(first[0]), int(second[0])

        return rows

    def _hash(self, values: Sequence[str]) -> NDArray[np.uint32]:
        """As `vocabulary.hash_strings`."""
        # JSON may bring half a surrogate pair, which no log can hold: a value like any other that training never saw.
        digests = [xxhash.xxh64_intdigest(value.encode("utf-8", "surrogatepass"), self._seed) for value in values]
        return np.array(digests, dtype=np.uint64).astype(np.uint32)

    def _bag_rows(self, field: EncodedField, values: Sequence[str | None]) -> NDArray[np.int32]:
        """As `encoded_fields.bag_rows`, of one row."""
        if isinstance(values, str) or not all(value is None or isinstance(value, str) for value in values):
            raise ArtifactError(f"feature {field.state.name!r}: is {values!r}, the model reads lists of strings")
        rows = field.vocabulary.row_of(self._hash([value for value in values if value is not None]))[:-1]
        rows = rows[field.vocabulary.has_meaning(rows)]
        width = field.state.width
        return (rows[-width:] if field.state.kind is ColumnKind.SEQUENCE else rows[:width]) + np.int32(field.start)


class PairEncoder:
    """Encodes the numbers of pairs, and what a model's first order makes of them."""

    def __init__(self, encoder: Encoder, halves: Halves, first_order: FirstOrder | None) -> None:
        self._columns = encoder.numeric_columns
        self._places = halves.columns(Side.PAIR)
        self._missing = [encoder.spec.numeric[place].missing for place in self._places]
        self._numbers = halves.numbers(Side.PAIR)
        self._num_numbers = len(self._numbers)
        self._first_order = first_order
        self.names = tuple(self._columns[place].name for place in self._places)
        self._plan = lru_cache(maxsize=_CACHED_PLANS)(self._make_plan)

    def encode(
        self, pairs: pa.Table | Sequence[PairColumns], num_pairs: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(m, P) numbers, in the order of `Halves.numbers`, and their (m,) first order.

        Args:
            pairs: (m) rows with the features of `names`, or the same in parts; others are ignored.
            num_pairs: m.

        Raises:
            ArtifactError: a feature is absent or holds no numbers; names it.
            ValueError: a part has another number of rows.
        """
        if isinstance(pairs, pa.Table):
            pairs = [self._from_table(pairs)]
        numeric = np.empty((num_pairs, self._num_numbers), np.float32)
        first_order = np.zeros(num_pairs, np.float32)
        for part, columns in zip(self._plan(tuple(part.names for part in pairs)), pairs, strict=True):
            values, of = columns.values, columns.of
            columns.check(num_pairs)
            if part is None:
                continue
            values = values if part.chosen is None else values[:, part.chosen]
            if of is not None:  # -1 is the last row
                values = np.concatenate([values, part.unknown])
            encoded = part.encode(values)
            numeric[:, part.targets] = encoded if of is None else np.take(encoded, of, axis=0)
            if part.first_order is not None:
                terms = part.first_order(encoded)
                first_order += terms if of is None else terms[of]
        return numeric, first_order

    def encode_many(
        self, pairs: Sequence[pa.Table | Sequence[PairColumns]], num_pairs: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As of `encode`, of several requests' pairs, one request after the other."""
        parts = [[self._from_table(own)] if isinstance(own, pa.Table) else own for own in pairs]
        if len({tuple(part.names for part in own) for own in parts}) > 1:
            encoded = [self.encode(own, number) for own, number in zip(parts, num_pairs, strict=True)]
            numeric, first_order = zip(*encoded, strict=True)
            return np.concatenate(numeric), np.concatenate(first_order)
        for own, number in zip(parts, num_pairs, strict=True):
            for part in own:  # before they are put together, where too many of one would make up for too few of another
                part.check(number)
        return self.encode([_joined(alike) for alike in zip(*parts, strict=True)], sum(num_pairs))

    def _from_table(self, table: pa.Table) -> PairColumns:
        values = np.empty((table.num_rows, len(self.names)))
        for place, name in enumerate(self.names):
            if name not in table.column_names:
                raise ArtifactError(f"the pairs lack the feature {name!r}, which the model reads")
            values[:, place] = numeric_values(name, table[name])
        return PairColumns(self.names, values)

    def _make_plan(self, parts: tuple[tuple[str, ...], ...]) -> list[_Part | None]:
        """For each part of the pairs, which of its columns go where; None for one that holds nothing of use."""
        if missing := set(self.names) - {name for names in parts for name in names}:
            raise ArtifactError(f"the pairs lack the features {', '.join(sorted(missing))}, which the model reads")
        return [self._make_part(names) for names in parts]

    def _make_part(self, names: tuple[str, ...]) -> _Part | None:
        chosen = [place for place, name in enumerate(names) if name in self.names]
        if not chosen:
            return None
        own = [self.names.index(names[place]) for place in chosen]
        numbers = [self._places[place] for place in own]
        numbers += [missing for place in own if (missing := self._missing[place]) is not None]
        return _Part(
            chosen=None if len(chosen) == len(names) else np.array(chosen),
            targets=np.array([self._numbers.index(place) for place in numbers]),
            encode=NumberEncoder([self._columns[self._places[place]] for place in own]),
            unknown=np.full((1, len(chosen)), np.nan),
            first_order=None if self._first_order is None else PartialFirstOrder(self._first_order, numbers),
        )


@dataclass(frozen=True)
class _Part:
    """What to do with a part of the pairs."""

    chosen: NDArray[np.int64] | None
    """Columns that are read; None: all."""
    targets: NDArray[np.int64]
    """Where their encoded columns stand among the numbers of pairs."""
    encode: NumberEncoder
    unknown: NDArray[np.float64]
    """(1, num_chosen) a row of which nothing is known."""
    first_order: PartialFirstOrder | None


class NumberEncoder:
    """Some columns of a `NumericEncoder`, their parameters as arrays."""

    def __init__(self, columns: Sequence[NumericColumn]) -> None:
        self._mean = np.array([column.mean for column in columns])
        self._std = np.array([column.std for column in columns])
        self._log = np.array([place for place, column in enumerate(columns) if column.log], dtype=np.int64)
        indicators = [place for place, column in enumerate(columns) if column.has_missing]
        self._indicators = np.array(indicators, dtype=np.int64)

    def __call__(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """(n, num_columns) with nan or infinity where missing to (n, num_columns + num_indicators)."""
        missing = ~np.isfinite(raw)
        values = np.where(missing, 0.0, raw)
        if len(self._log) == values.shape[1]:
            values = np.log1p(np.maximum(values, 0.0))
        elif len(self._log):
            values[:, self._log] = np.log1p(np.maximum(values[:, self._log], 0.0))
        values -= self._mean
        values /= self._std
        np.minimum(values, CLIP, out=values)  # np.clip takes longer than both for a few numbers
        np.maximum(values, -CLIP, out=values)
        np.copyto(values, 0.0, where=missing)
        out = np.empty((len(raw), values.shape[1] + len(self._indicators)), np.float32)
        out[:, : values.shape[1]] = values
        out[:, values.shape[1] :] = missing[:, self._indicators]
        return out


def _raw_numbers(columns: Sequence[NumericColumn], values: Mapping[str, Any]) -> NDArray[np.float64]:
    """(len(columns),) with nan where missing."""
    raw = [values[column.name] for column in columns]
    try:
        return np.array([np.nan if value is None else value for value in raw], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        for column, value in zip(columns, raw, strict=True):
            if not isinstance(value, int | float | None):
                raise ArtifactError(f"feature {column.name!r}: is {value!r}, the model reads a number") from None
        raise


def _as_text(name: str, value: Any) -> str:
    """A category that is no string, as Arrow writes it: training read it so."""
    try:
        text: str = pa.array([value]).cast(pa.string())[0].as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"feature {name!r}: is {value!r}, the model reads strings: {error}") from error
    return text
