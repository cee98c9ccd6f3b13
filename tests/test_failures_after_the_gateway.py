"""What breaks once something was committed or the gateway was asked: nothing is forgotten, nobody told it failed."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import httpx
import psycopg
import pytest
from psycopg import errors as sql_errors

from eci_pay.answers import Answer
from eci_pay.batches import Begun, Refused
from eci_pay.charge_records import begin_charges, settle_charges
from eci_pay.database import Database, Params, Row
from eci_pay.errors import ConnectionLost, Unavailable
from eci_pay.gateways import Approved, GatewayCharge, GatewayRefund, Outcome
from eci_pay.refund_records import begin_refunds
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.door import Door
from tests.rows import charge_begin, charge_settlement, kinds, paid, refund_begin
from tests.support import (
    FAULTS_IN_BOOKS,
    UNTIL_TIMEOUT_SECONDS,
    Books,
    Opener,
    RecordingGateway,
    assert_books_are_true,
    charge_fields,
    charge_request,
    create_request,
    names,
    refund_request,
)

BREAKS = """
CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'broken by hand'; END $$
"""
BREAKS_SETTLE_OF_PAYMENTS = """
CREATE TRIGGER broken BEFORE UPDATE ON payments FOR EACH ROW
WHEN (OLD.status = 'PROCESSING' OR NEW.refund_pending < OLD.refund_pending) EXECUTE FUNCTION broken()
"""
BREAKS_UPDATES_OF_KEYS = """
CREATE TRIGGER broken BEFORE UPDATE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION broken()
"""
TRIGGERS = {"payments": BREAKS_SETTLE_OF_PAYMENTS, "idempotency_keys": BREAKS_UPDATES_OF_KEYS}
EACH_TABLE = pytest.mark.parametrize("table", TRIGGERS)


async def break_updates(books: Books, table: str) -> None:
    """From now on, what settle changes in a table is refused with an error of no known kind."""
    await books.rows(BREAKS)
    await books.rows(TRIGGERS[table])


async def assert_both_are_processing(books: Books, charged: int, refunded: int) -> None:
    """The charge of one order, and the refund of another, wait for what the gateway has done."""
    assert await books.value("SELECT status FROM payments WHERE order_id = %s", charged) == "PROCESSING"
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = %s", refunded) == 100
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# After the gateway was asked


@EACH_TABLE
async def test_what_the_database_refuses_to_book_is_unknown_and_no_error(
    service: PaymentService, books: Books, gateway: RecordingGateway, table: str
) -> None:
    [payment_id] = await paid(service, 1)
    await break_updates(books, table)
    charge = await service.charges.charge(request=charge_request(2), idempotency_key="k")
    refund = await service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert (charge.is_unknown, refund.is_unknown) == (True, True)
    assert (len(gateway.charges), len(gateway.refunds)) == (2, 1)
    await assert_both_are_processing(books, 2, 1)
    replays = await asyncio.gather(
        service.charges.charge(request=charge_request(2), idempotency_key="k"),
        service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r"),
        return_exceptions=True,
    )
    # Where the key cannot be changed, not even that the outcome is unknown could be noted.
    assert names(replays) == ({"202": 2} if table == "payments" else {"IdempotencyKeyInFlight": 2})
    assert (len(gateway.charges), len(gateway.refunds)) == (2, 1)


async def test_a_refund_without_a_key_that_the_database_refuses_to_book_is_unknown(
    service: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(service, 1)
    await break_updates(books, "payments")
    refund = await service.refunds.refund(payment_id=payment_id, request=refund_request())
    assert refund.is_unknown
    assert await books.value("SELECT refund_pending FROM payments") == 100


@EACH_TABLE
async def test_what_the_database_refuses_to_book_is_answered_202_over_http(
    api: httpx.AsyncClient, service: PaymentService, books: Books, table: str
) -> None:
    [payment_id] = await paid(service, 1)
    await break_updates(books, table)
    charge = await api.post("/v1/payments/charge", json=charge_fields(2), headers={"Idempotency-Key": "k"})
    reason = {"reason": "Damaged in transit"}
    refund = await api.post(f"/v1/payments/{payment_id}/refund", json=reason, headers={"Idempotency-Key": "r"})
    for response in (charge, refund):
        assert (response.status_code, response.headers["Retry-After"]) == (202, "2")
    assert charge.json()["status"] == "PROCESSING"
    await assert_both_are_processing(books, 2, 1)


class Answering(RecordingGateway):
    """Answers whatever it was given, whether that is an outcome or not."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer_given = cast(Outcome, answer)

    async def charge(self, charge: GatewayCharge) -> Outcome:
        await super().charge(charge)
        return self._answer_given

    async def refund(self, refund: GatewayRefund) -> Outcome:
        await super().refund(refund)
        return self._answer_given


@pytest.mark.parametrize("answer", [None, "approved", Approved(reference=cast(str, None))], ids=repr)
async def test_an_adapter_that_returns_no_outcome_leaves_the_outcome_unknown(
    opened: Opener, service: PaymentService, books: Books, answer: object
) -> None:
    [payment_id] = await paid(service, 1)
    async with opened(gateway=Answering(answer)) as unlucky:
        charge = await unlucky.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await unlucky.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert (charge.is_unknown, refund.is_unknown) == (True, True)
    await assert_both_are_processing(books, 2, 1)


class Silent(RecordingGateway):
    """Hears what it is asked, and never answers within the time of a test."""

    async def charge(self, charge: GatewayCharge) -> Outcome:
        await super().charge(charge)
        return await _nothing()

    async def refund(self, refund: GatewayRefund) -> Outcome:
        await super().refund(refund)
        return await _nothing()


async def _nothing() -> Outcome:
    async with asyncio.timeout(UNTIL_TIMEOUT_SECONDS):
        await asyncio.Event().wait()
    raise AssertionError


async def test_a_gateway_that_never_answers_is_waited_for_only_so_long_and_its_outcome_is_unknown(
    opened: Opener, service: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(service, 1)
    gateway = Silent()
    async with asyncio.timeout(10), opened(gateway=gateway, eci_pay_gateway_timeout_seconds=0.2) as patient:
        charge = await patient.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await patient.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
        replay = await patient.charges.charge(request=charge_request(2), idempotency_key="k")
    assert [answer.status_code for answer in (charge, refund, replay)] == [202, 202, 202]
    assert (len(gateway.charges), len(gateway.refunds)) == (1, 1)
    await assert_both_are_processing(books, 2, 1)


# A database that never answers


class DeafDoor(Door):
    """Once it is deaf, it takes whatever it is sent, new connections among it, and passes nothing on."""

    is_deaf = False

    async def _ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while chunk := await client.read(65536):
            if not self.is_deaf:
                server.write(chunk)


class Deafening(RecordingGateway):
    """Makes the database deaf while it is asked."""

    def __init__(self, door: DeafDoor) -> None:
        super().__init__()
        self._door = door

    async def charge(self, charge: GatewayCharge) -> Outcome:
        outcome = await super().charge(charge)
        self._door.is_deaf = True
        return outcome


GIVE_UP_SECONDS = 5 + 10
"""Our own margin, and how long psycopg tries to cancel."""


async def test_a_database_that_never_answers_is_given_up(database_url: str, opened: Opener, books: Books) -> None:
    """Slow: nobody can tell it from a slow one any sooner. So both halves of a charge are here at once."""
    short = {
        "eci_pay_statement_timeout_seconds": 0.1,
        "eci_pay_database_pool_timeout_seconds": 1.0,
        "eci_pay_database_pool_size": 1,  # each one that is open is found out by itself
    }

    async def while_it_begins() -> float:
        door = DeafDoor(database_url)
        async with door.opened() as url, opened(url=url, **short) as far:
            await far.check_ready()
            door.is_deaf = True
            started = time.monotonic()
            with pytest.raises(Unavailable):
                await far.charges.charge(request=charge_request(1), idempotency_key="k 1")
            return time.monotonic() - started

    async def while_it_settles() -> float:
        door = DeafDoor(database_url)
        async with door.opened() as url, opened(url=url, gateway=Deafening(door), **short) as far:
            await far.check_ready()
            started = time.monotonic()
            answer = await far.charges.charge(request=charge_request(2), idempotency_key="k 2")
            assert answer.is_unknown
            return time.monotonic() - started

    async with asyncio.timeout(120):
        for seconds in await asyncio.gather(while_it_begins(), while_it_settles()):
            assert seconds < GIVE_UP_SECONDS + 10
    assert await books.rows("SELECT order_id, status FROM payments") == [{"order_id": 2, "status": "PROCESSING"}]


# After begin was committed


class Broken(Database):
    """Fails its next reads of one statement."""

    def __init__(self, url: str, settings: Settings, name: str, failures: Sequence[Exception]) -> None:
        super().__init__(url, settings)
        self._name = name
        self._failures = list(failures)

    async def read(self, name: str, params: Params | None = None) -> list[Row]:
        if name == self._name and self._failures:
            raise self._failures.pop(0)
        return await super().read(name, params)


FAILURES = pytest.mark.parametrize(
    "failure", [ConnectionLost("lost"), Unavailable("busy"), sql_errors.InternalError_("broken")], ids=repr
)


@FAILURES
async def test_a_charge_that_has_begun_stays_begun_although_a_neighbours_refusal_cannot_be_read(
    service: PaymentService, database_url: str, settings: Settings, books: Books, failure: Exception
) -> None:
    await begin_charges(service.database, [charge_begin(2, "first")])
    rows = [charge_begin(1, "a"), charge_begin(2, "b")]
    database = Broken(database_url, settings, "charge_refused", [failure] * 20)
    await database.open()
    try:
        fresh, taken = await begin_charges(database, rows)
    finally:
        await database.close()
    assert isinstance(fresh, Begun)
    assert repr(taken) == repr(failure)
    assert await settle_charges(service.database, [charge_settlement(rows[0], fresh)]) == [True]
    assert await books.rows("SELECT order_id, status, attempt FROM payments ORDER BY 1") == [
        {"order_id": 1, "status": "COMPLETED", "attempt": 1},
        {"order_id": 2, "status": "PROCESSING", "attempt": 1},
    ]


async def test_rows_that_are_run_alone_after_a_failed_read_begin_no_neighbour_again(
    service: PaymentService, database_url: str, settings: Settings, books: Books
) -> None:
    await begin_charges(service.database, [charge_begin(2, "first"), charge_begin(3, "second")])
    database = Broken(database_url, settings, "charge_refused", [sql_errors.InternalError_("broken once")])
    await database.open()
    try:
        rows = [charge_begin(2, "b"), charge_begin(1, "a"), charge_begin(3, "c"), charge_begin(4, "d")]
        results = await begin_charges(database, rows)
    finally:
        await database.close()
    assert kinds(results) == ["Refused", "Begun", "Refused", "Begun"]
    for row, result in zip(rows, results, strict=True):
        order_id = result.row["payment_id"] if isinstance(result, Begun | Refused) else None
        found = await books.value("SELECT payment_id FROM payments WHERE order_id = %s", row.request.order_id)
        assert order_id == found
    assert await books.value("SELECT count(*) FROM transactions") == 4


@FAILURES
async def test_a_refund_that_has_begun_stays_begun_although_a_neighbours_refusal_cannot_be_read(
    service: PaymentService, database_url: str, settings: Settings, books: Books, failure: Exception
) -> None:
    first, second = await paid(service, 1, 2)
    database = Broken(database_url, settings, "refund_refused", [failure] * 20)
    await database.open()
    try:
        fresh, refused = await begin_refunds(
            database, [refund_begin(first, "40", "a"), refund_begin(second, "101", "b")]
        )
    finally:
        await database.close()
    assert isinstance(fresh, Begun)
    assert repr(refused) == repr(failure)
    assert await books.rows("SELECT payment_id, status FROM refunds") == [{"payment_id": first, "status": "PROCESSING"}]


# Recorded and answered in one commit


def pending(service: PaymentService, order_id: int) -> Any:
    """A creation, or a charge that awaits cash."""
    key = f"k {order_id}"
    if order_id % 2:
        return service.charges.create(request=create_request(order_id), idempotency_key=key)
    return service.charges.charge(request=charge_request(order_id, payment_method="COD"), idempotency_key=key)


async def test_nobody_ever_sees_a_pending_payment_whose_key_is_unfinished(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    seen: set[int] = set()
    finished = asyncio.Event()

    async def look() -> None:
        while not finished.is_set():
            unfinished = "SELECT count(*) AS payments, count(*) FILTER (WHERE k.response_body IS NULL) AS unfinished"
            [row] = await books.rows(f"{unfinished} FROM payments LEFT JOIN idempotency_keys k USING (payment_id)")
            assert row["unfinished"] == 0
            seen.add(row["payments"])

    looking = asyncio.create_task(look())
    try:
        answers = await asyncio.gather(*[pending(service, order_id) for order_id in range(1, 201)])
    finally:
        finished.set()
        await looking
    assert names(answers) == {"201": 200}
    assert len(seen) > 2  # it was looked at all along, between commits of many
    replays = await asyncio.gather(*[pending(service, order_id) for order_id in range(1, 201)])
    assert all(replay.replayed and replay.body == answer.body for replay, answer in zip(replays, answers, strict=True))
    await assert_books_are_true(books, gateway)


@pytest.mark.parametrize("order_id", [1, 2], ids=["create", "cash on delivery"])
async def test_a_pending_payment_whose_answer_cannot_be_stored_is_not_recorded(
    service: PaymentService, books: Books, order_id: int
) -> None:
    await break_updates(books, "idempotency_keys")
    with pytest.raises(psycopg.Error, match="broken by hand"):
        await pending(service, order_id)
    for table in ("payments", "transactions", "idempotency_keys"):
        assert await books.value(f"SELECT count(*) FROM {table}") == 0
    await books.rows("DROP TRIGGER broken ON idempotency_keys")
    answer: Answer = await pending(service, order_id)
    assert (answer.status_code, answer.replayed) == (201, False)


@pytest.mark.parametrize("order_id", [1, 2], ids=["create", "cash on delivery"])
async def test_a_pending_payment_whose_commit_was_not_heard_tells_what_was_recorded(
    far: PaymentService, door: Door, books: Books, order_id: int
) -> None:
    door.lose_answer_to("COMMIT")
    answer: Answer = await pending(far, order_id)
    assert (door.has_lost, answer.status_code) == (True, 201)
    assert answer.body == await books.value("SELECT response_body FROM idempotency_keys")
    assert await books.audit_trail(answer.payment_id) == [("PAYMENT", "PENDING")]
