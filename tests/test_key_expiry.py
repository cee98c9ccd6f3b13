"""Idempotency keys in time, and orders whose payment is taken over by a later charge."""

import asyncio
import time

import pytest

from eci_pay.answers import Answer
from eci_pay.errors import IdempotencyKeyReused, OrderAlreadyPaid, OrderInProgress
from eci_pay.idempotency import EXPIRE_BATCH_SIZE_MAX, KEY_LIFETIME
from eci_pay.requests import ChargeRequest
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.support import (
    Books,
    CommandLine,
    ManualClock,
    RecordingGateway,
    charge_request,
    create_request,
    refund_request,
)

UNKNOWN_AMOUNT = "4000.08"
DECLINED_AMOUNT = "4000.02"


async def forget_the_answer(books: Books) -> None:
    """Leaves the keys as a crash before their answer was stored."""
    await books.rows("UPDATE idempotency_keys SET response_body = NULL, status_code = NULL")


async def crash_while_charging(service: PaymentService, books: Books, request: ChargeRequest, key: str) -> None:
    """Leaves the payment and its key as a crash between begin and settle."""
    await service.charges.charge(request=request, idempotency_key=key)
    await books.rows("UPDATE payments SET status = 'PROCESSING', completed_at = NULL, captured_at = NULL")
    await forget_the_answer(books)


async def insert_keys(books: Books, clock: ManualClock, count: int) -> None:
    """That many finished keys, which expire at this very moment, and one that has a second left."""
    await books.rows(
        "INSERT INTO idempotency_keys (idempotency_key, request_hash, response_body, status_code, expires_at)"
        " SELECT 'old ' || n, 'h', '{}', 201, %s FROM generate_series(1, %s) AS n",
        clock.now,
        count,
    )
    await books.rows(
        "INSERT INTO idempotency_keys (idempotency_key, request_hash, response_body, status_code, expires_at)"
        " VALUES ('live', 'h', '{}', 201, %s::timestamptz + interval '1 second')",
        clock.now,
    )


async def test_a_finished_key_replays_for_24_hours_and_is_new_after(
    service: PaymentService, clock: ManualClock
) -> None:
    first = await service.charges.charge(request=charge_request(1), idempotency_key="k")
    clock.advance(hours=24, microseconds=-1)
    again = await service.charges.charge(request=charge_request(1), idempotency_key="k")
    assert (again.replayed, again.body) == (True, first.body)
    with pytest.raises(IdempotencyKeyReused):
        await service.charges.charge(request=charge_request(2), idempotency_key="k")
    clock.advance(microseconds=1)
    with pytest.raises(OrderAlreadyPaid):
        await service.charges.charge(request=charge_request(1), idempotency_key="k")
    anew = await service.charges.charge(request=charge_request(2), idempotency_key="k")
    assert (anew.status_code, anew.replayed) == (201, False)
    assert anew.payment_id != first.payment_id
    replay = await service.charges.charge(request=charge_request(2), idempotency_key="k")
    assert (replay.replayed, replay.body) == (True, anew.body)


async def test_an_unfinished_key_never_expires_and_is_never_deleted(
    service: PaymentService, books: Books, clock: ManualClock, gateway: RecordingGateway
) -> None:
    request = charge_request()
    await crash_while_charging(service, books, request, "k")
    clock.advance(days=365)
    assert (await service.keys.count(), await service.keys.delete()) == (0, 0)
    with pytest.raises(IdempotencyKeyReused):
        await service.charges.charge(request=charge_request(2), idempotency_key="k")
    found_out = await service.charges.charge(request=request, idempotency_key="k")
    assert (found_out.status_code, found_out.replayed) == (201, True)
    assert len(gateway.charges) == 1


async def test_a_key_of_an_unknown_outcome_never_expires(
    service: PaymentService, clock: ManualClock, gateway: RecordingGateway
) -> None:
    request = charge_request(amount=UNKNOWN_AMOUNT)
    first = await service.charges.charge(request=request, idempotency_key="k")
    clock.advance(days=365)
    assert (await service.keys.count(), await service.keys.delete()) == (0, 0)
    again = await service.charges.charge(request=request, idempotency_key="k")
    assert (first.is_unknown, again.status_code, again.payment_id) == (True, 201, first.payment_id)
    assert len(gateway.charges) == 1


@pytest.mark.parametrize("late_hours", [23.5, 24 * 365])
async def test_an_outcome_that_is_found_out_late_is_replayed_for_24_hours(
    service: PaymentService, clock: ManualClock, gateway: RecordingGateway, late_hours: float
) -> None:
    """A refund whose key expired with its answer would be made again by the next try."""
    charged = await service.charges.charge(request=charge_request(amount="9000.00"), idempotency_key="c")

    async def refund() -> Answer:
        request = refund_request(UNKNOWN_AMOUNT)
        return await service.refunds.refund(payment_id=charged.payment_id, request=request, idempotency_key="r")

    unknown = await refund()
    clock.advance(hours=late_hours)
    found_out = await refund()
    clock.advance(hours=24, microseconds=-1)
    again = await refund()
    assert (unknown.status_code, found_out.status_code) == (202, 200)
    assert (again.body, again.replayed) == (found_out.body, True)
    assert len(gateway.refunds) == 1
    clock.advance(microseconds=1)
    assert await service.keys.count() == 2


async def test_an_answer_in_time_does_not_move_the_end_of_its_key(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await service.charges.charge(request=charge_request(), idempotency_key="k")
    assert await books.value("SELECT expires_at FROM idempotency_keys") == clock.now + KEY_LIFETIME


async def test_expired_keys_are_deleted_in_batches_that_tell_their_progress(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    count = 2 * EXPIRE_BATCH_SIZE_MAX + 500
    await insert_keys(books, clock, count)
    assert await service.keys.count() == count
    told: list[int] = []
    assert await service.keys.delete(told.append) == count
    assert told == [EXPIRE_BATCH_SIZE_MAX, 2 * EXPIRE_BATCH_SIZE_MAX, count]
    assert await service.keys.count() == 0
    assert await books.rows("SELECT idempotency_key FROM idempotency_keys") == [{"idempotency_key": "live"}]


async def test_expiry_pauses_as_long_as_it_works(
    service: PaymentService, books: Books, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charges go on meanwhile, and wait for the same disk."""
    await insert_keys(books, clock, 3 * EXPIRE_BATCH_SIZE_MAX)
    delete_batch = service.keys.delete_batch
    ends: list[float] = []
    worked_seconds: list[float] = []

    async def timed() -> int:
        started = time.monotonic()
        if ends:
            assert started - ends[-1] >= worked_seconds[-1]
        deleted = await delete_batch()
        worked_seconds.append(time.monotonic() - started)
        ends.append(time.monotonic())
        return deleted

    monkeypatch.setattr(service.keys, "delete_batch", timed)
    assert await service.keys.delete() == 3 * EXPIRE_BATCH_SIZE_MAX
    assert len(ends) == 4


async def test_two_expiries_side_by_side_delete_each_key_once(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    count = 5 * EXPIRE_BATCH_SIZE_MAX
    await insert_keys(books, clock, count)
    assert sum(await asyncio.gather(service.keys.delete(), service.keys.delete())) == count
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 1


async def test_expiry_passes_by_keys_that_somebody_holds(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await insert_keys(books, clock, 10)
    async with books.connection.transaction():
        await books.rows("SELECT FROM idempotency_keys WHERE idempotency_key IN ('old 1', 'old 2') FOR UPDATE")
        assert await service.keys.delete() == 8
    assert await service.keys.delete() == 2


async def test_the_command_counts_and_deletes_expired_keys(
    command_line: CommandLine, books: Books, clock: ManualClock
) -> None:
    clock.now = await books.value("SELECT now() - interval '1 hour'")
    await insert_keys(books, clock, 3)
    counted = await command_line.run("expire-keys", "--dry-run", "--json")
    deleted = await command_line.run("expire-keys", "--json")
    assert (counted.json, deleted.json) == ({"expired": 4}, {"deleted": 4})


async def test_a_charge_takes_a_failed_order_over(service: PaymentService, books: Books, clock: ManualClock) -> None:
    declined = await service.charges.charge(
        request=charge_request(amount=DECLINED_AMOUNT, reference="FIRST"), idempotency_key="1"
    )
    before = await service.payments.by_id(declined.payment_id)
    assert (before.status, before.gateway_response) == ("FAILED", "card_declined: The card was declined.")
    clock.advance(minutes=5)
    request = charge_request(user_id=8, amount="50.00", currency="USD", payment_method="DEBIT_CARD", reference="SECOND")
    answer = await service.charges.charge(request=request, idempotency_key="2")
    after = PaymentView.model_validate_json(answer.body)
    assert (after.payment_id, after.transaction_id, after.created_at) == (
        before.payment_id,
        before.transaction_id,
        before.created_at,
    )
    replaced = {"user_id", "amount", "currency", "payment_method", "reference"}
    assert after.model_dump(include=replaced) == request.model_dump(include=replaced)
    assert (after.status, after.attempt, after.completed_at, after.updated_at) == (
        "COMPLETED",
        2,
        clock.now,
        clock.now,
    )


async def test_a_card_takes_over_what_awaits_cash_and_clears_what_the_gateway_said(
    service: PaymentService, books: Books
) -> None:
    cash = await service.charges.charge(request=charge_request(payment_method="COD"), idempotency_key="cash")
    await books.rows("UPDATE payments SET gateway_response = 'old', authorization_code = 'OLD'")
    card = await service.charges.charge(request=charge_request(amount=UNKNOWN_AMOUNT), idempotency_key="card")
    view = await service.payments.by_id(card.payment_id)
    assert (card.payment_id, view.status, view.attempt) == (cash.payment_id, "PROCESSING", 2)
    assert (view.gateway_response, view.authorization_code, view.completed_at, view.captured_at) == (None,) * 4
    assert await books.audit_trail(view.payment_id) == [("PAYMENT", "PENDING"), ("PAYMENT", "PROCESSING")]


async def test_cash_takes_over_a_failed_card_but_not_waiting_cash(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    failed = await service.charges.charge(request=charge_request(amount=DECLINED_AMOUNT), idempotency_key="card")
    cash = await service.charges.charge(request=charge_request(payment_method="COD"), idempotency_key="cash")
    view = PaymentView.model_validate_json(cash.body)
    assert (view.payment_id, view.status, view.attempt) == (failed.payment_id, "PENDING", 2)
    assert (view.payment_method, view.gateway_response) == ("COD", None)
    with pytest.raises(OrderInProgress):
        await service.charges.charge(request=charge_request(payment_method="COD"), idempotency_key="more cash")
    assert await books.value("SELECT attempt FROM payments") == 2
    assert len(gateway.charges) == 1


@pytest.mark.parametrize("method", ["CREDIT_CARD", "COD"])
async def test_a_charge_takes_a_created_payment_over(service: PaymentService, method: str) -> None:
    created = await service.charges.create(request=create_request(payment_method="UPI"))
    before = PaymentView.model_validate_json(created.body)
    answer = await service.charges.charge(request=charge_request(payment_method=method), idempotency_key="k")
    after = PaymentView.model_validate_json(answer.body)
    assert (after.payment_id, after.transaction_id, after.attempt) == (before.payment_id, before.transaction_id, 2)
    assert after.status == ("PENDING" if method == "COD" else "COMPLETED")


async def test_the_first_key_still_tells_of_the_first_attempt_after_a_takeover(service: PaymentService) -> None:
    request = charge_request(amount=DECLINED_AMOUNT)
    declined = await service.charges.charge(request=request, idempotency_key="first")
    await service.charges.charge(request=charge_request(), idempotency_key="second")
    again = await service.charges.charge(request=request, idempotency_key="first")
    assert (again.status_code, again.body, again.replayed) == (402, declined.body, True)


@pytest.mark.parametrize("operation", ["charge", "create"])
async def test_an_unfinished_key_of_a_pending_payment_is_finished_by_whoever_sees_it(
    service: PaymentService, books: Books, operation: str
) -> None:
    async def send() -> tuple[int, bool, str]:
        if operation == "charge":
            request = charge_request(payment_method="COD")
            answer = await service.charges.charge(request=request, idempotency_key="k")
        else:
            answer = await service.charges.create(request=create_request(), idempotency_key="k")
        return answer.status_code, answer.replayed, answer.body

    _, _, first = await send()
    await forget_the_answer(books)
    assert await send() == (201, True, first)
    assert await books.value("SELECT response_body FROM idempotency_keys") == first
    assert await send() == (201, True, first)


async def test_many_who_see_an_unfinished_key_all_tell_the_same(service: PaymentService, books: Books) -> None:
    request = charge_request(payment_method="COD")
    await service.charges.charge(request=request, idempotency_key="k")
    await forget_the_answer(books)
    answers = await asyncio.gather(*(service.charges.charge(request=request, idempotency_key="k") for _ in range(8)))
    assert len({(answer.status_code, answer.body) for answer in answers}) == 1
    assert await books.value("SELECT count(*) FROM payments") == 1


async def test_an_unfinished_key_of_a_payment_completed_meanwhile_tells_what_became_of_it(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    request = charge_request()
    charged = await service.charges.charge(request=request, idempotency_key="k")
    await forget_the_answer(books)
    again = await service.charges.charge(request=request, idempotency_key="k")
    assert (again.status_code, again.body) == (201, charged.body)
    assert len(gateway.charges) == 1
