"""Files of refunds and charges: validated whole, done once, however often and by however many they are run."""

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eci_pay import bulk_files
from eci_pay.bulk_files import FAULTS_SHOWN_MAX, BulkFile, BulkKind, read_bulk_file
from eci_pay.bulk_plans import RefundPlanner, sums_by_currency
from eci_pay.bulk_runs import RERUN_WITHIN, UNAVAILABLE_ROWS_MAX, End, Outcome, Report, Result
from eci_pay.errors import FileInvalid, FileRunTooLongAgo, RequestTooLate, Unavailable
from eci_pay.gateways import GatewayRefund, GatewayUnavailable
from eci_pay.gateways import Outcome as Told
from eci_pay.service import PaymentService
from tests.door import Door
from tests.rows import paid
from tests.support import (
    Books,
    ManualClock,
    Opener,
    RecordingGateway,
    assert_books_are_true,
    charge_fields,
    charge_request,
    refund_request,
    until,
)

REASON = "Damaged in transit"


def refunds(*rows: str, header: str = "payment_id,order_id,amount,reason") -> BulkFile:
    """A file of refunds; where a row has no reason, a good one is added."""
    return read(BulkKind.REFUND, "\n".join([header, *rows, ""]))


def charges(*rows: dict[str, object]) -> BulkFile:
    """A file of charges."""
    return read(BulkKind.CHARGE, "".join(f"{json.dumps(row)}\n" for row in rows))


def read(kind: BulkKind, text: str) -> BulkFile:
    """A file of that text."""
    return read_bulk_file(kind, io.BytesIO(text.encode()), "batch")


def faults_of(kind: BulkKind, text: str) -> list[str]:
    """What is told of a file that is not valid."""
    with pytest.raises(FileInvalid) as caught:
        read(kind, text)
    return [str(fault) for fault in caught.value.faults]


async def run(
    service: PaymentService,
    file: BulkFile,
    *,
    concurrency: int = 16,
    on_row: Callable[[Result], None] = lambda _: None,
) -> Report:
    """Plans a file and runs it."""
    begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    return await begun(concurrency=concurrency, on_row=on_row)


def outcomes(report: Report) -> list[str]:
    """How the rows ended, in the file's order."""
    return [result.outcome.value for result in report.results]


async def test_refunds_are_made_by_payment_or_order_of_a_part_or_of_all_that_is_left(
    service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    first, second, third = await paid(service, 1, 2, 3)
    file = refunds(f"{first},,30.00,{REASON}", f",2,,{REASON}", f",1,,{REASON}", f"{third},,0.01,{REASON}")
    report = await run(service, file)
    assert (outcomes(report), report.end) == (["done"] * 4, End.COMPLETE)
    assert [result.amount for result in report.results] == [Decimal(x) for x in ("30.00", "100.00", "70.00", "0.01")]
    assert [result.payment_id for result in report.results] == [first, second, first, third]
    found = await books.rows("SELECT refund_id, payment_id, amount, reason FROM refunds")
    assert {(row["refund_id"], row["payment_id"], row["amount"]) for row in found} == {
        (result.refund_id, result.payment_id, result.amount) for result in report.results
    }
    assert {row["reason"] for row in found} == {REASON}
    (total,) = report.sums()
    assert (total.outcome, total.currency, total.count, total.sum) == (Outcome.DONE, "INR", 4, Decimal("200.01"))
    await assert_books_are_true(books, gateway)


async def test_charges_are_made_of_every_method_and_whoever_is_declined_stops_nobody(
    service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    file = charges(
        charge_fields(1),
        charge_fields(2, amount="4000.02"),
        charge_fields(3, amount="4000.08"),
        charge_fields(4, payment_method="COD", currency="USD"),
    )
    report = await run(service, file)
    assert outcomes(report) == ["done", "declined", "unknown", "done"]
    assert report.results[1].detail.startswith("card_declined: ")
    rows = await books.rows("SELECT order_id, transaction_id FROM payments ORDER BY order_id")
    assert [(result.task.order_id, result.transaction_id) for result in report.results] == [
        (row["order_id"], row["transaction_id"]) for row in rows
    ]
    again = await run(service, file)
    assert outcomes(again) == ["replayed", "declined", "unknown", "replayed"]
    assert len(gateway.charges) == 3


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["is empty"]),
        ("payment_id,amount,reason\n", ["has no rows"]),
        ("payment_id,ammount,reason\n1,5,Damaged\n", ["line 1, column ammount: is not known; known are payment_id, "
         "order_id, amount, reason"]),
        (
            "payment_id,order_id,amount,reason\n1,2,,Damaged\n,,1,Damaged\nx,,1,Damaged\n1,,1e2,bad\n1,,,\n",
            [
                "line 2, column payment_id: give either a payment_id or an order_id",
                "line 3, column payment_id: give either a payment_id or an order_id",
                "line 4, column payment_id: must be a whole number",
                "line 5, column amount: must be a number or a plain decimal string",
                "line 5, column reason: is too short",
                "line 6, column reason: is required",
            ],
        ),
        (
            '{"payment_id": 0, "reason": "Damaged"}\n\n'
            '{"payment_id": true, "reason": "Damaged"}\n{"payment_id": 1}\n[]\n',
            [
                "line 1, column payment_id: must be greater than or equal to 1",
                "line 3, column payment_id: must be a whole number",
                "line 4, column reason: is required",
                "line 5: must be a JSON object",
            ],
        ),
        (
            "payment_id,amount,reason\n1,,Damaged\n1,,Damaged,1\n",
            ["line 3: has 4 fields, and the header has 3: a comma within a value needs quotes around it"],
        ),
        ("payment_id,amount,reason\n7,0,Dam", [
            "line 2, column amount: must be greater than 0 after rounding to two decimals "
            "(the file ends there, without a newline)",
            "line 2, column reason: is too short (the file ends there, without a newline)",
            "the last line does not end with a newline: is the file cut off?",
        ]),
        ("payment_id,amount,reason\n7,5,Damaged\n22,Damaged in tran,", [
            "line 3, column amount: must be a number or a plain decimal string "
            "(the file ends there, without a newline)",
            "line 3, column reason: is required (the file ends there, without a newline)",
            "the last line does not end with a newline: is the file cut off?",
        ]),
        ("order_id,reason,amount\n7,Damaged,5\n22,Damaged,", [
            "the last line does not end with a newline: is the file cut off?",
        ]),
        ("payment_id,reason\n7,Damaged\n", ["line 1: the header lacks amount"]),
        (
            '{"order_id": "7", "amount": 1, "reason": "Damaged"}\n{"order_id": 7, "amount": "", "reason": "Damaged"}',
            [
                "line 1, column order_id: must be a whole number",
                "line 2, column amount: must be a number or a plain decimal string "
                "(the file ends there, without a newline)",
            ],
        ),
    ],
)  # fmt: skip
def test_every_fault_of_a_file_of_refunds_is_told_with_its_place(text: str, faults: list[str]) -> None:
    assert faults_of(BulkKind.REFUND, text) == faults


def test_every_fault_of_a_file_of_charges_is_told_with_its_place() -> None:
    rows = [charge_fields(1, amount="0"), charge_fields(2, payment_method="CASH"), charge_fields(3, curency="USD")]
    told = faults_of(BulkKind.CHARGE, "".join(f"{json.dumps(row)}\n" for row in rows))
    assert [fault.partition(":")[0] for fault in told] == [
        "line 1, column amount",
        "line 2, column payment_method",
        "line 3, column curency",
    ]


def test_of_very_many_faults_the_first_are_told_and_the_others_counted() -> None:
    told = faults_of(BulkKind.REFUND, "payment_id,amount,reason\n" + "1,,bad\n" * (FAULTS_SHOWN_MAX + 1234))
    assert len(told) == FAULTS_SHOWN_MAX + 1
    assert told[-2:] == [f"line {FAULTS_SHOWN_MAX + 1}, column reason: is too short", "and 1,234 more faults"]


def test_a_file_has_a_most_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_files, "BATCH_ROWS_MAX", 2)
    assert len(refunds("1,,,Damaged", "2,,,Damaged").rows) == 2
    assert faults_of(BulkKind.REFUND, "payment_id,amount,reason\n1,,Damaged\n2,,Damaged\n3,,Damaged\n") == [
        "line 4: a file has at most 2 rows"
    ]


def test_charges_may_be_csv_too() -> None:
    text = "order_id,user_id,amount,payment_method,currency\n1,7,12.50,UPI,usd\n2,7,12.50,COD,\n"
    file = read(BulkKind.CHARGE, text)
    assert [row.request.model_dump(include={"order_id", "currency"}) for row in file.rows] == [
        {"order_id": 1, "currency": "USD"},
        {"order_id": 2, "currency": "INR"},
    ]


async def test_nothing_is_refunded_where_any_row_does_not_fit_the_books(
    service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    first, second, whole = await paid(service, 1, 2, 3)
    await service.refunds.refund(payment_id=whole, request=refund_request())
    cash = (await run(service, charges(charge_fields(4, payment_method="COD")))).results[0].payment_id
    gateway.refunds.clear()
    file = refunds(
        f"{first},,60.00,{REASON}",
        f",1,40.01,{REASON}",
        f",1,,{REASON}",
        f"{first},,,{REASON}",
        f"{second},,,{REASON}",
        f"{whole},,1,{REASON}",
        f",4,1,{REASON}",
        f"999,,1,{REASON}",
        f",999,1,{REASON}",
    )
    with pytest.raises(FileInvalid) as caught:
        await run(service, file)
    assert [str(fault) for fault in caught.value.faults] == [
        "line 3, column amount: 40.00 INR of the payment are left to refund",
        "line 5, column amount: 0.00 INR of the payment are left to refund",
        "line 7, column payment_id: a REFUNDED payment cannot be refunded, only a COMPLETED one",
        "line 8, column order_id: a PENDING payment cannot be refunded, only a COMPLETED one",
        "line 9, column payment_id: there is no payment 999",
        "line 10, column order_id: there is no payment of order 999",
    ]
    assert cash is not None
    assert gateway.refunds == []
    assert await books.value("SELECT count(*) FROM bulk_runs WHERE kind = 'refund'") == 0


async def test_a_currency_without_a_minor_unit_is_refunded_in_whole_amounts(service: PaymentService) -> None:
    await run(service, charges(charge_fields(1, currency="JPY")))
    with pytest.raises(FileInvalid) as caught:
        await run(service, refunds(f",1,10.50,{REASON}"))
    (fault,) = caught.value.faults
    assert str(fault) == "line 2, column amount: must be a whole amount, for JPY has no minor unit"


async def test_nothing_is_charged_where_any_order_is_paid_or_there_twice(
    service: PaymentService, gateway: RecordingGateway
) -> None:
    await paid(service, 1)
    gateway.charges.clear()
    file = charges(charge_fields(1), charge_fields(2), charge_fields(2, amount="5"))
    with pytest.raises(FileInvalid) as caught:
        await run(service, file)
    assert [str(fault) for fault in caught.value.faults] == [
        "line 1, column order_id: order 1 is completed",
        "line 3, column order_id: order 2 is there twice, first in line 2",
    ]
    assert gateway.charges == []


async def test_the_same_file_again_replays_what_is_done_and_refunds_nothing_twice(
    service: PaymentService, gateway: RecordingGateway, books: Books, clock: ManualClock
) -> None:
    payment_ids = await paid(service, *range(1, 6), amount="9000.00")
    amounts = ("10", "4000.02", "4000.08", "", "20")
    file = refunds(*(f"{each},,{amount},{REASON}" for each, amount in zip(payment_ids, amounts, strict=True)))
    first = await run(service, file)
    assert outcomes(first) == ["done", "declined", "unknown", "done", "done"]
    clock.advance(hours=21.9)
    plan = await service.bulk.plan(file)
    assert plan.to_do == []
    assert [task.amount for task in plan.tasks] == [Decimal(x) for x in ("10", "4000.02", "4000.08", "9000", "20")]
    again = await run(service, file)
    assert outcomes(again) == ["replayed", "declined", "replayed", "replayed", "replayed"]  # it was looked up
    assert [result.refund_id for result in again.results] == [result.refund_id for result in first.results]
    assert len(gateway.refunds) == 5
    await assert_books_are_true(books, gateway)
    (recorded,) = await books.rows("SELECT * FROM bulk_runs")
    assert (recorded["kind"], recorded["file_name"], recorded["operator"], recorded["row_count"], recorded["runs"]) == (
        ("refund", "batch", "me", 5, 2)
    )


async def test_a_file_is_refused_before_the_first_of_its_keys_may_expire(
    service: PaymentService, gateway: RecordingGateway, books: Books, clock: ManualClock
) -> None:
    (payment_id,) = await paid(service, 1)
    file = refunds(f"{payment_id},,10,{REASON}")
    planned = await service.bulk.plan(file)
    await run(service, file)
    clock.now += RERUN_WITHIN
    assert outcomes(await run(service, file)) == ["replayed"]
    clock.advance(seconds=1)
    with pytest.raises(FileRunTooLongAgo, match=r"first run at 2026-11-01 12:00:00 UTC by me.*results file"):
        await service.bulk.plan(file)
    with pytest.raises(FileRunTooLongAgo):  # whoever planned it before somebody else ran it
        await service.bulk.begin(planned, operator="other")
    (recorded,) = await books.rows("SELECT * FROM bulk_runs")
    assert (recorded["runs"], recorded["last_operator"]) == (2, "me"), "a run that is refused is none"
    assert recorded["last_started_at"] - recorded["started_at"] == RERUN_WITHIN
    clock.advance(hours=-48)
    with pytest.raises(FileRunTooLongAgo):  # by a clock that is far behind the other one's
        await service.bulk.plan(file)
    assert len(gateway.refunds) == 1


async def test_a_run_that_is_under_way_stops_before_the_first_of_its_keys_may_expire(
    service: PaymentService, gateway: RecordingGateway, clock: ManualClock
) -> None:
    payment_ids = await paid(service, 1, 2, 3)
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))

    def on_row(result: Result) -> None:
        if result.outcome is Outcome.DONE:
            clock.now += RERUN_WITHIN / 2 + (RERUN_WITHIN / 1000)

    report = await run(service, file, concurrency=1, on_row=on_row)
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ["done", "done", "not-tried"])
    assert len(gateway.refunds) == 2


def stalled(clock: ManualClock) -> Callable[[Result], None]:
    """A terminal that is stopped, or a disk that hangs, just before a row begins."""
    return lambda result: clock.advance(hours=2, minutes=2) if result.outcome is Outcome.BEGUN else None


async def test_a_row_that_stalls_before_its_begin_until_its_key_has_expired_is_not_refunded_again(
    service: PaymentService, gateway: RecordingGateway, clock: ManualClock
) -> None:
    (payment_id,) = await paid(service, 1)
    file = refunds(f"{payment_id},,10,{REASON}")
    assert outcomes(await run(service, file)) == ["done"]
    clock.advance(hours=21, minutes=59)
    report = await run(service, file, on_row=stalled(clock))
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ["unknown"])
    assert report.results[0].detail.endswith("another run may have done it")
    assert len(gateway.refunds) == 1


@pytest.mark.parametrize("method", ["CREDIT_CARD", "COD"])
async def test_a_charge_that_stalls_before_its_begin_is_not_made_again(
    service: PaymentService, gateway: RecordingGateway, books: Books, clock: ManualClock, method: str
) -> None:
    file = charges(charge_fields(1, amount="4000.02", payment_method=method))
    await run(service, file)
    tried = len(gateway.charges)
    if method == "COD":
        await books.rows("UPDATE payments SET payment_method = 'UPI'")  # cash would not be taken over
    clock.advance(hours=21, minutes=59)
    report = await run(service, file, on_row=stalled(clock))
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ["unknown"])
    assert (len(gateway.charges), await books.value("SELECT attempt FROM payments")) == (tried, 1)


async def test_a_machine_that_sleeps_while_another_runs_row_is_waited_for_refunds_nothing_again(
    opened: Opener, clock: ManualClock
) -> None:
    slow = RecordingGateway(slow_seconds=0.3)

    def on_row(result: Result) -> None:
        if result.outcome is Outcome.DONE:
            clock.advance(hours=26)

    async with opened(gateway=slow) as there, opened(gateway=slow) as here:
        (payment_id,) = await paid(there, 1, amount="9000.00")
        file = refunds(f"{payment_id},,4000.10,{REASON}")
        first = asyncio.create_task(run(there, file, on_row=on_row))
        await until(lambda: _sent(slow))
        report = await run(here, file)
        assert outcomes(await first) == ["done"]
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ["unknown"])
    assert len(slow.refunds) == 1


async def _sent(gateway: RecordingGateway) -> bool:
    return bool(gateway.refunds)


@pytest.mark.parametrize("captured", [True, False])
async def test_a_refund_or_charge_that_comes_after_its_last_instant_is_refused_at_begin(
    service: PaymentService, books: Books, gateway: RecordingGateway, clock: ManualClock, captured: bool
) -> None:
    (payment_id,) = await paid(service, 1)
    if not captured:
        await books.rows("UPDATE payments SET captured_at = NULL")
    not_after = clock.now - timedelta(seconds=1)
    with pytest.raises(RequestTooLate):
        await service.refunds.refund(payment_id=payment_id, request=refund_request(), not_after=not_after)
    method = "CREDIT_CARD" if captured else "COD"
    with pytest.raises(RequestTooLate):
        await service.charges.charge(
            request=charge_request(2, payment_method=method), idempotency_key="k", not_after=not_after
        )
    assert (gateway.refunds, len(gateway.charges)) == ([], 1)
    assert await books.value("SELECT count(*) FROM payments") == 1
    await service.refunds.refund(payment_id=payment_id, request=refund_request(), not_after=clock.now)


async def test_a_run_also_ends_in_time_by_a_clock_that_nobody_sets(service: PaymentService, clock: ManualClock) -> None:
    payment_ids = await paid(service, 1, 2)
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))
    plan = await service.bulk.plan(file)
    await service.bulk.begin(plan, operator="me")
    clock.now += RERUN_WITHIN - timedelta(seconds=0.2)
    late = await service.bulk.begin(plan, operator="me")
    report = await late(concurrency=1, on_row=lambda r: time.sleep(0.3) if r.outcome is Outcome.DONE else None)
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ["done", "not-tried"])


async def test_what_another_run_has_done_is_never_told_to_be_not_tried(
    far: PaymentService, service: PaymentService, door: Door
) -> None:
    payment_ids = await paid(service, 1, 2, 3)
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))
    stopped = await far.bulk.begin(await far.bulk.plan(file), operator="other")
    assert outcomes(await run(service, file)) == ["done"] * 3
    stopped.stop()
    door.shut()
    report = await stopped(concurrency=1)
    assert (report.end, outcomes(report)) == (End.INTERRUPTED, ["unknown"] * 3)


class Flaky(RecordingGateway):
    """Refuses every second connection."""

    async def refund(self, refund: GatewayRefund) -> Told:
        outcome = await super().refund(refund)
        if len(self.refunds) % 2:
            raise GatewayUnavailable("connection refused")
        return outcome


async def test_rows_that_are_unavailable_now_and_then_do_not_end_the_run(opened: Opener) -> None:
    number = 2 * UNAVAILABLE_ROWS_MAX + 4
    async with opened(gateway=Flaky()) as shaky:
        payment_ids = await paid(shaky, *range(1, number + 1))
        report = await run(shaky, refunds(*(f"{each},,10,{REASON}" for each in payment_ids)), concurrency=1)
    assert report.end is End.COMPLETE
    assert Counter(outcomes(report)) == {"done": number // 2, "unavailable": number // 2}


async def test_a_file_of_which_nothing_was_done_is_held_against_the_books_whole_again(
    service: PaymentService, books: Books
) -> None:
    first, second = await paid(service, 1, 2)
    file = refunds(f"{first},,10,{REASON}", f"{second},,60,{REASON}")
    stopped = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    stopped.stop()
    assert outcomes(await stopped()) == ["not-tried"] * 2
    await service.refunds.refund(payment_id=second, request=refund_request("50"))
    with pytest.raises(FileInvalid, match=r"line 3, column amount: 50\.00 INR"):
        await service.bulk.plan(file)


async def test_a_plan_of_a_rerun_tells_what_would_be_refused(service: PaymentService) -> None:
    first, second, third = await paid(service, 1, 2, 3)
    file = refunds(f"{first},,10,{REASON}", f"{second},,60,{REASON}", f"{third},,5,{REASON}")
    begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    await begun(concurrency=1, on_row=lambda _: begun.stop())
    await service.refunds.refund(payment_id=second, request=refund_request())
    plan = await service.bulk.plan(file)
    assert (plan.begun_before, plan.would_be_refused) == (1, 1)
    assert sums_by_currency(plan.to_do) == {"INR": 5}


async def test_equal_refunds_are_both_made_with_a_warning_that_names_their_lines(service: PaymentService) -> None:
    first, second = await paid(service, 1, 2)
    file = refunds(f"{first},,10,{REASON}", f"{second},,10,{REASON}", f",1,10.00,{REASON}", f",1,10,{REASON} too")
    plan = await service.bulk.plan(file)
    assert plan.warnings == [f"lines 2 and 4 ask for the same refund of payment {first}"]
    assert outcomes(await run(service, file)) == ["done"] * 4
    many = await service.bulk.plan(refunds(*[f"{second},,0.01,{REASON}"] * (FAULTS_SHOWN_MAX + 3)))
    assert len(many.warnings) == FAULTS_SHOWN_MAX + 1


async def test_a_client_of_the_api_cannot_use_a_rows_key(service: PaymentService) -> None:
    (payment_id,) = await paid(service, 1)
    file = refunds(f"{payment_id},,10,{REASON}")
    await service.refunds.refund(payment_id=payment_id, request=refund_request("5"), idempotency_key=file.key(2))
    assert outcomes(await run(service, file)) == ["done"]
    assert outcomes(await run(service, file)) == ["replayed"]


async def test_in_a_rerun_a_row_that_fits_no_longer_is_refused_alone(
    service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    first, second = await paid(service, 1, 2)
    file = refunds(f"{first},,10,{REASON}", f"{second},,60,{REASON}", f"{second},,,{REASON}")
    begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    await begun(concurrency=1, on_row=lambda _: begun.stop())
    await service.refunds.refund(payment_id=second, request=refund_request("50"))
    report = await run(service, file)
    assert outcomes(report) == ["replayed", "conflict", "done"]
    assert report.results[1].detail == "50.00 INR of the payment are left to refund"
    await assert_books_are_true(books, gateway)


class AwayOnce(RecordingGateway):
    """Refuses the first connection."""

    async def refund(self, refund: GatewayRefund) -> Told:
        if not self.refunds:
            self.refunds.append(refund)
            raise GatewayUnavailable("connection refused")
        return await super().refund(refund)


async def test_after_a_row_that_was_unavailable_the_others_of_its_payment_wait_for_the_next_run(
    opened: Opener, service: PaymentService, books: Books
) -> None:
    first, second = await paid(service, 1, 2)
    file = refunds(f"{first},,10,{REASON}", f"{first},,,{REASON}", f"{second},,,{REASON}")
    async with opened(gateway=AwayOnce()) as shaky:
        assert outcomes(await run(shaky, file, concurrency=1)) == ["unavailable", "not-tried", "done"]
    report = await run(service, file)
    assert [(result.outcome.value, result.amount) for result in report.results] == [
        ("done", Decimal(10)),
        ("done", Decimal(90)),
        ("replayed", Decimal(100)),
    ]


@pytest.mark.parametrize(
    ("seen", "ends"), [(Outcome.DONE, ["done", "not-tried"]), (Outcome.BEGUN, ["not-tried", "not-tried"])]
)
async def test_a_clock_that_is_set_back_ends_a_run_for_its_keys_would_expire_too_early(
    service: PaymentService, clock: ManualClock, seen: Outcome, ends: list[str]
) -> None:
    payment_ids = await paid(service, 1, 2)
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))
    report = await run(
        service,
        file,
        concurrency=1,
        on_row=lambda result: clock.advance(minutes=-16) if result.outcome is seen else None,
    )
    assert (report.end, outcomes(report)) == (End.TOO_LATE, ends)


async def test_a_clock_that_is_far_from_the_databases_is_refused(service: PaymentService, clock: ManualClock) -> None:
    now = datetime.now(UTC)
    for minutes in (-14, 14):
        clock.now = now + timedelta(minutes=minutes)
        await service.bulk.check_clock()
    for minutes in (-16, 16):
        clock.now = now + timedelta(minutes=minutes)
        with pytest.raises(Unavailable, match="clock is more than 15 minutes off"):
            await service.bulk.check_clock()


async def test_two_runs_of_the_same_file_at_once_refund_each_row_once(
    opened: Opener, gateway: RecordingGateway, books: Books
) -> None:
    async with opened() as here, opened() as there:
        payment_ids = await paid(here, *range(1, 21))
        rows = [f"{each},,{amount},{REASON}" for amount in ("30", "25") for each in payment_ids]
        file = refunds(*rows)
        reports = await asyncio.gather(run(here, file), run(there, file))
    ends = Counter(outcome for report in reports for outcome in outcomes(report))
    assert ends == {"done": 40, "replayed": 40}
    assert await books.value("SELECT count(*) FROM refunds") == len(gateway.refunds) == 40
    await assert_books_are_true(books, gateway)


async def test_a_row_that_another_run_is_doing_is_waited_for(opened: Opener) -> None:
    slow = RecordingGateway(slow_seconds=0.3)
    async with opened(gateway=slow) as here, opened(gateway=slow) as there:
        (payment_id,) = await paid(here, 1, amount="9000.00")
        file = refunds(f"{payment_id},,4000.10,{REASON}")
        reports = await asyncio.gather(run(here, file), run(there, file))
    assert sorted(outcomes(reports[0]) + outcomes(reports[1])) == ["done", "replayed"]
    assert len(slow.refunds) == 1


async def test_another_file_asks_for_something_else_in_the_same_line(service: PaymentService) -> None:
    (payment_id,) = await paid(service, 1)
    for reason in (REASON, "Damaged in transit again"):
        assert outcomes(await run(service, refunds(f"{payment_id},,10,{reason}"))) == ["done"]
    again = refunds(f"{payment_id},,10,{REASON}", "")
    assert outcomes(await run(service, again)) == ["done"]


class Away(RecordingGateway):
    """Refuses connections."""

    async def refund(self, refund: GatewayRefund) -> Told:
        raise GatewayUnavailable("connection refused")


async def test_an_outage_of_the_gateway_ends_the_run_early_and_the_same_file_goes_on_later(
    opened: Opener, service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    payment_ids = await paid(service, *range(1, 61))
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))
    async with opened(gateway=Away()) as cut_off:
        report = await run(cut_off, file, concurrency=4)
    ends = Counter(outcomes(report))
    assert (report.end, set(ends)) == (End.UNAVAILABLE, {"unavailable", "not-tried"})
    assert UNAVAILABLE_ROWS_MAX <= ends["unavailable"] < UNAVAILABLE_ROWS_MAX + 4
    assert outcomes(await run(service, file)) == ["done"] * 60
    assert len(gateway.refunds) == 60
    await assert_books_are_true(books, gateway)


async def test_a_run_that_is_stopped_begins_no_row_and_tells_what_earlier_runs_have_done(
    service: PaymentService, gateway: RecordingGateway
) -> None:
    payment_ids = await paid(service, 1, 2, 3, 4, amount="9000.00")
    file = refunds(*(f"{each},,{amount},{REASON}" for each, amount in zip(payment_ids, ("1", "4000.02", "4000.08", "1"),
                                                                          strict=True)))  # fmt: skip

    async def stopped_at(seen: Outcome, times: int) -> Report:
        begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
        left = [None] * times

        def on_row(result: Result) -> None:
            if result.outcome is seen and left:
                left.pop()
                if not left:
                    begun.stop()

        return await begun(concurrency=1, on_row=on_row)

    first = await stopped_at(Outcome.BEGUN, 3)
    assert (first.end, outcomes(first)) == (End.INTERRUPTED, ["done", "declined", "unknown", "not-tried"])
    again = await stopped_at(Outcome.BEGUN, 1)
    assert outcomes(again) == ["replayed", "declined", "unknown", "not-tried"]
    assert len(gateway.refunds) == 3


async def test_what_cannot_be_told_ends_the_run_and_what_has_begun_ends_first(
    service: PaymentService, gateway: RecordingGateway, books: Books
) -> None:
    payment_ids = await paid(service, *range(1, 9))
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))

    def on_row(result: Result) -> None:
        if result.outcome is Outcome.DONE:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        await run(service, file, concurrency=2, on_row=on_row)
    assert len(gateway.refunds) == 2
    assert await books.value("SELECT sum(refund_pending) FROM payments") == 0


async def test_the_rows_of_one_payment_are_done_one_after_the_other_in_the_files_order(
    service: PaymentService,
) -> None:
    (payment_id,) = await paid(service, 1)
    file = refunds(*(f"{payment_id},,10,{REASON}" for _ in range(9)), f"{payment_id},,,{REASON}")
    under_way: Counter[bool] = Counter()
    seen: list[str] = []

    def on_row(result: Result) -> None:
        seen.append(result.outcome.value)
        under_way[result.outcome is Outcome.BEGUN] += 1
        assert under_way[True] - under_way[False] in (0, 1)

    report = await run(service, file, on_row=on_row)
    assert seen == ["begun", "done"] * 10
    assert report.results[-1].amount == 10


AMOUNTS = st.one_of(st.none(), st.decimals("0.01", "60", places=2))


@given(
    asked=st.lists(st.tuples(st.integers(1, 3), AMOUNTS), min_size=1, max_size=12),
    refunded=st.lists(st.decimals("0", "100", places=2), min_size=3, max_size=3),
)
def test_a_file_never_asks_for_more_than_is_left_of_any_payment(
    asked: list[tuple[int, Decimal | None]], refunded: list[Decimal]
) -> None:
    file = refunds(*(f"{payment_id},,{amount or ''},{REASON}" for payment_id, amount in asked))
    left = {payment_id: 100 - refunded[payment_id - 1] for payment_id in (1, 2, 3)}
    planner = RefundPlanner(file=file, at=ManualClock().now)
    fits = True
    expected: list[Decimal] = []
    for row, (payment_id, amount) in zip(file.rows, asked, strict=True):
        planner.add(row, standing(payment_id, refunded[payment_id - 1]))
        takes = left[payment_id] if amount is None else amount
        if 0 < takes <= left[payment_id]:
            left[payment_id] -= takes
            expected.append(takes)
        else:
            fits = False
    if fits:
        plan = planner.plan()
        assert [task.amount for task in plan.tasks] == expected
        assert sums_by_currency(plan.tasks) == {"INR": sum(expected)}
    else:
        with pytest.raises(FileInvalid):
            planner.plan()


def standing(payment_id: int, refunded: Decimal) -> dict[str, object]:
    """What the books know of a payment of 100.00 and of a key that is not used."""
    return {
        "payment_id": payment_id,
        "order_id": payment_id,
        "status": "COMPLETED" if refunded < 100 else "REFUNDED",
        "amount": Decimal(100),
        "refunded_amount": refunded,
        "currency": "INR",
        "key_id": None,
    }


async def test_an_outage_of_the_database_ends_the_run_and_whatever_had_begun_is_refunded_once(
    far: PaymentService,
    service: PaymentService,
    door: Door,
    gateway: RecordingGateway,
    clock: ManualClock,
) -> None:
    payment_ids = await paid(service, *range(1, 101))
    file = refunds(*(f"{each},,10,{REASON}" for each in payment_ids))
    done = 0

    def on_row(result: Result) -> None:
        nonlocal done
        done += result.outcome is Outcome.DONE
        if done == 10:
            door.shut()

    report = await run(far, file, on_row=on_row)
    assert report.end is End.UNAVAILABLE
    assert {"done", "unknown"} <= set(outcomes(report)) <= {"done", "unknown"}, "nobody can know what others did"
    clock.advance(minutes=10)
    again = await run(service, file)
    assert set(outcomes(again)) <= {"done", "replayed"}
    assert len({result.refund_id for result in again.results}) == 100
    sent = Counter(refund.key.partition("-R")[0] for refund in gateway.refunds)
    assert set(sent.values()) == {1}
