"""Files of rows that operators hand in: CSV with a header (RFC 4180), or JSON Lines; UTF-8, read once and in bounded
memory, with the place of every fault.

Tolerated: a byte order mark, CRLF, blank lines, spaces around names in the header, further columns, columns in any
order, and a last line without its newline if it is complete, of which `TableFile.warnings` tells.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from operator import itemgetter
from typing import BinaryIO, NoReturn

from eci_pay.errors import FileFault, FileInvalid, MalformedJson
from eci_pay.requests import parse_json

LINE_BYTES_MAX = 65_536
"""Of one line, and in CSV of one field."""
SHOWN_LENGTH_MAX = 60
"""How much of what is wrong an error shows."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: CSV or JSON Lines is wanted",
    b"\xff\xfe": "is UTF-16: UTF-8 is wanted",
    b"\xfe\xff": "is UTF-16: UTF-8 is wanted",
}

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
        self._line = 0
        self._ends_early = False
        self._closed = False

    @property
    def digest(self) -> str:
        """SHA-256 of what was read, in hexadecimal; of the whole file once all rows are read."""
        return self._digest.hexdigest()

    def rows(self, columns: Sequence[str], optional: Sequence[str] = (), *, closed: bool = False) -> Iterator[Row]:
        """The values of the `columns`, which the file must have, and of the `optional` ones, in that order; where it
        is `closed`, it must have no others. Raises FileInvalid."""
        self._closed = closed
        first = self._next_line()
        for mark, fault in _FOREIGN.items():
            if first.startswith(mark):
                self._refuse(fault)
        if not first:
            self._refuse("is empty")
        text = self._text(first.removeprefix(_BYTE_ORDER_MARK))
        is_jsonl = self._format is FileFormat.JSONL or (
            self._format is FileFormat.AUTO and text.lstrip().startswith("{")
        )
        read = self._jsonl_rows if is_jsonl else self._csv_rows
        yield from read(self._texts(text), columns, optional)
        if self._ends_early:
            self.warnings.append(f"{self.name}: the last line does not end with a newline; it was read as complete")

    def fault(self, message: str, *, line: int, column: str | None = None) -> FileInvalid:
        """The error of a value in the file."""
        if self._ends_early and line == self._line:
            message += " (the file ends in the middle of this line)"
        return FileInvalid(self.name, (FileFault(message=message, line=line, column=column),))

    def _refuse(self, message: str) -> NoReturn:
        raise FileInvalid(self.name, (FileFault(message=message),))

    def _next_line(self) -> bytes:
        raw = self._stream.readline(LINE_BYTES_MAX + 1)
        if raw:
            self._line += 1
            self._ends_early = not raw.endswith(b"\n")
            self.bytes_read += len(raw)
            self._digest.update(raw)
            if len(raw) > LINE_BYTES_MAX:
                raise self.fault(f"has more than {LINE_BYTES_MAX:,} bytes", line=self._line)
            if self._bytes_max is not None and self.bytes_read > self._bytes_max:
                self._refuse(f"has more than {self._bytes_max:,} bytes")
        return raw

    def _text(self, raw: bytes) -> str:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"byte {error.start + 1} is not UTF-8", line=self._line) from None
        if "\0" in text:
            raise self.fault("must not contain NUL characters", line=self._line)
        return text

    def _texts(self, first: str) -> Iterator[str]:
        yield first
        next_line, text = self._next_line, self._text
        while raw := next_line():
            yield text(raw)

    def _csv_rows(self, lines: Iterator[str], columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
        csv.field_size_limit(LINE_BYTES_MAX)
        reader = csv.reader(lines, strict=True)
        try:
            header = next((row for row in reader if row), None)
            if header is None:
                self._refuse("is empty")
            pick = self._picker(header, columns, optional)
            width = len(header)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == width:
                    yield line, pick(row)
                elif row:
                    raise self.fault(f"has {len(row)} fields, and the header has {width}", line=line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise self.fault(f"is not CSV: {error}", line=reader.line_num) from None

    def _picker(
        self, header: Sequence[str], columns: Sequence[str], optional: Sequence[str]
    ) -> Callable[[list[str]], tuple[object, ...]]:
        """Takes the wanted values out of a line."""
        names = [name.strip().lower() for name in header]
        for name in (*columns, *optional):
            if names.count(name) > 1:
                raise self.fault("is there twice", line=self._line, column=name)
        if missing := [name for name in columns if name not in names]:
            hint = ": columns are separated by commas" if len(names) == 1 else ""
            raise self.fault(f"the header lacks {', '.join(missing)}{hint}", line=self._line)
        self._refuse_others(names, (*columns, *optional), line=self._line)
        places = [names.index(name) if name in names else None for name in (*columns, *optional)]
        known = [place for place in places if place is not None]
        if len(known) == len(places) > 1:
            return itemgetter(*known)
        return lambda row: tuple(None if place is None else row[place] for place in places)

    def _refuse_others(self, names: Iterable[str], known: Sequence[str], *, line: int) -> None:
        """A misspelt column must not pass for one that was left out, where that would mean something."""
        if self._closed and (others := [name for name in names if name not in known]):
            column = others[0][:SHOWN_LENGTH_MAX]
            raise self.fault(f"is not known; known are {', '.join(known)}", line=line, column=column)

    def _jsonl_rows(self, lines: Iterator[str], columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
        for text in lines:
            if not text.strip():
                continue
            line = self._line
            try:
                members = parse_json(text.encode())
            except MalformedJson as error:
                raise self.fault(error.detail, line=line) from None
            if not isinstance(members, dict):
                raise self.fault("must be a JSON object", line=line)
            for name in columns:
                if name not in members:
                    raise self.fault("is missing", line=line, column=name)
            self._refuse_others(members, (*columns, *optional), line=line)
            yield line, tuple(members.get(name) for name in (*columns, *optional))


def shown(value: object) -> str:
    """A wrong value as an error shows it: quoted and not too long."""
    text = str(value)
    return repr(text if len(text) <= SHOWN_LENGTH_MAX else f"{text[:SHOWN_LENGTH_MAX]}...")
