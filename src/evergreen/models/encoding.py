"""From a table of features to the inputs of a model. Fitted on training rows, shipped with the weights.

One encoder, one shared table: every categorical field and every bag (a user's history, tags) is a range of rows in the
same table; a history uses the rows of item_id, so what a model learns of an item holds in both places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from evergreen.contracts.artifact import JsonModel
from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.training_set import ColumnKind, Feature
from evergreen.models.inputs import PAD, Bag, BagInput, CategoricalInput, EncodedRows, InputSpec, NumericInput
from evergreen.models.numeric import NumericColumn, NumericEncoder, fit_numeric, numeric_values
from evergreen.models.vocabulary import Vocabulary, flatten_lists

logger = logging.getLogger(__name__)

ITEM_FIELD = "item_id"
"""The field whose rows a SEQUENCE feature (a list of item ids) shares."""

_CHUNK_ROWS = 65_536


class EncoderConfig(JsonModel):
    """How features are encoded."""

    seed: int = 0
    """Of the hash."""
    min_count: int = Field(default=2, ge=1)
    """A category rarer than this in the training rows is treated as unseen, which is how the unseen row is trained."""
    max_categories: int = Field(default=1 << 20, ge=1)
    """The most values of one field that own a row."""
    oov_buckets: int = Field(default=1, ge=1)
    """Rows that rare and unseen values of a field share, chosen by hash."""
    history_length: int = Field(default=50, ge=1)
    """How many of a user's last items a model reads."""
    multi_length: int = Field(default=16, ge=1)
    """How many values of a multi-valued feature a model reads."""
    num_bins: int = Field(default=16, ge=2)
    """Quantile bins of a numeric column, for models that read it by bin."""


class _FieldState(JsonModel):
    name: str
    kind: ColumnKind
    vocabulary: str | None
    """Base64 of the kept hashes; None when the field shares the rows of item_id."""
    width: int
    """Values a row may have: 1 for a category."""


class _EncoderState(JsonModel):
    config: EncoderConfig
    features: tuple[Feature, ...]
    fields: tuple[_FieldState, ...]
    numeric: tuple[NumericColumn, ...]


@dataclass(frozen=True)
class _EncodedField:
    state: _FieldState
    vocabulary: Vocabulary
    start: int
    """First row in the shared table."""


class Encoder:
    """Turns tables of features into `EncodedRows`. Made by `fit` or `read`; its state is plain JSON."""

    def __init__(self, state: _EncoderState) -> None:
        self._state = state
        config = state.config
        own: dict[str, tuple[Vocabulary, int]] = {}
        start = 1  # row 0 is padding
        for field in state.fields:
            if field.vocabulary is not None:
                vocabulary = Vocabulary.from_text(field.vocabulary, seed=config.seed, oov_buckets=config.oov_buckets)
                own[field.name] = (vocabulary, start)
                start += vocabulary.num_rows
        self._fields = [
            _EncodedField(field, *own[field.name if field.vocabulary is not None else ITEM_FIELD])
            for field in state.fields
        ]
        self._categorical = [field for field in self._fields if field.state.kind is ColumnKind.CATEGORICAL]
        self._bags = [field for field in self._fields if field.state.kind is not ColumnKind.CATEGORICAL]
        self._numeric = NumericEncoder(state.numeric)
        self.spec = self._make_spec(num_embeddings=start, starts=[first for _, first in own.values()])

    def _make_spec(self, *, num_embeddings: int, starts: list[int]) -> InputSpec:
        columns, indicators = self._numeric.columns, self._numeric.indicator_of
        side = {feature.name: feature.side for feature in self._state.features}
        shared = range(1 + self._state.config.oov_buckets)
        return InputSpec(
            categorical=tuple(
                CategoricalInput(
                    name=field.state.name,
                    side=side[field.state.name],
                    start=field.start,
                    num_rows=field.vocabulary.num_rows,
                )
                for field in self._categorical
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
                for field in self._bags
            ),
            num_embeddings=num_embeddings,
            untrained_rows=(PAD, *(start + row for start in starts for row in shared)),
        )

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns that a table must have."""
        return self._state.features

    @property
    def config(self) -> EncoderConfig:
        """How it was fitted."""
        return self._state.config

    @classmethod
    def fit(cls, table: pa.Table, features: Sequence[Feature], config: EncoderConfig | None = None) -> Encoder:
        """Measure the training rows.

        Args:
            table: the training rows, with a column for each feature.
            features: what the model may read.
            config: how to encode.

        Raises:
            ArtifactError: the table lacks a column, or one has a type that does not fit its kind.
            TrainingError: no feature has a value.
        """
        check_columns(features, table.column_names)
        return cls.fit_columns(table.column, features, config)

    @classmethod
    def fit_columns(
        cls,
        read_column: Callable[[str], pa.ChunkedArray],
        features: Sequence[Feature],
        config: EncoderConfig | None = None,
    ) -> Encoder:
        """Like `fit`, with one column in memory at a time."""
        config = config or EncoderConfig()
        # A sequence borrows the rows of item_id only when the model reads item_id as well.
        shares_items = any(f.name == ITEM_FIELD and f.kind is ColumnKind.CATEGORICAL for f in features)
        fields: list[_FieldState] = []
        numeric: list[NumericColumn] = []
        for feature in features:
            column = read_column(feature.name)
            if feature.kind is ColumnKind.NUMERIC:
                values = numeric_values(feature.name, column)
                fitted = fit_numeric(feature.name, values, num_boundaries=config.num_bins - 1)
                if fitted is not None:
                    numeric.append(fitted)
            else:
                fields.append(_fit_field(feature, column, config, shares_items=shares_items))
        empty = [f.name for f in features if f.kind is ColumnKind.NUMERIC and f.name not in {c.name for c in numeric}]
        for name in empty:
            logger.warning("feature %s is missing in all training rows: the model does not read it", name)
        if not fields and not numeric:
            raise TrainingError(
                f"all {len(features)} features are missing in the training rows ({', '.join(empty[:5])}…): "
                "there is nothing to learn from; check the mapping's features"
            )
        return cls(_EncoderState(config=config, features=tuple(features), fields=tuple(fields), numeric=tuple(numeric)))

    def transform(self, table: pa.Table) -> EncodedRows:
        """Encode a table.

        Args:
            table: has the columns of `features`, others are ignored; nulls and unseen values are allowed anywhere.

        Raises:
            ArtifactError: a column is missing or has a type that does not fit its kind.
        """
        return self.transform_batches(table.to_batches(max_chunksize=_CHUNK_ROWS), num_rows=table.num_rows)

    def transform_batches(self, batches: Iterable[pa.RecordBatch], *, num_rows: int) -> EncodedRows:
        """Encode a stream of record batches that have `num_rows` rows in all; holds one batch and the result."""
        categorical = np.empty((num_rows, len(self._categorical)), dtype=np.int32)
        numeric = np.empty((num_rows, self._numeric.width), dtype=np.float32)
        values: list[list[NDArray[np.int32]]] = [[] for _ in self._bags]
        lengths: list[list[NDArray[np.int64]]] = [[] for _ in self._bags]
        done = 0
        for batch in batches:
            check_columns(self.features, batch.schema.names)
            rows = slice(done, done + batch.num_rows)
            for place, field in enumerate(self._categorical):
                categorical[rows, place] = field.start + field.vocabulary.rows(batch.column(field.state.name))
            raw = np.empty((batch.num_rows, len(self._numeric.columns)))
            for place, column in enumerate(self._numeric.columns):
                raw[:, place] = numeric_values(column.name, batch.column(column.name))
            self._numeric.encode(raw, numeric[rows])
            for place, field in enumerate(self._bags):
                kept, length = _encode_bag(field, batch.column(field.state.name))
                values[place].append(kept)
                lengths[place].append(length)
            done += batch.num_rows
        bags = tuple(
            Bag(
                np.concatenate([np.empty(0, np.int32), *value]),
                np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.empty(0, np.int64), *length]))]),
            )
            for value, length in zip(values, lengths, strict=True)
        )
        return EncodedRows(self.spec, categorical, numeric, bags)

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


def check_columns(features: Sequence[Feature], names: Sequence[str]) -> None:
    """Raise ArtifactError, naming them, when columns of features are absent."""
    if missing := [feature.name for feature in features if feature.name not in set(names)]:
        raise ArtifactError(
            f"the rows lack {len(missing)} of the {len(features)} features that the model reads: {', '.join(missing)}; "
            "join the feature service that the model was trained on (nulls are allowed, absent columns are not)"
        )


def _fit_field(feature: Feature, column: pa.ChunkedArray, config: EncoderConfig, *, shares_items: bool) -> _FieldState:
    """Vocabulary and width of a categorical field or a bag."""
    if feature.kind is ColumnKind.CATEGORICAL:
        arrays, width = list(column.chunks), 1
    else:
        flat = [flatten_lists(feature.name, chunk) for chunk in column.chunks]
        arrays = [values for values, _ in flat]
        longest = max((int(lengths.max(initial=0)) for _, lengths in flat), default=0)
        limit = config.history_length if feature.kind is ColumnKind.SEQUENCE else config.multi_length
        width = max(1, min(limit, longest))
    if feature.kind is ColumnKind.SEQUENCE and shares_items:
        return _FieldState(name=feature.name, kind=feature.kind, vocabulary=None, width=width)
    vocabulary = Vocabulary.fit(
        arrays,
        seed=config.seed,
        min_count=config.min_count,
        max_size=config.max_categories,
        oov_buckets=config.oov_buckets,
    )
    return _FieldState(name=feature.name, kind=feature.kind, vocabulary=vocabulary.to_text(), width=width)


def _encode_bag(field: _EncodedField, array: pa.Array) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Table rows of a bag's known values, and how many each row of the table has.

    Unseen values are left out: what is not known of an item says nothing of a user's taste. Of a history that is too
    long the last items are kept, of a multi-valued feature the first values.
    """
    flat, lengths = flatten_lists(field.state.name, array)
    rows = field.vocabulary.rows(flat)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    known = field.vocabulary.is_known(rows)
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
