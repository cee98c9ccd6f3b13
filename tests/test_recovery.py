"""Recovery of outcomes that nobody knows: looked up, settled once, and what turns up late is put right."""

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from eci_pay.answers import Answer
from eci_pay.batches import Begun
from eci_pay.charge_records import begin_charges
from eci_pay.errors import IdempotencyKeyInFlight, InvalidState, OrderAlreadyPaid, OrderInProgress, RefundExceedsBalance
from eci_pay.gateways import (
    Declined,
    Unknown,
)
from eci_pay.looks import NEVER_HAPPENED
from eci_pay.recovery import FIND_COUNT_MAX, Look
from eci_pay.refund_records import begin_refunds
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.ledger import NOT_IN_TIME, Ledger
from tests.peers import Peers
from tests.rows import charge_begin, paid, refund_begin
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    CommandLine,
    ManualClock,
    Opener,
    charge_request,
    create_request,
    names,
    refund_request,
    until,
)
from tests.test_serving import charge, serving

DECLINED = Declined(code="card_declined", message="The card was declined.")
TOLD_OF_SUCCESS = [("order", "payment.completed"), ("notification", "payment.completed")]
TOLD_OF_FAILURE = [
    ("order", "payment.failed"),
    ("inventory", "payment.failed"),
    ("notification", "payment.failed"),
]
TOLD_OF_PART = [("notification", "refund.completed")]
NOT_HEARD_OF = ("OPEN", "the gateway has not heard of it yet")


async def travel(books: Books, **duration: float) -> None:
    """Lets time pass for what is looked at, ten minutes unless told; all of it is due, and every lease has ended."""
    passed = timedelta(**(duration or {"minutes": 10}))
    await books.rows(
        "UPDATE recoveries SET found_at = found_at - %s, looked_at = looked_at - %s, next_look_at = now()"
        " WHERE state <> 'DONE'",
        passed,
        passed,
    )


async def recoveries(books: Books) -> list[tuple[str, str]]:
    """The states and last results, oldest first."""
    rows = await books.rows("SELECT state, last_result FROM recoveries ORDER BY recovery_id")
    return [(row["state"], row["last_result"]) for row in rows]


async def told(books: Books) -> list[tuple[str, str]]:
    """The messages, in the order of their commits."""
    rows = await books.rows("SELECT destination, event FROM outbox ORDER BY payment_id, sequence")
    return [(row["destination"], row["event"]) for row in rows]


async def status_of(books: Books, order_id: int = 1) -> str:
    """The status of an order's payment."""
    return str(await books.value("SELECT status FROM payments WHERE order_id = %s", order_id))


async def refund_statuses(books: Books) -> list[str]:
    """The statuses of all refunds, oldest first."""
    return [row["status"] for row in await books.rows("SELECT status FROM refunds ORDER BY refund_id")]


async def charged(service: PaymentService, order_id: int = 1, key: str | None = None, **fields: object) -> Answer:
    """Charges an order."""
    request = charge_request(order_id, **fields)
    return await service.charges.charge(request=request, idempotency_key=key or f"charge {order_id}")


async def refunded(
    service: PaymentService, payment_id: int, amount: str | None = "40.00", key: str | None = "refund"
) -> Answer:
    """Refunds a payment."""
    return await service.refunds.refund(payment_id=payment_id, request=refund_request(amount), idempotency_key=key)


async def aged(service: PaymentService, clock: ManualClock) -> list[Look]:
    """Lets the first-look age pass, and looks."""
    clock.advance(seconds=10)
    return await service.recovery.run_once()


async def never_happened(service: PaymentService, books: Books, clock: ManualClock) -> None:
    """Lets the grace period pass over what is unknown, and looks: it is booked as never happened."""
    await aged(service, clock)
    await travel(books)
    await service.recovery.run_once()


async def assert_finished(
    service: PaymentService, books: Books, told_by: Answer, status_code: int, key: str = "charge 1"
) -> None:
    """The key's answer is the recorded one, byte for byte, and the books are true."""
    assert (told_by.status_code, told_by.replayed) == (status_code, True)
    stored = await books.rows("SELECT status_code, response_body FROM idempotency_keys WHERE idempotency_key = %s", key)
    assert stored == [{"status_code": status_code, "response_body": told_by.body}]
    if status_code == 201:
        assert told_by.body == (await service.payments.by_id(told_by.payment_id)).model_dump_json()
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 1. Charges that were left PROCESSING


async def test_a_charge_whose_answer_was_lost_is_found_approved_and_settled_with_all_that_belongs_to_it(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    unknown = await charged(recovering)
    assert (unknown.status_code, await told(books)) == (202, [])
    [look] = await aged(recovering, clock)
    assert (look.state, look.result, look.looks, look.payment_id) == ("DONE", "approved", 1, unknown.payment_id)
    assert await status_of(books) == "COMPLETED"
    assert await books.audit_trail(unknown.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    assert await told(books) == TOLD_OF_SUCCESS
    await assert_finished(recovering, books, await charged(recovering), 201)
    assert await recovering.recovery.run_once() == []
    assert (len(ledger.charges), len(ledger.looked)) == (1, 1)


async def test_a_charge_that_was_declined_unheard_is_settled_as_declined(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers, ledger.verdict = True, DECLINED
    unknown = await charged(recovering)
    [look] = await aged(recovering, clock)
    assert (look.state, look.result) == ("DONE", "declined: card_declined")
    assert await books.audit_trail(unknown.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "FAILED")]
    assert await told(books) == TOLD_OF_FAILURE
    replay = await charged(recovering)
    await assert_finished(recovering, books, replay, 402)
    problem = json.loads(replay.body)
    assert (problem["code"], problem["decline_code"]) == ("payment-declined", "card_declined")


@pytest.mark.parametrize(
    ("amount", "status_code"), [("4000.08", 201), ("4000.09", 402), ("4000.11", 402)], ids=["08", "09", "11"]
)
async def test_the_simulated_gateways_unknown_amounts_are_recovered(
    telling: PaymentService, books: Books, clock: ManualClock, amount: str, status_code: int
) -> None:
    assert (await charged(telling, amount=amount)).status_code == 202
    await never_happened(telling, books, clock)
    await assert_finished(telling, books, await charged(telling, amount=amount), status_code)
    assert await told(books) == (TOLD_OF_SUCCESS if status_code == 201 else TOLD_OF_FAILURE)


@pytest.mark.parametrize("was_sent", [True, False])
async def test_a_charge_that_a_crash_cut_off_is_settled_by_what_the_gateway_knows(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, was_sent: bool
) -> None:
    [begun] = await begin_charges(recovering.database, [charge_begin(1)])
    assert isinstance(begun, Begun)
    if was_sent:
        ledger.act(f"{begun.row['transaction_id']}-1")
    await never_happened(recovering, books, clock)
    status = "COMPLETED" if was_sent else "FAILED"
    assert await books.audit_trail(begun.row["payment_id"]) == [("PAYMENT", "PROCESSING"), ("PAYMENT", status)]
    assert await told(books) == (TOLD_OF_SUCCESS if was_sent else TOLD_OF_FAILURE)
    await assert_finished(recovering, books, await charged(recovering), 201 if was_sent else 402)
    assert ledger.charges == []


# 2. Not found


async def test_that_the_gateway_has_not_heard_of_a_charge_means_nothing_within_the_grace_period(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    payment_id = (await charged(recovering)).payment_id
    await aged(recovering, clock)
    await travel(books, seconds=140)
    [look] = await recovering.recovery.run_once()
    assert (look.state, look.looks) == ("OPEN", 2)
    assert await recoveries(books) == [NOT_HEARD_OF]
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING")]
    assert (await charged(recovering)).status_code == 202
    # The next look comes when the grace period ends, however long the distance has grown.
    assert await books.value("SELECT next_look_at - found_at <= interval '151 seconds' FROM recoveries")


async def test_a_charge_that_never_arrived_fails_after_the_grace_period_and_is_watched_for_an_hour(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    await never_happened(recovering, books, clock)
    assert await recoveries(books) == [("CHECKING", "never happened")]
    assert await books.value("SELECT gateway_response FROM payments") == (
        "not_processed: The gateway has never received the request."
    )
    assert await told(books) == TOLD_OF_FAILURE
    replay = await charged(recovering)
    assert json.loads(replay.body)["decline_code"] == "not_processed"
    await assert_finished(recovering, books, replay, 402)
    distances = []
    while (await recoveries(books)) == [("CHECKING", "never happened")]:
        assert await recovering.recovery.run_once() == []  # it is not due yet
        [distance] = await books.rows(
            "SELECT extract(epoch FROM next_look_at - now())::integer AS seconds FROM recoveries"
        )
        distances.append(distance["seconds"])
        await travel(books, seconds=distances[-1] + 1)
        await recovering.recovery.run_once()
    # It was 10 minutes old when it was ruled out.
    assert distances == pytest.approx([150, 750, 1500, 600], abs=10)
    assert (await recoveries(books), len(ledger.looked)) == ([("DONE", "never happened")], 6)
    assert ledger.ruled_out == ledger.looked[:1]
    assert await books.value("SELECT ended_at IS NOT NULL FROM recoveries")
    await travel(books)
    assert await recovering.recovery.run_once() == []
    assert (await status_of(books), ledger.given_back()) == ("FAILED", [])


@pytest.mark.parametrize("how", ["unreachable", "unknown", "error", "cancelled"])
async def test_a_charge_stays_processing_and_is_overdue_while_the_gateway_says_nothing_for_days(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, how: str
) -> None:
    ledger.loses_answers = True
    payment_id = (await charged(recovering)).payment_id
    match how:
        case "unreachable":
            ledger.is_reachable = False
        case "unknown":
            ledger.lookup_answer = NOT_IN_TIME
        case "error":
            ledger.lookup_error = RuntimeError("an adapter's bug")
        case _:
            ledger.lookup_error = asyncio.CancelledError("the adapter's own")
    await aged(recovering, clock)
    assert await recovering.recovery.overdue() == []
    for _ in range(3):
        await travel(books, days=1)
        [look] = await recovering.recovery.run_once()
        assert look.state == "OPEN"
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING")]
    assert [look.payment_id for look in await recovering.recovery.overdue()] == [payment_id]
    ledger.is_reachable, ledger.lookup_answer, ledger.lookup_error = True, None, None
    await travel(books)
    await recovering.recovery.run_once()
    assert (await status_of(books), await recovering.recovery.overdue()) == ("COMPLETED", [])


# 3. Late answers


async def held(recovering: PaymentService, ledger: Ledger) -> "asyncio.Task[Answer]":
    """A charge that is with a gateway that has not acted yet."""
    ledger.may_act.clear()
    charging = asyncio.create_task(charged(recovering))
    await ledger.sent.wait()
    return charging


async def test_money_that_was_taken_after_the_charge_was_booked_as_failed_is_given_back_once(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    charging = await held(recovering, ledger)
    await never_happened(recovering, books, clock)
    assert await status_of(books) == "FAILED"
    ledger.may_act.set()
    answer = await charging
    assert answer.status_code == 402
    [[row]] = [await books.rows("SELECT state, late_reference FROM recoveries")]
    charge_key = ledger.charges[0].key
    assert row == {"state": "LATE", "late_reference": f"REF {charge_key[-8:]}"}
    await assert_finished(recovering, books, await charged(recovering), 402)
    assert (await charged(recovering)).body == answer.body
    [look] = await recovering.recovery.run_once()
    assert (look.state, ledger.given_back()) == ("DONE", [f"{charge_key}-LATE"])
    await travel(books)
    assert await recovering.recovery.run_once() == []
    [given] = ledger.refunds
    assert (given.key, given.charge_key, str(given.amount)) == (f"{charge_key}-LATE", charge_key, "100.00")
    assert (await status_of(books), await told(books)) == ("FAILED", TOLD_OF_FAILURE)
    assert await books.audit_trail(answer.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "FAILED")]


async def test_money_that_the_last_look_finds_is_given_back_although_the_order_was_paid_meanwhile(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    await never_happened(recovering, books, clock)
    ledger.loses_requests = False
    second = await charged(recovering, key="second", amount="70.00")
    assert second.status_code == 201
    first_key, second_key = [sent.key for sent in ledger.charges]
    ledger.act(first_key)
    await travel(books)
    looks = await recovering.recovery.run_once()
    assert [look.state for look in looks] == ["LATE", "DONE"]
    assert [(sent.key, sent.charge_key, str(sent.amount)) for sent in ledger.refunds] == [
        (f"{first_key}-LATE", first_key, "100.00")
    ]
    assert second_key != first_key
    assert await books.rows("SELECT status, amount, attempt, refunded_amount FROM payments") == [
        {"status": "COMPLETED", "amount": 70, "attempt": 2, "refunded_amount": 0}
    ]
    assert await told(books) == TOLD_OF_FAILURE + TOLD_OF_SUCCESS
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_late_answer_to_the_first_attempt_changes_nothing_of_the_second_that_is_under_way(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    charging = await held(recovering, ledger)
    await never_happened(recovering, books, clock)
    second = asyncio.create_task(charged(recovering, key="second", amount="70.00"))

    async def both_sent() -> bool:
        return len(ledger.charges) == 2

    await until(both_sent)
    ledger.may_act.set()
    answers = await asyncio.gather(charging, second)
    assert [answer.status_code for answer in answers] == [402, 201]
    await recovering.recovery.run_once()
    first_key = ledger.charges[0].key
    assert [(sent.key, sent.charge_key, str(sent.amount)) for sent in ledger.refunds] == [
        (f"{first_key}-LATE", first_key, "100.00")
    ]
    assert await books.rows("SELECT status, amount, attempt FROM payments") == [
        {"status": "COMPLETED", "amount": 70, "attempt": 2}
    ]
    assert [state for state, _ in await recoveries(books)] == ["DONE"]
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_late_money_is_given_back_under_one_key_until_the_gateway_says_that_it_was(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    await never_happened(recovering, books, clock)
    ledger.act(ledger.charges[0].key)
    ledger.loses_requests, ledger.loses_answers = False, True
    await travel(books)
    assert [look.state for look in await recovering.recovery.run_once()] == ["LATE", "LATE"]
    assert len(await recovering.recovery.open()) == 1
    ledger.loses_answers = False
    await travel(books)
    assert [look.state for look in await recovering.recovery.run_once()] == ["DONE"]
    key = f"{ledger.charges[0].key}-LATE"
    # What was given back without an answer is looked up before it would be given back once more.
    assert (ledger.given_back(), [sent.key for sent in ledger.refunds]) == ([key], [key])


async def test_a_charge_that_completed_while_the_gateways_not_found_was_on_its_way_keeps_its_money(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    charging = await held(recovering, ledger)
    await aged(recovering, clock)
    await travel(books)
    ledger.lookup_waits.clear()
    ledger.may_answer_lookup.clear()
    looking = asyncio.create_task(recovering.recovery.run_once())
    await ledger.lookup_waits.wait()
    ledger.may_act.set()
    assert (await charging).status_code == 201
    ledger.may_answer_lookup.set()
    await looking
    for _ in range(3):
        await travel(books)
        await recovering.recovery.run_once()
    assert (await status_of(books), ledger.given_back()) == ("COMPLETED", [])
    assert [state for state, _ in await recoveries(books)] == ["DONE"]


async def test_a_recovery_that_crashed_after_booking_that_a_charge_never_happened_still_looks_once_more(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    payment_id = (await charged(recovering)).payment_id
    await aged(recovering, clock)
    assert await recovering.recovery.looks.charges.settle_open(payment_id, 1, NEVER_HAPPENED)  # and here it crashes
    await travel(books)
    await recovering.recovery.run_once()
    ledger.loses_requests = False
    ledger.act(ledger.charges[0].key)
    await travel(books)
    await recovering.recovery.run_once()
    assert ledger.given_back() == [f"{ledger.charges[0].key}-LATE"]


# 4. Races


@pytest.mark.parametrize("is_past_grace", [False, True], ids=["found by the look", "past the grace period"])
async def test_a_request_and_recovery_that_settle_at_once_tell_the_same_and_book_once(
    opened: Opener, peers: Peers, books: Books, clock: ManualClock, is_past_grace: bool
) -> None:
    orders_of_round, completed = 12, 0
    for number in range(4):
        ledger = Ledger()
        async with opened(gateway=ledger, **peers.settings()) as first, opened(gateway=ledger, **peers.settings()) as b:
            ledger.may_act.clear()
            orders = range(1 + 100 * number, 1 + 100 * number + orders_of_round)
            charging = [asyncio.create_task(charged(first, order_id)) for order_id in orders]

            async def all_sent(ledger: Ledger = ledger) -> bool:
                return len(ledger.charges) == orders_of_round

            await until(all_sent)
            if is_past_grace:
                await aged(b, clock)
                await travel(books)
            else:
                clock.advance(seconds=10)
                for sent in ledger.charges:
                    ledger.act(sent.key)

            async def release(ledger: Ledger = ledger) -> None:
                await ledger.lookup_waits.wait()
                ledger.may_act.set()

            ledger.lookup_waits.clear()
            await asyncio.gather(release(), b.recovery.run_once())
            answers = await asyncio.gather(*charging)
            for _ in range(3):
                await travel(books)
                await b.recovery.run_once()
            replays = await asyncio.gather(*[charged(first, order_id) for order_id in orders])
            assert [answer.body for answer in answers] == [replay.body for replay in replays]
            failed = [answer.payment_id for answer in answers if answer.status_code == 402]
            completed += sum(answer.status_code == 201 for answer in answers)
            kept = await books.rows(
                "SELECT transaction_id || '-1-LATE' AS key FROM payments WHERE payment_id = ANY (%s)", failed
            )
            assert sorted(ledger.given_back()) == sorted(row["key"] for row in kept)
    assert completed == orders_of_round * 4 or is_past_grace
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    assert await books.value("SELECT max(n) FROM (SELECT count(*) AS n FROM transactions GROUP BY payment_id) t") == 2
    assert (
        await books.rows(
            "SELECT 1 FROM payments p WHERE (SELECT count(*) FROM outbox m WHERE m.payment_id = p.payment_id)"
            " <> CASE p.status WHEN 'COMPLETED' THEN 2 ELSE 3 END"
        )
        == []
    )


# 5. Refunds


async def test_a_refund_whose_answer_was_lost_is_found_approved_and_completed(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.loses_answers = True
    assert (await refunded(recovering, payment_id)).status_code == 202
    [look] = await aged(recovering, clock)
    assert (look.state, look.result) == ("DONE", "approved")
    assert await books.rows("SELECT status, refunded_amount, refund_pending FROM payments") == [
        {"status": "COMPLETED", "refunded_amount": 40, "refund_pending": 0}
    ]
    assert await refund_statuses(books) == ["COMPLETED"]
    assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
    await assert_finished(recovering, books, await refunded(recovering, payment_id), 200, key="refund")
    assert len(ledger.refunds) == 1


async def test_a_refund_that_never_arrived_fails_after_the_grace_period_and_frees_what_it_reserved(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.loses_requests = True
    await refunded(recovering, payment_id, None)
    await aged(recovering, clock)
    assert (await refund_statuses(books), await recoveries(books)) == (["PROCESSING"], [NOT_HEARD_OF])
    await travel(books)
    await recovering.recovery.run_once()
    assert await books.rows("SELECT status, refunded_amount, refund_pending FROM payments") == [
        {"status": "COMPLETED", "refunded_amount": 0, "refund_pending": 0}
    ]
    assert (await refund_statuses(books), await told(books)) == (["FAILED"], TOLD_OF_SUCCESS)
    await assert_finished(recovering, books, await refunded(recovering, payment_id, None), 402, key="refund")
    ledger.loses_requests = False
    assert (await refunded(recovering, payment_id, None, key="again")).status_code == 200


@pytest.mark.parametrize("looks_before", [0, 1, 3], ids=["before a look", "after one", "after three"])
@pytest.mark.parametrize("left", ["100.00", "60.00"], ids=["enough is left", "too little is left"])
async def test_a_refund_that_turns_up_late_is_booked_again_where_that_much_is_left_and_else_told_of(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, *, left: str, looks_before: int
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.loses_requests = True
    await refunded(recovering, payment_id, "70.00")
    await never_happened(recovering, books, clock)
    for _ in range(looks_before):
        await travel(books, minutes=10)
        await recovering.recovery.run_once()
    ledger.loses_requests = False
    if left == "60.00":
        assert (await refunded(recovering, payment_id, "40.00", key="other")).status_code == 200
    ledger.act(ledger.refunds[0].key)
    await travel(books)
    looks = await recovering.recovery.run_once()
    if left == "60.00":
        assert [look.state for look in looks] == ["LATE", "LATE"]
        assert await refund_statuses(books) == ["FAILED", "COMPLETED"]
        await travel(books)
        assert [look.state for look in await recovering.recovery.overdue()] == ["LATE"]
    else:
        assert [look.state for look in looks] == ["LATE", "OPEN", "DONE"]
        assert await refund_statuses(books) == ["COMPLETED"]
        assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
        refund_trail = (await books.audit_trail(payment_id))[2:]
        assert refund_trail == [("REFUND", s) for s in ("PROCESSING", "FAILED", "PROCESSING", "REFUNDED")]
    refunded_amount = 40 if left == "60.00" else 70
    assert await books.value("SELECT refunded_amount FROM payments") == refunded_amount
    assert ledger.given_back() == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_recovery_that_crashed_after_booking_a_late_refund_again_still_completes_it(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.loses_requests = True
    await refunded(recovering, payment_id)
    await never_happened(recovering, books, clock)
    ledger.act(ledger.refunds[0].key)
    await books.rows("UPDATE recoveries SET state = 'LATE'")
    assert await recovering.recovery.looks.refunds.reopen(await books.value("SELECT refund_id FROM refunds"))
    for _ in range(2):  # and there it crashed
        await travel(books)
        await recovering.recovery.run_once()
    assert await refund_statuses(books) == ["COMPLETED"]
    assert [state for state, _ in await recoveries(books)] == ["DONE"]


@pytest.mark.parametrize("key", ["refund", None], ids=["with a key", "without"])
async def test_a_refund_that_is_approved_after_it_was_booked_as_failed_tells_what_is_recorded(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, key: str | None
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.may_act.clear()
    ledger.sent.clear()
    refunding = asyncio.create_task(refunded(recovering, payment_id, key=key))
    await ledger.sent.wait()
    await never_happened(recovering, books, clock)
    assert await refund_statuses(books) == ["FAILED"]
    ledger.may_act.set()
    assert (await refunding).status_code == 402
    await travel(books)
    await recovering.recovery.run_once()
    assert (await refund_statuses(books), [state for state, _ in await recoveries(books)]) == (["COMPLETED"], ["DONE"])
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_refund_that_completed_while_the_gateways_not_found_was_on_its_way_is_done(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.may_act.clear()
    ledger.sent.clear()
    refunding = asyncio.create_task(refunded(recovering, payment_id))
    await ledger.sent.wait()
    await aged(recovering, clock)
    await travel(books)
    ledger.lookup_waits.clear()
    ledger.may_answer_lookup.clear()
    looking = asyncio.create_task(recovering.recovery.run_once())
    await ledger.lookup_waits.wait()
    ledger.may_act.set()
    assert (await refunding).status_code == 200
    ledger.may_answer_lookup.set()
    await looking
    for _ in range(2):
        await travel(books)
        await recovering.recovery.run_once()
    assert (await refund_statuses(books), [state for state, _ in await recoveries(books)]) == (["COMPLETED"], ["DONE"])


async def test_a_refund_of_what_no_gateway_captured_completes_without_one(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    created = await recovering.charges.create(request=create_request(1))
    update = parse_request(StatusUpdateRequest, {"status": "COMPLETED"})
    await recovering.status_changes.update(payment_id=created.payment_id, request=update)
    [begun] = await begin_refunds(recovering.database, [refund_begin(created.payment_id, None, "refund")])
    assert isinstance(begun, Begun)
    ledger.is_reachable = False
    [look] = await aged(recovering, clock)
    assert (look.state, ledger.looked, ledger.refunds) == ("DONE", [], [])
    assert (await status_of(books), await refund_statuses(books)) == ("REFUNDED", ["COMPLETED"])
    await assert_finished(recovering, books, await refunded(recovering, created.payment_id, None), 200, key="refund")


# 6. New operations look first


@pytest.mark.parametrize("operation", ["replay", "another key", "refund", "refund of what is reserved"])
async def test_an_operation_looks_up_an_unknown_outcome_in_its_way_once_that_is_old_enough(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, operation: str
) -> None:
    if operation == "refund of what is reserved":
        [payment_id] = await paid(recovering, 1)
        ledger.loses_answers, ledger.verdict = True, DECLINED
        await refunded(recovering, payment_id, "100.00", key="unknown")
        ledger.verdict = None
    else:
        ledger.loses_answers = True
        payment_id = (await charged(recovering)).payment_id
    ledger.loses_answers = False

    async def operate() -> Answer:
        if operation == "replay":
            return await charged(recovering)
        if operation == "another key":
            return await charged(recovering, key="another")
        return await refunded(recovering, payment_id, key="new")

    young = (await asyncio.gather(operate(), return_exceptions=True))[0]
    expected = {
        "replay": 202,
        "another key": OrderInProgress,
        "refund": InvalidState,
        "refund of what is reserved": RefundExceedsBalance,
    }[operation]
    assert (young.status_code if isinstance(young, Answer) else type(young)) == expected
    assert ledger.looked == []
    clock.advance(seconds=10)
    if operation == "another key":
        with pytest.raises(OrderAlreadyPaid):
            await operate()
    else:
        assert (await operate()).status_code == (201 if operation == "replay" else 200)
    assert len(ledger.looked) == 1
    assert await recovering.recovery.open() == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("is_declined", [False, True])
async def test_a_cancellation_looks_up_an_unknown_outcome_first(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, is_declined: bool
) -> None:
    ledger.loses_answers = True
    ledger.verdict = DECLINED if is_declined else None
    payment_id = (await charged(recovering)).payment_id
    with pytest.raises(InvalidState, match="PROCESSING"):
        await recovering.status_changes.cancel(payment_id=payment_id)
    clock.advance(seconds=10)
    if is_declined:
        assert (await recovering.status_changes.cancel(payment_id=payment_id)).status == "CANCELLED"
    else:
        with pytest.raises(InvalidState, match="COMPLETED"):
            await recovering.status_changes.cancel(payment_id=payment_id)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("operation", ["charge", "refund"])
async def test_a_request_without_an_answer_tells_the_outcome_that_recovery_has_found_out_meanwhile(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, operation: str
) -> None:
    payment_id = (await charged(recovering, order_id=2)).payment_id
    ledger.sent.clear()
    ledger.may_act.clear()
    ledger.loses_answers = True
    asked = charged(recovering) if operation == "charge" else refunded(recovering, payment_id, key="r")
    asking = asyncio.create_task(asked)
    await ledger.sent.wait()
    ledger.act((ledger.refunds or ledger.charges)[-1].key)
    [look] = await aged(recovering, clock)
    assert look.state == "DONE"
    ledger.may_act.set()
    answer = await asking
    assert answer.status_code == (201 if operation == "charge" else 200)
    replay = await (charged(recovering) if operation == "charge" else refunded(recovering, payment_id, key="r"))
    assert (replay.body, replay.replayed) == (answer.body, True)


async def test_what_a_replica_with_a_clock_ahead_has_begun_is_recovered_without_waiting_for_ours(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    clock.advance(hours=3)
    await charged(recovering)
    clock.advance(hours=-3)
    [look] = await recovering.recovery.run_once()
    assert (look.state, await status_of(books)) == ("DONE", "COMPLETED")


async def test_a_declined_attempt_that_is_settled_late_is_not_booked_on_the_next_attempt(
    opened: Opener, peers: Peers, books: Books, ledger: Ledger
) -> None:
    """Between its two reads, the first attempt is settled by its own request, and the second begins."""
    async with opened(gateway=ledger, **peers.settings()) as service:
        ledger.verdict = DECLINED
        ledger.may_act.clear()
        first = asyncio.create_task(charged(service))
        await ledger.sent.wait()
        settling = service.recovery.looks.charges
        by_id = settling.payments.by_id
        second: list[asyncio.Task[Answer]] = []

        async def meanwhile(payment_id: int | None) -> PaymentView:
            if not second:
                ledger.may_act.set()
                assert (await first).status_code == 402
                ledger.verdict = None
                ledger.may_act.clear()
                ledger.sent.clear()
                second.append(asyncio.create_task(charged(service, key="another")))
                await ledger.sent.wait()
            return await by_id(payment_id)

        slow = replace(settling, payments=SimpleNamespace(by_id=meanwhile))  # type: ignore[arg-type]
        payment_id = await books.value("SELECT payment_id FROM payments")
        assert await slow.settle_open(payment_id, 1, DECLINED)
        assert await status_of(books) == "PROCESSING"
        ledger.may_act.set()
        assert (await second[0]).status_code == 201
    assert await status_of(books) == "COMPLETED"
    assert await recoveries(books) == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_refund_that_is_approved_after_every_look_is_booked_again_and_told_of(
    recovering: PaymentService,
    books: Books,
    clock: ManualClock,
    ledger: Ledger,
    caplog: pytest.LogCaptureFixture,
) -> None:
    [payment_id] = await paid(recovering, 1)
    ledger.sent.clear()
    ledger.may_act.clear()
    refunding = asyncio.create_task(refunded(recovering, payment_id, key="r"))
    await ledger.sent.wait()
    await never_happened(recovering, books, clock)
    await travel(books, hours=1)
    assert [look.state for look in await recovering.recovery.run_once()] == ["DONE"]
    assert await refund_statuses(books) == ["FAILED"]
    ledger.may_act.set()
    assert (await refunding).status_code == 402
    assert "the gateway made it, though it was booked as not made" in caplog.text
    await recovering.recovery.run_once()
    assert await refund_statuses(books) == ["COMPLETED"]
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_what_an_operator_has_put_right_by_hand_is_closed(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger, command_line: CommandLine
) -> None:
    charging = await held(recovering, ledger)
    await never_happened(recovering, books, clock)
    ledger.may_act.set()
    await charging
    ledger.verdict = DECLINED
    [look] = await recovering.recovery.run_once()
    assert (look.state, "by hand" in look.result) == ("LATE", True)
    unknown = await command_line.run("recover", "--close", "99")
    assert (unknown.exit_code, "recovery-not-found" in unknown.stderr) == (4, True)
    closed = await command_line.run("recover", "--close", str(look.recovery_id), "--json")
    assert (closed.exit_code, closed.json) == (0, {"closed": look.recovery_id})
    assert await recoveries(books) == [("DONE", "put right by hand")]


async def test_polling_clients_neither_flood_the_gateway_nor_put_the_next_look_off(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    ledger.lookup_answer = NOT_IN_TIME
    await charged(recovering)
    clock.advance(seconds=10)
    for _ in range(20):
        assert (await charged(recovering)).status_code == 202
    assert len(ledger.looked) == 1
    [row] = await books.rows("SELECT looks, next_look_at - now() < interval '10 seconds' AS soon FROM recoveries")
    assert (row["looks"], row["soon"]) == (0, True)


async def test_a_request_does_not_wait_long_for_a_gateway_that_hangs(
    recovering: PaymentService, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    await charged(recovering)
    clock.advance(seconds=10)
    ledger.may_answer_lookup.clear()
    async with asyncio.timeout(10):
        assert (await charged(recovering)).status_code == 202
    ledger.may_answer_lookup.set()
    await recovering.recovery.drain()
    assert (await charged(recovering)).status_code == 201


async def test_a_long_word_of_the_gateway_does_not_keep_the_next_look_from_being_scheduled(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    ledger.lookup_answer = Unknown(message="no " * 500)
    await charged(recovering)
    [look] = await aged(recovering, clock)
    assert look.state == "OPEN"
    assert await books.value("SELECT next_look_at > now() AND lease_id IS NULL FROM recoveries")


async def test_more_than_one_find_can_hold_are_all_looked_at_once(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    number = FIND_COUNT_MAX + 10
    rows = [charge_begin(order_id) for order_id in range(1, number + 1)]
    begun = await begin_charges(recovering.database, rows)
    ledger.act(begun[-1].row["transaction_id"] + "-1")  # type: ignore[union-attr]
    clock.advance(seconds=10)
    assert (await charged(recovering, number)).status_code == 201  # the last is found when it is asked for
    looks = await recovering.recovery.run_once()
    assert len(looks) == number - 1


async def test_another_key_pays_the_order_once_the_grace_period_of_an_unheard_of_charge_has_passed(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    clock.advance(seconds=10)
    ledger.loses_requests = False
    with pytest.raises(OrderInProgress):
        await charged(recovering, key="another")
    await travel(books)
    assert (await charged(recovering, key="another")).status_code == 201
    assert (await charged(recovering)).status_code == 402
    assert await told(books) == TOLD_OF_FAILURE + TOLD_OF_SUCCESS
    assert len(ledger.looked) == 2


async def test_a_key_that_a_crash_left_in_flight_is_looked_up_only_when_it_is_old_enough(
    recovering: PaymentService, clock: ManualClock, ledger: Ledger
) -> None:
    [begun] = await begin_charges(recovering.database, [charge_begin(1)])
    assert isinstance(begun, Begun)
    ledger.act(f"{begun.row['transaction_id']}-1")
    with pytest.raises(IdempotencyKeyInFlight):
        await charged(recovering)
    assert ledger.looked == []
    clock.advance(seconds=10)
    assert (await charged(recovering)).status_code == 201


# 7. Many at once


@pytest.mark.parametrize("number", [2, 4])
async def test_recoveries_at_once_never_look_at_the_same_at_the_same_time(
    opened: Opener, books: Books, clock: ManualClock, ledger: Ledger, number: int
) -> None:
    ledger.loses_answers = True
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(opened(gateway=ledger)) for _ in range(number)]
        await asyncio.gather(*[charged(services[0], order_id) for order_id in range(1, 41)])
        clock.advance(seconds=10)
        looks = await asyncio.gather(*[service.recovery.run_once() for service in services])
    assert ledger.looked_at_twice == []
    assert sorted(ledger.looked) == sorted(sent.key for sent in ledger.charges)
    assert sum(len(each) for each in looks) == 40
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'COMPLETED'") == 40
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_what_somebody_looks_at_is_left_alone_until_the_lease_ends_and_then_taken_over(
    recovering: PaymentService, opened: Opener, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    payment_id = (await charged(recovering)).payment_id
    clock.advance(seconds=10)
    ledger.may_answer_lookup.clear()
    looking = asyncio.create_task(recovering.recovery.run_once())
    await ledger.lookup_waits.wait()
    async with opened(gateway=ledger) as other:
        assert await other.recovery.run_once() == []
        assert not await other.recovery.settle_first({payment_id})
        assert len(ledger.looked) == 1
        await travel(books)
        taking_over = asyncio.create_task(other.recovery.run_once())

        async def both_look() -> bool:
            return len(ledger.looked) == 2

        await until(both_look)
        ledger.may_answer_lookup.set()
        assert [look.state for look in await taking_over] == ["DONE"]
    await looking
    assert await books.rows("SELECT state, looks FROM recoveries") == [{"state": "DONE", "looks": 1}]
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]


async def test_many_replays_of_an_unknown_charge_look_it_up_once_and_none_is_told_otherwise(
    recovering: PaymentService, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_answers = True
    await charged(recovering)
    clock.advance(seconds=10)
    answers = await asyncio.gather(*[charged(recovering) for _ in range(20)])
    assert set(names(answers)) <= {"201", "202"}
    assert names(answers)["201"] >= 1
    assert (len({answer.body for answer in answers if answer.status_code == 201}), len(ledger.looked)) == (1, 1)


# 8. Commands


async def begun_a_minute_ago(service: PaymentService, clock: ManualClock, amount: str) -> None:
    """A charge whose outcome is unknown, old enough for processes with a real clock."""
    clock.now = datetime.now(UTC) - timedelta(minutes=1)
    assert (await charged(service, amount=amount)).status_code == 202


async def test_the_command_shows_what_is_unknown_and_settles_it(
    service: PaymentService, books: Books, clock: ManualClock, command_line: CommandLine
) -> None:
    await begun_a_minute_ago(service, clock, "4000.08")
    clock.now = datetime.now(UTC)
    await service.recovery.find()
    shown = await command_line.run("recover", "--dry-run", "--json")
    assert (shown.exit_code, [look["state"] for look in shown.json]) == (0, ["OPEN"])
    assert await status_of(books) == "PROCESSING"
    done = await command_line.run("recover", "--once", "--json")
    assert (done.exit_code, [(look["state"], look["result"]) for look in done.json]) == (0, [("DONE", "approved")])
    assert await status_of(books) == "COMPLETED"
    again = await command_line.run("recover", "--once")
    assert (again.exit_code, "0 outcomes" in again.stderr) == (0, True)


@pytest.mark.parametrize("mode", ["--dry-run", "--once"])
async def test_the_command_ends_with_6_where_an_outcome_has_been_unknown_for_too_long(
    service: PaymentService,
    books: Books,
    clock: ManualClock,
    command_line: CommandLine,
    mode: str,
) -> None:
    await begun_a_minute_ago(service, clock, "4000.09")
    patient = CommandLine(
        {**command_line.environment, "ECI_PAY_RECOVERY_GRACE_SECONDS": "86400"}, command_line.directory
    )
    assert (await patient.run("recover", "--once")).exit_code == 0
    await travel(books, hours=1)
    late = await patient.run("recover", mode, "--json")
    assert (late.exit_code, [look["state"] for look in late.json]) == (6, ["OPEN"])
    assert "1 outcomes have been unknown for too long" in late.stderr
    assert await status_of(books) == "PROCESSING"


async def test_the_command_refuses_both_modes_at_once(command_line: CommandLine) -> None:
    result = await command_line.run("recover", "--once", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "exclude each other" in result.stderr


async def test_a_server_recovers_by_itself(command_line: CommandLine, books: Books, tmp_path: Path) -> None:
    quick = {"ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS": "0.2", "ECI_PAY_RECOVERY_INTERVAL_SECONDS": "0.1"}
    async with (
        serving(CommandLine({**command_line.environment, **quick}, tmp_path)) as server,
        server.client() as client,
    ):
        assert (await charge(client, amount="4000.08")).status_code == 202
        await until(lambda: books.rows("SELECT 1 FROM payments WHERE status = 'COMPLETED'"))
        replay = await charge(client, amount="4000.08")
        assert (replay.status_code, replay.json()["status"]) == (201, "COMPLETED")
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("recover", "--once")], ids=["serve", "recover"])
async def test_a_grace_period_that_a_request_might_outlast_stops_the_start(
    command_line: CommandLine, tmp_path: Path, command: tuple[str, ...]
) -> None:
    short = CommandLine({**command_line.environment, "ECI_PAY_RECOVERY_GRACE_SECONDS": "60"}, tmp_path)
    result = await short.run(*command)
    assert result.exit_code not in (0, 6)
    assert "ECI_PAY_RECOVERY_GRACE_SECONDS: must be more than twice ECI_PAY_SEND_DEADLINE_SECONDS" in result.stderr
    assert "Traceback" not in result.stderr
