"""Begin and settle, many rows at once, under all that a database can do to them."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import errors as sql_errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from eci_pay import answers
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, Begun, Refused
from eci_pay.charge_records import ChargeBegin, ChargeSettlement, begin_charges, settle_charges
from eci_pay.database import arrays, fetch
from eci_pay.errors import OrderInProgress, Unavailable
from eci_pay.gateways import Approved, Declined, GatewayCharge, GatewayRefund, GatewayUnavailable, Outcome
from eci_pay.idempotency import KEY_LIFETIME, Claim
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.money import whole_amount_currencies
from eci_pay.refund_records import RefundBegin, RefundSettlement, begin_refunds, settle_refunds
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from eci_pay.views import PaymentView
from tests.support import Books, ManualClock, RecordingGateway, charge_request, create_request, refund_request
from tests.test_races import assert_books_are_true, names

NOW = ManualClock().now
READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"
ARRAYS_OF_CURRENCIES = {"whole_amount_currencies": list(whole_amount_currencies())}
LOCK_WAITS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def charge_begin(order_id: int, key: str | None = None, **fields: object) -> ChargeBegin:
    """A charge to begin, under a key of its own where none is given."""
    request = charge_request(order_id, **fields)
    return ChargeBegin.of(
        request,
        Claim.of(key or f"charge {order_id}", "", "charge", request),
        status=PaymentStatus.PROCESSING,
        description="Charge begun",
        takes_over=True,
        at=NOW,
    )


def charge_settlement(
    begin: ChargeBegin, result: BeginResult, status: PaymentStatus = PaymentStatus.COMPLETED
) -> ChargeSettlement:
    """What the gateway said of a charge that has begun."""
    assert isinstance(result, Begun)
    row = result.row
    return ChargeSettlement(
        order_id=begin.request.order_id,
        payment_id=row["payment_id"],
        attempt=row["attempt"],
        status=status,
        authorization_code=f"AUTH{begin.request.order_id}",
        gateway_response="told",
        at=NOW,
        transaction_log_id=row["settle_log_id"],
        description="told",
        key_id=row["key_id"],
        answer=Answer(status_code=201, body=f"the answer of {begin.request.order_id}", payment_id=row["payment_id"]),
    )


def refund_begin(payment_id: int, amount: str | None, key: str | None = None) -> RefundBegin:
    """A refund to begin."""
    request = refund_request(amount)
    return RefundBegin.of(payment_id, request, Claim.of(key, "", f"refund {payment_id}", request), NOW)


def refund_settlement(result: BeginResult, status: RefundStatus = RefundStatus.COMPLETED) -> RefundSettlement:
    """What the gateway said of a refund that has begun."""
    assert isinstance(result, Begun)
    row = result.row
    return RefundSettlement(
        order_id=row["order_id"],
        payment_id=row["payment_id"],
        refund_id=row["refund_id"],
        status=status,
        gateway_reference=None,
        gateway_response="told",
        description="told",
        at=NOW,
        key_id=row["key_id"],
        answer=answers.ok,
    )


def kinds(results: Sequence[object]) -> list[str]:
    """What each row came to, in short."""
    return [type(result).__name__ for result in results]


async def paid(service: PaymentService, *order_ids: int, amount: str = "100.00") -> list[int]:
    """The payments of orders that were charged."""
    requests = [charge_request(order_id, amount=amount, payment_method="UPI") for order_id in order_ids]
    done = [await service.charges.charge(request=r, idempotency_key=f"pay {r.order_id}") for r in requests]
    assert names(done) == {"201": len(order_ids)}
    return [answer.payment_id for answer in done]


async def keys(books: Books) -> list[str]:
    """The idempotency keys that are in use."""
    rows = await books.rows("SELECT idempotency_key FROM idempotency_keys ORDER BY 1")
    return [row["idempotency_key"] for row in rows]


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Waits for what the database alone can tell."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - PostgreSQL has no event for it
            await asyncio.sleep(0.005)


async def until_lock_waits(books: Books, number: int = 1) -> None:
    """Waits until so many sessions wait for a lock."""

    async def reached() -> bool:
        return bool(await books.value(LOCK_WAITS) == number)

    await until(reached)


Session = psycopg.AsyncConnection[dict[str, Any]]
Sessions = Callable[[], Awaitable[Session]]


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[Sessions]:
    """Makes further sessions, each in a transaction from its first statement on."""
    opened: list[Session] = []

    async def connect() -> Session:
        connection = await psycopg.AsyncConnection.connect(database_url, row_factory=dict_row)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        await connection.close()


class Door:
    """A proxy in front of PostgreSQL that can lose answers, cut connections, and stay shut."""

    def __init__(self, database_url: str) -> None:
        self._target = conninfo_to_dict(database_url)
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loses_answer_to = b""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        """Serves; yields the URL of the database behind it."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        port = self._server.sockets[0].getsockname()[1]
        place = {"host": "127.0.0.1", "port": port, "sslmode": "disable", "gssencmode": "disable"}
        yield make_conninfo("", **{**self._target, **place})
        self.shut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose_answer_to(self, part: str) -> None:
        """Cuts off the next client whose statement has this part, once PostgreSQL has done it."""
        self._loses_answer_to = part.encode()

    @property
    def has_lost(self) -> bool:
        """Whether that has happened."""
        return not self._loses_answer_to

    def shut(self) -> None:
        """Lets nobody in any more, and cuts everybody off."""
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Cuts every connection off; what PostgreSQL was sent, it still does."""
        for client in self._clients:
            client.transport.abort()
        self._clients.clear()

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        host, port = str(self._target.get("host") or "localhost"), self._target.get("port") or 5432
        if host.startswith("/"):
            from_server, to_server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            from_server, to_server = await asyncio.open_connection(host, int(port))
        self._clients.add(to_client)
        losing = asyncio.Event()
        for work in (self._ask(from_client, to_server, losing), self._answer(from_server, to_client, losing)):
            task = asyncio.create_task(work)
            self._tasks.add(task)

    async def _ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        """Passes on what the client asks. The server's side stays open until the end: it notices nothing."""
        said = b""
        while chunk := await _read(client):
            said = said[-1000:] + chunk
            if self._loses_answer_to and self._loses_answer_to in said:
                self._loses_answer_to = b""
                losing.set()
            server.write(chunk)

    async def _answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        """Passes on what the server answers; what is to be lost, it waits for, and then cuts the client off."""
        heard = b""
        while chunk := await _read(server):
            if not losing.is_set():
                client.write(chunk)
                continue
            heard = heard[-len(READY_FOR_QUERY) :] + chunk
            if heard.endswith(READY_FOR_QUERY):
                client.transport.abort()


async def _read(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.read(65536)
    except OSError:
        return b""


@pytest.fixture
def door(database_url: str) -> Door:
    """The proxy between `far` and the database."""
    return Door(database_url)


Opener = Callable[..., AbstractAsyncContextManager[PaymentService]]


@pytest.fixture
def opened(settings: Settings, database_url: str, gateway: RecordingGateway, clock: ManualClock) -> Opener:
    """Opens a service with another gateway, URL or settings."""

    def open_service(
        *, url: str = database_url, gateway: RecordingGateway = gateway, **changed: object
    ) -> AbstractAsyncContextManager[PaymentService]:
        return payment_service(settings.model_copy(update=changed), url, gateway=gateway, clock=clock)

    return open_service


@pytest.fixture
async def far(door: Door, opened: Opener) -> AsyncIterator[PaymentService]:
    """The use cases over a connection that the test can break."""
    async with (
        door.opened() as url,
        opened(url=url, eci_pay_settle_retry_seconds=0.5, eci_pay_database_pool_timeout_seconds=0.5) as service,
    ):
        yield service


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


# Locks, and what is seen once they are given


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
                refund_settlement(Begun({"order_id": n, "payment_id": p, "refund_id": r, "key_id": None}))
                for n, p, r in zip(
                    (3, 2, 1),
                    payment_ids,
                    [result.row["refund_id"] for result in reserved if isinstance(result, Begun)] or (1, 2, 3),
                    strict=True,
                )
            ],
        }
        columns = arrays([row.columns() for row in rows[statement]])
        return {**columns, "takes_over": True, **ARRAYS_OF_CURRENCIES}

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
    await fetch(session, "charge_begin", {**arrays([raced.columns()]), "takes_over": True})
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
    await fetch(session, "charge_begin", {**arrays([charge_begin(9, "k").columns()]), "takes_over": True})
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
    assert kinds(results) == ["Begun", "CheckViolation", "Unavailable", "Begun"]
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
    assert kinds(results) == ["Begun", "Unavailable", "Begun"]


# Lost connections


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


class Scripted(RecordingGateway):
    """Does something before it answers, and may answer otherwise."""

    def __init__(self, script: Callable[[], Outcome | None]) -> None:
        super().__init__()
        self._script = script

    async def charge(self, charge: GatewayCharge) -> Outcome:
        outcome = await super().charge(charge)
        return self._script() or outcome

    async def refund(self, refund: GatewayRefund) -> Outcome:
        outcome = await super().refund(refund)
        return self._script() or outcome


async def test_what_cannot_be_booked_because_the_database_stays_away_is_unknown_and_no_error(
    door: Door, opened: Opener, service: PaymentService, books: Books
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
    assert await books.value("SELECT status FROM payments WHERE order_id = 1") == "PROCESSING"
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = 2") == 100
    with pytest.raises(OrderInProgress):
        await service.charges.charge(request=charge_request(1), idempotency_key="another")


# Between begin and settle


async def test_a_charge_runs_to_its_end_although_its_waiter_is_cancelled(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    request = charge_request(1, amount="4000.10")
    waiter = asyncio.create_task(service.charges.charge(request=request, idempotency_key="k"))

    async def asked() -> bool:
        return bool(gateway.charges)

    await until(asked)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter

    async def completed() -> bool:
        return bool(await books.value("SELECT status FROM payments") == "COMPLETED")

    await until(completed)
    replay = await service.charges.charge(request=request, idempotency_key="k")
    assert (replay.status_code, replay.replayed, len(gateway.charges)) == (201, True, 1)


class RunningClock(ManualClock):
    """Jumps on whenever it is looked at, once it runs."""

    step = timedelta(0)

    def __call__(self) -> Any:
        self.now += self.step
        return self.now


async def test_what_comes_too_late_is_not_sent_and_its_key_is_free(
    settings: Settings, database_url: str, gateway: RecordingGateway, books: Books
) -> None:
    clock = RunningClock()
    async with payment_service(settings, database_url, gateway=gateway, clock=clock) as service:
        [payment_id] = await paid(service, 1)
        gateway.charges.clear()
        clock.step = timedelta(seconds=settings.eci_pay_send_deadline_seconds, microseconds=1)
        with pytest.raises(Unavailable):
            await service.charges.charge(request=charge_request(2), idempotency_key="k")
        with pytest.raises(Unavailable):
            await service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
        assert (gateway.charges, gateway.refunds) == ([], [])
        assert await books.value("SELECT status FROM payments WHERE order_id = 2") == "FAILED"
        assert await books.value("SELECT refunded_amount FROM payments WHERE order_id = 1") == 0
        clock.step = timedelta(0)
        answer = await service.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert (answer.status_code, refund.status_code, answer.replayed or refund.replayed) == (201, 200, False)
    assert [charge.key[-2:] for charge in gateway.charges] == ["-2"]


async def test_an_unreachable_gateway_fails_the_attempt_and_the_same_key_starts_the_next(
    opened: Opener, books: Books
) -> None:
    reachable = False

    def script() -> Outcome | None:
        if not reachable:
            raise GatewayUnavailable("refused")
        return None

    gateway = Scripted(script)
    async with opened(gateway=gateway) as service:
        with pytest.raises(Unavailable):
            await service.charges.charge(request=charge_request(1), idempotency_key="k")
        assert await books.value("SELECT status FROM payments") == "FAILED"
        reachable = True
        answer = await service.charges.charge(request=charge_request(1), idempotency_key="k")
        assert (answer.status_code, PaymentView.model_validate_json(answer.body).attempt) == (201, 2)
        reachable = False
        refund = partial(
            service.refunds.refund, payment_id=answer.payment_id, request=refund_request("40"), idempotency_key="r"
        )
        with pytest.raises(Unavailable):
            await refund()
        assert await books.value("SELECT refunded_amount FROM payments") == 0
        reachable = True
        assert (await refund()).status_code == 200
    assert await books.value("SELECT refunded_amount FROM payments") == 40
    assert (await books.rows("SELECT idempotency_key, status_code FROM idempotency_keys ORDER BY 1")) == [
        {"idempotency_key": "k", "status_code": 201},
        {"idempotency_key": "r", "status_code": 200},
    ]


async def test_an_adapter_that_breaks_leaves_the_outcome_unknown(
    opened: Opener, service: PaymentService, books: Books
) -> None:
    def broken() -> Outcome | None:
        raise KeyError("amount")

    [payment_id] = await paid(service, 1)
    async with opened(gateway=Scripted(broken)) as unlucky:
        charge = await unlucky.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await unlucky.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert charge.is_unknown
    assert refund.is_unknown
    assert await books.value("SELECT status FROM payments WHERE order_id = 2") == "PROCESSING"
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = 1") == 100
    assert (await service.charges.charge(request=charge_request(2), idempotency_key="k")).is_unknown


LONG = "\0\ud800é" * 1000


@pytest.mark.parametrize(
    ("outcome", "status_codes"),
    [(Approved(reference=LONG, message=LONG), [201, 200]), (Declined(code=LONG, message=LONG), [402])],
)
async def test_texts_of_the_gateway_are_cut_and_booked_however_long_and_strange(
    opened: Opener, books: Books, outcome: Outcome, status_codes: list[int]
) -> None:
    async with opened(gateway=Scripted(lambda: outcome)) as service:
        answer = await service.charges.charge(request=charge_request(1), idempotency_key="k")
        told = [answer.status_code]
        if not answer.is_declined:
            refund = await service.refunds.refund(payment_id=answer.payment_id, request=refund_request())
            told.append(refund.status_code)
    assert told == status_codes
    assert await books.value("SELECT length(gateway_response) FROM payments") >= 400
    assert (await books.value("SELECT status FROM payments")) in ("REFUNDED", "FAILED")


# The database's own limits


async def test_a_lock_is_waited_for_only_so_long(
    opened: Opener, sessions: Sessions, service: PaymentService, gateway: RecordingGateway
) -> None:
    created = await service.charges.create(request=create_request(1))
    session = await sessions()
    await session.execute("SELECT FROM payments FOR UPDATE")
    async with asyncio.timeout(5), opened(eci_pay_lock_timeout_seconds=0.2) as impatient:
        with pytest.raises(Unavailable):
            await impatient.charges.charge(request=charge_request(1), idempotency_key="k")
        with pytest.raises(Unavailable):
            await impatient.status_changes.cancel(payment_id=created.payment_id)
    assert gateway.charges == []


async def test_a_statement_is_prepared_once_whatever_the_size_of_its_integers(opened: Opener, books: Books) -> None:
    async with opened(eci_pay_database_pool_size=1) as service:
        for restart in (1, 40_000, 2**40):
            await books.rows(f"ALTER TABLE payments ALTER payment_id RESTART WITH {restart}")
            await books.rows(f"ALTER TABLE refunds ALTER refund_id RESTART WITH {restart}")
            await books.rows(f"ALTER TABLE idempotency_keys ALTER id RESTART WITH {restart}")
            for number in range(6):  # psycopg prepares what it has run five times
                order_id = restart + number
                [payment_id] = await paid(service, order_id)
                declined = charge_request(order_id + 200, amount="4000.02")
                await service.charges.charge(request=declined, idempotency_key=f"declined {order_id}")
                await service.refunds.refund(
                    payment_id=payment_id, request=refund_request("1"), idempotency_key=f"refund {order_id}"
                )
                await service.payments.by_order(order_id)
                created = await service.charges.create(request=create_request(order_id + 100))
                await service.status_changes.cancel(payment_id=created.payment_id)
        prepared = await service.database.read_text(
            "SELECT DISTINCT statement, parameter_types::text FROM pg_prepared_statements", {}
        )
    texts = [row["statement"] for row in prepared]
    assert any("INSERT INTO refunds" in text for text in texts)
    assert [text[:60] for text in set(texts) if texts.count(text) > 1] == []
