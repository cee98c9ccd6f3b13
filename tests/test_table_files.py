"""Files of rows: what is tolerated in them, and that every fault is told with its place."""

import gzip
import hashlib
import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eci_pay.errors import FileFault, FileInvalid
from eci_pay.table_files import BLOCK_BYTES, LINE_BYTES_MAX, SHOWN_LENGTH_MAX, FileFormat, Row, TableFile, shown

HEADER = b"id,name\n"


def table(content: bytes, file_format: FileFormat = FileFormat.AUTO, bytes_max: int | None = None) -> TableFile:
    """A file of this content."""
    return TableFile(io.BytesIO(content), "rows.csv", file_format, bytes_max=bytes_max)


def read(content: bytes, file_format: FileFormat = FileFormat.AUTO, optional: Sequence[str] = ()) -> list[Row]:
    """Its ids and names."""
    return list(table(content, file_format).rows(("id", "name"), optional))


def fault_of(content: bytes, file_format: FileFormat = FileFormat.AUTO) -> FileFault:
    """The only fault of a file."""
    with pytest.raises(FileInvalid) as caught:
        read(content, file_format)
    (fault,) = caught.value.faults
    assert str(caught.value) == f"rows.csv: {fault}"
    return fault


@pytest.mark.parametrize(
    "content",
    [
        b"id,name\n1,a\n2,b\n",
        b"id,name\r\n1,a\r\n2,b\r\n",
        b"\xef\xbb\xbfid,name\n1,a\n2,b\n",
        b" ID , Name \n1,a\n2,b\n",
        b"name,id\na,1\nb,2\n",
        b"more,name,id,more\nx,a,1,x\n,b,2,\n",
        b'"id","name"\n"1","a"\n"2","b"\n',
    ],
)
def test_columns_come_in_the_order_that_is_wanted_however_the_file_has_them(content: bytes) -> None:
    assert read(content) == [(2, ("1", "a")), (3, ("2", "b"))]


def test_blank_lines_are_left_out_and_counted() -> None:
    assert read(b"\n  \nid,name\n\n1,a\n \t\n\r\n2,b\n\n") == [(5, ("1", "a")), (8, ("2", "b"))]
    assert read(b'\n{"id":1,"name":"a"}\n \n{"id":2,"name":"b"}\n') == [(2, (1, "a")), (4, (2, "b"))]


def test_a_row_with_a_quoted_newline_is_told_by_the_line_where_it_begins() -> None:
    assert read(b'id,name\n1,"a\n\nb"\n2,"c ""d"", e"\n') == [(2, ("1", "a\n\nb")), (5, ("2", 'c "d", e'))]


def test_only_a_newline_ends_a_line() -> None:
    assert read("id,name\n1,a\u2028b\x0bc\x85d\n".encode()) == [(2, ("1", "a\u2028b\x0bc\x85d"))]


def test_json_lines_are_told_by_their_brace_and_keep_their_types() -> None:
    assert read(b'{"name":null,"id":1,"x":[]}\n{"id":"2","name":true}') == [(1, (1, None)), (2, ("2", True))]
    assert fault_of(b"id,name\n1,a\n", FileFormat.JSONL).line == 1
    assert fault_of(b'{"id":1,"name":"a"}\n', FileFormat.CSV).message.startswith("is not CSV")


def test_an_optional_column_that_is_not_there_is_none() -> None:
    assert read(b"id,name\n1,a\n", optional=("fee",)) == [(2, ("1", "a", None))]
    assert read(b"fee,id,name\n,1,a\n", optional=("fee",)) == [(2, ("1", "a", ""))]
    assert read(b'{"id":1,"name":"a"}', optional=("fee",)) == [(1, (1, "a", None))]


def test_a_header_alone_is_a_file_without_rows() -> None:
    assert read(b"id,name\n") == []
    assert read(b"id,name") == []


@pytest.mark.parametrize(
    ("content", "line", "column", "words"),
    [
        (b"", None, None, "is empty"),
        (b"\xef\xbb\xbf", None, None, "is empty"),
        (b" \n\n", None, None, "is empty"),
        (b"id,title\n1,a\n", 1, None, "the header lacks name"),
        (b"\nid;name\n1;a\n", 2, None, "the header lacks id, name: columns are separated by commas"),
        (b"id,name, NAME\n1,a,b\n", 1, "name", "is there twice"),
        (
            b"id,name\n1,a\n2,b,c\n",
            3,
            None,
            "has 3 fields, and the header has 2: a comma within a value needs quotes around it",
        ),
        (b"id,name\n1\n2,b\n", 2, None, "has 1 fields, and the header has 2"),
        (b"id,name\n1,a\n2,\xe9\n", 3, None, "byte 3 is not UTF-8"),
        (b"id,name\n1,a\n2,b\0\n3,c\n", 3, None, "must not contain NUL characters"),
        (b'id,name\n1,"a\n2,b\n', 2, None, "is not CSV: a quote is opened and never closed"),
        (b'id,name\n1,a\n2,"b"c\n', 3, None, "is not CSV: ',' expected after '\"'"),
        (b"id,name\n1,a\rb\n", 2, None, "is not CSV: a carriage return is in the middle of a line"),
        (gzip.compress(HEADER, mtime=0), None, None, "is compressed (gzip): unpack it first"),
        (b"PK\x03\x04...", None, None, "is a ZIP archive or a spreadsheet: CSV or JSON Lines is wanted"),
        ("id,name\n".encode("utf-16"), None, None, "is UTF-16: UTF-8 is wanted"),
        ("\ufeffid,name\n".encode("utf-16-be"), None, None, "is UTF-16: UTF-8 is wanted"),
        (b'{"id":1,"name":"a"}\n{"id":2,"name":}\n', 2, None, "is not valid JSON: Expecting value at character 16"),
        (b'{"id":1,"id":2,"name":""}\n', 1, None, "is not valid JSON: an object has the same name twice"),
        (b'{"id":1,"name":"a"}\n\n[1]\n', 3, None, "must be a JSON object"),
        (b'{"id":1,"name":"a"}\n{"id":1}\n', 2, "name", "is missing"),
    ],
)
def test_a_fault_is_told_with_its_place(content: bytes, line: int | None, column: str | None, words: str) -> None:
    assert fault_of(content) == FileFault(message=words, line=line, column=column)


def test_half_a_line_at_the_end_is_said_to_be_one() -> None:
    cut = " (the file ends there, without a newline)"
    assert fault_of(b"id,name\n1,a\n2") == FileFault(message=f"has 1 fields, and the header has 2{cut}", line=3)
    assert fault_of(b'id,name\n1,a\n2,"b').message == f"is not CSV: a quote is opened and never closed{cut}"
    assert fault_of(b"id,name\n1,a\n2,\xc3").message == f"byte 3 is not UTF-8{cut}"
    in_json = fault_of(b'{"id":1,"name":"a"}\n{"id":2,"na')
    assert (in_json.line, in_json.message.endswith(cut)) == (2, True)


def test_a_complete_last_line_without_its_newline_is_read_and_warned_of() -> None:
    file = table(b"id,name\n1,a\n2,b")
    assert len(list(file.rows(("id", "name")))) == 2
    assert file.warnings == ["rows.csv: the last line does not end with a newline; it was read as complete"]
    whole = table(b"id,name\n1,a\n2,b\n")
    assert len(list(whole.rows(("id", "name")))) == 2
    assert whole.warnings == []


def test_a_line_may_be_long_but_not_too_long() -> None:
    longest = b"2," + b"x" * (LINE_BYTES_MAX - 3) + b"\n"
    assert [line for line, _ in read(b"id,name\n1,a\n" + longest + b"3,c\n")] == [2, 3, 4]
    words = f"has more than {LINE_BYTES_MAX:,} bytes"
    for too_long in (b"x" + longest, b"x" * 10 * BLOCK_BYTES):
        assert fault_of(b"id,name\n1,a\n" + too_long) == FileFault(message=words, line=3)


def test_a_quote_that_is_left_open_does_not_take_the_whole_file_in() -> None:
    """Neither as one field, nor as ever more fields of one row."""
    rows = b"1,a\n" * 100 + b'2,"b\n' + b"3,c\n" * BLOCK_BYTES
    assert fault_of(HEADER + rows) == FileFault(
        message=f"is not CSV: a field has more than {LINE_BYTES_MAX:,} characters: is a quote left open?", line=102
    )
    stream = io.BytesIO(HEADER + b"1,a\n" + b'2,"\n",' + b'"\n",' * BLOCK_BYTES)
    with pytest.raises(FileInvalid) as caught:
        list(TableFile(stream, "rows.csv").rows(("id", "name")))
    message = f"a row has more than {LINE_BYTES_MAX:,} characters: is a quote left open?"
    assert caught.value.faults == (FileFault(message=message, line=3),)
    assert stream.tell() <= 3 * BLOCK_BYTES


def test_lines_are_counted_over_all_blocks() -> None:
    count = 3 * BLOCK_BYTES // 8
    good = HEADER + b"".join(b"%07d,a\n" % number for number in range(count))
    assert len(good) > 3 * BLOCK_BYTES
    rows = read(good)
    assert len(rows) == count
    assert rows[-1] == (count + 1, (f"{count - 1:07d}", "a"))
    place = FileFault(message="byte 9 is not UTF-8", line=count + 2)
    assert fault_of(good + b"1234567,\xff\n") == place
    assert fault_of(good + b"1\n").line == count + 2
    in_json = b'{"id":1,"name":"a"}\n' * count
    assert read(in_json)[-1] == (count, (1, "a"))
    assert fault_of(in_json + b"{}\n").line == count + 1


def test_the_digest_and_the_size_are_those_of_the_file() -> None:
    content = b"\xef\xbb\xbfid,name\r\n" + b"1,a\r\n" * 100_000 + b"2,b"
    file = table(content, bytes_max=len(content))
    assert len(list(file.rows(("id", "name")))) == 100_001
    assert (file.digest, file.bytes_read) == (hashlib.sha256(content).hexdigest(), len(content))
    with pytest.raises(FileInvalid, match=f"has more than {len(content) - 1:,} bytes"):
        list(table(content, bytes_max=len(content) - 1).rows(("id", "name")))


@given(content=st.binary() | st.binary().map(lambda tail: HEADER + tail) | st.text().map(lambda text: text.encode()))
def test_no_bytes_raise_anything_but_file_invalid(content: bytes) -> None:
    for file_format in FileFormat:
        try:
            rows = read(content, file_format)
        except FileInvalid:
            continue
        assert all(len(values) == 2 for _, values in rows)


def test_what_is_wrong_is_shown_quoted_and_shortened() -> None:
    assert shown("a'b\n") == '"a\'b\\n"'
    assert shown("x" * SHOWN_LENGTH_MAX) == repr("x" * SHOWN_LENGTH_MAX)
    assert shown("x" * 1000) == repr("x" * SHOWN_LENGTH_MAX + "...")
