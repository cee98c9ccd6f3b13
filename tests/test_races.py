"""Races for money: many at once, through one server or several replicas, and the books stay true."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Any

import httpx
import pytest
from psycopg import errors as sql_errors

from eci_pay.answers import Answer
from eci_pay.errors import Conflict, IdempotencyKeyInFlight, IdempotencyKeyReused, InvalidState, PayError
from eci_pay.lifecycle import PaymentStatus
from eci_pay.requests import StatusUpdateRequest
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from eci_pay.views import PaymentView
from tests.support import (
    Books,
    ManualClock,
    RecordingGateway,
    assert_books_are_true,
    charge_fields,
    charge_request,
    create_request,
    names,
    refund_request,
)

MANY = 200


async def outcomes(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """What each came to, run all at once: its result, or the error of ours that it raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, PayError):
            raise result
    return results


@pytest.fixture
async def replicas(
    settings: Settings, database_url: str, gateway: RecordingGateway, clock: ManualClock
) -> AsyncIterator[list[PaymentService]]:
    """Services that share nothing but the database and the gateway."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(payment_service(settings, database_url, gateway=gateway, clock=clock))
            for _ in range(3)
        ]


async def paid(service: PaymentService, order_id: int, amount: str) -> int:
    """The payment_id of a charge that was approved."""
    request = charge_request(order_id, amount=amount, payment_method="UPI")
    answer = await service.charges.charge(request=request, idempotency_key=f"pay {order_id}")
    assert answer.status_code == 201
    return answer.payment_id


async def test_200_charges_with_one_key_are_one_payment_and_one_answer(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway
) -> None:
    async def post() -> httpx.Response:
        fields = charge_fields(1, amount="4000.10")
        return await api.post("/v1/payments/charge", json=fields, headers={"Idempotency-Key": "one"})

    responses = await outcomes(post() for _ in range(MANY))
    finished = [response for response in responses if response.status_code == 201]
    refused = [response for response in responses if response.status_code != 201]
    assert len({response.content for response in finished}) == 1
    assert [response.headers.get("idempotent-replayed") for response in finished].count(None) == 1
    assert {(response.status_code, response.json()["code"]) for response in refused} <= {
        (409, "idempotency-key-in-flight")
    }
    replay = await post()
    assert (replay.status_code, replay.content) == (201, finished[0].content)
    assert replay.headers["idempotent-replayed"] == "true"
    assert (len(gateway.charges), await books.value("SELECT count(*) FROM payments")) == (1, 1)
    await assert_books_are_true(books, gateway)


async def test_200_charges_of_one_order_with_200_keys_pay_it_once_and_leave_one_key(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway
) -> None:
    async def post(number: int) -> httpx.Response:
        key = {"Idempotency-Key": f"key {number}"}
        return await api.post("/v1/payments/charge", json=charge_fields(1), headers=key)

    responses = await outcomes(post(number) for number in range(MANY))
    assert names(responses) == {"201": 1, "409": MANY - 1}
    codes = {response.json()["code"] for response in responses if response.status_code == 409}
    assert codes <= {"order-in-progress", "order-already-paid"}
    winner = [response.status_code for response in responses].index(201)
    keys = await books.rows("SELECT idempotency_key FROM idempotency_keys")
    assert keys == [{"idempotency_key": f"key {winner}"}]
    assert len(gateway.charges) == 1
    await assert_books_are_true(books, gateway)


async def test_one_key_raced_for_two_orders_pays_one_of_them(
    replicas: list[PaymentService], books: Books, gateway: RecordingGateway
) -> None:
    for race in range(10):
        orders = [2 * race + 1, 2 * race + 2]
        results = await outcomes(
            replicas[number % 3].charges.charge(request=charge_request(orders[number % 2]), idempotency_key=f"{race}")
            for number in range(12)
        )
        answers = {result.body for result in results if isinstance(result, Answer)}
        assert len(answers) == 1
        won = PaymentView.model_validate_json(answers.pop()).order_id
        for number, result in enumerate(results):
            expected = (Answer, IdempotencyKeyInFlight) if orders[number % 2] == won else IdempotencyKeyReused
            assert isinstance(result, expected)
    assert await books.value("SELECT count(*) FROM payments") == 10
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 10
    await assert_books_are_true(books, gateway)


@pytest.mark.parametrize(("amount", "fitting"), [("0.50", 100), ("0.30", 166)])
async def test_of_200_concurrent_refunds_exactly_those_succeed_that_fit(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway, amount: str, fitting: int
) -> None:
    fields = charge_fields(1, amount="50.00", payment_method="UPI")
    payment = (await api.post("/v1/payments/charge", json=fields, headers={"Idempotency-Key": "k"})).json()
    path = f"/v1/payments/{payment['payment_id']}"
    part = {"amount": amount, "reason": "Customer changed their mind"}
    responses = await outcomes(api.post(f"{path}/refund", json=part) for _ in range(MANY))
    assert names(responses) == {"200": fitting, "409": MANY - fitting}
    view = PaymentView.model_validate_json((await api.get(path)).content)
    assert (view.refunded_amount, view.refund_pending) == (fitting * Decimal(amount), Decimal(0))
    assert (view.status is PaymentStatus.REFUNDED) == (view.refunded_amount == view.amount)
    trail = await books.audit_trail(view.payment_id)
    assert trail.count(("PAYMENT", "REFUNDED")) == (view.status is PaymentStatus.REFUNDED)
    await assert_books_are_true(books, gateway)


async def test_declined_refunds_among_concurrent_ones_give_back_what_they_reserved(
    replicas: list[PaymentService], books: Books, gateway: RecordingGateway
) -> None:
    payment_id = await paid(replicas[0], 1, "20000.00")
    amounts = ["4000.02" if number % 2 else "150.00" for number in range(MANY)]
    results = await outcomes(
        replicas[number % 3].refunds.refund(
            payment_id=payment_id, request=refund_request(amount), idempotency_key=f"refund {number}"
        )
        for number, amount in enumerate(amounts)
    )
    assert set(names(results)) <= {"200", "402", "RefundExceedsBalance"}
    for amount, result in zip(amounts, results, strict=True):
        assert isinstance(result, Conflict) or result.is_declined == (amount == "4000.02")
    view = await replicas[0].payments.by_id(payment_id)
    assert view.refunded_amount == 150 * names(results)["200"]
    assert (view.status, view.refund_pending) == (PaymentStatus.COMPLETED, Decimal(0))
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 1 + len(view.refunds)
    rest = await replicas[1].refunds.refund(payment_id=payment_id, request=refund_request())
    assert PaymentView.model_validate_json(rest.body).status is PaymentStatus.REFUNDED
    await assert_books_are_true(books, gateway)


async def test_replicas_racing_for_the_same_orders_pay_each_once_and_refund_each_once(
    replicas: list[PaymentService], books: Books, gateway: RecordingGateway
) -> None:
    orders = range(1, 31)
    charges = await outcomes(
        replica.charges.charge(request=charge_request(order_id), idempotency_key=f"{number} {order_id}")
        for order_id in orders
        for number, replica in enumerate(replicas)
    )
    assert names(charges)["201"] == len(orders)
    payment_ids = [result.payment_id for result in charges if isinstance(result, Answer)]
    refunds = await outcomes(
        replica.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key=f"back {payment_id}")
        for payment_id in payment_ids
        for replica in replicas
    )
    assert set(names(refunds)) <= {"200", "IdempotencyKeyInFlight"}
    assert len({result.body for result in refunds if isinstance(result, Answer)}) == len(orders)
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'REFUNDED'") == len(orders)
    await assert_books_are_true(books, gateway)


async def test_of_a_charge_an_update_and_a_cancellation_of_one_pending_payment_one_wins(
    replicas: list[PaymentService], books: Books, gateway: RecordingGateway
) -> None:
    orders = range(1, 41)
    complete = StatusUpdateRequest(status=PaymentStatus.COMPLETED)
    created = [await replicas[0].charges.create(request=create_request(order_id)) for order_id in orders]
    results = await outcomes(
        use_case
        for order_id, payment in zip(orders, created, strict=True)
        for use_case in (
            replicas[order_id % 3].charges.charge(request=charge_request(order_id), idempotency_key=f"{order_id}"),
            replicas[(order_id + 1) % 3].status_changes.cancel(payment_id=payment.payment_id),
            replicas[(order_id + 2) % 3].status_changes.update(payment_id=payment.payment_id, request=complete),
        )
    )
    for order_id in orders:
        charge, cancellation, update = results[3 * (order_id - 1) : 3 * order_id]
        won = [result for result in (charge, cancellation, update) if not isinstance(result, Conflict)]
        assert len(won) == 1
        view = PaymentView.model_validate_json(won[0].body) if isinstance(won[0], Answer) else won[0]
        assert view == await replicas[0].payments.by_order(order_id)
        assert (view.captured_at is not None) == (won[0] is charge)
    keys = await books.value("SELECT count(*) FROM idempotency_keys")
    assert keys == len(gateway.charges) == names(results)["201"]
    await assert_books_are_true(books, gateway)


async def test_a_cancelled_order_stays_unpaid_however_many_charges_come_at_once(
    replicas: list[PaymentService], gateway: RecordingGateway
) -> None:
    created = await replicas[0].charges.create(request=create_request(1))
    await replicas[0].status_changes.cancel(payment_id=created.payment_id)
    results = await outcomes(
        replicas[number % 3].charges.charge(request=charge_request(1), idempotency_key=f"{number}")
        for number in range(30)
    )
    assert all(isinstance(result, InvalidState) for result in results)
    assert gateway.charges == []


@pytest.mark.parametrize(
    "by_hand",
    [
        "UPDATE payments SET refunded_amount = amount + 0.01",
        "UPDATE payments SET refunded_amount = -0.01",
        "UPDATE payments SET refund_pending = 0.01",
        "UPDATE payments SET status = 'REFUNDED'",
        "UPDATE payments SET status = 'REFUNDED', refunded_amount = amount - 0.01",
        "UPDATE payments SET status = 'REFUNDED', refunded_amount = amount, refund_pending = 0.01",
        "UPDATE payments SET status = 'FAILED', refunded_amount = 1",
        "UPDATE payments SET amount = 10, refunded_amount = 11",
    ],
)
async def test_the_database_alone_refuses_to_give_back_more_than_was_paid(
    service: PaymentService, books: Books, by_hand: str
) -> None:
    await paid(service, 1, "50.00")
    with pytest.raises(sql_errors.CheckViolation):
        await books.rows(by_hand)
    assert await books.value("SELECT refunded_amount FROM payments WHERE status = 'COMPLETED'") == 0
