"""The tests' own tools: a clock to move, a gateway that remembers, books to look into, a command line to run."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from eci_pay.gateways import GatewayCharge, GatewayRefund, NotFound, Outcome
from eci_pay.gateways.simulated import SimulatedGateway
from eci_pay.requests import ChargeRequest, CreateRequest, RefundRequest, parse_request

COMMAND = Path(sys.executable).parent / "eci-pay"
COMMAND_TIMEOUT_SECONDS = 60


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
    inherited: tuple[str, ...] = field(default=("PATH", "HOME", "LANG", "SYSTEMROOT", "XDG_RUNTIME_DIR"))

    def full_environment(self) -> dict[str, str]:
        """The environment of the process: little of ours, and what the test gives."""
        kept = {name: os.environ[name] for name in self.inherited if name in os.environ}
        return {**kept, **self.environment}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Starts a command and leaves it running."""
        return await asyncio.create_subprocess_exec(
            COMMAND,
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
