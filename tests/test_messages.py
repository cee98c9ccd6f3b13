"""What other services are told: each change of state is committed with its messages, and nothing else is."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import errors as sql_errors
from psycopg.rows import dict_row

from eci_pay.charge_records import begin_charges, settle_charges
from eci_pay.database import arrays, fetch
from eci_pay.errors import Conflict, PayError, Unavailable
from eci_pay.gateways import GatewayCharge, GatewayRefund, GatewayUnavailable, Outcome
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.messages import Destination, message_arrays
from eci_pay.refund_records import begin_refunds, settle_refunds
from eci_pay.requests import StatusUpdateRequest
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from tests.door import Door
from tests.peers import Peers, Taken
from tests.rows import charge_begin, charge_settlement, kinds, paid, refund_begin, refund_settlement
from tests.support import (
    Books,
    CommandLine,
    ManualClock,
    Opener,
    RecordingGateway,
    Relays,
    Sessions,
    assert_books_are_true,
    charge_fields,
    charge_request,
    create_request,
    names,
    refund_request,
    until,
    until_lock_waits,
)

ORDER, USER, REFERENCE, REASON = 41, 7, "Basket 41", "Damaged in transit"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Told = tuple[str, str, dict[str, Any]]
"""A message as the outbox has it: destination, event and payload."""


def told(
    event: str,
    payment_id: int,
    amount: str = "100.00 INR",
    *,
    order_id: int = ORDER,
    user_id: int = USER,
    reference: str | None = REFERENCE,
    reason: str = REASON,
) -> list[Told]:
    """All that is told of an event, in order: the contract with the other services, word for word."""

    def order(status: str) -> Told:
        return "order", event, {"payment_id": payment_id, "payment_status": status}

    def inventory(why: str) -> Told:
        return "inventory", event, {"order_id": order_id, "reason": why}

    def notification(kind: str, text: str) -> Told:
        return "notification", event, {"user_id": user_id, "type": kind, "message": text, "channel": "EMAIL"}

    paid_text = f"Your payment of {amount} was received. Reference: {reference}."
    failed_text = f"Your payment of {amount} failed. Reference: {reference}."
    refunded_text = f"{amount} of your payment were refunded. Reference: {reference}. Reason: {reason}"
    return {
        "payment.completed": [order("COMPLETED"), notification("PAYMENT_SUCCESS", paid_text)],
        "payment.failed": [order("FAILED"), inventory("Payment failed"), notification("PAYMENT_FAILED", failed_text)],
        "payment.cancelled": [order("CANCELLED"), inventory("Payment cancelled")],
        "refund.completed": [notification("PAYMENT_REFUNDED", refunded_text)],
        "payment.refunded": [order("REFUNDED"), inventory("Payment refunded")],
    }[event]


async def told_of(books: Books, payment_id: int) -> list[Told]:
    """What the outbox tells of a payment, in order. Numbers have no gaps, and the payment knows the last one."""
    rows = await books.rows("SELECT * FROM outbox WHERE payment_id = %s ORDER BY sequence", payment_id)
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    assert sorted(row["message_id"] for row in rows) == [row["message_id"] for row in rows]
    assert await books.value("SELECT last_sequence FROM payments WHERE payment_id = %s", payment_id) == len(rows)
    return [(row["destination"], row["event"], row["payload"]) for row in rows]


async def count_of_messages(books: Books) -> int:
    """How many messages there are in all."""
    count: int = await books.value("SELECT count(*) FROM outbox")
    return count


class Fickle(RecordingGateway):
    """A gateway that may be out of reach."""

    is_reachable = True

    async def charge(self, charge: GatewayCharge) -> Outcome:
        self._reach()
        return await super().charge(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        self._reach()
        return await super().refund(refund)

    def _reach(self) -> None:
        if not self.is_reachable:
            raise GatewayUnavailable("refused")


@pytest.fixture
def gateway(settings: Settings) -> Fickle:
    """The gateway of every service of a test."""
    return Fickle(slow_seconds=settings.eci_pay_simulated_slow_seconds)


@pytest.fixture
def service(telling: PaymentService) -> PaymentService:
    """All three peers are configured, for `api` as well; nobody delivers unless a test does."""
    return telling


# Through each door: what is told of each change


@dataclass(frozen=True)
class Step:
    """Something done to the order, and the status that HTTP answers it with."""

    verb: str
    status: int = 200
    amount: str | None = None
    method: str = "CREDIT_CARD"
    key: str | None = None

    def charge_fields(self) -> dict[str, Any]:
        """The body of a charge or creation."""
        amount = {"amount": self.amount} if self.amount else {}
        fields = {"user_id": USER, "payment_method": self.method, "reference": REFERENCE, **amount}
        return charge_fields(ORDER, **fields)

    def refund_fields(self) -> dict[str, object]:
        """The body of a refund."""
        return {"reason": REASON} if self.amount is None else {"reason": REASON, "amount": self.amount}


def charge(amount: str = "100.00", method: str = "CREDIT_CARD", *, status: int = 201, key: str | None = None) -> Step:
    """A charge of the order."""
    return Step("charge", status, amount, method, key)


def refund(amount: str | None = None, *, status: int = 200, key: str | None = None) -> Step:
    """A refund, of all that is left where no amount is given."""
    return Step("refund", status, amount, key=key)


APPROVED, DECLINED, PENDING, COD = charge(), charge("4000.02", status=402), Step("create", 201), charge(method="COD")
COMPLETE, FAIL, CANCEL, DELETE = (Step(verb) for verb in ("COMPLETED", "FAILED", "CANCELLED", "delete"))
PAID, FAILED = ("payment.completed", "100.00 INR"), ("payment.failed", "4000.02 INR")
CANCELLED, REFUNDED = ("payment.cancelled", ""), ("payment.refunded", "")


def gave_back(amount: str) -> tuple[str, str]:
    """The event of a refund of rupees."""
    return "refund.completed", f"{amount} INR"


def refused(step: Step) -> Step:
    """The same step where it is a conflict."""
    return replace(step, status=409)


CHANGES: dict[str, tuple[list[Step], list[tuple[str, str]]]] = {
    "charge approved": ([APPROVED], [PAID]),
    "charge declined": ([DECLINED], [FAILED]),
    "gateway unavailable": ([charge(status=503)], [("payment.failed", "100.00 INR")]),
    "gateway unavailable, then approved under the same key": (
        [charge(status=503, key="k"), charge(key="k")],
        [("payment.failed", "100.00 INR"), PAID],
    ),
    "pending completed": ([PENDING, COMPLETE], [PAID]),
    "cash on delivery completed": ([COD, COMPLETE], [PAID]),
    "pending failed": ([PENDING, FAIL], [("payment.failed", "100.00 INR")]),
    "pending cancelled by update": ([PENDING, CANCEL], [CANCELLED]),
    "pending cancelled": ([COD, DELETE], [CANCELLED]),
    "failed cancelled by update": ([DECLINED, CANCEL], [FAILED, CANCELLED]),
    "failed cancelled": ([DECLINED, DELETE], [FAILED, CANCELLED]),
    "failed, then approved": ([DECLINED, APPROVED], [FAILED, PAID]),
    "cash on delivery, then charged": ([COD, APPROVED], [PAID]),
    "partial refund": ([APPROVED, refund("30.25")], [PAID, gave_back("30.25")]),
    "full refund": ([APPROVED, refund()], [PAID, gave_back("100.00"), REFUNDED]),
    "two partial refunds of all": (
        [APPROVED, refund("30.25"), refund()],
        [PAID, gave_back("30.25"), gave_back("69.75"), REFUNDED],
    ),
    "refund of what no gateway captured": ([COD, COMPLETE, refund()], [PAID, gave_back("100.00"), REFUNDED]),
    "declined refund": (
        [charge("9000", "UPI"), refund("4000.02", status=402)],
        [("payment.completed", "9000.00 INR")],
    ),
    "refund while the gateway is unavailable": ([APPROVED, refund(status=503)], [PAID]),
    # Nothing of these is told
    "creation": ([PENDING], []),
    "cash on delivery": ([COD], []),
    "unknown after capture": ([charge("4000.08", status=202)], []),
    "unknown, replayed": ([charge("4000.08", status=202, key="k"), charge("4000.08", status=202, key="k")], []),
    "unknown by an error": ([charge("4000.11", status=202)], []),
    "begin of a new attempt": ([DECLINED, charge("4000.09", status=202)], [FAILED]),
    "takeover of a pending payment": ([PENDING, charge("4000.09", status=202)], []),
    "replay of a charge": ([charge(key="k"), charge(key="k")], [PAID]),
    "replay of a decline": ([charge("4000.02", status=402, key="k")] * 2, [FAILED]),
    "replay of a refund": ([APPROVED, refund("10", key="r"), refund("10", key="r")], [PAID, gave_back("10.00")]),
    "refused charge": ([APPROVED, refused(APPROVED)], [PAID]),
    "refused refund": ([APPROVED, refused(refund("100.01"))], [PAID]),
    "refused cancellation": ([APPROVED, refused(DELETE)], [PAID]),
    "refused updates": ([APPROVED, refused(COMPLETE), refused(FAIL), refused(CANCEL)], [PAID]),
    "refused creation": ([APPROVED, refused(PENDING)], [PAID]),
    "charge of a cancelled order": ([PENDING, DELETE, refused(APPROVED)], [CANCELLED]),
    "refund of all but one whose outcome is unknown": (
        [charge("9000", "UPI"), refund("4000.09", status=202), refund()],
        [("payment.completed", "9000.00 INR"), gave_back("4999.91")],
    ),
}

IN_PROCESS, OVER_HTTP, ON_COMMAND_LINE = "service", "HTTP", "command line"
EXIT_OF_STATUS = {200: 0, 201: 0, 202: 6, 402: 1, 409: 3}
WITH_COMMANDS = (
    "charge approved",
    "charge declined",
    "pending cancelled",
    "failed cancelled",
    "two partial refunds of all",
    "declined refund",
    "unknown after capture",
    "replay of a charge",
    "refused cancellation",
)
"""What is done by commands too, of which each is a process."""

EACH_CHANGE_THROUGH_EACH_DOOR = [
    pytest.param(through, steps, events, id=f"{name}: {through}")
    for name, (steps, events) in CHANGES.items()
    for through in (IN_PROCESS, OVER_HTTP, ON_COMMAND_LINE)
    if through != ON_COMMAND_LINE or name in WITH_COMMANDS
]


async def in_process(service: PaymentService, step: Step, payment_id: int, key: str) -> int:
    """Does it by the use cases; the status that HTTP would answer with."""
    try:
        match step.verb:
            case "create":
                request = create_request(**step.charge_fields())
                return (await service.charges.create(request=request)).status_code
            case "charge":
                charged = charge_request(**step.charge_fields())
                return (await service.charges.charge(request=charged, idempotency_key=key)).status_code
            case "refund":
                asked = refund_request(step.amount, REASON)
                given = await service.refunds.refund(payment_id=payment_id, request=asked, idempotency_key=key)
                return given.status_code
            case "delete":
                await service.status_changes.cancel(payment_id=payment_id)
            case status:
                update = StatusUpdateRequest(status=PaymentStatus(status))
                await service.status_changes.update(payment_id=payment_id, request=update)
    except Conflict:
        return 409
    except Unavailable:
        return 503
    return 200


async def over_http(api: httpx.AsyncClient, step: Step, payment_id: int, key: str) -> int:
    """Does it over HTTP."""
    path, headers = f"/v1/payments/{payment_id}", {"Idempotency-Key": key}
    match step.verb:
        case "create":
            response = await api.post("/v1/payments", json=step.charge_fields())
        case "charge":
            response = await api.post("/v1/payments/charge", json=step.charge_fields(), headers=headers)
        case "refund":
            response = await api.post(f"{path}/refund", json=step.refund_fields(), headers=headers)
        case "delete":
            response = await api.delete(path)
        case status:
            response = await api.patch(f"{path}/status", json={"status": status})
    return response.status_code


async def on_command_line(command_line: CommandLine, step: Step, payment_id: int, key: str) -> int:
    """Runs the command for it; its exit code must be the one of the status that is expected."""
    match step.verb:
        case "charge":
            body = json.dumps(step.charge_fields())
            result = await command_line.run("charge", "-", f"--idempotency-key={key}", stdin=body)
        case "refund":
            amount = () if step.amount is None else (f"--amount={step.amount}",)
            options = (f"--reason={REASON}", f"--idempotency-key={key}", "--yes", *amount)
            result = await command_line.run("refund", str(payment_id), *options)
        case _:
            result = await command_line.run("cancel", str(payment_id))
    assert result.exit_code == EXIT_OF_STATUS[step.status], result.stderr
    return step.status


@pytest.fixture
def telling_command_line(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The command line where all three peers are configured."""
    return replace(command_line, environment={**command_line.environment, **peers.environment()})


@pytest.mark.parametrize(("through", "steps", "events"), EACH_CHANGE_THROUGH_EACH_DOOR)
async def test_each_change_tells_exactly_those_whom_it_concerns_through_every_door(
    service: PaymentService,
    api: httpx.AsyncClient,
    telling_command_line: CommandLine,
    books: Books,
    gateway: Fickle,
    *,
    through: str,
    steps: list[Step],
    events: list[tuple[str, str]],
) -> None:
    # So that the payment's number is not the order's.
    await books.rows("ALTER TABLE payments ALTER payment_id RESTART WITH 1000")
    for number, step in enumerate(steps):
        gateway.is_reachable = step.status != 503
        key = step.key or f"key {number}"
        if through == IN_PROCESS:
            status = await in_process(service, step, 1000, key)
        elif through == OVER_HTTP:
            status = await over_http(api, step, 1000, key)
        else:
            status = await on_command_line(telling_command_line, step, 1000, key)
        assert status == step.status, step
    assert await told_of(books, 1000) == [message for event in events for message in told(event[0], 1000, event[1])]
    untouched = await books.value(
        "SELECT count(*) FROM outbox WHERE attempts = 0 AND next_attempt_at <= now()"
        " AND num_nulls(first_attempt_at, lease_id, delivered_at, dead_at, last_error) = 5"
    )
    assert untouched == await count_of_messages(books)


async def test_a_message_is_as_old_as_the_change_that_it_tells_of(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    begun = clock.now
    [payment_id] = await paid(service, 1)
    clock.advance(days=3)
    await service.refunds.refund(payment_id=payment_id, request=refund_request("40"))
    pending = await service.charges.create(request=create_request(2))
    clock.advance(hours=1)
    await service.status_changes.cancel(payment_id=pending.payment_id)
    ages = await books.rows("SELECT event, created_at FROM outbox GROUP BY 1, 2 ORDER BY 2")
    assert [(row["event"], row["created_at"] - begun) for row in ages] == [
        ("payment.completed", timedelta(0)),
        ("refund.completed", timedelta(days=3)),
        ("payment.cancelled", timedelta(days=3, hours=1)),
    ]


class LateClock(ManualClock):
    """Moves on whenever it is looked at, once it runs."""

    step = timedelta(0)

    def __call__(self) -> datetime:
        self.now += self.step
        return self.now


async def test_a_charge_that_came_too_late_to_be_sent_is_told_as_failed_and_such_a_refund_not_at_all(
    settings: Settings, database_url: str, peers: Peers, books: Books, gateway: Fickle
) -> None:
    clock = LateClock()
    telling = settings.model_copy(update=peers.settings())
    request = charge_request(ORDER, reference=REFERENCE)
    async with payment_service(telling, database_url, gateway=gateway, clock=clock) as service:
        [other] = await paid(service, 1)
        clock.step = timedelta(seconds=settings.eci_pay_send_deadline_seconds, microseconds=1)
        with pytest.raises(Unavailable):
            await service.charges.charge(request=request, idempotency_key="k")
        with pytest.raises(Unavailable):
            await service.refunds.refund(payment_id=other, request=refund_request(), idempotency_key="r")
        payment_id = await books.value("SELECT payment_id FROM payments WHERE order_id = %s", ORDER)
        failed = told("payment.failed", payment_id)
        assert await told_of(books, payment_id) == failed
        assert [event for _, event, _ in await told_of(books, other)] == ["payment.completed"] * 2
        clock.step = timedelta(0)
        assert (await service.charges.charge(request=request, idempotency_key="k")).status_code == 201
    assert len(gateway.charges) == 2
    assert await told_of(books, payment_id) == failed + told("payment.completed", payment_id)


# What the words say


async def test_who_takes_an_order_over_is_told_of_their_own_payment(service: PaymentService, books: Books) -> None:
    first = charge_request(ORDER, amount="4000.02", reference="First try")
    second = charge_request(ORDER, user_id=8, amount="55.5", currency="USD", reference="Second try")
    declined = await service.charges.charge(request=first, idempotency_key="a")
    approved = await service.charges.charge(request=second, idempotency_key="b")
    assert (declined.status_code, approved.status_code) == (402, 201)
    payment_id = approved.payment_id
    await service.refunds.refund(payment_id=payment_id, request=refund_request(None, REASON))
    theirs: dict[str, Any] = {"user_id": 8, "reference": "Second try"}
    assert await told_of(books, payment_id) == [
        *told("payment.failed", payment_id, "4000.02 INR", reference="First try"),
        *told("payment.completed", payment_id, "55.50 USD", **theirs),
        *told("refund.completed", payment_id, "55.50 USD", **theirs),
        *told("payment.refunded", payment_id),
    ]


async def test_amounts_are_told_with_the_decimals_of_their_currency(service: PaymentService, books: Books) -> None:
    for order_id, currency, text in ((1, "JPY", "4000 JPY"), (2, "USD", "4000.00 USD"), (3, "KWD", "4000.00 KWD")):
        request = charge_request(order_id, amount="4000", currency=currency, reference=REFERENCE)
        answer = await service.charges.charge(request=request, idempotency_key=currency)
        await service.refunds.refund(payment_id=answer.payment_id, request=refund_request("1500", REASON))
        refunded = text.replace("4000", "1500")
        assert await told_of(books, answer.payment_id) == [
            *told("payment.completed", answer.payment_id, text),
            *told("refund.completed", answer.payment_id, refunded),
        ]


async def test_a_reference_that_was_made_up_is_told(service: PaymentService, books: Books) -> None:
    [payment_id] = await paid(service, ORDER)
    reference = await books.value("SELECT reference FROM payments")
    assert reference.startswith("REF")
    assert await told_of(books, payment_id) == told("payment.completed", payment_id, reference=reference)


async def test_words_of_any_script_arrive_as_they_were_given(
    service: PaymentService, relays: Relays, peers: Peers
) -> None:
    reference, reason = 'Büro {amount} \\ "5%"', "Größe {reason} %s passt nicht\n\N{PILE OF POO} \u202edne"
    request = charge_request(ORDER, reference=reference)
    payment_id = (await service.charges.charge(request=request, idempotency_key="k")).payment_id
    await service.refunds.refund(payment_id=payment_id, request=refund_request("0.01", reason))
    async with relays() as relay:
        await relay.drain()
    bodies = [one.body for one in peers.accepted(Destination.NOTIFICATION)]
    assert bodies == [
        told("payment.completed", payment_id, reference=reference)[1][2],
        told("refund.completed", payment_id, "0.01 INR", reference=reference, reason=reason)[0][2],
    ]


# Who is configured


ALL_SETS_OF_PEERS = [set(chosen) for count in range(4) for chosen in itertools.combinations(Destination, count)]


def _names(chosen: set[Destination]) -> str:
    return " and ".join(sorted(chosen)) or "nobody"


@pytest.mark.parametrize("configured", ALL_SETS_OF_PEERS, ids=_names)
async def test_a_peer_without_a_url_is_told_nothing_and_leaves_no_gap(
    opened: Opener, peers: Peers, books: Books, configured: set[Destination]
) -> None:
    async with opened(**urls_of(peers, configured)) as service:
        for step, key in ((DECLINED, "a"), (APPROVED, "b"), (refund("30.25"), "c"), (refund(), "d")):
            assert await in_process(service, step, 1, key) == step.status
        pending = (await service.charges.create(request=create_request(2))).payment_id
        await service.status_changes.cancel(payment_id=pending)
    everything = [message for event in (FAILED, PAID, gave_back("30.25")) for message in told(event[0], 1, event[1])]
    everything += [message for event in (gave_back("69.75"), REFUNDED) for message in told(event[0], 1, event[1])]
    assert await told_of(books, 1) == [message for message in everything if message[0] in configured]
    cancelled = told("payment.cancelled", pending, order_id=2)
    assert await told_of(books, pending) == [message for message in cancelled if message[0] in configured]
    assert (await count_of_messages(books) == 0) == (not configured)


async def test_numbers_have_no_gap_where_processes_are_configured_for_different_peers(
    opened: Opener, peers: Peers, books: Books
) -> None:
    everyone = set(Destination)
    for step, configured in (
        (DECLINED, {Destination.NOTIFICATION}),
        (APPROVED, everyone),
        (refund("10"), set[Destination]()),
        (refund("20"), {Destination.ORDER}),
        (refund(), {Destination.INVENTORY, Destination.NOTIFICATION}),
    ):
        async with opened(**urls_of(peers, configured)) as service:
            assert await in_process(service, step, 1, f"{step}") == step.status
    assert await told_of(books, 1) == [
        told("payment.failed", 1, "4000.02 INR")[2],
        *told("payment.completed", 1),
        *told("refund.completed", 1, "70.00 INR"),
        told("payment.refunded", 1)[1],
    ]


def urls_of(peers: Peers, configured: set[Destination]) -> dict[str, object]:
    """The settings of a process that knows only some of the peers."""
    return {name: url if name.split("_")[0] in configured else None for name, url in peers.settings().items()}


# A change and its messages are one commit


FAILS = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'made to fail'; END $$
"""
BREAKS_OUTBOX = "CREATE TRIGGER fail BEFORE INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION fail()"
BREAKS = {
    "the outbox takes nothing": BREAKS_OUTBOX,
    "the last of the messages is refused": (
        "CREATE TRIGGER fail BEFORE INSERT ON outbox FOR EACH ROW"
        " WHEN (NEW.destination = CASE NEW.event WHEN 'payment.cancelled' THEN 'inventory' WHEN 'payment.refunded'"
        " THEN 'inventory' ELSE 'notification' END) EXECUTE FUNCTION fail()"
    ),
    "messages are refused when they are committed": (
        "CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON outbox DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION fail()"
    ),
    "the audit trail takes no result": (
        "CREATE TRIGGER fail BEFORE INSERT ON transactions FOR EACH ROW"
        " WHEN (NEW.status NOT IN ('PENDING', 'PROCESSING')) EXECUTE FUNCTION fail()"
    ),
    "the payment is not changed": (
        "CREATE TRIGGER fail BEFORE UPDATE ON payments FOR EACH ROW"
        " WHEN (OLD.status <> NEW.status OR NEW.refund_pending < OLD.refund_pending) EXECUTE FUNCTION fail()"
    ),
    "the commit is refused": (
        "CREATE CONSTRAINT TRIGGER fail AFTER UPDATE ON payments DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (OLD.status <> NEW.status OR NEW.refund_pending < OLD.refund_pending) EXECUTE FUNCTION fail()"
    ),
}


@pytest.mark.parametrize("break_", BREAKS.values(), ids=list(BREAKS))
async def test_where_messages_or_change_cannot_be_committed_neither_is_there(
    service: PaymentService, books: Books, break_: str
) -> None:
    [refunded] = await paid(service, 1)
    created = [await service.charges.create(request=create_request(order_id)) for order_id in (2, 3, 4)]
    completed, failed, cancelled = (answer.payment_id for answer in created)
    before = await everything_told(books)
    await books.rows(FAILS)
    await books.rows(break_)
    answers = [
        await service.charges.charge(request=charge_request(5), idempotency_key="approved"),
        await service.charges.charge(request=charge_request(6, amount="4000.02"), idempotency_key="declined"),
        await service.refunds.refund(payment_id=refunded, request=refund_request(), idempotency_key="refund"),
    ]
    assert names(answers) == {"202": 3}
    changes: list[tuple[int, PaymentStatus]] = [
        (completed, PaymentStatus.COMPLETED),
        (failed, PaymentStatus.FAILED),
        (cancelled, PaymentStatus.CANCELLED),
    ]
    for payment_id, status in changes:
        with pytest.raises(sql_errors.RaiseException):
            await service.status_changes.update(payment_id=payment_id, request=StatusUpdateRequest(status=status))
    statuses = await books.rows("SELECT order_id, status, last_sequence FROM payments ORDER BY order_id")
    assert [tuple(row.values()) for row in statuses] == [
        (1, "COMPLETED", 2),
        (2, "PENDING", 0),
        (3, "PENDING", 0),
        (4, "PENDING", 0),
        (5, "PROCESSING", 0),
        (6, "PROCESSING", 0),
    ]
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = 1") == 100
    assert await everything_told(books) == before
    results = await books.value(
        "SELECT count(*) FROM transactions WHERE status NOT IN ('PENDING', 'PROCESSING') AND payment_id <> %s", refunded
    )
    assert results == 0
    await books.rows("DROP FUNCTION fail CASCADE")
    for payment_id, status in changes:
        await service.status_changes.update(payment_id=payment_id, request=StatusUpdateRequest(status=status))
        assert {event for _, event, _ in await told_of(books, payment_id)} == {f"payment.{status.lower()}"}


async def everything_told(books: Books) -> list[dict[str, Any]]:
    """The outbox as it is."""
    return await books.rows("SELECT * FROM outbox ORDER BY message_id")


async def refuse_two_messages(books: Books, code: str) -> None:
    """Lets the outbox refuse the next two messages. A sequence counts, because it is not rolled back with them."""
    await books.rows("CREATE SEQUENCE tries")
    await books.rows(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        f" IF nextval('tries') < 3 THEN RAISE EXCEPTION 'not yet' USING ERRCODE = '{code}'; END IF;"
        " RETURN NEW; END $$"
    )
    await books.rows(BREAKS_OUTBOX)


@pytest.mark.parametrize("code", ["lock_not_available", "serialization_failure", "deadlock_detected"])
async def test_a_settle_that_succeeds_at_the_third_try_tells_once(
    service: PaymentService, books: Books, code: str
) -> None:
    [refunded] = await paid(service, 1)
    await refuse_two_messages(books, code)
    charged = await service.charges.charge(request=charge_request(ORDER, reference=REFERENCE), idempotency_key="charge")
    assert charged.status_code == 201
    assert await books.value("SELECT last_value FROM tries") == 4  # two refused, then one for each of two messages
    assert await told_of(books, charged.payment_id) == told("payment.completed", charged.payment_id)
    await books.rows("ALTER SEQUENCE tries RESTART")
    given_back = await service.refunds.refund(payment_id=refunded, request=refund_request())
    assert given_back.status_code == 200
    assert await books.value("SELECT last_value FROM tries") == 5
    events = [event for _, event, _ in await told_of(books, refunded)]
    assert events == ["payment.completed"] * 2 + ["refund.completed"] + ["payment.refunded"] * 2


@pytest.mark.parametrize("code", ["serialization_failure", "deadlock_detected"])
async def test_an_update_that_succeeds_at_the_third_try_tells_once(
    service: PaymentService, books: Books, code: str
) -> None:
    payment_id = (await service.charges.create(request=create_request(ORDER, reference=REFERENCE))).payment_id
    await refuse_two_messages(books, code)
    await service.status_changes.update(payment_id=payment_id, request=StatusUpdateRequest(status=PaymentStatus.FAILED))
    assert await books.value("SELECT last_value FROM tries") == 5
    assert await told_of(books, payment_id) == told("payment.failed", payment_id)


async def test_what_was_committed_without_an_answer_is_told_once(
    door: Door, opened: Opener, peers: Peers, books: Books, gateway: Fickle
) -> None:
    """The connection is lost behind the commit; whoever settles looks again, and finds it done."""
    async with door.opened() as url, opened(url=url, **peers.settings()) as far:
        door.lose_answer_to("FROM settlement")
        request = charge_request(ORDER, reference=REFERENCE)
        charged = await far.charges.charge(request=request, idempotency_key="k")
        assert (door.has_lost, charged.status_code) == (True, 201)
        payment_id = charged.payment_id
        assert await told_of(books, payment_id) == told("payment.completed", payment_id)
        door.lose_answer_to("COMMIT")
        given_back = await far.refunds.refund(payment_id=payment_id, request=refund_request(None, REASON))
        assert (door.has_lost, given_back.status_code) == (True, 200)
    assert await told_of(books, payment_id) == [
        *told("payment.completed", payment_id),
        *told("refund.completed", payment_id),
        *told("payment.refunded", payment_id),
    ]
    await assert_books_are_true(books, gateway)


# Many at once


def of_row(event: str, payment_id: int, order_id: int, amount: str = "100.00 INR") -> list[Told]:
    """What a settlement of `tests/rows.py` tells."""
    return told(event, payment_id, amount, order_id=order_id, reference="R", reason="Customer changed their mind")


async def test_each_payment_of_a_batch_of_charges_gets_its_own_messages_and_no_other(
    service: PaymentService, books: Books
) -> None:
    order_ids = [*range(30, 0, -1)]
    rows = [charge_begin(order_id) for order_id in order_ids]
    begun = await begin_charges(service.database, rows)
    outcomes = [PaymentStatus.FAILED if order_id % 3 == 0 else PaymentStatus.COMPLETED for order_id in order_ids]
    settlements = [
        charge_settlement(row, result, outcome) for row, result, outcome in zip(rows, begun, outcomes, strict=True)
    ]
    settlements[4] = replace(settlements[4], messages=())
    await settle_charges(service.database, settlements[10:12])
    settlements[20] = replace(settlements[20], authorization_code="x" * 51)
    results = await settle_charges(service.database, settlements)
    assert isinstance(results[20], sql_errors.StringDataRightTruncation)
    assert [results.index(False), results.count(False), results.count(True)] == [10, 2, 27]
    for number, settlement in enumerate(settlements):
        event = "payment.failed" if settlement.status is PaymentStatus.FAILED else "payment.completed"
        is_told = number not in (4, 20)
        expected = of_row(event, settlement.payment_id, settlement.order_id) if is_told else []
        assert await told_of(books, settlement.payment_id) == expected
    again = [settlement for number, settlement in enumerate(settlements) if number != 20]
    assert set(await settle_charges(service.database, again)) == {False}
    assert await count_of_messages(books) == sum(
        3 if settlement.status is PaymentStatus.FAILED else 2
        for number, settlement in enumerate(settlements)
        if number not in (4, 20)
    )


async def test_each_payment_of_a_batch_of_refunds_gets_its_own_messages_and_no_other(
    service: PaymentService, books: Books
) -> None:
    """Whole, in part, failed, the last of two in one batch, one beside another that waits, and one that is bad."""
    whole, part, failed, twice, waiting, bad = await paid(service, 1, 2, 3, 4, 5, 6)
    rows = [
        refund_begin(twice, "60"),
        refund_begin(whole, None),
        refund_begin(part, "1.5"),
        refund_begin(failed, None),
        refund_begin(twice, None),
        refund_begin(waiting, "0.01"),
        refund_begin(waiting, None),
        refund_begin(bad, None),
    ]
    begun = await begin_refunds(service.database, rows)
    assert kinds(begun) == ["Begun"] * 8
    settlements = [refund_settlement(result) for number, result in enumerate(begun) if number not in (3, 5)]
    settlements.append(refund_settlement(begun[3], RefundStatus.FAILED))
    settlements[5] = replace(settlements[5], gateway_response="x" * 501)
    results = await settle_refunds(service.database, settlements)
    assert kinds(results) == ["Answer"] * 5 + ["StringDataRightTruncation", "Answer"]
    expected: dict[int, list[Told]] = {
        whole: [*of_row("refund.completed", whole, 1), *of_row("payment.refunded", whole, 1)],
        part: of_row("refund.completed", part, 2, "1.50 INR"),
        failed: [],
        twice: [
            *of_row("refund.completed", twice, 4, "60.00 INR"),
            *of_row("refund.completed", twice, 4, "40.00 INR"),
            *of_row("payment.refunded", twice, 4),
        ],
        waiting: of_row("refund.completed", waiting, 5, "99.99 INR"),
        bad: [],
    }
    for payment_id, messages in expected.items():
        assert (await told_of(books, payment_id))[2:] == messages
    assert await settle_refunds(service.database, settlements[:5]) == [None] * 5
    for payment_id, messages in expected.items():
        assert (await told_of(books, payment_id))[2:] == messages


async def test_what_is_settled_many_times_and_by_many_at_once_is_told_once(
    service: PaymentService, books: Books, sessions: Sessions
) -> None:
    row = charge_begin(1)
    [begun] = await begin_charges(service.database, [row])
    charged = charge_settlement(row, begun)
    payment_id = charged.payment_id

    async def settle_all(settling: list[Awaitable[list[Any]]]) -> list[Any]:
        """Starts them while the payment is locked, so that they meet."""
        session = await sessions()
        await session.execute("SELECT FROM payments FOR UPDATE")
        tasks = [asyncio.ensure_future(each) for each in settling]
        await until_lock_waits(books, len(tasks))
        await session.rollback()
        return [result for results in await asyncio.gather(*tasks) for result in results]

    results = await settle_all([settle_charges(service.database, [charged, charged]) for _ in range(5)])
    assert (results.count(True), results.count(False)) == (1, 9)
    assert await told_of(books, payment_id) == of_row("payment.completed", payment_id, 1)
    [reserved] = await begin_refunds(service.database, [refund_begin(payment_id, None)])
    given_back = refund_settlement(reserved)
    answers = await settle_all([settle_refunds(service.database, [given_back, given_back]) for _ in range(5)])
    assert (kinds(answers).count("Answer"), answers.count(None)) == (1, 9)
    assert (await told_of(books, payment_id))[2:] == [
        *of_row("refund.completed", payment_id, 1),
        *of_row("payment.refunded", payment_id, 1),
    ]


async def test_concurrent_refunds_are_told_one_after_the_other_and_the_full_refund_once_and_last(
    api: httpx.AsyncClient, opened: Opener, peers: Peers, books: Books
) -> None:
    """Their amounts all differ, so that each message can be told from the others."""
    amounts = [Decimal(100 + number) / 100 for number in range(1, 41)]
    async with opened(**peers.settings()) as replica:
        [payment_id] = await paid(replica, 1, amount=f"{sum(amounts)}")

        async def give_back(amount: Decimal) -> int:
            if amount < Decimal("1.20"):
                answer = await replica.refunds.refund(payment_id=payment_id, request=refund_request(f"{amount}"))
                return answer.status_code
            body = {"amount": f"{amount}", "reason": "Customer changed their mind"}
            return (await api.post(f"/v1/payments/{payment_id}/refund", json=body)).status_code

        assert set(await asyncio.gather(*(give_back(amount) for amount in amounts))) == {200}
    booked = await books.rows(
        "SELECT amount FROM transactions WHERE transaction_type = 'REFUND' AND status = 'REFUNDED'"
        " ORDER BY transaction_log_id"
    )
    in_order = [row["amount"] for row in booked]
    assert sorted(in_order) == amounts
    reference = await books.value("SELECT reference FROM payments")
    expected = told("payment.completed", payment_id, f"{sum(amounts)} INR", reference=reference)
    for amount in in_order:
        text = f"{amount} INR"
        reason = "Customer changed their mind"
        expected += told("refund.completed", payment_id, text, reference=reference, reason=reason)
    expected += told("payment.refunded", payment_id, order_id=1)
    assert await told_of(books, payment_id) == expected


async def test_of_changes_that_race_for_a_payment_only_the_one_that_won_is_told(
    service: PaymentService, opened: Opener, peers: Peers, books: Books
) -> None:
    orders = range(1, 21)
    created = [await service.charges.create(request=create_request(order_id)) for order_id in orders]
    complete = StatusUpdateRequest(status=PaymentStatus.COMPLETED)
    fail = StatusUpdateRequest(status=PaymentStatus.FAILED)
    async with opened(**peers.settings()) as replica:
        results = await asyncio.gather(
            *(
                work
                for order_id, answer in zip(orders, created, strict=True)
                for work in (
                    service.charges.charge(request=charge_request(order_id), idempotency_key=f"{order_id}"),
                    replica.status_changes.update(payment_id=answer.payment_id, request=complete),
                    replica.status_changes.update(payment_id=answer.payment_id, request=fail),
                    service.status_changes.cancel(payment_id=answer.payment_id),
                )
            ),
            return_exceptions=True,
        )
    assert [error for error in results if isinstance(error, BaseException) and not isinstance(error, Conflict)] == []
    for order_id, answer in zip(orders, created, strict=True):
        trail = await books.audit_trail(answer.payment_id)
        changes = [status for _, status in trail if status not in ("PENDING", "PROCESSING")]
        # A charge or a cancellation may still follow upon a failure.
        assert changes in (["COMPLETED"], ["CANCELLED"], ["FAILED"], ["FAILED", "COMPLETED"], ["FAILED", "CANCELLED"])
        reference = await books.value("SELECT reference FROM payments WHERE order_id = %s", order_id)
        expected = [f"payment.{status.lower()}" for status in changes]
        messages = await told_of(books, answer.payment_id)
        assert [event for event, _ in itertools.groupby(event for _, event, _ in messages)] == expected
        last = f"payment.{changes[-1].lower()}"
        latest = told(last, answer.payment_id, order_id=order_id, reference=reference)
        assert messages[-len(latest) :] == latest


async def test_a_transaction_that_began_earlier_and_commits_later_is_relayed_all_the_same(
    service: PaymentService, books: Books, sessions: Sessions, relays: Relays, peers: Peers
) -> None:
    """Its messages have lower numbers than those that are delivered before them."""
    rows = [charge_begin(order_id) for order_id in (1, 2)]
    begun = await begin_charges(service.database, rows)
    early, late = [charge_settlement(row, result) for row, result in zip(rows, begun, strict=True)]
    session = await sessions()
    columns = {**arrays([early.columns()]), **message_arrays([early.messages]), "lock_wait": None}
    assert await fetch(session, "charge_settle", columns) == [{"n": 0}]
    assert await settle_charges(service.database, [late]) == [True]
    async with relays() as relay:
        await relay.drain()
        assert {one.body["payment_id"] for one in peers.accepted(Destination.ORDER)} == {late.payment_id}
        assert len(peers.accepted()) == 2
        await session.commit()
    async with relays() as relay:
        await relay.drain()
    arrived = peers.accepted()
    assert [one.body["payment_id"] for one in arrived if one.destination is Destination.ORDER] == [
        late.payment_id,
        early.payment_id,
    ]
    assert len(arrived) == 4
    assert max(one.message_id for one in arrived[2:]) < min(one.message_id for one in arrived[:2])
    assert await books.value("SELECT count(*) FROM outbox WHERE delivered_at IS NULL") == 0
    assert peers.repeated() == {}


async def test_a_relay_that_runs_all_the_time_delivers_what_commits_late(
    service: PaymentService, books: Books, sessions: Sessions, relays: Relays, peers: Peers
) -> None:
    [payment_id] = await paid(service, 1)
    [reserved] = await begin_refunds(service.database, [refund_begin(payment_id, None)])
    given_back = refund_settlement(reserved)
    session = await sessions()
    stopped = asyncio.Event()
    async with relays() as relay:
        running = asyncio.create_task(relay.run_until(stopped))
        await _until_all_is_delivered(books)
        columns = {**arrays([given_back.columns()]), **message_arrays([given_back.messages]), "lock_wait": None}
        await fetch(session, "refund_settle", columns)
        await paid(service, *range(2, 12))
        await _until_all_is_delivered(books)
        assert len(peers.accepted()) == 22
        await session.commit()
        await _until_all_is_delivered(books)
        stopped.set()
        await running
    last = [(one.destination, one.body) for one in peers.accepted()[22:]]
    expected = [*of_row("refund.completed", payment_id, 1), *of_row("payment.refunded", payment_id, 1)]
    assert sorted(last, key=str) == sorted([(name, body) for name, _, body in expected], key=str)


async def _until_all_is_delivered(books: Books) -> None:
    async def delivered() -> bool:
        return bool(await books.value("SELECT count(*) FROM outbox WHERE delivered_at IS NULL") == 0)

    await until(delivered)


# Which request caused a message


async def delivered_of(relays: Relays, peers: Peers) -> list[Taken]:
    """Delivers all, and returns what arrived, by its message."""
    async with relays() as relay:
        await relay.drain()
    return sorted(peers.accepted(), key=lambda one: one.message_id)


async def test_a_message_names_the_request_and_the_trace_that_caused_it(
    api: httpx.AsyncClient, books: Books, relays: Relays, peers: Peers
) -> None:
    def request(name: str, span: int) -> dict[str, str]:
        trace = f"00-{'ab' * 16}-{span:016x}-01"
        return {"X-Request-ID": name, "traceparent": trace, "Idempotency-Key": name}

    fields = charge_fields(1)
    paid_id = (await api.post("/v1/payments/charge", json=fields, headers=request("charge/1", 1))).json()["payment_id"]
    await api.post("/v1/payments/charge", json=fields, headers={**request("charge/1", 9), "X-Request-ID": "replay"})
    await api.post(f"/v1/payments/{paid_id}/refund", json={"reason": REASON}, headers=request("refund 2", 2))
    created = [
        (await api.post("/v1/payments", json=charge_fields(number), headers=request(f"create {number}", 9))).json()
        for number in (2, 3)
    ]
    path = f"/v1/payments/{created[0]['payment_id']}"
    await api.patch(f"{path}/status", json={"status": "FAILED"}, headers=request("update 3", 3))
    await api.patch(f"{path}/status", json={"status": "FAILED"}, headers=request("refused", 9))
    await api.delete(path, headers=request("cancel 4", 4))
    await api.delete(f"/v1/payments/{created[1]['payment_id']}")
    arrived = await delivered_of(relays, peers)
    rows = await books.rows("SELECT * FROM outbox ORDER BY message_id")
    assert [one.headers["idempotency-key"] for one in arrived] == [str(row["message_id"]) for row in rows]
    named = [
        (row["event"], one.headers.get("x-request-id"), one.headers.get("traceparent"))
        for row, one in zip(rows, arrived, strict=True)
    ]
    expected = [
        *[("payment.completed", "charge/1", request("", 1)["traceparent"])] * 2,
        ("refund.completed", "refund 2", request("", 2)["traceparent"]),
        *[("payment.refunded", "refund 2", request("", 2)["traceparent"])] * 2,
        *[("payment.failed", "update 3", request("", 3)["traceparent"])] * 3,
        *[("payment.cancelled", "cancel 4", request("", 4)["traceparent"])] * 2,
    ]
    assert named[:-2] == expected
    # The last request had neither: it was given a name, and no trace.
    assert named[-2] == named[-1]
    assert len(named[-1][1] or "") == 32
    assert named[-1][2] is None
    assert all("traceparent" not in one.headers for one in arrived[-2:])
    assert [(row["request_id"], row["traceparent"]) for row in rows] == [name[1:] for name in named]


@pytest.mark.parametrize("given", ["x" * 129, "caf\xe9", "", "a\tb"], ids=["too long", "not ASCII", "empty", "a tab"])
async def test_a_request_id_that_cannot_be_used_is_replaced_by_the_one_that_is_answered(
    api: httpx.AsyncClient, relays: Relays, peers: Peers, given: str
) -> None:
    headers = [(b"Idempotency-Key", b"k"), (b"X-Request-ID", given.encode("latin-1"))]
    response = await api.post("/v1/payments/charge", json=charge_fields(1), headers=headers)
    assert response.status_code == 201
    answered = response.headers["X-Request-ID"]
    assert len(answered) == 32
    assert {one.headers["x-request-id"] for one in await delivered_of(relays, peers)} == {answered}


async def test_the_longest_request_id_is_kept_whole(api: httpx.AsyncClient, relays: Relays, peers: Peers) -> None:
    headers = {"Idempotency-Key": "k", "X-Request-ID": "x" * 128}
    assert (await api.post("/v1/payments/charge", json=charge_fields(1), headers=headers)).status_code == 201
    assert [one.headers["x-request-id"] for one in await delivered_of(relays, peers)] == ["x" * 128] * 2


async def test_a_trace_that_is_not_valid_is_dropped_and_the_message_arrives_without(
    api: httpx.AsyncClient, books: Books, relays: Relays, peers: Peers
) -> None:
    invalid = [
        "",
        "garbage",
        TRACE.upper(),
        TRACE[:-1],
        TRACE + "0",
        TRACE + "-extra",
        TRACE.replace("-", "_"),
        TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        TRACE.replace("00f067aa0ba902b7", "0" * 16),
        "ff" + TRACE[2:],
        TRACE.replace("a", "g"),
        f"{TRACE}, {TRACE}",
    ]
    for number, trace in enumerate(invalid, start=1):
        headers = {"Idempotency-Key": f"{number}", "X-Request-ID": f"request {number}", "traceparent": trace}
        answer = await api.post("/v1/payments/charge", json=charge_fields(number), headers=headers)
        assert answer.status_code == 201
    assert await books.value("SELECT count(traceparent) FROM outbox") == 0
    arrived = await delivered_of(relays, peers)
    assert [one.headers["x-request-id"] for one in arrived] == [
        f"request {number}" for number in range(1, len(invalid) + 1) for _ in range(2)
    ]
    assert [one.headers for one in arrived if "traceparent" in one.headers] == []


async def test_a_valid_trace_is_passed_on_as_it_is_though_it_was_not_sampled(
    api: httpx.AsyncClient, relays: Relays, peers: Peers
) -> None:
    unsampled = TRACE[:-1] + "0"
    headers = {"Idempotency-Key": "k", "traceparent": unsampled}
    await api.post("/v1/payments/charge", json=charge_fields(1), headers=headers)
    assert [one.headers["traceparent"] for one in await delivered_of(relays, peers)] == [unsampled] * 2


async def test_two_traces_are_none(api: httpx.AsyncClient, books: Books) -> None:
    """So the tests that belong to W3C Trace Context have it: whoever receives two of them starts anew."""
    other = TRACE.replace("4bf9", "1111")
    headers = [("Idempotency-Key", "k"), ("traceparent", TRACE), ("traceparent", other)]
    await api.post("/v1/payments/charge", json=charge_fields(1), headers=headers)
    assert await books.rows("SELECT DISTINCT traceparent FROM outbox") == [{"traceparent": None}]


async def test_what_no_request_caused_arrives_without_a_request_id(
    service: PaymentService, relays: Relays, peers: Peers
) -> None:
    await paid(service, 1)
    arrived = await delivered_of(relays, peers)
    assert len(arrived) == 2
    for one in arrived:
        assert one.headers.keys().isdisjoint({"x-request-id", "traceparent"})
        assert one.headers["content-type"] == "application/json"


async def test_each_command_names_its_messages_by_an_id_of_its_own(
    telling_command_line: CommandLine, books: Books, relays: Relays, peers: Peers
) -> None:
    await on_command_line(telling_command_line, APPROVED, 1, "a")
    await on_command_line(telling_command_line, refund(), 1, "b")
    rows = await books.rows("SELECT event, request_id, traceparent FROM outbox ORDER BY message_id")
    assert len(rows) == 5
    charged, given_back = ({row["request_id"] for row in part} for part in (rows[:2], rows[2:]))
    assert (len(charged), len(given_back), len(charged | given_back)) == (1, 1, 2)
    assert all(len(request_id) == 32 for request_id in charged | given_back)
    assert {row["traceparent"] for row in rows} == {None}
    arrived = await delivered_of(relays, peers)
    assert [one.headers["x-request-id"] for one in arrived] == [row["request_id"] for row in rows]


# Whatever happens


@dataclass
class World:
    """What lasts from one history to the next: one database and one event loop."""

    runner: asyncio.Runner
    settings: Settings
    url: str
    books: Books
    histories: Iterator[int]


@pytest.fixture
def world(settings: Settings, database_url: str) -> Iterator[World]:
    """A world on an event loop of its own, because Hypothesis drives it from outside of any."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def enter() -> World:
            connection = await psycopg.AsyncConnection[dict[str, Any]].connect(
                database_url, autocommit=True, row_factory=dict_row
            )
            await stack.enter_async_context(connection)
            return World(runner, settings, database_url, Books(connection), itertools.count(1))

        yield runner.run(enter())
        runner.run(stack.aclose())


@dataclass(frozen=True)
class Operation:
    """Something done to one of a few orders, whatever state it is in."""

    verb: str
    order: int
    amount: str | None = None
    method: str = "UPI"


ORDERS = range(4)
_orders = st.sampled_from(ORDERS)
CHARGES = st.builds(
    Operation,
    st.just("charge"),
    _orders,
    st.sampled_from(["9000.00", "9000.00", "4000.02", "4000.11"]),
    st.sampled_from(["UPI", "CREDIT_CARD", "CREDIT_CARD", "COD"]),
)
CREATIONS = st.builds(Operation, st.just("create"), _orders, st.just("9000.00"))
REFUNDS = st.builds(
    Operation, st.just("refund"), _orders, st.sampled_from(["100.00", "4000.02", "4000.11", "9000.00", None, None])
)
BY_HAND = st.builds(Operation, st.sampled_from(["COMPLETED", "FAILED", "CANCELLED", "delete"]), _orders)
AT_ONCE = st.lists(st.one_of(CHARGES, CREATIONS, REFUNDS, REFUNDS, BY_HAND, BY_HAND), min_size=1, max_size=3)
HISTORIES = st.lists(AT_ONCE, min_size=8, max_size=16)
"""Operations one after the other; those of an inner list at once."""
SETS_OF_PEERS = st.one_of(st.just(set(Destination)), st.sets(st.sampled_from(Destination)))

EVENTS_OF_AUDIT_ROW = {
    ("PAYMENT", "COMPLETED"): "payment.completed",
    ("PAYMENT", "FAILED"): "payment.failed",
    ("PAYMENT", "CANCELLED"): "payment.cancelled",
    ("PAYMENT", "REFUNDED"): "payment.refunded",
    ("REFUND", "REFUNDED"): "refund.completed",
}
TOLD_OF_EVENT = {
    "payment.completed": ("order", "notification"),
    "payment.failed": ("order", "inventory", "notification"),
    "payment.cancelled": ("order", "inventory"),
    "payment.refunded": ("order", "inventory"),
    "refund.completed": ("notification",),
}


def test_the_audit_trail_alone_tells_what_is_in_the_outbox(world: World) -> None:
    @hypothesis_settings(max_examples=30, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    @given(configured=SETS_OF_PEERS, history=HISTORIES)
    def every_history(configured: set[Destination], history: list[list[Operation]]) -> None:
        base = 10 * next(world.histories)
        world.runner.run(_live(world, configured, history, base))
        world.runner.run(_compare(world.books, configured, base))

    every_history()


async def _live(world: World, configured: set[Destination], history: list[list[Operation]], base: int) -> None:
    """Does it all; what is refused is refused."""
    urls = {f"{name}_service_url": "http://127.0.0.1:1" for name in configured}
    keys = itertools.count()
    telling = world.settings.model_copy(update=urls)
    async with payment_service(telling, world.url, gateway=RecordingGateway(), clock=ManualClock()) as service:

        async def do(operation: Operation) -> None:
            order_id, key = base + operation.order, f"{base}:{next(keys)}"
            fields = {"amount": operation.amount, "payment_method": operation.method}
            if operation.verb == "charge":
                await service.charges.charge(request=charge_request(order_id, **fields), idempotency_key=key)
            elif operation.verb == "create":
                await service.charges.create(request=create_request(order_id, **fields))
            else:
                await _change(service, operation, await payment_id_of(operation, order_id), key)

        async def payment_id_of(operation: Operation, order_id: int) -> int:
            """The payment of the order; a refund takes one that can be refunded, where there is any."""
            paid_orders = await world.books.rows(
                "SELECT payment_id FROM payments WHERE status = 'COMPLETED' AND order_id >= %s ORDER BY 1", base
            )
            if operation.verb == "refund" and paid_orders:
                found: int = paid_orders[operation.order % len(paid_orders)]["payment_id"]
                return found
            return (await service.payments.by_order(order_id)).payment_id

        for at_once in history:
            results = await asyncio.gather(*(do(operation) for operation in at_once), return_exceptions=True)
            assert all(result is None or isinstance(result, PayError) for result in results), results


async def _change(service: PaymentService, operation: Operation, payment_id: int, key: str) -> None:
    if operation.verb == "refund":
        request = refund_request(operation.amount)
        await service.refunds.refund(payment_id=payment_id, request=request, idempotency_key=key)
    elif operation.verb == "delete":
        await service.status_changes.cancel(payment_id=payment_id)
    else:
        update = StatusUpdateRequest(status=PaymentStatus(operation.verb))
        await service.status_changes.update(payment_id=payment_id, request=update)


async def _compare(books: Books, configured: set[Destination], base: int) -> None:
    payments = await books.rows("SELECT payment_id FROM payments WHERE order_id BETWEEN %s AND %s", base, base + 9)
    for payment_id in (row["payment_id"] for row in payments):
        trail = await books.rows(
            "SELECT transaction_type, status, amount FROM transactions WHERE payment_id = %s"
            " ORDER BY transaction_log_id",
            payment_id,
        )
        expected = [
            (destination, event, f"{row['amount']} INR" if destination == "notification" else None)
            for row in trail
            if (event := EVENTS_OF_AUDIT_ROW.get((row["transaction_type"], row["status"])))
            for destination in TOLD_OF_EVENT[event]
            if destination in configured
        ]
        messages = [
            (destination, event, _amount_in(payload.get("message")))
            for destination, event, payload in await told_of(books, payment_id)
        ]
        assert messages == expected


def _amount_in(text: str | None) -> str | None:
    """The amount that a notification names."""
    if text is None:
        return None
    words = text.removeprefix("Your payment of ").split(" ")
    return " ".join(words[:2])
