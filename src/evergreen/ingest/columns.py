"""Which columns of a log a mapping needs, and what is said when the log lacks one."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Sequence

from evergreen.contracts.errors import InputError, MappingError
from evergreen.contracts.mapping import FeatureType, Mapping, Role

_OTHER_DELIMITERS = {",": "','", ";": "';'", "\t": "'\\t'", "|": "'|'", "::": "'::'"}


def parts(columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The columns that make up an id."""
    return () if columns is None else (columns,) if isinstance(columns, str) else columns


def needed_columns(mapping: Mapping) -> dict[str, str]:
    """Columns of the log that a mapping uses, in a fixed order, each with the first key that names it."""
    wanted: list[tuple[str, str | None]] = [("timestamp.column", mapping.timestamp.column)]
    for key in ("user_id", "item_id", "request_id"):
        wanted += [(f"columns.{key}", column) for column in parts(getattr(mapping.columns, key))]
    wanted += [(f"columns.{key}", getattr(mapping.columns, key)) for key in ("category", "position", "propensity")]
    wanted += [(f"columns.{key}", getattr(mapping.columns, key)) for key in ("dwell_seconds", "click_timestamp")]
    wanted += [("label.column", mapping.label.column if mapping.label else None)]
    wanted += [("rating.column", mapping.rating.column if mapping.rating else None)]
    for role in Role:
        wanted += [(f"{role}_features.{name}", feature.column) for name, feature in mapping.features(role).items()]
    needed: dict[str, str] = {}
    for key, column in wanted:
        if column is not None:
            needed.setdefault(column, key)
    return needed


def check_mapping(mapping: Mapping) -> None:
    """Check what the mapping's own schema does not: that it makes sense as a whole, and that the encoding exists.

    Raises:
        MappingError: names the key and the value.
    """
    time, source = mapping.timestamp, mapping.source
    if time.format is not None and time.unit != "iso":
        raise MappingError(f"mapping {mapping.name}: timestamp has both unit = {time.unit!r} and a format: keep one")
    try:
        codecs.lookup(source.encoding)
    except LookupError as error:
        raise MappingError(
            f"mapping {mapping.name}: source.encoding = {source.encoding!r}: no such encoding"
        ) from error
    for key, value in (("delimiter", source.delimiter), ("quote", source.quote)):
        if value and any(c in "\r\n\0" for c in value):
            raise MappingError(f"mapping {mapping.name}: source.{key} = {value!r}: a line end or NUL cannot be it")
    if not source.quote.isascii():
        raise MappingError(f"mapping {mapping.name}: source.quote = {source.quote!r}: must be an ASCII character")
    if source.quote and source.quote in (source.delimiter or ""):
        raise MappingError(f"mapping {mapping.name}: source.quote and source.delimiter are both {source.quote!r}")
    for key in ("user_id", "item_id", "request_id"):
        if getattr(mapping.columns, key) is not None and not parts(getattr(mapping.columns, key)):
            raise MappingError(f"mapping {mapping.name}: columns.{key} is an empty list: name a column or leave it out")
    for name, feature in mapping.all_features.items():
        if feature.type is FeatureType.MULTI and not feature.separator:
            raise MappingError(f"mapping {mapping.name}: feature {name!r}: separator is empty")
    if not source.header and source.columns:
        check_columns(mapping, source.columns, f"mapping {mapping.name}: source.columns", MappingError)


def check_columns(
    mapping: Mapping, names: Sequence[str], where: str, error: type[InputError] | type[MappingError] = InputError
) -> None:
    """Check that a file has every column that the mapping names, once.

    Args:
        mapping: the mapping.
        names: the columns of the file.
        where: what to call the file.
        error: what to raise.

    Raises:
        InputError: (or `error`) lists what is missing, where the mapping names it, and what the file has.
    """
    needed = needed_columns(mapping)
    missing = [column for column in needed if column not in names]
    if missing:
        lines = [f"  {column!r} ({needed[column]}){_suggestion(column, names)}" for column in missing]
        listed = ", ".join(map(repr, names[:60])) + (" …" if len(names) > 60 else "")
        raise error(
            f"{where}: {'a column is' if len(missing) == 1 else f'{len(missing)} columns are'} missing:\n"
            + "\n".join(lines)
            + f"\nIt has {len(names)}: {listed}{_delimiter_hint(names)}"
        )
    twice = [column for column in needed if list(names).count(column) > 1]
    if twice:
        raise error(f"{where}: column {twice[0]!r} ({needed[twice[0]]}) appears twice: rename one of them")


def _suggestion(column: str, names: Sequence[str]) -> str:
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(column.casefold(), list(by_folded), n=3, cutoff=0.6)
    return f": did you mean {' or '.join(repr(by_folded[name]) for name in near)}?" if near else ""


def _delimiter_hint(names: Sequence[str]) -> str:
    if len(names) != 1:
        return ""
    counts = {shown: names[0].count(delimiter) for delimiter, shown in _OTHER_DELIMITERS.items()}
    best = max(counts, key=lambda shown: counts[shown])
    return f"\nOnly one column was found: is the delimiter {best}? Set source.delimiter" if counts[best] else ""
