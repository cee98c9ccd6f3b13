"""Rows to begin and settle, and what they came to."""

from collections.abc import Sequence
from decimal import Decimal

from eci_pay import answers
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, Begun
from eci_pay.charge_records import ChargeBegin, ChargeSettlement
from eci_pay.idempotency import Claim
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.messages import Destination, Messages, Subject
from eci_pay.refund_records import RefundBegin, RefundSettlement
from eci_pay.service import PaymentService
from tests.support import Books, ManualClock, charge_request, names, refund_request

NOW = ManualClock().now
TO_ALL = Messages(frozenset(Destination))


def charge_begin(order_id: int, key: str | None = None, **fields: object) -> ChargeBegin:
    """A charge to begin, under a key of its own where none is given."""
    request = charge_request(order_id, **fields)
    return ChargeBegin.of(
        request,
        Claim.of(key or f"charge {order_id}", "", "charge", request),
        status=PaymentStatus.PROCESSING,
        description="Charge begun",
        takes_over=True,
        at=NOW,
    )


def charge_settlement(
    begin: ChargeBegin, result: BeginResult, status: PaymentStatus = PaymentStatus.COMPLETED
) -> ChargeSettlement:
    """What the gateway said of a charge that has begun."""
    assert isinstance(result, Begun)
    row = result.row
    return ChargeSettlement(
        order_id=begin.request.order_id,
        payment_id=row["payment_id"],
        attempt=row["attempt"],
        status=status,
        authorization_code=f"AUTH{begin.request.order_id}",
        gateway_response="told",
        at=NOW,
        transaction_log_id=row["settle_log_id"],
        description="told",
        key_id=row["key_id"],
        answer=Answer(status_code=201, body=f"the answer of {begin.request.order_id}", payment_id=row["payment_id"]),
        messages=TO_ALL.of_change(status, _subject(row["payment_id"], begin.request.order_id)),
    )


def refund_begin(payment_id: int, amount: str | None, key: str | None = None) -> RefundBegin:
    """A refund to begin."""
    request = refund_request(amount)
    return RefundBegin.of(payment_id, request, Claim.of(key, "", f"refund {payment_id}", request), NOW)


def refund_settlement(result: BeginResult, status: RefundStatus = RefundStatus.COMPLETED) -> RefundSettlement:
    """What the gateway said of a refund that has begun."""
    assert isinstance(result, Begun)
    row = result.row
    return RefundSettlement(
        order_id=row["order_id"],
        payment_id=row["payment_id"],
        refund_id=row["refund_id"],
        status=status,
        gateway_reference=None,
        gateway_response="told",
        description="told",
        at=NOW,
        key_id=row["key_id"],
        begin_id=row["begin_id"],
        answer=answers.ok,
        messages=()
        if status is RefundStatus.FAILED
        else TO_ALL.of_refund(
            _subject(row["payment_id"], row["order_id"]), amount=row["amount"], reason="Customer changed their mind"
        ),
    )


def _subject(payment_id: int, order_id: int) -> Subject:
    return Subject(
        payment_id=payment_id, order_id=order_id, user_id=7, amount=Decimal(100), currency="INR", reference="R"
    )


def kinds(results: Sequence[object]) -> list[str]:
    """What each row came to, in short."""
    return [type(result).__name__ for result in results]


async def paid(service: PaymentService, *order_ids: int, amount: str = "100.00") -> list[int]:
    """The payments of orders that were charged."""
    requests = [charge_request(order_id, amount=amount, payment_method="UPI") for order_id in order_ids]
    done = [await service.charges.charge(request=r, idempotency_key=f"pay {r.order_id}") for r in requests]
    assert names(done) == {"201": len(order_ids)}
    return [answer.payment_id for answer in done]


async def keys(books: Books) -> list[str]:
    """The idempotency keys that are in use."""
    rows = await books.rows("SELECT idempotency_key FROM idempotency_keys ORDER BY 1")
    return [row["idempotency_key"] for row in rows]
