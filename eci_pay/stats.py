"""What became of the payments that were created lately, and what is left to do: one look for an operator.

All of it is counted by the payments of the time. A refund that is made today of an older payment is not in it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from psycopg.errors import QueryCanceled

from eci_pay.database import Database
from eci_pay.errors import InvalidRequest, Unavailable
from eci_pay.lifecycle import PaymentMethod, PaymentStatus
from eci_pay.outbox import Outbox
from eci_pay.recovery import Recovery
from eci_pay.views import Amount, Instant, OutboxStats, View

BARS_MAX = 60
"""The most bars side by side, where there is a step that is long enough; a step that has begun may be one more."""
AGE_MAX = timedelta(days=36_500)

_STEPS = tuple(
    timedelta(minutes=minutes)
    for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 7 * 1440, 28 * 1440, 364 * 1440, 728 * 1440)
)
_FIRST_STEP = datetime(2001, 1, 1, tzinfo=UTC)
"""A Monday, as in `stats_payments.sql`."""


class Bar(View):
    """How many payments were created in one step."""

    begins_at: Instant
    count: int


class Attempts(View):
    """Charges that ended, each attempt of a payment by itself. `success_rate` is None where none did."""

    completed: int
    failed: int
    success_rate: float | None


class Flow(View):
    """Money of one currency: charges that were completed, and refunds."""

    currency: str
    charges: int
    charged: Amount
    refunds: int
    refunded: Amount


class Outcomes(View):
    """Outcomes that are unknown or to be put right, and how many of both are so for too long."""

    open: int
    late: int
    overdue: int
    oldest_seconds: float


class Backlog(View):
    """What is left to do, whenever it began."""

    messages: tuple[OutboxStats, ...]
    outcomes: Outcomes


class StatsView(View):
    """Payments created from `since` on, as they are at `until`."""

    since: Instant
    until: Instant
    payments: int
    by_status: dict[PaymentStatus, int]
    by_method: dict[PaymentMethod, dict[PaymentStatus, int]]
    attempts: Attempts
    money: tuple[Flow, ...]
    step_seconds: int
    bars: tuple[Bar, ...]
    backlog: Backlog


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Raises Unavailable, also where so many payments cannot be read within the limit of a statement."""

    database: Database
    outbox: Outbox
    recovery: Recovery
    clock: Callable[[], datetime]

    async def since(self, since: datetime) -> StatsView:
        """The payments created since; raises InvalidRequest for an instant that is to come or too long ago."""
        until = self.clock()
        if not until - AGE_MAX <= since < until:
            raise InvalidRequest(f"{since:%Y-%m-%d %H:%M:%S} UTC is not in the last {AGE_MAX.days:,} days")
        step = next((step for step in _STEPS if (until - since) / step <= BARS_MAX), _STEPS[-1])
        try:
            counts, trail = await asyncio.gather(
                self.database.read("stats_payments", {"since": since, "step": step}),
                self.database.read("stats_trail", {"since": since}),
            )
        except Unavailable as error:
            if isinstance(error.__cause__, QueryCanceled):
                error.add_note("a shorter time has fewer payments to read")
            raise
        of_cell: Counter[tuple[str, str]] = Counter()
        steps, of_step = _steps(since, until, step), Counter[datetime]()
        for row in counts:
            of_cell[row["payment_method"], row["status"]] += row["count"]
            # Whoever charged may have a clock that is ahead of ours.
            of_step[min(row["begins_at"], steps[-1])] += row["count"]
        by_method = {m: {status: of_cell[m, status] for status in PaymentStatus} for m in PaymentMethod}
        completed, failed = (sum(row[name] for row in trail) for name in ("completed", "failed"))
        messages, outcomes = await asyncio.gather(self.outbox.stats(), self.recovery.summary())
        return StatsView(
            since=since,
            until=until,
            payments=of_cell.total(),
            by_status={status: sum(of_method[status] for of_method in by_method.values()) for status in PaymentStatus},
            by_method=by_method,
            attempts=Attempts(
                completed=completed,
                failed=failed,
                success_rate=completed / (completed + failed) if completed + failed else None,
            ),
            money=tuple(Flow.model_validate({**row, "charges": row["completed"]}) for row in trail),
            step_seconds=int(step.total_seconds()),
            bars=tuple(Bar(begins_at=at, count=of_step[at]) for at in steps),
            backlog=Backlog(messages=messages, outcomes=Outcomes.model_validate(outcomes, from_attributes=True)),
        )


def _steps(since: datetime, until: datetime, step: timedelta) -> list[datetime]:
    """When each step begins, the one of `since` first."""
    first = since - (since - _FIRST_STEP) % step
    return [first + step * n for n in range((until - first) // step + 1)]
