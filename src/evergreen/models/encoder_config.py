"""How features are encoded: what is missing, rare, unseen or of many values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evergreen.contracts.artifact import JsonModel


class FieldLimits(JsonModel):
    """What one field does otherwise than `EncoderConfig` says; None: as it says."""

    min_count: int | None = Field(default=None, ge=1)
    max_categories: int | None = Field(default=None, ge=0)
    oov_buckets: int | None = Field(default=None, ge=1)


class EncoderConfig(JsonModel):
    """How features are encoded.

    - A missing category has a row of its own in the table. A missing number is the mean, and an indicator says so where
      training rows lacked it, too. A missing history or a missing set of tags is an empty one.
    - A rare category (fewer than `min_count` training rows, or beyond the `max_categories` most frequent) and one that
      training never saw share the field's `oov_buckets` rows, chosen by hash; so rare values train the rows that new
      ones will use. Of these rows each value takes one, or with `num_hashes` 2 the sum of two.
    - Of several values (a history, tags) those without a row of their own are left out: what is not known of an item
      says nothing of a user's taste. A history keeps its last `history_length` known items, tags the first
      `multi_length`.
    - Numbers are logarithms where the tail is heavy, standardised, and cut at 10 standard deviations.

    With one shared row, that row starts at zero and adds nothing until training says otherwise. Hashing into a table
    of fixed size, for ids that are too many or change too fast to own rows, is `max_categories=0, oov_buckets=2**18`,
    for all fields or in `fields` for one; then every row starts like any other, and bags keep all values. Between the
    two, `max_categories=2**18, oov_buckets=2**16` gives the head of a field its own rows and hashes the tail.
    """

    seed: int = 0
    """Of the hash."""
    min_count: int = Field(default=2, ge=1)
    """A category rarer than this in the training rows is treated as unseen, which is how the unseen row is trained."""
    max_categories: int = Field(default=1 << 20, ge=0)
    """The most values of one field that own a row; 0 hashes all values."""
    oov_buckets: int = Field(default=1, ge=1)
    """Rows that rare and unseen values of a field share, chosen by hash."""
    num_hashes: Literal[1, 2] = 1
    """Shared rows that a value is the sum of, where there are more than one. 2 tells apart many more values than rows
    (see `Vocabulary`), and costs a second lookup for every value; 1, because frequent values have rows of their own."""
    fields: dict[str, FieldLimits] = Field(default_factory=dict)
    """By name of a feature, limits of its own."""
    history_length: int = Field(default=50, ge=1)
    """How many of a user's last items a model reads."""
    multi_length: int = Field(default=16, ge=1)
    """How many values of a multi-valued feature a model reads."""
    num_bins: int = Field(default=16, ge=2)
    """Quantile bins of a numeric column, for models that read it by bin."""

    def min_count_of(self, name: str) -> int:
        """`min_count` of a field."""
        own = self.fields.get(name, FieldLimits()).min_count
        return self.min_count if own is None else own

    def max_categories_of(self, name: str) -> int:
        """`max_categories` of a field."""
        own = self.fields.get(name, FieldLimits()).max_categories
        return self.max_categories if own is None else own

    def oov_buckets_of(self, name: str) -> int:
        """`oov_buckets` of a field."""
        own = self.fields.get(name, FieldLimits()).oov_buckets
        return self.oov_buckets if own is None else own
