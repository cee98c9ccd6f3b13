"""Recovery: finds charges and refunds whose outcome is unknown, and sees that each is looked at until it is settled.

A crash or a timeout leaves a payment or a refund PROCESSING: the gateway may or may not have acted, and nobody may
guess. It is looked up under our own key, again and again with growing distance, by any number of processes that share
the work; whoever settles first, the request itself or recovery, both tell the same. `looks.py` tells what a look does.
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

from psycopg.types.numeric import Int8

from eci_pay.context import bind_origin
from eci_pay.database import Database, Row
from eci_pay.errors import Unavailable
from eci_pay.looks import Leased, Looks, Schedule, State, Step

FIND_COUNT_MAX = 500
LOOKS_AT_ONCE_MAX = 8
"""How many lookups of one process are under way at the gateway."""
OPEN_SHOWN_MAX = 1000
CLOCK_TOLERANCE = timedelta(minutes=1)
"""How far ahead of ours another process's clock may be before what it began is found without waiting."""
ALERT_INTERVAL_SECONDS = 60.0
"""How often the log is told of what is overdue."""

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Every method raises Unavailable where the database cannot be reached."""

    database: Database
    looks: Looks
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
        results = await asyncio.gather(*(self._look(each) for each in leased), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result  # when the others have ended
        return [result for result in results if isinstance(result, Look)]

    async def _look(self, leased: Leased) -> Look:
        """Looks, and schedules the next look."""
        bind_origin(None)
        step = await self.looks.look(leased)
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


def _tell(leased: Leased, step: Step) -> None:
    """One line per change; what is still open is told of when it is overdue."""
    if step.state is State.LATE:
        _log.error("%s: %s", leased.name, step.result)
    elif step.state is not leased.state:
        level = logging.ERROR if leased.state is State.LATE else logging.INFO
        _log.log(level, "%s was recovered after %.0f s: %s", leased.name, leased.age_seconds, step.result)
