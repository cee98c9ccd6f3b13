"""Use cases that change a payment's status by hand: the status update and the cancellation."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from eci_pay.context import current_origin, know
from eci_pay.database import Connection, Database, fetch
from eci_pay.errors import InvalidState, PaymentNotFound
from eci_pay.lifecycle import CANCELLABLE, PaymentStatus, statuses_before_update
from eci_pay.logs import tell_of_payment
from eci_pay.messages import Messages, Subject, message_arrays
from eci_pay.payments import views_of
from eci_pay.recovery import Recovery
from eci_pay.requests import StatusUpdateRequest
from eci_pay.views import PaymentView


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusChanges:
    """Raises PaymentNotFound, InvalidState and Unavailable. None is the id of no payment. An unknown outcome that
    stands in the way is looked up first."""

    database: Database
    messages: Messages
    recovery: Recovery
    clock: Callable[[], datetime]

    async def update(self, *, payment_id: int | None, request: StatusUpdateRequest) -> PaymentView:
        """PENDING to COMPLETED, FAILED or CANCELLED, and FAILED to CANCELLED.

        A payment completed like this was never captured by the gateway, so its refunds ask none.
        """
        return await self._change(
            payment_id,
            request.status,
            allowed_from=statuses_before_update(request.status),
            description=f"Status set to {request.status} by hand",
            gateway_response=request.gateway_response,
        )

    async def cancel(self, *, payment_id: int | None) -> PaymentView:
        """Cancels a PENDING or FAILED payment, for good."""
        return await self._change(
            payment_id,
            PaymentStatus.CANCELLED,
            allowed_from=CANCELLABLE,
            description="Payment cancelled",
            gateway_response=None,
        )

    async def _change(
        self,
        payment_id: int | None,
        status: PaymentStatus,
        *,
        allowed_from: tuple[PaymentStatus, ...],
        description: str,
        gateway_response: str | None,
    ) -> PaymentView:
        if payment_id is None:
            raise PaymentNotFound
        know(payment_id=payment_id)
        at = self.clock()
        origin = current_origin()

        async def work(connection: Connection) -> PaymentView | None:
            """The changed payment; None where it is PROCESSING."""
            rows = await fetch(connection, "payment_lock", {"payment_id": payment_id})
            if not rows:
                raise PaymentNotFound(f"there is no payment {payment_id}")
            before = rows[0]["status"]
            if before == PaymentStatus.PROCESSING:
                return None
            if before not in allowed_from:
                raise InvalidState(f"a {before} payment cannot become {status}", payment_id=payment_id)
            messages = self.messages.of_change(status, Subject.of_row(rows[0]))
            await fetch(
                connection,
                "status_change",
                {
                    "payment_id": payment_id,
                    "status": status.value,
                    "status_before": before,
                    "gateway_response": gateway_response,
                    "description": description,
                    "at": at,
                    "message_count": len(messages),
                    "request_id": origin.request_id or None,
                    "traceparent": origin.traceparent,
                    "actor": origin.actor,
                    **message_arrays([messages]),
                },
            )
            return (await views_of(connection, [payment_id]))[payment_id]

        changed = await self.database.transaction(work)
        if changed is None and await self.recovery.settle_first({payment_id}):
            changed = await self.database.transaction(work)
        if changed is None:
            raise InvalidState(f"a PROCESSING payment cannot become {status}", payment_id=payment_id)
        tell_of_payment(status, payment_id=payment_id, order_id=changed.order_id)
        return changed
