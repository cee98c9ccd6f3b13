"""The checker: compares three books after a storm. Ours, the gateway's, and what the customers were told."""

import json
import traceback
from collections import Counter, defaultdict
from decimal import Decimal
from http import HTTPStatus
from typing import Any

from eci_pay.database import fetch
from tests.faults.customers import History, Request
from tests.faults.ledger_gateway import Ledger
from tests.peers import Peers
from tests.support import FAULTS_IN_BOOKS, Books
from tests.test_relay_kills import (
    assert_every_change_was_told,
    assert_lines_arrived_in_order,
    assert_messages_arrived_as_they_are,
)

UNSETTLED = """
SELECT 'payment ' || payment_id || ' is ' || status || ', ' || refund_pending || ' pending' AS fault
FROM payments WHERE status = 'PROCESSING' OR refund_pending > 0
UNION ALL
SELECT 'recovery of payment ' || payment_id || ' is ' || state || ': ' || coalesce(last_result, '')
FROM recoveries WHERE state IN ('OPEN', 'LATE')
UNION ALL
SELECT 'key ' || idempotency_key || ' is not finished' FROM idempotency_keys WHERE response_body IS NULL
"""
CAPTURES = """
SELECT transaction_id || '-' || attempt AS key, authorization_code AS reference, amount
FROM payments WHERE captured_at IS NOT NULL
"""
LATE_CHARGES = """
SELECT 'payment ' || payment_id || ', attempt ' || attempt || ' was charged though ruled out: ' || last_result
    AS fault
FROM recoveries WHERE refund_id IS NULL AND late_reference IS NOT NULL
"""
REFUNDS = """
SELECT p.transaction_id || '-R' || f.refund_id AS key, f.gateway_reference AS reference, f.amount
FROM refunds f JOIN payments p USING (payment_id)
WHERE f.status = 'COMPLETED' AND p.captured_at IS NOT NULL
"""


LATE_REFUNDS = """
SELECT p.order_id, sum(f.amount) AS amount
FROM recoveries r JOIN refunds f USING (refund_id) JOIN payments p ON p.payment_id = f.payment_id
WHERE r.late_reference IS NOT NULL AND f.status = 'COMPLETED'
GROUP BY p.order_id
"""
"""Refunds that the gateway made after they were booked as never happened: their callers were told so, and the operator
that they were made after all."""


async def violations(books: Books, ledger: Ledger, history: History, peers: Peers) -> list[str]:
    """Everything that contradicts an invariant; nothing where the three books agree."""
    return [
        *history.faults,
        *[row["fault"] for row in await books.rows(UNSETTLED)],
        *[row["fault"] for row in await books.rows(LATE_CHARGES)],
        *[str(row) for row in await books.rows(FAULTS_IN_BOOKS, 1)],
        *[f"the totals lack {row}" for row in await fetch(books.connection, "totals_recount", {"notes": False})],
        *await _against_the_gateway(books, ledger),
        *await _against_the_customers(books, history),
        *await _against_the_peers(books, peers),
    ]


async def _against_the_gateway(books: Books, ledger: Ledger) -> list[str]:
    """Invariants 1 to 3: what the gateway has moved is what we have booked, or was given back."""
    faults = [f"key {key} moved money twice at the gateway" for key in ledger.moved_twice()]
    faults += [f"{intent} was given back beyond what was taken" for intent in ledger.overdrawn()]
    captured = {row["key"]: row for row in await books.rows(CAPTURES)}
    refunded = {row["key"]: row for row in await books.rows(REFUNDS)}
    charges = {charge.key: charge for charge in ledger.charges if charge.took_money}
    given_back = ledger.given_back()
    for key, row in captured.items():
        charge = charges.get(key)
        if charge is None:
            faults.append(f"{key} is booked as captured, and the gateway took nothing")
        elif (charge.id, charge.amount) != (row["reference"], _minor(row["amount"])):
            faults.append(f"{key} is booked as {row}, and the gateway has {charge}")
    for key, charge in charges.items():
        if key not in captured and given_back.get(f"{key}-LATE") != charge.amount:
            faults.append(f"the gateway took {charge} for what is not booked, and it was not given back")
    refunds = {refund.key: refund for refund in ledger.refunds}
    for key, row in refunded.items():
        refund = refunds.get(key)
        if refund is None:
            faults.append(f"{key} is booked as refunded, and the gateway gave nothing back")
        elif (refund.id, refund.amount) != (row["reference"], _minor(row["amount"])):
            faults.append(f"{key} is booked as {row}, and the gateway has {refund}")
    for key, refund in refunds.items():
        if key not in refunded and not (key.endswith("-LATE") and key.removesuffix("-LATE") not in captured):
            faults.append(f"the gateway gave back {refund}, which is not booked")
    return faults


async def _against_the_customers(books: Books, history: History) -> list[str]:
    """Invariant 4, and that nobody was told what is not so."""
    rows = await books.rows("SELECT payment_id, order_id, status, captured_at, refunded_amount, amount FROM payments")
    payments: dict[int, dict[str, Any]] = {row["order_id"]: row for row in rows}
    late = {row["order_id"]: row["amount"] for row in await books.rows(LATE_REFUNDS)}
    faults = []
    by_order: dict[int, list[Request]] = defaultdict(list)
    for request in history.requests:
        by_order[request.order_id].append(request)
    for order_id, requests in by_order.items():
        payment = payments.get(order_id)
        paid = [request for request in requests if request.kind == "charge" and _was_told(request, 201)]
        refunds = [request for request in requests if request.kind == "refund"]
        if len(paid) > 1:
            faults.append(f"order {order_id} was told under {len(paid)} keys that it is paid")
        if paid and (payment is None or payment["captured_at"] is None):
            faults.append(f"order {order_id} was told that it is paid, and is {payment}")
        if not paid and payment is not None and payment["captured_at"] is not None:
            faults.append(f"order {order_id} is captured, and nobody was told so: {payment}")
        told = sum((_amount_of(request) for request in refunds if _was_told(request, 200)), Decimal(0))
        unsure = [request for request in refunds if request.key is None and not _is_answered(request)]
        refunded = (payment["refunded_amount"] if payment is not None else Decimal(0)) - late.get(order_id, 0)
        if told > refunded or (told < refunded and not unsure):
            faults.append(f"order {order_id} was told of {told} given back, and the books have {refunded}")
    return faults


async def _against_the_peers(books: Books, peers: Peers) -> list[str]:
    """Invariant 5: every change was told, each message arrived at least once, and in order."""
    faults = []
    try:
        await assert_every_change_was_told(books)
        await assert_messages_arrived_as_they_are(books, peers)
        await assert_lines_arrived_in_order(books, peers)
    except AssertionError as error:
        (*_, where) = traceback.extract_tb(error.__traceback__)
        faults.append(f"the peers were told something else: {where.line}, {str(error)[:2000]}")
    return faults


def _was_told(request: Request, status: int) -> bool:
    return any(told.status == status for told in request.told)


def _is_answered(request: Request) -> bool:
    """Whether its caller knows what became of it: an answer for good, or that nothing was done."""
    return any(told.is_final or told.status in (409, 422, 503) for told in request.told)


def _amount_of(refund: Request) -> Decimal:
    """What the answer says of this refund; an earlier try that was not sent has left a failed one."""
    document = json.loads(next(told.body for told in refund.told if told.status == HTTPStatus.OK))
    amounts = [
        Decimal(str(each["amount"]))
        for each in document["refunds"]
        if each["reason"] == refund.body["reason"] and each["status"] == "COMPLETED"
    ]
    return sum(amounts, Decimal(0))


def _minor(amount: Decimal) -> int:
    return int(amount * 100)


def counts(history: History) -> dict[str, int]:
    """How often each status was answered; 0: no answer."""
    return {str(status): number for status, number in sorted(Counter(history.statuses).items())}
