"""The settlement file: what the gateway says of each charge and refund, a line each.

| Column | In the file |
|---|---|
| `gateway_reference` | the gateway's own name of the operation, 1 to 100 characters |
| `transaction_id` | our name of the payment (TXN...), which the gateway was given, 1 to 50 characters |
| `type` | `charge` or `refund` |
| `amount` | major units, plain digits with a decimal point, above 0 |
| `currency` | ISO 4217 |
| `fee` | as `amount`, but may be 0, negative (a credit) or left out |
| `status` | one of the words of `STATUS_WORDS` |
| `settled_at` | ISO 8601, from 2000 to 2100; UTC where it has no zone |

Surrounding spaces do not matter, nor does the letter case of type, currency and status. Trailing zeros are no decimals.
In JSON Lines an amount is a number or a string.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from io import StringIO
from itertools import islice

from eci_pay.differences import Operation
from eci_pay.money import currency_exponents, parse_currency, plain
from eci_pay.table_files import FileFormat, Row, TableFile, shown

COLUMNS = ("gateway_reference", "transaction_id", "type", "amount", "currency", "fee", "status", "settled_at")
OPTIONAL = ("fee",)
GATEWAY_REFERENCE_LENGTH_MAX = 100
TRANSACTION_ID_LENGTH_MAX = 50
WHOLE_DIGITS_MAX = 12
"""Of an amount, before its decimal point."""
DECIMALS_MAX = 2
FEE_DECIMALS_MAX = 6
"""Gateways reckon finer than they pay."""
YEAR_MIN, YEAR_MAX = 2000, 2100
CHUNK_ROWS = 1000


class SettlementStatus(StrEnum):
    """Where an operation stands at the gateway; only what is settled is money."""

    SETTLED = "settled"
    PENDING = "pending"
    FAILED = "failed"


STATUS_WORDS: Mapping[SettlementStatus, tuple[str, ...]] = {
    SettlementStatus.SETTLED: (
        "settled", "completed", "succeeded", "success", "approved", "captured", "paid", "refunded",
    ),
    SettlementStatus.PENDING: ("pending", "processing", "in_progress"),
    SettlementStatus.FAILED: ("failed", "declined", "rejected", "canceled", "cancelled"),
}  # fmt: skip
"""How gateways say it."""

_STATUSES = {word: str(status) for status, words in STATUS_WORDS.items() for word in words}
_OPERATIONS = {str(operation): str(operation) for operation in Operation}
_KINDS: Mapping[type, str] = {type(None): "null", bool: "true or false", list: "an array", dict: "an object"}
_AMOUNT = re.compile(r"(-?)([0-9]+)(?:\.([0-9]+))?")
_GROUPED = re.compile(r"-?[0-9]{1,3}(?:[,' ][0-9]{2,3})+(?:\.[0-9]*)?")
_USUAL_AMOUNT = re.compile(rf"[0-9]{{1,{WHOLE_DIGITS_MAX}}}(?:\.[0-9]{{1,{DECIMALS_MAX}}})?")
_USUAL_INSTANT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|\+00:00)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettlementLine:
    """One line; amounts in major units, `settled_at` in UTC. `line` counts from 1, the header among them."""

    line: int
    gateway_reference: str
    transaction_id: str
    type: Operation
    amount: Decimal
    currency: str
    fee: Decimal | None
    status: SettlementStatus
    settled_at: datetime


class _Fault(Exception):
    """What is wrong with one value."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def copy_lines(file: TableFile) -> Iterator[str]:
    """The rows of a file as PostgreSQL's COPY reads text, `CHUNK_ROWS` at a time: the line, then the columns in the
    order of `COLUMNS`. Raises FileInvalid at the first fault.

    Values stay text all the way: to make objects of a million lines would take several times as long.
    """
    required = tuple(name for name in COLUMNS if name not in OPTIONAL)
    rows = file.rows(required, OPTIONAL)
    copied = _Copied()
    while chunk := list(islice(rows, CHUNK_ROWS)):
        texts: list[str] = []
        for row in chunk:
            try:
                texts.append(copied.text(row))
            except _Fault as fault:
                raise file.fault(str(fault), line=row[0], column=fault.column) from None
        yield "".join(texts)
    if copied.zoneless_line is not None:
        if file.ends_within(copied.zoneless_line):
            raise file.fault("has no zone", line=copied.zoneless_line, column="settled_at")
        file.warnings.append(f"{file.name}: settled_at has no zone in some lines; it was read as UTC")


class _Copied:
    """Validates rows; remembers the days and currencies of those before, which are few."""

    def __init__(self) -> None:
        self.zoneless_line: int | None = None
        """The last one whose instant has no zone."""
        self._days: set[str] = set()
        self._currencies: dict[str, tuple[str, int]] = {}

    def text(self, row: Row) -> str:
        """A row of COPY's text format."""
        line, (reference, transaction_id, operation, amount, currency, status, settled_at, fee) = row
        code, decimals = self._currency(currency)
        return (
            f"{line}\t{_name(reference, 'gateway_reference', GATEWAY_REFERENCE_LENGTH_MAX)}"
            f"\t{_name(transaction_id, 'transaction_id', TRANSACTION_ID_LENGTH_MAX)}"
            f"\t{_word(operation, 'type', _OPERATIONS)}"
            f"\t{_amount(amount, code, decimals)}\t{code}\t{_fee(fee, code, decimals)}"
            f"\t{_word(status, 'status', _STATUSES)}\t{self._instant(settled_at, line)}\n"
        )

    def _currency(self, value: object) -> tuple[str, int]:
        """The code, and how many decimals an amount may have."""
        text = _string(value, "currency")
        known = self._currencies.get(text)
        if known is None:
            try:
                code = parse_currency(text)
            except ValueError as error:
                raise _Fault("currency", f"{shown(text)} {error}") from None
            known = self._currencies[text] = code, min(currency_exponents()[code], DECIMALS_MAX)
        return known

    def _instant(self, value: object, line: int) -> str:
        text = _string(value, "settled_at")
        usual = _USUAL_INSTANT.fullmatch(text)
        if usual and usual[1] in self._days:
            return text
        instant, has_zone = _parsed_instant(text)
        if not has_zone:
            self.zoneless_line = line
        if usual:
            self._days.add(usual[1])
        return instant.isoformat()


def _string(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise _Fault(column, f"must be text, not {_KINDS.get(type(value), 'a number')}")
    return value.strip()


def _name(value: object, column: str, length_max: int) -> str:
    text = _string(value, column)
    if not text:
        raise _Fault(column, "is empty")
    if len(text) > length_max:
        raise _Fault(column, f"{shown(text)} has more than {length_max} characters")
    if not text.isprintable():
        raise _Fault(column, f"{shown(text)} has control characters")
    return text.replace("\\", "\\\\")


def _word(value: object, column: str, words: Mapping[str, str]) -> str:
    text = _string(value, column)
    known = words.get(text) or words.get(text.lower())
    if known is None:
        raise _Fault(column, f"{shown(value)} is none of {', '.join(words)}")
    return known


def _amount(value: object, currency: str, decimals: int) -> str:
    if decimals == DECIMALS_MAX and type(value) is str and _USUAL_AMOUNT.fullmatch(value) and value.strip("0."):
        return value
    text = _exact_amount(value, "amount", currency, decimals)
    if text.startswith("-") or not text.strip("0."):
        raise _Fault("amount", f"{shown(value)} is not greater than 0")
    return text


def _fee(value: object, currency: str, decimals: int) -> str:
    if decimals == DECIMALS_MAX and type(value) is str and _USUAL_AMOUNT.fullmatch(value):
        return value
    if value is None or (isinstance(value, str) and not value.strip()):
        return "\\N"
    return _exact_amount(value, "fee", currency, FEE_DECIMALS_MAX)


def _exact_amount(value: object, column: str, currency: str, decimals: int) -> str:
    """Exactly what is meant, without the zeros that mean nothing."""
    text = _amount_text(value, column)
    found = _AMOUNT.fullmatch(text)
    if found is None:
        if _GROUPED.fullmatch(text):
            raise _Fault(column, f"{shown(text)} has thousands separators: plain digits are wanted, such as 1234.50")
        raise _Fault(column, f"{shown(text)} is no amount: plain digits are wanted, such as 1234.50")
    sign, whole, fraction = found[1], found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    if len(whole) > WHOLE_DIGITS_MAX:
        raise _Fault(column, f"{shown(text)} has more than {WHOLE_DIGITS_MAX} digits before the point")
    if len(fraction) > decimals:
        limit = f"have at most {decimals} decimals" if decimals else f"be whole, for {currency} has no minor unit"
        raise _Fault(column, f"{shown(text)} must {limit}")
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


def _amount_text(value: object, column: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise _Fault(column, f"must be a number, not {_KINDS[type(value)]}")
    # A number beyond any reason is not written out: 1e999999 would be a million digits.
    if isinstance(value, Decimal) and abs(value.adjusted()) > 2 * WHOLE_DIGITS_MAX:
        raise _Fault(column, f"{shown(value)} is no amount of money")
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _parsed_instant(text: str) -> tuple[datetime, bool]:
    """In UTC, and whether it says so: a date is its midnight, and what has no zone is taken for UTC."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise _Fault("settled_at", f"{shown(text)} is no ISO 8601 instant, such as 2026-11-22T10:15:30Z") from None
    has_zone = instant.tzinfo is not None
    try:
        utc = instant.astimezone(UTC) if has_zone else instant.replace(tzinfo=UTC)
    except OverflowError:
        utc = instant
    if not YEAR_MIN <= utc.year <= YEAR_MAX:
        raise _Fault("settled_at", f"{shown(text)} is not in the years {YEAR_MIN} to {YEAR_MAX}")
    return utc, has_zone


def write_settlement(lines: Iterable[SettlementLine], file_format: FileFormat) -> Iterator[str]:
    """The file of these lines: in JSON Lines, or else CSV with its header. Where they say they stand is left out."""
    yield settlement_header(file_format)
    for line in lines:
        yield settlement_text(line, file_format)


def settlement_header(file_format: FileFormat) -> str:
    """What a file begins with."""
    return "" if file_format is FileFormat.JSONL else _csv_row(COLUMNS)


def settlement_text(line: SettlementLine, file_format: FileFormat) -> str:
    """A line as it is in the file."""
    values = (
        line.gateway_reference,
        line.transaction_id,
        str(line.type),
        plain(line.amount, line.currency),
        line.currency,
        None if line.fee is None else plain(line.fee, line.currency),
        str(line.status),
        line.settled_at.isoformat().replace("+00:00", "Z"),
    )
    if file_format is FileFormat.JSONL:
        return json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False) + "\n"
    return _csv_row(values)


def _csv_row(values: Iterable[str | None]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
