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
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from eci_pay.context import begin_subject, bind_origin, current_actor
from eci_pay.database import Database, Row
from eci_pay.errors import Unavailable
from eci_pay.gateway_calls import LOOKS_AT_ONCE_MAX
from eci_pay.looks import Leased, Looks, Schedule, State, Step

FIND_COUNT_MAX = 500
LOOKS_APART_SECONDS = 2.0
"""How long after a look a request may ask for another."""
REQUEST_WAITS_SECONDS_MAX = 2.0
"""How long a request waits for a look that it asks for."""
OPEN_SHOWN_MAX = 1000
ACTOR = "recovery"
"""As the audit trail names it where nobody has asked for a look."""
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
class Summary:
    """How much is not settled: without an outcome, to be put right, and of both, older than it should be."""

    open: int
    late: int
    overdue: int
    oldest_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Every method raises Unavailable where the database cannot be reached."""

    database: Database
    looks: Looks
    clock: Callable[[], datetime]
    schedule: Schedule
    _looking: set[asyncio.Task[list[Look]]] = field(default_factory=set)

    async def find(self, payment_ids: set[int] | None = None) -> int:
        """Schedules a first look at what has been PROCESSING for a while, of these payments or of all; how many."""
        params = {
            **self._begun(),
            "payment_ids": None if payment_ids is None else list(payment_ids),
            "count_max": FIND_COUNT_MAX,
        }
        return len(await self.database.fetch("recovery_find", params))

    def _begun(self) -> dict[str, datetime]:
        """When what is looked at was begun, or else by a process whose clock is ahead of ours."""
        now = self.clock()
        return {
            "now": now,
            "before": now - timedelta(seconds=self.schedule.first),
            "future": now + CLOCK_TOLERANCE,
        }

    async def look_at_due(self) -> list[Look]:
        """Looks at a few that are due."""
        return await self._look_at(None)

    async def run_once(self) -> list[Look]:
        """Looks at all that is due now."""
        while await self.find() >= FIND_COUNT_MAX:
            pass
        looks: list[Look] = []
        while batch := await self.look_at_due():
            looks += batch
        return looks

    async def settle_first(self, payment_ids: set[int]) -> bool:
        """Looks at what is open of payments that stand in a request's way, due or not; whether anything was settled.

        What began or was looked at only just now, and what somebody else is looking at, is left alone. A look that
        takes long goes on without the request.
        """
        if not payment_ids or len(self._looking) >= LOOKS_AT_ONCE_MAX:
            return False
        await self.find(payment_ids)
        open_ids = [row["recovery_id"] for payment_id in payment_ids for row in await self._open(payment_id)]
        if not open_ids:
            return False
        looking = asyncio.create_task(self._look_at(open_ids))
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)
        await asyncio.wait({looking}, timeout=REQUEST_WAITS_SECONDS_MAX)
        return looking.done() and any(look.state is not State.OPEN for look in looking.result())

    async def drain(self) -> None:
        """Waits for the looks that go on without their requests."""
        await asyncio.gather(*self._looking, return_exceptions=True)

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
        return [look for look in await self.open() if look.age_seconds > self.schedule.alert]

    async def summary(self) -> Summary:
        """How much is not settled."""
        (row,) = await self.database.read("recovery_summary", {**self._begun(), "alert_seconds": self.schedule.alert})
        return Summary(**row)

    async def close(self, recovery_id: int) -> bool:
        """Ends what an operator has put right by hand; False where nothing waits for that."""
        params = {"recovery_id": recovery_id, "result": "put right by hand"}
        return bool(await self.database.fetch("recovery_close", params))

    async def _alert(self) -> None:
        summary = await self.summary()
        if summary.overdue:
            _log.error(
                "%d outcomes have been unknown for more than %.0f s, the oldest for %.0f s: eci-pay recover --dry-run",
                summary.overdue,
                self.schedule.alert,
                summary.oldest_seconds,
            )

    async def open(self) -> list[Look]:
        """What is not settled: what is looked at, the oldest first, then what has no look scheduled yet; of each at
        most `OPEN_SHOWN_MAX`."""
        unfound = {**self._begun(), "count_max": OPEN_SHOWN_MAX}
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
        params = {"payment_id": payment_id, "now": self.clock(), "count_max": OPEN_SHOWN_MAX}
        return await self.database.read("recovery_open", params)

    async def _look_at(self, recovery_ids: Sequence[int] | None) -> list[Look]:
        params = {
            "recovery_ids": None if recovery_ids is None else list(recovery_ids),
            "count_max": LOOKS_AT_ONCE_MAX,
            "lease_seconds": self.schedule.lease,
            "apart_seconds": LOOKS_APART_SECONDS,
            "lease_id": uuid.uuid4(),
        }
        rows = await self.database.fetch("recovery_claim", params)
        leased = [Leased(**{**row, "state": State(row["state"])}) for row in rows]
        looks = await asyncio.gather(*(self._look(each, is_due=recovery_ids is None) for each in leased))
        return [look for look in looks if look is not None]

    async def _look(self, leased: Leased, *, is_due: bool) -> Look | None:
        """Looks, and schedules the next look; None where that failed: its lease ends, and somebody looks again."""
        bind_origin(None, actor=current_actor() or ACTOR)
        begin_subject(payment_id=leased.payment_id, refund_id=leased.refund_id)
        try:
            return await self._look_and_mark(leased, is_due=is_due)
        except Unavailable as error:
            _log.warning("%s could not be looked at: %s", leased.name, error)
        except Exception:  # whatever it is, it must not end the others
            _log.exception("%s could not be looked at", leased.name)
        return None

    async def _look_and_mark(self, leased: Leased, *, is_due: bool) -> Look:
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
                "counts": int(is_due),
                "late_reference": step.late_reference,
                "returned_reference": step.returned_reference,
            },
        )
        _tell(leased, step)
        return Look(
            recovery_id=leased.recovery_id,
            payment_id=leased.payment_id,
            refund_id=leased.refund_id,
            state=step.state,
            result=step.result,
            looks=leased.looks + is_due,
            age_seconds=leased.age_seconds,
        )


def _tell(leased: Leased, step: Step) -> None:
    """One line per change; what is still open is told of when it is overdue."""
    if step.state is State.LATE:
        _log.error("%s: %s", leased.name, step.result)
    elif step.state is not leased.state:
        level = logging.ERROR if leased.state is State.LATE else logging.INFO
        _log.log(level, "%s was recovered after %.0f s: %s", leased.name, leased.age_seconds, step.result)
