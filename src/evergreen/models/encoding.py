"""From a table of features to the inputs of a model. Fitted on training rows, shipped with the weights.

One encoder, one shared table: every categorical field and every bag (a user's history, tags) is a range of rows in the
same table; a history uses the rows of item_id, so what a model learns of an item holds in both places.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evergreen.contracts.artifact import JsonModel, canonical_json
from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.training_set import ColumnKind, Feature, Side
from evergreen.models.encoded_fields import EncodedField, FieldState, RowWriter, interleave
from evergreen.models.encoder_config import EncoderConfig, FieldLimits
from evergreen.models.inputs import (
    PAD,
    BagInput,
    CategoricalInput,
    EncodedRows,
    InputSpec,
    NumericInput,
    with_user_side,
)
from evergreen.models.numeric import NumericColumn, NumericEncoder, fit_numeric, numeric_values
from evergreen.models.vocabulary import ColumnHasher, HashedColumn, Vocabulary, flatten_lists

__all__ = [
    "ITEM_FIELD",
    "Encoder",
    "EncoderConfig",
    "FieldLimits",
    "check_columns",
    "check_same_features",
    "open_parquet",
]

logger = logging.getLogger(__name__)

ITEM_FIELD = "item_id"
"""The field whose rows a SEQUENCE feature (a list of item ids) shares."""

ReadColumn = Callable[[str], pa.ChunkedArray]
"""From the name of a feature to its column of the training rows."""

_CHUNK_ROWS = 65_536


class _EncoderState(JsonModel):
    config: EncoderConfig
    features: tuple[Feature, ...]
    fields: tuple[FieldState, ...]
    numeric: tuple[NumericColumn, ...]


class Encoder:
    """Turns tables of features into `EncodedRows`. Made by `fit` or `read`; its state is plain JSON."""

    def __init__(self, state: _EncoderState) -> None:
        self._state = state
        own: dict[str, tuple[Vocabulary, int]] = {}
        start = 1  # row 0 is padding
        for field in state.fields:
            if field.vocabulary is not None:
                vocabulary = Vocabulary.from_text(
                    field.vocabulary,
                    oov_buckets=state.config.oov_buckets_of(field.name),
                    num_hashes=state.config.num_hashes,
                )
                own[field.name] = (vocabulary, start)
                start += vocabulary.num_rows
        self.fields = [
            EncodedField(field, *own[field.name if field.vocabulary is not None else ITEM_FIELD])
            for field in state.fields
        ]
        self.categorical_fields = [field for field in self.fields if field.state.kind is ColumnKind.CATEGORICAL]
        self.bag_fields = [field for field in self.fields if field.state.kind is not ColumnKind.CATEGORICAL]
        self._numeric = NumericEncoder(state.numeric)
        self.spec = self._make_spec(num_embeddings=start)

    def _make_spec(self, *, num_embeddings: int) -> InputSpec:
        columns, indicators = self._numeric.columns, self._numeric.indicator_of
        side = {feature.name: feature.side for feature in self._state.features}
        # Where many values are spread over shared rows, these learn like any other; from zero, products never would.
        untrained = (
            field.start + row
            for field in self.fields
            if field.state.vocabulary is not None
            for row in range(2 if field.vocabulary.oov_buckets == 1 else 1)
        )
        return InputSpec(
            categorical=tuple(
                CategoricalInput(
                    name=field.state.name,
                    side=side[field.state.name],
                    start=field.start,
                    num_rows=field.vocabulary.num_rows,
                    num_shared=field.vocabulary.oov_buckets,
                )
                for field in self.categorical_fields
            ),
            second_rows=tuple(
                place for place, field in enumerate(self.categorical_fields) if field.vocabulary.has_second_rows
            ),
            numeric=tuple(
                NumericInput(
                    name=column.name,
                    side=side[column.name],
                    missing=len(columns) + indicators.index(place) if column.has_missing else None,
                    zero=column.zero,
                    boundaries=column.boundaries,
                )
                for place, column in enumerate(columns)
            ),
            num_indicators=len(indicators),
            bags=tuple(
                BagInput(
                    name=field.state.name, side=side[field.state.name], kind=field.state.kind, width=field.state.width
                )
                for field in self.bag_fields
            ),
            num_embeddings=num_embeddings,
            untrained_rows=(PAD, *untrained),
        )

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns that a table must have."""
        return self._state.features

    @property
    def digest(self) -> str:
        """sha256 of its state: equal encoders give equal rows."""
        return hashlib.sha256(canonical_json(self._state.model_dump(mode="json"))).hexdigest()

    @property
    def numeric_columns(self) -> tuple[NumericColumn, ...]:
        """How numbers are encoded, in the order of the spec."""
        return self._numeric.columns

    @property
    def config(self) -> EncoderConfig:
        """How it was fitted."""
        return self._state.config

    def field(self, name: str) -> EncodedField:
        """A categorical field or a bag by name."""
        return next(field for field in self.fields if field.state.name == name)

    @classmethod
    def fit(cls, table: pa.Table, features: Sequence[Feature], config: EncoderConfig | None = None) -> Encoder:
        """Measure the training rows.

        Args:
            table: the training rows, with a column for each feature.
            features: what the model may read.
            config: how to encode.

        Raises:
            ArtifactError: the table lacks a column, or one has a type that does not fit its kind.
            TrainingError: no feature has a value, or `config.fields` names none of the features.
        """
        check_columns(features, table.column_names)
        return cls.fit_columns(table.column, features, config)

    @classmethod
    def fit_columns(
        cls, read_column: ReadColumn, features: Sequence[Feature], config: EncoderConfig | None = None
    ) -> Encoder:
        """Like `fit`, with one column in memory at a time."""
        return _fit(read_column, features, config or EncoderConfig(), None, keep=False)[0]

    @classmethod
    def fit_transform(
        cls, read_column: ReadColumn, features: Sequence[Feature], config: EncoderConfig | None = None
    ) -> tuple[Encoder, EncodedRows]:
        """`fit_columns` and the training rows encoded: every string column is read and hashed once.

        Holds the result, 4 more bytes for each category, and some columns.
        """
        encoder, hashed = _fit(read_column, features, config or EncoderConfig(), None, keep=True)
        return encoder, encoder._encode_columns(read_column, hashed)

    def extended(self, read_column: ReadColumn, *, features: Sequence[Feature]) -> Encoder:
        """An encoder for newer rows, whose inputs a model of this one can go on with (see `row_mapping`).

        Seed, limits, the transforms of numbers and the widths of bags stay. Values that own a row keep it, and values
        that are frequent in the new rows get one; when that makes more than `max_categories`, the most frequent in the
        new rows stay.

        Args:
            read_column: gives columns of the new rows.
            features: of the new rows.

        Raises:
            ArtifactError: `features` are not those of this encoder; names the difference.
        """
        check_same_features(self.features, features)
        return _fit(read_column, self.features, self.config, self, keep=False)[0]

    def extended_transform(
        self, read_column: ReadColumn, *, features: Sequence[Feature]
    ) -> tuple[Encoder, EncodedRows]:
        """`extended` and the new rows encoded, as `fit_transform` does."""
        check_same_features(self.features, features)
        encoder, hashed = _fit(read_column, self.features, self.config, self, keep=True)
        return encoder, encoder._encode_columns(read_column, hashed)

    def transform(self, table: pa.Table) -> EncodedRows:
        """Encode a table.

        Args:
            table: has the columns of `features`, others are ignored; nulls and unseen values are allowed anywhere.

        Raises:
            ArtifactError: a column is missing or has a type that does not fit its kind.
        """
        return self.transform_batches(table.to_batches(max_chunksize=_CHUNK_ROWS), num_rows=table.num_rows)

    def transform_pairs(self, users: pa.Table, candidates: pa.Table, user_of: NDArray[np.int64]) -> EncodedRows:
        """Encode candidates of several users; what a user's candidates have in common is encoded once.

        Args:
            users: (num_users,) with the columns of `features` on the user's side (see `Feature.side`).
            candidates: (num_rows,) with the other columns.
            user_of: (num_rows,) row of `users` that each candidate is for.

        Raises:
            ArtifactError: a column is missing or has a type that does not fit its kind.
        """
        of_user = {feature.name for feature in self.features if feature.side is Side.USER}
        check_columns([feature for feature in self.features if feature.name in of_user], users.column_names)
        check_columns([feature for feature in self.features if feature.name not in of_user], candidates.column_names)
        names = [feature.name for feature in self.features]
        user_rows = self.transform(_with_nulls(users, names, of_user))
        rows = self.transform(_with_nulls(candidates, names, set(names) - of_user))
        return with_user_side(rows, user_rows, user_of)

    def transform_batches(self, batches: Iterable[pa.RecordBatch], *, num_rows: int) -> EncodedRows:
        """Encode a stream of record batches that have `num_rows` rows in all; holds one batch and the result."""
        rows = RowWriter(self.spec, self.fields, num_rows)
        hashers = {field.state.name: ColumnHasher(seed=self.config.seed) for field in self.fields}
        start = 0
        for batch in batches:
            check_columns(self.features, batch.schema.names)
            names = [field.state.name for field in self.categorical_fields]
            rows.write_categories(start, [[_hash(name, hashers[name], batch.column(name))] for name in names])
            for place, field in enumerate(self.bag_fields):
                name = field.state.name
                flat, lengths = flatten_lists(name, batch.column(name))
                rows.append_bag(place, _hash(name, hashers[name], flat), lengths)
            raw = np.empty((batch.num_rows, len(self._numeric.columns)))
            for place, column in enumerate(self._numeric.columns):
                raw[:, place] = numeric_values(column.name, batch.column(column.name))
            self._numeric.encode(raw, rows.numeric[start : start + batch.num_rows])
            start += batch.num_rows
        return rows.finish()

    def _encode_columns(self, read_column: ReadColumn, hashed: _HashedRows) -> EncodedRows:
        """Encode column by column what was hashed to fit."""
        rows = RowWriter(self.spec, self.fields, hashed.num_rows)
        names = [field.state.name for field in self.categorical_fields]
        rows.write_categories(0, [[column for column, _ in hashed.columns[name]] for name in names])
        for place, field in enumerate(self.bag_fields):
            for column, lengths in hashed.columns[field.state.name]:
                rows.append_bag(place, column, lengths)
        numbers = (
            encoded
            for place, column in enumerate(self._numeric.columns)
            for encoded in self._numeric.encode_column(place, numeric_values(column.name, read_column(column.name)))
        )
        interleave(rows.numeric, numbers)
        return rows.finish()

    def write(self, path: Path) -> None:
        """Write as JSON."""
        self._state.write(path)

    @classmethod
    def read(cls, path: Path) -> Encoder:
        """Read back.

        Raises:
            ArtifactError: the file is absent or not an encoder.
        """
        return cls(_EncoderState.read(path))


def _with_nulls(table: pa.Table, names: Sequence[str], kept: set[str]) -> pa.Table:
    """The named columns, null but for those kept."""
    return pa.table({name: table[name] if name in kept else pa.nulls(table.num_rows) for name in names})


def check_columns(features: Sequence[Feature], names: Sequence[str]) -> None:
    """Raise ArtifactError, naming them, when columns of features are absent."""
    if missing := [feature.name for feature in features if feature.name not in set(names)]:
        raise ArtifactError(
            f"the rows lack {len(missing)} of the {len(features)} features that the model reads: {', '.join(missing)}; "
            "join the feature service that the model was trained on (nulls are allowed, absent columns are not)"
        )


def check_same_features(old: Sequence[Feature], new: Sequence[Feature]) -> None:
    """Raise ArtifactError, naming the difference, unless both are the same features, in whatever order."""
    before, now = {feature.name: feature for feature in old}, {feature.name: feature for feature in new}
    if differences := [
        f"{text} {', '.join(sorted(names))}"
        for text, names in (
            ("gone:", before.keys() - now.keys()),
            ("new:", now.keys() - before.keys()),
            ("of another kind or origin:", {name for name in before.keys() & now.keys() if before[name] != now[name]}),
        )
        if names
    ]:
        raise ArtifactError(
            f"the features are not those of the model to start from ({'; '.join(differences)}): build the training set "
            "with the feature service and mapping of that model, or train from the beginning"
        )


def open_parquet(path: Path, features: Sequence[Feature]) -> pq.ParquetFile:
    """A Parquet file whose strings are read as dictionaries, as they mostly lie there: three times as fast to encode.

    Read from it one column (`lambda name: file.read([name])[name]`, for `Encoder.fit_transform`) or batches
    (`file.iter_batches(columns=…)`, for `Encoder.transform_batches`). Lists are read as they are: Arrow (26.0) has no
    dictionaries in lists that span row groups.
    """
    categories = {feature.name for feature in features if feature.kind is ColumnKind.CATEGORICAL}
    schema = pq.read_schema(path)
    strings = [field.name for field in schema if field.name in categories and pa.types.is_string(field.type)]
    return pq.ParquetFile(path, read_dictionary=strings)


@dataclass(frozen=True)
class _HashedRows:
    """Columns of categories and bags as they were hashed to fit."""

    num_rows: int
    columns: dict[str, list[tuple[HashedColumn, NDArray[np.int64]]]]
    """By feature, chunks of values and how many each row has; the lengths of a category are empty."""


def _fit(
    read_column: ReadColumn,
    features: Sequence[Feature],
    config: EncoderConfig,
    previous: Encoder | None,
    *,
    keep: bool,
) -> tuple[Encoder, _HashedRows]:
    """Fit, or extend `previous`; with `keep`, hand on the hashed columns."""
    if unknown := sorted(config.fields.keys() - {f.name for f in features if f.kind is not ColumnKind.NUMERIC}):
        raise TrainingError(f"the encoder's `fields` name {', '.join(unknown)}: not among the categorical features")
    # A sequence borrows the rows of item_id only when the model reads item_id as well.
    shares_items = any(f.name == ITEM_FIELD and f.kind is ColumnKind.CATEGORICAL for f in features)
    fields: list[FieldState] = []
    numeric: list[NumericColumn] = []
    hashed: dict[str, list[tuple[HashedColumn, NDArray[np.int64]]]] = {}
    num_rows = 0
    for feature in features:
        column = read_column(feature.name)
        num_rows = len(column)
        if feature.kind is ColumnKind.NUMERIC:
            values = numeric_values(feature.name, column)
            if previous is None and (fitted := fit_numeric(feature.name, values, num_boundaries=config.num_bins - 1)):
                numeric.append(fitted)
            continue
        chunks = _hash_chunks(feature, column, seed=config.seed)
        borrows = feature.kind is ColumnKind.SEQUENCE and shares_items
        fields.append(_fit_field(feature, chunks, config, previous, borrows=borrows))
        if keep:
            hashed[feature.name] = chunks
    if previous is not None:
        numeric = list(previous._state.numeric)
    empty = [f.name for f in features if f.kind is ColumnKind.NUMERIC and f.name not in {c.name for c in numeric}]
    for name in empty:
        logger.warning("feature %s is missing in all training rows: the model does not read it", name)
    if not fields and not numeric:
        raise TrainingError(
            f"all {len(features)} features are missing in the training rows ({', '.join(empty[:5])}…): "
            "there is nothing to learn from; check the mapping's features"
        )
    state = _EncoderState(config=config, features=tuple(features), fields=tuple(fields), numeric=tuple(numeric))
    return Encoder(state), _HashedRows(num_rows, hashed)


def _hash(name: str, hasher: ColumnHasher, array: pa.Array) -> HashedColumn:
    try:
        return hasher.hash(array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"feature {name!r}: has type {array.type}, the model reads strings: {error}") from error


def _hash_chunks(
    feature: Feature, column: pa.ChunkedArray, *, seed: int
) -> list[tuple[HashedColumn, NDArray[np.int64]]]:
    """Chunks of a categorical column or of a bag's values; see `_HashedRows`."""
    hasher, no_lengths = ColumnHasher(seed=seed), np.empty(0, np.int64)
    if feature.kind is ColumnKind.CATEGORICAL:
        return [(_hash(feature.name, hasher, chunk), no_lengths) for chunk in column.chunks]
    flat = (flatten_lists(feature.name, chunk) for chunk in column.chunks)
    return [(_hash(feature.name, hasher, values), lengths) for values, lengths in flat]


def _fit_field(
    feature: Feature,
    chunks: Sequence[tuple[HashedColumn, NDArray[np.int64]]],
    config: EncoderConfig,
    previous: Encoder | None,
    *,
    borrows: bool,
) -> FieldState:
    """Vocabulary and width of a categorical field or a bag."""
    name, width = feature.name, 1
    if previous is not None:
        width = previous.field(name).state.width
    elif feature.kind is not ColumnKind.CATEGORICAL:
        longest = max((int(lengths.max(initial=0)) for _, lengths in chunks), default=0)
        limit = config.history_length if feature.kind is ColumnKind.SEQUENCE else config.multi_length
        width = max(1, min(limit, longest))
    if borrows:
        return FieldState(name=name, kind=feature.kind, vocabulary=None, width=width)
    vocabulary = Vocabulary.fit(
        [column for column, _ in chunks],
        min_count=config.min_count_of(name),
        max_size=config.max_categories_of(name),
        oov_buckets=config.oov_buckets_of(name),
        num_hashes=config.num_hashes,
        previous=None if previous is None else previous.field(name).vocabulary.hashes,
    )
    return FieldState(name=name, kind=feature.kind, vocabulary=vocabulary.to_text(), width=width)
