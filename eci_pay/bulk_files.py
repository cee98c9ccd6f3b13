"""Files of refunds or of charges, to be made in one run: read and validated as a whole before the first of them.

A row's idempotency key is made of the file's content and the row's line: the same file again asks for the same again,
and any other file, however alike, for something else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from eci_pay.errors import FileFault, FileInvalid, ValidationFailed
from eci_pay.requests import ChargeRequest, Id, RefundRequest, parse_request
from eci_pay.table_files import TableFile

BATCH_ROWS_MAX = 100_000
FAULTS_SHOWN_MAX = 20
"""How many faults of a file its error shows, by line."""
ID_DIGITS_MAX = 19
CALLER = "a file of eci-pay"
"""Whose the rows' keys are: no client of the API can use them."""

_REFUND_COLUMNS = ("payment_id", "order_id", "amount", "reason")
_CHARGE_COLUMNS = tuple(ChargeRequest.model_fields)


class BulkKind(StrEnum):
    """What the rows ask for."""

    REFUND = "refund"
    CHARGE = "charge"


class RefundFields(RefundRequest):
    """A row of a file of refunds: a refund, and whose payment it is of."""

    payment_id: Id | None = None
    order_id: Id | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RefundRow:
    """A refund, by its payment's id or by its order's."""

    line: int
    payment_id: int | None
    order_id: int | None
    request: RefundRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ChargeRow:
    """A charge."""

    line: int
    request: ChargeRequest

    @property
    def payment_id(self) -> None:
        """Only its order names it."""

    @property
    def order_id(self) -> int:
        """The order that is charged."""
        return self.request.order_id


BulkRow = RefundRow | ChargeRow


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkFile:
    """A file whose rows are valid requests, each by itself. `digest` is the SHA-256 of its content."""

    kind: BulkKind
    name: str
    digest: str
    rows: Sequence[BulkRow]
    warnings: tuple[str, ...]

    @property
    def key_prefix(self) -> str:
        """What the idempotency keys of its rows begin with, and no others."""
        return f"bulk-{self.kind}-{self.digest}-"

    def key(self, line: int) -> str:
        """The idempotency key of the row in that line."""
        return f"{self.key_prefix}{line}"


class Faults:
    """What is wrong with a file; of more than are shown, only the number is kept."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._shown: list[FileFault] = []
        self._others = 0

    def add(self, *faults: FileFault) -> None:
        """Takes note of further ones."""
        room = FAULTS_SHOWN_MAX - len(self._shown)
        self._shown += faults[:room]
        self._others += len(faults[room:])

    def refuse(self) -> None:
        """Raises FileInvalid if there are any."""
        if self._others:
            self._shown.append(FileFault(message=f"and {self._others:,} more faults"))
        if self._shown:
            raise FileInvalid(self._file, tuple(self._shown))


def read_bulk_file(kind: BulkKind, stream: BinaryIO, name: str) -> BulkFile:
    """Reads a file; `name` is what errors call it. Raises FileInvalid with all faults of all rows."""
    columns, in_header, parse = _PARSERS[kind]
    table, faults = TableFile(stream, name), Faults(name)
    rows: list[BulkRow] = []
    count = 0
    try:
        for line, values in table.rows((), columns, in_header=in_header, closed=True):
            count += 1
            if count > BATCH_ROWS_MAX:
                raise table.fault(f"a file has at most {BATCH_ROWS_MAX:,} rows", line=line)
            try:
                rows.append(parse(line, _fields(columns, values, is_text=not table.is_jsonl)))
            except ValidationFailed as error:
                for fault in error.errors:
                    faults.add(*table.fault(fault.message, line=line, column=fault.field or None).faults)
    except FileInvalid as error:
        faults.add(*error.faults)
    faults.refuse()
    if not rows:
        raise FileInvalid(name, (FileFault(message="has no rows"),))
    return BulkFile(kind=kind, name=name, digest=table.digest, rows=rows, warnings=tuple(table.warnings))


def _refund_row(line: int, fields: dict[str, object]) -> RefundRow:
    row: RefundFields = parse_request(RefundFields, fields)
    if (row.payment_id is None) == (row.order_id is None):
        raise ValidationFailed.of("payment_id", "give either a payment_id or an order_id")
    request = RefundRequest(amount=row.amount, reason=row.reason)
    return RefundRow(line=line, payment_id=row.payment_id, order_id=row.order_id, request=request)


def _charge_row(line: int, fields: dict[str, object]) -> ChargeRow:
    return ChargeRow(line=line, request=parse_request(ChargeRequest, fields))


_PARSERS: Mapping[BulkKind, tuple[Sequence[str], Sequence[str], Callable[[int, dict[str, object]], BulkRow]]] = {
    BulkKind.REFUND: (_REFUND_COLUMNS, ("amount",), _refund_row),
    BulkKind.CHARGE: (_CHARGE_COLUMNS, (), _charge_row),
}
"""The columns, those that no header may leave out, and what makes a row of their values."""


def _fields(columns: Sequence[str], values: Sequence[object], *, is_text: bool) -> dict[str, object]:
    """What a row gives. In CSV, where all is text, an empty field is one that is left out, and digits are an id; JSON,
    in which null is left out, says itself what is what."""
    given = {name: value for name, value in zip(columns, values, strict=True) if value is not None}
    if not is_text:
        return given
    return {name: _number(value) if name.endswith("_id") else value for name, value in given.items() if value != ""}


def _number(value: object) -> object:
    """The id that a field of CSV stands for; what is no number is left to the validation to name."""
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= ID_DIGITS_MAX
    return int(str(value)) if is_number else value
