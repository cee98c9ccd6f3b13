"""`eci-pay settlement export`: the simulated gateway settles what it has done by its own word, and no file is left
half-written."""

import asyncio
import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from eci_pay.charge_settling import charge_key
from eci_pay.gateways import Approved
from eci_pay.refund_settling import refund_key
from eci_pay.service import PaymentService
from eci_pay.settlement_export import fee_of
from eci_pay.settlement_file import COLUMNS, copy_lines
from eci_pay.table_files import FileFormat, TableFile
from tests.rows import paid
from tests.support import Books, CommandLine, ManualClock, RecordingGateway, charge_request, refund_request
from tests.test_cli import assert_no_traceback

INVALID, UNAVAILABLE = 2, 5
DAY = date(2026, 11, 1)
"""On which the tests' clock stands."""

Line = dict[str, str]


def lines_of(content: bytes) -> list[Line]:
    """What a settlement file says, by column."""
    rows = "".join(copy_lines(TableFile(io.BytesIO(content), "day.csv"))).splitlines()
    return [dict(zip(COLUMNS, row.split("\t")[1:], strict=True)) for row in rows]


async def settled(service: PaymentService, day: date = DAY) -> list[Line]:
    """The lines of a day."""
    written: list[str] = []
    await service.settlements.export(day, FileFormat.CSV, written.append)
    return lines_of("".join(written).encode())


async def charged(service: PaymentService, order_id: int, amount: str, **fields: object) -> int:
    """A payment, whatever has become of it."""
    request = charge_request(order_id, amount=amount, **fields)
    return (await service.charges.charge(request=request, idempotency_key=f"pay {order_id}")).payment_id


async def payment(books: Books, payment_id: int) -> dict[str, Any]:
    """A payment as it is booked."""
    (row,) = await books.rows("SELECT * FROM payments WHERE payment_id = %s", payment_id)
    return row


def brief(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """What was moved."""
    return [(line["type"], line["amount"], line["currency"], line["fee"]) for line in lines]


async def test_all_that_the_gateway_has_done_is_settled_in_the_order_of_its_instants(
    service: PaymentService, books: Books, gateway: RecordingGateway, clock: ManualClock
) -> None:
    captured = await charged(service, 1, "100.00")
    clock.advance(minutes=1)
    unanswered = await charged(service, 2, "4000.08")
    await charged(service, 3, "4000.02")
    await charged(service, 4, "4000.09")
    clock.advance(minutes=1)
    await service.refunds.refund(payment_id=captured, request=refund_request("30.00"))
    clock.advance(minutes=1)
    large = await charged(service, 5, "9000.00", payment_method="UPI")
    clock.advance(minutes=1)
    await service.refunds.refund(payment_id=large, request=refund_request("4000.08"))
    await service.refunds.refund(payment_id=large, request=refund_request("4000.02"))
    await charged(service, 6, "50.00", payment_method="COD")
    await books.rows("UPDATE payments SET status = 'COMPLETED' WHERE order_id = 6")
    await service.refunds.refund(payment_id=6, request=refund_request())
    statuses = await books.rows("SELECT status FROM payments ORDER BY order_id")
    assert [row["status"] for row in statuses] == [
        *("COMPLETED", "PROCESSING", "FAILED", "PROCESSING", "COMPLETED", "REFUNDED")
    ]
    lines = await settled(service)
    assert brief(lines) == [
        ("charge", "100.00", "INR", "2.00"),
        ("charge", "4000.08", "INR", "80.00"),
        ("refund", "30.00", "INR", "0.00"),
        ("charge", "9000.00", "INR", "180.00"),
        ("refund", "4000.08", "INR", "0.00"),
    ]
    assert [line["settled_at"][14:19] for line in lines] == ["00:00", "01:00", "02:00", "03:00", "04:00"]
    assert {line["status"] for line in lines} == {"settled"}
    by_amount = {line["amount"]: line for line in lines if line["type"] == "charge"}
    for payment_id, amount in ((captured, "100.00"), (unanswered, "4000.08"), (large, "9000.00")):
        row = await payment(books, payment_id)
        assert by_amount[amount]["transaction_id"] == row["transaction_id"]
        sent = next(sent for sent in gateway.charges if sent.key == charge_key(row["transaction_id"], 1))
        assert Approved(reference=by_amount[amount]["gateway_reference"]) == await gateway.lookup(sent)
    (refund,) = await books.rows("SELECT * FROM refunds WHERE amount = 30")
    assert (lines[2]["gateway_reference"], lines[2]["transaction_id"]) == (
        refund["gateway_reference"],
        lines[0]["transaction_id"],
    )
    key = refund_key(lines[4]["transaction_id"], (await books.rows("SELECT * FROM refunds ORDER BY 1"))[1]["refund_id"])
    sent_refund = next(sent for sent in gateway.refunds if sent.key == key)
    assert Approved(reference=lines[4]["gateway_reference"]) == await gateway.lookup(sent_refund)


async def test_a_day_is_from_midnight_to_midnight_in_utc(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    clock.now = datetime(2026, 10, 31, 23, 59, 59, 999_999, UTC)
    await paid(service, 1, amount="1.00")
    clock.now = datetime(2026, 11, 1, tzinfo=UTC)
    await paid(service, 2, amount="2.00")
    clock.now = datetime(2026, 11, 1, 23, 59, 59, 999_999, UTC)
    await paid(service, 3, amount="3.00")
    clock.now = datetime(2026, 11, 2, tzinfo=UTC)
    await paid(service, 4, amount="4.00")
    amounts = [[line["amount"] for line in await settled(service, date(2026, *day))] for day in ((10, 31), (11, 1))]
    assert amounts == [["1.00"], ["2.00", "3.00"]]
    assert await settled(service, date(2026, 11, 3)) == []


async def test_refunds_that_the_gateway_was_not_asked_are_not_settled(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1, 2)
    await books.rows("UPDATE payments SET captured_at = NULL WHERE order_id = 2")
    for order_id, status, reference in ((1, "COMPLETED", None), (2, "COMPLETED", "RFND"), (2, "PROCESSING", None)):
        await books.rows(
            "INSERT INTO refunds (payment_id, amount, reason, status, gateway_reference, created_at, completed_at)"
            " SELECT payment_id, 1, 'by hand', %s, %s, %s, %s FROM payments WHERE order_id = %s",
            *(status, reference, clock.now, clock.now, order_id),
        )
    assert brief(await settled(service)) == [("charge", "100.00", "INR", "2.00")]


async def test_all_that_happened_at_one_instant_is_there_once(service: PaymentService) -> None:
    for payment_id in await paid(service, *range(1, 5)):
        await service.refunds.refund(payment_id=payment_id, request=refund_request("1.00"))
    await charged(service, 5, "4000.08")
    lines = await settled(service)
    assert [line["type"] for line in lines] == ["charge"] * 5 + ["refund"] * 4
    assert len({line["gateway_reference"] for line in lines}) == len(lines)


LATE = """
INSERT INTO recoveries (payment_id, attempt, amount, currency, payment_method, begun_at, state, looked_at, ended_at,
                        late_reference, returned_reference)
SELECT payment_id, %s, %s, 'USD', 'UPI', created_at, %s, %s, %s, %s, %s FROM payments
"""


async def test_money_taken_late_is_settled_and_so_is_its_return(service: PaymentService, books: Books) -> None:
    """Once: what was booked after all is there as what it was booked as."""
    await paid(service, 1)
    await books.rows("UPDATE payments SET attempt = 4")
    noon, evening = datetime(2026, 11, 1, 12, 30, tzinfo=UTC), datetime(2026, 11, 1, 20, 0, tzinfo=UTC)
    await books.rows(LATE, 1, 20, "LATE", None, None, "LATE-KEPT", None)
    await books.rows("UPDATE recoveries SET found_at = %s", noon)
    await books.rows(LATE, 2, 30, "DONE", evening, evening, "LATE-RETURNED", "RETURN")
    await books.rows(LATE, 3, 40, "CHECKING", noon, None, "WATCHED", None)
    await books.rows(LATE, 4, 100, "DONE", noon, noon, "BOOKED", None)
    lines = await settled(service)
    assert [(line["gateway_reference"], *moved) for line, moved in zip(lines, brief(lines), strict=True)] == [
        (lines[0]["gateway_reference"], "charge", "100.00", "INR", "2.00"),
        ("LATE-KEPT", "charge", "20.00", "USD", "0.40"),
        ("LATE-RETURNED", "charge", "30.00", "USD", "0.60"),
        ("RETURN", "refund", "30.00", "USD", "0.00"),
    ]
    assert lines[0]["gateway_reference"].startswith("AUTH")
    assert len({line["transaction_id"] for line in lines}) == 1


@pytest.mark.parametrize(
    ("amount", "currency", "fee"),
    [
        ("100.00", "INR", "2.00"),
        ("0.25", "INR", "0.00"),
        ("0.75", "INR", "0.02"),
        ("125", "JPY", "2"),
        ("75", "JPY", "2"),
    ],
)
def test_the_fee_is_rounded_half_to_even_to_the_currency(amount: str, currency: str, fee: str) -> None:
    assert str(fee_of(Decimal(amount), currency)) == fee


async def test_postgresql_reads_a_file_that_was_exported(service: PaymentService, books: Books) -> None:
    await paid(service, 1, 2)
    await books.rows("UPDATE payments SET transaction_id = %s WHERE order_id = 1", '\\N\\t\'a\\\\,"b" \u20ac')
    written: list[str] = []
    await service.settlements.export(DAY, FileFormat.JSONL, written.append)
    await books.rows(
        "CREATE TEMPORARY TABLE staged (line bigint, gateway_reference text, transaction_id text, type text,"
        " amount numeric, currency text, fee numeric, status text, settled_at timestamptz)"
    )
    async with books.connection.cursor().copy("COPY staged FROM STDIN") as copy:
        for chunk in copy_lines(TableFile(io.BytesIO("".join(written).encode()), "day.jsonl")):
            await copy.write(chunk)
    query = (
        "SELECT p.order_id, line, s.amount, fee FROM staged s JOIN payments p USING (transaction_id)"
        " WHERE settled_at = captured_at AND gateway_reference LIKE 'AUTH%%' ORDER BY order_id"
    )
    staged = [tuple(row.values()) for row in await books.rows(query)]
    assert staged == [(1, 1, Decimal(100), Decimal(2)), (2, 2, Decimal(100), Decimal(2))]


# The command


async def test_a_day_is_exported_to_a_file_or_to_standard_output(
    command_line: CommandLine, service: PaymentService, tmp_path: Path
) -> None:
    (payment_id,) = await paid(service, 1, amount="300.00")
    await service.refunds.refund(payment_id=payment_id, request=refund_request("100.00"))
    await charged(service, 2, "500", currency="JPY", payment_method="UPI")
    (tmp_path / "old.csv").write_text("yesterday's\n")
    to_file, as_json, in_lines = await asyncio.gather(
        command_line.run("settlement", "export", "--date=2026-11-01", "--output=new.csv"),
        command_line.run("settlement", "export", "--date=2026-11-01", "--output=old.csv", "--json"),
        command_line.run("settlement", "export", "--date=2026-11-01", "--format=jsonl", "--json"),
    )
    told = "3 lines\nINR 300.00 charged, 100.00 refunded, 6.00 in fees\nJPY 500 charged, 0 refunded, 10 in fees\n"
    assert (to_file.exit_code, to_file.stdout, to_file.stderr) == (0, "", told)
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    assert as_json.json == {
        "lines": 3,
        "sums": {
            "INR": {"charged": "300.00", "refunded": "100.00", "fees": "6.00"},
            "JPY": {"charged": "500", "refunded": "0", "fees": "10"},
        },
    }
    assert (in_lines.exit_code, in_lines.stderr) == (0, told)
    assert len([json.loads(line) for line in in_lines.stdout.splitlines()]) == 3
    exported = lines_of((tmp_path / "new.csv").read_bytes())
    assert lines_of((tmp_path / "old.csv").read_bytes()) == exported
    assert brief(lines_of(in_lines.stdout.encode())) == brief(exported)
    assert brief(exported) == [
        ("charge", "300.00", "INR", "6.00"),
        ("charge", "500", "JPY", "10"),
        ("refund", "100.00", "INR", "0.00"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["new.csv", "old.csv"]


async def test_what_is_invalid_exits_2_and_leaves_the_file_as_it_was(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "kept.csv").write_text("yesterday's\n")
    (tmp_path / "folder").mkdir()
    day, kept = "--date=2026-11-01", "--output=kept.csv"
    cases: dict[tuple[str, ...], str] = {
        (kept,): "--date",
        ("--date=", kept): "--date: : is no day such as 2026-11-22",
        ("--date=yesterday", kept): "--date: yesterday: is no day such as 2026-11-22",
        ("--date=2026-11-31", kept): "is no day",
        ("--date=2026-11-01T00:00:00Z", kept): "is no day",
        ("--date=1999-12-31", kept): "1999-12-31: is not in the years 2000 to 2100",
        (day, kept, "--format=xml"): "xml",
        (day, "--output=folder"): "folder: is no file",
        (day, "--output=nowhere/new.csv"): "nowhere/new.csv: cannot be written: No such file or directory",
        (day, kept, "extra"): "extra",
    }
    results = await asyncio.gather(*(command_line.run("settlement", "export", *arguments) for arguments in cases))
    for (arguments, words), result in zip(cases.items(), results, strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, ""), arguments
        assert words in " ".join(result.stderr.replace("│", " ").split()), (arguments, result.stderr)
        assert_no_traceback(result)
    assert (tmp_path / "kept.csv").read_text() == "yesterday's\n"
    assert sorted(os.listdir(tmp_path)) == ["folder", "kept.csv"]


async def test_a_real_gateway_makes_its_own_file(command_line: CommandLine, tmp_path: Path) -> None:
    stripe = {"ECI_PAY_GATEWAY": "stripe", "ECI_PAY_STRIPE_SECRET_KEY": "sk_test_x"}
    owner = replace(command_line, environment={**command_line.environment, **stripe})
    result = await owner.run("settlement", "export", "--date=2026-11-01", "--output=new.csv")
    assert result.exit_code == INVALID, result.stderr
    assert "your gateway is stripe: ask it for its settlement file [invalid-request]" in result.stderr
    assert os.listdir(tmp_path) == []


async def test_an_export_that_fails_on_its_way_leaves_the_file_as_it_was(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await paid(service, 1)
    (tmp_path / "kept.csv").write_text("yesterday's\n")
    await books.rows("ALTER TABLE recoveries RENAME COLUMN returned_reference TO gone")
    result = await command_line.run("settlement", "export", "--date=2026-11-01", "--output=kept.csv")
    assert result.exit_code == UNAVAILABLE
    assert_no_traceback(result)
    assert (tmp_path / "kept.csv").read_text() == "yesterday's\n"
    assert os.listdir(tmp_path) == ["kept.csv"]


async def test_a_link_and_a_device_are_written_to_and_not_replaced(
    command_line: CommandLine, service: PaymentService, tmp_path: Path
) -> None:
    await paid(service, 1)
    (tmp_path / "real.csv").touch()
    (tmp_path / "link.csv").symlink_to("real.csv")
    os.mkfifo(tmp_path / "pipe")
    linked, pipe = await asyncio.gather(
        command_line.run("settlement", "export", "--date=2026-11-01", "--output=link.csv"),
        command_line.run("settlement", "export", "--date=2026-11-01", "--output=pipe"),
    )
    assert linked.exit_code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert len(lines_of((tmp_path / "real.csv").read_bytes())) == 1
    assert (pipe.exit_code, "pipe: is no file" in pipe.stderr) == (INVALID, True)
    assert (tmp_path / "pipe").is_fifo()
