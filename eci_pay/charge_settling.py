"""Settling a charge: what the gateway said of an attempt is booked, whoever found it out.

The request that began the attempt settles it as a rule, recovery where that could not; the first one wins, and both
tell the same.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from eci_pay import answers, idempotency
from eci_pay.answers import Answer
from eci_pay.charge_records import ChargeSettlement
from eci_pay.context import know, on_behalf
from eci_pay.database import Database
from eci_pay.gateways import Approved, Declined, Outcome, Unknown
from eci_pay.group_commit import GroupCommit
from eci_pay.idempotency import KEY_LIFETIME
from eci_pay.lifecycle import PaymentStatus
from eci_pay.logs import tell_of_payment
from eci_pay.messages import Messages, Subject
from eci_pay.payments import Payments
from eci_pay.phases import Phases
from eci_pay.views import PaymentView, TransactionView

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A charge that has begun: what settle needs to know of it."""

    view: PaymentView
    settle_log_id: int
    key_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChargeSettling:
    """What is told of a charge is what was booked of it."""

    database: Database
    settle_charge: GroupCommit[ChargeSettlement, bool | Exception]
    payments: Payments
    phases: Phases
    messages: Messages
    clock: Callable[[], datetime]

    async def settle(self, attempt: Attempt, outcome: Outcome) -> Answer:
        """Books what the gateway answered; returns 201, 402 or, where it is unknown or could not be booked, 202."""
        answer = None
        if not isinstance(outcome, Unknown):
            settlement = self._settlement(attempt, outcome)
            answer = await self.phases.book(lambda: self._book(attempt, settlement))
        if answer is None:
            return await self.phases.mark_unknown(attempt.key_id) or answers.unknown(attempt.view)
        return answer

    async def is_open(self, payment_id: int, attempt: int) -> bool:
        """Whether an attempt is still PROCESSING."""
        return await self._open_attempt(payment_id, attempt) is not None

    async def settle_open(self, payment_id: int, attempt: int, outcome: Approved | Declined) -> bool:
        """Books an outcome that was found out later; whether the attempt is settled now, by this or another answer."""
        found = await self._open_attempt(payment_id, attempt)
        if found is None:
            return True
        settlement = self._settlement(found, outcome)
        return await self.phases.book(lambda: self._book(found, settlement)) is not None

    async def _open_attempt(self, payment_id: int, attempt: int) -> Attempt | None:
        params = {
            "payment_id": payment_id,
            "attempt": attempt,
            "key_lifetime_seconds": KEY_LIFETIME.total_seconds(),
        }
        rows = await self.database.read("charge_open", params)
        if not rows:
            return None
        view = await self.payments.by_id(payment_id)
        know(payment_id=payment_id, order_id=view.order_id)
        if (view.attempt, view.status) != (attempt, PaymentStatus.PROCESSING):
            return None  # settled between the two reads, and perhaps begun anew
        return Attempt(
            view=view,
            settle_log_id=rows[0]["settle_log_id"],
            key_id=rows[0]["key_id"],
        )

    async def _book(self, attempt: Attempt, settlement: ChargeSettlement) -> Answer:
        applied = await self.settle_charge(settlement)
        if isinstance(applied, Exception):
            raise applied
        if applied:
            tell_of_payment(settlement.status, payment_id=settlement.payment_id, order_id=settlement.order_id)
            return settlement.answer
        if settlement.authorization_code is not None:
            await self.note_if_late(attempt.view.payment_id, attempt.view.attempt, settlement.authorization_code)
        return await self._settled_by_another(attempt)

    async def note_if_late(self, payment_id: int, attempt: int, reference: str) -> None:
        """The gateway took the money of this attempt: unless that is what was booked, recovery will give it back."""
        params = {"payment_id": payment_id, "attempt": attempt, "late_reference": reference}
        if await self.database.fetch("recovery_late", params):
            _log.error(
                "payment %d, attempt %d: the gateway took money that had been booked as not taken", payment_id, attempt
            )

    async def _settled_by_another(self, attempt: Attempt) -> Answer:
        """What was recorded for this attempt, by an earlier try of ours or by somebody else."""
        stored = attempt.key_id and await idempotency.read_answer(self.database, attempt.key_id)
        return stored or answers.unknown(await self.payments.by_id(attempt.view.payment_id))

    async def give_up(self, attempt: Attempt, error: Exception) -> Answer:
        """Books an attempt that was never sent as FAILED, frees its key for the caller's next try, and raises the
        error; returns the answer where somebody else has settled it."""
        declined = Declined(code="not_sent", message=f"The gateway was not asked: {error}")
        settlement = self._settlement(attempt, declined, releases_key=True)
        answer = await self.phases.book(lambda: self._book(attempt, settlement))
        if answer is None or answer.body == settlement.answer.body:
            raise error
        return answer

    def _settlement(
        self, attempt: Attempt, outcome: Approved | Declined, *, releases_key: bool = False
    ) -> ChargeSettlement:
        view, at = attempt.view, self.clock()
        if isinstance(outcome, Approved):
            settled = _approved_view(attempt, outcome, at)
            answer = answers.created(settled)
            description = settled.transactions[-1].description
        else:
            settled = view.model_copy(
                update={
                    "status": PaymentStatus.FAILED,
                    "gateway_response": f"{outcome.code}: {outcome.message}",
                }
            )
            answer = answers.declined(
                operation="payment",
                payment_id=view.payment_id,
                decline_code=outcome.code,
                message=outcome.message,
            )
            description = f"Charge failed: {outcome.code}{on_behalf()}"
        return ChargeSettlement(
            order_id=view.order_id,
            payment_id=view.payment_id,
            attempt=view.attempt,
            status=settled.status,
            authorization_code=settled.authorization_code,
            gateway_response=settled.gateway_response,
            at=at,
            transaction_log_id=attempt.settle_log_id,
            description=description,
            key_id=attempt.key_id,
            answer=answer,
            messages=self.messages.of_change(settled.status, Subject.of_view(settled)),
            releases_key=releases_key,
        )


def charge_key(transaction_id: str, attempt: int) -> str:
    """The key that the gateway is given for an attempt: ours, never the client's."""
    return f"{transaction_id}-{attempt}"


def _approved_view(attempt: Attempt, outcome: Approved, at: datetime) -> PaymentView:
    """The payment as settle writes it: what the answer shows is built before it is committed with the answer."""
    settled = TransactionView(
        transaction_log_id=attempt.settle_log_id,
        transaction_type="PAYMENT",
        amount=attempt.view.amount,
        status=PaymentStatus.COMPLETED.value,
        description=f"Charge approved: {outcome.reference}{on_behalf()}",
        created_at=at,
    )
    return attempt.view.model_copy(
        update={
            "status": PaymentStatus.COMPLETED,
            "authorization_code": outcome.reference,
            "gateway_response": outcome.message,
            "updated_at": at,
            "completed_at": at,
            "captured_at": at,
            "transactions": (*attempt.view.transactions, settled),
        }
    )
