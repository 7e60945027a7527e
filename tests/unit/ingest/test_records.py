from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.contracts.mapping import Source
from evergreen.ingest import text
from evergreen.ingest.records import MAX_RECORD_BYTES, Syntax, cut_records

COMMA = Syntax(b",", b'"', 3)


def _cut(data: bytes, syntax: Syntax = COMMA, **kwargs: object) -> tuple[list[tuple[int, str]], dict[int, str]]:
    records = cut_records(data, syntax, first_line=1, at_end=bool(kwargs.get("at_end", True)))
    return [(int(line), records.text(i)) for i, line in enumerate(records.lines)], records.broken


def test_blank_lines_are_no_records_but_count_as_lines() -> None:
    records, broken = _cut(b"\n1,2,3\n\r\n4,5,6\r\n")
    assert records == [(2, "1,2,3"), (4, "4,5,6")]
    assert not broken


def test_a_quoted_field_may_span_lines() -> None:
    records, broken = _cut(b'1,"a\n\nb",3\n4,5,6\n')
    assert records == [(1, '1,"a\n\nb",3'), (4, "4,5,6")]
    assert not broken


def test_an_unclosed_quote_costs_its_own_line_only() -> None:
    records, broken = _cut(b'1,"a,3\n4,5,6\n7,"8",9\n')
    assert [text for _, text in records] == ['1,"a,3', "4,5,6", '7,"8",9']
    assert broken == {0: "unterminated quote"}


def test_two_unclosed_quotes_do_not_swallow_what_is_between_them() -> None:
    records, broken = _cut(b'1,2,"a\n4,5,6\n7,8,"b\n')
    assert len(records) == 3
    assert broken == {0: "unterminated quote", 2: "unterminated quote"}


def test_a_quote_inside_a_field_is_an_ordinary_character() -> None:
    records, broken = _cut(b'5" nails,2,3\n4,5,6\n')
    assert len(records) == 2
    assert not broken


def test_an_even_number_of_quotes_may_still_leave_one_open() -> None:
    records, _ = _cut(b'5" nails,2,"x\ny"\n4,5,6\n')
    assert records == [(1, '5" nails,2,"x\ny"'), (3, "4,5,6")]


def test_a_record_that_goes_on_in_the_next_piece_is_left_for_it() -> None:
    records = cut_records(b'1,2,3\n4,"5\n', COMMA, first_line=1, at_end=False)
    assert (len(records), records.consumed, records.num_lines) == (1, 6, 1)


def test_a_quote_that_stays_open_for_a_mebibyte_is_given_up() -> None:
    data = b'1,2,"x\n' + b"4,5,6\n" * (MAX_RECORD_BYTES // 6 + 2)
    records = cut_records(data, COMMA, first_line=1, at_end=False)
    assert records.broken == {0: "unterminated quote"}
    assert records.consumed == len(data)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,\xff\xfe,3", "invalid UTF-8"),
        (b"1,\x00,3", "NUL byte"),
        (b"1,2\r2,3", "stray carriage return"),
    ],
)
def test_bytes_that_no_text_has_break_their_record_only(line: bytes, reason: str) -> None:
    records, broken = _cut(b"1,2,3\n" + line + b"\n4,5,\xc3\xa9\n")
    assert len(records) == 3
    assert broken == {1: reason}


def test_a_carriage_return_inside_quotes_is_data() -> None:
    _, broken = _cut(b'1,"2\r2",3\n')
    assert not broken


_FRAGMENTS = ["a", "b", "é", " ", "\t", ":", ",", ",", "::", '"', '"', '""', '",', ',"', "\n", "\n", "\r\n", "\r"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(_FRAGMENTS), max_size=50).map("".join),
    st.sampled_from([",", "::", "\t"]),
    st.sampled_from(['"', ""]),
    st.sampled_from([1, 3, 7]),
    st.sampled_from(["", "\0", "\udcff"]),
)
def test_how_a_file_is_cut_into_pieces_has_no_influence(
    body: str, delimiter: str, quote: str, size: int, bad: str
) -> None:
    names = ["x", "y"]
    source = Source(delimiter=delimiter, quote=quote, header=False, columns=names)
    raw = ("\n" + body + bad).encode("utf-8", "surrogateescape")

    def read(block_bytes: int) -> tuple[list[object], list[object]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "BLOCK_BYTES", block_bytes)
            blocks = list(text.read_text(io.BytesIO(raw), "log", source, names, names))
        good = [(int(n), row) for b in blocks for n, row in zip(b.lines, b.table.to_pylist(), strict=True)]
        return good, [reject for block in blocks for reject in block.rejects]

    assert read(size) == read(1 << 20)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8) for _ in range(2)]),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", "::", "\t"]),
)
def test_whatever_is_quoted_comes_back(rows: list[tuple[str, str]], delimiter: str) -> None:
    names = ["x", "y"]
    raw = "".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row) + "\n" for row in rows).encode()
    source = Source(delimiter=delimiter, header=False, columns=names)
    (block,) = text.read_text(io.BytesIO(raw), "log", source, names, names)
    spaces = " \t".replace(delimiter, "")
    assert not block.rejects
    assert [tuple(row.values()) for row in block.table.to_pylist()] == [
        tuple(value.strip(spaces) for value in row) for row in rows
    ]
