"""The settlement file: what is read is exactly what was written, and every wrong value is told with its place."""

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eci_pay.differences import Operation
from eci_pay.errors import FileFault, FileInvalid
from eci_pay.money import currency_exponents, whole_amount_currencies
from eci_pay.settlement_file import (
    CHUNK_ROWS,
    COLUMNS,
    STATUS_WORDS,
    SettlementLine,
    SettlementStatus,
    copy_lines,
    write_settlement,
)
from eci_pay.table_files import FileFormat, TableFile

GOOD: Mapping[str, str] = {
    "gateway_reference": "AUTH0123456789AB",
    "transaction_id": "TXN01M82K73A83433WHCDRPSSAG4Q",
    "type": "charge",
    "amount": "1234.50",
    "currency": "INR",
    "fee": "24.69",
    "status": "settled",
    "settled_at": "2026-11-22T10:15:30Z",
}
NO_NUMBER = "is no amount: plain digits are wanted, such as 1234.50"
GROUPED = "has thousands separators: plain digits are wanted, such as 1234.50"
NO_INSTANT = "is no ISO 8601 instant, such as 2026-11-22T10:15:30Z"


def in_csv(*rows: Mapping[str, object]) -> bytes:
    """A file of these rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def in_json(**fields: object) -> bytes:
    """A line that differs in these fields."""
    return json.dumps({**GOOD, **fields}).encode() + b"\n"


def copied(content: bytes) -> list[list[str]]:
    """The fields of COPY's rows."""
    text = "".join(copy_lines(TableFile(io.BytesIO(content), "day.csv")))
    return [row.split("\t") for row in text.splitlines()]


def value_of(column: str, value: object) -> str:
    """What becomes of a value; the same in both formats where it is text."""
    place = 1 + COLUMNS.index(column)
    (from_json,) = copied(in_json(**{column: value}))
    if isinstance(value, str):
        (from_csv,) = copied(in_csv({**GOOD, column: value}))
        assert from_csv[1:] == from_json[1:]
    return from_json[place]


def fault_of(content: bytes) -> FileFault:
    """The only fault of a file."""
    with pytest.raises(FileInvalid) as caught:
        copied(content)
    (fault,) = caught.value.faults
    return fault


def read(content: bytes) -> Iterator[SettlementLine]:
    """The lines, as PostgreSQL would read them."""
    for line, reference, transaction_id, operation, amount, currency, fee, status, settled_at in copied(content):
        yield SettlementLine(
            line=int(line),
            gateway_reference=reference.replace("\\\\", "\\"),
            transaction_id=transaction_id.replace("\\\\", "\\"),
            type=Operation(operation),
            amount=Decimal(amount),
            currency=currency,
            fee=None if fee == "\\N" else Decimal(fee),
            status=SettlementStatus(status),
            settled_at=datetime.fromisoformat(settled_at),
        )


def names(length_max: int) -> st.SearchStrategy[str]:
    """Printable, without spaces around."""
    printable = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
    return st.text(printable, min_size=1, max_size=length_max).filter(lambda name: name == name.strip())


@st.composite
def lines(draw: st.DrawFn, line: int) -> SettlementLine:
    """Any valid line."""
    currency = draw(st.sampled_from(sorted(currency_exponents())))
    unit = Decimal(1) if currency in whole_amount_currencies() else Decimal("0.01")
    cents = st.integers(-(10**12), 10**12).map(lambda number: number * unit)
    return SettlementLine(
        line=line,
        gateway_reference=draw(names(100)),
        transaction_id=draw(names(50)),
        type=draw(st.sampled_from(Operation)),
        amount=draw(st.integers(1, 10**12 - 1)) * unit,
        currency=currency,
        fee=draw(st.none() | cents.filter(lambda fee: abs(fee) < 10**12)),
        status=draw(st.sampled_from(SettlementStatus)),
        settled_at=draw(
            st.datetimes(datetime(2000, 1, 1), datetime(2100, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
        ),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read_whatever_the_order_of_the_columns(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 5))
    in_file = [data.draw(lines(line)) for line in range(2, count + 2)]
    text = "".join(write_settlement(in_file, FileFormat.CSV))
    assert list(read(text.encode())) == in_file
    order = data.draw(st.permutations(range(len(COLUMNS))))
    moved = io.StringIO()
    csv.writer(moved).writerows([row[place] for place in order] for row in csv.reader(io.StringIO(text)))
    assert list(read(moved.getvalue().encode())) == in_file
    if in_file:
        as_json = "".join(write_settlement(in_file, FileFormat.JSONL))
        assert list(read(b"\n" + as_json.encode())) == in_file  # a blank line, for there is no header


def test_a_written_file_looks_like_this() -> None:
    charge = SettlementLine(
        line=2,
        gateway_reference="AUTH1",
        transaction_id="TXN1",
        type=Operation.CHARGE,
        amount=Decimal("1200"),
        currency="INR",
        fee=Decimal("24"),
        status=SettlementStatus.SETTLED,
        settled_at=datetime(2026, 11, 22, 10, 15, tzinfo=UTC),
    )
    header = "gateway_reference,transaction_id,type,amount,currency,fee,status,settled_at\n"
    row = "AUTH1,TXN1,charge,1200.00,INR,24.00,settled,2026-11-22T10:15:00Z\n"
    assert "".join(write_settlement([charge], FileFormat.CSV)) == header + row
    assert json.loads("".join(write_settlement([charge], FileFormat.JSONL))) == {
        "gateway_reference": "AUTH1",
        "transaction_id": "TXN1",
        "type": "charge",
        "amount": "1200.00",
        "currency": "INR",
        "fee": "24.00",
        "status": "settled",
        "settled_at": "2026-11-22T10:15:00Z",
    }
    assert "".join(write_settlement([], FileFormat.CSV)) == header


def test_rows_are_copied_in_the_order_of_the_columns_with_their_line_first() -> None:
    assert copied(b"\n" + in_csv({**GOOD, "more": "x"})) == [
        ["3", *(GOOD[name] if name != "settled_at" else "2026-11-22T10:15:30+00:00" for name in COLUMNS)]
    ]


def test_an_instant_without_its_zone_is_told_of_once() -> None:
    rows = [
        {**GOOD, "settled_at": instant} for instant in ("2026-11-22T10:15:30", "2026-11-22", "2026-11-22T10:15:30Z")
    ]
    for lines, warnings in ((rows, 1), (rows[2:], 0)):
        file = TableFile(io.BytesIO(in_csv(*lines)), "settlement.csv")
        assert len(list(copy_lines(file))) == 1
        assert file.warnings == ["settlement.csv: settled_at has no zone in some lines; it was read as UTC"] * warnings


def test_the_fee_may_be_missing_from_the_file_and_nothing_else() -> None:
    without_fee = {name: value for name, value in GOOD.items() if name != "fee"}
    (row,) = copied(in_csv(without_fee))
    assert row[1 + COLUMNS.index("fee")] == "\\N"
    for name in without_fee:
        fewer = {other: value for other, value in GOOD.items() if other != name}
        assert fault_of(in_csv(fewer)) == FileFault(message=f"the header lacks {name}", line=1)
        assert fault_of(json.dumps(fewer).encode()).column == name


def test_many_rows_are_copied_in_chunks() -> None:
    count = 2 * CHUNK_ROWS + 1
    content = in_csv(*[GOOD] * count)
    chunks = list(copy_lines(TableFile(io.BytesIO(content), "day.csv")))
    assert [chunk.count("\n") for chunk in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 1]
    assert all(chunk.endswith("\n") for chunk in chunks)
    last = content + in_csv({**GOOD, "amount": "x"}).splitlines(keepends=True)[1]
    assert fault_of(last) == FileFault(message=f"'x' {NO_NUMBER}", line=count + 2, column="amount")


def test_a_header_alone_is_a_day_on_which_nothing_was_settled() -> None:
    assert copied(in_csv(GOOD).splitlines(keepends=True)[0]) == []


@pytest.mark.parametrize(
    ("column", "value", "read_as"),
    [
        ("gateway_reference", "  A\\B C\t", "A\\\\B C"),
        ("gateway_reference", "\\N", "\\\\N"),
        ("transaction_id", "x" * 50, "x" * 50),
        ("type", " Refund ", "refund"),
        ("amount", "1234", "1234"),
        ("amount", " 0001234.5000 ", "1234.5"),
        ("amount", "999999999999.99", "999999999999.99"),
        ("amount", 1234, "1234"),
        ("amount", 0.1, "0.1"),
        ("amount", 1e2, "100"),
        ("currency", " usd", "USD"),
        ("fee", "0", "0"),
        ("fee", "-0.50", "-0.5"),
        ("fee", "0.123456", "0.123456"),
        ("fee", " ", "\\N"),
        ("fee", None, "\\N"),
        ("fee", -1, "-1"),
        ("status", "In_Progress", "pending"),
        ("settled_at", "2026-11-22T10:15:30.123456Z", "2026-11-22T10:15:30.123456+00:00"),
        ("settled_at", "2026-11-22T00:15:30+05:30", "2026-11-21T18:45:30+00:00"),
        ("settled_at", " 2026-11-22 10:15-02:00 ", "2026-11-22T12:15:00+00:00"),
        ("settled_at", "2100-12-31T23:59:59Z", "2100-12-31T23:59:59+00:00"),
        ("settled_at", "2026-11-22T10:15:30", "2026-11-22T10:15:30+00:00"),
        ("settled_at", "2026-11-22", "2026-11-22T00:00:00+00:00"),
    ],
)
def test_a_value_is_read(column: str, value: object, read_as: str) -> None:
    assert value_of(column, value) == read_as


def test_every_word_for_a_status_is_known() -> None:
    words = [(word, str(status)) for status, of_status in STATUS_WORDS.items() for word in of_status]
    assert len(words) == len(dict(words)) == 16
    for word, status in words:
        assert value_of("status", word) == value_of("status", word.upper()) == status


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("gateway_reference", " ", "is empty"),
        ("gateway_reference", "x" * 101, f"'{'x' * 60}...' has more than 100 characters"),
        ("gateway_reference", "a\tb", "'a\\tb' has control characters"),
        ("gateway_reference", "a\nb", "'a\\nb' has control characters"),
        ("transaction_id", "", "is empty"),
        ("transaction_id", "x" * 51, f"'{'x' * 51}' has more than 50 characters"),
        ("transaction_id", "a\x7f", "'a\\x7f' has control characters"),
        ("type", "chargeback", "'chargeback' is none of charge, refund"),
        ("amount", "1,234.50", f"'1,234.50' {GROUPED}"),
        ("amount", "1,23,456", f"'1,23,456' {GROUPED}"),
        ("amount", "1.234,50", f"'1.234,50' {NO_NUMBER}"),
        ("amount", "12.345", "'12.345' must have at most 2 decimals"),
        ("amount", "0", "'0' is not greater than 0"),
        ("amount", "0.00", "'0.00' is not greater than 0"),
        ("amount", "-1.00", "'-1.00' is not greater than 0"),
        ("amount", "1000000000000", "'1000000000000' has more than 12 digits before the point"),
        ("amount", "", f"'' {NO_NUMBER}"),
        ("fee", "0.1234567", "'0.1234567' must have at most 6 decimals"),
        ("fee", "-1,000", f"'-1,000' {GROUPED}"),
        ("fee", "1e2", f"'1e2' {NO_NUMBER}"),
        ("currency", "XXX", "'XXX' is not an ISO 4217 currency code"),
        ("currency", "\u0131nr", "'\u0131nr' is not an ISO 4217 currency code"),
        ("status", "unknown", f"'unknown' is none of {', '.join(sum(STATUS_WORDS.values(), ()))}"),
        ("settled_at", "22.11.2026 10:15", f"'22.11.2026 10:15' {NO_INSTANT}"),
        ("settled_at", "2026-02-29T10:15:30Z", f"'2026-02-29T10:15:30Z' {NO_INSTANT}"),
        ("settled_at", "2026-11-22T24:15:30Z", f"'2026-11-22T24:15:30Z' {NO_INSTANT}"),
        ("settled_at", "1999-12-31T23:59:59Z", "'1999-12-31T23:59:59Z' is not in the years 2000 to 2100"),
        ("settled_at", "2100-12-31T23:59:59-01:00", "'2100-12-31T23:59:59-01:00' is not in the years 2000 to 2100"),
        ("settled_at", "0001-01-01T00:00:00+14:00", "'0001-01-01T00:00:00+14:00' is not in the years 2000 to 2100"),
    ],
)
def test_a_wrong_value_is_told_with_its_line_and_column(column: str, value: str, words: str) -> None:
    fault = fault_of(in_csv(GOOD, {**GOOD, column: value}))
    assert fault == FileFault(message=words, line=3, column=column)
    assert fault_of(in_json() + in_json(**{column: value})) == FileFault(message=words, line=2, column=column)


@pytest.mark.parametrize("text", ["+1", ".5", "5.", "1_000", "\u0661", "1e2", "0x1", "NaN", "Infinity", "1 ,0", "--1"])
def test_an_amount_is_plain_digits(text: str) -> None:
    assert fault_of(in_csv({**GOOD, "amount": text})).message.endswith(NO_NUMBER)


def test_an_amount_has_no_more_decimals_than_its_currency() -> None:
    def amount(text: str, currency: str) -> bytes:
        return in_csv({**GOOD, "fee": "0", "amount": text, "currency": currency})

    assert copied(amount("1.00", "JPY"))[0][4] == "1"
    assert fault_of(amount("1.50", "jpy")) == FileFault(
        message="'1.50' must be whole, for JPY has no minor unit", line=2, column="amount"
    )
    assert copied(amount("1.500", "KWD"))[0][4] == "1.5"
    assert fault_of(amount("1.505", "KWD")).message == "'1.505' must have at most 2 decimals"
    assert copied(in_csv({**GOOD, "amount": "100", "fee": "0.50", "currency": "JPY"}))[0][6] == "0.5"


@pytest.mark.parametrize("value", [True, None, [], {}, [1], {"a": 1}])
def test_json_that_is_no_text_and_no_number_is_refused(value: object) -> None:
    for column in COLUMNS:
        if (column, value) != ("fee", None):
            fault = fault_of(in_json(**{column: value}))
            assert (fault.column, fault.message.split(", not ")[0]) == (
                column,
                "must be a number" if column in ("amount", "fee") else "must be text",
            )


def test_a_json_number_is_exact_and_within_reason() -> None:
    def amount(digits: str) -> bytes:
        return json.dumps({**GOOD, "amount": "?"}).replace('"?"', digits).encode() + b"\n"

    assert copied(amount("0.07"))[0][4] == "0.07"
    assert copied(amount("123456789012.34"))[0][4] == "123456789012.34"
    assert fault_of(amount("0.070000000000000001")).message.endswith("must have at most 2 decimals")
    for digits in ("1e999999", "1e-999999", "-1e400000"):
        assert fault_of(amount(digits)).message.endswith("is no amount of money")
    assert fault_of(amount("1" * 400)).message == f"'{'1' * 60}...' has more than 12 digits before the point"
    assert fault_of(in_json(transaction_id=5)).message == "must be text, not a number"


def test_lone_surrogates_and_nul_in_json_are_refused() -> None:
    for escape in ("\\ud800", "\\u0000"):
        content = json.dumps({**GOOD, "transaction_id": "?"}).replace("?", f"a{escape}").encode() + b"\n"
        assert fault_of(content).message.endswith("has control characters")


def test_a_line_that_is_cut_off_is_said_to_be() -> None:
    content = in_csv(GOOD, GOOD).replace(b"\r\n", b"\n").rstrip(b"\n")
    for length in range(1, len("2026-11-22T10:15:30Z")):
        fault = fault_of(content[:-length])
        assert (fault.line, fault.column) == (3, "settled_at")
        assert fault.message.endswith("(the file ends there, without a newline)")
    assert len(copied(content)) == 2


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_damage_raises_anything_but_file_invalid(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([in_csv(GOOD, GOOD), in_json() + in_json(fee=1.5)])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        rows = copied(bytes(content))
    except FileInvalid:
        return
    assert all(len(row) == 1 + len(COLUMNS) for row in rows)


def test_days_and_currencies_that_were_seen_before_are_still_checked() -> None:
    """What is remembered is the value itself, not that some value was good."""
    moments = [datetime(2026, 11, 22, tzinfo=UTC) + timedelta(hours=hour) for hour in range(72)]
    random.Random(1).shuffle(moments)
    currencies = ["INR", "usd", "JPY", "inr", "USD"]
    rows = [
        {**GOOD, "fee": "", "amount": "5", "settled_at": moment.isoformat(), "currency": currencies[number % 5]}
        for number, moment in enumerate(moments)
    ]
    read_rows = copied(in_csv(*rows))
    assert [datetime.fromisoformat(row[8]) for row in read_rows] == moments
    assert [row[5] for row in read_rows] == [currencies[number % 5].upper() for number in range(72)]
    assert fault_of(in_csv(*rows, {**GOOD, "settled_at": "2026-11-31T10:15:30Z"})).line == 74
