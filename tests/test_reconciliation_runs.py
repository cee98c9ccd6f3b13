"""Reconciliations day after day: what one file leaves to another, and what goes on meanwhile."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from eci_pay import book_checks, database, settlement_matching
from eci_pay.book_checks import BookChecks
from eci_pay.database import Connection, Params, Row
from eci_pay.errors import InvalidRequest, Unavailable
from eci_pay.gateways import Approved, Declined, GatewayCharge, Unknown
from eci_pay.outbox import Outbox
from eci_pay.reconciliation import Job, Watch
from eci_pay.refund_settling import RefundSettling
from eci_pay.service import PaymentService
from tests.ledger import Ledger
from tests.rows import paid
from tests.settlements import Line, classes, counts, line, reconciled, settlement, true_lines
from tests.support import Books, ManualClock, RecordingGateway, charge_request, refund_request
from tests.test_recovery import charged, never_happened, recoveries, status_of, travel

DAY = datetime(2026, 11, 1, tzinfo=UTC)
NOON, EVENING = DAY + timedelta(hours=12), DAY + timedelta(hours=23, minutes=50)
TOMORROW = DAY + timedelta(days=1)


async def paid_at(service: PaymentService, books: Books, clock: ManualClock, at: datetime, order_id: int) -> Line:
    """The true line of an order that was charged at that moment."""
    clock.now = at
    [payment_id] = await paid(service, order_id)
    transaction_id = await books.value("SELECT transaction_id FROM payments WHERE payment_id = %s", payment_id)
    return next(each for each in await true_lines(books) if each["transaction_id"] == transaction_id)


async def test_what_is_missing_stays_missing_however_often_the_file_is_run(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    first = await paid_at(service, books, clock, NOON, 1)
    await paid_at(service, books, clock, EVENING, 2)
    third = await paid_at(service, books, clock, TOMORROW + timedelta(hours=9), 3)
    runs = [(await reconciled(service, [lines]))[0] for lines in (first, third, third)]
    assert [counts(run) for run in runs] == [
        {"matched": 1, "pending": 1},
        {"matched": 1, "missing_at_gateway": 1},
        {"matched": 1, "missing_at_gateway": 1},
    ]


async def test_files_may_be_run_in_any_order(service: PaymentService, books: Books, clock: ManualClock) -> None:
    """What was booked at the end of the first day is in the second day's file, which comes first."""
    first = await paid_at(service, books, clock, NOON, 1)
    late = await paid_at(service, books, clock, EVENING, 2)
    late["settled_at"] = TOMORROW + timedelta(seconds=3)
    second = await paid_at(service, books, clock, TOMORROW + timedelta(hours=9), 3)
    third = await paid_at(service, books, clock, TOMORROW + timedelta(hours=33), 4)
    runs = [(await reconciled(service, lines))[0] for lines in ([late, second], [first], [third])]
    assert [(run.is_clean, counts(run)) for run in runs] == [(True, {"matched": n}) for n in (2, 1, 1)]


async def test_what_the_gateway_settled_before_we_booked_it_is_not_missing_the_day_after(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    first = await paid_at(service, books, clock, NOON, 1)
    early = await paid_at(service, books, clock, TOMORROW + timedelta(seconds=1), 2)
    early["settled_at"] = TOMORROW - timedelta(seconds=1)
    second = await paid_at(service, books, clock, TOMORROW + timedelta(hours=9), 3)
    runs = [(await reconciled(service, lines))[0] for lines in ([first, early], [second])]
    assert [counts(run) for run in runs] == [{"matched": 2}, {"matched": 1}]


async def test_what_the_gateway_calls_pending_and_never_settles_is_told_until_somebody_has_closed_it(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    pending = await paid_at(service, books, clock, NOON, 1)
    pending["status"] = "pending"
    differences = [(await reconciled(service, [pending]))[0].difference_count]
    for day in range(1, 6):
        next_line = await paid_at(service, books, clock, NOON + timedelta(days=day), 10 + day)
        report, _ = await reconciled(service, [next_line])
        differences.append(report.difference_count)
    assert differences == [0, 0, 0, 1, 1, 1]
    assert [(each.line, each.line_class.value) for each in report.differences] == [(None, "status_differs")]
    assert report.differences[0].detail.endswith("(a line of an earlier file)")
    assert await service.reconciliation.close(1, operator="olga") == 1
    report, _ = await reconciled(service, [next_line])
    assert report.is_clean


async def test_what_the_gateway_calls_pending_ends_with_the_line_that_settles_it(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    of_charge = await paid_at(service, books, clock, NOON, 1)
    await reconciled(service, [{**of_charge, "status": "pending"}])
    of_charge["settled_at"] = TOMORROW + timedelta(hours=1)
    clock.now = TOMORROW + timedelta(days=9)
    report, _ = await reconciled(service, [of_charge])
    assert (report.is_clean, counts(report)) == (True, {"matched": 2})
    assert await books.value("SELECT count(*) FROM settlement_lines_pending WHERE ended_run_id IS NULL") == 0


async def test_money_that_was_taken_for_what_we_book_as_failed_later_is_told(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    """Its line came while we did not know the outcome yet."""
    ledger.loses_requests = True
    await charged(recovering, 1)
    taken = line(await books.value("SELECT transaction_id FROM payments"), "TAKEN")
    report, _ = await reconciled(recovering, [taken])
    assert counts(report) == {"pending": 1}
    await never_happened(recovering, books, clock)
    ledger.loses_requests = False
    other = await paid_at(recovering, books, clock, clock.now + timedelta(days=1), 2)
    report, _ = await reconciled(recovering, [other])
    assert (classes(report), counts(report)) == ([(None, "status_differs")], {"matched": 1, "status_differs": 1})


async def test_a_return_of_late_money_that_the_gateway_has_not_made_is_missing(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    await never_happened(recovering, books, clock)
    taken = ledger.act(ledger.charges[0].key)
    assert isinstance(taken, Approved)
    ledger.loses_requests = False
    for _ in range(2):
        await travel(books)
        await recovering.recovery.run_once()
    lines = [line(await books.value("SELECT transaction_id FROM payments"), taken.reference)]
    now = datetime.now(UTC)  # recovery goes by the database's clock
    job = Job(operator="olga", file=settlement(lines), made_at=now, period_from=DAY, period_to=now + timedelta(days=1))
    report, _ = await recovering.reconciliation.run(job, Watch())
    assert counts(report) == {"matched": 1, "refund_missing_at_gateway": 1}


async def test_a_file_need_not_have_what_happened_after_it_was_made(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    """Charges go on; the next run looks for what it has left open."""
    first = await paid_at(service, books, clock, NOON, 1)
    made_at = NOON + timedelta(minutes=1)
    second = await paid_at(service, books, clock, NOON + timedelta(minutes=2), 2)
    job = Job(operator="olga", file=settlement([first]), made_at=made_at)
    report, _ = await service.reconciliation.run(job, Watch())
    assert (report.is_clean, counts(report)) == (True, {"matched": 1, "pending": 1})
    assert report.warnings == ("the period is not over: reconcile its whole file when it is",)
    clock.now = TOMORROW + timedelta(hours=1)
    report, _ = await reconciled(service, [first, second])
    assert counts(report) == {"matched": 2}


async def test_a_files_time_before_the_period_is_not_believed(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    first = await paid_at(service, books, clock, NOON, 1)
    await paid_at(service, books, clock, NOON, 2)
    job = Job(operator="olga", file=settlement([first]), made_at=DAY - timedelta(hours=1))
    report, _ = await service.reconciliation.run(job, Watch())
    assert counts(report) == {"matched": 1, "missing_at_gateway": 1}


async def test_a_few_lines_of_another_day_do_not_widen_the_period(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1)
    clock.advance(days=1)
    await paid(service, *range(2, 103))
    of_the_day = (await true_lines(books))[1:]
    of_the_day[0]["settled_at"] = EVENING
    report, _ = await reconciled(service, of_the_day)
    assert (counts(report), report.period_from, report.warnings) == (
        {"matched": 101},
        TOMORROW,
        ("the period is not over: reconcile its whole file when it is",),
    )
    report, _ = await reconciled(service, await true_lines(books), period_to=TOMORROW + timedelta(days=1))
    assert report.warnings[0].startswith("the file's lines are of 2 days (UTC)") is (report.period_from == DAY)


async def test_an_end_before_the_files_begin_is_no_period(service: PaymentService, books: Books) -> None:
    await paid(service, 1)
    with pytest.raises(InvalidRequest, match="ends before it begins"):
        await reconciled(service, await true_lines(books), period_from=DAY + timedelta(days=365))
    assert await books.value("SELECT count(*) FROM reconciliation_runs") == 0


async def test_a_refund_that_is_settled_meanwhile_is_in_one_class(
    recovering: PaymentService, books: Books, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await charged(recovering, 1)
    ledger.loses_answers = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("30.00"))
    outcome = ledger.booked[ledger.refunds[0].key]
    assert isinstance(outcome, Approved)
    [of_charge] = await true_lines(books)
    of_refund = line(of_charge["transaction_id"], outcome.reference, type="refund", amount="30.00")
    fetch = database.fetch

    async def fetch_and_settle(connection: Connection, name: str, params: Params | None = None) -> list[Row]:
        rows = await fetch(connection, name, params)
        if name == "settlement_match_refunds":
            assert await recovering.refunds.settling.settle_open(1, outcome)
        return rows

    monkeypatch.setattr(settlement_matching, "fetch", fetch_and_settle)
    report, _ = await reconciled(recovering, [of_charge, of_refund])
    assert counts(report) == {"matched": 1, "pending": 1}
    monkeypatch.undo()
    report, _ = await reconciled(recovering, [of_charge, of_refund])
    assert counts(report) == {"matched": 2}


async def test_lines_that_move_no_money_are_no_duplicates_and_nobodys_money(
    service: PaymentService, books: Books
) -> None:
    await paid(service, 1)
    [settled] = await true_lines(books)
    for status in ("pending", "failed"):
        report, _ = await reconciled(service, [{**settled, "status": status}, settled])
        assert (report.is_clean, counts(report)) == (True, {"matched": 2})
    unknown = [
        line("TXNUNKNOWN", "X", status="failed"),
        line(settled["transaction_id"], "Y", type="refund", status="failed"),
    ]
    report, _ = await reconciled(service, [settled, *unknown])
    assert (report.is_clean, counts(report)) == (True, {"matched": 3})


async def test_a_refund_that_failed_at_the_gateway_is_paired_with_the_one_that_failed_by_our_books(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    await charged(recovering, 1)
    ledger.verdict = Declined(code="no", message="no")
    await recovering.refunds.refund(payment_id=1, request=refund_request("10.00"))
    ledger.loses_requests = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("10.00"))
    [of_charge] = await true_lines(books)
    clock.advance(hours=1)
    failed = line(of_charge["transaction_id"], "FAILED", type="refund", amount="10.00", status="failed")
    report, _ = await reconciled(recovering, [of_charge, failed])
    assert classes(report) == []


async def test_refunds_that_the_gateway_gave_one_reference_are_told_apart(
    service: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(service, 1)
    for _ in range(2):
        await service.refunds.refund(payment_id=payment_id, request=refund_request("10.00"))
    await books.rows("UPDATE refunds SET gateway_reference = 'SAME'")
    lines = await true_lines(books)
    report, _ = await reconciled(service, lines)
    assert counts(report) == {"matched": 3}
    report, _ = await reconciled(service, [*lines, lines[-1]])
    assert counts(report) == {"matched": 3, "duplicate_at_gateway": 1}


async def test_references_are_compared_as_far_as_our_books_hold_them(
    service: PaymentService, books: Books, gateway: RecordingGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = "R" * 80

    async def charge(_: GatewayCharge) -> Approved:
        return Approved(reference=reference)

    monkeypatch.setattr(gateway, "charge", charge)
    await service.charges.charge(request=charge_request(1), idempotency_key="long")
    transaction_id = await books.value("SELECT transaction_id FROM payments")
    report, _ = await reconciled(service, [line(transaction_id, reference)])
    assert counts(report) == {"matched": 1}


async def test_a_repair_puts_right_no_more_than_the_run_has_found(telling: PaymentService, books: Books) -> None:
    """One more message dies while the plan is read; another difference stays."""
    first, second = await paid(telling, 1, 2)
    dies = "UPDATE outbox SET dead_at = now() WHERE destination = 'order' AND payment_id = %s"
    await books.rows(dies, first)
    lines = [*await true_lines(books), line("TXNUNKNOWN", "AUTHUNKNOWN")]
    report, repairs = await reconciled(telling, lines)
    await books.rows(dies, second)
    made = await telling.reconciliation.repair(report, repairs)
    assert [each.findings for each in made] == [1]
    assert not replace(report, repaired=sum(each.findings for each in made)).is_clean
    [note] = {
        row["last_error"] for row in await books.rows("SELECT last_error FROM outbox WHERE last_error IS NOT NULL")
    }
    assert note == f"sent again (reconciliation {report.run_id} of olga)"


async def test_a_plan_that_has_become_wrong_repairs_nothing_and_leaves_it_to_recovery(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await charged(recovering, 1)
    clock.advance(seconds=60)
    report, repairs = await reconciled(recovering)
    assert await recovering.charges.settling.settle_open(1, 1, Declined(code="x", message="x"))
    [made] = await recovering.reconciliation.repair(report, repairs)
    assert (made.findings, made.left) == (0, "it was booked otherwise meanwhile: see `eci-pay recover`")
    assert (await status_of(books), [state for state, _ in await recoveries(books)]) == ("FAILED", ["LATE"])


async def test_a_repair_that_is_killed_is_finished_by_recovery_even_where_that_had_ended(
    recovering: PaymentService,
    books: Books,
    ledger: Ledger,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await charged(recovering, 1)
    ledger.loses_requests = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("30.00"))
    await never_happened(recovering, books, clock)
    approved = ledger.act(ledger.refunds[0].key)
    assert isinstance(approved, Approved)
    await books.rows("UPDATE recoveries SET state = 'DONE', late_reference = %s, ended_at = now()", approved.reference)
    lines = await true_lines(books)
    lines.append(line(lines[0]["transaction_id"], approved.reference, type="refund", amount="30.00"))
    report, repairs = await reconciled(recovering, lines)

    async def killed(*_: object) -> bool:
        raise asyncio.CancelledError

    monkeypatch.setattr(RefundSettling, "settle_open", killed)
    with pytest.raises(asyncio.CancelledError):
        await recovering.reconciliation.repair(report, repairs)
    monkeypatch.undo()
    await travel(books)
    await recovering.recovery.run_once()
    assert await books.rows("SELECT refunded_amount, refund_pending FROM payments") == [
        {"refunded_amount": 30, "refund_pending": 0}
    ]


async def test_a_run_that_fails_is_not_recorded(
    service: PaymentService, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    await paid(service, 1)

    async def gone(_: Outbox) -> None:
        raise Unavailable("gone")

    monkeypatch.setattr(Outbox, "stats", gone)
    with pytest.raises(Unavailable):
        await reconciled(service, await true_lines(books))
    assert await books.value("SELECT count(*) FROM reconciliation_runs") == 0


async def test_a_gateway_that_is_down_is_not_asked_about_every_refund(
    recovering: PaymentService, books: Books, ledger: Ledger
) -> None:
    await charged(recovering, 1)
    ledger.verdict = Declined(code="no", message="no")
    for _ in range(20):
        await recovering.refunds.refund(payment_id=1, request=refund_request("1.00"))
    lines = await true_lines(books)
    lines += [line(lines[0]["transaction_id"], f"R{n}", type="refund", amount="1.00") for n in range(20)]
    ledger.looked.clear()
    ledger.lookup_answer = Unknown(message="no answer")
    report, repairs = await reconciled(recovering, lines)
    assert (counts(report)["status_differs"], repairs, len(ledger.looked)) == (20, [], 8)


async def test_outcomes_beyond_those_that_are_looked_at_count(
    recovering: PaymentService, ledger: Ledger, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_checks, "UNSETTLED_MAX", 5)
    ledger.loses_requests = True
    await asyncio.gather(*(charged(recovering, order_id) for order_id in range(1, 9)))
    clock.advance(hours=1)
    report, _ = await reconciled(recovering)
    assert report.fault_count == 8


async def test_a_server_that_ends_idle_transactions_does_not_end_a_run(
    service: PaymentService, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    await paid(service, 1)
    name = await books.value("SELECT current_database()")
    await books.rows(f'ALTER DATABASE "{name}" SET idle_in_transaction_session_timeout = 100')
    check = BookChecks.check

    async def slow(self: BookChecks, *args: object, **kwargs: object) -> None:
        await asyncio.sleep(0.4)
        await check(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(BookChecks, "check", slow)
    report, _ = await reconciled(service, await true_lines(books))
    assert report.is_clean
