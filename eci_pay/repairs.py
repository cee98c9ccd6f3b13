"""Repairs of what a reconciliation has found, where it is certain what is right: the gateway itself was asked.

They go by the use cases of everyone else, whoever settles first wins, and the audit trail says on whose behalf. None of
them deletes anything or moves money.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from eci_pay.context import begin_subject, on_behalf
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

    async def make(self, repairs: Sequence[Repair]) -> list[Repaired]:
        """One after the other; one that fails does not keep the others from being made."""
        made = []
        for repair in repairs:
            begin_subject()
            try:
                made.append(await self._made(repair))
            except Exception as error:  # whatever it is: the others are certain, too
                _log.exception("cannot %s", repair)
                made.append(Repaired(repair=repair, findings=0, left=str(error)))
        return made

    async def _made(self, repair: Repair) -> Repaired:
        match repair:
            case SettleOutcome():
                return await self._settled(repair)
            case BookRefund():
                return await self._refund_booked(repair)
            case SendAgain(destination=destination):
                retried = await self.outbox.retry_dead(destination, note=f"sent again{on_behalf()}")
                requeued = sum(each.requeued for each in retried)
                left = f"{len(retried) - requeued:,} were overtaken by later ones: eci-pay outbox retry --overtaken"
                return Repaired(
                    repair=repair,
                    findings=min(requeued, repair.findings),
                    left=left if requeued < len(retried) else "",
                )
            case _:
                assert_never(repair)

    async def _settled(self, repair: SettleOutcome) -> Repaired:
        """Booked, unless somebody else was faster; what they booked may be something else."""
        unsettled, outcome = repair.unsettled, repair.outcome
        if not await self.looks.book(unsettled, outcome):
            return Repaired(repair=repair, findings=0, left="it could not be booked")
        if await self.looks.is_booked(unsettled) is isinstance(outcome, Approved):
            return Repaired(repair=repair, findings=repair.findings)
        if isinstance(outcome, Approved):
            await self._note_if_late(unsettled, outcome.reference)
        return Repaired(repair=repair, findings=0, left="it was booked otherwise meanwhile: see `eci-pay recover`")

    async def _note_if_late(self, unsettled: Unsettled, reference: str) -> None:
        """Lets recovery put right what the gateway did and our books deny."""
        if unsettled.refund_id is None:
            await self.looks.charges.note_if_late(unsettled.payment_id, unsettled.attempt, reference)
        else:
            await self.looks.refunds.note_if_late(unsettled.payment_id, unsettled.refund_id, reference)

    async def _refund_booked(self, repair: BookRefund) -> Repaired:
        """As recovery does it, which takes charge of what a crash leaves here."""
        refund_id = repair.unsettled.refund_id
        assert refund_id is not None
        if not await self.looks.refunds.reopen(refund_id) and await self.looks.is_booked(repair.unsettled) is not True:
            return Repaired(repair=repair, findings=0, left="that much of the payment is not left to refund")
        if await self.looks.refunds.settle_open(refund_id, repair.outcome):
            return Repaired(repair=repair, findings=repair.findings)
        return Repaired(repair=repair, findings=0, left="it could not be booked")
