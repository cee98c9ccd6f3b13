"""What is written of a refund: begun and settled, many at once. `refunds.py` tells the story around it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from eci_pay import identifiers
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, BeginStatements, begin, lock_wait, rounds, settle, standing
from eci_pay.context import Origin, current_actor, current_origin
from eci_pay.database import Connection, Database, Row, arrays, fetch
from eci_pay.errors import InvalidState, PayError, PaymentNotFound, RefundExceedsBalance, ValidationFailed
from eci_pay.idempotency import KEY_LIFETIME, Claim, Finish, finish, is_expired
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.messages import Event, Message, message_arrays
from eci_pay.money import check_minor_unit, whole_amount_currencies
from eci_pay.payments import views_of
from eci_pay.requests import RefundRequest
from eci_pay.views import PaymentView

_STATEMENTS = BeginStatements(begin="refund_begin", begun="refund_begun", refused="refund_refused")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefundBegin:
    """A refund to be reserved; without an amount, of all that is left."""

    payment_id: int
    request: RefundRequest
    claim: Claim
    begin_id: str
    at: datetime
    actor: str | None = field(default_factory=current_actor)

    @classmethod
    def of(cls, payment_id: int, request: RefundRequest, claim: Claim, at: datetime) -> "RefundBegin":
        """With the id that eci-pay makes up itself."""
        return cls(
            payment_id=payment_id,
            request=request,
            claim=claim,
            begin_id=identifiers.refund_begin_id(at),
            at=at,
        )

    def columns(self) -> dict[str, Any]:
        """The parameters of `refund_begin.sql`."""
        return {
            "payment_id": self.payment_id,
            "amount": self.request.amount,
            "reason": self.request.reason,
            "begin_id": self.begin_id,
            "description": f"Refund begun: {self.request.reason}",
            "at": self.at,
            "idempotency_key": self.claim.value,
            "caller": self.claim.caller,
            "request_hash": self.claim.request_hash,
            "expires_at": self.at + KEY_LIFETIME,
            "actor": self.actor,
        }

    def claims(self) -> tuple[Hashable, ...]:
        """Its payment and its key."""
        payment = ("payment", self.payment_id)
        if self.claim.value is None:
            return (payment,)
        return (payment, ("key", self.claim.value, self.claim.caller))

    def is_free(self, found: Row) -> bool:
        """Whether neither a live key nor the payment stands in the way."""
        if found["key_id"] is not None and not is_expired(found, self.at):
            return False
        return self.fault(found) is None

    def fault(self, found: Row) -> PayError | None:
        """Why the payment, as `refund_refused.sql` found it, cannot be refunded like this."""
        payment_id, amount = found["payment_id"], self.request.amount
        if payment_id is None:
            return PaymentNotFound(f"there is no payment {self.payment_id}")
        if found["status"] != PaymentStatus.COMPLETED:
            return InvalidState(
                f"a {found['status']} payment cannot be refunded, only a COMPLETED one", payment_id=payment_id
            )
        left = found["amount"] - found["refunded_amount"]
        if left <= 0 or (amount is not None and amount > left):
            return RefundExceedsBalance(
                f"{left} {found['currency']} of the payment are left to refund", payment_id=payment_id
            )
        try:
            check_minor_unit(left if amount is None else amount, found["currency"])
        except ValueError as error:
            return ValidationFailed.of("amount", str(error))
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class RefundSettlement:
    """The gateway's answer to a refund; `answer` makes what its caller is told of the payment as it is then, wherever
    it is called.

    Those of its messages that tell of a full refund come last; whether they are written is known only when it is
    booked.
    """

    order_id: int
    payment_id: int
    refund_id: int
    status: RefundStatus
    gateway_reference: str | None
    gateway_response: str
    description: str
    at: datetime
    key_id: int | None
    begin_id: str
    answer: Callable[[PaymentView], Answer]
    messages: tuple[Message, ...]
    origin: Origin = field(default_factory=current_origin)
    releases_key: bool = False

    def columns(self) -> dict[str, Any]:
        """The parameters of `refund_settle.sql`."""
        return {
            "order_id": self.order_id,
            "payment_id": self.payment_id,
            "refund_id": self.refund_id,
            "status": self.status.value,
            "gateway_reference": self.gateway_reference,
            "gateway_response": self.gateway_response,
            "at": self.at,
            "description": self.description,
            "message_count": sum(message.event is not Event.PAYMENT_REFUNDED for message in self.messages),
            "message_count_in_full": len(self.messages),
            "request_id": self.origin.request_id or None,
            "traceparent": self.origin.traceparent,
            "actor": self.origin.actor,
        }


async def begin_refunds(database: Database, rows: Sequence[RefundBegin], patient: bool = True) -> list[BeginResult]:
    """Reserves every row or tells why not, in order. Unless it is `patient`, it waits for locks only a moment: what is
    locked is Busy, and so may be what shares the statement with it."""
    whole = {"whole_amount_currencies": list(whole_amount_currencies())}
    return await begin(database, _STATEMENTS, rows, {**whole, "lock_wait": lock_wait(patient=patient)})


async def standing_of_refund(database: Database, row: RefundBegin) -> Row:
    """The state of its key and its payment, without beginning it."""
    return await standing(database, _STATEMENTS, row)


async def settle_refunds(
    database: Database, rows: Sequence[RefundSettlement], patient: bool = True
) -> list[Answer | Exception | None]:
    """Books every row and finishes its key; returns, in order, what each caller is told. Patience as above.

    None means that somebody else settled the refund before, an exception that this row was not booked.
    Running it again is safe.
    """

    async def run(batch: Sequence[RefundSettlement]) -> list[Answer | None]:
        wait = lock_wait(patient=patient)
        return await database.transaction(lambda connection: _settle(connection, batch, wait))

    results: dict[int, Answer | Exception | None] = {}
    for numbers in rounds([(row.payment_id,) for row in rows]):
        outcome = await settle([rows[number] for number in numbers], run)
        results.update(zip(numbers, outcome, strict=True))
    return [results[number] for number in range(len(rows))]


async def _settle(connection: Connection, rows: Sequence[RefundSettlement], wait: str | None) -> list[Answer | None]:
    """In one transaction: other refunds of the payment may settle at any time, so the answers are made from a
    second look at the payments, which are locked by then, and not from what was known before."""
    told = message_arrays([row.messages for row in rows])
    columns = arrays([row.columns() for row in rows])
    found = await fetch(connection, "refund_settle", {**columns, **told, "lock_wait": wait})
    applied = {rows[row["n"]].refund_id: rows[row["n"]] for row in found}
    views = await views_of(connection, [row.payment_id for row in applied.values()])
    answers = {refund_id: row.answer(views[row.payment_id]) for refund_id, row in applied.items()}
    finishes = [
        Finish(
            key_id=row.key_id,
            begin_id=row.begin_id,
            answer=answers[refund_id],
            at=row.at,
            releases=row.releases_key,
        )
        for refund_id, row in applied.items()
        if row.key_id is not None
    ]
    stored = await finish(connection, finishes)
    by_refund = {row.refund_id: stored.get(row.key_id) for row in applied.values() if row.key_id is not None}
    return [by_refund.get(row.refund_id) or answers.get(row.refund_id) for row in rows]
