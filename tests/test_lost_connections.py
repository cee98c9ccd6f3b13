"""Connections that are lost while the database begins and settles: all is booked once, and told."""

import asyncio
from decimal import Decimal

import pytest

from eci_pay import batches
from eci_pay.answers import Answer
from eci_pay.errors import OrderInProgress
from eci_pay.lifecycle import PaymentStatus
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.door import Door
from tests.rows import paid
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    Opener,
    RecordingGateway,
    Scripted,
    Sessions,
    assert_books_are_true,
    charge_request,
    create_request,
    refund_request,
    until,
    until_lock_waits,
)


async def test_a_charge_whose_session_is_terminated_while_it_begins_begins_once(
    service: PaymentService, books: Books, sessions: Sessions, gateway: RecordingGateway
) -> None:
    session = await sessions()
    await session.execute(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id) VALUES (1, 7, 1, 'UPI', 'x')"
    )
    charging = asyncio.create_task(service.charges.charge(request=charge_request(1), idempotency_key="k"))
    await until_lock_waits(books)
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    first = await books.value(waiting)
    await books.rows("SELECT pg_terminate_backend(%s)", first)

    async def another_waits() -> bool:
        return await books.rows(waiting) not in ([], [{"pid": first}])

    await until(another_waits)
    await session.rollback()
    assert (await charging).status_code == 201
    assert len(gateway.charges) == 1
    await assert_books_are_true(books, gateway)


async def test_a_charge_whose_begin_was_committed_and_its_answer_lost_goes_on(
    far: PaymentService, door: Door, books: Books, gateway: RecordingGateway
) -> None:
    door.lose_answer_to("INSERT INTO payments")
    answer = await far.charges.charge(request=charge_request(1), idempotency_key="k")
    assert door.has_lost
    assert answer.status_code == 201
    assert PaymentView.model_validate_json(answer.body) == await far.payments.by_id(answer.payment_id)
    replay = await far.charges.charge(request=charge_request(1), idempotency_key="k")
    assert (replay.body, replay.replayed, len(gateway.charges)) == (answer.body, True, 1)
    await assert_books_are_true(books, gateway)


SLOW_COMMIT = """
CREATE FUNCTION takes_long() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER takes_long AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION takes_long();
"""


@pytest.mark.parametrize("operation", ["charge", "refund", "create"])
async def test_a_begin_whose_commit_outlasts_its_connection_is_waited_for_and_goes_on(
    far: PaymentService, door: Door, books: Books, gateway: RecordingGateway, operation: str
) -> None:
    payment_ids = await paid(far, 2) if operation == "refund" else []
    sent = len(gateway.charges)
    await books.rows(SLOW_COMMIT.format(table="refunds" if operation == "refund" else "payments"))

    async def ask() -> Answer:
        if operation == "charge":
            return await far.charges.charge(request=charge_request(1), idempotency_key="k")
        if operation == "create":
            return await far.charges.create(request=create_request(1))
        return await far.refunds.refund(payment_id=payment_ids[0], request=refund_request("40"))

    asking = asyncio.create_task(ask())

    async def commits() -> bool:
        sleeping = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        return await books.rows(sleeping) != []

    await until(commits)
    door.cut()
    answer = await asking
    assert answer.status_code == (200 if operation == "refund" else 201)
    assert (len(gateway.charges) - sent, len(gateway.refunds)) == {
        "charge": (1, 0),
        "refund": (0, 1),
        "create": (0, 0),
    }[operation]
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("key", ["k", None])
async def test_a_refund_whose_begin_was_committed_and_its_answer_lost_goes_on(
    far: PaymentService, door: Door, books: Books, gateway: RecordingGateway, key: str | None
) -> None:
    [payment_id] = await paid(far, 1)
    door.lose_answer_to("INSERT INTO refunds")
    answer = await far.refunds.refund(payment_id=payment_id, request=refund_request("40"), idempotency_key=key)
    assert door.has_lost
    assert PaymentView.model_validate_json(answer.body) == await far.payments.by_id(answer.payment_id)
    assert len(gateway.refunds) == 1
    await assert_books_are_true(books, gateway)


@pytest.fixture
def _first_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement whose connection is lost still waits for its lock when it is looked for, on a busy machine too."""
    monkeypatch.setattr(batches, "MOMENT", "10s")


@pytest.mark.usefixtures("_first_waits_on")
async def test_a_charge_that_commits_only_after_it_was_looked_for_begins_once(
    far: PaymentService, door: Door, books: Books, sessions: Sessions, gateway: RecordingGateway
) -> None:
    session = await sessions()
    await session.execute(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id) VALUES (1, 7, 1, 'UPI', 'x')"
    )
    charging = asyncio.create_task(far.charges.charge(request=charge_request(1), idempotency_key="k"))
    await until_lock_waits(books, 1)
    door.cut()
    await until_lock_waits(books, 2)
    await session.rollback()
    assert (await charging).status_code == 201
    assert len(gateway.charges) == 1
    await assert_books_are_true(books, gateway)


@pytest.mark.usefixtures("_first_waits_on")
@pytest.mark.parametrize("key", ["k", None])
async def test_a_refund_that_commits_only_after_it_was_looked_for_is_reserved_once(
    far: PaymentService, door: Door, books: Books, sessions: Sessions, *, gateway: RecordingGateway, key: str | None
) -> None:
    [payment_id] = await paid(far, 1)
    session = await sessions()
    await session.execute("SELECT FROM payments FOR UPDATE")
    refunding = asyncio.create_task(
        far.refunds.refund(payment_id=payment_id, request=refund_request("40"), idempotency_key=key)
    )
    await until_lock_waits(books, 1)
    door.cut()
    await until_lock_waits(books, 2)
    await session.rollback()
    view = PaymentView.model_validate_json((await refunding).body)
    assert (view.refunded_amount, view.refund_pending, len(view.refunds)) == (Decimal(40), Decimal(0), 1)
    assert len(gateway.refunds) == 1
    await assert_books_are_true(books, gateway)


async def test_a_settle_whose_answer_was_lost_tells_what_was_recorded(
    far: PaymentService, door: Door, books: Books, gateway: RecordingGateway
) -> None:
    door.lose_answer_to("FROM settlement")
    answer = await far.charges.charge(request=charge_request(1), idempotency_key="k")
    assert (door.has_lost, answer.status_code) == (True, 201)
    assert answer.body == await books.value("SELECT response_body FROM idempotency_keys")
    assert await books.audit_trail(answer.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    await assert_books_are_true(books, gateway)


@pytest.mark.parametrize("key", ["k", None])
@pytest.mark.parametrize(("amount", "status_code"), [("40", 200), ("4000.02", 402)])
async def test_a_refund_whose_commit_was_not_heard_tells_what_was_recorded(
    far: PaymentService, door: Door, books: Books, *, amount: str, status_code: int, key: str | None
) -> None:
    [payment_id] = await paid(far, 1, amount="9000")
    door.lose_answer_to("COMMIT")
    answer = await far.refunds.refund(payment_id=payment_id, request=refund_request(amount), idempotency_key=key)
    assert (door.has_lost, answer.status_code) == (True, status_code)
    trail = await books.audit_trail(payment_id)
    assert trail[2:] == [("REFUND", "PROCESSING"), ("REFUND", "REFUNDED" if status_code == 200 else "FAILED")]
    if key:
        stored = await books.value("SELECT response_body FROM idempotency_keys WHERE idempotency_key = %s", key)
        assert answer.body == stored


async def test_what_a_pooler_says_of_its_dead_server_at_the_start_of_a_transaction_is_a_lost_connection(
    far: PaymentService, door: Door
) -> None:
    created = await far.charges.create(request=create_request(1))
    await door.crash()
    cancelled = await far.status_changes.cancel(payment_id=created.payment_id)
    assert cancelled.status is PaymentStatus.CANCELLED


async def test_what_cannot_be_booked_because_the_database_stays_away_is_unknown_and_no_error(
    door: Door, opened: Opener, service: PaymentService, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    [payment_id] = await paid(service, 2)
    for charges in (True, False):
        short = {"eci_pay_settle_retry_seconds": 0.3, "eci_pay_database_pool_timeout_seconds": 0.2}
        async with door.opened() as url, opened(url=url, gateway=Scripted(door.shut), **short) as far:
            if charges:
                answer = await far.charges.charge(request=charge_request(1), idempotency_key="k")
            else:
                answer = await far.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
        assert answer.is_unknown
    assert "could not be booked" in caplog.text
    assert [record for record in caplog.records if record.exc_info] == []  # which would be an unexpected error
    assert await books.value("SELECT status FROM payments WHERE order_id = 1") == "PROCESSING"
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = 2") == 100
    with pytest.raises(OrderInProgress):
        await service.charges.charge(request=charge_request(1), idempotency_key="another")
