"""Faults of our own books, what the gateway says of what is open, and the repair of what is certain."""

import asyncio
from datetime import timedelta

import pytest

from eci_pay.differences import Report
from eci_pay.gateways import Declined, Unknown
from eci_pay.repairs import BookRefund, Repair, Repaired
from eci_pay.service import PaymentService
from tests.ledger import Ledger
from tests.peers import Peers
from tests.rows import paid
from tests.settlements import classes, counts, line, reconciled, true_lines
from tests.support import FAULTS_IN_BOOKS, Books, ManualClock, RecordingGateway, refund_request
from tests.test_recovery import charged, never_happened, recoveries, status_of, travel


async def repaired(service: PaymentService, report: Report, repairs: list[Repair]) -> list[Repaired]:
    return await service.reconciliation.repair(report, repairs)


async def descriptions(books: Books) -> list[str]:
    rows = await books.rows("SELECT description FROM transactions ORDER BY transaction_log_id")
    return [row["description"] for row in rows]


def found(report: Report) -> dict[str, int]:
    return {check.value: count for check, count in report.fault_counts.items()}


async def test_books_that_are_true_have_no_faults(telling: PaymentService, books: Books) -> None:
    first, second = await paid(telling, 1, 2)
    await telling.refunds.refund(payment_id=first, request=refund_request("10.00"))
    await telling.refunds.refund(payment_id=second, request=refund_request())
    report, repairs = await reconciled(telling)
    assert (report.is_clean, report.payments, report.faults, repairs) == (True, 2, (), [])
    assert (report.file, report.lines, report.sums, report.days) == (None, 0, (), ())


@pytest.mark.parametrize(
    ("check", "damage"),
    [
        ("status_not_audited", "UPDATE payments SET status = 'FAILED', captured_at = NULL WHERE payment_id = %s"),
        (
            "paid_twice",
            "INSERT INTO transactions (payment_id, transaction_type, amount, status)"
            " VALUES (%s, 'PAYMENT', 1, 'COMPLETED')",
        ),
        (
            "refunds_not_audited",
            "INSERT INTO transactions (payment_id, transaction_type, amount, status)"
            " VALUES (%s, 'REFUND', 1, 'PROCESSING')",
        ),
        (
            "refunds_do_not_add_up",
            "INSERT INTO refunds (payment_id, amount, reason, status) VALUES (%s, 1, 'unknown', 'COMPLETED')",
        ),
        (
            "key_unfinished",
            "UPDATE idempotency_keys SET response_body = NULL, status_code = NULL WHERE payment_id = %s",
        ),
    ],
)
async def test_each_damage_to_the_books_is_found_and_left_to_people(
    service: PaymentService, books: Books, check: str, damage: str
) -> None:
    await paid(service, 1, 2, 3)
    await books.rows(damage, 2)
    report, repairs = await reconciled(service)
    assert found(report) == {check: 1}
    assert [(fault.check.value, fault.payment_id) for fault in report.faults] == [(check, 2)]
    assert (report.is_clean, repairs) == (False, [])


async def test_a_period_limits_the_books_to_what_was_changed_in_it(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1)
    before = clock.now
    clock.advance(days=1)
    await paid(service, 2)
    await books.rows("UPDATE payments SET status = 'FAILED', captured_at = NULL")
    everything, _ = await reconciled(service)
    second, _ = await reconciled(service, period_from=before + timedelta(seconds=1))
    first, _ = await reconciled(service, period_to=clock.now)
    assert [report.payments for report in (everything, second, first)] == [2, 1, 1]
    assert [[fault.payment_id for fault in report.faults] for report in (everything, second, first)] == [
        [1, 2],
        [2],
        [1],
    ]


async def test_an_outcome_that_the_gateway_tells_is_booked_and_the_audit_trail_says_on_whose_behalf(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await charged(recovering, 1)
    ledger.verdict = Declined(code="card_declined", message="no")
    await charged(recovering, 2)
    ledger.loses_requests = True
    await charged(recovering, 3)
    sent = len(ledger.charges)
    report, repairs = await reconciled(recovering)
    assert (report.open_in_time, report.is_clean) == (3, True)
    assert [str(repair) for repair in repairs] == [
        "book payment 1 as approved",
        "book payment 2 as declined (card_declined)",
    ]
    clock.advance(seconds=60)
    report, repairs = await reconciled(recovering)
    assert (report.open_in_time, found(report)) == (1, {"outcome_unknown": 2})
    made = await repaired(recovering, report, repairs)
    assert [each.findings for each in made] == [1, 1]
    statuses = await books.rows("SELECT status FROM payments ORDER BY payment_id")
    assert [row["status"] for row in statuses] == ["COMPLETED", "FAILED", "PROCESSING"]
    whose = f" (reconciliation {report.run_id} of olga)"
    assert [text for text in await descriptions(books) if text.endswith(whose)] == [
        f"Charge approved: REF {ledger.charges[0].key[-8:]}{whose}",
        f"Charge failed: card_declined{whose}",
    ]
    assert (len(ledger.charges), ledger.refunds) == (sent, [])
    report, _ = await reconciled(recovering)
    assert (report.open_in_time, report.is_clean) == (1, True)
    [before, *_] = await recovering.reconciliation.history(before=report.run_id, count_max=1)
    assert (before.faults, before.repaired) == (2, 2)
    clock.advance(hours=1)
    report, repairs = await reconciled(recovering)
    assert ([fault.detail for fault in report.faults], repairs) == (
        ["100.00 INR for 3660 s: the gateway has not heard of it"],
        [],
    )


async def test_what_a_request_settles_meanwhile_is_not_settled_again(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await charged(recovering, 1)
    clock.advance(seconds=60)
    report, repairs = await reconciled(recovering)
    await charged(recovering, 1)  # looks it up itself
    trail = await descriptions(books)
    made = await repaired(recovering, report, repairs)
    assert ([each.left for each in made], await descriptions(books)) == ([""], trail)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_line_that_the_repair_puts_right_is_a_finding_of_its_own(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await charged(recovering, 1)
    await charged(recovering, 2)
    clock.advance(hours=1)
    ids = [row["transaction_id"] for row in await books.rows("SELECT transaction_id FROM payments ORDER BY order_id")]
    references = [ledger.booked[sent.key].reference for sent in ledger.charges]  # type: ignore[union-attr]
    lines = [line(ids[0], references[0]), line(ids[1], references[1], amount="101.00")]
    report, repairs = await reconciled(recovering, lines)
    assert classes(report) == [(2, "status_differs"), (3, "status_differs")]
    assert [repair.findings for repair in repairs] == [2, 1]
    await repaired(recovering, report, repairs)
    report, repairs = await reconciled(recovering, lines)
    assert (classes(report), report.fault_count, repairs) == ([(3, "amount_over")], 0, [])


async def test_a_refund_that_the_gateway_made_after_all_is_booked_once_it_says_so_itself(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    await charged(recovering, 1)
    ledger.loses_requests = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("30.00"))
    await never_happened(recovering, books, clock)
    await travel(books, hours=2)
    await recovering.recovery.run_once()
    assert [state for state, _ in await recoveries(books)] == ["DONE"]
    lines = await true_lines(books)
    key = ledger.refunds[0].key
    reference = f"REF {key[-8:]}"
    lines.append(line(lines[0]["transaction_id"], reference, type="refund", amount="30.00"))
    report, repairs = await reconciled(recovering, lines)
    assert (classes(report), repairs) == ([(3, "status_differs")], [])
    ledger.act(key)
    report, repairs = await reconciled(recovering, lines)
    assert [type(repair) for repair in repairs] == [BookRefund]
    made = await repaired(recovering, report, repairs)
    assert [(each.findings, each.left) for each in made] == [(1, "")]
    assert await books.value("SELECT refunded_amount FROM payments") == 30
    assert (await descriptions(books))[-2:] == [
        f"Refund turned up at the gateway (reconciliation {report.run_id} of olga)",
        f"Refund approved (reconciliation {report.run_id} of olga)",
    ]
    report, repairs = await reconciled(recovering, lines)
    assert (counts(report), repairs) == ({"matched": 2}, [])
    await travel(books)
    await recovering.recovery.run_once()
    assert [state for state, _ in await recoveries(books)] == ["DONE"]
    assert len(ledger.refunds) == 1
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_repair_that_is_cut_off_is_finished_by_recovery(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    """The refund is PROCESSING again, and whoever did that is gone."""
    await charged(recovering, 1)
    ledger.loses_requests = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("30.00"))
    await never_happened(recovering, books, clock)
    approved = ledger.act(ledger.refunds[0].key)
    settling = recovering.refunds.settling
    await settling.note_if_late(1, 1, approved.reference)  # type: ignore[union-attr]
    assert await settling.reopen(1)
    await travel(books)
    await recovering.recovery.run_once()
    assert await books.rows("SELECT refunded_amount, refund_pending FROM payments") == [
        {"refunded_amount": 30, "refund_pending": 0}
    ]
    assert [state for state, _ in await recoveries(books)] == ["DONE"]


async def test_a_refund_that_no_longer_fits_is_left_to_people(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    await charged(recovering, 1)
    ledger.loses_requests = True
    await recovering.refunds.refund(payment_id=1, request=refund_request("30.00"))
    await never_happened(recovering, books, clock)
    ledger.loses_requests = False
    ledger.act(ledger.refunds[0].key)
    await recovering.refunds.refund(payment_id=1, request=refund_request("80.00"))
    lines = await true_lines(books)
    reference = f"REF {ledger.refunds[0].key[-8:]}"
    lines.append(line(lines[0]["transaction_id"], reference, type="refund", amount="30.00"))
    report, repairs = await reconciled(recovering, lines)
    made = await repaired(recovering, report, repairs)
    assert [(each.findings, each.left) for each in made] == [(0, "that much of the payment is not left to refund")]
    assert await books.value("SELECT refunded_amount FROM payments") == 80


async def test_money_that_was_taken_for_a_failed_payment_is_never_moved_by_a_repair(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_requests = True
    await charged(recovering, 1)
    await never_happened(recovering, books, clock)
    taken = ledger.act(ledger.charges[0].key)
    lines = [line(await books.value("SELECT transaction_id FROM payments"), taken.reference)]  # type: ignore[union-attr]
    report, repairs = await reconciled(recovering, lines)
    assert (classes(report), repairs, await status_of(books)) == ([(2, "status_differs")], [], "FAILED")
    assert ledger.refunds == []


async def test_dead_messages_are_sent_again_but_for_those_that_were_overtaken(
    telling: PaymentService, books: Books, peers: Peers, gateway: RecordingGateway
) -> None:
    first, _ = await paid(telling, 1, 2)
    await telling.refunds.refund(payment_id=first, request=refund_request("10.00"))
    await books.rows("UPDATE outbox SET dead_at = now(), last_error = '410' WHERE event = 'payment.completed'")
    await books.rows("UPDATE outbox SET delivered_at = now() WHERE event = 'refund.completed'")
    report, repairs = await reconciled(telling)
    assert found(report) == {"message_dead": 4}
    assert {str(repair) for repair in repairs} == {
        "send 2 dead messages to order again",
        "send 2 dead messages to notification again",
    }
    made = await repaired(telling, report, repairs)
    assert {(each.repair.findings, each.findings, bool(each.left)) for each in made} == {(2, 2, False), (2, 1, True)}
    dead = await books.rows("SELECT payment_id, destination FROM outbox WHERE dead_at IS NOT NULL")
    assert dead == [{"payment_id": first, "destination": "notification"}]


async def test_messages_that_wait_for_long_are_found(telling: PaymentService, clock: ManualClock, books: Books) -> None:
    await paid(telling, 1)
    report, _ = await reconciled(telling)
    assert report.is_clean
    clock.advance(hours=1, seconds=1)
    report, repairs = await reconciled(telling)
    assert (found(report), repairs) == ({"message_overdue": 2}, [])
    assert {fault.detail for fault in report.faults} == {
        "payment.completed to order",
        "payment.completed to notification",
    }


async def test_a_gateway_that_is_down_is_asked_a_few_times_and_not_once_for_each(
    recovering: PaymentService, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await asyncio.gather(*(charged(recovering, order_id) for order_id in range(1, 21)))
    clock.advance(hours=1)
    ledger.looked.clear()
    ledger.lookup_answer = Unknown(message="no answer")
    report, repairs = await reconciled(recovering)
    assert (found(report), repairs, len(ledger.looked)) == ({"outcome_unknown": 20}, [], 8)
    assert {fault.detail.partition(": ")[2] for fault in report.faults} == {
        "no answer",
        "not asked: the gateway does not answer",
    }


async def test_a_repair_that_fails_does_not_keep_the_others_from_being_made(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    ledger.loses_answers = True
    await charged(recovering, 1)
    await charged(recovering, 2)
    clock.advance(hours=1)
    report, repairs = await reconciled(recovering)
    await books.rows(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = 'check_violation'; END $$"
    )
    await books.rows(
        "CREATE TRIGGER refuse BEFORE UPDATE ON payments FOR EACH ROW WHEN (OLD.order_id = 1) EXECUTE FUNCTION refuse()"
    )
    made = await repaired(recovering, report, repairs)
    assert [(each.findings, each.left) for each in made] == [(0, "it could not be booked"), (1, "")]
