"""The mapping: one TOML file that says how a foreign log's columns become the event schema.

A new log needs a new mapping and no code. `Mapping.load` takes the name of a shipped mapping, a path or fsspec URL of
a TOML file, or the TOML text itself (which is how a pipeline parameter carries it to a cluster).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from datetime import timedelta
from enum import StrEnum
from importlib import resources
from typing import Annotated, Any, Literal, Self

import fsspec
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evergreen.contracts.errors import MappingError

IDENTIFIER = re.compile(r"^[a-z][a-z0-9_]{0,62}$")
RESERVED_NAMES = re.compile(
    # the event schema and the rows of a training set
    r"event_id|event_timestamp|click_timestamp|request_id|user_id|item_id|row_id|category|position|clicked|rating"
    r"|dwell_seconds|propensity|label|date|hour|weekday|request_timestamp"
    # the features that Evergreen computes
    r"|(user|item|user_category)_(events|positives|rate)_\w+|(user|item)_(first_seen|last_\w+)|user_history|item_category"
    r"|user_recent_\w+"
    r"|(user|user_positive|item)_recency_seconds|(user|item)_age_seconds"
)


class LogKind(StrEnum):
    """The three kinds of log. What a kind lacks decides how labels and negatives are made."""

    IMPRESSIONS = "impressions"
    """Every row was shown to somebody; a column says whether it was clicked."""
    INTERACTIONS = "interactions"
    """Only what people did is logged; negatives are drawn from the items that existed at that time."""
    RATINGS = "ratings"
    """Every row carries an explicit rating; the loss is squared error."""


class Role(StrEnum):
    """Whose property a feature column is; it decides which store serves it."""

    USER = "user"
    ITEM = "item"
    CONTEXT = "context"


class FeatureType(StrEnum):
    """How a feature column is encoded."""

    NUMERIC = "numeric"
    CATEGORICAL = "categorical"
    MULTI = "multi"
    """Several categories in one value, separated by `separator`."""


_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: object) -> object:
    """Turn '90s', '15m', '1h' or '7d' into a timedelta; anything else is left to pydantic."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\s*([smhd])", value)):
        return timedelta(seconds=int(match[1]) * _DURATION_UNITS[match[2]])
    return value


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(_Frozen):
    """How the bytes of the log are laid out."""

    format: Literal["csv", "parquet", "auto"] = "auto"
    """`auto` decides by the file name: *.parquet is Parquet, all else is delimited text."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=2)
    """Between fields; default: a tab for *.tsv, otherwise a comma. Two characters ('::') are allowed."""
    header: bool = True
    columns: tuple[str, ...] = ()
    """Names of all columns in order; needed when `header` is false."""
    quote: str = Field(default='"', max_length=1)
    """Empty: quotes are ordinary characters."""
    encoding: str = "utf-8"
    null_values: tuple[str, ...] = ("",)
    pattern: str = "*"
    """Glob of the files to read when the data is a folder, e.g. '**/*.csv'."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.header and not self.columns and self.format != "parquet":
            raise ValueError("source.header = false needs source.columns, the names of all columns in order")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("source.columns names a column twice")
        return self


class Timestamp(_Frozen):
    """Where event time comes from: a column, or the order of the rows."""

    column: str | None = None
    unit: Literal["s", "ms", "us", "ns", "iso"] = "iso"
    """`iso`: ISO 8601 text, or a timestamp column of a Parquet file. Otherwise a Unix time in this unit."""
    format: str | None = None
    """A strptime format for text that is not ISO 8601, e.g. '%d/%m/%Y %H:%M'."""
    timezone: str = "UTC"
    """For values that carry no offset of their own."""
    start: AwareDatetime | None = None
    """With no column, row order is time: the first row's time …"""
    interval: Duration = timedelta(seconds=1)
    """… and the time between two rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.column is None) == (self.start is None):
            raise ValueError("timestamp needs either `column`, or `start` (then the order of the rows is time)")
        return self


class Label(_Frozen):
    """Which values of a column mean yes and which mean no."""

    column: str
    positive: tuple[str, ...] = ("1", "true", "True", "TRUE", "1.0")
    negative: tuple[str, ...] = ("0", "false", "False", "FALSE", "0.0")
    """`["*"]`: every value that is not positive. For interactions, negative values are rows to leave out (counted)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if both := set(self.positive) & set(self.negative):
            raise ValueError(f"label: {sorted(both)} cannot be both positive and negative")
        if not self.positive:
            raise ValueError("label.positive is empty: no row could be a positive one")
        return self


class Rating(_Frozen):
    """An explicit rating and the range it must lie in."""

    column: str
    minimum: float = 1.0
    maximum: float = 5.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum >= self.maximum:
            raise ValueError(f"rating: minimum {self.minimum} must be below maximum {self.maximum}")
        return self


class Columns(_Frozen):
    """Which columns of the log play the parts of the event schema. Absent parts are null in the snapshot."""

    user_id: str | tuple[str, ...] | None = None
    """Several columns make one id, joined by '|'."""
    item_id: str | tuple[str, ...] | None = None
    request_id: str | tuple[str, ...] | None = None
    category: str | None = None
    """The item's category, for user x category features. Of 'a|b|c' the first is taken when it is a multi feature."""
    position: str | None = None
    propensity: str | None = None
    dwell_seconds: str | None = None
    click_timestamp: str | None = None
    """Impressions only: when it was clicked, written like the event's timestamp; absent where it was not. Without it,
    a click counts as known when the attribution window has passed."""


class FeatureColumn(_Frozen):
    """A column of the log that becomes a feature."""

    column: str
    type: FeatureType
    separator: str = "|"


class Split(_Frozen):
    """How the log is cut in time. Fractions are of the time range's rows."""

    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.15, gt=0, lt=0.5)
    validation_span: Duration | None = None
    """How much time the validation split covers, in the place of its fraction: a model that is trained again and again
    is chosen on what is newest, however long a history it learns from."""
    test_span: Duration | None = None
    """Likewise of the test split."""
    attribution_window: Duration = timedelta(0)
    """How long after an event its label may still change. It is the embargo between splits, and features count a
    label only after it."""


class Mapping(_Frozen):
    """How a foreign log becomes the event schema. See `contracts/mappings/*.toml` for the shipped ones."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    kind: LogKind
    description: str = ""
    timestamp: Timestamp
    source: Source = Source()
    columns: Columns = Columns()
    label: Label | None = None
    rating: Rating | None = None
    user_features: dict[str, FeatureColumn] = Field(default_factory=dict)
    item_features: dict[str, FeatureColumn] = Field(default_factory=dict)
    context_features: dict[str, FeatureColumn] = Field(default_factory=dict)
    split: Split = Split()
    negatives_per_positive: int = Field(default=4, ge=1, le=100)
    """Interactions only: how many items that existed at that time are drawn against each one chosen."""
    recommend_seen_items: bool = False
    """Interactions only: whether an item that the user already knows may be recommended again."""

    @model_validator(mode="before")
    @classmethod
    def _feature_shorthand(cls, data: Any) -> Any:
        """Allow `price = "numeric"` for `price = {column = "price", type = "numeric"}`, and sort by name.

        Sorted, because the order of columns must not depend on whether a mapping comes from TOML or from a manifest.
        """
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for role in Role:
            table = data.get(key := f"{role}_features")
            if isinstance(table, dict):
                data[key] = {
                    name: {"column": name, "type": value} if isinstance(value, str) else value
                    for name, value in sorted(table.items())
                }
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is LogKind.IMPRESSIONS and self.label is None:
            raise ValueError('kind = "impressions" needs [label]: the column that says whether it was clicked')
        if self.kind is LogKind.RATINGS and self.rating is None:
            raise ValueError('kind = "ratings" needs [rating]: the column with the rating and its range')
        if self.kind is LogKind.INTERACTIONS and (self.columns.user_id is None or self.columns.item_id is None):
            raise ValueError(
                'kind = "interactions" needs columns.user_id and columns.item_id: negatives are other items'
            )
        if self.columns.click_timestamp is not None:
            if self.kind is not LogKind.IMPRESSIONS:
                raise ValueError(
                    'columns.click_timestamp goes with kind = "impressions": elsewhere the event is the click'
                )
            if self.timestamp.column is None:
                raise ValueError("columns.click_timestamp needs timestamp.column: row numbers and times do not compare")
        names = [name for role in Role for name in self.features(role)]
        for name in names:
            if not IDENTIFIER.match(name):
                raise ValueError(
                    f"feature {name!r}: a name is lower case letters, digits and '_', and starts with a letter"
                )
            if RESERVED_NAMES.fullmatch(name):
                raise ValueError(f"feature {name!r}: Evergreen itself uses this name, choose another")
        targets = {source.column for source in (self.label, self.rating) if source is not None}
        targets |= {c for c in (self.columns.dwell_seconds, self.columns.click_timestamp) if c is not None}
        for name, feature in self.all_features.items():
            if feature.column in targets:
                raise ValueError(
                    f"feature {name!r} reads column {feature.column!r}, which is the label (or known only after it): "
                    "a model would learn to read the answer. Leave it out"
                )
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"features {sorted(twice)} appear in more than one role: each name once")
        return self

    def features(self, role: Role) -> dict[str, FeatureColumn]:
        """The feature columns of one role, by the name they have in the snapshot."""
        table: dict[str, FeatureColumn] = getattr(self, f"{role}_features")
        return table

    @property
    def all_features(self) -> dict[str, FeatureColumn]:
        """Feature columns of all roles, in the order user, item, context."""
        return {name: feature for role in Role for name, feature in self.features(role).items()}

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the same mapping, however it was written, has the same digest."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def shipped() -> tuple[str, ...]:
        """Names of the mappings that come with Evergreen."""
        folder = resources.files("evergreen.contracts") / "mappings"
        return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))

    @classmethod
    def load(cls, reference: str) -> Mapping:
        """Read a mapping.

        Args:
            reference: the name of a shipped mapping, the path or fsspec URL of a TOML file, or TOML text.

        Raises:
            MappingError: there is no such mapping, it is not TOML, or it breaks the schema; names the key.
        """
        text, origin = _read_reference(reference)
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MappingError(f"mapping {origin}: not valid TOML: {error}") from error
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "\n".join(
                f"  {'.'.join(str(part) for part in e['loc']) or 'mapping'}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            )
            raise MappingError(f"mapping {origin}:\n{problems}") from error


def _read_reference(reference: str) -> tuple[str, str]:
    """The TOML text behind a reference, and what to call it in an error."""
    if "\n" in reference:
        return reference, "given as text"
    if reference in Mapping.shipped():
        return (resources.files("evergreen.contracts") / "mappings" / f"{reference}.toml").read_text(), reference
    try:
        with fsspec.open(reference, "rt", encoding="utf-8") as file:
            return file.read(), reference
    except (OSError, ValueError, ImportError) as error:
        raise MappingError(
            f"mapping {reference!r}: neither a shipped mapping ({', '.join(Mapping.shipped())}) "
            f"nor a file that can be read: {error}"
        ) from error
