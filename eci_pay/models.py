"""The tables as SQLModel describes them. The migrations make them; a test proves that both say the same."""

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Numeric,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlmodel import Field, SQLModel


def _id() -> Any:
    return Field(default=None, primary_key=True, sa_type=BigInteger, sa_column_args=(Identity(always=True),))


def _payment_id(**options: Any) -> Any:
    return Field(sa_type=BigInteger, foreign_key="payments.payment_id", **options)


def _run_id(**options: Any) -> Any:
    return Field(sa_type=BigInteger, foreign_key="reconciliation_runs.run_id", **options)


def _money(default: str | None = None) -> Any:
    if default is None:
        return Field(max_digits=10, decimal_places=2)
    return Field(
        default=Decimal(default),
        max_digits=10,
        decimal_places=2,
        sa_column_kwargs={"server_default": text(default)},
    )


def _instant() -> Any:
    return Field(sa_type=TIMESTAMP(timezone=True), sa_column_kwargs={"server_default": text("now()")})


def _instant_or_none() -> Any:
    return Field(default=None, sa_type=TIMESTAMP(timezone=True), nullable=True)


class Payment(SQLModel, table=True):
    """One row per order, for its whole life."""

    __tablename__ = "payments"
    __table_args__ = (
        UniqueConstraint("order_id", name="idx_payments_order_id"),
        UniqueConstraint("transaction_id", name="idx_payments_transaction_id"),
        Index("idx_payments_user_id", "user_id"),
        Index("idx_payments_status", "status", "payment_id", postgresql_where=text("status <> 'COMPLETED'")),
        Index("idx_payments_reference", "reference"),
        Index("idx_payments_created_at", "created_at", "payment_id"),
        CheckConstraint("order_id > 0", name="payments_order_id_positive"),
        CheckConstraint("user_id > 0", name="payments_user_id_positive"),
        CheckConstraint("amount > 0 AND amount < 'NaN'", name="payments_amount_positive"),
        CheckConstraint(
            "payment_method IN ('CREDIT_CARD', 'DEBIT_CARD', 'UPI', 'NET_BANKING', 'WALLET', 'COD')",
            name="payments_method_known",
        ),
        CheckConstraint(
            "status IN ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED', 'REFUNDED')",
            name="payments_status_known",
        ),
        CheckConstraint("attempt > 0", name="payments_attempt_positive"),
        CheckConstraint("last_sequence >= 0", name="payments_last_sequence_not_negative"),
        CheckConstraint("refunded_amount BETWEEN 0 AND amount", name="payments_refund_within_capture"),
        CheckConstraint("refund_pending BETWEEN 0 AND refunded_amount", name="payments_pending_within_refund"),
        CheckConstraint(
            "refunded_amount = 0 OR status IN ('COMPLETED', 'REFUNDED')", name="payments_refund_of_completed"
        ),
        CheckConstraint(
            "status <> 'REFUNDED' OR (refunded_amount = amount AND refund_pending = 0)",
            name="payments_refunded_in_full",
        ),
    )

    payment_id: int | None = _id()
    order_id: int = Field(sa_type=BigInteger)
    user_id: int = Field(sa_type=BigInteger)
    amount: Decimal = _money()
    currency: str = Field(default="INR", max_length=3, sa_column_kwargs={"server_default": "INR"})
    payment_method: str = Field(max_length=20)
    status: str = Field(default="PENDING", max_length=20, sa_column_kwargs={"server_default": "PENDING"})
    transaction_id: str = Field(max_length=50)
    reference: str | None = Field(default=None, max_length=100)
    authorization_code: str | None = Field(default=None, max_length=50)
    gateway_response: str | None = Field(default=None, max_length=500)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    completed_at: datetime | None = _instant_or_none()
    captured_at: datetime | None = _instant_or_none()
    attempt: int = Field(default=1, sa_column_kwargs={"server_default": text("1")})
    begin_id: str | None = Field(default=None, max_length=50)
    refunded_amount: Decimal = _money("0")
    refund_pending: Decimal = _money("0")
    last_sequence: int = Field(default=0, sa_column_kwargs={"server_default": text("0")})
    previous_status: str | None = Field(default=None, max_length=20)
    previous_method: str | None = Field(default=None, max_length=20)


class Transaction(SQLModel, table=True):
    """The audit trail: append-only."""

    __tablename__ = "transactions"
    __table_args__ = (
        Index("idx_transactions_payment_id", "payment_id"),
        CheckConstraint("transaction_type IN ('PAYMENT', 'REFUND')", name="transactions_type_known"),
        CheckConstraint("amount > 0 AND amount < 'NaN'", name="transactions_amount_positive"),
        CheckConstraint(
            "CASE transaction_type WHEN 'PAYMENT' THEN"
            " status IN ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED', 'REFUNDED')"
            " ELSE status IN ('PROCESSING', 'REFUNDED', 'FAILED') END",
            name="transactions_status_known",
        ),
    )

    transaction_log_id: int | None = _id()
    payment_id: int = _payment_id()
    transaction_type: str = Field(max_length=20)
    amount: Decimal = _money()
    status: str = Field(max_length=20)
    description: str | None = Field(default=None, max_length=500)
    created_at: datetime = _instant()
    actor: str | None = Field(default=None, max_length=200)


class Refund(SQLModel, table=True):
    """A refund reserves its amount on the payment while it is PROCESSING."""

    __tablename__ = "refunds"
    __table_args__ = (
        UniqueConstraint("begin_id", name="idx_refunds_begin_id"),
        Index("idx_refunds_payment_id", "payment_id"),
        Index("idx_refunds_processing", "created_at", postgresql_where=text("status = 'PROCESSING'")),
        CheckConstraint("amount > 0 AND amount < 'NaN'", name="refunds_amount_positive"),
        CheckConstraint("status IN ('PROCESSING', 'COMPLETED', 'FAILED')", name="refunds_status_known"),
    )

    refund_id: int | None = _id()
    payment_id: int = _payment_id()
    amount: Decimal = _money()
    reason: str = Field(max_length=400)
    status: str = Field(max_length=20)
    gateway_reference: str | None = Field(default=None, max_length=100)
    gateway_response: str | None = Field(default=None, max_length=500)
    begin_id: str | None = Field(default=None, max_length=50)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    completed_at: datetime | None = _instant_or_none()


class IdempotencyKey(SQLModel, table=True):
    """A key without a response is unfinished and never expires."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        UniqueConstraint("idempotency_key", "caller", name="idx_idempotency_key"),
        Index("idx_idempotency_expires", "expires_at"),
        CheckConstraint(
            "response_body IS NULL OR status_code IS NOT NULL", name="idempotency_keys_response_has_status"
        ),
    )

    id: int | None = _id()
    idempotency_key: str = Field(max_length=255)
    caller: str = Field(default="", max_length=255, sa_column_kwargs={"server_default": ""})
    payment_id: int | None = _payment_id(default=None, nullable=True)
    refund_id: int | None = Field(default=None, sa_type=BigInteger, foreign_key="refunds.refund_id")
    request_hash: str = Field(max_length=64)
    begin_id: str | None = Field(default=None, max_length=50)
    response_body: str | None = Field(default=None, sa_type=Text)
    status_code: int | None = None
    created_at: datetime = _instant()
    expires_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))


class Recovery(SQLModel, table=True):
    """Looks at the gateway for what became of a charge or a refund that was left without an answer."""

    __tablename__ = "recoveries"
    __table_args__ = (
        UniqueConstraint("refund_id", name="idx_recoveries_refund_id"),
        Index(
            "idx_recoveries_charge", "payment_id", "attempt", unique=True, postgresql_where=text("refund_id IS NULL")
        ),
        Index("idx_recoveries_due", "next_look_at", postgresql_where=text("state <> 'DONE'")),
        CheckConstraint("state IN ('OPEN', 'CHECKING', 'LATE', 'DONE')", name="recoveries_state_known"),
        CheckConstraint("looks >= 0", name="recoveries_looks_not_negative"),
    )

    recovery_id: int | None = _id()
    payment_id: int = _payment_id()
    attempt: int
    refund_id: int | None = Field(default=None, sa_type=BigInteger, foreign_key="refunds.refund_id")
    amount: Decimal = _money()
    currency: str = Field(max_length=3)
    payment_method: str = Field(max_length=20)
    begun_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    state: str = Field(default="OPEN", max_length=20, sa_column_kwargs={"server_default": "OPEN"})
    looks: int = Field(default=0, sa_column_kwargs={"server_default": text("0")})
    found_at: datetime = _instant()
    looked_at: datetime | None = _instant_or_none()
    next_look_at: datetime = _instant()
    lease_id: UUID | None = None
    last_result: str | None = Field(default=None, max_length=500)
    late_reference: str | None = Field(default=None, max_length=100)
    ended_at: datetime | None = _instant_or_none()
    returned_reference: str | None = Field(default=None, max_length=100)


class OutboxMessage(SQLModel, table=True):
    """A message to another service, written in the transaction of the change that it tells of."""

    __tablename__ = "outbox"
    __table_args__ = (
        UniqueConstraint("payment_id", "sequence", name="idx_outbox_payment_sequence"),
        CheckConstraint("sequence > 0", name="outbox_sequence_positive"),
        CheckConstraint("attempts >= 0", name="outbox_attempts_not_negative"),
        CheckConstraint("delivered_at IS NULL OR dead_at IS NULL", name="outbox_delivered_or_dead"),
        CheckConstraint("destination IN ('order', 'inventory', 'notification')", name="outbox_destination_known"),
        CheckConstraint("lease_id IS NULL OR (delivered_at IS NULL AND dead_at IS NULL)", name="outbox_leased_is_open"),
        Index(
            "idx_outbox_pending",
            "destination",
            "next_attempt_at",
            postgresql_where=text("delivered_at IS NULL AND dead_at IS NULL"),
        ),
        Index("idx_outbox_dead", "destination", "message_id", postgresql_where=text("dead_at IS NOT NULL")),
        Index("idx_outbox_delivered", "delivered_at", postgresql_where=text("delivered_at IS NOT NULL")),
    )

    message_id: int | None = _id()
    payment_id: int = _payment_id()
    sequence: int
    destination: str = Field(max_length=20)
    event: str = Field(max_length=50)
    payload: dict[str, Any] = Field(sa_type=JSONB)
    attempts: int = Field(default=0, sa_column_kwargs={"server_default": text("0")})
    created_at: datetime = _instant()
    next_attempt_at: datetime = _instant()
    delivered_at: datetime | None = _instant_or_none()
    dead_at: datetime | None = _instant_or_none()
    last_error: str | None = Field(default=None, max_length=500)
    request_id: str | None = Field(default=None, max_length=128)
    traceparent: str | None = Field(default=None, max_length=55)
    first_attempt_at: datetime | None = _instant_or_none()
    lease_id: UUID | None = None


class ReconciliationRun(SQLModel, table=True):
    """One reconciliation: what was compared, by whom, and what came of it."""

    __tablename__ = "reconciliation_runs"
    __table_args__ = (
        Index("idx_reconciliation_runs_file_hash", "file_hash", postgresql_where=text("file_hash IS NOT NULL")),
    )

    run_id: int | None = _id()
    operator: str = Field(max_length=100)
    started_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    ended_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    file_name: str | None = Field(default=None, max_length=500)
    file_hash: str | None = Field(default=None, max_length=64)
    period_from: datetime | None = _instant_or_none()
    period_to: datetime | None = _instant_or_none()
    payments: int = Field(sa_type=BigInteger)
    lines: int = Field(sa_type=BigInteger)
    differences: int = Field(sa_type=BigInteger)
    faults: int = Field(sa_type=BigInteger)
    repaired: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    counts: dict[str, Any] = Field(sa_type=JSONB)


class SettlementAwaited(SQLModel, table=True):
    """An operation of ours that another file settles than the one of its day: still awaited, or seen there."""

    __tablename__ = "settlements_awaited"
    __table_args__ = (
        UniqueConstraint("operation_key", name="idx_settlements_awaited_key"),
        Index("idx_settlements_awaited_payment_id", "payment_id"),
        Index(
            "idx_settlements_awaited_open",
            "booked_at",
            postgresql_where=text("settled_run_id IS NULL AND closed_at IS NULL"),
        ),
    )

    awaited_id: int | None = _id()
    operation_key: str = Field(max_length=30)
    payment_id: int = _payment_id()
    refund_id: int | None = Field(default=None, sa_type=BigInteger, foreign_key="refunds.refund_id")
    recovery_id: int | None = Field(default=None, sa_type=BigInteger, foreign_key="recoveries.recovery_id")
    booked_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    run_id: int = _run_id()
    settled_run_id: int | None = _run_id(default=None)
    closed_at: datetime | None = _instant_or_none()
    closed_by: str | None = Field(default=None, max_length=100)


class SettlementLinePending(SQLModel, table=True):
    """A line of a file that was within its time limit: later runs judge it anew."""

    __tablename__ = "settlement_lines_pending"
    __table_args__ = (
        UniqueConstraint(
            "transaction_id", "operation", "gateway_reference", "status", name="idx_settlement_lines_pending"
        ),
    )

    line_id: int | None = _id()
    run_id: int = _run_id()
    operation: str = Field(max_length=10)
    transaction_id: str = Field(max_length=50)
    gateway_reference: str = Field(max_length=100)
    amount: Decimal = Field(sa_type=Numeric)
    currency: str = Field(max_length=3)
    status: str = Field(max_length=10)
    settled_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    ended_run_id: int | None = _run_id(default=None)
    closed_at: datetime | None = _instant_or_none()
    closed_by: str | None = Field(default=None, max_length=100)


class BulkRun(SQLModel, table=True):
    """A file of refunds or charges, from its first run on: its rows' idempotency keys may expire a day after that."""

    __tablename__ = "bulk_runs"
    __table_args__ = (
        UniqueConstraint("kind", "file_hash", name="idx_bulk_runs_file"),
        CheckConstraint("kind IN ('refund', 'charge')", name="bulk_runs_kind_known"),
        CheckConstraint("row_count > 0", name="bulk_runs_row_count_positive"),
        CheckConstraint("runs > 0", name="bulk_runs_runs_positive"),
    )

    bulk_run_id: int | None = _id()
    kind: str = Field(max_length=20)
    file_hash: str = Field(max_length=64)
    file_name: str = Field(max_length=500)
    operator: str = Field(max_length=100)
    row_count: int
    started_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    last_operator: str = Field(max_length=100)
    last_started_at: datetime = Field(sa_type=TIMESTAMP(timezone=True))
    runs: int = Field(default=1, sa_column_kwargs={"server_default": text("1")})


class ApiKeyRecord(SQLModel, table=True):
    """An API key, without its secret."""

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("key_id", name="idx_api_keys_key_id"),
        CheckConstraint("name <> ''", name="api_keys_name_given"),
        CheckConstraint("cardinality(scopes) > 0", name="api_keys_scopes_given"),
        CheckConstraint("octet_length(secret_hash) = 32", name="api_keys_secret_hash_length"),
    )

    api_key_id: int | None = _id()
    key_id: str = Field(max_length=20)
    name: str = Field(max_length=64)
    scopes: list[str] = Field(sa_type=ARRAY(Text))
    secret_hash: bytes
    created_by: str | None = Field(default=None, max_length=200)
    created_at: datetime = _instant()
    expires_at: datetime | None = _instant_or_none()
    revoked_at: datetime | None = _instant_or_none()
    revoked_by: str | None = Field(default=None, max_length=200)
    last_used_at: datetime | None = _instant_or_none()


_METRICS = "metric IN ('status', 'method', 'completed', 'failed', 'refunds', 'errors')"


class Total(SQLModel, table=True):
    """A running total of the books, but for what `TOTAL_CHANGES` has in addition."""

    __tablename__ = "totals"
    __table_args__ = (CheckConstraint(_METRICS, name="totals_metric_known"),)

    metric: str = Field(primary_key=True, max_length=20)
    label: str = Field(primary_key=True, max_length=20)
    count: int = Field(sa_type=BigInteger)
    amount: Decimal = Field(sa_type=Numeric)


TOTAL_CHANGES = Table(
    "total_changes",
    SQLModel.metadata,
    Column("metric", String(20), nullable=False),
    Column("label", String(20), nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("amount", Numeric, nullable=False),
    CheckConstraint(_METRICS, name="total_changes_metric_known"),
)
"""What statements have added to totals, until it is added up. It has no key, so it is no model."""
