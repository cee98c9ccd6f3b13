"""The tests' own tools: a clock to move, a gateway that remembers, books to look into, a command line to run."""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from eci_pay.answers import Answer
from eci_pay.gateways import Approved, GatewayCharge, GatewayRefund, NotFound, Outcome
from eci_pay.gateways.simulated import SimulatedGateway
from eci_pay.relay import Relay
from eci_pay.requests import ChargeRequest, CreateRequest, RefundRequest, parse_request
from eci_pay.service import PaymentService

COMMAND = Path(sys.executable).parent / "eci-pay"
COMMAND_TIMEOUT_SECONDS = 60
UNTIL_TIMEOUT_SECONDS = 15
LOCK_WAITS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

Session = psycopg.AsyncConnection[dict[str, Any]]
Sessions = Callable[[], Awaitable[Session]]
Opener = Callable[..., AbstractAsyncContextManager[PaymentService]]
Relays = Callable[..., AbstractAsyncContextManager[Relay]]

FAULTS_IN_BOOKS = """
WITH payment AS (
    SELECT * FROM payments WHERE order_id >= %s
),
trail AS (
    SELECT t.payment_id,
           (array_agg(t.status ORDER BY t.transaction_log_id DESC) FILTER (WHERE t.transaction_type = 'PAYMENT'))[1]
               AS status,
           count(*) FILTER (WHERE t.transaction_type = 'PAYMENT' AND t.status = 'COMPLETED') AS times_paid,
           sum(CASE WHEN t.transaction_type = 'REFUND' AND t.status = 'PROCESSING' THEN t.amount
                    WHEN t.transaction_type = 'REFUND' AND t.status = 'FAILED' THEN -t.amount ELSE 0 END) AS refunded,
           sum(CASE WHEN t.transaction_type = 'PAYMENT' THEN 0
                    WHEN t.status = 'PROCESSING' THEN t.amount ELSE -t.amount END) AS pending
    FROM transactions t JOIN payment USING (payment_id)
    GROUP BY t.payment_id
),
given AS (
    SELECT payment_id,
           coalesce(sum(f.amount) FILTER (WHERE f.status <> 'FAILED'), 0) AS refunded,
           coalesce(sum(f.amount) FILTER (WHERE f.status = 'PROCESSING'), 0) AS pending
    FROM payment LEFT JOIN refunds f USING (payment_id)
    GROUP BY payment_id
)
SELECT p.order_id, p.status, p.refunded_amount, p.refund_pending, fault
FROM payment p
LEFT JOIN trail t USING (payment_id)
JOIN given g USING (payment_id)
CROSS JOIN LATERAL (VALUES
    ('the audit trail tells another status', p.status IS DISTINCT FROM t.status),
    ('the order was paid more than once', t.times_paid > 1),
    ('the audit trail tells other refunds', (p.refunded_amount, p.refund_pending) <> (t.refunded, t.pending)),
    ('the refunds sum up to something else', (p.refunded_amount, p.refund_pending) <> (g.refunded, g.pending)),
    ('more is refunded than was paid', g.refunded > p.amount),
    ('REFUNDED does not mean refunded in full',
        (p.status = 'REFUNDED') <> (p.refunded_amount = p.amount AND p.refund_pending = 0)),
    ('a key is left unfinished', EXISTS (
        SELECT FROM idempotency_keys k LEFT JOIN refunds f USING (refund_id)
        WHERE k.payment_id = p.payment_id AND k.response_body IS NULL
          AND coalesce(f.status, p.status) <> 'PROCESSING'
    ))
) AS v (fault, found)
WHERE found
UNION ALL
SELECT NULL, NULL, NULL, NULL, 'key ' || idempotency_key || ' has no payment'
FROM idempotency_keys WHERE payment_id IS NULL
"""
"""Whatever contradicts the invariants, for orders from a number on; no row where the books are true."""


class ManualClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> None:
        """Moves on by a timedelta's arguments."""
        self.now += timedelta(**duration)


class RecordingGateway(SimulatedGateway):
    """The simulated gateway, remembering every operation it was sent."""

    def __init__(self, *, slow_seconds: float = 0.05) -> None:
        super().__init__(latency_seconds=0, slow_seconds=slow_seconds)
        self.charges: list[GatewayCharge] = []
        self.refunds: list[GatewayRefund] = []

    async def charge(self, charge: GatewayCharge) -> Outcome:
        self.charges.append(charge)
        return await super().charge(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        self.refunds.append(refund)
        return await super().refund(refund)

    async def lookup(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        return await super().lookup(operation)


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


@dataclass(frozen=True)
class Books:
    """The database, as somebody with psql sees it."""

    connection: psycopg.AsyncConnection[dict[str, Any]]

    async def rows(self, query: str, *params: Any) -> list[dict[str, Any]]:
        """The rows of a query."""
        cursor = await self.connection.execute(query.encode(), params)
        return await cursor.fetchall() if cursor.description else []

    async def value(self, query: str, *params: Any) -> Any:
        """The only value of a query."""
        (row,) = await self.rows(query, *params)
        (value,) = row.values()
        return value

    async def audit_trail(self, payment_id: int) -> list[tuple[str, str]]:
        """The types and statuses of a payment's audit rows, oldest first."""
        rows = await self.rows(
            "SELECT transaction_type, status FROM transactions WHERE payment_id = %s ORDER BY transaction_log_id",
            payment_id,
        )
        return [(row["transaction_type"], row["status"]) for row in rows]


async def assert_books_are_true(books: Books, gateway: RecordingGateway, *, order_id_min: int = 1) -> None:
    """The invariants hold, and the gateway was asked nothing twice and has moved exactly what is booked.

    `gateway` must have been asked for these orders alone, and for nothing that it did without telling.
    """
    assert await books.rows(FAULTS_IN_BOOKS, order_id_min) == []
    operations: list[GatewayCharge | GatewayRefund] = [*gateway.charges, *gateway.refunds]
    assert [key for key, times in Counter(sent.key for sent in operations).items() if times > 1] == []
    moved = [sent.key for sent in operations if isinstance(await gateway.lookup(sent), Approved)]
    booked = await books.rows(
        "SELECT transaction_id || '-' || attempt AS key FROM payments WHERE captured_at IS NOT NULL AND order_id >= %s"
        " UNION ALL SELECT transaction_id || '-R' || refund_id FROM refunds f JOIN payments USING (payment_id)"
        " WHERE f.status = 'COMPLETED' AND captured_at IS NOT NULL AND order_id >= %s",
        order_id_min,
        order_id_min,
    )
    assert sorted(moved) == sorted(row["key"] for row in booked)


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Waits for what other processes do, or what the database alone can tell: there is no event for it."""
    async with asyncio.timeout(UNTIL_TIMEOUT_SECONDS):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_lock_waits(books: Books, number: int = 1) -> None:
    """Waits until so many sessions wait for a lock."""

    async def reached() -> bool:
        return bool(await books.value(LOCK_WAITS) == number)

    await until(reached)


def names(results: Iterable[Any]) -> Counter[str]:
    """How often each status code or kind of error occurs."""
    return Counter(
        str(result.status_code) if isinstance(result, Answer | httpx.Response) else type(result).__name__
        for result in results
    )


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.stdout)


@dataclass(frozen=True)
class CommandLine:
    """Runs `eci-pay` as a process of its own, without a terminal."""

    environment: Mapping[str, str]
    directory: Path
    command: tuple[str | Path, ...] = (COMMAND,)
    inherited: tuple[str, ...] = field(default=("PATH", "HOME", "LANG", "SYSTEMROOT", "XDG_RUNTIME_DIR"))

    def full_environment(self) -> dict[str, str]:
        """The environment of the process: little of ours, and what the test gives."""
        kept = {name: os.environ[name] for name in self.inherited if name in os.environ}
        return {**kept, **self.environment}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Starts a command and leaves it running."""
        return await asyncio.create_subprocess_exec(
            *self.command,
            *arguments,
            cwd=self.directory,
            env=self.full_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, stdin: str = "") -> CommandResult:
        """Runs a command to its end."""
        process = await self.start(*arguments)
        async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
            stdout, stderr = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return CommandResult(process.returncode, stdout.decode(), stderr.decode())


def charge_request(order_id: int = 1, **fields: object) -> ChargeRequest:
    """A valid charge, with fields to differ in."""
    return parse_request(ChargeRequest, charge_fields(order_id, **fields))


def create_request(order_id: int = 1, **fields: object) -> CreateRequest:
    """A valid legacy creation, with fields to differ in."""
    return parse_request(CreateRequest, charge_fields(order_id, **fields))


def refund_request(amount: str | None = None, reason: str = "Customer changed their mind") -> RefundRequest:
    """A valid refund."""
    fields = {"reason": reason} if amount is None else {"reason": reason, "amount": amount}
    return parse_request(RefundRequest, fields)


def charge_fields(order_id: int = 1, **fields: object) -> dict[str, object]:
    """The body of a valid charge, with fields to differ in."""
    return {
        "order_id": order_id,
        "user_id": 7,
        "amount": "100.00",
        "payment_method": "CREDIT_CARD",
        **fields,
    }


async def clone_database(server_url: str, template: str, name: str) -> str:
    """Copies a template database; returns the URL of the copy."""
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
        await connection.execute(statement)
    return make_conninfo(server_url, dbname=name)
