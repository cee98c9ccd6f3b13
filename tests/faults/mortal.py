"""`eci-pay serve` that dies at a named point, as if the machine had lost its power there.

    FAULTS_DIE_AT="after charge_begin" FAULTS_DIE_ON=3 python -m tests.faults.mortal serve --port 8086

A point lies before or after a statement, a commit or a request to the gateway. The product knows nothing of them: its
functions are wrapped here, from outside.
"""

import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

STATEMENTS = {
    "charge": ("charge_begin", "charge_settle", "keys_mark_unknown"),
    "refund": ("refund_begin", "refund_settle", "keys_finish"),
    "recovery": ("recovery_find", "recovery_claim", "recovery_mark"),
    "late": ("recovery_late", "recovery_late_refund", "refund_reopen"),
    "relay": ("outbox_lease", "outbox_mark"),
    "other": ("status_change",),
}
"""The statements that change the books, by the phase that they belong to."""
ASKED = ("charge", "refund", "lookup", "rule_out")
"""What the gateway is asked."""
COMMITS = ("refund_settle", "status_change", "outbox_lease")
"""The transactions of more than one statement, by the one that tells them apart."""
POINTS = (
    *(f"{when} {name}" for names in STATEMENTS.values() for name in names for when in ("before", "after")),
    *(f"{when} gateway.{name}" for name in ASKED for when in ("before", "after")),
    *(f"{when} commit of {name}" for name in COMMITS for when in ("before", "after")),
    "before the answer",
    "after the answer",
)
"""Every point where the server can die."""

DIE_AT, DIE_ON, CLOCK_OFFSET = "FAULTS_DIE_AT", "FAULTS_DIE_ON", "FAULTS_CLOCK_OFFSET_SECONDS"


class Death:
    """Kills this process when the point is passed for the n-th time."""

    def __init__(self, point: str, on: int) -> None:
        self._point = point
        self._left = on

    def passes(self, point: str) -> None:
        """Tells that a point is passed."""
        if point == self._point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def wrap_statements(death: Death) -> None:
    """Every statement goes through `eci_pay.database.fetch`, by whatever name a module knows it."""
    from eci_pay import database

    fetch = database.fetch

    async def wrapped(connection: Any, name: str, params: Any = None) -> Any:
        death.passes(f"before {name}")
        rows = await fetch(connection, name, params)
        death.passes(f"after {name}")
        if name in COMMITS:
            connection.faults_transaction = name
        return rows

    for module in list(sys.modules.values()):
        if getattr(module, "fetch", None) is fetch:
            module.fetch = wrapped  # type: ignore[attr-defined]


def wrap_commits(death: Death) -> None:
    """A transaction commits at the end of psycopg's block."""
    from psycopg import AsyncConnection

    transaction = AsyncConnection.transaction

    @asynccontextmanager
    async def wrapped(self: Any, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        self.faults_transaction = None
        async with transaction(self, *arguments, **options) as block:
            yield block
            death.passes(f"before commit of {self.faults_transaction}")
        death.passes(f"after commit of {self.faults_transaction}")

    AsyncConnection.transaction = wrapped  # type: ignore[method-assign]


def wrap_gateway(death: Death) -> None:
    """Stripe's adapter is the one that is asked over a real connection."""
    from eci_pay.gateways.stripe import StripeGateway

    def wrapped(name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def call(*arguments: Any) -> Any:
            death.passes(f"before gateway.{name}")
            outcome = await method(*arguments)
            death.passes(f"after gateway.{name}")
            return outcome

        return call

    for name in ASKED:
        setattr(StripeGateway, name, wrapped(name, getattr(StripeGateway, name)))


def wrap_answers(death: Death) -> None:
    """The answer to a charge or refund: all is done, and only the caller does not know yet."""
    from starlette.background import BackgroundTask

    from server import payments

    answered = payments.answered

    async def is_sent() -> None:
        death.passes("after the answer")

    def wrapped(answer: Any) -> Any:
        death.passes("before the answer")
        response = answered(answer)
        response.background = BackgroundTask(is_sent)
        return response

    payments.answered = wrapped


def skew_clock(seconds: float) -> None:
    """Lets the replica's clock go wrong by so much."""
    from eci_pay import service

    def wrong_clock() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=seconds)

    options = service.payment_service.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    options["clock"] = wrong_clock


def main() -> None:
    """Runs `eci-pay` with the arguments of this program."""
    import server.app  # noqa: F401 - what is wrapped must have been imported
    from cli.main import main as eci_pay

    if point := os.environ.get(DIE_AT):
        assert point in POINTS, point
        death = Death(point, int(os.environ.get(DIE_ON, "1")))
        wrap_gateway(death)
        wrap_statements(death)
        wrap_commits(death)
        wrap_answers(death)
    if offset := float(os.environ.get(CLOCK_OFFSET, "0")):
        skew_clock(offset)
    eci_pay()


if __name__ == "__main__":
    main()
