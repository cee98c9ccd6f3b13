"""The use case of what the gateway tells of its own accord: it settles at once what is unknown.

An event may come early, late, twice, or never. It is booked like the result of a look; where money has moved for what
is booked as failed, recovery puts that right.
"""

import logging
import re
from dataclasses import dataclass

from eci_pay.charge_settling import ChargeSettling
from eci_pay.context import act_as
from eci_pay.database import Database
from eci_pay.errors import EventRefused, PaymentNotFound, Unavailable
from eci_pay.gateway_calls import GatewayCalls
from eci_pay.gateways import Approved, GatewayEvent
from eci_pay.instruments import event_refused
from eci_pay.lifecycle import RefundStatus
from eci_pay.payments import Payments
from eci_pay.refund_settling import RefundSettling
from eci_pay.views import PaymentView

_KEY = re.compile(r"(?P<transaction_id>TXN[0-9A-Z]{26})-(?P<refund>R?)(?P<number>[0-9]{1,18})")
"""What `charge_key` and `refund_key` make."""

ACTOR = "gateway"
"""As the audit trail names it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayEvents:
    """What the gateway tells of its own accord."""

    database: Database
    gateway: GatewayCalls
    charges: ChargeSettling
    refunds: RefundSettling
    payments: Payments

    async def take(self, body: bytes, signature: str | None) -> None:
        """Books what an event tells. Raises EventRefused; Unavailable where the gateway should send it again."""
        try:
            event = self.gateway.read_event(body, signature)
        except EventRefused as error:
            event_refused()
            _log.warning("refused an event: %s", error)
            raise
        act_as(ACTOR)
        if event is not None and (key := _KEY.fullmatch(event.key)):
            await self._book(event, key["transaction_id"], int(key["number"]), of_refund=bool(key["refund"]))

    async def _book(self, event: GatewayEvent, transaction_id: str, number: int, *, of_refund: bool) -> None:
        try:
            payment = await self.payments.by_transaction(transaction_id)
        except PaymentNotFound:
            _log.warning("an event tells of %s, which is not in these books", event.key)
            return
        if of_refund:
            await self._book_refund(event, payment, number)
        else:
            await self._book_charge(event, payment, number)

    async def _book_charge(self, event: GatewayEvent, payment: PaymentView, attempt: int) -> None:
        if not await self.charges.settle_open(payment.payment_id, attempt, event.outcome):
            raise Unavailable("the event could not be booked")
        if isinstance(event.outcome, Approved):
            await self.charges.note_if_late(payment.payment_id, attempt, event.outcome.reference)

    async def _book_refund(self, event: GatewayEvent, payment: PaymentView, refund_id: int) -> None:
        if refund_id not in {refund.refund_id for refund in payment.refunds}:
            _log.warning("an event tells of %s, which is not in these books", event.key)
            return
        if not await self.refunds.settle_open(refund_id, event.outcome):
            raise Unavailable("the event could not be booked")
        if isinstance(event.outcome, Approved):
            await self.refunds.note_if_late(payment.payment_id, refund_id, event.outcome.reference)
            return
        view = await self.payments.by_id(payment.payment_id)
        booked = next(refund for refund in view.refunds if refund.refund_id == refund_id)
        if booked.status is RefundStatus.COMPLETED:
            _log.error("an event tells that %s failed after it was made: to be put right by hand", event.key)
