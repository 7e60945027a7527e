"""Cut delimited text into records, with true line numbers, however broken the text is.

The fast path is vectorised: a line whose quotes are all in place is a record. Only the others are read character by
character: a quoted field may span lines (RFC 4180), and a quote that nothing closes costs its own line and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_RECORD_BYTES = 1 << 20
"""A quoted field that is longer than this is taken for one whose closing quote is missing."""

UNTERMINATED = "unterminated quote"
NUL = "NUL byte"
STRAY_RETURN = "stray carriage return"

_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True)
class Syntax:
    """How fields and records are told apart."""

    delimiter: bytes
    quote: bytes
    """Empty: quotes are ordinary characters."""
    num_fields: int
    encoding: str = "utf-8"
    """Only the name for messages: the bytes are UTF-8 wherever the file kept its promise."""


@dataclass
class Records:
    """Records of one piece of text. Record i is `data[starts[i]:ends[i]]`, newline included."""

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lines: NDArray[np.int64]
    """Physical line that each record starts on."""
    consumed: int
    """Bytes of `data` that the records cover; the rest is the start of a record that continues in the next piece."""
    num_lines: int
    """Physical lines in those bytes."""
    broken: dict[int, str] = field(default_factory=dict)
    """Reason by record, for the records that cannot be read."""

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, index: int) -> str:
        """The record as text, for people: bytes that are no text are shown escaped."""
        raw = self.data[self.starts[index] : self.ends[index]].rstrip(b"\r\n")
        return raw.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def cut_records(data: bytes, syntax: Syntax, *, first_line: int, at_end: bool) -> Records:
    """Cut text into records.

    Args:
        data: text that is empty or whose last byte is a newline, starting at a record.
        syntax: delimiter, quote and number of fields.
        first_line: number of the first physical line.
        at_end: no more text follows; what is open now stays open.

    Returns:
        The records, without blank lines.
    """
    if not data:
        nothing = np.empty(0, np.int64)
        return Records(data, nothing, nothing, nothing, consumed=0, num_lines=0)
    content = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(content == _NEWLINE).astype(np.int64) + 1
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    keep = np.ones(len(ends), np.bool_)
    unterminated: list[int] = []
    num_lines = len(ends)
    if syntax.quote and syntax.quote in data:
        suspicious = _lines_with_loose_quotes(content, ends, syntax)
        num_lines = _resolve(data, syntax, starts, ends, suspicious, keep, unterminated, at_end)
    consumed = int(starts[num_lines]) if num_lines < len(starts) else len(data)
    lengths = ends - starts
    keep &= ~((lengths == 1) | ((lengths == 2) & (content[starts] == _RETURN)))  # blank lines
    keep[num_lines:] = False
    kept = np.flatnonzero(keep)
    starts, ends = starts[kept], ends[kept]
    broken = dict.fromkeys(np.searchsorted(kept, unterminated).tolist(), UNTERMINATED)
    for record, reason in _bad_bytes(data[:consumed], syntax, starts, ends):
        broken.setdefault(record, reason)
    return Records(data, starts, ends, kept + first_line, consumed, num_lines, broken)


def _lines_with_loose_quotes(content: NDArray[np.uint8], ends: NDArray[np.int64], syntax: Syntax) -> NDArray[np.int64]:
    """Lines where a quote is not where a well-formed line has it: field start, field end, or doubled."""
    quote = syntax.quote[0]
    places = np.flatnonzero(content == quote)
    line_of = np.searchsorted(ends, places, side="right")
    if len(syntax.delimiter) > 1:  # what is before a quote does not tell whether a delimiter ends there: ':::"'
        return np.unique(line_of)
    first_of_line = np.flatnonzero(np.diff(line_of, prepend=-1))
    nth = np.arange(len(places)) - np.repeat(first_of_line, np.diff(np.append(first_of_line, len(places))))
    delimiter = syntax.delimiter[0]
    before = content[places - 1]  # of the first byte this is the last, a newline, which is right
    after = content[places + 1]  # the last byte is a newline, no quote
    opens_well = (before == delimiter) | (before == _NEWLINE) | (before == quote)
    closes_well = (after == delimiter) | (after == _NEWLINE) | (after == _RETURN) | (after == quote)
    in_place = np.where(nth % 2 == 0, opens_well, closes_well)
    quotes_in_line = np.bincount(line_of, minlength=len(ends))
    misplaced = np.bincount(line_of[~in_place], minlength=len(ends))
    return np.flatnonzero((quotes_in_line % 2 == 1) | (misplaced > 0))


def _resolve(
    data: bytes,
    syntax: Syntax,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    suspicious: NDArray[np.int64],
    keep: NDArray[np.bool_],
    unterminated: list[int],
    at_end: bool,
) -> int:
    """Read the suspicious lines one by one; join those that a quoted field spans. Returns how many are settled."""
    settled = 0
    for line in map(int, suspicious):
        if line < settled:
            continue
        end, num_fields, clean = _scan(data, int(starts[line]), syntax)
        if end < 0 and not at_end and len(data) - int(starts[line]) < MAX_RECORD_BYTES:
            return line
        last = line if end < 0 else int(np.searchsorted(ends, end))
        if end < 0 or (last > line and not (clean and num_fields == syntax.num_fields)):
            unterminated.append(line)
            continue
        ends[line] = end
        keep[line + 1 : last + 1] = False
        settled = last + 1
    return len(ends)


def _scan(data: bytes, start: int, syntax: Syntax) -> tuple[int, int, bool]:
    """Read one record: its end (-1: a quote stays open), its number of fields, and whether its quotes are in place."""
    limit = min(len(data), start + MAX_RECORD_BYTES)
    position, num_fields, clean = start, 1, True
    while True:
        if data.startswith(syntax.quote, position):
            close = position
            while True:
                close = data.find(syntax.quote, close + 1, limit)
                if close < 0:
                    return -1, num_fields, clean
                if not data.startswith(syntax.quote, close + 1):
                    break
                close += 1
            position = close + 1
            clean &= data.startswith((syntax.delimiter, b"\n", b"\r\n"), position)
        newline = data.find(b"\n", position)
        delimiter = data.find(syntax.delimiter, position, newline)
        if delimiter < 0:
            return newline + 1, num_fields, clean
        num_fields += 1
        position = delimiter + len(syntax.delimiter)


def _bad_bytes(
    data: bytes, syntax: Syntax, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[tuple[int, str]]:
    """Records with bytes that no text has, each with its reason."""
    if b"\0" in data:
        for record in _records_with(np.frombuffer(data, np.uint8) == 0, starts):
            yield record, NUL
    if not _is_utf8(data):
        for record in _records_with(np.frombuffer(data, np.uint8) >= 0x80, starts):
            if not _is_utf8(data[starts[record] : ends[record]]):
                yield record, f"invalid {syntax.encoding.upper()}"
    if data.count(b"\r") != data.count(b"\r\n"):
        for record in _records_with(np.frombuffer(data, np.uint8) == _RETURN, starts):
            if _has_stray_return(data[starts[record] : ends[record]], syntax):
                yield record, STRAY_RETURN


def _records_with(where: NDArray[np.bool_], starts: NDArray[np.int64]) -> list[int]:
    """The records that the marked bytes lie in."""
    records: list[int] = np.unique(np.searchsorted(starts, np.flatnonzero(where), side="right") - 1).tolist()
    return [record for record in records if record >= 0]  # blank lines before the first record


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _has_stray_return(record: bytes, syntax: Syntax) -> bool:
    """Whether a carriage return stands outside quotes and not before a newline: readers disagree on what it means."""
    position = 0
    while True:
        if syntax.quote and record.startswith(syntax.quote, position):
            close = position
            while True:
                close = record.find(syntax.quote, close + 1)
                if close < 0:
                    return False
                if not record.startswith(syntax.quote, close + 1):
                    break
                close += 1
            position = close + 1
        delimiter = record.find(syntax.delimiter, position)
        field_end = len(record) if delimiter < 0 else delimiter
        if record[position:field_end].replace(b"\r\n", b"").count(b"\r"):
            return True
        if delimiter < 0:
            return False
        position = delimiter + len(syntax.delimiter)
