"""Read delimited text in a stream of blocks: only the columns that the mapping uses, every value as text."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Source
from evergreen.ingest.blocks import Block, Reject
from evergreen.ingest.records import MAX_RECORD_BYTES, Records, Syntax, cut_records

BLOCK_BYTES = 16 << 20
"""Bytes of text that are read at a time."""

MAX_LINE_BYTES = 64 << 20
WRONG_NUMBER_OF_FIELDS = "wrong number of fields"

_UTF8_BOM = codecs.BOM_UTF8
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROL_BYTES = tuple(bytes([i]) for i in (0x1F, 0x1E, 0x1D, 0x1C, *range(0x01, 0x09), *range(0x0E, 0x1C)))


def delimiter_of(source: Source, name: str) -> str:
    """The delimiter that the mapping states, or that the file's name implies."""
    return source.delimiter or ("\t" if ".tsv" in name.lower() or name.lower().endswith(".tab") else ",")


def read_header(stream: BinaryIO, name: str, source: Source) -> tuple[str, ...]:
    """Names of the columns, in order: the file's own, or the mapping's where it lists them.

    Raises:
        InputError: the file is not text, its header cannot be read, or does not have as many names as the mapping.
    """
    first = next(_pieces(stream, name, source, MAX_RECORD_BYTES), b"")
    if b"\0" in first[:4096]:
        raise InputError(
            f"{name}: not text: there are NUL bytes at its start. An archive or a database file? "
            f"Only delimited text and Parquet are read (a tar archive: tar://MEMBER::{name}), and source.encoding "
            f"must be the file's (here {source.encoding!r})"
        )
    if not source.header:
        return source.columns
    syntax = _syntax(source, name, num_fields=0)
    records = cut_records(first[: first.rfind(b"\n") + 1], syntax, first_line=1, at_end=True)
    if len(records) == 0 and first.strip():
        raise InputError(f"{name}: no line ends within the first {MAX_RECORD_BYTES >> 20} MiB: is this delimited text?")
    if len(records) == 0:
        raise InputError(f"{name}: no header: the file has only blank lines")
    if reason := records.broken.get(0):
        raise InputError(
            f"{name}: line {records.lines[0]}: the header cannot be read: {reason}: {records.text(0)[:200]!r}"
        )
    names = _split(records.text(0), delimiter_of(source, name), source.quote)
    if source.columns and len(source.columns) != len(names):
        raise InputError(
            f"{name}: the header has {len(names)} columns but source.columns names {len(source.columns)}: "
            f"{', '.join(names)}"
        )
    return source.columns or names


def read_text(
    stream: BinaryIO, name: str, source: Source, names: Sequence[str], columns: Sequence[str]
) -> Iterator[Block]:
    """Read a file in blocks.

    Args:
        stream: the decompressed bytes, from the start.
        name: what to call the file in errors.
        source: the mapping's layout.
        names: all columns of the file, in order.
        columns: those to read.

    Yields:
        Blocks with `columns` as strings without spaces or tabs around them; absent values are empty strings. Rows that
        are no rows (wrong number of fields, an unterminated quote, bytes that are not text) are among the blocks'
        rejects, with reason and line.
    """
    syntax = _syntax(source, name, len(names))
    parse = _parser(syntax, names, columns)
    ordinal = 0
    skip_header = source.header
    for records in _records(_pieces(stream, name, source, BLOCK_BYTES), name, syntax):
        first_record = 1 if skip_header and len(records) else 0
        skip_header = skip_header and first_record == 0
        block = _block(records, first_record, ordinal, parse)
        ordinal += block.num_records
        yield block


def _split(line: str, delimiter: str, quote: str) -> tuple[str, ...]:
    separator = delimiter if len(delimiter) == 1 else next(c.decode() for c in _CONTROL_BYTES if c.decode() not in line)
    quoting: Any = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    fields = next(csv.reader([line.replace(delimiter, separator)], delimiter=separator, **quoting))
    return tuple(field.replace(separator, delimiter).strip() for field in fields)


def _syntax(source: Source, name: str, num_fields: int) -> Syntax:
    return Syntax(delimiter_of(source, name).encode(), source.quote.encode(), num_fields, source.encoding)


def _pieces(stream: BinaryIO, name: str, source: Source, size: int) -> Iterator[bytes]:
    """The file as UTF-8 in pieces of about `size` bytes, without byte order mark; every newline has a \\n."""
    chunk = stream.read(size)
    is_utf8 = codecs.lookup(source.encoding).name == "utf-8"
    if is_utf8 and chunk.startswith(_UTF16_BOMS):
        raise InputError(f"{name}: the file is UTF-16: set source.encoding = 'utf-16'")
    # Bytes that the encoding does not know pass through unchanged, are no UTF-8 then, and are reported line by line.
    decoder = None if is_utf8 else codecs.getincrementaldecoder(source.encoding)(errors="surrogateescape")
    first, old_macintosh = True, False
    while chunk:
        following = stream.read(size)
        piece = chunk
        if decoder is not None:
            try:
                piece = decoder.decode(chunk, final=not following).encode("utf-8", "surrogateescape")
            except UnicodeError as error:
                raise InputError(f"{name}: is not {source.encoding} (source.encoding): {error}") from error
        if first:
            piece = piece.removeprefix(_UTF8_BOM)
            old_macintosh = b"\n" not in piece and b"\r" in piece
        if old_macintosh:
            piece = piece.replace(b"\r", b"\n")
        if not following and not piece.endswith(b"\n"):
            piece += b"\n"
        yield piece
        first, chunk = False, following


def _records(pieces: Iterator[bytes], name: str, syntax: Syntax) -> Iterator[Records]:
    rest, line = b"", 1
    piece = next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        data = rest + piece
        cut = data.rfind(b"\n") + 1
        if cut == 0 and len(data) > MAX_LINE_BYTES:
            raise InputError(f"{name}: line {line}: longer than {MAX_LINE_BYTES >> 20} MiB: is this delimited text?")
        consumed = 0
        if cut:
            records = cut_records(data[:cut], syntax, first_line=line, at_end=following is None)
            consumed = records.consumed
            line += records.num_lines
            yield records
        rest, piece = data[consumed:], following


Parser = Callable[[bytes, int], tuple[pa.Table, NDArray[np.int64]]]


def _parser(syntax: Syntax, names: Sequence[str], columns: Sequence[str]) -> Parser:
    """A function of (text, number of records) to (columns of the good records, the indices of the bad ones)."""
    positions = [f"f{names.index(column)}" for column in columns]
    # Trimming costs as much as parsing, so it is only done in pieces where there is something to trim: a space or tab
    # next to what a value can begin or end at.
    spaces = [space for space in (b" ", b"\t") if space not in syntax.delimiter]
    borders = [syntax.delimiter, b"\n", b"\r", *([syntax.quote] if syntax.quote else [])]
    paddings = [pad for border in borders for space in spaces for pad in (border + space, space + border)]
    trim = partial(pc.utf8_trim, characters=b"".join(spaces).decode())
    convert = pa_csv.ConvertOptions(
        include_columns=positions,
        column_types=dict.fromkeys(positions, pa.string()),
        strings_can_be_null=False,
        check_utf8=False,  # the records are known to be UTF-8
    )

    def parse(data: bytes, num_records: int) -> tuple[pa.Table, NDArray[np.int64]]:
        if num_records == 0:
            return pa.table({column: pa.array([], pa.string()) for column in columns}), np.empty(0, np.int64)
        padded = data.startswith(tuple(spaces)) or any(padding in data for padding in paddings)
        delimiter = syntax.delimiter
        if len(delimiter) > 1:
            delimiter = next(c for c in _CONTROL_BYTES if c not in data)
            data = data.replace(syntax.delimiter, delimiter)
        bad: list[int] = []

        def on_bad(row: Any) -> str:
            bad.append(row.number - 1)
            return "skip"

        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(
                use_threads=False,  # otherwise bad rows carry no number
                column_names=[f"f{i}" for i in range(len(names))],
                block_size=len(data) + 1,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter.decode(),
                quote_char=syntax.quote.decode() or False,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=on_bad,
            ),
            convert_options=convert,
        ).rename_columns(list(columns))
        if table.num_rows + len(bad) != num_records:
            raise InputError(
                f"quotes and delimiters contradict each other: of {num_records} records, {table.num_rows} good and "
                f"{len(bad)} bad ones could be read near {data[:60]!r}…; is source.quote = {syntax.quote.decode()!r} "
                "right? An empty one makes quotes ordinary characters"
            )
        if len(syntax.delimiter) > 1 and syntax.quote and syntax.quote in data:
            restore = partial(pc.replace_substring, pattern=delimiter.decode(), replacement=syntax.delimiter.decode())
            table = pa.table([restore(column) for column in table.columns], names=list(columns))
        if padded:
            table = pa.table([trim(column) for column in table.columns], names=list(columns))
        return table, np.asarray(bad, np.int64)

    return parse


def _block(records: Records, first_record: int, ordinal: int, parse: Parser) -> Block:
    """Parse the records that can be read, and account for the others."""
    index = np.arange(first_record, len(records))
    broken = {record: reason for record, reason in records.broken.items() if record >= first_record}
    readable = np.delete(index, np.fromiter(broken, np.int64, len(broken)) - first_record)
    table, bad = parse(_joined(records, readable), len(readable))
    broken |= dict.fromkeys(readable[bad].tolist(), WRONG_NUMBER_OF_FIELDS)
    good = np.delete(readable, bad)
    rejects = [Reject(int(records.lines[i]), broken[i], records.text(i)) for i in sorted(broken)]
    return Block(
        table=table,
        lines=records.lines[good],
        ordinals=good - first_record + ordinal,
        row_text=lambda i: records.text(int(good[i])),
        rejects=rejects,
    )


def _joined(records: Records, chosen: NDArray[np.int64]) -> bytes:
    """The text of the chosen records, without the blank lines and broken records between them."""
    if len(chosen) == 0:
        return b""
    starts, ends = records.starts[chosen], records.ends[chosen]
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    run_starts = starts[np.concatenate(([0], breaks))].tolist()
    run_ends = ends[np.concatenate((breaks - 1, [len(ends) - 1]))].tolist()
    return b"".join(records.data[start:end] for start, end in zip(run_starts, run_ends, strict=True))
