"""Charges and refunds through Stripe, end to end: the use cases, a real database, and localstripe for Stripe.

localstripe is not Stripe. It has no idempotency keys (what is sent twice is done twice, and a PaymentIntent that rules
out a charge is one more), no search (404, as Stripe says 400 where search is not to be had: the list is read), no
filter `created` of lists, which begin with the oldest; it declines with `card_declined` alone, names no `decline_code`,
lets a refund exceed its charge and tells nobody of refunds. It refuses with 401 whatever key does not begin with `sk_`.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from eci_pay.answers import Answer
from eci_pay.errors import SettingsInvalid, Unavailable, ValidationFailed
from eci_pay.gateways import Approved, GatewayCharge
from eci_pay.gateways.stripe import KEY, RULED_OUT, StripeGateway, minor_units
from eci_pay.service import PaymentService
from eci_pay.settings import load_settings
from tests.faults.proxy import HOST, Proxy
from tests.local_stripe import (
    CARD_THAT_ASKS_ITS_HOLDER,
    DECLINED_CARD,
    SECRET_KEY,
    VISA,
    LocalStripe,
    running_local_stripe,
)
from tests.peers import Peers
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    CommandLine,
    CommandResult,
    ManualClock,
    Opener,
    charge_fields,
    charge_request,
    until,
)
from tests.test_recovery import (
    NOT_HEARD_OF,
    TOLD_OF_FAILURE,
    TOLD_OF_PART,
    TOLD_OF_SUCCESS,
    aged,
    never_happened,
    recoveries,
    refund_statuses,
    refunded,
    status_of,
    told,
    travel,
)
from tests.test_serving import charge, serving

UNKNOWN_TOKEN = "pm_0nobodyKnowsThisOne"
SHORT_SECONDS = 0.5
"""How long an answer is waited for that is not to come."""


@pytest.fixture(scope="module")
def running_stripe() -> Iterator[LocalStripe]:
    """localstripe, for all the tests of this module."""
    with running_local_stripe() as running:
        yield running


@pytest.fixture
async def account(running_stripe: LocalStripe) -> LocalStripe:
    """An empty account of localstripe."""
    await running_stripe.forget_everything()
    return running_stripe


@pytest.fixture
def gateway(request: pytest.FixtureRequest, account: LocalStripe, unused_tcp_port: int) -> StripeGateway:
    """The gateway of `service`, `api` and `opened`; by parameter one that Stripe refuses in one way or another."""
    match getattr(request, "param", None):
        case "away":
            return account.gateway(port=unused_tcp_port)
        case "wrong key":
            return account.gateway(secret_key="rk_hunter2")
        case _:
            return account.gateway()


@pytest.fixture
async def paying(opened: Opener, account: LocalStripe, peers: Peers) -> AsyncIterator[PaymentService]:
    """The use cases over Stripe, where all three peers are configured."""
    async with opened(gateway=account.gateway(), **peers.settings()) as service:
        yield service


@pytest.fixture
async def line(account: LocalStripe) -> AsyncIterator[Proxy]:
    """A connection to Stripe that the test can break."""
    async with Proxy(HOST, account.port).running() as proxy:
        yield proxy


@pytest.fixture
async def far_paying(opened: Opener, account: LocalStripe, line: Proxy, peers: Peers) -> AsyncIterator[PaymentService]:
    """The same as `paying`, over `line`, and not patient."""
    gateway = account.gateway(port=line.port, timeout_seconds=SHORT_SECONDS)
    async with opened(gateway=gateway, **peers.settings()) as service:
        yield service


async def charged(
    service: PaymentService, order_id: int = 1, key: str = "charge 1", token: str | None = VISA, **fields: object
) -> Answer:
    """Charges an order, as `tests.test_recovery.charged` does, by a card that Stripe knows."""
    request = charge_request(order_id, payment_token=token, **fields)
    return await service.charges.charge(request=request, idempotency_key=key)


async def the_intent(account: LocalStripe) -> dict[str, Any]:
    """The only PaymentIntent of the account."""
    [intent] = await account.intents()
    return intent


def body_of(answer: Answer) -> dict[str, Any]:
    """An answer's body."""
    body: dict[str, Any] = json.loads(answer.body)
    return body


async def assert_nothing_recorded(books: Books) -> None:
    """Neither a payment nor a key."""
    for table in ("payments", "transactions", "idempotency_keys", "outbox"):
        assert await books.value(f"SELECT count(*) FROM {table}") == 0


# 1. Charges


@pytest.mark.parametrize(
    ("currency", "amount", "units"),
    [("INR", "1499.50", 149950), ("USD", "12.34", 1234), ("JPY", "500", 500), ("KWD", "1.25", 1250)],
)
async def test_a_charge_takes_the_money_in_the_currencys_own_units_and_leaves_our_key_at_stripe(
    *, paying: PaymentService, books: Books, account: LocalStripe, currency: str, amount: str, units: int
) -> None:
    answer = await charged(paying, amount=amount, currency=currency)
    assert answer.status_code == 201
    payment, intent = body_of(answer), await the_intent(account)
    assert (payment["status"], payment["authorization_code"]) == ("COMPLETED", intent["id"])
    assert (intent["amount"], intent["currency"], intent["status"]) == (units, currency.lower(), "succeeded")
    assert intent["metadata"] == {KEY: f"{payment['transaction_id']}-1"}
    assert await books.audit_trail(answer.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    assert await told(books) == TOLD_OF_SUCCESS
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_the_same_request_again_has_the_same_answer_and_charges_nobody(
    paying: PaymentService, account: LocalStripe
) -> None:
    first, again = await charged(paying), await charged(paying)
    assert (again.status_code, again.body, again.replayed) == (201, first.body, True)
    await the_intent(account)


@pytest.mark.parametrize(
    ("currency", "amount", "units"),
    [
        ("INR", "0.01", 1),
        ("INR", "100000.00", 10_000_000),
        ("JPY", "1.00", 1),
        ("KWD", "0.01", 10),
        ("ISK", "5.00", 500),  # no minor unit, and two decimals for Stripe
        ("UGX", "5.00", 500),
        ("MGA", "5.00", 5),  # the other way round
    ],
)
def test_minor_units_are_those_of_stripe(currency: str, amount: str, units: int) -> None:
    assert minor_units(Decimal(amount), currency) == units


async def test_an_amount_that_stripe_cannot_take_exactly_is_refused_and_not_charged_in_part(
    service: PaymentService, books: Books, account: LocalStripe
) -> None:
    with pytest.raises(ValidationFailed) as refused:
        await charged(service, amount="1.25", currency="MGA")
    assert [fault.field for fault in refused.value.errors] == ["amount"]
    await assert_nothing_recorded(books)
    assert await account.intents() == []


async def test_a_refund_that_stripe_cannot_make_exactly_is_never_booked_as_made(
    service: PaymentService, books: Books, account: LocalStripe
) -> None:
    payment_id = (await charged(service, amount="3.00", currency="MGA")).payment_id
    (result,) = await asyncio.gather(refunded(service, payment_id, "1.50"), return_exceptions=True)
    assert isinstance(result, ValidationFailed) or (isinstance(result, Answer) and result.is_declined)
    assert await account.refunds() == []


async def test_a_declined_card_is_402_and_replayed_byte_for_byte(
    paying: PaymentService, books: Books, account: LocalStripe
) -> None:
    answer = await charged(paying, token=DECLINED_CARD)
    problem = body_of(answer)
    assert (answer.status_code, problem["code"], problem["decline_code"]) == (402, "payment-declined", "card_declined")
    assert problem["detail"] == "Your card was declined."
    assert (await status_of(books), await told(books)) == ("FAILED", TOLD_OF_FAILURE)
    replay = await charged(paying, token=DECLINED_CARD)
    assert (replay.status_code, replay.body, replay.replayed) == (402, answer.body, True)
    assert (await the_intent(account))["status"] == "requires_payment_method"
    better = await charged(paying, key="another card")
    assert (better.status_code, body_of(better)["attempt"]) == (201, 2)
    assert [intent["metadata"][KEY][-2:] for intent in await account.intents()] == ["-1", "-2"]


async def test_a_card_that_stripe_does_not_know_is_declined(paying: PaymentService, books: Books) -> None:
    answer = await charged(paying, token=UNKNOWN_TOKEN)
    assert (answer.status_code, body_of(answer)["code"]) == (402, "payment-declined")
    assert await status_of(books) == "FAILED"
    assert UNKNOWN_TOKEN not in answer.body
    assert (await charged(paying, token=UNKNOWN_TOKEN)).body == answer.body


async def test_a_card_that_wants_its_holder_is_declined_and_its_payment_cancelled(
    paying: PaymentService, books: Books, account: LocalStripe
) -> None:
    token = await account.card(CARD_THAT_ASKS_ITS_HOLDER)
    answer = await charged(paying, token=token)
    assert (answer.status_code, body_of(answer)["decline_code"]) == (402, "authentication_required")
    assert (await status_of(books), await told(books)) == ("FAILED", TOLD_OF_FAILURE)
    assert (await the_intent(account))["status"] == "canceled"
    assert (await charged(paying, token=token)).body == answer.body


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "payment_token"),
        ({"payment_method": "DEBIT_CARD"}, "payment_token"),
        ({"payment_method": "UPI", "payment_token": VISA}, "payment_method"),
        ({"payment_method": "NET_BANKING", "payment_token": VISA}, "payment_method"),
        ({"payment_method": "WALLET"}, "payment_method"),
    ],
    ids=["credit card", "debit card", "upi", "net banking", "wallet"],
)
async def test_what_stripe_can_never_charge_is_422_naming_the_field_and_nothing_is_recorded(
    api: httpx.AsyncClient, books: Books, account: LocalStripe, fields: dict[str, str], field: str
) -> None:
    answer = await charge(api, 1, "k", **fields)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation-error")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert [fault["field"] for fault in answer.json()["errors"]] == [field]
    await assert_nothing_recorded(books)
    assert await account.intents() == []
    # The key is free for the request as it should have been.
    assert (await charge(api, payment_token=VISA)).status_code == 201


async def test_cash_on_delivery_needs_neither_token_nor_stripe(api: httpx.AsyncClient, account: LocalStripe) -> None:
    answer = await charge(api, payment_method="COD")
    assert (answer.status_code, answer.json()["status"]) == (201, "PENDING")
    assert await account.intents() == []


# 2. Refunds


async def test_refunds_in_part_and_of_the_rest_give_the_money_back_under_our_keys(
    paying: PaymentService, books: Books, account: LocalStripe
) -> None:
    payment_id = (await charged(paying)).payment_id
    part = await refunded(paying, payment_id, "30.05", key="part")
    rest = await refunded(paying, payment_id, None, key="rest")
    assert (part.status_code, rest.status_code, body_of(rest)["status"]) == (200, 200, "REFUNDED")
    view = await paying.payments.by_id(payment_id)
    made = {refund["metadata"][KEY]: refund for refund in await account.refunds()}
    assert {key: refund["amount"] for key, refund in made.items()} == {
        f"{view.transaction_id}-R{refund.refund_id}": units
        for refund, units in zip(view.refunds, (3005, 6995), strict=True)
    }
    assert {refund["payment_intent"] for refund in made.values()} == {view.authorization_code}
    booked = await books.rows("SELECT gateway_reference AS id FROM refunds")
    assert {row["id"] for row in booked} == {refund["id"] for refund in made.values()}
    replay = await refunded(paying, payment_id, "30.05", key="part")
    assert (replay.body, replay.replayed, len(await account.refunds())) == (part.body, True, 2)
    assert (await told(books))[: len(TOLD_OF_SUCCESS + TOLD_OF_PART)] == TOLD_OF_SUCCESS + TOLD_OF_PART
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize(("currency", "amount", "units"), [("JPY", "500", 500), ("KWD", "1.25", 1250)])
async def test_a_full_refund_is_in_the_currencys_own_units(
    paying: PaymentService, account: LocalStripe, currency: str, amount: str, units: int
) -> None:
    payment_id = (await charged(paying, amount=amount, currency=currency)).payment_id
    assert (await refunded(paying, payment_id, None)).status_code == 200
    [made] = await account.refunds()
    assert (made["amount"], made["currency"]) == (units, currency.lower())


async def test_a_refund_that_stripe_refuses_is_402_and_the_money_can_still_be_refunded(
    paying: PaymentService, books: Books, account: LocalStripe
) -> None:
    payment_id = (await charged(paying)).payment_id
    await account.forget_everything()
    answer = await refunded(paying, payment_id)
    assert (answer.status_code, body_of(answer)["code"]) == (402, "refund-declined")
    assert (await refunded(paying, payment_id)).body == answer.body
    assert await books.rows("SELECT status, refunded_amount, refund_pending FROM payments") == [
        {"status": "COMPLETED", "refunded_amount": 0, "refund_pending": 0}
    ]
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 3. Unknown outcomes


@pytest.mark.parametrize("card", ["visa", "declined", "asks its holder"])
async def test_a_charge_whose_answer_was_lost_is_found_by_our_key_and_settled_once(
    *, far_paying: PaymentService, books: Books, clock: ManualClock, account: LocalStripe, line: Proxy, card: str
) -> None:
    match card:
        case "visa":
            token, status_code, result = VISA, 201, "approved"
        case "declined":
            token, status_code, result = DECLINED_CARD, 402, "declined: card_declined"
        case _:
            token = await account.card(CARD_THAT_ASKS_ITS_HOLDER)
            status_code, result = 402, "declined: authentication_required"
    line.cut_after_bytes(0)
    assert (await charged(far_paying, token=token)).status_code == 202
    assert (line.cuts, await status_of(books)) == (1, "PROCESSING")
    [look] = await aged(far_paying, clock)
    assert (look.state, look.result) == ("DONE", result)
    replay = await charged(far_paying, token=token)
    assert (replay.status_code, replay.replayed) == (status_code, True)
    assert await told(books) == (TOLD_OF_SUCCESS if status_code == 201 else TOLD_OF_FAILURE)
    assert await far_paying.recovery.run_once() == []
    intent = await the_intent(account)
    if status_code == 201:
        assert body_of(replay)["authorization_code"] == intent["id"]
        assert await books.audit_trail(replay.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    else:
        assert body_of(replay)["decline_code"] == result.removeprefix("declined: ")
    assert (
        intent["status"]
        == {
            "visa": "succeeded",
            "declined": "requires_payment_method",
            "asks its holder": "canceled",
        }[card]
    )
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_charge_is_found_among_many_that_are_not_ours(
    far_paying: PaymentService, clock: ManualClock, account: LocalStripe, line: Proxy
) -> None:
    others = account.gateway()
    strangers = [
        GatewayCharge(
            key=f"a stranger's {number}",
            amount=Decimal(1),
            currency="INR",
            payment_method="CREDIT_CARD",
            payment_token=VISA,
        )
        for number in range(105)  # more than a page of the list
    ]
    assert all([isinstance(await others.charge(stranger), Approved) for stranger in strangers])
    await others.close()
    line.cut_after_bytes(0)
    assert (await charged(far_paying)).status_code == 202
    [look] = await aged(far_paying, clock)
    assert (look.state, look.result) == ("DONE", "approved")


async def test_a_refund_whose_answer_was_lost_is_found_by_our_key_and_settled_once(
    *,
    paying: PaymentService,
    far_paying: PaymentService,
    books: Books,
    clock: ManualClock,
    account: LocalStripe,
    line: Proxy,
) -> None:
    payment_id = (await charged(paying)).payment_id
    line.cut_after_bytes(0)
    assert (await refunded(far_paying, payment_id)).status_code == 202
    assert (line.cuts, await refund_statuses(books)) == (1, ["PROCESSING"])
    [look] = await aged(far_paying, clock)
    assert (look.state, look.result) == ("DONE", "approved")
    replay = await refunded(far_paying, payment_id)
    assert (replay.status_code, replay.replayed) == (200, True)
    [made] = await account.refunds()
    assert made["amount"] == 4000
    assert await books.rows("SELECT status, gateway_reference FROM refunds") == [
        {"status": "COMPLETED", "gateway_reference": made["id"]}
    ]
    assert await told(books) == TOLD_OF_SUCCESS + TOLD_OF_PART
    assert await far_paying.recovery.run_once() == []
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_charge_that_never_reached_stripe_fails_after_the_grace_period_and_is_ruled_out_there(
    far_paying: PaymentService, books: Books, clock: ManualClock, account: LocalStripe, line: Proxy
) -> None:
    line.stall()
    assert (await charged(far_paying)).status_code == 202
    line.cut()  # and with it the request, which was on its way
    line.resume()
    await aged(far_paying, clock)
    assert (await recoveries(books), await status_of(books)) == ([NOT_HEARD_OF], "PROCESSING")
    await never_happened(far_paying, books, clock)
    assert await recoveries(books) == [("CHECKING", "never happened")]
    replay = await charged(far_paying)
    assert (replay.status_code, body_of(replay)["decline_code"]) == (402, "not_processed")
    assert (await status_of(books), await told(books)) == ("FAILED", TOLD_OF_FAILURE)
    await travel(books, hours=1)
    await far_paying.recovery.run_once()
    assert await recoveries(books) == [("DONE", "never happened")]
    ruled_out = await the_intent(account)
    assert (ruled_out["status"], ruled_out["metadata"][RULED_OUT]) == ("canceled", "yes")
    # Somebody else's charge of the order is not hindered by that.
    assert (await charged(far_paying, key="again")).status_code == 201
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_refund_that_never_reached_stripe_fails_after_the_grace_period(
    *,
    paying: PaymentService,
    far_paying: PaymentService,
    books: Books,
    clock: ManualClock,
    account: LocalStripe,
    line: Proxy,
) -> None:
    payment_id = (await charged(paying)).payment_id
    line.stall()
    assert (await refunded(far_paying, payment_id)).status_code == 202
    line.cut()
    line.resume()
    await never_happened(far_paying, books, clock)
    replay = await refunded(far_paying, payment_id)
    assert (replay.status_code, body_of(replay)["decline_code"]) == (402, "not_processed")
    assert (await refund_statuses(books), await account.refunds()) == (["FAILED"], [])
    assert (await refunded(far_paying, payment_id, None, key="again")).status_code == 200
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_money_that_is_taken_after_the_grace_period_is_given_back_once(
    *,
    paying: PaymentService,
    far_paying: PaymentService,
    books: Books,
    clock: ManualClock,
    account: LocalStripe,
    line: Proxy,
) -> None:
    """Stripe itself would refuse a charge that was ruled out; localstripe knows no idempotency keys and takes it."""
    line.stall()
    assert (await charged(far_paying)).status_code == 202
    await never_happened(paying, books, clock)
    assert await status_of(books) == "FAILED"
    line.resume()

    async def taken() -> list[dict[str, Any]]:
        return [intent for intent in await account.intents() if intent["status"] == "succeeded"]

    await until(taken)
    [intent] = await taken()
    await travel(books)
    looks = await paying.recovery.run_once()
    [made] = await account.refunds()
    assert [(look.state, look.result) for look in looks] == [
        ("LATE", "approved after all"),
        ("DONE", f"taken late, given back: {made['id']}"),
    ]
    assert (made["payment_intent"], made["amount"]) == (intent["id"], 10_000)
    assert made["metadata"] == {KEY: f"{intent['metadata'][KEY]}-LATE"}
    await travel(books)
    assert (await paying.recovery.run_once(), await status_of(books)) == ([], "FAILED")
    assert len(await account.refunds()) == 1


# 4. Stripe is away, or will not have us


async def test_a_stripe_that_refuses_connections_is_503_and_leaves_nothing_unknown(
    far_paying: PaymentService, books: Books, account: LocalStripe, line: Proxy
) -> None:
    async with line.refusing():
        with pytest.raises(Unavailable, match="nothing was sent"):
            await charged(far_paying)
    assert await books.rows("SELECT status, gateway_response LIKE 'not_sent:%%' AS not_sent FROM payments") == [
        {"status": "FAILED", "not_sent": True}
    ]
    assert await account.intents() == []
    again = await charged(far_paying)
    assert (again.status_code, again.replayed) == (201, False)
    await the_intent(account)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_refund_is_503_while_stripe_refuses_connections_and_releases_what_it_had_reserved(
    paying: PaymentService, far_paying: PaymentService, books: Books, account: LocalStripe, line: Proxy
) -> None:
    payment_id = (await charged(paying)).payment_id
    async with line.refusing():
        with pytest.raises(Unavailable, match="nothing was sent"):
            await refunded(far_paying, payment_id)
    assert await books.value("SELECT count(*) FROM refunds WHERE status = 'PROCESSING'") == 0
    assert await books.rows("SELECT status, refunded_amount, refund_pending FROM payments") == [
        {"status": "COMPLETED", "refunded_amount": 0, "refund_pending": 0}
    ]
    assert (await refunded(far_paying, payment_id)).status_code == 200
    assert len(await account.refunds()) == 1
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@pytest.mark.parametrize("gateway", ["away", "wrong key"], indirect=True)
async def test_a_stripe_that_cannot_be_used_is_503_over_http_and_what_is_told_has_no_secret(
    api: httpx.AsyncClient, books: Books, account: LocalStripe
) -> None:
    answer = await charge(api, payment_token=VISA)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) > 0
    assert "nothing was sent" in answer.json()["detail"]
    for hidden in ("hunter2", VISA):
        assert hidden not in answer.text
    assert (await status_of(books), await account.intents()) == ("FAILED", [])
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_the_breaker_opens_for_a_stripe_that_is_away_and_cash_is_still_taken(
    far_paying: PaymentService, books: Books, line: Proxy
) -> None:
    async with line.refusing():
        for order_id in range(1, 11):
            with pytest.raises(Unavailable, match="cannot be reached"):
                await charged(far_paying, order_id, key=f"k{order_id}")
        with pytest.raises(Unavailable, match="out of order"):
            await charged(far_paying, 11, key="k11")
        assert await books.value("SELECT count(*) FROM payments WHERE order_id = 11") == 0
        cash = await charged(far_paying, 12, key="k12", token=None, payment_method="COD")
    assert cash.status_code == 201


async def test_a_secret_key_that_is_refused_is_503_and_neither_key_nor_token_is_told(
    opened: Opener, books: Books, clock: ManualClock, account: LocalStripe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "rk_hunter2secretOfSomebodyElse"
    async with opened(gateway=account.gateway(secret_key=secret)) as service:
        with pytest.raises(Unavailable) as refused:
            await charged(service)
        payment_id = await books.value("SELECT payment_id FROM payments")
        assert await status_of(books) == "FAILED"
    assert "nothing was sent" in str(refused.value)
    assert "the secret key was refused" in str(refused.value)
    async with opened(gateway=account.gateway()) as service:
        assert (await charged(service)).payment_id == payment_id
    async with opened(gateway=account.gateway(secret_key=secret)) as service:
        with pytest.raises(Unavailable):
            await refunded(service, payment_id)
    assert await refund_statuses(books) == ["FAILED"]
    shown = "\n".join([caplog.text, str(refused.value), *map(str, await _all_that_is_recorded(books))])
    for hidden in (secret, secret[:11], secret[-4:], SECRET_KEY, VISA):
        assert hidden not in shown


async def test_a_refused_secret_key_leaves_an_unknown_charge_unknown(
    *, opened: Opener, far_paying: PaymentService, books: Books, clock: ManualClock, account: LocalStripe, line: Proxy
) -> None:
    line.cut_after_bytes(0)
    await charged(far_paying)
    async with opened(gateway=account.gateway(secret_key="rk_hunter2")) as service:
        await never_happened(service, books, clock)
        assert await recoveries(books) == [("OPEN", "Stripe did not say: the secret key was refused")]
    assert await status_of(books) == "PROCESSING"
    await travel(books)
    await far_paying.recovery.run_once()
    assert await status_of(books) == "COMPLETED"


async def test_no_token_is_logged_or_recorded_whatever_becomes_of_the_charge(
    *,
    paying: PaymentService,
    far_paying: PaymentService,
    books: Books,
    clock: ManualClock,
    account: LocalStripe,
    line: Proxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    asks = await account.card(CARD_THAT_ASKS_ITS_HOLDER)
    caplog.clear()  # the tests' own client logs its requests
    tokens = [VISA, DECLINED_CARD, UNKNOWN_TOKEN, asks]
    for order_id, token in enumerate(tokens, 1):
        await charged(paying, order_id, key=f"k{order_id}", token=token)
    line.cut_after_bytes(0)
    assert (await charged(far_paying, 5, key="k5")).status_code == 202
    await aged(far_paying, clock)
    assert await status_of(books, 5) == "COMPLETED"
    shown = "\n".join([caplog.text, *map(str, await _all_that_is_recorded(books))])
    for token in [*tokens, SECRET_KEY]:
        assert token not in shown


async def _all_that_is_recorded(books: Books) -> list[dict[str, Any]]:
    tables = ("payments", "transactions", "refunds", "idempotency_keys", "outbox", "recoveries")
    return [row for table in tables for row in await books.rows(f"SELECT * FROM {table}")]


# 5. What localstripe never says: answers as Stripe's documentation shows them


@asynccontextmanager
async def answering(status: int, error: dict[str, str]) -> AsyncIterator[int]:
    """A server that answers every request with this error, and the port it is on."""
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 {status} Because\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while request := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"(?i)content-length: (\d+)", request)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(head.encode() + body)
        writer.close()

    server = await asyncio.start_server(answer, HOST)
    yield server.sockets[0].getsockname()[1]
    server.close()


def error(kind: str, message: str, **fields: str) -> dict[str, str]:
    """An error of Stripe's."""
    return {"type": f"{kind}_error", "message": message, **fields}


@pytest.mark.parametrize(
    ("http_status", "said", "told_as"),
    [
        (402, error("card", "No.", code="card_declined", decline_code="insufficient_funds"), "insufficient_funds"),
        (402, error("card", "Your card has expired.", code="expired_card"), "expired_card"),
        (400, error("invalid_request", "Too small.", code="amount_too_small"), "amount_too_small"),
        (400, error("idempotency", "Keys can only be used with the same parameters."), 202),
        (409, error("invalid_request", "Another request is under way.", code="lock_timeout"), 202),
        (409, error("idempotency", "Another request is under way.", code="idempotency_key_in_use"), 202),
        (500, error("api", "Something went wrong."), 202),
        (503, error("api", "Something went wrong."), 202),
        (401, error("invalid_request", "Invalid API Key provided: rk_*****ter2"), 503),
        (403, error("invalid_request", "The provided key 'rk_*****ter2' lacks permissions."), 503),
        (429, error("invalid_request", "Too many requests.", code="rate_limit"), 503),
    ],
    ids=lambda value: value.get("code", value["type"]) if isinstance(value, dict) else str(value),
)
async def test_only_where_stripe_says_that_it_refused_the_charge_has_failed(
    opened: Opener, books: Books, account: LocalStripe, *, http_status: int, said: dict[str, str], told_as: str | int
) -> None:
    async with answering(http_status, said) as port, opened(gateway=account.gateway(port=port)) as service:
        (result,) = await asyncio.gather(charged(service), return_exceptions=True)
        if told_as == 503:
            assert isinstance(result, Unavailable)
            assert "ter2" not in str(result)
            assert await status_of(books) == "FAILED"
        elif told_as == 202:
            assert isinstance(result, Answer)
            assert (result.status_code, await status_of(books)) == (202, "PROCESSING")
        else:
            assert isinstance(result, Answer)
            assert (result.status_code, body_of(result)["decline_code"]) == (402, told_as)
            assert await status_of(books) == "FAILED"
    recorded = "\n".join(map(str, await _all_that_is_recorded(books)))
    assert "ter2" not in recorded
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_token_that_stripe_repeats_is_neither_told_nor_recorded_nor_logged(
    opened: Opener, books: Books, account: LocalStripe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    message = f"No such PaymentMethod: '{UNKNOWN_TOKEN}'"
    said = error("invalid_request", message, code="resource_missing", param="payment_method")
    async with answering(400, said) as port, opened(gateway=account.gateway(port=port)) as service:
        answer = await charged(service, token=UNKNOWN_TOKEN)
    assert (answer.status_code, body_of(answer)["decline_code"]) == (402, "resource_missing")
    assert UNKNOWN_TOKEN not in caplog.text
    assert UNKNOWN_TOKEN not in answer.body
    assert UNKNOWN_TOKEN not in str(await _all_that_is_recorded(books))


# 6. Settings


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of ours."""
    for name in ("DATABASE_URL", *(name for name in os.environ if name.upper().startswith("ECI_PAY_"))):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("kind", ["SECRET_KEY", "WEBHOOK_SECRET"])
@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_secret_comes_from_the_environment_or_a_file_and_is_never_shown(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path, kind: str, where: str
) -> None:
    secret = "sk_live_hunter2"
    (tmp_path / "secret").write_text(f"{secret}\n")
    bare_environment.setenv("ECI_PAY_GATEWAY", "stripe")
    bare_environment.setenv("ECI_PAY_STRIPE_SECRET_KEY", "sk_live_another")
    bare_environment.delenv(f"ECI_PAY_STRIPE_{kind}", raising=False)
    if where == "file":
        bare_environment.setenv(f"ECI_PAY_STRIPE_{kind}_FILE", str(tmp_path / "secret"))
    else:
        bare_environment.setenv(f"ECI_PAY_STRIPE_{kind}", secret)
    settings = load_settings()
    taken = settings.stripe_secret_key if kind == "SECRET_KEY" else settings.stripe_webhook_secret
    assert taken is not None
    assert taken.get_secret_value() == secret
    for shown in (str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "hunter2" not in shown


def test_one_file_with_an_empty_name_counts_as_unset(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("ECI_PAY_STRIPE_SECRET_KEY_FILE", "")
    assert load_settings().stripe_secret_key is None


@pytest.mark.parametrize("kind", ["SECRET_KEY", "WEBHOOK_SECRET"])
@pytest.mark.parametrize("fault", ["both given", "empty file", "unreadable file", "no text", "not printable"])
def test_a_secret_that_cannot_be_had_is_one_fault_that_names_its_variable(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path, kind: str, fault: str
) -> None:
    variable = f"ECI_PAY_STRIPE_{kind}"
    bare_environment.setenv("ECI_PAY_GATEWAY", "stripe")
    if kind == "WEBHOOK_SECRET":
        bare_environment.setenv("ECI_PAY_STRIPE_SECRET_KEY", "sk_live_another")
    file, words = _faulty(tmp_path, fault)
    bare_environment.setenv(f"{variable}_FILE", str(file))
    if fault == "both given":
        bare_environment.setenv(variable, "sk_live_hunter2")
    with pytest.raises(SettingsInvalid) as told_of:
        load_settings()
    (line,) = told_of.value.faults
    assert line.startswith(f"{variable}: " if fault == "both given" else f"{variable}_FILE: ")
    assert words in line
    assert "hunter2" not in line


def _faulty(directory: Path, fault: str) -> tuple[Path, str]:
    """A file that a secret should be in, and what is said of it."""
    file = directory / "secret"
    match fault:
        case "both given":
            file.write_text("sk_live_hunter2")
            return file, "is given, and so is"
        case "empty file":
            file.write_text("\n")
            return file, "the file is empty"
        case "unreadable file":
            # A name that is not there: for root, no file is unreadable.
            return directory / "missing", "the file cannot be read: No such file or directory"
        case "no text":
            file.write_bytes(b"sk_live_hunter2\xff")
            return file, "the file cannot be read: it is no text"
        case _:
            file.write_text("sk_live_hunter2\x07")
            return file, "must be printable ASCII"


async def test_a_command_without_the_secret_or_with_a_faulty_one_ends_with_2_and_a_line_per_fault(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    for environment, words in (
        ({}, "ECI_PAY_STRIPE_SECRET_KEY: ECI_PAY_GATEWAY=stripe needs it"),
        ({"ECI_PAY_STRIPE_SECRET_KEY_FILE": str(tmp_path / "empty")}, "ECI_PAY_STRIPE_SECRET_KEY_FILE: the file is em"),
        ({"ECI_PAY_STRIPE_SECRET_KEY_FILE": str(tmp_path)}, "ECI_PAY_STRIPE_SECRET_KEY_FILE: the file cannot be read"),
    ):
        base = {"DATABASE_URL": database_url, "ECI_PAY_GATEWAY": "stripe"}
        result = await CommandLine({**base, **environment}, tmp_path).run("show", "1")
        assert (result.exit_code, result.stdout) == (2, "")
        assert [words in line for line in result.stderr.splitlines() if "ECI_PAY_" in line] == [True]
        assert "Traceback" not in result.stderr


# 7. Processes


@pytest.fixture
def stripe_command_line(command_line: CommandLine, account: LocalStripe, tmp_path: Path) -> CommandLine:
    """The installed command, configured for Stripe as an orchestrator would."""
    (tmp_path / "stripe secret").write_text(f"{SECRET_KEY}\n")
    stripe = {
        "ECI_PAY_GATEWAY": "stripe",
        "ECI_PAY_STRIPE_API_BASE": account.url,
        "ECI_PAY_STRIPE_SECRET_KEY_FILE": str(tmp_path / "stripe secret"),
        "LOG_LEVEL": "DEBUG",
    }
    return CommandLine({**command_line.environment, **stripe}, tmp_path)


def assert_hides_its_secrets(*texts: str) -> None:
    """Neither key nor token is in what a process has told."""
    for text in texts:
        assert SECRET_KEY not in text
        assert VISA not in text
        assert "Traceback" not in text


async def test_a_server_charges_and_refunds_at_stripe_and_logs_no_secret(
    stripe_command_line: CommandLine, books: Books, account: LocalStripe
) -> None:
    async with serving(stripe_command_line) as server, server.client() as client:
        answer = await charge(client, payment_token=VISA, amount="649.50")
        payment_id = answer.json()["payment_id"]
        again = await charge(client, payment_token=VISA, amount="649.50")
        back = await client.post(f"/v1/payments/{payment_id}/refund", json={"reason": "Damaged", "amount": "9.50"})
        declined = await charge(client, 2, "k2", payment_token=DECLINED_CARD)
        log = "\n".join(server.log)
    assert (answer.status_code, again.status_code, again.content) == (201, 201, answer.content)
    assert (back.status_code, declined.status_code) == (200, 402)
    paid, refused = await account.intents()
    assert (paid["id"], paid["amount"]) == (answer.json()["authorization_code"], 64950)
    assert refused["status"] == "requires_payment_method"
    assert [refund["amount"] for refund in await account.refunds()] == [950]
    assert_hides_its_secrets(log)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_the_command_line_charges_and_refunds_at_stripe(
    stripe_command_line: CommandLine, books: Books, account: LocalStripe
) -> None:
    body = json.dumps(charge_fields(1, payment_token=VISA))
    done: CommandResult = await stripe_command_line.run("charge", "-", "--json", stdin=body)
    assert (done.exit_code, done.json["status"]) == (0, "COMPLETED")
    intent = await the_intent(account)
    assert (intent["id"], intent["amount"]) == (done.json["authorization_code"], 10_000)
    back = await stripe_command_line.run("refund", str(done.json["payment_id"]), "--reason=Damaged", "--yes", "--json")
    assert (back.exit_code, back.json["status"]) == (0, "REFUNDED")
    [made] = await account.refunds()
    assert (made["payment_intent"], made["amount"]) == (intent["id"], 10_000)
    refused = await stripe_command_line.run("charge", "-", stdin=json.dumps(charge_fields(2)))
    assert refused.exit_code == 2
    assert "payment_token" in refused.stderr
    declined = json.dumps(charge_fields(3, payment_token=DECLINED_CARD))
    assert (await stripe_command_line.run("charge", "-", stdin=declined)).exit_code == 1
    assert_hides_its_secrets(done.stdout, done.stderr, back.stdout, back.stderr, refused.stderr)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_command_whose_stripe_is_away_or_refuses_its_key_ends_with_5(
    stripe_command_line: CommandLine, books: Books, tmp_path: Path, unused_tcp_port: int
) -> None:
    body = json.dumps(charge_fields(1, payment_token=VISA))
    (tmp_path / "wrong").write_text("rk_hunter2wrong")
    for changed in (
        {"ECI_PAY_STRIPE_API_BASE": f"http://127.0.0.1:{unused_tcp_port}"},
        {"ECI_PAY_STRIPE_SECRET_KEY_FILE": str(tmp_path / "wrong")},
    ):
        there = CommandLine({**stripe_command_line.environment, **changed}, tmp_path)
        result = await there.run("charge", "-", stdin=body)
        assert (result.exit_code, result.stdout) == (5, "")
        assert "nothing was sent" in result.stderr
        assert "hunter2" not in result.stderr
        assert_hides_its_secrets(result.stderr)
    assert await status_of(books) == "FAILED"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_recover_settles_at_stripe_what_a_server_could_not(
    stripe_command_line: CommandLine, far_paying: PaymentService, books: Books, clock: ManualClock, line: Proxy
) -> None:
    line.cut_after_bytes(0)
    assert (await charged(far_paying)).status_code == 202
    clock.advance(seconds=10)
    await far_paying.recovery.find()
    result = await stripe_command_line.run("recover", "--once", "--json")
    assert (result.exit_code, [(look["state"], look["result"]) for look in result.json]) == (0, [("DONE", "approved")])
    assert await status_of(books) == "COMPLETED"
    assert_hides_its_secrets(result.stderr)
