"""Use cases that make a payment: charge, and the legacy creation.

A charge has three phases, in this order: *begin* records it as PROCESSING and claims its idempotency key (one
commit), the *gateway* is asked outside any transaction, and *settle* books the answer and finishes the key (one
commit). From begin on it runs to its end, whoever stops waiting. Once the gateway was asked, the caller is told
the outcome, or 202 where it is not known or could not be booked; never that it failed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import assert_never

from eci_pay import answers, idempotency
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, Begun, Refused
from eci_pay.charge_records import ChargeBegin, standing_of_charge
from eci_pay.charge_settling import Attempt, ChargeSettling, charge_key
from eci_pay.context import know
from eci_pay.database import Database, Row
from eci_pay.errors import (
    Conflict,
    InvalidState,
    OrderAlreadyPaid,
    OrderExists,
    OrderInProgress,
    PayError,
    Unavailable,
    ValidationFailed,
)
from eci_pay.gateway_calls import GatewayCalls, Place
from eci_pay.gateways import GatewayCharge, Outcome
from eci_pay.group_commit import GroupCommit
from eci_pay.idempotency import Claim, Finish
from eci_pay.lifecycle import PaymentMethod, PaymentStatus
from eci_pay.logs import tell_of_payment
from eci_pay.payments import Payments
from eci_pay.phases import Phases
from eci_pay.recovery import Recovery
from eci_pay.requests import ChargeRequest, CreateRequest
from eci_pay.views import PaymentView, TransactionView


@dataclass(frozen=True, kw_only=True, slots=True)
class Charges:
    """Both use cases raise Conflict and its kinds, IdempotencyKeyReused, and Unavailable where nothing was sent; a
    charge also ValidationFailed for what the gateway does not take."""

    database: Database
    begin_charge: GroupCommit[ChargeBegin, BeginResult]
    record_pending: GroupCommit[ChargeBegin, BeginResult]
    record_created: GroupCommit[ChargeBegin, BeginResult]
    gateway: GatewayCalls
    payments: Payments
    phases: Phases
    settling: ChargeSettling
    recovery: Recovery
    clock: Callable[[], datetime]

    async def charge(
        self, *, request: ChargeRequest, idempotency_key: str, caller: str = "", not_after: datetime | None = None
    ) -> Answer:
        """Charges an order once; returns 201, 402 or 202. Cash on delivery asks no gateway and stays PENDING. Raises
        RequestTooLate where it would begin `not_after` that."""
        claim = Claim.of(idempotency_key, caller, "charge", request, not_after)
        return await self.phases.run_to_end(self._charge(request, claim))

    async def create(self, *, request: CreateRequest, idempotency_key: str | None = None, caller: str = "") -> Answer:
        """Records a PENDING payment without asking a gateway; returns 201."""
        claim = Claim.of(idempotency_key, caller, "create", request)
        begin = ChargeBegin.of(
            request,
            claim,
            status=PaymentStatus.PENDING,
            description="Payment created",
            takes_over=False,
            at=self.clock(),
        )
        return await self.phases.run_to_end(self._record_pending(begin, self.record_created))

    def fault(self, request: ChargeRequest, found: Row) -> PayError | None:
        """Why a charge under a new key would be refused, where its order's payment is as `found`."""
        begin = self._charge_begin(request, Claim.of(None, "", "charge", request))
        if not begin.is_free({**found, "key_id": None}):
            return _order_conflict(begin, found)
        try:
            self._check(request)
        except ValidationFailed as error:
            return error
        return None

    async def _charge(self, request: ChargeRequest, claim: Claim) -> Answer:
        if request.payment_method is PaymentMethod.COD:
            return await self._record_pending(self._charge_begin(request, claim), self.record_pending)
        self._check(request)
        try:
            place = await self.gateway.place()
        except Unavailable:
            if answer := await self._answer_without_gateway(self._charge_begin(request, claim)):
                return answer
            raise
        with place:
            begun = await self._begin_and_ask(request, claim, place)
        if isinstance(begun, Answer):
            return begun
        attempt, outcome = begun
        if isinstance(outcome, Exception):
            return await self.settling.give_up(attempt, outcome)
        return await self.settling.settle(attempt, outcome)

    async def _begin_and_ask(
        self, request: ChargeRequest, claim: Claim, place: Place
    ) -> Answer | tuple[Attempt, Outcome | Exception]:
        """The gateway's answer, or what kept the attempt from being sent."""
        begin = self._charge_begin(request, claim)
        row = await self._begun(begin, self.begin_charge)
        if isinstance(row, Answer):
            return row
        attempt = _attempt_of(begin, row)
        try:
            if attempt.view.attempt > 1:
                # What was taken over has a history, which only a snapshot younger than begin shows whole.
                attempt = replace(attempt, view=await self._whole(attempt.view))
            return attempt, await self.gateway.charge(_gateway_charge(request, attempt.view), place)
        except Exception as error:  # whatever it is, nothing was sent
            return attempt, error

    async def _whole(self, begun: PaymentView) -> PaymentView:
        view = await self.payments.by_id(begun.payment_id)
        if view.attempt != begun.attempt:
            raise Unavailable("another charge of the order has overtaken this one; nothing was sent")
        return view

    def _check(self, request: ChargeRequest) -> None:
        """Raises ValidationFailed for what the gateway can never charge."""
        if fault := self.gateway.fault(_gateway_charge(request)):
            raise ValidationFailed.of(*fault)

    async def _answer_without_gateway(self, begin: ChargeBegin) -> Answer | None:
        """The answer of a key that was used before; raises what stands in the way; None where the gateway is wanted."""
        found = await standing_of_charge(self.database, begin)
        return None if begin.is_free(found) else await self._refusal(begin, found)

    async def _record_pending(self, begin: ChargeBegin, record: GroupCommit[ChargeBegin, BeginResult]) -> Answer:
        """A payment that asks no gateway: recorded and answered in one commit."""
        row = await self._begun(begin, record)
        if isinstance(row, Answer):
            return row
        if "answer" in row:
            told: Answer = row["answer"]
            return told
        stored = row["key_id"] and await idempotency.read_answer(self.database, row["key_id"])
        return stored or answers.created(await self.payments.by_id(row["payment_id"]))

    def _charge_begin(self, request: ChargeRequest, claim: Claim) -> ChargeBegin:
        cash = request.payment_method is PaymentMethod.COD
        return ChargeBegin.of(
            request,
            claim,
            status=PaymentStatus.PENDING if cash else PaymentStatus.PROCESSING,
            description="Cash on delivery is awaited" if cash else "Charge begun",
            takes_over=True,
            at=self.clock(),
        )

    async def _begun(
        self, begin: ChargeBegin, record: GroupCommit[ChargeBegin, BeginResult], *, looked: bool = False
    ) -> Row | Answer:
        """What was recorded, or the answer of a key that was used before. Where an unknown outcome stands in the way,
        it is looked up first."""
        know(order_id=begin.request.order_id)
        begin.claim.check(begin.at)
        result = await record(begin)
        match result:
            case Begun(row):
                tell_of_payment(begin.status, payment_id=row["payment_id"], order_id=begin.request.order_id)
                return row
            case Refused(row):
                if not looked and await self.recovery.settle_first(_unsettled(row)):
                    return await self._begun(replace(begin, at=self.clock()), record, looked=True)
                return await self._refusal(begin, row)
            case Exception():
                raise result
            case _:
                assert_never(result)

    async def _refusal(self, begin: ChargeBegin, found: Row) -> Answer:
        """The recorded answer of a live key; raises what else stands in the way."""
        know(payment_id=found["payment_id"])
        if found["key_id"] is None or idempotency.is_expired(found, begin.at):
            raise _order_conflict(begin, found)
        if answer := idempotency.recorded_answer(found, begin.claim):
            return answer
        view, latest_begin_id = await self.payments.with_begin_id(found["key_payment_id"])
        if latest_begin_id != found["key_begin_id"]:
            # Another request has taken the payment over: what became of it is not this key's answer.
            raise _order_conflict(begin, found)
        if view.status is PaymentStatus.PROCESSING and idempotency.is_marked_unknown(found):
            return answers.unknown(view)
        answer = None
        if view.status is not PaymentStatus.PROCESSING:
            finish = Finish(
                key_id=found["key_id"],
                begin_id=found["key_begin_id"],
                answer=_answer_of(view, begin),
                at=begin.at,
            )
            answer = await self.phases.finish_for_another(finish)
        if answer is None:
            raise idempotency.refuse_in_flight(view.payment_id)
        return answer


def _gateway_charge(request: ChargeRequest, view: PaymentView | None = None) -> GatewayCharge:
    """What the gateway is asked for a payment that has begun; its key is empty where none has yet."""
    token = request.payment_token
    return GatewayCharge(
        key=charge_key(view.transaction_id, view.attempt) if view else "",
        amount=request.amount,
        currency=request.currency,
        payment_method=request.payment_method.value,
        begun_at=view.updated_at if view else None,
        payment_token=token.get_secret_value() if token else None,
    )


def _unsettled(found: Row) -> set[int]:
    """The payments without an outcome that stand in the way of a refused charge: the order's, the key's."""
    of_order = {found["payment_id"]} if found["status"] == PaymentStatus.PROCESSING else set()
    is_unanswered = found["key_id"] is not None and found["response_body"] is None
    return of_order | ({found["key_payment_id"]} if is_unanswered else set())


def _order_conflict(begin: ChargeBegin, found: Row) -> Conflict:
    order_id, payment_id, status = begin.request.order_id, found["payment_id"], found["status"]
    if not begin.takes_over:
        return OrderExists(f"order {order_id} has payment {payment_id} ({status})", payment_id=payment_id)
    match PaymentStatus(status):
        case PaymentStatus.COMPLETED | PaymentStatus.REFUNDED:
            return OrderAlreadyPaid(f"order {order_id} is {status.lower()}", payment_id=payment_id)
        case PaymentStatus.CANCELLED:
            return InvalidState(f"the payment of order {order_id} was cancelled", payment_id=payment_id)
        case PaymentStatus.PENDING:
            return OrderInProgress(f"order {order_id} awaits cash on delivery", payment_id=payment_id)
        case _:
            return OrderInProgress(f"a charge of order {order_id} is under way", payment_id=payment_id)


def _answer_of(view: PaymentView, begin: ChargeBegin) -> Answer:
    """The answer to a request whose key was left unfinished, by what has become of its payment."""
    if view.status is PaymentStatus.FAILED and begin.status is PaymentStatus.PROCESSING:
        return answers.declined(
            operation="payment",
            payment_id=view.payment_id,
            decline_code="declined",
            message=view.gateway_response or "The payment failed.",
        )
    return answers.created(view)


def _attempt_of(begin: ChargeBegin, row: Row) -> Attempt:
    return Attempt(view=_view_of_begin(begin, row), settle_log_id=row["settle_log_id"], key_id=row["key_id"])


def _view_of_begin(begin: ChargeBegin, row: Row) -> PaymentView:
    """The payment as a first attempt's begin wrote it."""
    request = begin.request
    begun = TransactionView(
        transaction_log_id=row["begin_log_id"],
        transaction_type="PAYMENT",
        amount=request.amount,
        status=begin.status.value,
        description=begin.description,
        created_at=begin.at,
    )
    return PaymentView(
        payment_id=row["payment_id"],
        order_id=request.order_id,
        user_id=request.user_id,
        amount=request.amount,
        currency=request.currency,
        payment_method=request.payment_method,
        status=begin.status,
        transaction_id=row["transaction_id"],
        reference=begin.reference,
        authorization_code=None,
        gateway_response=None,
        created_at=begin.at,
        updated_at=begin.at,
        completed_at=None,
        captured_at=None,
        attempt=row["attempt"],
        refunded_amount=Decimal(0),
        refund_pending=Decimal(0),
        transactions=(begun,),
    )
