"""What Stripe tells of its own accord, at POST /v1/gateway/events over real HTTP.

The events are signed as Stripe signs them and read by the product's own gateway; what that gateway is asked, it answers
from books that the test writes. The last tests take the webhooks of localstripe, sent to a real server.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from eci_pay import instruments
from eci_pay.errors import Unavailable
from eci_pay.gateways import (
    Approved,
    Declined,
    GatewayCharge,
    GatewayRefund,
    GatewayUnavailable,
    NotFound,
    Outcome,
    Unknown,
)
from eci_pay.gateways.stripe import KEY, RULED_OUT, StripeGateway
from eci_pay.instruments import start_measuring
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.door import Door
from tests.faults.proxy import HOST, Proxy
from tests.local_stripe import DECLINED_CARD, SECRET_KEY, VISA, LocalStripe, running_local_stripe
from tests.peers import Peers
from tests.support import FAULTS_IN_BOOKS, Books, CommandLine, ManualClock, Opener, RecordingGateway, Sessions, until
from tests.test_recovery import (
    TOLD_OF_FAILURE,
    TOLD_OF_PART,
    TOLD_OF_SUCCESS,
    never_happened,
    recoveries,
    refund_statuses,
    status_of,
    told,
    travel,
)
from tests.test_serving import charge, serving

EVENTS = "/v1/gateway/events"
WEBHOOK_SECRET = "whsec_0urVeryOwn"
TOO_OLD_SECONDS = 301
PAYMENT_INTENT = "pi_3OurPaymentIntent"
REFUND = "re_3OurRefund"
LOST = Unknown(message="no answer")
CARD_ERROR = {
    "type": "card_error",
    "code": "card_declined",
    "decline_code": "insufficient_funds",
    "message": "Your card has insufficient funds.",
}
REASON = "Damaged in transit"


class QuietStripe(StripeGateway):
    """Reads events as the product does. What it is asked to do ends in `answers`, once it may answer; what it did, by
    key, the test writes into `done`."""

    def __init__(self, webhook_secret: str | None = WEBHOOK_SECRET) -> None:
        super().__init__(
            secret_key=SECRET_KEY, webhook_secret=webhook_secret, api_base="http://127.0.0.1:9", timeout_seconds=1
        )
        self.answers: Outcome | GatewayUnavailable = LOST
        self.done: dict[str, str] = {}
        self.refunds: list[GatewayRefund] = []
        self.sent = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def charge(self, charge: GatewayCharge) -> Outcome:
        return await self._answer()

    async def refund(self, refund: GatewayRefund) -> Outcome:
        self.refunds.append(refund)
        return await self._answer()

    async def lookup(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        reference = self.done.get(operation.key)
        return NotFound() if reference is None else Approved(reference=reference)

    async def rule_out(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        return await self.lookup(operation)

    async def _answer(self) -> Outcome:
        self.sent.set()
        await self.may_answer.wait()
        if isinstance(self.answers, GatewayUnavailable):
            raise self.answers
        return self.answers


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Recovery looks when the test says so, and not by itself."""
    return settings.model_copy(update={"eci_pay_recovery_interval_seconds": 3600.0})


@pytest.fixture
def gateway(request: pytest.FixtureRequest) -> StripeGateway | RecordingGateway:
    """A Stripe whose answers are lost; by parameter one without a webhook secret, or the simulated gateway."""
    match getattr(request, "param", None):
        case "no secret":
            return QuietStripe(webhook_secret=None)
        case "simulated":
            return RecordingGateway()
        case _:
            return QuietStripe()


@pytest.fixture
async def service(opened: Opener, peers: Peers) -> AsyncIterator[PaymentService]:
    """The use cases that `api` serves, where all three peers are configured."""
    async with opened(**peers.settings()) as service:
        yield service


def event(kind: str, told_of: object) -> bytes:
    """An event's body, as Stripe writes it."""
    return json.dumps(
        {
            "id": "evt_1",
            "object": "event",
            "api_version": stripe.api_version,
            "created": int(time.time()),
            "data": {"object": told_of},
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": kind,
        },
        indent=2,
    ).encode()


def intent(key: str | None, status: str = "succeeded", **fields: object) -> dict[str, object]:
    """A PaymentIntent with our key, or without."""
    return {
        "id": PAYMENT_INTENT,
        "object": "payment_intent",
        "amount": 10_000,
        "currency": "inr",
        "last_payment_error": None,
        "metadata": {} if key is None else {KEY: key},
        "status": status,
        **fields,
    }


def refund_object(key: str, status: str = "succeeded", **fields: object) -> dict[str, object]:
    """A Refund with our key."""
    return {
        "id": REFUND,
        "object": "refund",
        "amount": 4_000,
        "currency": "inr",
        "metadata": {KEY: key},
        "payment_intent": PAYMENT_INTENT,
        "status": status,
        **fields,
    }


def succeeded(key: str) -> bytes:
    """The money of a charge was taken."""
    return event("payment_intent.succeeded", intent(key))


def failed(key: str, error: dict[str, str] | None = None) -> bytes:
    """A charge was declined."""
    refused = intent(key, "requires_payment_method", last_payment_error=error or CARD_ERROR)
    return event("payment_intent.payment_failed", refused)


def signature(body: bytes, secret: str = WEBHOOK_SECRET, age_seconds: int = 0) -> str:
    """The header that Stripe sends along."""
    timestamp = int(time.time()) - age_seconds
    header: str = stripe.WebhookSignature.generate_signature_header(body.decode(), secret, timestamp)
    return header


@pytest.fixture(autouse=True)
def _none_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the process begin anew with each test."""
    monkeypatch.setattr(instruments, "_instruments", None)
    start_measuring()


def refused() -> float:
    """How many events were refused."""
    return start_measuring().get_sample_value("eci_pay_gateway_events_refused_total") or 0


async def send(client: httpx.AsyncClient, body: bytes, signed: str | None = None) -> httpx.Response:
    """Delivers an event as Stripe does."""
    headers = {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": signed or signature(body)}
    return await client.post(EVENTS, content=body, headers=headers)


async def take(client: httpx.AsyncClient, body: bytes) -> None:
    """Delivers an event, which is taken."""
    answer = await send(client, body)
    assert (answer.status_code, answer.text) == (200, '{"received":true}')


async def charge_key(books: Books, order_id: int = 1, attempt: int = 1) -> str:
    """The key that Stripe was given for an order's charge."""
    return f"{await books.value('SELECT transaction_id FROM payments WHERE order_id = %s', order_id)}-{attempt}"


async def refund_key(books: Books) -> str:
    """The key that Stripe was given for the only refund."""
    return str(
        await books.value("SELECT transaction_id || '-R' || refund_id FROM refunds JOIN payments USING (payment_id)")
    )


async def unknown_charge(api: httpx.AsyncClient, books: Books, order_id: int = 1) -> str:
    """A charge whose answer is lost; its key at Stripe."""
    assert (await charge(api, order_id, f"k{order_id}", payment_token=VISA)).status_code == 202
    return await charge_key(books, order_id)


async def replayed(api: httpx.AsyncClient, order_id: int = 1) -> httpx.Response:
    """The answer of that charge's idempotency key, which is the same whenever it is asked for."""
    first, later = [await charge(api, order_id, f"k{order_id}", payment_token=VISA) for _ in range(2)]
    assert (first.status_code, first.content) == (later.status_code, later.content)
    assert first.headers.get("Idempotent-Replayed") == later.headers.get("Idempotent-Replayed") == "true"
    return first


async def paid(api: httpx.AsyncClient, gateway: QuietStripe) -> int:
    """A payment whose money Stripe has taken; its answers are lost from then on."""
    gateway.answers = Approved(reference=PAYMENT_INTENT)
    answer = await charge(api, payment_token=VISA)
    gateway.answers = LOST
    assert answer.status_code == 201
    return int(answer.json()["payment_id"])


async def refund(api: httpx.AsyncClient, payment_id: int, amount: str | None = "40.00") -> httpx.Response:
    """Refunds over HTTP."""
    body = {"reason": REASON} if amount is None else {"reason": REASON, "amount": amount}
    return await api.post(f"/v1/payments/{payment_id}/refund", json=body, headers={"Idempotency-Key": "refund"})


async def everything(books: Books) -> list[list[dict[str, Any]]]:
    """All that is recorded."""
    tables = ("payments", "transactions", "refunds", "idempotency_keys", "outbox", "recoveries")
    return [await books.rows(f"SELECT * FROM {table} ORDER BY 1") for table in tables]


# 1. What is unknown is settled at once


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_an_event_settles_an_unknown_charge_with_all_that_belongs_to_it(
    api: httpx.AsyncClient, service: PaymentService, books: Books, outcome: str
) -> None:
    key = await unknown_charge(api, books)
    assert await told(books) == []
    await take(api, succeeded(key) if outcome == "succeeded" else failed(key))
    status = "COMPLETED" if outcome == "succeeded" else "FAILED"
    payment_id = await books.value("SELECT payment_id FROM payments")
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", status)]
    assert await told(books) == (TOLD_OF_SUCCESS if outcome == "succeeded" else TOLD_OF_FAILURE)
    replay = await replayed(api)
    if outcome == "succeeded":
        shown = await api.get(f"/v1/payments/{payment_id}")
        assert (replay.status_code, replay.content) == (201, shown.content)
        assert replay.json()["authorization_code"] == PAYMENT_INTENT
    else:
        problem = replay.json()
        assert (replay.status_code, problem["decline_code"]) == (402, "insufficient_funds")
        assert problem["detail"] == CARD_ERROR["message"]
    assert await service.recovery.open() == []
    assert refused() == 0
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize(
    ("kind", "fields", "status"),
    [
        ("refund.created", {}, "COMPLETED"),
        ("refund.updated", {}, "COMPLETED"),
        ("refund.failed", {"status": "failed", "failure_reason": "lost_or_stolen_card"}, "FAILED"),
        ("refund.updated", {"status": "canceled"}, "FAILED"),
    ],
)
async def test_an_event_settles_an_unknown_refund(
    api: httpx.AsyncClient, books: Books, gateway: QuietStripe, *, kind: str, fields: dict[str, str], status: str
) -> None:
    payment_id = await paid(api, gateway)
    assert (await refund(api, payment_id)).status_code == 202
    await take(api, event(kind, refund_object(await refund_key(books), **fields)))
    assert await refund_statuses(books) == [status]
    trail = (await books.audit_trail(payment_id))[2:]
    replay, later = await refund(api, payment_id), await refund(api, payment_id)
    assert replay.content == later.content
    if status == "COMPLETED":
        assert (replay.status_code, trail) == (200, [("REFUND", "PROCESSING"), ("REFUND", "REFUNDED")])
        assert await books.value("SELECT gateway_reference FROM refunds") == REFUND
        assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
    else:
        assert (replay.status_code, trail) == (402, [("REFUND", "PROCESSING"), ("REFUND", "FAILED")])
        assert replay.json()["decline_code"] == fields.get("failure_reason", "canceled")
        assert await told(books) == TOLD_OF_SUCCESS
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "at once"])
@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_an_event_that_arrives_again_changes_nothing(
    api: httpx.AsyncClient, books: Books, outcome: str, at_once: bool
) -> None:
    key = await unknown_charge(api, books)
    body = succeeded(key) if outcome == "succeeded" else failed(key)
    if at_once:
        await asyncio.gather(*[take(api, body) for _ in range(10)])
        before = await everything(books)
    else:
        await take(api, body)
        before = await everything(books)
        await take(api, body)
    assert await everything(books) == before
    assert len(await books.audit_trail(await books.value("SELECT payment_id FROM payments"))) == 2
    assert await told(books) == (TOLD_OF_SUCCESS if outcome == "succeeded" else TOLD_OF_FAILURE)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("answer", ["approved", "declined", "unknown"])
async def test_an_event_that_comes_before_the_answer_settles_and_the_request_tells_the_same(
    api: httpx.AsyncClient, books: Books, gateway: QuietStripe, answer: str
) -> None:
    gateway.may_answer.clear()
    charging = asyncio.create_task(charge(api, 1, "k1", payment_token=VISA))
    await gateway.sent.wait()
    key = await charge_key(books)
    match answer:
        case "approved":
            gateway.answers = Approved(reference=PAYMENT_INTENT)
        case "declined":
            gateway.answers = Declined(code="insufficient_funds", message=CARD_ERROR["message"])
        case _:
            gateway.answers = LOST
    await take(api, failed(key) if answer == "declined" else succeeded(key))
    assert not charging.done()
    gateway.may_answer.set()
    answered = await charging
    replay = await replayed(api)
    assert (answered.status_code, answered.content) == (replay.status_code, replay.content)
    assert answered.status_code == (402 if answer == "declined" else 201)
    status = "FAILED" if answer == "declined" else "COMPLETED"
    payment_id = await books.value("SELECT payment_id FROM payments")
    assert await books.audit_trail(payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", status)]
    assert await told(books) == (TOLD_OF_FAILURE if answer == "declined" else TOLD_OF_SUCCESS)
    assert await recoveries(books) == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_refunds_event_that_comes_before_the_answer_settles_and_the_request_tells_the_same(
    api: httpx.AsyncClient, books: Books, gateway: QuietStripe
) -> None:
    payment_id = await paid(api, gateway)
    gateway.sent.clear()
    gateway.may_answer.clear()
    refunding = asyncio.create_task(refund(api, payment_id))
    await gateway.sent.wait()
    gateway.answers = Approved(reference=REFUND)
    await take(api, event("refund.created", refund_object(await refund_key(books))))
    gateway.may_answer.set()
    answered, replay = await refunding, await refund(api, payment_id)
    assert (answered.status_code, answered.content) == (200, replay.content)
    assert (await books.audit_trail(payment_id))[2:] == [("REFUND", "PROCESSING"), ("REFUND", "REFUNDED")]
    assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_events_and_answers_that_race_settle_every_charge_once(
    api: httpx.AsyncClient, books: Books, gateway: QuietStripe
) -> None:
    orders = range(1, 21)
    gateway.may_answer.clear()
    gateway.answers = Approved(reference=PAYMENT_INTENT)
    charging = [asyncio.create_task(charge(api, order, f"k{order}", payment_token=VISA)) for order in orders]

    async def all_begun() -> bool:
        return bool(await books.value("SELECT count(*) FROM payments WHERE status = 'PROCESSING'") == len(orders))

    await until(all_begun)
    bodies = [succeeded(await charge_key(books, order)) for order in orders]
    gateway.may_answer.set()
    await asyncio.gather(*[take(api, body) for body in bodies])
    for order, answer in zip(orders, await asyncio.gather(*charging), strict=True):
        replay = await replayed(api, order)
        assert (answer.status_code, answer.content) == (201, replay.content)
    assert await books.value("SELECT count(*) FROM transactions") == 2 * len(orders)
    assert await recoveries(books) == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize(
    ("error", "decline_code"),
    [
        ({"type": "card_error", "code": "expired_card", "message": "Your card has expired."}, "expired_card"),
        ({"type": "api_error", "message": "Something went wrong."}, "declined"),
        ({"type": "card_error", "code": "card_declined"}, "card_declined"),
        ({**CARD_ERROR, "message": "No. " * 300}, "insufficient_funds"),
        ({**CARD_ERROR, "message": "No.\0"}, "insufficient_funds"),
        ({**CARD_ERROR, "decline_code": "x" * 80}, "x" * 50),
    ],
    ids=["no decline code", "no code", "no message", "long message", "zero byte", "long code"],
)
async def test_a_decline_settles_whatever_stripe_says_of_the_reason(
    api: httpx.AsyncClient, books: Books, error: dict[str, str], decline_code: str
) -> None:
    """Stripe leaves out what an error does not have, and its texts have no limit that we know."""
    await take(api, failed(await unknown_charge(api, books), error))
    assert await status_of(books) == "FAILED"
    assert (await replayed(api)).json()["decline_code"] == decline_code
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 2. What is not from Stripe is refused


def by_bytes(body: bytes) -> str:
    """The signature of a body that is no text."""
    timestamp = int(time.time())
    digest = hmac.new(WEBHOOK_SECRET.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


REFUSED = (
    "no header",
    "empty header",
    "nonsense in the header",
    "not signed",
    "signature of another body",
    "signature of another secret",
    "too old",
    "no JSON",
    "no text",
    "nothing",
    "null",
    "a list",
    "a string",
    "an empty object",
    "no event",
    "no data",
    "data of another kind",
)


def refused_request(key: str, how: str) -> tuple[bytes, str | None]:  # noqa: PLR0911
    """A body and its signature, of which one is no good."""
    body = succeeded(key)
    odd_bodies = {
        "no JSON": b"{payment: succeeded}",
        "no text": b"\xff\xfe",
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"payment_intent.succeeded"',
        "an empty object": b"{}",
        "no event": json.dumps(intent(key)).encode(),
        "no data": b'{"id": "evt_1", "object": "event", "type": "payment_intent.succeeded"}',
        "data of another kind": event("payment_intent.succeeded", f"{KEY}: {key}"),
    }
    match how:
        case "no header":
            return body, None
        case "empty header":
            return body, ""
        case "nonsense in the header":
            return body, "I am Stripe, honestly"
        case "not signed":
            return body, f"t={int(time.time())},v1=" + "0" * 64
        case "signature of another body":
            return body, signature(failed(key))
        case "signature of another secret":
            return body, signature(body, "whsec_ofSomebodyElse")
        case "too old":
            return body, signature(body, age_seconds=TOO_OLD_SECONDS)
        case _:
            return odd_bodies[how], by_bytes(odd_bodies[how])


@pytest.mark.parametrize("how", REFUSED)
async def test_what_stripe_has_not_signed_or_is_no_event_is_refused_and_changes_nothing(
    api: httpx.AsyncClient,
    service: PaymentService,
    books: Books,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    key = await unknown_charge(api, books)
    before = await everything(books)
    body, signed = refused_request(key, how)
    headers = {"Content-Type": "application/json"} | ({} if signed is None else {"Stripe-Signature": signed})
    for number in (1, 2):
        answer = await api.post(EVENTS, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "event-refused"), answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert refused() == number
    assert WEBHOOK_SECRET not in answer.text + caplog.text
    assert caplog.text.count("refused an event: ") == 2
    assert await everything(books) == before
    await take(api, succeeded(key))
    assert (await status_of(books), refused()) == ("COMPLETED", 2)


@pytest.mark.parametrize("gateway", ["no secret", "simulated"], indirect=True)
async def test_events_are_refused_where_nothing_can_sign_them(
    api: httpx.AsyncClient, service: PaymentService, books: Books
) -> None:
    await charge(api, 1, "k1", payment_token=VISA, amount="4000.08")
    before = await everything(books)
    body = succeeded(await charge_key(books))
    for signed in (signature(body), signature(body, "")):
        answer = await send(api, body, signed)
        assert (answer.status_code, answer.json()["code"]) == (400, "event-refused")
    assert refused() == 2
    assert await status_of(books) == "PROCESSING"
    assert await everything(books) == before


async def test_an_event_may_be_almost_five_minutes_old(api: httpx.AsyncClient, books: Books) -> None:
    body = succeeded(await unknown_charge(api, books))
    assert (await send(api, body, signature(body, age_seconds=TOO_OLD_SECONDS - 11))).status_code == 200
    assert await status_of(books) == "COMPLETED"


# 3. What is none of our business is taken, and changes nothing


def unrelated(key: str, refund_key: str) -> dict[str, bytes]:
    """Events that settle nothing, though the charge with `key` and the refund with `refund_key` are unknown."""
    charge_of, refund_of = key.rpartition("-")[0], refund_key.rpartition("-")[0]
    moon = {"id": "moon_1", "object": "moon", "status": "succeeded", "metadata": {KEY: key}}
    ruled_out = intent(key, "canceled", metadata={KEY: key, RULED_OUT: "yes"})
    return {
        "no key": event("payment_intent.succeeded", intent(None)),
        "no metadata": event("payment_intent.succeeded", {**intent(key), "metadata": None}),
        "another's key": succeeded("order 1"),
        "a key that was given back": succeeded(f"{key}-LATE"),
        "an unknown payment": succeeded(f"TXN{'0' * 26}-1"),
        "an unknown refund": event("refund.created", refund_object(f"{refund_of}-R{'9' * 18}")),
        "another payment's refund": event("refund.created", refund_object(f"{charge_of}-{refund_key[-2:]}")),
        "a pending refund": event("refund.created", refund_object(refund_key, "pending")),
        "a charge": event("charge.succeeded", {**intent(key), "id": "ch_1", "object": "charge"}),
        "a balance": event("balance.available", {"object": "balance", "available": [], "livemode": False}),
        "an object nobody knows": event("moon.risen", moon),
        "ruled out": event("payment_intent.canceled", ruled_out),
        "created": event("payment_intent.created", intent(key, "requires_payment_method")),
        "processing": event("payment_intent.processing", intent(key, "processing")),
        "requires action": event("payment_intent.requires_action", intent(key, "requires_action")),
    }


@pytest.mark.parametrize("what", list(unrelated("TXN-1", "TXN-R1")))
async def test_an_event_that_settles_nothing_is_taken_and_changes_nothing(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: QuietStripe, what: str
) -> None:
    assert (await refund(api, await paid(api, gateway))).status_code == 202
    key = await unknown_charge(api, books, 2)
    before = await everything(books)
    await take(api, unrelated(key, await refund_key(books))[what])
    assert await everything(books) == before
    assert refused() == 0


async def test_an_event_about_what_is_settled_already_changes_nothing(
    api: httpx.AsyncClient, books: Books, gateway: QuietStripe
) -> None:
    await paid(api, gateway)
    before = await everything(books)
    key = await charge_key(books)
    for body in (succeeded(key), failed(key), event("payment_intent.canceled", intent(key, "canceled"))):
        await take(api, body)
    assert await everything(books) == before


# 4. What contradicts the books is looked at again


@pytest.mark.parametrize("is_watched", [True, False], ids=["while it is watched", "after that"])
async def test_money_that_an_event_tells_of_after_its_charge_never_happened_is_given_back_once(
    api: httpx.AsyncClient,
    service: PaymentService,
    books: Books,
    clock: ManualClock,
    gateway: QuietStripe,
    *,
    is_watched: bool,
) -> None:
    key = await unknown_charge(api, books)
    await never_happened(service, books, clock)
    if not is_watched:
        await travel(books, hours=1)
        await service.recovery.run_once()
        assert await recoveries(books) == [("DONE", "never happened")]
    gateway.done[key], gateway.answers = PAYMENT_INTENT, Approved(reference=REFUND)
    before = await replayed(api)
    await take(api, succeeded(key))
    await service.recovery.run_once()
    assert await recoveries(books) == [("DONE", f"taken late, given back: {REFUND}")]
    for _ in range(2):
        await take(api, succeeded(key))
        await travel(books)
        await service.recovery.run_once()
    given_back = [(made.key, made.charge_reference, made.amount) for made in gateway.refunds]
    assert given_back == [(f"{key}-LATE", PAYMENT_INTENT, Decimal(100))]
    assert (await status_of(books), (await replayed(api)).content) == ("FAILED", before.content)
    assert await told(books) == TOLD_OF_FAILURE
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_late_event_of_an_attempt_whose_order_was_paid_since_gives_back_that_attempt_alone(
    api: httpx.AsyncClient, service: PaymentService, books: Books, clock: ManualClock, gateway: QuietStripe
) -> None:
    key = await unknown_charge(api, books)
    await never_happened(service, books, clock)
    gateway.answers = Approved(reference="pi_of_the_second_attempt")
    assert (await charge(api, 1, "another", payment_token=VISA)).status_code == 201
    gateway.done[key], gateway.answers = PAYMENT_INTENT, Approved(reference=REFUND)
    await take(api, succeeded(key))
    await service.recovery.run_once()
    assert [(made.key, made.charge_reference) for made in gateway.refunds] == [(f"{key}-LATE", PAYMENT_INTENT)]
    assert await books.rows("SELECT status, authorization_code, refunded_amount FROM payments") == [
        {"status": "COMPLETED", "authorization_code": "pi_of_the_second_attempt", "refunded_amount": 0}
    ]
    assert await told(books) == TOLD_OF_FAILURE + TOLD_OF_SUCCESS
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("is_watched", [True, False], ids=["while it is watched", "after that"])
async def test_a_refund_that_an_event_tells_of_after_it_never_happened_is_booked_again(
    api: httpx.AsyncClient,
    service: PaymentService,
    books: Books,
    clock: ManualClock,
    gateway: QuietStripe,
    *,
    is_watched: bool,
) -> None:
    payment_id = await paid(api, gateway)
    assert (await refund(api, payment_id)).status_code == 202
    key = await refund_key(books)
    await never_happened(service, books, clock)
    assert await refund_statuses(books) == ["FAILED"]
    if not is_watched:
        await travel(books, hours=1)
        await service.recovery.run_once()
    gateway.done[key] = REFUND
    body = event("refund.updated", refund_object(key))
    await take(api, body)
    await service.recovery.run_once()
    assert await refund_statuses(books) == ["COMPLETED"]
    assert (await books.audit_trail(payment_id))[2:] == [
        ("REFUND", status) for status in ("PROCESSING", "FAILED", "PROCESSING", "REFUNDED")
    ]
    assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
    before = await everything(books)
    await take(api, body)
    assert await everything(books) == before
    assert (await books.value("SELECT refunded_amount FROM payments"), len(gateway.refunds)) == (40, 1)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("booked", ["declined", "not sent"])
async def test_money_that_an_event_tells_of_after_its_charge_was_answered_as_failed_is_given_back_once(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: QuietStripe, booked: str
) -> None:
    """Stripe should not do that; if it does, the shopper has paid for what we call failed, and nobody else knows."""
    if booked == "declined":
        gateway.answers = Declined(code="card_declined", message="Your card was declined.")
    else:
        gateway.answers = GatewayUnavailable("refused")
    answer = await charge(api, 1, "k1", payment_token=VISA)
    assert (answer.status_code, await status_of(books)) == (402 if booked == "declined" else 503, "FAILED")
    key = await charge_key(books)
    gateway.done[key], gateway.answers = PAYMENT_INTENT, Approved(reference=REFUND)
    for _ in range(2):
        await take(api, succeeded(key))
        await travel(books)
        await service.recovery.run_once()
    assert [(made.key, made.charge_reference) for made in gateway.refunds] == [(f"{key}-LATE", PAYMENT_INTENT)]
    assert await status_of(books) == "FAILED"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 5. The database is away


async def test_an_event_is_asked_for_again_while_the_database_is_away(
    opened: Opener, door: Door, api: httpx.AsyncClient, books: Books
) -> None:
    body = succeeded(await unknown_charge(api, books))
    async with (
        door.opened() as url,
        opened(
            url=url,
            gateway=QuietStripe(),
            eci_pay_settle_retry_seconds=0.5,
            eci_pay_database_pool_timeout_seconds=0.5,
        ) as far,
    ):
        door.shut()
        with pytest.raises(Unavailable):
            await far.gateway_events.take(body, signature(body))
        assert (await status_of(books), refused()) == ("PROCESSING", 0)
    await take(api, body)
    assert await status_of(books) == "COMPLETED"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_an_event_is_asked_for_again_where_it_could_not_be_booked(
    opened: Opener, api: httpx.AsyncClient, books: Books, sessions: Sessions
) -> None:
    """Stripe repeats for days what is not answered by 2xx, and never what is."""
    body = succeeded(await unknown_charge(api, books))
    holder = await sessions()
    await holder.execute("SELECT FROM payments FOR UPDATE")
    async with opened(
        gateway=QuietStripe(), eci_pay_settle_retry_seconds=0.2, eci_pay_lock_timeout_seconds=0.2
    ) as hindered:
        with pytest.raises(Unavailable):
            await hindered.gateway_events.take(body, signature(body))
    await holder.rollback()
    assert await status_of(books) == "PROCESSING"
    await take(api, body)
    assert await status_of(books) == "COMPLETED"


# 6. Webhooks of localstripe, to a real server


@pytest.fixture(scope="module")
def running_stripe() -> Iterator[LocalStripe]:
    """localstripe, for the tests that use it."""
    with running_local_stripe() as running:
        yield running


@pytest.fixture
async def account(running_stripe: LocalStripe) -> AsyncIterator[LocalStripe]:
    """An empty account of localstripe; in the end, it sends webhooks to nobody."""
    await running_stripe.forget_everything()
    yield running_stripe
    await running_stripe.send_webhooks("http://127.0.0.1:9", WEBHOOK_SECRET, [])


@pytest.fixture
async def line(account: LocalStripe) -> AsyncIterator[Proxy]:
    """A connection to Stripe that the test can break."""
    async with Proxy(HOST, account.port).running() as proxy:
        yield proxy


@pytest.fixture
def stripe_command_line(command_line: CommandLine, line: Proxy, tmp_path: Path) -> CommandLine:
    """The installed command, which reaches Stripe over `line`, and leaves what is unknown to webhooks."""
    (tmp_path / "webhook secret").write_text(WEBHOOK_SECRET)
    stripe_settings = {
        "ECI_PAY_GATEWAY": "stripe",
        "ECI_PAY_STRIPE_API_BASE": f"http://{HOST}:{line.port}",
        "ECI_PAY_STRIPE_SECRET_KEY": SECRET_KEY,
        "ECI_PAY_STRIPE_WEBHOOK_SECRET_FILE": str(tmp_path / "webhook secret"),
        "ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS": "3600",
    }
    return CommandLine({**command_line.environment, **stripe_settings}, tmp_path)


@pytest.mark.parametrize(("token", "status"), [(VISA, "COMPLETED"), (DECLINED_CARD, "FAILED")])
async def test_a_charge_whose_answer_was_lost_is_settled_by_localstripes_own_webhook(
    stripe_command_line: CommandLine, books: Books, account: LocalStripe, line: Proxy, *, token: str, status: str
) -> None:
    async with serving(stripe_command_line) as server, server.client() as client:
        kinds = ["payment_intent.succeeded", "payment_intent.payment_failed"]
        await account.send_webhooks(f"{server.address}{EVENTS}", WEBHOOK_SECRET, kinds)
        line.cut_after_bytes(0)
        assert (await charge(client, payment_token=token)).status_code == 202
        await until(lambda: books.rows("SELECT 1 FROM payments WHERE status <> 'PROCESSING'"))
        replay, later = [await charge(client, payment_token=token) for _ in range(2)]
        log = "\n".join(server.log)
    [made] = await account.intents()
    assert await status_of(books) == status
    assert replay.content == later.content
    if status == "COMPLETED":
        assert (replay.status_code, replay.json()["authorization_code"]) == (201, made["id"])
    else:
        assert (replay.status_code, replay.json()["decline_code"]) == (402, "card_declined")
    assert [row for _, row in await books.audit_trail(replay.json()["payment_id"])] == ["PROCESSING", status]
    assert await recoveries(books) == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    for hidden in (WEBHOOK_SECRET, SECRET_KEY, token, "Traceback"):
        assert hidden not in log


async def test_localstripes_webhook_for_what_was_answered_changes_nothing_and_one_with_another_secret_is_refused(
    stripe_command_line: CommandLine, books: Books, account: LocalStripe
) -> None:
    async with serving(stripe_command_line) as server, server.client() as client:
        for order_id, (secret, status) in enumerate([(WEBHOOK_SECRET, 200), ("whsec_wrong", 400)], 1):
            await account.send_webhooks(f"{server.address}{EVENTS}", secret, ["payment_intent.succeeded"])
            answer = await charge(client, order_id, f"k{order_id}", payment_token=VISA)
            assert answer.status_code == 201
            before = await everything(books)

            async def delivered(number: int = order_id) -> bool:
                return len(_requests_with_events(server.log)) == number

            await until(delivered)
            assert _requests_with_events(server.log)[-1]["status"] == status
            assert await everything(books) == before
            assert (await charge(client, order_id, f"k{order_id}", payment_token=VISA)).content == answer.content
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


def _requests_with_events(log: list[str]) -> list[dict[str, Any]]:
    """The lines that a server has logged about events."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in log]
    return [line for line in lines if line["event"] == "request" and line["path"] == EVENTS]
