"""Any history of requests, against a small model: what is told, what is booked and what the gateway did agree."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from psycopg.rows import dict_row

from eci_pay import errors
from eci_pay.answers import Answer
from eci_pay.errors import PayError
from eci_pay.idempotency import KEY_LIFETIME
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
    charge_request,
    create_request,
    refund_request,
)

ORDERS = range(3)
DECLINED, UNKNOWN = Decimal("4000.02"), Decimal("4000.11")

order_numbers = st.sampled_from(ORDERS)
amounts = st.sampled_from(["100.00", "9000.00", "9000.00", "4000.02", "4000.02", "4000.11"])
methods = st.sampled_from(["CREDIT_CARD", "CREDIT_CARD", "UPI", "COD"])
parts = st.sampled_from(["0.01", "50.00", "100.00", "4000.02", "4000.11", "4999.98", "9000.00", None, None])
used_keys = st.sampled_from([None, None, None, 0, 1, 2])
"""The number of a key that was used before; None makes up a new one."""


@dataclass
class World:
    """What lasts from one history to the next: one database, one service, one event loop."""

    runner: asyncio.Runner
    service: PaymentService
    books: Books
    gateway: RecordingGateway
    clock: ManualClock
    histories: Iterator[int] = field(default_factory=lambda: itertools.count(1))


@dataclass(frozen=True)
class Operation:
    """What a client asks for; equal for requests that ask for the same."""

    kind: Literal["charge", "create", "refund"]
    order: int
    amount: str | None
    method: str = ""


@dataclass(frozen=True)
class UsedKey:
    """A key, as a client remembers it. Without an answer, the outcome is unknown."""

    operation: Operation
    expires_at: datetime
    answer: Answer | None

    def is_live(self, now: datetime) -> bool:
        """Whether it still stands for what it was first used for."""
        return self.answer is None or self.expires_at > now


@dataclass
class Payment:
    """What the books should say."""

    payment_id: int
    status: str
    amount: Decimal
    method: str
    attempt: int
    is_captured: bool = False
    refunded: Decimal = Decimal(0)
    pending: Decimal = Decimal(0)


class Histories(RuleBasedStateMachine):
    """Each run is one history over a few orders of its own."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.history = next(world.histories)
        self.payments: dict[int, Payment] = {}
        self.keys: dict[str, UsedKey] = {}
        self.key_numbers = itertools.count()
        world.gateway.charges.clear()
        world.gateway.refunds.clear()

    # What clients do

    @rule(order=order_numbers, amount=amounts, method=methods, used_key=used_keys, twice=st.booleans())
    def charge(self, order: int, amount: str, method: str, used_key: int | None, twice: bool) -> None:
        self.submit(Operation("charge", order, amount, method), self.key(used_key), twice=twice)

    @precondition(lambda self: any(self.payments.get(order) is None for order in ORDERS))
    @rule(order=order_numbers, amount=amounts, used_key=used_keys, has_key=st.booleans())
    def create(self, order: int, amount: str, used_key: int | None, has_key: bool) -> None:
        self.submit(Operation("create", order, amount, "UPI"), self.key(used_key) if has_key else None)

    @precondition(lambda self: self.payments)
    @rule(order=order_numbers, amount=parts, used_key=used_keys, has_key=st.booleans())
    def refund(self, order: int, amount: str | None, used_key: int | None, has_key: bool) -> None:
        if order not in self.payments:
            order = next(iter(self.payments))
        self.submit(Operation("refund", order, amount), self.key(used_key) if has_key else None)

    @precondition(lambda self: "COMPLETED" in self.statuses())
    @rule(amount=parts)
    def refund_what_was_paid(self, amount: str | None) -> None:
        order = list(self.payments)[self.statuses().index("COMPLETED")]
        self.submit(Operation("refund", order, amount), self.key(None))

    @rule(order=order_numbers)
    def pay(self, order: int) -> None:
        self.submit(Operation("charge", order, "9000.00", "UPI"), self.key(None))

    @precondition(lambda self: self.keys)
    @rule(number=st.integers(0, 30), twice=st.booleans())
    def repeat(self, number: int, twice: bool) -> None:
        key = list(self.keys)[number % len(self.keys)]
        self.submit(self.keys[key].operation, key, twice=twice)

    @precondition(lambda self: self.payments)
    @rule(order=order_numbers, status=st.sampled_from(PaymentStatus))
    def update(self, order: int, status: PaymentStatus) -> None:
        if order in self.payments:
            request = StatusUpdateRequest(status=status)
            payment_id = self.payments[order].payment_id
            self.change(order, status, self.world.service.status_changes.update(payment_id=payment_id, request=request))

    @precondition(lambda self: self.payments)
    @rule(order=order_numbers)
    def cancel(self, order: int) -> None:
        if order in self.payments:
            payment_id = self.payments[order].payment_id
            work = self.world.service.status_changes.cancel(payment_id=payment_id)
            self.change(order, PaymentStatus.CANCELLED, work)

    @rule(hours=st.sampled_from([0.01, 12, 24]))
    def wait(self, hours: float) -> None:
        self.world.clock.advance(hours=hours)

    @rule()
    def expire_keys(self) -> None:
        self.run(self.world.service.keys.delete())
        now = self.world.clock()
        self.keys = {key: used for key, used in self.keys.items() if used.is_live(now)}

    # What should come of it

    def submit(self, operation: Operation, key: str | None, *, twice: bool = False) -> None:
        """Sends it once, or twice at once, and compares every answer with what the model expects."""
        used = self.keys.get(key) if key else None
        if used and used.is_live(self.world.clock()):
            for result in self.send(operation, key, twice=twice):
                self.expect_replay(used, operation, result)
            return
        expected = self.conflict(operation) or self.apply(operation)
        results = self.send(operation, key, twice=twice)
        if isinstance(expected, type):
            assert {type(result) for result in results} == {expected}
            return
        in_time = [result for result in results if not isinstance(result, errors.IdempotencyKeyInFlight)]
        assert {result.status_code for result in in_time} == {expected}
        if expected != 202:
            assert len({result.body for result in in_time}) == 1
        self.payments[operation.order].payment_id = in_time[0].payment_id
        if key:
            answer = None if expected == 202 else in_time[0]
            self.keys[key] = UsedKey(operation, self.world.clock() + KEY_LIFETIME, answer)
        if expected in (200, 201):
            view = PaymentView.model_validate_json(in_time[0].body)
            assert view == self.run(self.world.service.payments.by_id(view.payment_id))

    def expect_replay(self, used: UsedKey, operation: Operation, result: Any) -> None:
        if operation != used.operation:
            assert isinstance(result, errors.IdempotencyKeyReused)
        elif used.answer is None:
            assert result.is_unknown
        else:
            assert result == replace(used.answer, replayed=True)

    def conflict(self, operation: Operation) -> type[PayError] | None:
        """The error that the state of the order should raise."""
        payment = self.payments.get(operation.order)
        if operation.kind == "refund":
            assert payment is not None
            left = payment.amount - payment.refunded
            if payment.status != "COMPLETED":
                return errors.InvalidState
            return errors.RefundExceedsBalance if left <= 0 or Decimal(operation.amount or 0) > left else None
        if payment is None:
            return None
        if operation.kind == "create":
            return errors.OrderExists
        if (payment.status, payment.method, operation.method) == ("PENDING", "COD", "COD"):
            return errors.OrderInProgress
        return CHARGE_CONFLICTS[payment.status]

    def apply(self, operation: Operation) -> int:
        """Changes the model; returns the status code that should be answered."""
        if operation.kind == "refund":
            return self.apply_refund(self.payments[operation.order], operation.amount)
        before = self.payments.get(operation.order)
        amount = Decimal(operation.amount or 0)
        payment = Payment(0, "PENDING", amount, operation.method, before.attempt + 1 if before else 1)
        self.payments[operation.order] = payment
        if operation.kind == "create" or operation.method == "COD":
            return 201
        if operation.method == "CREDIT_CARD" and amount in (DECLINED, UNKNOWN):
            payment.status = "FAILED" if amount == DECLINED else "PROCESSING"
            return 402 if amount == DECLINED else 202
        payment.status, payment.is_captured = "COMPLETED", True
        return 201

    def apply_refund(self, payment: Payment, asked: str | None) -> int:
        amount = payment.amount - payment.refunded if asked is None else Decimal(asked)
        if payment.is_captured and amount == DECLINED:
            return 402
        payment.refunded += amount
        if payment.is_captured and amount == UNKNOWN:
            payment.pending += amount
            return 202
        if payment.refunded == payment.amount and payment.pending == 0:
            payment.status = "REFUNDED"
        return 200

    def change(self, order: int, status: PaymentStatus, work: Any) -> None:
        """A change by hand is made where the state machine has it, and refused everywhere else."""
        payment = self.payments[order]
        if (payment.status, status.value) in BY_HAND:
            assert self.run(work).status is status
            payment.status = status.value
        else:
            with pytest.raises(errors.InvalidState):
                self.run(work)

    # What holds after each step

    @invariant()
    def the_books_say_what_the_model_says(self) -> None:
        rows = self.run(
            self.world.books.rows(
                "SELECT * FROM payments WHERE order_id BETWEEN %s AND %s", self.order_id(0), self.order_id(ORDERS[-1])
            )
        )
        assert {
            row["order_id"]: Payment(
                row["payment_id"],
                row["status"],
                row["amount"],
                row["payment_method"],
                row["attempt"],
                row["captured_at"] is not None,
                row["refunded_amount"],
                row["refund_pending"],
            )
            for row in rows
        } == {self.order_id(order): payment for order, payment in self.payments.items()}

    @invariant()
    def the_keys_hold_what_was_told(self) -> None:
        rows = self.run(
            self.world.books.rows(
                "SELECT * FROM idempotency_keys WHERE starts_with(idempotency_key, %s)", f"{self.history}:"
            )
        )
        assert {row["idempotency_key"]: (row["status_code"], row["response_body"]) for row in rows} == {
            key: (used.answer.status_code, used.answer.body) if used.answer else (202, None)
            for key, used in self.keys.items()
        }

    @invariant()
    def the_books_are_true(self) -> None:
        world = self.world
        self.run(assert_books_are_true(world.books, world.gateway, order_id_min=self.order_id(0)))

    # How it is done

    def statuses(self) -> list[str]:
        return [payment.status for payment in self.payments.values()]

    def key(self, used_key: int | None) -> str:
        if used_key is not None and len(self.keys) > used_key:
            return list(self.keys)[used_key]
        return f"{self.history}:{next(self.key_numbers)}"

    def order_id(self, order: int) -> int:
        return self.history * 10 + order

    def run(self, work: Any) -> Any:
        return self.world.runner.run(work)

    def send(self, operation: Operation, key: str | None, *, twice: bool) -> list[Any]:
        """The answers or errors of one request, or of two at once."""

        async def once() -> Answer:
            service, order_id = self.world.service, self.order_id(operation.order)
            if operation.kind == "refund":
                payment_id = self.payments[operation.order].payment_id
                request = refund_request(operation.amount)
                return await service.refunds.refund(payment_id=payment_id, request=request, idempotency_key=key)
            fields = {"amount": operation.amount, "payment_method": operation.method}
            if operation.kind == "create":
                return await service.charges.create(request=create_request(order_id, **fields), idempotency_key=key)
            assert key is not None
            return await service.charges.charge(request=charge_request(order_id, **fields), idempotency_key=key)

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(once() for _ in range(1 + twice)), return_exceptions=True)

        results: list[Any] = self.run(all_at_once())
        assert all(isinstance(result, Answer | PayError) for result in results), results
        return results


CHARGE_CONFLICTS: dict[str, type[PayError] | None] = {
    "PENDING": None,
    "FAILED": None,
    "PROCESSING": errors.OrderInProgress,
    "COMPLETED": errors.OrderAlreadyPaid,
    "REFUNDED": errors.OrderAlreadyPaid,
    "CANCELLED": errors.InvalidState,
}
"""Why an order in this status cannot be charged; None where a charge takes it over."""

BY_HAND = {
    ("PENDING", "COMPLETED"),
    ("PENDING", "FAILED"),
    ("PENDING", "CANCELLED"),
    ("FAILED", "CANCELLED"),
}


@pytest.fixture
def world(settings: Settings, database_url: str, gateway: RecordingGateway) -> Iterator[World]:
    """A world on an event loop of its own, because Hypothesis drives it from outside of any."""
    clock = ManualClock()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def enter() -> World:
            service = await stack.enter_async_context(
                payment_service(settings, database_url, gateway=gateway, clock=clock)
            )
            connection = await psycopg.AsyncConnection[dict[str, Any]].connect(
                database_url, autocommit=True, row_factory=dict_row
            )
            await stack.enter_async_context(connection)
            return World(runner, service, Books(connection), gateway, clock)

        yield runner.run(enter())
        runner.run(stack.aclose())


def test_every_history_of_requests_ends_as_the_model_says(world: World) -> None:
    class HistoriesOfThisWorld(Histories):
        def __init__(self) -> None:
            super().__init__(world)

    run_state_machine_as_test(
        HistoriesOfThisWorld,
        settings=hypothesis_settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
