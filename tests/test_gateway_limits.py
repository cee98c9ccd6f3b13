"""A gateway that is down or busy: who is refused before anything is recorded, who is not, and that it passes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

import httpx
import pytest

from eci_pay import gateway_calls
from eci_pay.answers import Answer
from eci_pay.breaker import FAILURES_MAX, JITTER, OPEN_SECONDS_FIRST, Breaker
from eci_pay.errors import IdempotencyKeyReused, OrderAlreadyPaid, RefundExceedsBalance, Unavailable
from eci_pay.gateway_calls import GatewayCalls
from eci_pay.gateways import GatewayCharge, GatewayRefund, GatewayUnavailable, Outcome, Unknown
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.door import Door
from tests.rows import paid
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    ManualClock,
    Opener,
    RecordingGateway,
    Sessions,
    charge_fields,
    charge_request,
    create_request,
    names,
    refund_request,
    until,
    until_lock_waits,
)
from tests.test_breaker import Seconds, fail_all

LONGER_THAN_ANY_WAIT = 60.0
"""A test that has to wait for so long has failed."""
FIRST_WAIT_SECONDS = (1 + JITTER) * OPEN_SECONDS_FIRST + 0.001
"""After so long a breaker that has just opened lets a probe through."""
DECLINED_AMOUNT = "4000.02"

Limits = dict[str, object]
Told = TypeVar("Told")


class Mood(Enum):
    """How a gateway behaves."""

    WORKS = auto()
    HANGS = auto()
    SAYS_NOTHING = auto()
    UNREACHABLE = auto()
    BREAKS = auto()


DOWN = [Mood.SAYS_NOTHING, Mood.UNREACHABLE, Mood.BREAKS]


class Moody(RecordingGateway):
    """Behaves as its mood is, or as an amount says; knows how many requests are with it at once, and can hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.mood = Mood.WORKS
        self.mood_of_amount: dict[Decimal, Mood] = {}
        self.at_once = 0
        self.at_once_max = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    @property
    def asked(self) -> int:
        """How often it was asked to move money."""
        return len(self.charges) + len(self.refunds)

    async def charge(self, charge: GatewayCharge) -> Outcome:
        return await self._in_its_mood(charge, super().charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        return await self._in_its_mood(refund, super().refund)

    async def holds(self, number: int) -> None:
        """Waits until so many requests are with it at once."""

        async def reached() -> bool:
            return self.at_once == number

        await until(reached)

    async def _in_its_mood(self, operation: Any, act: Callable[[Any], Awaitable[Outcome]]) -> Outcome:
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            outcome = await act(operation)
            await self.may_answer.wait()
            match self.mood_of_amount.get(operation.amount, self.mood):
                case Mood.HANGS:
                    await asyncio.Event().wait()
                case Mood.SAYS_NOTHING:
                    return Unknown(message="no answer")
                case Mood.UNREACHABLE:
                    raise GatewayUnavailable("refused")
                case Mood.BREAKS:
                    raise KeyError("amount")
            return outcome
        finally:
            self.at_once -= 1


@pytest.fixture
def limits() -> Limits:
    """The settings that a test gives the service, by parametrizing this."""
    return {}


@pytest.fixture
def settings(settings: Settings, limits: Limits) -> Settings:
    """With the test's limits."""
    return settings.model_copy(update=limits)


@pytest.fixture
def gateway() -> Moody:
    """The gateway of `service`, `opened` and `api`."""
    return Moody()


@pytest.fixture
def seconds(service: PaymentService) -> Seconds:
    """The clock of the breaker of `service`."""
    return stopped_breaker(service)


def stopped_breaker(service: PaymentService) -> Seconds:
    """Gives a service a breaker whose time is moved by hand."""
    seconds = Seconds()
    service.charges.gateway._breaker = Breaker(seconds)
    return seconds


def with_limits(**limits: object) -> pytest.MarkDecorator:
    """Gives `service` and `api` these settings."""
    return pytest.mark.parametrize("limits", [{f"eci_pay_gateway_{name}": value for name, value in limits.items()}])


async def charged(service: PaymentService, order_id: int, key: str | None = None, **fields: object) -> Answer:
    """Charges an order."""
    request = charge_request(order_id, **fields)
    return await service.charges.charge(request=request, idempotency_key=key or f"charge {order_id}")


async def refunded(
    service: PaymentService, payment_id: int, amount: str | None = None, key: str | None = None
) -> Answer:
    """Refunds a payment."""
    return await service.refunds.refund(payment_id=payment_id, request=refund_request(amount), idempotency_key=key)


async def post_charge(api: httpx.AsyncClient, order_id: int, key: str, **fields: object) -> httpx.Response:
    """Charges an order over HTTP."""
    body = charge_fields(order_id, **fields)
    return await api.post("/v1/payments/charge", json=body, headers={"Idempotency-Key": key})


async def post_refund(api: httpx.AsyncClient, payment_id: int, key: str = "refund", **fields: object) -> httpx.Response:
    """Refunds a payment over HTTP."""
    body = {"reason": "Damaged in transit", **fields}
    return await api.post(f"/v1/payments/{payment_id}/refund", json=body, headers={"Idempotency-Key": key})


async def outcomes(*work: Awaitable[Answer]) -> list[Answer | BaseException]:
    """What each comes to, all at once."""
    return await asyncio.gather(*work, return_exceptions=True)


async def fail_charges(service: PaymentService, gateway: Moody, mood: Mood, count: int, first_order: int = 100) -> None:
    """That many charges of different orders, one after the other, of which the gateway answers none."""
    gateway.mood = mood
    for order_id in range(first_order, first_order + count):
        [outcome] = await outcomes(charged(service, order_id))
        if mood is Mood.UNREACHABLE:
            assert isinstance(outcome, Unavailable)
        else:
            assert isinstance(outcome, Answer)
            assert outcome.is_unknown
    gateway.mood = Mood.WORKS


async def open_breaker(service: PaymentService, gateway: Moody) -> None:
    """Lets the gateway fail until requests are refused; it works again, though nobody has noticed."""
    await fail_charges(service, gateway, Mood.SAYS_NOTHING, FAILURES_MAX)


async def recorded(books: Books) -> dict[str, Any]:
    """How much there is in the books, and when it changed last: equal where nothing was recorded."""
    [row] = await books.rows(
        "SELECT (SELECT count(*) FROM payments) AS payments, (SELECT max(updated_at) FROM payments) AS updated_at,"
        " (SELECT count(*) FROM transactions) AS audit_rows, (SELECT count(*) FROM refunds) AS refunds,"
        " (SELECT count(*) FROM idempotency_keys) AS keys, (SELECT count(*) FROM outbox) AS messages"
    )
    return row


@asynccontextmanager
async def changes_nothing(books: Books, gateway: Moody) -> AsyncIterator[None]:
    """Neither are the books changed meanwhile, nor is the gateway asked."""
    before, asked = await recorded(books), gateway.asked
    yield
    assert await recorded(books) == before
    assert gateway.asked == asked


async def assert_refused(work: Awaitable[Answer]) -> None:
    """It is unavailable, and that without a long wait."""
    async with asyncio.timeout(LONGER_THAN_ANY_WAIT / 4):
        with pytest.raises(Unavailable, match="nothing was sent"):
            await work


async def assert_all_places_are_free(service: PaymentService, gateway: Moody, places: int) -> None:
    """As many charges as there are places get to the gateway at once, and one more does not."""
    gateway.may_answer.clear()
    gateway.at_once_max = 0
    charging = [asyncio.create_task(charged(service, order_id)) for order_id in range(9000, 9001 + places)]
    await gateway.holds(places)
    gateway.may_answer.set()
    assert names(await asyncio.gather(*charging)) == {"201": places + 1}
    assert gateway.at_once_max == places


# 1. What opens the breaker


@pytest.mark.parametrize("mood", DOWN)
async def test_ten_different_charges_that_fail_stop_the_next_before_anything_is_recorded(
    service: PaymentService, books: Books, gateway: Moody, seconds: Seconds, mood: Mood
) -> None:
    [payment_id] = await paid(service, 1)
    await fail_charges(service, gateway, mood, FAILURES_MAX)
    async with changes_nothing(books, gateway):
        await assert_refused(charged(service, 2))
        await assert_refused(charged(service, 2, payment_method="UPI"))
        await assert_refused(refunded(service, payment_id, key="refund"))
        await assert_refused(refunded(service, payment_id))
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@with_limits(timeout_seconds=0.05)
async def test_ten_timeouts_stop_the_next(
    service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    await fail_charges(service, gateway, Mood.HANGS, FAILURES_MAX)
    async with changes_nothing(books, gateway):
        await assert_refused(charged(service, 2))


async def test_ten_different_refunds_that_fail_stop_the_next_charge(
    service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    payment_ids = await paid(service, *range(1, 1 + FAILURES_MAX))
    gateway.mood = Mood.SAYS_NOTHING
    assert all([(await refunded(service, payment_id)).is_unknown for payment_id in payment_ids])
    async with changes_nothing(books, gateway):
        await assert_refused(charged(service, 100))


async def test_over_http_they_are_told_503_and_when_to_come_back(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    [payment_id] = await paid(service, 1)
    await open_breaker(service, gateway)
    async with changes_nothing(books, gateway):
        charge, refund = await post_charge(api, 2, "k"), await post_refund(api, payment_id)
    for refused in (charge, refund):
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) > 0
    assert (await api.get("/v1/payments/order/2")).status_code == 404
    seconds.now += FIRST_WAIT_SECONDS
    charge, refund = await post_charge(api, 2, "k"), await post_refund(api, payment_id)
    assert (charge.status_code, refund.status_code) == (201, 200)
    assert "Idempotent-Replayed" not in charge.headers


@pytest.mark.parametrize("mood", DOWN)
async def test_nine_failures_stop_nobody_nor_do_eighteen_with_a_success_in_between(
    service: PaymentService, gateway: Moody, seconds: Seconds, mood: Mood
) -> None:
    await fail_charges(service, gateway, mood, FAILURES_MAX - 1)
    assert (await charged(service, 1)).status_code == 201
    await fail_charges(service, gateway, mood, FAILURES_MAX - 1, first_order=200)
    assert (await charged(service, 2)).status_code == 201


async def test_a_gateway_that_declines_is_not_down(service: PaymentService, gateway: Moody, seconds: Seconds) -> None:
    declined = [(await charged(service, n, amount=DECLINED_AMOUNT)).status_code for n in range(1, 2 * FAILURES_MAX)]
    assert set(declined) == {402}
    await fail_charges(service, gateway, Mood.SAYS_NOTHING, FAILURES_MAX - 1)
    assert (await charged(service, 50, amount=DECLINED_AMOUNT)).status_code == 402
    await fail_charges(service, gateway, Mood.SAYS_NOTHING, FAILURES_MAX - 1, first_order=200)
    assert (await charged(service, 51)).status_code == 201


async def test_one_key_whose_outcome_is_unknown_counts_once_however_often_it_is_repeated(
    service: PaymentService, gateway: Moody, seconds: Seconds
) -> None:
    gateway.mood = Mood.SAYS_NOTHING
    answers = [await charged(service, 1) for _ in range(2 * FAILURES_MAX)]
    assert (names(answers), gateway.asked) == ({"202": 2 * FAILURES_MAX}, 1)
    gateway.mood = Mood.WORKS
    assert (await charged(service, 2)).status_code == 201


async def test_one_key_that_never_reaches_the_gateway_counts_once_however_often_it_is_repeated(
    service: PaymentService, gateway: Moody, seconds: Seconds
) -> None:
    """One order that always fails is no outage: it must not stop the others."""
    gateway.mood_of_amount = {Decimal("13.00"): Mood.UNREACHABLE}
    for _ in range(FAILURES_MAX):
        with pytest.raises(Unavailable):
            await charged(service, 1, amount="13.00")
    assert (await charged(service, 2)).status_code == 201


async def test_one_key_of_ours_that_the_gateway_is_asked_for_again_and_again_counts_once(
    service: PaymentService, gateway: Moody, seconds: Seconds
) -> None:
    calls = service.charges.gateway
    same = GatewayCharge(key="TXN-1", amount=Decimal(1), currency="INR", payment_method="UPI")
    gateway.mood = Mood.SAYS_NOTHING
    for _ in range(2 * FAILURES_MAX):
        with await calls.place() as place:
            assert isinstance(await calls.charge(same, place), Unknown)
    gateway.mood = Mood.WORKS
    assert (await charged(service, 2)).status_code == 201


# 2. What works while it is open


async def test_a_finished_key_replays_its_answer_byte_for_byte_while_the_gateway_is_down(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    charge, declined = partial(post_charge, api, 1, "k1"), partial(post_charge, api, 2, "k2", amount=DECLINED_AMOUNT)
    first = [await charge(), await declined()]
    refund = partial(post_refund, api, first[0].json()["payment_id"], amount=40)
    first.append(await refund())
    assert names(first) == {"201": 1, "402": 1, "200": 1}
    await open_breaker(service, gateway)
    async with changes_nothing(books, gateway):
        again = [await charge(), await declined(), await refund()]
        unknown = await charged(service, 100)
    assert [(each.status_code, each.content) for each in again] == [(each.status_code, each.content) for each in first]
    assert {each.headers["Idempotent-Replayed"] for each in again} == {"true"}
    assert unknown.is_unknown


async def test_conflicts_are_told_as_ever_while_the_gateway_is_down(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    [payment_id] = await paid(service, 1)
    assert (await post_refund(api, payment_id, "r", amount=30)).status_code == 200
    await open_breaker(service, gateway)
    async with changes_nothing(books, gateway):
        told = [
            await post_charge(api, 1, "another"),
            await post_charge(api, 1, "pay 1", amount=5, payment_method="UPI"),
            await post_charge(api, 100, "another"),
            await post_refund(api, payment_id, "another", amount=71),
            await post_refund(api, payment_id, "r", amount=31),
            await post_refund(api, 999_999, "another"),
            await post_charge(api, 0, "another"),
        ]
    assert [(each.status_code, each.json()["code"]) for each in told] == [
        (409, "order-already-paid"),
        (422, "idempotency-key-reused"),
        (409, "order-in-progress"),
        (409, "refund-exceeds-balance"),
        (422, "idempotency-key-reused"),
        (404, "payment-not-found"),
        (422, "validation-error"),
    ]


async def test_what_needs_no_gateway_works_while_it_is_down(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    uncaptured = (await service.charges.create(request=create_request(1))).payment_id
    update = parse_request(StatusUpdateRequest, {"status": "COMPLETED"})
    await service.status_changes.update(payment_id=uncaptured, request=update)
    await open_breaker(service, gateway)
    asked = gateway.asked
    cash = await post_charge(api, 2, "cash", payment_method="COD")
    assert (cash.status_code, cash.json()["status"]) == (201, "PENDING")
    part, rest = await post_refund(api, uncaptured, "part", amount=40), await post_refund(api, uncaptured, "rest")
    assert (part.status_code, rest.status_code) == (200, 200)
    assert (part.json()["status"], rest.json()["status"]) == ("COMPLETED", "REFUNDED")
    again = await post_refund(api, uncaptured, "part", amount=40)
    assert (again.status_code, again.content) == (200, part.content)
    paths = [f"/v1/payments/{uncaptured}", "/v1/payments/order/2", "/v1/payments", "/health/ready"]
    assert [(await api.get(path)).status_code for path in paths] == [200] * 4
    assert (await api.delete(f"/v1/payments/{cash.json()['payment_id']}")).status_code == 200
    assert gateway.asked == asked
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    await assert_refused(charged(service, 3))


# 3. Probes


async def test_of_many_requests_one_tries_whether_the_gateway_is_back_and_lets_the_others_in_again(
    service: PaymentService, books: Books, gateway: Moody, seconds: Seconds
) -> None:
    await open_breaker(service, gateway)
    seconds.now += FIRST_WAIT_SECONDS
    gateway.may_answer.clear()
    asked = gateway.asked
    charging = [asyncio.create_task(charged(service, order_id)) for order_id in range(1, 9)]

    async def all_but_one_are_refused() -> bool:
        return sum(task.done() for task in charging) == len(charging) - 1

    await until(all_but_one_are_refused)
    await gateway.holds(1)
    async with changes_nothing(books, gateway):
        await assert_refused(charged(service, 20))
    assert gateway.asked == asked + 1
    gateway.may_answer.set()
    assert names(await outcomes(*charging)) == {"201": 1, "Unavailable": 7}
    assert await books.value("SELECT count(*) FROM payments WHERE order_id < 100") == 1
    all_in = await asyncio.gather(*[charged(service, order_id) for order_id in range(1, 21)])
    assert names(all_in) == {"201": 20}


@pytest.mark.parametrize("mood", DOWN)
async def test_a_probe_that_fails_keeps_everybody_out_for_longer(
    service: PaymentService, books: Books, gateway: Moody, seconds: Seconds, mood: Mood
) -> None:
    await open_breaker(service, gateway)
    seconds.now += FIRST_WAIT_SECONDS
    await fail_charges(service, gateway, mood, 1, first_order=1)
    async with changes_nothing(books, gateway):
        await assert_refused(charged(service, 2))
        seconds.now += FIRST_WAIT_SECONDS
        await assert_refused(charged(service, 2))
    seconds.now += FIRST_WAIT_SECONDS
    assert (await charged(service, 2)).status_code == 201
    assert (await charged(service, 3)).status_code == 201


async def test_a_refund_can_be_the_probe(service: PaymentService, gateway: Moody, seconds: Seconds) -> None:
    [payment_id] = await paid(service, 1)
    await open_breaker(service, gateway)
    await assert_refused(refunded(service, payment_id, "40", key="r"))
    seconds.now += FIRST_WAIT_SECONDS
    assert (await refunded(service, payment_id, "40", key="r")).status_code == 200
    assert (await charged(service, 2)).status_code == 201


@pytest.mark.parametrize("how", ["paid order", "key reused", "too much", "replay", "needs no gateway"])
async def test_a_probe_that_does_not_ask_the_gateway_leaves_it_to_the_next(
    service: PaymentService, gateway: Moody, seconds: Seconds, how: str
) -> None:
    [payment_id] = await paid(service, 1)
    uncaptured = (await service.charges.create(request=create_request(2))).payment_id
    update = parse_request(StatusUpdateRequest, {"status": "COMPLETED"})
    await service.status_changes.update(payment_id=uncaptured, request=update)
    await open_breaker(service, gateway)
    seconds.now += FIRST_WAIT_SECONDS
    asked = gateway.asked
    match how:
        case "paid order":
            with pytest.raises(OrderAlreadyPaid):
                await charged(service, 1, key="another")
        case "key reused":
            with pytest.raises(IdempotencyKeyReused):
                await charged(service, 3, key="pay 1")
        case "too much":
            with pytest.raises(RefundExceedsBalance):
                await refunded(service, payment_id, "100.01")
        case "replay":
            assert (await charged(service, 1, key="pay 1", payment_method="UPI")).replayed
        case _:
            assert (await refunded(service, uncaptured)).status_code == 200
    assert gateway.asked == asked
    # Nothing is known of the gateway yet: the next one is the only probe again.
    gateway.may_answer.clear()
    probe = asyncio.create_task(charged(service, 4))
    await gateway.holds(1)
    await assert_refused(charged(service, 5))
    gateway.may_answer.set()
    assert (await probe).status_code == 201
    assert (await charged(service, 5)).status_code == 201


@pytest.mark.parametrize("mood", [Mood.WORKS, Mood.SAYS_NOTHING])
async def test_a_probe_whose_caller_goes_away_is_probed_to_its_end(
    service: PaymentService, gateway: Moody, seconds: Seconds, mood: Mood
) -> None:
    await open_breaker(service, gateway)
    seconds.now += FIRST_WAIT_SECONDS
    gateway.mood = mood
    gateway.may_answer.clear()
    probe = asyncio.create_task(charged(service, 1))
    await gateway.holds(1)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    await assert_refused(charged(service, 2))
    gateway.may_answer.set()
    await gateway.holds(0)
    gateway.mood = Mood.WORKS

    async def is_let_in() -> bool:
        seconds.now += FIRST_WAIT_SECONDS
        [outcome] = await outcomes(charged(service, 2))
        return isinstance(outcome, Answer)

    await until(is_let_in)
    assert (await charged(service, 3)).status_code == 201


@with_limits(concurrency=1, wait_seconds=LONGER_THAN_ANY_WAIT)
async def test_a_probe_that_is_cancelled_while_it_waits_leaves_it_to_the_next(
    service: PaymentService, gateway: Moody, seconds: Seconds
) -> None:
    calls = service.charges.gateway
    with await calls.place():
        fail_all(calls._breaker)
        seconds.now += FIRST_WAIT_SECONDS
        probe = asyncio.create_task(calls.place())
        await until_waiting(calls, 1)
        await assert_refused(charged(service, 1))
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
    assert (await charged(service, 1)).status_code == 201
    assert (await charged(service, 2)).status_code == 201


@pytest.mark.parametrize(
    "limits",
    [
        {"eci_pay_gateway_concurrency": 1, "eci_pay_gateway_queue_max": 0},
        {"eci_pay_gateway_concurrency": 1, "eci_pay_gateway_wait_seconds": 0.05},
    ],
    ids=["the queue is full", "the wait is over"],
)
async def test_a_probe_that_finds_no_place_leaves_it_to_the_next(
    service: PaymentService, gateway: Moody, seconds: Seconds
) -> None:
    calls = service.charges.gateway
    with await calls.place():
        fail_all(calls._breaker)
        seconds.now += FIRST_WAIT_SECONDS
        await assert_refused(charged(service, 1))
    assert (await charged(service, 1)).status_code == 201


async def test_a_probe_that_comes_too_late_leaves_it_to_the_next(
    service: PaymentService, clock: ManualClock, gateway: Moody, seconds: Seconds, *, books: Books, sessions: Sessions
) -> None:
    await open_breaker(service, gateway)
    seconds.now += FIRST_WAIT_SECONDS

    async def late() -> None:
        clock.advance(seconds=31)

    with pytest.raises(Unavailable):
        await held_up(charged(service, 1), books, sessions, late)
    assert (await charged(service, 2)).status_code == 201


# 4. Places


async def until_waiting(calls: GatewayCalls, number: int) -> None:
    """Waits until so many wait for a place."""

    async def reached() -> bool:
        return calls._waiting == number

    await until(reached)


@with_limits(concurrency=2)
async def test_no_more_than_the_places_are_at_the_gateway_at_once_and_all_succeed(
    service: PaymentService, books: Books, gateway: Moody
) -> None:
    payment_ids = await paid(service, *range(1, 11))
    gateway.at_once_max = 0
    gateway.may_answer.clear()
    charging = [asyncio.create_task(charged(service, order_id)) for order_id in range(101, 121)]
    refunding = [asyncio.create_task(refunded(service, payment_id)) for payment_id in payment_ids]
    await gateway.holds(2)
    await until_waiting(service.charges.gateway, 28)
    # Nothing is recorded of those that wait.
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'PROCESSING'") <= 2
    gateway.may_answer.set()
    assert names(await asyncio.gather(*charging, *refunding)) == {"201": 20, "200": 10}
    assert gateway.at_once_max == 2
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@with_limits(concurrency=2, wait_seconds=0.3)
async def test_while_the_gateway_hangs_the_others_wait_only_for_so_long(
    service: PaymentService, books: Books, gateway: Moody
) -> None:
    loop = asyncio.get_running_loop()
    [payment_id] = await paid(service, 1)
    gateway.may_answer.clear()
    hanging = [asyncio.create_task(charged(service, order_id)) for order_id in (101, 102)]
    await gateway.holds(2)

    async def waited(work: Awaitable[Answer]) -> float:
        began = loop.time()
        with pytest.raises(Unavailable, match="busy; nothing was sent"):
            await work
        return loop.time() - began

    async with changes_nothing(books, gateway):
        charges = [waited(charged(service, order_id)) for order_id in range(103, 110)]
        waits = await asyncio.gather(*charges, waited(refunded(service, payment_id)))
    assert min(waits) >= 0.29
    assert max(waits) < 3
    gateway.may_answer.set()
    assert names(await asyncio.gather(*hanging)) == {"201": 2}
    assert (await charged(service, 103)).status_code == 201


@with_limits(concurrency=1, wait_seconds=0.1)
async def test_while_the_gateway_is_busy_http_is_told_503_and_what_needs_no_place_works(
    api: httpx.AsyncClient, service: PaymentService, books: Books, gateway: Moody
) -> None:
    [payment_id] = await paid(service, 1)
    gateway.may_answer.clear()
    hanging = asyncio.create_task(charged(service, 101))
    await gateway.holds(1)
    async with changes_nothing(books, gateway):
        refused = [await post_charge(api, 2, "k"), await post_refund(api, payment_id)]
        replay, conflict = await post_charge(api, 1, "pay 1", payment_method="UPI"), await post_charge(api, 1, "new")
    assert [(each.status_code, "Retry-After" in each.headers) for each in refused] == [(503, True)] * 2
    assert (replay.status_code, replay.headers["Idempotent-Replayed"], conflict.status_code) == (201, "true", 409)
    assert (await post_charge(api, 3, "cash", payment_method="COD")).status_code == 201
    gateway.may_answer.set()
    assert (await hanging).status_code == 201


@pytest.mark.parametrize("waiters", [0, 1, 3])
async def test_when_the_queue_is_full_the_next_is_refused_at_once(
    opened: Opener, books: Books, gateway: Moody, waiters: int
) -> None:
    patient: dict[str, object] = {
        "eci_pay_gateway_concurrency": 1,
        "eci_pay_gateway_queue_max": waiters,
        "eci_pay_gateway_wait_seconds": LONGER_THAN_ANY_WAIT,
    }
    async with opened(**patient) as service:
        [payment_id] = await paid(service, 1)
        gateway.may_answer.clear()
        charging = [asyncio.create_task(charged(service, 101))]
        await gateway.holds(1)
        charging += [asyncio.create_task(charged(service, order_id)) for order_id in range(102, 102 + waiters)]
        await until_waiting(service.charges.gateway, waiters)
        async with changes_nothing(books, gateway):
            for _ in range(3):
                await assert_refused(charged(service, 200))
                await assert_refused(refunded(service, payment_id))
        assert not any(task.done() for task in charging)
        gateway.may_answer.set()
        assert names(await asyncio.gather(*charging)) == {"201": 1 + waiters}
        assert (await charged(service, 200)).status_code == 201


@with_limits(concurrency=1, wait_seconds=LONGER_THAN_ANY_WAIT, queue_max=1)
async def test_a_caller_that_goes_away_while_it_waits_is_charged_nevertheless_and_its_place_comes_back(
    service: PaymentService, books: Books, gateway: Moody
) -> None:
    gateway.may_answer.clear()
    first = asyncio.create_task(charged(service, 1))
    await gateway.holds(1)
    second = asyncio.create_task(charged(service, 2))
    await until_waiting(service.charges.gateway, 1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await assert_refused(charged(service, 3))  # it still waits
    gateway.may_answer.set()
    assert (await first).status_code == 201
    await until(lambda: books.rows("SELECT 1 FROM payments WHERE order_id = 2 AND status = 'COMPLETED'"))
    await assert_all_places_are_free(service, gateway, 1)


@with_limits(concurrency=2, wait_seconds=LONGER_THAN_ANY_WAIT)
async def test_waiters_that_are_cancelled_take_no_place_with_them(service: PaymentService, gateway: Moody) -> None:
    calls = service.charges.gateway
    for cancelled_first in (True, False):
        places = [await calls.place(), await calls.place()]
        waiting = [asyncio.create_task(calls.place()) for _ in range(3)]
        await until_waiting(calls, 3)
        if cancelled_first:
            waiting[0].cancel()
            waiting[2].cancel()
        for place in places:
            with place:
                pass
        if not cancelled_first:  # at the very moment in which a place is theirs
            waiting[0].cancel()
            waiting[2].cancel()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, gateway_calls.Place):
                with outcome:
                    pass
        assert calls._waiting == 0
    await assert_all_places_are_free(service, gateway, 2)


@with_limits(concurrency=3, timeout_seconds=0.2, wait_seconds=LONGER_THAN_ANY_WAIT)
async def test_after_many_failures_of_every_kind_all_places_are_free(
    service: PaymentService, books: Books, gateway: Moody
) -> None:
    rounds = 7
    calls = service.charges.gateway
    payment_ids = await paid(service, *range(1, 1 + rounds))
    moods = [Mood.HANGS, Mood.SAYS_NOTHING, Mood.UNREACHABLE, Mood.BREAKS]
    gateway.mood_of_amount = {Decimal(n): mood for n, mood in enumerate(moods, start=11)}

    told = []
    for number, payment_id in enumerate(payment_ids):
        order_id = 1000 + 100 * number
        taken = [await calls.place() for _ in range(3)]
        failing = [charged(service, order_id + n, amount=str(n)) for n in range(11, 15)]
        failing += [
            charged(service, order_id + 20, amount=DECLINED_AMOUNT),
            charged(service, number + 1, key=f"again {number}"),
            charged(service, order_id + 21, key="pay 1"),
            refunded(service, payment_id, "14"),
            refunded(service, payment_id, "1000"),
        ]
        tasks = [asyncio.create_task(work) for work in [*failing, charged(service, order_id + 50, amount="12")]]
        await until_waiting(calls, len(tasks))
        tasks.pop().cancel()  # its caller goes away, it does not
        waiter = asyncio.create_task(calls.place())
        await until_waiting(calls, len(tasks) + 2)
        waiter.cancel()
        for place in taken:
            place.__exit__(None, None, None)
        told += await asyncio.gather(*tasks, return_exceptions=True)
        assert (await charged(service, order_id + 99)).status_code == 201  # or the breaker would open
    assert names(told) == {
        "202": 4 * rounds,
        "402": rounds,
        "Unavailable": rounds,
        "OrderAlreadyPaid": rounds,
        "IdempotencyKeyReused": rounds,
        "RefundExceedsBalance": rounds,
    }
    await gateway.holds(0)
    calls._limits = replace(calls._limits, timeout_seconds=LONGER_THAN_ANY_WAIT)
    await assert_all_places_are_free(service, gateway, 3)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@with_limits(concurrency=1, wait_seconds=LONGER_THAN_ANY_WAIT)
@pytest.mark.parametrize("operation", ["charge", "refund"])
async def test_an_answer_that_is_slow_to_be_booked_holds_no_place(
    service: PaymentService, books: Books, gateway: Moody, sessions: Sessions, operation: str
) -> None:
    [payment_id] = await paid(service, 1)
    gateway.may_answer.clear()
    work = charged(service, 2) if operation == "charge" else refunded(service, payment_id)
    slow = asyncio.create_task(work)
    await gateway.holds(1)
    session = await sessions()
    await session.execute("SELECT FROM payments FOR UPDATE")
    gateway.may_answer.set()
    await until_lock_waits(books)
    assert (await charged(service, 3)).status_code == 201
    assert not slow.done()
    await session.rollback()
    assert (await slow).status_code == (201 if operation == "charge" else 200)


async def test_while_the_database_is_away_after_the_gateway_answered_the_place_is_free(
    door: Door, opened: Opener, books: Books, gateway: Moody
) -> None:
    limits: dict[str, object] = {
        "eci_pay_gateway_concurrency": 1,
        "eci_pay_gateway_wait_seconds": LONGER_THAN_ANY_WAIT,
        "eci_pay_settle_retry_seconds": 1.0,
        "eci_pay_database_pool_timeout_seconds": 0.5,
    }
    async with door.opened() as url, opened(url=url, **limits) as far:
        gateway.may_answer.clear()
        charging = asyncio.create_task(charged(far, 1))
        await gateway.holds(1)
        door.shut()
        gateway.may_answer.set()
        await gateway.holds(0)
        async with asyncio.timeout(LONGER_THAN_ANY_WAIT / 4):
            with await far.charges.gateway.place():
                assert not charging.done()
        assert (await charging).is_unknown
    assert await books.value("SELECT status FROM payments") == "PROCESSING"


# 5. In time or not at all


async def held_up(
    work: Awaitable[Told], books: Books, sessions: Sessions, meanwhile: Callable[[], Awaitable[None]]
) -> Told:
    """Lets the begin of a charge or refund wait for the database until something has happened meanwhile."""
    session = await sessions()
    await session.execute("LOCK TABLE payments IN EXCLUSIVE MODE")
    running = asyncio.ensure_future(work)
    await until_lock_waits(books)
    await meanwhile()
    await session.rollback()
    return await running


class Elapsed:
    """The machine's own clock, as places read it; it is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 5000.0

    def monotonic(self) -> float:
        """As that of the module `time`, in whose place it stands."""
        return self.seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Elapsed:
    """The machine's own clock: only that of `gateway_calls`, for the event loop has to go on."""
    elapsed = Elapsed()
    monkeypatch.setattr(gateway_calls, "time", elapsed)
    return elapsed


@pytest.mark.parametrize("operation", ["charge", "refund"])
@pytest.mark.parametrize(
    ("wall", "monotonic"),
    [(31.0, 0.0), (31.0, 31.0), (0.0, 31.0), (-3600.0, 31.0), (-30.0, 31.0), (3600.0, 0.0)],
    ids=["wall", "both", "monotonic", "set back by an hour", "set back by the wait", "set forward by an hour"],
)
async def test_what_began_too_long_ago_by_either_clock_is_not_sent(
    api: httpx.AsyncClient,
    service: PaymentService,
    clock: ManualClock,
    *,
    machine: Elapsed,
    gateway: Moody,
    books: Books,
    sessions: Sessions,
    operation: str,
    wall: float,
    monotonic: float,
) -> None:
    [payment_id] = await paid(service, 1)
    asked = gateway.asked

    async def time_passes() -> None:
        clock.advance(seconds=wall)
        machine.seconds += monotonic

    async def told() -> httpx.Response:
        if operation == "charge":
            return await post_charge(api, 2, "k")
        return await post_refund(api, payment_id, "k", amount=40)

    late = await held_up(told(), books, sessions, time_passes)
    assert (late.status_code, late.json()["code"], "Retry-After" in late.headers) == (503, "unavailable", True)
    assert gateway.asked == asked
    trail = "SELECT status, description FROM transactions ORDER BY transaction_log_id DESC LIMIT 1"
    word = operation.capitalize()
    assert await books.rows(trail) == [{"status": "FAILED", "description": f"{word} failed: not_sent"}]
    assert await books.value("SELECT refunded_amount FROM payments WHERE order_id = 1") == 0
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    again = await told()
    assert (again.status_code, gateway.asked) == (201 if operation == "charge" else 200, asked + 1)
    assert "Idempotent-Replayed" not in again.headers


@pytest.mark.parametrize("wall", [-3600.0, 29.0])
async def test_what_began_a_moment_ago_is_sent_although_the_clock_was_set_back(
    service: PaymentService,
    clock: ManualClock,
    machine: Elapsed,
    *,
    books: Books,
    sessions: Sessions,
    wall: float,
) -> None:
    async def time_passes() -> None:
        clock.advance(seconds=wall)
        machine.seconds += 29

    answer = await held_up(charged(service, 1), books, sessions, time_passes)
    assert answer.status_code == 201
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@with_limits(concurrency=1, wait_seconds=LONGER_THAN_ANY_WAIT)
async def test_the_wait_for_a_place_does_not_count(
    service: PaymentService, clock: ManualClock, machine: Elapsed, gateway: Moody
) -> None:
    gateway.may_answer.clear()
    first = asyncio.create_task(charged(service, 1))
    await gateway.holds(1)
    second = asyncio.create_task(charged(service, 2))
    await until_waiting(service.charges.gateway, 1)
    clock.advance(seconds=50)
    machine.seconds += 50
    gateway.may_answer.set()
    assert names(await asyncio.gather(first, second)) == {"201": 2}
