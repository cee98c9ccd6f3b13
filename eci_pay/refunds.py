"""The use case that gives money back: whole or in part, again and again until nothing is left.

It has the phases of a charge: *begin* reserves the amount on the payment (one commit), the *gateway* is asked,
*settle* completes the refund or releases the reservation (one commit). Concurrent refunds can never exceed what
was captured. A payment that no gateway captured is refunded without one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import assert_never

from eci_pay import answers, idempotency
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, Begun, Refused
from eci_pay.charge_settling import charge_key
from eci_pay.context import know
from eci_pay.database import Database, Row
from eci_pay.errors import PaymentNotFound, RefundExceedsBalance, Unavailable
from eci_pay.gateway_calls import GatewayCalls, Place
from eci_pay.gateways import GatewayRefund, Outcome
from eci_pay.group_commit import GroupCommit
from eci_pay.idempotency import Claim, Finish
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.logs import tell_of_refund
from eci_pay.payments import Payments
from eci_pay.phases import Phases
from eci_pay.recovery import Recovery
from eci_pay.refund_records import RefundBegin, standing_of_refund
from eci_pay.refund_settling import NOT_CAPTURED, RefundSettling, answer_of, refund_key
from eci_pay.requests import RefundRequest
from eci_pay.views import PaymentView


@dataclass(frozen=True, kw_only=True, slots=True)
class Refunds:
    """Raises PaymentNotFound, InvalidState, RefundExceedsBalance, ValidationFailed for an amount that the
    payment's currency cannot have, the errors of idempotency keys, and Unavailable where nothing was sent."""

    database: Database
    begin_refund: GroupCommit[RefundBegin, BeginResult]
    gateway: GatewayCalls
    payments: Payments
    phases: Phases
    settling: RefundSettling
    recovery: Recovery
    clock: Callable[[], datetime]

    async def refund(
        self,
        *,
        payment_id: int | None,
        request: RefundRequest,
        idempotency_key: str | None = None,
        caller: str = "",
        not_after: datetime | None = None,
    ) -> Answer:
        """Refunds a payment; returns 200, 402 or 202. None is the id of no payment. Raises RequestTooLate where it
        would begin `not_after` that."""
        if payment_id is None:
            raise PaymentNotFound
        claim = Claim.of(idempotency_key, caller, f"refund {payment_id}", request, not_after)
        return await self.phases.run_to_end(self._refund(payment_id, request, claim))

    async def _refund(self, payment_id: int, request: RefundRequest, claim: Claim) -> Answer:
        try:
            place = await self.gateway.place()
        except Unavailable as error:
            begin = RefundBegin.of(payment_id, request, claim, self.clock())
            if answer := await self._answer_without_gateway(begin, error):
                return answer
            begun = await self._begin_and_ask(begin, None)
        else:
            with place:
                begin = RefundBegin.of(payment_id, request, claim, self.clock())
                begun = await self._begin_and_ask(begin, place)
        if isinstance(begun, Answer):
            return begun
        refund, asked = begun
        if isinstance(asked, Exception):
            return await self.settling.give_up(refund, asked)
        outcome, view = asked
        return await self.settling.settle(refund, outcome, view)

    async def _begin_and_ask(
        self, begin: RefundBegin, place: Place | None
    ) -> Answer | tuple[Row, tuple[Outcome, PaymentView] | Exception]:
        """The gateway's answer, or what kept the refund from being sent; without a place, of one that needs none."""
        refund = await self._begin(begin)
        if isinstance(refund, Answer):
            return refund
        try:
            # Read before the gateway is asked: after that, the caller is told 202 even if the database is away.
            view = await self.payments.by_id(begin.payment_id)
            return refund, (await self._ask_gateway(refund, place), view)
        except Exception as error:  # whatever it is, nothing was sent
            return refund, error

    async def _answer_without_gateway(self, begin: RefundBegin, error: Unavailable) -> Answer | None:
        """The answer of a key that was used before; raises what stands in the way, and `error` where the gateway is
        wanted; None where none is, because none has captured the payment."""
        found = await standing_of_refund(self.database, begin)
        if not begin.is_free(found):
            return await self._refusal(begin, found)
        if found["captured_at"] is not None:
            raise error
        return None

    async def _begin(self, begin: RefundBegin, *, looked: bool = False) -> Row | Answer:
        """The reserved refund, or the answer of a key that was used before. Where an unknown outcome stands in the way,
        it is looked up first."""
        know(payment_id=begin.payment_id)
        begin.claim.check(begin.at)
        result = await self.begin_refund(begin)
        match result:
            case Begun(row):
                tell_of_refund(
                    RefundStatus.PROCESSING,
                    refund_id=row["refund_id"],
                    payment_id=row["payment_id"],
                    order_id=row["order_id"],
                )
                return row
            case Refused(row):
                if not looked and await self.recovery.settle_first(_unsettled(begin, row)):
                    return await self._begin(replace(begin, at=self.clock()), looked=True)
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
            finish = Finish(
                key_id=found["key_id"],
                begin_id=found["key_begin_id"],
                answer=answer_of(view, refund),
                at=begin.at,
            )
            answer = await self.phases.finish_for_another(finish)
        if answer is None:
            raise idempotency.refuse_in_flight(view.payment_id)
        return answer

    async def _ask_gateway(self, refund: Row, place: Place | None) -> Outcome:
        if refund["captured_at"] is None:
            return NOT_CAPTURED
        if place is None:
            raise Unavailable("the gateway was not asked, for it seemed that it need not be: try again")
        operation = GatewayRefund(
            key=refund_key(refund["transaction_id"], refund["refund_id"]),
            charge_key=charge_key(refund["transaction_id"], refund["attempt"]),
            charge_reference=refund["authorization_code"],
            amount=refund["amount"],
            currency=refund["currency"],
            payment_method=refund["payment_method"],
        )
        return await self.gateway.refund(operation, place)


def _unsettled(begin: RefundBegin, found: Row) -> set[int]:
    """The payments without an outcome that stand in the way of a refused refund: its own where the charge is unknown
    or another refund may hold what is asked for, and the key's."""
    is_unanswered = found["key_id"] is not None and found["response_body"] is None
    of_key = {found["key_payment_id"]} if is_unanswered else set()
    is_in_the_way = found["status"] == PaymentStatus.PROCESSING or isinstance(begin.fault(found), RefundExceedsBalance)
    return of_key | ({found["payment_id"]} if is_in_the_way else set())
