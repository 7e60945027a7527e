"""The event schema as SQL: what every row is checked for, and what its values become.

One query reads a block and gives, for each row, the reason why it breaks the schema (the first in a fixed order), the
reason why the mapping leaves it out, and its values. It is built in layers, each of which reads the one before: `raw`
(absent values are NULL), `parsed` (also as doubles, where the mapping wants numbers), `typed` (values of the schema,
NULL where they cannot be had), and the outermost, which compares raw with typed.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import pyarrow as pa

from evergreen.contracts.instant import to_micros
from evergreen.contracts.mapping import FeatureColumn, FeatureType, LogKind, Mapping
from evergreen.contracts.snapshot import event_schema
from evergreen.ingest.columns import needed_columns, parts

BLOCK = "block"
"""Name under which a block's table, with the two columns below, is registered."""
ROW = "_row"
ORDINAL = "_ordinal"
TIME_US = "_time_us"
"""Unix time in microseconds; int64."""
REASON = "_reason"
LEFT_OUT = "_left_out"

NEGATIVE_LABEL = "label: negative"
AT_OR_AFTER_AS_OF = "at or after as_of"

_EARLIEST_US = 631_152_000_000_000  # 1990-01-01
_LATEST_US = 4_102_444_800_000_000  # 2100-01-01
_UNITS_US = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_MAX_FLOAT32 = "3.4028234e38"
_MAX_INT32 = 2**31 - 1

Check = tuple[str, str]
"""A condition under which a row is refused, and SQL of the reason."""


def value_schema(mapping: Mapping) -> pa.Schema:
    """Columns that the query gives beside row number and reasons: the snapshot's, with TIME_US for its first two."""
    fields = [field for field in event_schema(mapping) if field.name not in ("event_id", "event_timestamp")]
    return pa.schema([pa.field(TIME_US, pa.int64()), *fields])


def block_query(mapping: Mapping, types: pa.Schema, as_of: datetime | None) -> str:
    """SQL that checks and converts one block.

    Args:
        mapping: the mapping.
        types: the block's columns; see `Block` for the types they may have.
        as_of: rows at or after this time are left out.
    """
    return _Query(mapping, types, as_of).sql()


def literal(text: str) -> str:
    """A string as SQL."""
    return "'" + text.replace("'", "''") + "'"


def _select(expressions: dict[str, str]) -> str:
    return ",\n  ".join(f"{sql} AS {name}" for name, sql in expressions.items())


def _first(checks: Iterator[Check]) -> str:
    cases = [f"WHEN {condition} THEN {reason}" for condition, reason in checks]
    return "\n    ".join(["CASE", *cases, "END"]) if cases else "CAST(NULL AS VARCHAR)"


class _Query:
    def __init__(self, mapping: Mapping, types: pa.Schema, as_of: datetime | None) -> None:
        self.mapping = mapping
        self.types = {name: types.field(name).type for name in needed_columns(mapping)}
        self.as_of = as_of
        self.names = {column: f"c{i}" for i, column in enumerate(self.types)}
        self.doubles: dict[str, str] = {}  # name in `parsed` -> SQL over `raw`; filled while the layers above are built

    def sql(self) -> str:
        mapping, columns = self.mapping, self.mapping.columns
        typed = {
            TIME_US: self._time(),
            **{key: self._id(getattr(columns, key)) for key in ("request_id", "user_id", "item_id")},
            "category": self._category(),
            "position": self._integer(columns.position),
            "_label": self._label(),
            "_click_us": self._click_time(),
            "rating": self._number(mapping.rating.column if mapping.rating else None),
            "dwell_seconds": self._number(columns.dwell_seconds),
            "propensity": self._number(columns.propensity),
            **{f"f_{name}": self._feature(feature) for name, feature in mapping.all_features.items()},
        }
        final = {
            TIME_US: TIME_US,
            **{key: key for key in ("request_id", "user_id", "item_id", "category")},
            "position": "CAST(position AS INTEGER)",
            "clicked": "_label" if mapping.kind is LogKind.IMPRESSIONS else "CAST(NULL AS BOOLEAN)",
            "click_timestamp": "make_timestamp(_click_us)",
            **{key: f"TRY_CAST({key} AS FLOAT)" for key in ("rating", "dwell_seconds", "propensity")},
            **{name: f"f_{name}" for name in mapping.all_features},
        }
        outcome = {REASON: _first(self._checks()), LEFT_OUT: _first(self._left_out())}
        raw = {name: self._raw(column) for column, name in self.names.items()}
        parsed = ["*", *([_select(self.doubles)] if self.doubles else [])]
        return (
            f"WITH raw AS (SELECT {', '.join([ROW, ORDINAL, *([_select(raw)] if raw else [])])} FROM {BLOCK}),\n"
            f"parsed AS (SELECT {', '.join(parsed)} FROM raw),\n"
            f"typed AS (SELECT *, {_select(typed)} FROM parsed)\n"
            f"SELECT {ROW}, {_select(outcome)}, {_select(final)} FROM typed"
        )

    # Layer one: the log's columns, with NULL for what is absent.

    def _raw(self, column: str) -> str:
        quoted = '"' + column.replace('"', '""') + '"'
        if not pa.types.is_string(self.types[column]):
            return quoted
        absent = dict.fromkeys(("", *self.mapping.source.null_values))
        return f"CASE WHEN {quoted} IN ({', '.join(map(literal, absent))}) THEN NULL ELSE {quoted} END"

    # Layer two: values.

    def _text(self, column: str, *, whole_numbers: bool = True) -> str:
        """Text. Whole numbers in a column of floats lose their '.0': such columns are integers with gaps."""
        name, type_ = self.names[column], self.types[column]
        if pa.types.is_string(type_):
            return name
        if pa.types.is_list(type_):
            return f"array_to_string({name}, '|')"
        text = f"CAST({name} AS VARCHAR)"
        if pa.types.is_floating(type_) and whole_numbers:
            whole = f"CAST(CAST({name} AS BIGINT) AS VARCHAR)"
            return f"CASE WHEN {name} = trunc({name}) AND abs({name}) < 9e18 THEN {whole} ELSE {text} END"
        return text

    def _id(self, columns: str | tuple[str, ...] | None) -> str:
        texts = [self._text(column) for column in parts(columns)]
        return " || '|' || ".join(f"({text})" for text in texts) or "CAST(NULL AS VARCHAR)"

    def _category(self) -> str:
        column = self.mapping.columns.category
        if column is None:
            return "CAST(NULL AS VARCHAR)"
        multi = [f for f in self.mapping.all_features.values() if f.column == column and f.type is FeatureType.MULTI]
        return f"list_extract({self._list(multi[0])}, 1)" if multi else self._text(column)

    def _list(self, feature: FeatureColumn) -> str:
        name = self.names[feature.column]
        if not pa.types.is_list(self.types[feature.column]):
            name = f"string_split({self._text(feature.column)}, {literal(feature.separator)})"
        values = f"list_filter(list_transform({name}, lambda x: trim(x)), lambda x: x <> '')"
        return f"CASE WHEN len({values}) > 0 THEN {values} END"

    def _feature(self, feature: FeatureColumn) -> str:
        match feature.type:
            case FeatureType.NUMERIC:
                return self._number(feature.column, booleans=True)
            case FeatureType.CATEGORICAL:
                return self._text(feature.column)
            case FeatureType.MULTI:
                return self._list(feature)

    def _number(self, column: str | None, *, booleans: bool = False) -> str:
        """A double, or NULL for what is not a finite number."""
        if column is None:
            return "CAST(NULL AS DOUBLE)"
        name, type_ = self.names[column], self.types[column]
        if pa.types.is_integer(type_) or pa.types.is_boolean(type_):
            return f"CAST({name} AS DOUBLE)"
        if pa.types.is_floating(type_):
            value = name
        elif pa.types.is_string(type_):
            # DuckDB takes 1_000 for a number; a log that writes so means text.
            value = f"CASE WHEN NOT contains({name}, '_') THEN TRY_CAST({name} AS DOUBLE) END"
            if booleans:
                value = f"coalesce({value}, CASE lower({name}) WHEN 'true' THEN 1.0 WHEN 'false' THEN 0.0 END)"
        else:
            return "CAST(NULL AS DOUBLE)"
        double = f"b{name}" if booleans else f"d{name}"
        self.doubles[double] = value
        return f"CASE WHEN isfinite({double}) THEN {double} END"

    def _integer(self, column: str | None) -> str:
        number = self._number(column)
        if column is None:
            return number
        return f"CASE WHEN {number} = trunc({number}) AND {number} BETWEEN 0 AND {_MAX_INT32} THEN {number} END"

    def _label(self) -> str:
        """TRUE, FALSE, or NULL for a value that the mapping does not know."""
        label = self.mapping.label
        if label is None:
            return "CAST(NULL AS BOOLEAN)"
        text = self._text(label.column, whole_numbers=False)
        positive = f"coalesce({text} IN ({', '.join(map(literal, label.positive))}), FALSE)"
        if label.negative == ("*",):
            return positive
        negative = f"{text} IN ({', '.join(map(literal, label.negative))})" if label.negative else "FALSE"
        return f"CASE WHEN {positive} THEN TRUE WHEN {negative} THEN FALSE END"

    def _time(self) -> str:
        """Microseconds since 1970, or NULL."""
        time = self.mapping.timestamp
        if time.start is not None:
            start, interval = round(time.start.timestamp() * 1e6), round(time.interval.total_seconds() * 1e6)
            return f"({start} + {ORDINAL} * {interval})"
        assert time.column is not None
        return self._micros(time.column)

    def _click_time(self) -> str:
        column = self.mapping.columns.click_timestamp
        return "CAST(NULL AS BIGINT)" if column is None else self._micros(column)

    def _micros(self, column: str) -> str:
        """A column that is written like the event's timestamp, as microseconds since 1970, or NULL."""
        time = self.mapping.timestamp
        name, type_ = self.names[column], self.types[column]
        if pa.types.is_timestamp(type_):  # a naive one is taken for local time, in the connection's time zone
            return f"epoch_us(TRY_CAST({name} AS TIMESTAMPTZ))"
        if time.format is not None:
            parsed = f"try_strptime({self._text(column)}, {literal(time.format)})"
            return f"epoch_us(TRY_CAST({parsed} AS TIMESTAMPTZ))"
        if time.unit == "iso":
            text = self._text(column)
            # Second try: a comma before the fraction, a space before the offset.
            mended = f"regexp_replace(replace({text}, ',', '.'), '\\s+([+-]\\d)', '\\1')"
            return f"epoch_us(coalesce(TRY_CAST({text} AS TIMESTAMPTZ), TRY_CAST({mended} AS TIMESTAMPTZ)))"
        if time.unit == "ns":  # 2^53 ns are 104 days: doubles will not do
            decimal = f"TRY_CAST(floor({self._number(column)} / 1e3) AS BIGINT)"
            return f"coalesce(TRY_CAST({name} AS BIGINT) // 1000, {decimal})"
        return f"TRY_CAST(round({self._number(column)} * {_UNITS_US[time.unit]:.0f}) AS BIGINT)"

    # Layer three: comparisons.

    def _checks(self) -> Iterator[Check]:
        mapping = self.mapping
        yield from self._time_checks()
        for key in ("user_id", "item_id"):
            if getattr(mapping.columns, key) is not None:
                yield f"{key} IS NULL", literal(f"{key}: missing")
        if mapping.label is not None:
            name = "clicked" if mapping.kind is LogKind.IMPRESSIONS else "label"
            if mapping.label.negative != ("*",):
                yield f"{self.names[mapping.label.column]} IS NULL", literal(f"{name}: missing")
            yield "_label IS NULL", literal(f"{name}: not one of the label's values")
        if mapping.columns.click_timestamp is not None:
            column = self.names[mapping.columns.click_timestamp]
            yield f"{column} IS NOT NULL AND _click_us IS NULL", literal("click_timestamp: not a time")
            yield f"_click_us < {TIME_US}", literal("click_timestamp: before the event")
            yield f"_click_us >= {_LATEST_US}", literal("click_timestamp: outside 1990-2100")
        if mapping.rating is not None:
            low, high = mapping.rating.minimum, mapping.rating.maximum
            if mapping.kind is LogKind.RATINGS:
                # A row that the label leaves out needs no rating.
                counts = "_label AND " if mapping.label is not None else ""
                yield f"{counts}{self.names[mapping.rating.column]} IS NULL", literal("rating: missing")
            yield self._is_no_number("rating", mapping.rating.column)
            counts = "_label AND " if mapping.label is not None and mapping.kind is LogKind.RATINGS else ""
            yield f"{counts}NOT rating BETWEEN {low!r} AND {high!r}", literal(f"rating: outside [{low:g}, {high:g}]")
        if mapping.columns.position is not None:
            column = self.names[mapping.columns.position]
            yield f"{column} IS NOT NULL AND position IS NULL", literal("position: not an integer >= 0")
        if mapping.columns.propensity is not None:
            yield self._is_no_number("propensity", mapping.columns.propensity)
            yield "NOT (propensity > 0 AND propensity <= 1)", literal("propensity: outside (0, 1]")
        if mapping.columns.dwell_seconds is not None:
            yield self._is_no_number("dwell_seconds", mapping.columns.dwell_seconds)
            yield f"NOT dwell_seconds BETWEEN 0 AND {_MAX_FLOAT32}", literal("dwell_seconds: negative or too large")
        for name, feature in mapping.all_features.items():
            if feature.type is FeatureType.NUMERIC:
                yield self._is_no_number(f"f_{name}", feature.column, name)

    def _is_no_number(self, value: str, column: str, name: str | None = None) -> Check:
        return f"{self.names[column]} IS NOT NULL AND {value} IS NULL", literal(f"{name or value}: not a number")

    def _time_checks(self) -> Iterator[Check]:
        time = self.mapping.timestamp
        outside = "timestamp: outside 1990-2100"
        implausible = f"{TIME_US} IS NULL OR NOT {TIME_US} BETWEEN {_EARLIEST_US} AND {_LATEST_US - 1}"
        if time.column is not None:
            name, number = self.names[time.column], self._number(time.column)
            yield f"{name} IS NULL", literal("timestamp: missing")
            if time.format is not None:
                yield f"{TIME_US} IS NULL", literal("timestamp: not in the mapping's format")
            elif pa.types.is_timestamp(self.types[time.column]):
                yield f"{TIME_US} IS NULL", literal("timestamp: not a time")
            elif time.unit == "iso":
                for unit, within in self._units_that_fit(number):
                    yield f"{TIME_US} IS NULL AND {within}", literal(f'timestamp: not a time (unit = "{unit}"?)')
                yield f"{TIME_US} IS NULL", literal("timestamp: not a time")
            else:
                yield f"{number} IS NULL", literal("timestamp: not a number")
                for unit, within in self._units_that_fit(number):
                    if unit != time.unit:
                        yield f"({implausible}) AND {within}", literal(f'{outside} (unit = "{unit}"?)')
        yield implausible, literal(outside)

    @staticmethod
    def _units_that_fit(number: str) -> Iterator[tuple[str, str]]:
        for unit, factor in _UNITS_US.items():
            yield unit, f"{number} BETWEEN {_EARLIEST_US / factor:.0f} AND {_LATEST_US / factor:.0f}"

    def _left_out(self) -> Iterator[Check]:
        if self.mapping.label is not None and self.mapping.kind is not LogKind.IMPRESSIONS:
            yield "NOT _label", literal(NEGATIVE_LABEL)
        if self.as_of is not None:
            yield f"{TIME_US} >= {to_micros(self.as_of)}", literal(AT_OR_AFTER_AS_OF)
