"""The state machine of a payment: its statuses, and which may follow which.

    PENDING ──> PROCESSING ──> COMPLETED ──> REFUNDED
       │            │  ▲
       │            ▼  │ (a new attempt)
       ├──────────> FAILED ──> CANCELLED
       ├──> COMPLETED
       └──> CANCELLED

PROCESSING means that the gateway may or may not have acted: nobody may guess. A new charge takes a FAILED or
PENDING payment over, in PROCESSING or, for cash on delivery, in PENDING.
"""

from enum import StrEnum


class PaymentStatus(StrEnum):
    """Where a payment stands."""

    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REFUNDED = "REFUNDED"


class RefundStatus(StrEnum):
    """Where a refund stands."""

    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


class PaymentMethod(StrEnum):
    """How the customer pays."""

    CREDIT_CARD = "CREDIT_CARD"
    DEBIT_CARD = "DEBIT_CARD"
    UPI = "UPI"
    NET_BANKING = "NET_BANKING"
    WALLET = "WALLET"
    COD = "COD"


CANCELLABLE = (PaymentStatus.PENDING, PaymentStatus.FAILED)
"""What DELETE cancels."""

_UPDATES = {
    PaymentStatus.COMPLETED: (PaymentStatus.PENDING,),
    PaymentStatus.FAILED: (PaymentStatus.PENDING,),
    PaymentStatus.CANCELLED: CANCELLABLE,
}


def statuses_before_update(to: PaymentStatus) -> tuple[PaymentStatus, ...]:
    """The statuses from which a status update may lead to `to`; empty where none may.

    PROCESSING belongs to charges and REFUNDED to refunds alone, so no update leads there.
    """
    return _UPDATES.get(to, ())
