"""Settling a refund: what the gateway said of it is booked, whoever found it out. As `charge_settling`."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from eci_pay import answers, idempotency
from eci_pay.answers import Answer
from eci_pay.context import current_actor, know, on_behalf
from eci_pay.database import Database, Row
from eci_pay.gateways import Approved, Declined, Outcome, Unknown
from eci_pay.group_commit import GroupCommit
from eci_pay.idempotency import KEY_LIFETIME
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.logs import tell_of_payment, tell_of_refund
from eci_pay.messages import Message, Messages, Subject
from eci_pay.payments import Payments
from eci_pay.phases import Phases
from eci_pay.refund_records import RefundSettlement
from eci_pay.views import PaymentView, RefundView

NOT_CAPTURED = Approved(reference="", message="Refunded without a gateway: none had captured the payment")
"""What comes of a refund of which no gateway need be asked."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefundSettling:
    """What is told of a refund is what was booked of it."""

    database: Database
    settle_refund: GroupCommit[RefundSettlement, Answer | Exception | None]
    payments: Payments
    phases: Phases
    messages: Messages
    clock: Callable[[], datetime]

    async def settle(self, refund: Row, outcome: Outcome, view: PaymentView) -> Answer:
        """Books what the gateway answered; returns 200, 402 or, where it is unknown or could not be booked, 202."""
        answer = None
        if not isinstance(outcome, Unknown):
            settlement = _settlement(refund, outcome, self.clock(), self._messages_of(refund, outcome, view))
            answer = await self.phases.book(lambda: self._book(settlement))
        if answer is None:
            return await self.phases.mark_unknown(refund["key_id"]) or answers.unknown(view)
        return answer

    async def open_refund(self, refund_id: int) -> Row | None:
        """A refund that is still PROCESSING, as its begin returned it."""
        params = {"refund_id": refund_id, "key_lifetime_seconds": KEY_LIFETIME.total_seconds()}
        rows = await self.database.read("refund_open", params)
        if rows:
            know(refund_id=refund_id, payment_id=rows[0]["payment_id"], order_id=rows[0]["order_id"])
        return rows[0] if rows else None

    async def settle_open(self, refund_id: int, outcome: Approved | Declined) -> bool:
        """Books an outcome that was found out later; whether the refund is settled now, by this or another answer."""
        refund = await self.open_refund(refund_id)
        if refund is None:
            return True
        view = await self.payments.by_id(refund["payment_id"])
        settlement = _settlement(refund, outcome, self.clock(), self._messages_of(refund, outcome, view))
        return await self.phases.book(lambda: self._book(settlement)) is not None

    async def reopen(self, refund_id: int) -> bool:
        """Takes a refund that was booked as never happened back to PROCESSING, if that much is left to refund."""
        params = {
            "refund_id": refund_id,
            "at": self.clock(),
            "description": f"Refund turned up at the gateway{on_behalf()}",
            "actor": current_actor(),
        }
        rows = await self.database.fetch("refund_reopen", params)
        if rows:
            tell_of_refund(RefundStatus.PROCESSING, **rows[0])
        return bool(rows)

    def _messages_of(self, refund: Row, outcome: Outcome, view: PaymentView) -> tuple[Message, ...]:
        if not isinstance(outcome, Approved):
            return ()
        reason = next(found.reason for found in view.refunds if found.refund_id == refund["refund_id"])
        return self.messages.of_refund(Subject.of_view(view), amount=refund["amount"], reason=reason)

    async def _book(self, settlement: RefundSettlement) -> Answer:
        told = await self.settle_refund(settlement)
        if isinstance(told, Exception):
            raise told
        if told is not None:
            _tell(settlement, told)
            return told
        if settlement.gateway_reference is not None:
            await self.note_if_late(settlement.payment_id, settlement.refund_id, settlement.gateway_reference)
        return await self._settled_by_another(settlement)

    async def note_if_late(self, payment_id: int, refund_id: int, reference: str) -> None:
        """The gateway has made this refund: if it was booked as not made, recovery will book it again."""
        params = {"refund_id": refund_id, "late_reference": reference}
        if await self.database.fetch("recovery_late_refund", params):
            _log.error(
                "refund %d of payment %d: the gateway made it, though it was booked as not made", refund_id, payment_id
            )

    async def _settled_by_another(self, settlement: RefundSettlement) -> Answer:
        """What was recorded for this refund, by an earlier try of ours or by somebody else."""
        stored = settlement.key_id and await idempotency.read_answer(self.database, settlement.key_id)
        if stored:
            return stored
        view = await self.payments.by_id(settlement.payment_id)
        return answer_of(view, next(refund for refund in view.refunds if refund.refund_id == settlement.refund_id))

    async def give_up(self, refund: Row, error: Exception) -> Answer:
        """Releases a refund that was never sent, frees its key for the caller's next try, and raises the error; returns
        the answer where somebody else has settled it."""
        outcome = Declined(code="not_sent", message=f"The gateway was not asked: {error}")
        settlement = _settlement(refund, outcome, self.clock(), (), releases_key=True)
        answer = await self.phases.book(lambda: self._book(settlement))
        ours = declined(refund["payment_id"], outcome.code, outcome.message)
        if answer is None or answer.body == ours.body:
            raise error
        return answer


def _tell(settlement: RefundSettlement, answer: Answer) -> None:
    """A payment is REFUNDED by the refund that is booked last: its answer shows it so."""
    payment_id, order_id = settlement.payment_id, settlement.order_id
    tell_of_refund(settlement.status, refund_id=settlement.refund_id, payment_id=payment_id, order_id=order_id)
    if settlement.status is RefundStatus.COMPLETED and json.loads(answer.body)["status"] == PaymentStatus.REFUNDED:
        tell_of_payment(PaymentStatus.REFUNDED, payment_id=payment_id, order_id=order_id)


def refund_key(transaction_id: str, refund_id: int) -> str:
    """The key that the gateway is given for a refund: ours, never the client's."""
    return f"{transaction_id}-R{refund_id}"


def _settlement(
    refund: Row,
    outcome: Approved | Declined,
    at: datetime,
    messages: tuple[Message, ...],
    *,
    releases_key: bool = False,
) -> RefundSettlement:
    payment_id = refund["payment_id"]
    answer: Callable[[PaymentView], Answer] = answers.ok
    if isinstance(outcome, Approved):
        status, response, description = RefundStatus.COMPLETED, outcome.message, f"Refund approved{on_behalf()}"
    else:
        status, response = RefundStatus.FAILED, f"{outcome.code}: {outcome.message}"
        description = f"Refund failed: {outcome.code}{on_behalf()}"
        # Made here, for it names the request at hand; what books it works for others too.
        refusal = declined(payment_id, outcome.code, outcome.message)
        answer = lambda _: refusal  # noqa: E731

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


def answer_of(view: PaymentView, refund: RefundView) -> Answer:
    """What a caller is told by what has become of a refund, where no answer is stored."""
    match refund.status:
        case RefundStatus.COMPLETED:
            return answers.ok(view)
        case RefundStatus.PROCESSING:
            return answers.unknown(view)
        case RefundStatus.FAILED:
            return declined(view.payment_id, "declined", refund.gateway_response or "The refund failed.")
        case _:
            assert_never(refund.status)


def declined(payment_id: int, code: str, message: str) -> Answer:
    """What a caller is told whose refund was refused."""
    return answers.declined(operation="refund", payment_id=payment_id, decline_code=code, message=message)
