"""What each operation of the route table is for, what it takes and what it answers where all goes well."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from eci_pay.requests import ChargeRequest, CreateRequest, RefundRequest, StatusUpdateRequest
from eci_pay.views import PaymentPage, PaymentView
from server import openapi_examples as examples
from server.docs import MEDIA_TYPES
from server.payments import ACCEPTED, CREATED

TAGS = {
    "Payments": "Charges, refunds, status changes and queries.",
    "Gateway": "What the gateway tells of its own accord.",
    "Operations": "For whoever runs the service.",
    "Documentation": "This API, for programs and for people.",
}

JSON = "application/json"
TEXT = {"type": "string"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An answer that is no problem."""

    description: str
    schema: type[BaseModel] | dict[str, Any]
    examples: dict[str, Any]
    media_types: tuple[str, ...] = (JSON,)
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """An operation in words; `parameters` name those beside the path's own."""

    operation_id: str
    tag: str
    summary: str
    description: str
    answers: dict[int, Answered]
    parameters: tuple[str, ...] = ()
    is_filtered: bool = False
    body: type[BaseModel] | dict[str, Any] | None = None
    examples: dict[str, Any] | None = None


_KEY_WORDS = (
    "The same key with the same request has the same answer for 24 hours, byte for byte; with another request it is "
    "refused. What validation or a conflict refuses leaves nothing under the key."
)

_UNKNOWN = Answered(
    description=(
        "The gateway may or may not have acted, so the outcome is not known yet. Ask again with the same key: the "
        "answer is 202 until the outcome is known, then the outcome."
    ),
    schema=PaymentView,
    examples={"unknown": {"value": examples.PROCESSING}},
    headers=("Location", "Retry-After"),
)

_SHOWN = {
    200: Answered(
        description="The payment with its history, oldest first.",
        schema=PaymentView,
        examples={"payment": {"value": examples.COMPLETED}},
    )
}

_HEALTHY = {
    200: Answered(
        description="Healthy.",
        schema={
            "type": "object",
            "required": ["status", "service", "timestamp"],
            "properties": {
                "status": {"const": "healthy"},
                "service": TEXT,
                "timestamp": {**TEXT, "format": "date-time"},
            },
        },
        examples={"healthy": {"value": examples.HEALTHY}},
    )
}


def _created(verb: str, payment: dict[str, Any]) -> Answered:
    return Answered(
        description=f"The payment was {verb}.",
        schema=PaymentView,
        examples={
            verb: {"value": payment},
            "replayed": {
                "summary": "the same key again: the same bytes, and the header Idempotent-Replayed",
                "value": payment,
            },
        },
        headers=("Location", "Idempotent-Replayed"),
    )


def _text(media_type: str, description: str, *headers: str) -> dict[int, Answered]:
    return {
        200: Answered(description=description, schema=TEXT, examples={}, media_types=(media_type,), headers=headers)
    }


def _health(operation_id: str, summary: str, description: str) -> Described:
    return Described(
        operation_id=operation_id, tag="Operations", summary=summary, description=description, answers=_HEALTHY
    )


DESCRIBED: dict[str, Described] = {
    "POST /v1/payments/charge": Described(
        operation_id="chargePayment",
        tag="Payments",
        summary="Charge an order",
        description=(
            "Takes the money of an order, once. Cash on delivery asks no gateway and stays PENDING until a status "
            f"update completes it. {_KEY_WORDS}"
        ),
        parameters=("Idempotency-Key",),
        body=ChargeRequest,
        examples=examples.CHARGES,
        answers={CREATED: _created("charged", examples.COMPLETED), ACCEPTED: _UNKNOWN},
    ),
    "POST /v1/payments": Described(
        operation_id="createPayment",
        tag="Payments",
        summary="Record a payment",
        description=f"Records a PENDING payment and asks no gateway. {_KEY_WORDS}",
        parameters=("Optional-Idempotency-Key",),
        body=CreateRequest,
        examples={"card": examples.CHARGES["card"]},
        answers={CREATED: _created("recorded", examples.PENDING)},
    ),
    "GET /v1/payments": Described(
        operation_id="listPayments",
        tag="Payments",
        summary="List payments",
        description=(
            "Newest first, without their histories. `total` is exact up to 10,000 and stays there; `cursor` takes the "
            "`next_cursor` of the page before, and walks any depth at constant cost."
        ),
        is_filtered=True,
        answers={200: Answered(description="A page.", schema=PaymentPage, examples={"page": {"value": examples.PAGE}})},
    ),
    "GET /v1/payments/{payment_id}": Described(
        operation_id="showPayment",
        tag="Payments",
        summary="Show a payment",
        description="By its id.",
        answers=_SHOWN,
    ),
    "DELETE /v1/payments/{payment_id}": Described(
        operation_id="cancelPayment",
        tag="Payments",
        summary="Cancel a payment",
        description="Cancels a PENDING or FAILED payment, for good.",
        answers={
            200: Answered(
                description="The cancelled payment.",
                schema=PaymentView,
                examples={"cancelled": {"value": examples.CANCELLED}},
            )
        },
    ),
    "GET /v1/payments/order/{order_id}": Described(
        operation_id="showPaymentOfOrder",
        tag="Payments",
        summary="Show an order's payment",
        description="An order has one payment, whatever the number of attempts.",
        answers=_SHOWN,
    ),
    "GET /v1/payments/transaction/{transaction_id}": Described(
        operation_id="showPaymentOfTransaction",
        tag="Payments",
        summary="Show a transaction's payment",
        description="By the `transaction_id` that the gateway was given, too.",
        answers=_SHOWN,
    ),
    "POST /v1/payments/{payment_id}/refund": Described(
        operation_id="refundPayment",
        tag="Payments",
        summary="Refund a payment",
        description=(
            "Gives money back, whole or in part, until nothing is left; without an amount, all that is left. Without a "
            f"key, a request that is sent twice refunds twice. {_KEY_WORDS}"
        ),
        parameters=("Optional-Idempotency-Key",),
        body=RefundRequest,
        examples=examples.REFUNDS,
        answers={
            200: Answered(
                description="The refund was made.",
                schema=PaymentView,
                examples={"refunded": {"value": examples.REFUNDED}},
                headers=("Idempotent-Replayed",),
            ),
            ACCEPTED: _UNKNOWN,
        },
    ),
    "PATCH /v1/payments/{payment_id}/status": Described(
        operation_id="updatePaymentStatus",
        tag="Payments",
        summary="Set a payment's status",
        description="PENDING to COMPLETED, FAILED or CANCELLED, and FAILED to CANCELLED.",
        body=StatusUpdateRequest,
        examples=examples.STATUS_UPDATES,
        answers={
            200: Answered(
                description="The changed payment.",
                schema=PaymentView,
                examples={"completed": {"value": examples.COMPLETED}},
            )
        },
    ),
    "POST /v1/gateway/events": Described(
        operation_id="takeGatewayEvent",
        tag="Gateway",
        summary="Take an event",
        description=(
            "What became of a charge or refund, as the gateway tells it. The body is checked against its signature "
            "before it is read; an event that settles nothing is taken too."
        ),
        parameters=("Stripe-Signature",),
        body={"type": "object", "description": "An event in the gateway's own words."},
        examples=examples.EVENTS,
        answers={
            200: Answered(
                description="The event was taken.",
                schema={"type": "object", "required": ["received"], "properties": {"received": {"const": True}}},
                examples={"received": {"value": {"received": True}}},
            )
        },
    ),
    "GET /health": _health("health", "Healthy?", "Asks nothing of anybody."),
    "GET /health/live": _health("healthLive", "Alive?", "Asks nothing of anybody."),
    "GET /health/startup": _health("healthStartup", "Started?", "The server answers only once it has started."),
    "GET /health/ready": _health("healthReady", "Able to work?", "Asks the database."),
    "GET /metrics": Described(
        operation_id="metrics",
        tag="Operations",
        summary="Metrics for Prometheus",
        description="While the database is away, those of this process alone.",
        answers=_text("text/plain", "The metrics as text."),
    ),
    "GET /openapi.json": Described(
        operation_id="openapi",
        tag="Documentation",
        summary="This document",
        description="OpenAPI 3.1.",
        answers={
            200: Answered(
                description="The document.",
                schema={"type": "object", "required": ["openapi", "info", "paths"]},
                examples={},
            )
        },
    ),
    "GET /docs": Described(
        operation_id="docs",
        tag="Documentation",
        summary="This API to read and to try out",
        description="Swagger UI.",
        answers=_text("text/html", "The page.", "Cache-Control"),
    ),
    "GET /docs/{version}/{file}": Described(
        operation_id="docsFile",
        tag="Documentation",
        summary="A file of the page",
        description="Browsers keep it for a year: its address has its version in it.",
        answers={
            200: Answered(
                description="The file.",
                schema=TEXT,
                examples={},
                media_types=tuple(MEDIA_TYPES.values()),
                headers=("Cache-Control",),
            )
        },
    ),
}
"""By method and path, as the route table has them."""
