"""The use case that gives money back: whole or in part, again and again until nothing is left.

It has the phases of a charge: *begin* reserves the amount on the payment (one commit), the *gateway* is asked,
*settle* completes the refund or releases the reservation (one commit). Concurrent refunds can never exceed what
was captured. A payment that no gateway captured is refunded without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from eci_pay import answers, idempotency
from eci_pay.answers import Answer
from eci_pay.batches import Begun, Refused
from eci_pay.charges import charge_key
from eci_pay.database import Database, Row
from eci_pay.errors import PaymentNotFound, Unavailable
from eci_pay.gateways import Approved, Declined, Gateway, GatewayRefund, Outcome, Unknown
from eci_pay.idempotency import Claim, Finish
from eci_pay.lifecycle import RefundStatus
from eci_pay.messages import Message, Messages, Subject
from eci_pay.payments import Payments
from eci_pay.phases import Phases
from eci_pay.refund_records import RefundBegin, RefundSettlement, begin_refunds, settle_refunds
from eci_pay.requests import RefundRequest
from eci_pay.views import PaymentView, RefundView

_NOT_CAPTURED = Approved(reference="", message="Refunded without a gateway: none had captured the payment")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refunds:
    """Raises PaymentNotFound, InvalidState, RefundExceedsBalance, ValidationFailed for an amount that the
    payment's currency cannot have, the errors of idempotency keys, and Unavailable where nothing was sent."""

    database: Database
    gateway: Gateway
    payments: Payments
    phases: Phases
    messages: Messages
    clock: Callable[[], datetime]

    async def refund(
        self,
        *,
        payment_id: int | None,
        request: RefundRequest,
        idempotency_key: str | None = None,
        caller: str = "",
    ) -> Answer:
        """Refunds a payment; returns 200, 402 or 202. None is the id of no payment."""
        if payment_id is None:
            raise PaymentNotFound
        claim = Claim.of(idempotency_key, caller, f"refund {payment_id}", request)
        return await self.phases.run_to_end(self._refund(payment_id, request, claim))

    async def _refund(self, payment_id: int, request: RefundRequest, claim: Claim) -> Answer:
        begin = RefundBegin.of(payment_id, request, claim, self.clock())
        refund = await self._begin(begin)
        if isinstance(refund, Answer):
            return refund
        try:
            # Read before the gateway is asked: after that, the caller is told 202 even if the database is away.
            view = await self.payments.by_id(payment_id)
            outcome = await self._ask_gateway(refund, begin.at)
        except Exception as error:
            await self._give_up(refund, error)
            raise
        return await self._settle(refund, outcome, view)

    async def _begin(self, begin: RefundBegin) -> Row | Answer:
        """The reserved refund, or the answer of a key that was used before."""
        result = (await begin_refunds(self.database, [begin]))[0]
        match result:
            case Begun(row):
                return row
            case Refused(row):
                return await self._refusal(begin, row)
            case Exception():
                raise result
            case _:
                assert_never(result)

    async def _refusal(self, begin: RefundBegin, found: Row) -> Answer:
        """The recorded answer of a live key; raises what else stands in the way."""
        if found["key_id"] is None or idempotency.is_expired(found, begin.at):
            raise begin.fault(found) or Unavailable("the refund lost a race: try again")
        if answer := idempotency.recorded_answer(found, begin.claim):
            return answer
        view = await self.payments.by_id(found["key_payment_id"])
        refund = next(refund for refund in view.refunds if refund.refund_id == found["key_refund_id"])
        if refund.status is RefundStatus.PROCESSING and idempotency.is_marked_unknown(found):
            return answers.unknown(view)
        answer = None
        if refund.status is not RefundStatus.PROCESSING:
            finish = Finish(key_id=found["key_id"], begin_id=found["key_begin_id"], answer=_answer_of(view, refund))
            answer = await self.phases.finish_for_another(finish)
        if answer is None:
            raise idempotency.refuse_in_flight(view.payment_id)
        return answer

    async def _ask_gateway(self, refund: Row, begun_at: datetime) -> Outcome:
        if refund["captured_at"] is None:
            return _NOT_CAPTURED
        operation = GatewayRefund(
            key=f"{refund['transaction_id']}-R{refund['refund_id']}",
            charge_key=charge_key(refund["transaction_id"], refund["attempt"]),
            amount=refund["amount"],
            currency=refund["currency"],
            payment_method=refund["payment_method"],
        )
        return await self.phases.ask(lambda: self.gateway.refund(operation), begun_at=begun_at)

    async def _settle(self, refund: Row, outcome: Outcome, view: PaymentView) -> Answer:
        answer = None
        if not isinstance(outcome, Unknown):
            settlement = _settlement(refund, outcome, self.clock(), self._messages_of(refund, outcome, view))
            answer = await self.phases.book(lambda: self._book(settlement))
        if answer is None:
            await self.phases.mark_unknown(refund["key_id"])
            return answers.unknown(view)
        return answer

    def _messages_of(self, refund: Row, outcome: Outcome, view: PaymentView) -> tuple[Message, ...]:
        if not isinstance(outcome, Approved):
            return ()
        reason = next(found.reason for found in view.refunds if found.refund_id == refund["refund_id"])
        return self.messages.of_refund(Subject.of_view(view), amount=refund["amount"], reason=reason)

    async def _book(self, settlement: RefundSettlement) -> Answer:
        told = (await settle_refunds(self.database, [settlement]))[0]
        if isinstance(told, Exception):
            raise told
        return told or await self._settled_by_another(settlement)

    async def _settled_by_another(self, settlement: RefundSettlement) -> Answer:
        """What was recorded for this refund, by an earlier try of ours or by somebody else."""
        stored = settlement.key_id and await idempotency.read_answer(self.database, settlement.key_id)
        return stored or settlement.answer(await self.payments.by_id(settlement.payment_id))

    async def _give_up(self, refund: Row, error: Exception) -> None:
        """Releases a refund that was never sent, and frees its key for the caller's next try."""
        declined = Declined(code="not_sent", message=f"The gateway was not asked: {error}")
        settlement = _settlement(refund, declined, self.clock(), (), releases_key=True)
        await self.phases.book(lambda: self._book(settlement))


def _answer_of(view: PaymentView, refund: RefundView) -> Answer:
    """The answer to a request whose key was left unfinished, by what has become of its refund."""
    if refund.status is RefundStatus.COMPLETED:
        return answers.ok(view)
    return _declined(view.payment_id, "declined", refund.gateway_response or "The refund failed.")


def _settlement(
    refund: Row,
    outcome: Approved | Declined,
    at: datetime,
    messages: tuple[Message, ...],
    *,
    releases_key: bool = False,
) -> RefundSettlement:
    payment_id = refund["payment_id"]
    if isinstance(outcome, Approved):
        status, response, description = RefundStatus.COMPLETED, outcome.message, "Refund approved"
    else:
        status, response = RefundStatus.FAILED, f"{outcome.code}: {outcome.message}"
        description = f"Refund failed: {outcome.code}"

    def answer(view: PaymentView) -> Answer:
        if isinstance(outcome, Approved):
            return answers.ok(view)
        return _declined(payment_id, outcome.code, outcome.message)

    return RefundSettlement(
        order_id=refund["order_id"],
        payment_id=payment_id,
        refund_id=refund["refund_id"],
        status=status,
        gateway_reference=(outcome.reference or None) if isinstance(outcome, Approved) else None,
        gateway_response=response,
        description=description,
        at=at,
        key_id=refund["key_id"],
        begin_id=refund["begin_id"],
        answer=answer,
        messages=messages,
        releases_key=releases_key,
    )


def _declined(payment_id: int, code: str, message: str) -> Answer:
    return answers.declined(operation="refund", payment_id=payment_id, decline_code=code, message=message)
