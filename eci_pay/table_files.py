"""Files of rows that operators hand in: CSV with a header (RFC 4180), or JSON Lines; UTF-8, read once and in bounded
memory, with the place of every fault.

Tolerated: a byte order mark, CRLF, blank lines, spaces around names in the header, further columns, columns in any
order, and a last line without its newline if it is complete, of which `TableFile.warnings` tells. A file of rows that
move money is read more strictly (`closed`).
"""

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from io import StringIO
from operator import itemgetter
from typing import BinaryIO, NoReturn

from eci_pay.errors import FileFault, FileInvalid, MalformedJson
from eci_pay.requests import parse_json

LINE_BYTES_MAX = 65_536
"""Of one line, its newline among them, and in CSV of one field."""
BLOCK_BYTES = 262_144
"""How much is read at a time."""
SHOWN_LENGTH_MAX = 60
"""How much of what is wrong an error shows."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: CSV or JSON Lines is wanted",
    b"\xff\xfe": "is UTF-16: UTF-8 is wanted",
    b"\xfe\xff": "is UTF-16: UTF-8 is wanted",
}
_CSV_FAULTS = {
    "unexpected end": "a quote is opened and never closed",
    "field larger": f"a field has more than {LINE_BYTES_MAX:,} characters: is a quote left open?",
    "new-line": "a carriage return is in the middle of a line",
}
"""What Python's words for a fault begin with, and ours."""
_JSON_PLACE = re.compile(r": line 1 column (\d+) \(char \d+\)$")

Row = tuple[int, tuple[object, ...]]
"""The line where a row begins, and the values of the wanted columns: text in CSV, what JSON says in JSON Lines, and
None for an optional column that the file does not have."""


class FileFormat(StrEnum):
    """How the rows are written; AUTO goes by the first character, which is a brace in JSON Lines."""

    AUTO = "auto"
    CSV = "csv"
    JSONL = "jsonl"


class TableFile:
    """One file while it is read. `name` is what errors call it."""

    def __init__(
        self, stream: BinaryIO, name: str, file_format: FileFormat = FileFormat.AUTO, *, bytes_max: int | None = None
    ) -> None:
        self.name = name
        self.warnings: list[str] = []
        self.bytes_read = 0
        self._stream = stream
        self._format = file_format
        self._bytes_max = bytes_max
        self._digest = hashlib.sha256()
        self._block_line = 1
        """The line that the block at hand begins with."""
        self._row_line = 1
        """The line where the row under way began."""
        self._half_line: int | None = None
        """The last line, where the file does not end with a newline."""
        self._closed = False
        self._in_header: Sequence[str] = ()
        self.is_jsonl = False
        """Known once the first row is read."""

    @property
    def digest(self) -> str:
        """SHA-256 of what was read, in hexadecimal; of the whole file once all rows are read."""
        return self._digest.hexdigest()

    def rows(
        self,
        columns: Sequence[str],
        optional: Sequence[str] = (),
        *,
        in_header: Sequence[str] = (),
        closed: bool = False,
    ) -> Iterator[Row]:
        """The values of the `columns`, which the file must have, and of the `optional` ones, in that order: two or more
        in all. A header must have those `in_header` as well. A file that is `closed` must have no others, and as CSV a
        newline at its end: a row that is cut off may look complete. Raises FileInvalid."""
        self._closed, self._in_header = closed, in_header
        blocks = self._blocks()
        first = next(blocks, "")
        if not first and self._format is not FileFormat.JSONL:
            self._refuse("is empty")
        self.is_jsonl = self._format is FileFormat.JSONL or (
            self._format is FileFormat.AUTO and first.lstrip().startswith("{")
        )
        read = self._jsonl_rows if self.is_jsonl else self._csv_rows
        yield from read(self._lines(first, blocks), columns, optional)
        if self._half_line is not None:
            if closed and not self.is_jsonl:
                self._refuse("the last line does not end with a newline: is the file cut off?")
            self.warnings.append(f"{self.name}: the last line does not end with a newline; it was read as complete")

    def ends_within(self, line: int) -> bool:
        """Whether the file ends in that line, without a newline: so it may have been cut off."""
        return line == self._half_line

    def fault(self, message: str, *, line: int, column: str | None = None) -> FileInvalid:
        """The error of a value in the file."""
        if self.ends_within(line):
            message += " (the file ends there, without a newline)"
        return FileInvalid(self.name, (FileFault(message=message, line=line, column=column),))

    def _refuse(self, message: str) -> NoReturn:
        raise FileInvalid(self.name, (FileFault(message=message),))

    def _blocks(self) -> Iterator[str]:
        """The file in pieces of whole lines: what concerns any text is seen to for thousands of lines at once."""
        rest = b""
        while read := self._stream.read(BLOCK_BYTES):
            block = rest + self._counted(read)
            self._check_line_lengths(block)
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            if end:
                yield self._text(block[:end])
                self._block_line += block.count(b"\n")
        if rest:
            self._half_line = self._block_line
            yield self._text(rest)

    def _counted(self, read: bytes) -> bytes:
        """What was read, without the mark that a file may begin with."""
        is_start = self.bytes_read == 0
        self.bytes_read += len(read)
        self._digest.update(read)
        if self._bytes_max is not None and self.bytes_read > self._bytes_max:
            self._refuse(f"has more than {self._bytes_max:,} bytes")
        if not is_start:
            return read
        for mark, fault in _FOREIGN.items():
            if read.startswith(mark):
                self._refuse(fault)
        return read.removeprefix(_BYTE_ORDER_MARK)

    def _check_line_lengths(self, block: bytes) -> None:
        """In steps of as many lines as fit into the limit."""
        start = 0
        while len(block) - start > LINE_BYTES_MAX:
            end = block.rfind(b"\n", start, start + LINE_BYTES_MAX)
            if end < 0:
                raise self.fault(f"has more than {LINE_BYTES_MAX:,} bytes", line=self._line_of(block, start))
            start = end + 1

    def _text(self, block: bytes) -> str:
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            place = error.start - block.rfind(b"\n", 0, error.start)
            raise self.fault(f"byte {place} is not UTF-8", line=self._line_of(block, error.start)) from None
        if "\0" in text:
            raise self.fault("must not contain NUL characters", line=self._line_of(block, block.index(b"\0")))
        return text

    def _line_of(self, block: bytes, place: int) -> int:
        return self._block_line + block.count(b"\n", 0, place)

    def _lines(self, first: str, blocks: Iterator[str]) -> Iterator[str]:
        """Ends a row that goes on and on: a quote that is left open must not take the whole file in."""
        block: str | None = first
        while block is not None:
            block_line = self._block_line
            yield from StringIO(block)
            size = len(block)
            block = next(blocks, None)
            if block is not None and self._row_line <= block_line and size >= LINE_BYTES_MAX:
                raise self.fault(
                    f"a row has more than {LINE_BYTES_MAX:,} characters: is a quote left open?", line=self._row_line
                )

    def _csv_rows(self, lines: Iterator[str], columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
        csv.field_size_limit(LINE_BYTES_MAX)
        reader = csv.reader(lines, strict=True)
        try:
            header = next((row for row in reader if any(name.strip() for name in row)), None)
            if header is None:
                self._refuse("is empty")
            pick = self._picker(header, columns, optional, line=reader.line_num)
            width = len(header)
            self._row_line = reader.line_num + 1
            for row in reader:
                if len(row) == width:
                    yield self._row_line, pick(row)
                elif any(field.strip() for field in row):
                    hint = ": a comma within a value needs quotes around it" if len(row) > width else ""
                    raise self.fault(f"has {len(row)} fields, and the header has {width}{hint}", line=self._row_line)
                self._row_line = reader.line_num + 1
        except csv.Error as error:
            words = next((ours for theirs, ours in _CSV_FAULTS.items() if str(error).startswith(theirs)), str(error))
            raise self.fault(f"is not CSV: {words}", line=self._row_line) from None

    def _picker(
        self, header: Sequence[str], columns: Sequence[str], optional: Sequence[str], *, line: int
    ) -> Callable[[list[str]], tuple[object, ...]]:
        """Takes the wanted values out of a row."""
        names = [name.strip().lower() for name in header]
        for name in (*columns, *optional):
            if names.count(name) > 1:
                raise self.fault("is there twice", line=line, column=name)
        self._refuse_others(names, (*columns, *optional), line=line)
        if missing := [name for name in (*columns, *self._in_header) if name not in names]:
            hint = ": columns are separated by commas" if len(names) == 1 else ""
            raise self.fault(f"the header lacks {', '.join(missing)}{hint}", line=line)
        absent = len(names)
        pick = itemgetter(*(names.index(name) if name in names else absent for name in (*columns, *optional)))
        if all(name in names for name in optional):
            return pick
        return lambda row: pick([*row, None])

    def _refuse_others(self, names: Iterable[str], known: Sequence[str], *, line: int) -> None:
        """A misspelt column must not pass for one that was left out, where that would mean something."""
        if self._closed and (others := [name for name in names if name not in known]):
            column = others[0][:SHOWN_LENGTH_MAX]
            raise self.fault(f"is not known; known are {', '.join(known)}", line=line, column=column)

    def _jsonl_rows(self, lines: Iterator[str], columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
        for line, text in enumerate(lines, 1):
            self._row_line = line + 1
            stripped = text.strip()
            if not stripped:
                continue
            try:
                members = parse_json(stripped.encode())
            except MalformedJson as error:
                words = _JSON_PLACE.sub(r" at character \1", error.detail.removeprefix("The body ").removesuffix("."))
                raise self.fault(words, line=line) from None
            if not isinstance(members, dict):
                raise self.fault("must be a JSON object", line=line)
            for name in columns:
                if name not in members:
                    raise self.fault("is missing", line=line, column=name)
            self._refuse_others(members, (*columns, *optional), line=line)
            yield line, tuple([members.get(name) for name in (*columns, *optional)])


def shown(value: object) -> str:
    """A wrong value as an error shows it: quoted and not too long."""
    text = str(value)
    return repr(text if len(text) <= SHOWN_LENGTH_MAX else f"{text[:SHOWN_LENGTH_MAX]}...")
