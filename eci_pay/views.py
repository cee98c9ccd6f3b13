"""What the outside sees of a payment. Every field is listed, so that a new column cannot leak."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer

from eci_pay.lifecycle import PaymentMethod, PaymentStatus, RefundStatus


def _in_utc(instant: datetime) -> datetime:
    return instant.astimezone(UTC)


Amount = Annotated[Decimal, PlainSerializer(float, return_type=float, when_used="json")]
"""An exact amount; a JSON number once it is text. Every amount of two decimals in NUMERIC(10,2) survives that."""

Instant = Annotated[datetime, AfterValidator(_in_utc)]


class View(BaseModel):
    """A frozen picture of the database at one moment."""

    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


class TransactionView(View):
    """A row of the audit trail."""

    transaction_log_id: int
    transaction_type: str
    amount: Amount
    status: str
    description: str | None
    created_at: Instant


class RefundView(View):
    """A refund, whole or partial."""

    refund_id: int
    amount: Amount
    reason: str
    status: RefundStatus
    gateway_reference: str | None
    gateway_response: str | None
    created_at: Instant
    updated_at: Instant
    completed_at: Instant | None


class PaymentView(View):
    """A payment with its history, oldest first."""

    payment_id: int
    order_id: int
    user_id: int
    amount: Amount
    currency: str
    payment_method: PaymentMethod
    status: PaymentStatus
    transaction_id: str
    reference: str | None
    authorization_code: str | None
    gateway_response: str | None
    created_at: Instant
    updated_at: Instant
    completed_at: Instant | None
    captured_at: Instant | None
    attempt: int
    refunded_amount: Amount
    refund_pending: Amount
    transactions: tuple[TransactionView, ...] = ()
    refunds: tuple[RefundView, ...] = ()

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "PaymentView":
        """The view of a row of `payments_by_id.sql`, or of `payments` alone."""
        return cls.model_validate(row)


class PaymentPage(View):
    """A page of payments, newest first; their histories are left out."""

    total: int
    total_is_exact: bool
    page: int | None
    page_size: int
    payments: tuple[PaymentView, ...]
    next_cursor: str | None


class MessageState(StrEnum):
    """Where a message of the outbox stands."""

    PENDING = "pending"
    IN_DELIVERY = "in-delivery"
    DELIVERED = "delivered"
    DEAD = "dead"


class MessageView(View):
    """A message to another service. `attempts` are deliveries that have ended, each of several tries."""

    message_id: int
    payment_id: int
    sequence: int
    destination: str
    event: str
    state: MessageState
    attempts: int
    created_at: Instant
    first_attempt_at: Instant | None
    next_attempt_at: Instant | None
    delivered_at: Instant | None
    dead_at: Instant | None
    last_error: str | None
    request_id: str | None
    traceparent: str | None
    payload: dict[str, Any]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "MessageView":
        """The view of a row of `outbox_list.sql` or `outbox_by_id.sql`."""
        is_open = row["delivered_at"] is None and row["dead_at"] is None
        if row["delivered_at"] is not None:
            state = MessageState.DELIVERED
        elif row["dead_at"] is not None:
            state = MessageState.DEAD
        else:
            state = MessageState.IN_DELIVERY if row["in_delivery"] else MessageState.PENDING
        # Of a message that is not open it would say nothing.
        next_attempt_at = row["next_attempt_at"] if is_open else None
        return cls.model_validate({**row, "state": state, "next_attempt_at": next_attempt_at})


class MessagePage(View):
    """A page of undelivered messages, oldest first."""

    messages: tuple[MessageView, ...]
    next_cursor: str | None


class PaymentMessages(View):
    """The latest messages about one payment, oldest first, and how many earlier ones there are."""

    messages: tuple[MessageView, ...] = ()
    messages_left_out: int = 0


class OutboxStats(View):
    """The undelivered messages of one destination. Ages count from the change that a message tells of."""

    destination: str
    pending: int
    in_delivery: int
    oldest_pending_seconds: float | None
    dead: int
    oldest_dead_seconds: float | None
