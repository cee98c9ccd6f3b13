"""Examples of requests and answers, as a service with the simulated gateway takes and gives them."""

from typing import Any

from eci_pay.answers import problem_document
from server.openapi_problems import PROBLEMS

TRANSACTION_ID = "TXN01M82K73A83433WHCDRPSSAG4Q"
REQUEST_ID = "8874eef447274ca99e0720422099417e"
_BEGUN, _DONE, _LATER = "2026-11-22T10:15:00.120000Z", "2026-11-22T10:15:00.310000Z", "2026-11-23T08:00:00.500000Z"

CHARGES: dict[str, Any] = {
    "card": {
        "summary": "by card",
        "value": {
            "order_id": 1001,
            "user_id": 501,
            "amount": 1499.00,
            "currency": "INR",
            "payment_method": "CREDIT_CARD",
            "reference": "CART-2026-1001",
        },
    },
    "cash": {
        "summary": "cash on delivery, the amount as text",
        "value": {"order_id": 1002, "user_id": 501, "amount": "249.50", "payment_method": "COD"},
    },
    "declined": {
        "summary": "an amount that the simulated gateway declines",
        "value": {"order_id": 1003, "user_id": 501, "amount": "4000.02", "payment_method": "CREDIT_CARD"},
    },
}
REFUNDS: dict[str, Any] = {
    "partial": {"summary": "in part", "value": {"amount": "499.00", "reason": "Damaged in transit"}},
    "whole": {"summary": "all that is left", "value": {"reason": "Customer changed their mind"}},
}
STATUS_UPDATES: dict[str, Any] = {
    "completed": {"value": {"status": "COMPLETED", "gateway_response": "Paid to the courier"}}
}
EVENTS: dict[str, Any] = {
    "succeeded": {
        "value": {
            "id": "evt_1",
            "type": "payment_intent.succeeded",
            "data": {"object": {"id": "pi_1", "metadata": {"eci_pay_key": f"{TRANSACTION_ID}-1"}}},
        }
    }
}


def _logged(number: int, kind: str, status: str, description: str, **differing: object) -> dict[str, Any]:
    return {
        "transaction_log_id": number,
        "transaction_type": kind,
        "amount": 1499.0,
        "status": status,
        "description": description,
        "created_at": _BEGUN,
        **differing,
    }


_BEGIN = _logged(1, "PAYMENT", "PROCESSING", "Charge begun")

PROCESSING: dict[str, Any] = {
    "payment_id": 1,
    "order_id": 1001,
    "user_id": 501,
    "amount": 1499.0,
    "currency": "INR",
    "payment_method": "CREDIT_CARD",
    "status": "PROCESSING",
    "transaction_id": TRANSACTION_ID,
    "reference": "CART-2026-1001",
    "authorization_code": None,
    "gateway_response": None,
    "created_at": _BEGUN,
    "updated_at": _BEGUN,
    "completed_at": None,
    "captured_at": None,
    "attempt": 1,
    "refunded_amount": 0.0,
    "refund_pending": 0.0,
    "transactions": [_BEGIN],
    "refunds": [],
}
COMPLETED = {
    **PROCESSING,
    "status": "COMPLETED",
    "authorization_code": "AUTH7F3K9Q2M",
    "gateway_response": "Approved",
    "updated_at": _DONE,
    "completed_at": _DONE,
    "captured_at": _DONE,
    "transactions": [_BEGIN, _logged(2, "PAYMENT", "COMPLETED", "Approved", created_at=_DONE)],
}
PENDING = {
    **PROCESSING,
    "status": "PENDING",
    "transactions": [_logged(1, "PAYMENT", "PENDING", "Payment created")],
}
CANCELLED = {
    **PENDING,
    "status": "CANCELLED",
    "updated_at": _LATER,
    "transactions": [
        *PENDING["transactions"],
        _logged(2, "PAYMENT", "CANCELLED", "Payment cancelled", created_at=_LATER),
    ],
}
REFUNDED = {
    **COMPLETED,
    "updated_at": _LATER,
    "refunded_amount": 499.0,
    "transactions": [
        *COMPLETED["transactions"],
        _logged(3, "REFUND", "PROCESSING", "Damaged in transit", created_at=_LATER, amount=499.0),
        _logged(4, "REFUND", "COMPLETED", "Approved", created_at=_LATER, amount=499.0),
    ],
    "refunds": [
        {
            "refund_id": 1,
            "amount": 499.0,
            "reason": "Damaged in transit",
            "status": "COMPLETED",
            "gateway_reference": "RFND5T8W1X6Z",
            "gateway_response": "Approved",
            "created_at": _LATER,
            "updated_at": _LATER,
            "completed_at": _LATER,
        }
    ],
}
PAGE = {
    "total": 1,
    "total_is_exact": True,
    "page": 1,
    "page_size": 10,
    "payments": [{**COMPLETED, "transactions": []}],
    "next_cursor": None,
}
HEALTHY = {"status": "healthy", "service": "payment-service", "timestamp": _DONE}

_DETAILS = {
    "malformed-json": "The body is not valid JSON: Expecting value: line 1 column 11 (char 10).",
    "idempotency-key-missing": "An Idempotency-Key is required",
    "idempotency-key-invalid": "the Idempotency-Key has more than 255 characters",
    "idempotency-key-reused": "this Idempotency-Key was used with a different request: use a new key",
    "idempotency-key-in-flight": "the first request with this Idempotency-Key is still running: ask again in a moment",
    "event-refused": "the event has no valid signature",
    "validation-error": "amount: must not exceed 100000.00",
    "payment-declined": "The card was declined.",
    "refund-declined": "The refund was declined.",
    "payment-not-found": "there is no payment 1",
    "not-found": "There is nothing at this path.",
    "order-in-progress": "a charge of order 1001 is under way",
    "order-already-paid": "order 1001 is completed",
    "order-exists": "order 1001 has payment 1 (PENDING)",
    "invalid-state": "a COMPLETED payment cannot become CANCELLED",
    "refund-exceeds-balance": "1000.00 INR are left of payment 1",
    "bad-request": "This is not HTTP/1.1: Invalid character in chunk size.",
    "request-timeout": "The body of the request did not arrive within 10 seconds.",
    "headers-too-large": "The head of the request has more than 16384 bytes.",
    "body-too-large": "The body has more than 65536 bytes.",
    "unsupported-media-type": "The body must be application/json.",
    "internal-error": "An unexpected error occurred; it has been logged under this request id.",
    "unavailable": "the database is unreachable",
    "unauthorized": "this API key has expired",
    "forbidden": "this wants the scope payments:refund",
    "rate-limited": "order-service may send 1000 requests a second; nothing was done",
}
_MEMBERS: dict[str, Any] = {
    "payment_id": 1,
    "decline_code": "card_declined",
    "errors": [{"field": "amount", "message": "must not exceed 100000.00"}],
}


def problem_example(code: str) -> dict[str, Any]:
    """A problem document with this code."""
    problem = PROBLEMS[code]
    members: dict[str, object] = {name: _MEMBERS[name] for name in problem.members}
    document = problem_document(
        status=problem.status, code=code, title=problem.title, detail=_DETAILS[code], members=members
    )
    return {**document, "request_id": REQUEST_ID}
