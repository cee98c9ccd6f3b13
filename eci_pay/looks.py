"""What one look at an unknown outcome does: the gateway is asked, and its word is booked by the code of the request.

That the gateway has never heard of an operation means nothing while the request may still be on its way. Only after a
grace period of more than twice the deadline for sending is it booked as never happened, and then it is watched for a
while. Money that turns up later nevertheless is given back, a refund that does is booked.
"""

import uuid
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import assert_never

from eci_pay.charge_settling import ChargeSettling, charge_key
from eci_pay.gateway_calls import GatewayCalls
from eci_pay.gateways import (
    Approved,
    Declined,
    GatewayCharge,
    GatewayRefund,
    NotFound,
    Outcome,
    Unknown,
)
from eci_pay.lifecycle import PaymentStatus, RefundStatus
from eci_pay.refund_settling import NOT_CAPTURED, RefundSettling, refund_key
from eci_pay.settings import Settings

NEVER_HAPPENED = Declined(code="not_processed", message="The gateway has never received the request.")


class State(StrEnum):
    """Where a recovery stands."""

    OPEN = "OPEN"
    """There is no outcome yet."""
    CHECKING = "CHECKING"
    """It was booked as never happened, and is watched."""
    LATE = "LATE"
    """The gateway has acted after all; that is to be put right."""
    DONE = "DONE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsettled:
    """A charge or a refund whose outcome is looked up."""

    payment_id: int
    attempt: int
    refund_id: int | None
    amount: Decimal
    currency: str
    payment_method: str
    begun_at: datetime
    transaction_id: str
    charge_reference: str
    age_seconds: float

    @property
    def operation(self) -> GatewayCharge | GatewayRefund:
        """What the gateway was asked, or would have been."""
        of_charge = charge_key(self.transaction_id, self.attempt)
        if self.refund_id is None:
            return GatewayCharge(
                key=of_charge,
                amount=self.amount,
                currency=self.currency,
                payment_method=self.payment_method,
                begun_at=self.begun_at,
            )
        return GatewayRefund(
            key=refund_key(self.transaction_id, self.refund_id),
            charge_key=of_charge,
            charge_reference=self.charge_reference,
            amount=self.amount,
            currency=self.currency,
            payment_method=self.payment_method,
        )

    @property
    def name(self) -> str:
        """For people."""
        what = f"refund {self.refund_id} of " if self.refund_id is not None else ""
        return f"{what}payment {self.payment_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Leased(Unsettled):
    """A recovery that this process works on."""

    recovery_id: int
    state: State
    looks: int
    lease_id: uuid.UUID
    late_reference: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """The state after a look, and when the next one is due; None: after the usual distance."""

    state: State
    result: str
    delay_seconds: float | None = None
    late_reference: str | None = None
    returned_reference: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When is looked, in seconds: first after `first`, then at growing distance up to `longest`. After `grace`,
    unheard of means never happened, which is checked until `watch`; after `alert`, the operator is told."""

    first: float
    longest: float
    grace: float
    watch: float
    alert: float
    lease: float

    @classmethod
    def of(cls, settings: Settings) -> "Schedule":
        """As the settings say. A lease outlasts the few requests of a look, each with its timeout."""
        return cls(
            first=settings.eci_pay_recovery_first_look_seconds,
            longest=settings.eci_pay_recovery_look_max_seconds,
            grace=settings.eci_pay_recovery_grace_seconds,
            watch=settings.eci_pay_recovery_watch_seconds,
            alert=settings.eci_pay_recovery_alert_seconds,
            lease=4 * settings.eci_pay_gateway_timeout_seconds + 2 * settings.eci_pay_settle_retry_seconds + 10,
        )

    def distance(self, looks: int) -> float:
        """How long after so many looks the next one is due."""
        return min(self.first * 2.0 ** min(looks, 30), self.longest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """Every method raises Unavailable where the database cannot be reached."""

    gateway: GatewayCalls
    charges: ChargeSettling
    refunds: RefundSettling
    schedule: Schedule

    async def look(self, leased: Leased) -> Step:
        """Looks, and settles what can be settled."""
        match leased.state:
            case State.OPEN:
                return await self._settle(leased)
            case State.CHECKING:
                return await self._check(leased)
            case State.LATE:
                return await self._put_right(leased)
            case State.DONE:
                return Step(State.DONE, "nothing is left to do")
            case _:
                assert_never(leased.state)

    async def _settle(self, leased: Leased) -> Step:
        """Asks what became of the operation, and books it."""
        outcome = await self.outcome(leased)
        if outcome is None:
            return await self._settled_otherwise(leased)
        left_seconds = self.schedule.grace - leased.age_seconds
        if isinstance(outcome, NotFound) and left_seconds > 0:
            wait = min(self.schedule.distance(leased.looks), left_seconds)
            return Step(State.OPEN, "the gateway has not heard of it yet", delay_seconds=wait)
        if isinstance(outcome, NotFound):
            outcome = await self.gateway.rule_out(leased.operation)
        if isinstance(outcome, NotFound):
            return await self._never_happened(leased)
        if isinstance(outcome, Unknown):
            return Step(State.OPEN, outcome.message)
        if not await self.book(leased, outcome):
            return Step(State.OPEN, "could not be booked")
        return Step(State.DONE, "approved" if isinstance(outcome, Approved) else f"declined: {outcome.code}")

    async def _never_happened(self, leased: Leased) -> Step:
        """Unheard of for longer than any request may be under way."""
        if not await self.book(leased, NEVER_HAPPENED):
            return Step(State.OPEN, "could not be booked")
        if await self.is_booked(leased) is not False:
            return Step(State.DONE, "settled by its own request")
        # A request that was held up for longer than anything should be would arrive after this.
        return Step(State.CHECKING, "never happened", delay_seconds=self.schedule.grace)

    async def _settled_otherwise(self, leased: Leased) -> Step:
        """What is no longer PROCESSING: settled by its own request, or by a look that was cut off before its note."""
        if await self.is_booked(leased):
            return Step(State.DONE, "settled by its own request")
        return Step(State.CHECKING, "booked as failed", delay_seconds=self.schedule.grace)

    async def is_booked(self, unsettled: Unsettled) -> bool | None:
        """Whether the books say that the gateway acted; None while they leave it open."""
        view = await self.charges.payments.by_id(unsettled.payment_id)
        if unsettled.refund_id is not None:
            refund = next(refund for refund in view.refunds if refund.refund_id == unsettled.refund_id)
            return None if refund.status is RefundStatus.PROCESSING else refund.status is RefundStatus.COMPLETED
        if view.attempt != unsettled.attempt:
            return False
        return None if view.status is PaymentStatus.PROCESSING else view.captured_at is not None

    async def outcome(self, unsettled: Unsettled) -> Outcome | NotFound | None:
        """What the gateway says; None where the operation was settled meanwhile."""
        if unsettled.refund_id is None:
            if not await self.charges.is_open(unsettled.payment_id, unsettled.attempt):
                return None
        else:
            refund = await self.refunds.open_refund(unsettled.refund_id)
            if refund is None:
                return None
            if refund["captured_at"] is None:
                return NOT_CAPTURED
        return await self.gateway.look_up(unsettled.operation)

    async def book(self, unsettled: Unsettled, outcome: Approved | Declined) -> bool:
        """Settles by the code of the request itself; whether it is settled now, by us or by somebody else."""
        if unsettled.refund_id is None:
            return await self.charges.settle_open(unsettled.payment_id, unsettled.attempt, outcome)
        return await self.refunds.settle_open(unsettled.refund_id, outcome)

    async def _check(self, leased: Leased) -> Step:
        """Looks again at what was booked as never happened: each time it is twice as old, and last when watching ends.

        A charge was ruled out before that. A refund cannot be, and whoever asked for it may be dead: what a gateway
        makes of it late, and tells nobody, only a look finds.
        """
        outcome = await self.gateway.look_up(leased.operation)
        match outcome:
            case Approved(reference=reference):
                return Step(State.LATE, "approved after all", delay_seconds=0.0, late_reference=reference)
            case NotFound() if leased.age_seconds < self.schedule.watch:
                wait = min(leased.age_seconds, self.schedule.watch - leased.age_seconds)
                return Step(State.CHECKING, "never happened", delay_seconds=wait)
            case NotFound() | Declined():
                return Step(State.DONE, "never happened")
            case Unknown(message=message):
                return Step(State.CHECKING, message)
            case _:
                assert_never(outcome)

    async def _put_right(self, leased: Leased) -> Step:
        """Gives back money that was taken for an attempt that had failed; books a refund that had."""
        booked = await self.is_booked(leased)
        if booked is None:
            return Step(State.OPEN, "approved after all, booked again", delay_seconds=0.0)
        if booked:
            return Step(State.DONE, "settled by its own request")
        if leased.refund_id is not None:
            if await self.refunds.reopen(leased.refund_id):
                return Step(State.OPEN, "approved after all, booked again", delay_seconds=0.0)
            return Step(State.LATE, "made late, but that much of the payment is not left: by hand, then --close")
        return await self._give_back(leased)

    async def _give_back(self, leased: Leased) -> Step:
        charge = leased.operation
        refund = GatewayRefund(
            key=f"{charge.key}-LATE",
            charge_key=charge.key,
            charge_reference=leased.late_reference or "",
            amount=leased.amount,
            currency=leased.currency,
            payment_method=leased.payment_method,
        )
        outcome = await self.gateway.look_up(refund)
        if isinstance(outcome, NotFound):
            outcome = await self.gateway.give_back(refund)
        match outcome:
            case Approved(reference=reference):
                return Step(State.DONE, f"taken late, given back: {reference}", returned_reference=reference)
            case Declined(code=code):
                return Step(State.LATE, f"taken late, and not given back: {code}: by hand, then --close")
            case Unknown(message=message):
                return Step(State.LATE, f"taken late, not known to be given back: {message}")
            case _:
                assert_never(outcome)
