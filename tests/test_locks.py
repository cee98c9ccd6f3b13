"""Locks that begin and settle wait for, and what is seen once they are given."""

import asyncio
from typing import Any

import pytest

from eci_pay.batches import BeginResult, Begun
from eci_pay.charge_records import begin_charges, settle_charges
from eci_pay.database import arrays, fetch
from eci_pay.lifecycle import PaymentStatus
from eci_pay.messages import message_arrays
from eci_pay.money import whole_amount_currencies
from eci_pay.refund_records import begin_refunds, settle_refunds
from eci_pay.service import PaymentService
from tests.rows import charge_begin, charge_settlement, kinds, paid, refund_begin, refund_settlement
from tests.support import Books, Sessions, until_lock_waits

ARRAYS_OF_CURRENCIES = {"whole_amount_currencies": list(whole_amount_currencies())}
NEVER_WAIT = {("refund_begin", "charge_begin", 2), ("charge_begin", "refund_settle", 2)}
"""A paid order is refused and a FAILED payment has no refund before any lock is asked for."""


@pytest.mark.parametrize("second", ["charge_begin", "charge_settle", "refund_begin", "refund_settle"])
@pytest.mark.parametrize("first", ["charge_begin", "refund_begin"])
async def test_statements_over_the_same_rows_in_opposite_order_wait_and_do_not_deadlock(
    service: PaymentService, books: Books, sessions: Sessions, first: str, second: str
) -> None:
    """Payments are numbered against their orders: sorted by payment, the second would hold order 3 and wait for 2.

    The statements run without the retry that would hide a deadlock.
    """
    begins = [charge_begin(order_id) for order_id in (3, 2, 1)]
    begun = [result for row in begins for result in await begin_charges(service.database, [row])]
    final = PaymentStatus.FAILED if first == "charge_begin" else PaymentStatus.COMPLETED
    settlements = [charge_settlement(row, result, final) for row, result in zip(begins, begun, strict=True)]
    await settle_charges(service.database, settlements)
    payment_ids = [row.payment_id for row in settlements]
    reserved: list[BeginResult] = []
    if first == "refund_begin":
        reserved = await begin_refunds(service.database, [refund_begin(payment_id, "5") for payment_id in payment_ids])

    def parameters(statement: str, text: str) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {
            "charge_begin": [charge_begin(order_id, f"{text} {order_id}") for order_id in (3, 2, 1)],
            "charge_settle": settlements,
            "refund_begin": [refund_begin(payment_id, "1") for payment_id in payment_ids],
            "refund_settle": [
                refund_settlement(
                    Begun(
                        {"order_id": n, "payment_id": p, "refund_id": r, "amount": 5, "key_id": None, "begin_id": "b"}
                    )
                )
                for n, p, r in zip(
                    (3, 2, 1),
                    payment_ids,
                    [result.row["refund_id"] for result in reserved if isinstance(result, Begun)] or (1, 2, 3),
                    strict=True,
                )
            ],
        }
        columns = arrays([row.columns() for row in rows[statement]])
        told = message_arrays([getattr(row, "messages", ()) for row in rows[statement]])
        return {**columns, **told, "takes_over": True, "lock_wait": None, **ARRAYS_OF_CURRENCIES}

    holder, one, two = await sessions(), await sessions(), await sessions()
    await holder.execute("SELECT FROM payments WHERE order_id = 2 FOR UPDATE")
    running = []
    for waiting, (session, statement) in enumerate([(one, first), (two, second)], start=1):
        await session.set_autocommit(True)
        running.append(asyncio.create_task(fetch(session, statement, parameters(statement, f"{waiting}"))))
        if (first, second, waiting) not in NEVER_WAIT:
            await until_lock_waits(books, waiting)
    await holder.rollback()
    async with asyncio.timeout(10):
        await asyncio.gather(*running)


@pytest.mark.parametrize(
    "meanwhile", ["status = 'FAILED'", "attempt = attempt + 1", "status = 'COMPLETED', captured_at = now()"]
)
async def test_a_settlement_that_waited_for_its_payment_looks_at_what_it_has_become(
    service: PaymentService, books: Books, sessions: Sessions, meanwhile: str
) -> None:
    rows = [charge_begin(order_id) for order_id in (1, 2, 3)]
    begun = await begin_charges(service.database, rows)
    settlements = [charge_settlement(row, result) for row, result in zip(rows, begun, strict=True)]
    session = await sessions()
    await session.execute(f"UPDATE payments SET {meanwhile} WHERE order_id = 2".encode())
    settling = asyncio.create_task(settle_charges(service.database, settlements))
    await until_lock_waits(books)
    await session.commit()
    assert await settling == [True, False, True]
    payment_id = settlements[1].payment_id
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING")]
    unfinished = await books.rows("SELECT payment_id FROM idempotency_keys WHERE response_body IS NULL")
    assert unfinished == [{"payment_id": payment_id}]


async def test_a_settlement_of_an_earlier_attempt_changes_nothing(service: PaymentService, books: Books) -> None:
    row = charge_begin(1, "first")
    [begun] = await begin_charges(service.database, [row])
    await settle_charges(service.database, [charge_settlement(row, begun, PaymentStatus.FAILED)])
    [again] = await begin_charges(service.database, [charge_begin(1, "second")])
    assert isinstance(again, Begun)
    assert again.row["attempt"] == 2
    assert await settle_charges(service.database, [charge_settlement(row, begun)]) == [False]
    assert await books.value("SELECT status FROM payments") == "PROCESSING"


async def test_what_is_settled_many_times_is_booked_once(service: PaymentService, books: Books) -> None:
    row = charge_begin(1)
    [begun] = await begin_charges(service.database, [row])
    settlement = charge_settlement(row, begun)
    assert await settle_charges(service.database, [settlement, settlement]) == [True, False]
    [reserved] = await begin_refunds(service.database, [refund_begin(settlement.payment_id, "40", "r")])
    refund = refund_settlement(reserved)
    results = await asyncio.gather(*(settle_refunds(service.database, [refund, refund]) for _ in range(5)))
    told = [answer for result in results for answer in result if answer is not None]
    assert kinds(told) == ["Answer"]
    assert await books.rows("SELECT refunded_amount, refund_pending FROM payments") == [
        {"refunded_amount": 40, "refund_pending": 0}
    ]
    assert len(await books.audit_trail(settlement.payment_id)) == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("refunded_amount = 90", "refunded_amount = 0"),
        ("status = 'PROCESSING'", "status = 'COMPLETED'"),
        ("amount = 20, status = 'FAILED'", "amount = 100, status = 'COMPLETED'"),
    ],
)
async def test_a_refund_that_waited_for_its_payment_goes_by_what_it_has_become(
    service: PaymentService, books: Books, sessions: Sessions, before: str, after: str
) -> None:
    """An UPDATE checks constraints on the row of its snapshot first: what is mixed with newer values may fail there."""
    [payment_id] = await paid(service, 1)
    await books.rows(f"UPDATE payments SET {before}")
    session = await sessions()
    await session.execute(f"UPDATE payments SET {after}".encode())
    refunding = asyncio.create_task(begin_refunds(service.database, [refund_begin(payment_id, "60")]))
    await until_lock_waits(books)
    await session.commit()
    assert kinds(await refunding) == ["Begun"]
    assert await books.value("SELECT refunded_amount FROM payments") == 60


async def test_the_last_of_refunds_that_settle_at_once_makes_the_payment_refunded(
    service: PaymentService, books: Books, sessions: Sessions
) -> None:
    [payment_id] = await paid(service, 1)
    rows = [refund_begin(payment_id, amount) for amount in ("30", "30", "40")]
    settlements = [refund_settlement(result) for result in await begin_refunds(service.database, rows)]
    session = await sessions()
    await session.execute("SELECT FROM payments FOR UPDATE")
    settling = [asyncio.create_task(settle_refunds(service.database, [settlement])) for settlement in settlements]
    await until_lock_waits(books, 3)
    await session.rollback()
    results = [result for [result] in await asyncio.gather(*settling)]
    assert kinds(results) == ["Answer"] * 3
    assert (await service.payments.by_id(payment_id)).status is PaymentStatus.REFUNDED
