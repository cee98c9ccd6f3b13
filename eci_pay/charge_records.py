"""What is written of a charge: begun and settled, many at once. `charges.py` tells the story around it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from eci_pay import identifiers
from eci_pay.answers import Answer, created
from eci_pay.batches import BeginResult, BeginStatements, begin, lock_wait, rounds, settle, standing
from eci_pay.context import Origin, current_actor, current_origin
from eci_pay.database import Connection, Database, Row, arrays
from eci_pay.idempotency import KEY_LIFETIME, Claim, Finish, finish, is_expired
from eci_pay.lifecycle import PaymentMethod, PaymentStatus
from eci_pay.messages import Message, message_arrays
from eci_pay.payments import views_of
from eci_pay.requests import CreateRequest

_STATEMENTS = BeginStatements(begin="charge_begin", begun="charge_begun", refused="charge_refused")
_TAKEN_OVER = (PaymentStatus.FAILED, PaymentStatus.PENDING)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChargeBegin:
    """A payment to be recorded: PROCESSING where a gateway will be asked, else PENDING.

    `takes_over` says whether it may take over a FAILED or PENDING payment of the same order.
    """

    request: CreateRequest
    claim: Claim
    status: PaymentStatus
    description: str
    takes_over: bool
    begin_id: str
    reference: str
    at: datetime
    actor: str | None = field(default_factory=current_actor)

    @classmethod
    def of(
        cls,
        request: CreateRequest,
        claim: Claim,
        *,
        status: PaymentStatus,
        description: str,
        takes_over: bool,
        at: datetime,
    ) -> "ChargeBegin":
        """With what eci-pay makes up itself: ids, and a reference where the request has none."""
        return cls(
            request=request,
            claim=claim,
            status=status,
            description=description,
            takes_over=takes_over,
            begin_id=identifiers.transaction_id(at),
            reference=request.reference or identifiers.reference(),
            at=at,
        )

    def columns(self) -> dict[str, Any]:
        """The parameters of `charge_begin.sql`."""
        return {
            "order_id": self.request.order_id,
            "user_id": self.request.user_id,
            "amount": self.request.amount,
            "currency": self.request.currency,
            "payment_method": self.request.payment_method.value,
            "reference": self.reference,
            "begin_id": self.begin_id,
            "status": self.status.value,
            "description": self.description,
            "at": self.at,
            "idempotency_key": self.claim.value,
            "caller": self.claim.caller,
            "request_hash": self.claim.request_hash,
            "expires_at": self.at + KEY_LIFETIME,
            "actor": self.actor,
        }

    def claims(self) -> tuple[Hashable, ...]:
        """Its order and its key."""
        order = ("order", self.request.order_id)
        if self.claim.value is None:
            return (order,)
        return (order, ("key", self.claim.value, self.claim.caller))

    def is_free(self, found: Row) -> bool:
        """Whether neither a live key nor the order's payment stands in the way."""
        if found["key_id"] is not None and not is_expired(found, self.at):
            return False
        return found["payment_id"] is None or self._takes_over(found)

    def _takes_over(self, found: Row) -> bool:
        both_cod = found["payment_method"] == self.request.payment_method == PaymentMethod.COD
        waits_for_cash = both_cod and found["status"] == PaymentStatus.PENDING
        return self.takes_over and found["status"] in _TAKEN_OVER and not waits_for_cash


@dataclass(frozen=True, kw_only=True, slots=True)
class ChargeSettlement:
    """The gateway's answer to one attempt, what its caller is told, and what other services are.

    A settlement that releases its key stores no answer: the next request with the key starts anew.
    """

    order_id: int
    payment_id: int
    attempt: int
    status: PaymentStatus
    authorization_code: str | None
    gateway_response: str | None
    at: datetime
    transaction_log_id: int
    description: str | None
    key_id: int | None
    answer: Answer
    messages: tuple[Message, ...]
    origin: Origin = field(default_factory=current_origin)
    releases_key: bool = False

    def columns(self) -> dict[str, Any]:
        """The parameters of `charge_settle.sql`."""
        completed_at = self.at if self.status is PaymentStatus.COMPLETED else None
        return {
            "order_id": self.order_id,
            "payment_id": self.payment_id,
            "attempt": self.attempt,
            "status": self.status.value,
            "authorization_code": self.authorization_code,
            "gateway_response": self.gateway_response,
            "completed_at": completed_at,
            "captured_at": completed_at,
            "at": self.at,
            "transaction_log_id": self.transaction_log_id,
            "description": self.description,
            "key_id": self.key_id,
            "response_body": self.answer.body,
            "status_code": self.answer.status_code,
            "expires_at": self.at + KEY_LIFETIME,
            "releases_key": self.releases_key,
            "message_count": len(self.messages),
            "request_id": self.origin.request_id or None,
            "traceparent": self.origin.traceparent,
            "actor": self.origin.actor,
        }


async def begin_charges(database: Database, rows: Sequence[ChargeBegin], patient: bool = True) -> list[BeginResult]:
    """Records every row or tells why not, in order. All rows must agree on `takes_over`. Unless it is `patient`, it
    waits for locks only a moment: what is locked is Busy, and so may be what shares the statement with it."""
    return await begin(database, _STATEMENTS, rows, _parameters(rows, patient))


async def standing_of_charge(database: Database, row: ChargeBegin) -> Row:
    """The state of its key and its order, without beginning it."""
    return await standing(database, _STATEMENTS, row)


async def record_pending(database: Database, rows: Sequence[ChargeBegin], patient: bool = True) -> list[BeginResult]:
    """As `begin_charges`, for payments that ask no gateway: the answers of their keys are in the same commit.

    What has begun has its `answer` beside its columns, unless that was lost with a connection.
    """

    at_of = {row.begin_id: row.at for row in rows}

    async def answer(connection: Connection, begun: list[Row]) -> None:
        views = await views_of(connection, [row["payment_id"] for row in begun])
        for row in begun:
            row["answer"] = created(views[row["payment_id"]])
        finishes = [
            Finish(key_id=row["key_id"], begin_id=row["begin_id"], answer=row["answer"], at=at_of[row["begin_id"]])
            for row in begun
            if row["key_id"] is not None
        ]
        await finish(connection, finishes)

    return await begin(database, _STATEMENTS, rows, _parameters(rows, patient), answer)


async def settle_charges(
    database: Database, rows: Sequence[ChargeSettlement], patient: bool = True
) -> list[bool | Exception]:
    """Books every row; tells, in order, whether it was this settlement that changed the payment. Patience as above.

    False means that somebody else settled the attempt before, an exception that this row was not booked.
    Running it again is safe.
    """

    async def run(batch: Sequence[ChargeSettlement]) -> list[bool]:
        told = message_arrays([row.messages for row in batch])
        columns = arrays([row.columns() for row in batch])
        found = await database.fetch("charge_settle", {**columns, **told, "lock_wait": lock_wait(patient=patient)})
        applied = {row["n"] for row in found}
        return [number in applied for number in range(len(batch))]

    results: dict[int, bool | Exception] = {}
    for numbers in rounds([(row.payment_id,) for row in rows]):
        outcome = await settle([rows[number] for number in numbers], run)
        results.update(zip(numbers, outcome, strict=True))
    return [results[number] for number in range(len(rows))]


def _parameters(rows: Sequence[ChargeBegin], patient: bool) -> dict[str, Any]:
    decisions = {row.takes_over for row in rows}
    assert len(decisions) == 1, "creations and charges are separate batches"
    return {"takes_over": decisions.pop(), "lock_wait": lock_wait(patient=patient)}
