"""Begin and settle, many rows at once: each row comes to its own result, whatever its neighbours are."""

import asyncio
import random
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors as sql_errors

from eci_pay.answers import Answer
from eci_pay.batches import Begun, Refused
from eci_pay.charge_records import begin_charges, settle_charges
from eci_pay.database import arrays, fetch
from eci_pay.idempotency import KEY_LIFETIME
from eci_pay.lifecycle import RefundStatus
from eci_pay.refund_records import begin_refunds, settle_refunds
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.rows import NOW, charge_begin, charge_settlement, keys, kinds, paid, refund_begin, refund_settlement
from tests.support import Books, Opener, Sessions, until_lock_waits

# One row of each key, order and payment at a time


async def test_an_order_that_is_taken_is_refused_without_a_key_and_without_harm_to_its_neighbours(
    service: PaymentService, books: Books
) -> None:
    await begin_charges(service.database, [charge_begin(2, "first")])
    results = await begin_charges(service.database, [charge_begin(1, "a"), charge_begin(2, "b"), charge_begin(3, "c")])
    assert kinds(results) == ["Begun", "Refused", "Begun"]
    assert await keys(books) == ["a", "c", "first"]


async def test_an_order_named_twice_in_a_batch_is_begun_for_the_first_and_refused_to_the_second(
    service: PaymentService, books: Books
) -> None:
    first, second = await begin_charges(service.database, [charge_begin(1, "a"), charge_begin(1, "b")])
    assert isinstance(first, Begun)
    assert isinstance(second, Refused)
    assert (second.row["status"], second.row["key_id"]) == ("PROCESSING", None)
    assert await keys(books) == ["a"]


async def test_a_key_named_twice_in_a_batch_is_begun_for_the_first_and_refused_to_the_second(
    service: PaymentService, books: Books
) -> None:
    first, same, other = await begin_charges(
        service.database, [charge_begin(1, "k"), charge_begin(1, "k"), charge_begin(2, "k")]
    )
    assert isinstance(first, Begun)
    for refused in (same, other):
        assert isinstance(refused, Refused)
        assert refused.row["key_payment_id"] == first.row["payment_id"]
    assert await books.value("SELECT count(*) FROM payments") == 1


async def test_each_row_of_a_batch_gets_its_own_result(service: PaymentService, books: Books) -> None:
    order_ids = random.sample(range(1, 10_000), 60)
    await begin_charges(service.database, [charge_begin(order_id) for order_id in order_ids[::3]])
    rows = [charge_begin(order_id, f"later {-order_id}", amount=f"{order_id}.50") for order_id in order_ids]
    results = await begin_charges(service.database, rows)
    assert kinds(results) == ["Refused", "Begun", "Begun"] * 20
    settlements = [
        charge_settlement(row, result) for row, result in zip(rows, results, strict=True) if isinstance(result, Begun)
    ]
    assert await settle_charges(service.database, settlements[::-1]) == [True] * 40
    wrong = await books.rows(
        "SELECT * FROM payments p JOIN idempotency_keys USING (payment_id) JOIN transactions t USING (payment_id)"
        " WHERE status_code = 201 AND (idempotency_key, p.amount, t.amount, authorization_code, response_body) <>"
        " ('later -' || order_id, order_id + .5, order_id + .5, 'AUTH' || order_id, 'the answer of ' || order_id)"
    )
    assert wrong == []
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'COMPLETED'") == 40


async def test_refunds_of_one_payment_in_one_batch_are_reserved_one_after_the_other(
    service: PaymentService, books: Books
) -> None:
    payment_id, other = await paid(service, 1, 2)
    rows = [
        refund_begin(payment_id, "30", "a"),
        refund_begin(payment_id, "50", "b"),
        refund_begin(other, "100"),
        refund_begin(payment_id, "30", "c"),
        refund_begin(payment_id, None, "d"),
        refund_begin(payment_id, None, "e"),
        refund_begin(2**60, "1", "f"),
    ]
    results = await begin_refunds(service.database, rows)
    assert kinds(results) == ["Begun", "Begun", "Begun", "Refused", "Begun", "Refused", "Refused"]
    assert [result.row["amount"] for result in results if isinstance(result, Begun)] == [30, 50, 100, 20]
    assert await keys(books) == ["a", "b", "d", "pay 1", "pay 2"]
    told = await settle_refunds(
        service.database,
        [
            refund_settlement(results[0]),
            refund_settlement(results[4]),
            refund_settlement(results[2]),
            refund_settlement(results[1], RefundStatus.FAILED),
        ],
    )
    views = [PaymentView.model_validate_json(answer.body) for answer in told if isinstance(answer, Answer)]
    assert [(view.refunded_amount, view.refund_pending) for view in views] == [
        (Decimal(100), Decimal(70)),
        (Decimal(100), Decimal(50)),
        (Decimal(100), Decimal(0)),
        (Decimal(50), Decimal(0)),
    ]
    assert [view.status for view in views] == ["COMPLETED", "COMPLETED", "REFUNDED", "COMPLETED"]
    assert await books.rows("SELECT order_id FROM payments WHERE status = 'REFUNDED'") == [{"order_id": 2}]


# Keys


async def test_a_finished_key_is_taken_over_once_it_has_expired_and_an_unfinished_one_never(
    service: PaymentService, books: Books
) -> None:
    rows = [charge_begin(1, "finished"), charge_begin(2, "unfinished")]
    begun = await begin_charges(service.database, rows)
    await settle_charges(service.database, [charge_settlement(rows[0], begun[0])])

    async def begin_after(age: timedelta) -> list[str]:
        later = [replace(charge_begin(n, key), at=NOW + age) for n, key in ((3, "finished"), (4, "unfinished"))]
        return kinds(await begin_charges(service.database, later))

    assert await begin_after(KEY_LIFETIME - timedelta(microseconds=1)) == ["Refused", "Refused"]
    assert await begin_after(KEY_LIFETIME) == ["Begun", "Refused"]
    assert await begin_after(KEY_LIFETIME * 100) == ["Refused", "Refused"]
    taken = await books.rows(
        "SELECT order_id FROM idempotency_keys JOIN payments USING (payment_id)"
        " WHERE idempotency_key = 'finished' AND response_body IS NULL"
    )
    assert taken == [{"order_id": 3}]


@pytest.mark.parametrize("ending", ["commit", "rollback"])
async def test_a_key_that_another_session_is_claiming_is_waited_for(
    service: PaymentService, books: Books, sessions: Sessions, ending: str
) -> None:
    session = await sessions()
    raced = charge_begin(9, "k")
    await fetch(session, "charge_begin", {**arrays([raced.columns()]), "takes_over": True, "lock_wait": None})
    rows = [charge_begin(1, "a"), charge_begin(2, "k"), charge_begin(3, "z")]
    beginning = asyncio.create_task(begin_charges(service.database, rows))
    await until_lock_waits(books)
    await (session.commit() if ending == "commit" else session.rollback())
    assert kinds(await beginning) == ["Begun", "Refused" if ending == "commit" else "Begun", "Begun"]
    orders = [row["order_id"] for row in await books.rows("SELECT order_id FROM payments ORDER BY 1")]
    assert orders == ([1, 3, 9] if ending == "commit" else [1, 2, 3])
    assert await keys(books) == ["a", "k", "z"]


async def test_a_key_raced_by_a_charge_and_a_refund_goes_to_one_and_the_other_leaves_nothing(
    service: PaymentService, books: Books, sessions: Sessions
) -> None:
    payment_id, other = await paid(service, 1, 2)
    session = await sessions()
    begin = {**arrays([charge_begin(9, "k").columns()]), "takes_over": True, "lock_wait": None}
    await fetch(session, "charge_begin", begin)
    rows = [refund_begin(payment_id, "10", "k"), refund_begin(other, "10", "z")]
    refunding = asyncio.create_task(begin_refunds(service.database, rows))
    await until_lock_waits(books)
    await session.commit()
    assert kinds(await refunding) == ["Refused", "Begun"]
    assert await books.value("SELECT refunded_amount FROM payments WHERE order_id = 1") == 0


@pytest.mark.parametrize(
    ("status", "ending"),
    [("PROCESSING", "commit"), ("PROCESSING", "rollback"), ("PENDING", "commit"), ("CANCELLED", "commit")],
)
async def test_an_order_that_another_session_has_not_committed_is_waited_for(
    service: PaymentService, books: Books, sessions: Sessions, status: str, ending: str
) -> None:
    expected = "Begun" if ending == "rollback" or status == "PENDING" else "Refused"
    session = await sessions()
    await session.execute(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, status, transaction_id)"
        " VALUES (2, 7, 1, 'UPI', %s, 'theirs')",
        (status,),
    )
    rows = [charge_begin(1), charge_begin(2), charge_begin(3)]
    beginning = asyncio.create_task(begin_charges(service.database, rows))
    await until_lock_waits(books)
    await (session.commit() if ending == "commit" else session.rollback())
    assert kinds(await beginning) == ["Begun", expected, "Begun"]
    assert len(await keys(books)) == (3 if expected == "Begun" else 2)


# What one row does to its neighbours


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "NUL": {"reference": "a\0b"},
    "too long": {"reference": "x" * 101},
    "CHECK": {"amount": Decimal(0)},
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_bad_row_of_a_begin_fails_alone(service: PaymentService, books: Books, bad: str, position: int) -> None:
    rows = [charge_begin(order_id) for order_id in (1, 2, 3)]
    request = rows[position].request.model_copy(update=BAD_REQUESTS[bad])
    reference = request.reference or rows[position].reference
    rows[position] = replace(rows[position], request=request, reference=reference)
    results = await begin_charges(service.database, rows)
    assert isinstance(results.pop(position), psycopg.Error)
    assert kinds(results) == ["Begun", "Begun"]
    assert await books.value("SELECT count(*) FROM payments") == len(await keys(books)) == 2


async def test_a_bad_row_of_a_settlement_fails_alone(service: PaymentService, books: Books) -> None:
    rows = [charge_begin(order_id) for order_id in (1, 2, 3)]
    begun = await begin_charges(service.database, rows)
    settlements = [charge_settlement(row, result) for row, result in zip(rows, begun, strict=True)]
    settlements[1] = replace(settlements[1], authorization_code="x" * 51)
    results = await settle_charges(service.database, settlements)
    assert isinstance(results[1], sql_errors.StringDataRightTruncation)
    assert (results[0], results[2]) == (True, True)
    assert await books.rows("SELECT order_id FROM payments WHERE status = 'PROCESSING'") == [{"order_id": 2}]


async def test_a_bad_row_of_a_batch_of_refunds_fails_alone(service: PaymentService, books: Books) -> None:
    rows = [refund_begin(payment_id, "10", f"r {payment_id}") for payment_id in await paid(service, 1, 2, 3)]
    rows[0] = replace(rows[0], request=rows[0].request.model_copy(update={"reason": "a\0b"}))
    results = await begin_refunds(service.database, rows)
    assert isinstance(results[0], psycopg.DataError)
    assert kinds(results[1:]) == ["Begun", "Begun"]
    settlements = [refund_settlement(result) for result in results[1:]]
    settlements[0] = replace(settlements[0], gateway_response="x" * 501)
    told = await settle_refunds(service.database, settlements)
    assert isinstance(told[0], sql_errors.StringDataRightTruncation)
    assert isinstance(told[1], Answer)
    assert await books.value("SELECT count(*) FROM refunds WHERE status = 'PROCESSING'") == 1


async def test_what_has_begun_is_told_although_a_neighbour_could_not_be(
    opened: Opener, sessions: Sessions, books: Books
) -> None:
    """A bad row makes each row run alone; then the third waits in vain, after the first was committed."""
    session = await sessions()
    await session.execute(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id) VALUES (3, 7, 1, 'UPI', 'x')"
    )
    rows = [charge_begin(order_id) for order_id in (1, 2, 3, 4)]
    rows[1] = replace(rows[1], request=rows[1].request.model_copy(update={"amount": Decimal(0)}))
    async with opened(eci_pay_lock_timeout_seconds=0.2) as impatient:
        results = await begin_charges(impatient.database, rows)
    assert kinds(results) == ["Begun", "CheckViolation", "Busy", "Begun"]
    assert sorted(await keys(books)) == ["charge 1", "charge 4"]


async def test_a_later_round_that_fails_does_not_hide_what_an_earlier_one_began(
    service: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(service, 1)
    await books.rows(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'busy' USING ERRCODE = 'lock_not_available'; END $$"
    )
    await books.rows(
        "CREATE TRIGGER fail BEFORE INSERT ON refunds FOR EACH ROW WHEN (NEW.amount = 20) EXECUTE FUNCTION fail()"
    )
    rows = [refund_begin(payment_id, amount, f"refund {amount}") for amount in ("10", "20", "30")]
    results = await begin_refunds(service.database, rows)
    assert kinds(results) == ["Begun", "Busy", "Begun"]
