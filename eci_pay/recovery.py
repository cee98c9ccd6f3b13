"""Recovery: settles charges and refunds whose outcome is unknown, by asking the gateway what became of them.

A crash or a timeout leaves a payment or a refund PROCESSING: the gateway may or may not have acted, and nobody may
guess. Recovery looks it up under our own key, again and again with growing distance, and settles it by the same code
as the request that began it; whoever settles first, both tell the same.

That the gateway has never heard of an operation means nothing while the request may still be on its way. Only after a
grace period of more than twice the deadline for sending is it booked as never happened, and then it is looked at once
more. Money that turns up later nevertheless is given back, a refund that does is booked; the operator is told.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import assert_never

from psycopg.types.numeric import Int8

from eci_pay.charge_settling import ChargeSettling, charge_key
from eci_pay.context import bind_origin
from eci_pay.database import Database, Row
from eci_pay.errors import Unavailable
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

FIND_COUNT_MAX = 500
LOOKS_AT_ONCE_MAX = 8
"""How many lookups of one process are under way at the gateway."""
OPEN_SHOWN_MAX = 1000
CLOCK_TOLERANCE = timedelta(minutes=1)
"""How far ahead of ours another process's clock may be before what it began is found without waiting."""
ALERT_INTERVAL_SECONDS = 60.0
"""How often the log is told of what is overdue."""
NEVER_HAPPENED = Declined(code="not_processed", message="The gateway has never received the request.")

_log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a recovery stands."""

    OPEN = "OPEN"
    """There is no outcome yet."""
    CHECKING = "CHECKING"
    """It was booked as never happened, and is looked at once more."""
    LATE = "LATE"
    """The gateway has acted after all; that is to be put right."""
    DONE = "DONE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Leased:
    """A recovery that this process works on."""

    recovery_id: int
    payment_id: int
    attempt: int
    refund_id: int | None
    amount: Decimal
    currency: str
    payment_method: str
    state: State
    looks: int
    lease_id: uuid.UUID
    late_reference: str | None
    transaction_id: str
    charge_reference: str
    age_seconds: float

    @property
    def operation(self) -> GatewayCharge | GatewayRefund:
        """What the gateway was asked, or would have been."""
        of_charge = charge_key(self.transaction_id, self.attempt)
        if self.refund_id is None:
            return GatewayCharge(
                key=of_charge, amount=self.amount, currency=self.currency, payment_method=self.payment_method
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
class Look:
    """What one look came to. There is no `recovery_id` where none is scheduled yet."""

    recovery_id: int | None
    payment_id: int
    refund_id: int | None
    state: State
    result: str
    looks: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class _Next:
    """The state after a look, and when the next one is due; None: after the usual distance."""

    state: State
    result: str
    delay_seconds: float | None = None
    late_reference: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When is looked, in seconds: first after `first`, then at growing distance up to `longest`. After `grace`,
    unheard of means never happened; after `alert`, the operator is told."""

    first: float
    longest: float
    grace: float
    alert: float
    lease: float

    @classmethod
    def of(cls, settings: Settings) -> "Schedule":
        """As the settings say. A lease outlasts the few requests of a look, each with its timeout."""
        return cls(
            first=settings.eci_pay_recovery_first_look_seconds,
            longest=settings.eci_pay_recovery_look_max_seconds,
            grace=settings.eci_pay_recovery_grace_seconds,
            alert=settings.eci_pay_recovery_alert_seconds,
            lease=4 * settings.eci_pay_gateway_timeout_seconds + 2 * settings.eci_pay_settle_retry_seconds + 10,
        )

    def distance(self, looks: int) -> float:
        """How long after so many looks the next one is due."""
        return min(self.first * 2.0 ** min(looks, 30), self.longest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Every method raises Unavailable where the database cannot be reached."""

    database: Database
    gateway: GatewayCalls
    charges: ChargeSettling
    refunds: RefundSettling
    clock: Callable[[], datetime]
    schedule: Schedule

    async def find(self, *, after_seconds: float | None = None) -> None:
        """Schedules a first look at what has been PROCESSING for so long."""
        await self.database.fetch("recovery_find", {**self._begun(after_seconds), "count_max": FIND_COUNT_MAX})

    def _begun(self, seconds_ago: float | None = None) -> dict[str, datetime]:
        """When that was begun, or else by a process whose clock is ahead of ours."""
        now = self.clock()
        seconds_ago = self.schedule.first if seconds_ago is None else seconds_ago
        return {"before": now - timedelta(seconds=seconds_ago), "future": now + CLOCK_TOLERANCE}

    async def look_at_due(self) -> list[Look]:
        """Looks at a few that are due."""
        return await self._look_at(None)

    async def run_once(self) -> list[Look]:
        """Looks at all that is due now."""
        await self.find()
        looks: list[Look] = []
        while batch := await self.look_at_due():
            looks += batch
        return looks

    async def settle_first(self, payment_ids: set[int]) -> bool:
        """Looks at what is open of payments that stand in a request's way, due or not; whether anything was settled.

        What began only just now, and what somebody else is looking at, is left alone.
        """
        if not payment_ids:
            return False
        await self.find()
        open_ids = [row["recovery_id"] for payment_id in payment_ids for row in await self._open(payment_id)]
        looks = await self._look_at(open_ids) if open_ids else []
        return any(look.state is not State.OPEN for look in looks)

    async def run_until(self, stopped: asyncio.Event, *, interval_seconds: float) -> None:
        """Looks at what is due, again and again, until it is stopped; tells of what has been open for too long."""
        told_at = -math.inf
        while not stopped.is_set():
            looks: list[Look] = []
            try:
                await self.find()
                looks = await self.look_at_due()
                if time.monotonic() - told_at > ALERT_INTERVAL_SECONDS:
                    told_at = time.monotonic()
                    await self._alert()
            except Unavailable as error:
                _log.warning("nothing can be recovered for now: %s", error)
            except Exception:  # whatever it is, it must not end the task: the next round tries again
                _log.exception("recovery failed")
            if len(looks) < LOOKS_AT_ONCE_MAX:
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval_seconds):
                        await stopped.wait()

    async def overdue(self) -> list[Look]:
        """What has been unknown for longer than it should be."""
        return self.overdue_of(await self.open())

    def overdue_of(self, looks: Sequence[Look]) -> list[Look]:
        """Those of them that are older than they should be."""
        return [look for look in looks if look.age_seconds > self.schedule.alert]

    async def _alert(self) -> None:
        overdue = await self.overdue()
        if overdue:
            _log.error(
                "%d outcomes have been unknown for more than %.0f s; the oldest, of payment %d, for %.0f s: %s",
                len(overdue),
                self.schedule.alert,
                overdue[0].payment_id,
                overdue[0].age_seconds,
                overdue[0].result,
            )

    async def open(self) -> list[Look]:
        """What is not settled: what is looked at, the oldest first, then what has no look scheduled yet; of each at
        most `OPEN_SHOWN_MAX`."""
        unfound = {**self._begun(), "now": self.clock(), "count_max": OPEN_SHOWN_MAX}
        rows = await self._open(None) + await self.database.read("recovery_unfound", unfound)
        return [
            Look(
                recovery_id=row["recovery_id"],
                payment_id=row["payment_id"],
                refund_id=row["refund_id"],
                state=State(row["state"]),
                result=row["last_result"] or "not looked at yet",
                looks=row["looks"],
                age_seconds=row["age_seconds"],
            )
            for row in rows
        ]

    async def _open(self, payment_id: int | None) -> list[Row]:
        params = {"payment_id": payment_id, "count_max": OPEN_SHOWN_MAX}
        return await self.database.read("recovery_open", params)

    async def _look_at(self, recovery_ids: Sequence[int] | None) -> list[Look]:
        params = {
            "recovery_ids": None if recovery_ids is None else [Int8(recovery_id) for recovery_id in recovery_ids],
            "count_max": LOOKS_AT_ONCE_MAX,
            "lease_seconds": self.schedule.lease,
            "lease_id": uuid.uuid4(),
        }
        rows = await self.database.fetch("recovery_claim", params)
        leased = [Leased(**{**row, "state": State(row["state"])}) for row in rows]
        return list(await asyncio.gather(*(self._look(each) for each in leased)))

    async def _look(self, leased: Leased) -> Look:
        """Looks, settles what can be settled, and schedules the next look."""
        bind_origin(None)
        match leased.state:
            case State.OPEN:
                step = await self._settle(leased)
            case State.CHECKING:
                step = await self._check(leased)
            case State.LATE:
                step = await self._put_right(leased)
            case _:
                step = _Next(State.DONE, "nothing is left to do")
        delay = self.schedule.distance(leased.looks) if step.delay_seconds is None else step.delay_seconds
        await self.database.fetch(
            "recovery_mark",
            {
                "recovery_id": leased.recovery_id,
                "lease_id": leased.lease_id,
                "state": step.state.value,
                "result": step.result,
                "delay_seconds": float(delay),
                "late_reference": step.late_reference,
            },
        )
        _tell(leased, step)
        return Look(
            recovery_id=leased.recovery_id,
            payment_id=leased.payment_id,
            refund_id=leased.refund_id,
            state=step.state,
            result=step.result,
            looks=leased.looks + 1,
            age_seconds=leased.age_seconds,
        )

    async def _settle(self, leased: Leased) -> _Next:
        """Asks what became of the operation, and books it."""
        outcome = await self._outcome(leased)
        if outcome is None:
            return await self._settled_otherwise(leased)
        left_seconds = self.schedule.grace - leased.age_seconds
        if isinstance(outcome, NotFound) and left_seconds > 0:
            wait = min(self.schedule.distance(leased.looks), left_seconds)
            return _Next(State.OPEN, "the gateway has not heard of it yet", delay_seconds=wait)
        if isinstance(outcome, NotFound):
            outcome = await self.gateway.rule_out(leased.operation)
        if isinstance(outcome, NotFound):
            return await self._never_happened(leased)
        if isinstance(outcome, Unknown):
            return _Next(State.OPEN, outcome.message)
        if not await self._book(leased, outcome):
            return _Next(State.OPEN, "could not be booked")
        return _Next(State.DONE, "approved" if isinstance(outcome, Approved) else f"declined: {outcome.code}")

    async def _never_happened(self, leased: Leased) -> _Next:
        """Unheard of for longer than any request may be under way."""
        if not await self._book(leased, NEVER_HAPPENED):
            return _Next(State.OPEN, "could not be booked")
        if await self._is_booked(leased) is not False:
            return _Next(State.DONE, "settled by its own request")
        # A request that was held up for longer than anything should be would arrive after this.
        return _Next(State.CHECKING, "never happened", delay_seconds=self.schedule.grace)

    async def _settled_otherwise(self, leased: Leased) -> _Next:
        """What is no longer PROCESSING: settled by its own request, or by a look that was cut off before its note."""
        if await self._is_booked(leased):
            return _Next(State.DONE, "settled by its own request")
        return _Next(State.CHECKING, "booked as failed", delay_seconds=self.schedule.grace)

    async def _is_booked(self, leased: Leased) -> bool | None:
        """Whether the books say that the gateway acted; None while they leave it open."""
        view = await self.charges.payments.by_id(leased.payment_id)
        if leased.refund_id is not None:
            refund = next(refund for refund in view.refunds if refund.refund_id == leased.refund_id)
            return None if refund.status is RefundStatus.PROCESSING else refund.status is RefundStatus.COMPLETED
        if view.attempt != leased.attempt:
            return False
        return None if view.status is PaymentStatus.PROCESSING else view.captured_at is not None

    async def _outcome(self, leased: Leased) -> Outcome | NotFound | None:
        """What the gateway says; None where the operation was settled meanwhile."""
        if leased.refund_id is None:
            if not await self.charges.is_open(leased.payment_id, leased.attempt):
                return None
        else:
            refund = await self.refunds.open_refund(leased.refund_id)
            if refund is None:
                return None
            if refund["captured_at"] is None:
                return NOT_CAPTURED
        return await self.gateway.look_up(leased.operation)

    async def _book(self, leased: Leased, outcome: Approved | Declined) -> bool:
        """Settles by the code of the request itself; whether it is settled now, by us or by somebody else."""
        if leased.refund_id is None:
            return await self.charges.settle_open(leased.payment_id, leased.attempt, outcome)
        return await self.refunds.settle_open(leased.refund_id, outcome)

    async def _check(self, leased: Leased) -> _Next:
        """Looks once more at what was booked as never happened."""
        outcome = await self.gateway.look_up(leased.operation)
        match outcome:
            case Approved(reference=reference):
                return _Next(State.LATE, "approved after all", delay_seconds=0.0, late_reference=reference)
            case NotFound() | Declined():
                return _Next(State.DONE, "never happened")
            case Unknown(message=message):
                return _Next(State.CHECKING, message)
            case _:
                assert_never(outcome)

    async def _put_right(self, leased: Leased) -> _Next:
        """Gives back money that was taken for an attempt that had failed; books a refund that had."""
        booked = await self._is_booked(leased)
        if booked is None:
            return _Next(State.OPEN, "approved after all, booked again", delay_seconds=0.0)
        if booked:
            return _Next(State.DONE, "settled by its own request")
        if leased.refund_id is not None:
            if await self.refunds.reopen(leased.refund_id):
                return _Next(State.OPEN, "approved after all, booked again", delay_seconds=0.0)
            return _Next(State.LATE, "approved after all, but that much of the payment is not left: by hand")
        return await self._give_back(leased)

    async def _give_back(self, leased: Leased) -> _Next:
        charge = leased.operation
        refund = GatewayRefund(
            key=f"{charge.key}-LATE",
            charge_key=charge.key,
            charge_reference=leased.late_reference or "",
            amount=leased.amount,
            currency=leased.currency,
            payment_method=leased.payment_method,
        )
        outcome = await self.gateway.give_back(refund)
        match outcome:
            case Approved(reference=reference):
                return _Next(State.DONE, f"taken late, given back: {reference}")
            case Declined(code=code):
                return _Next(State.LATE, f"taken late, and not given back: {code}: by hand")
            case Unknown(message=message):
                return _Next(State.LATE, f"taken late, not known to be given back: {message}")
            case _:
                assert_never(outcome)


def _tell(leased: Leased, step: _Next) -> None:
    """One line per change; what is still open is told of when it is overdue."""
    if step.state is State.LATE:
        _log.error("%s: %s", leased.name, step.result)
    elif step.state is not leased.state:
        level = logging.ERROR if leased.state is State.LATE else logging.INFO
        _log.log(level, "%s was recovered after %.0f s: %s", leased.name, leased.age_seconds, step.result)
