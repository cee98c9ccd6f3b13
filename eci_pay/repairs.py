"""Repairs of what a reconciliation has found, where it is certain what is right: the gateway itself was asked.

They go by the use cases of everyone else, whoever settles first wins, and the audit trail says on whose behalf. None of
them deletes anything or moves money.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from eci_pay.context import begin_subject
from eci_pay.gateways import Approved, Declined
from eci_pay.looks import Looks, Unsettled
from eci_pay.messages import Destination
from eci_pay.outbox import Outbox

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettleOutcome:
    """An outcome that our books do not have is booked. It puts right so many findings, in-time ones not counted."""

    unsettled: Unsettled
    outcome: Approved | Declined
    findings: int

    def __str__(self) -> str:
        told = "approved" if isinstance(self.outcome, Approved) else f"declined ({self.outcome.code})"
        return f"book {self.unsettled.name} as {told}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BookRefund:
    """A refund that was booked as not made, though the gateway made it, is booked."""

    unsettled: Unsettled
    outcome: Approved
    findings: int = 1

    def __str__(self) -> str:
        return f"book {self.unsettled.name} as made after all ({self.outcome.reference})"


@dataclass(frozen=True, kw_only=True, slots=True)
class SendAgain:
    """The dead messages of a service are sent once more, but for those that later ones have overtaken."""

    destination: Destination
    findings: int

    def __str__(self) -> str:
        return f"send {self.findings:,} dead messages to {self.destination} again"


Repair = SettleOutcome | BookRefund | SendAgain


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What a repair came to: how many findings it has put right, and what is left of it."""

    repair: Repair
    findings: int
    left: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repairs:
    """Makes what was planned."""

    looks: Looks
    outbox: Outbox

    async def make(self, repairs: Sequence[Repair], on_made: Callable[[], None] = lambda: None) -> list[Repaired]:
        """One after the other; one that fails does not keep the others from being made."""
        made = []
        for repair in repairs:
            begin_subject()
            try:
                made.append(await self._made(repair))
            except Exception as error:  # whatever it is: the others are certain, too
                _log.exception("cannot %s", repair)
                made.append(Repaired(repair=repair, findings=0, left=str(error)))
            on_made()
        return made

    async def _made(self, repair: Repair) -> Repaired:
        match repair:
            case SettleOutcome(unsettled=unsettled, outcome=outcome):
                return _booked(repair, await self.looks.book(unsettled, outcome))
            case BookRefund():
                return await self._refund_booked(repair)
            case SendAgain(destination=destination):
                retried = await self.outbox.retry_dead(destination)
                requeued = sum(each.requeued for each in retried)
                left = f"{len(retried) - requeued:,} were overtaken by later ones: eci-pay outbox retry --overtaken"
                return Repaired(repair=repair, findings=requeued, left=left if requeued < len(retried) else "")
            case _:
                assert_never(repair)

    async def _refund_booked(self, repair: BookRefund) -> Repaired:
        """As recovery does it, which finishes what a crash leaves here: it is told first."""
        payment_id, refund_id = repair.unsettled.payment_id, repair.unsettled.refund_id
        assert refund_id is not None
        refunds = self.looks.refunds
        await refunds.note_if_late(payment_id, refund_id, repair.outcome.reference)
        if not await refunds.reopen(refund_id):
            return Repaired(repair=repair, findings=0, left="that much of the payment is not left to refund")
        return _booked(repair, await refunds.settle_open(refund_id, repair.outcome))


def _booked(repair: SettleOutcome | BookRefund, booked: bool) -> Repaired:
    if booked:
        return Repaired(repair=repair, findings=repair.findings)
    return Repaired(repair=repair, findings=0, left="it could not be booked")
