"""The use case that makes the refunds or charges of a file: many at once, those of one payment one after the other.

Nothing is done twice, whatever crashes: every row has a key of its own (`bulk_files`), so the same file again replays
what was done and goes on with the rest, even while another run of it is under way. Keys live a day. So the file is
recorded, before its first row, with the moment from which on its keys may have been made, and no row is begun when
those may begin to expire.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from eci_pay.answers import Answer
from eci_pay.bulk_files import CALLER, BulkFile
from eci_pay.bulk_plans import Plan, Task, planner_of
from eci_pay.bulk_runs import CLOCKS_DIFFER_MAX, RERUN_WITHIN, BulkRun, Deadline, chunks, may_run
from eci_pay.charges import Charges
from eci_pay.database import Database, Row
from eci_pay.errors import FileRunTooLongAgo, IdempotencyKeyInFlight, Unavailable
from eci_pay.refunds import Refunds
from eci_pay.requests import RefundRequest

IN_FLIGHT_SECONDS_MAX = 10.0
"""How long a row waits for somebody else who is doing it, or for recovery's first look at what a crash has left."""
NAME_LENGTH_MAX = 500


class Named(Protocol):
    """What is looked up, by its payment or its order."""

    @property
    def payment_id(self) -> int | None:
        """Its payment."""

    @property
    def order_id(self) -> int | None:
        """Its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bulk:
    """Files of refunds and charges: `plan` one, `begin` it, and call what that returns."""

    database: Database
    charges: Charges
    refunds: Refunds
    clock: Callable[[], datetime]

    async def plan(self, file: BulkFile) -> Plan:
        """Holds every row against the books; does nothing. Raises FileInvalid with the faults of all rows, unless some
        were begun before, FileRunTooLongAgo, and Unavailable."""
        # First: once keys have expired, the books cannot tell what was done.
        for run in await self._runs(file):
            if not may_run(run["started_at"], self.clock()):
                raise _too_long_ago(file, run)
        planner = planner_of(file, self.charges, self.clock())
        for rows in chunks(file.rows):
            for row, found in zip(rows, await self._look_up(rows, [file.key(row.line) for row in rows]), strict=True):
                planner.add(row, found)
        return planner.plan()

    async def check_clock(self) -> None:
        """Raises Unavailable where this machine's clock is not the database's, by which others are held to the time."""
        (row,) = await self.database.read("database_clock")
        if abs(self.clock() - row["now"]) > CLOCKS_DIFFER_MAX:
            raise Unavailable(
                f"this machine's clock is more than {CLOCKS_DIFFER_MAX // timedelta(minutes=1)} minutes off the "
                f"database's, which says {row['now'].astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC; nothing was sent"
            )

    async def begin(self, plan: Plan, *, operator: str) -> BulkRun:
        """Records the run, before its first row. Raises FileRunTooLongAgo and Unavailable."""
        now = self.clock()
        params = {
            "kind": plan.file.kind.value,
            "file_hash": plan.file.digest,
            "file_name": plan.file.name[-NAME_LENGTH_MAX:],
            "operator": operator,
            "row_count": len(plan.tasks),
            "at": now,
            "first_run_min": now - RERUN_WITHIN,
            "first_run_max": now + CLOCKS_DIFFER_MAX,
        }
        recorded = await self.database.fetch("bulk_run_record", params)
        if not recorded:
            (first,) = await self._runs(plan.file)
            raise _too_long_ago(plan.file, first)
        deadline = Deadline.of(recorded[0]["started_at"].astimezone(UTC), self.clock)
        return BulkRun(
            plan=plan,
            deadline=deadline,
            ask=lambda task: self._ask_patiently(task, deadline),
            look_up=lambda tasks: self._look_up(tasks, [task.key for task in tasks]),
        )

    async def _ask_patiently(self, task: Task, deadline: Deadline) -> Answer:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(IdempotencyKeyInFlight),
            stop=stop_after_delay(IN_FLIGHT_SECONDS_MAX),
            wait=wait_random_exponential(multiplier=0.1, max=1),
            reraise=True,
        )
        return await retrying(self._ask, task, deadline)

    async def _ask(self, task: Task, deadline: Deadline) -> Answer:
        deadline.check()
        key, request = task.key, task.request
        if isinstance(request, RefundRequest):
            return await self.refunds.refund(
                payment_id=task.payment_id,
                request=request,
                idempotency_key=key,
                caller=CALLER,
                not_after=deadline.not_after,
            )
        return await self.charges.charge(
            request=request, idempotency_key=key, caller=CALLER, not_after=deadline.not_after
        )

    async def _runs(self, file: BulkFile) -> list[Row]:
        """The file's row in `bulk_runs`, if it has one."""
        return await self.database.read("bulk_run_find", {"kind": file.kind.value, "file_hash": file.digest})

    async def _look_up(self, rows: Sequence[Named], keys: list[str]) -> list[Row]:
        """The state of each row's payment and key."""
        params = {
            "n": list(range(len(rows))),
            "payment_id": [row.payment_id for row in rows],
            "order_id": [row.order_id for row in rows],
            "idempotency_key": keys,
            "caller": CALLER,
            "now": self.clock(),
        }
        return await self.database.read("bulk_standing", params)


def _too_long_ago(file: BulkFile, run: Row) -> FileRunTooLongAgo:
    first = f"{run['started_at'].astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC by {run['operator']}"
    return FileRunTooLongAgo(f"{file.name} was first run at {first}. {TOO_LATE}")


TOO_LATE = (
    f"A file can be run again for {RERUN_WITHIN // timedelta(hours=1)} hours: later, what was done could not be told "
    "from what was not. Take the rows that its results file tells to be not done into a new file, and look up those "
    "that are unknown or begun"
)
"""What the person is told whose file may not be run any more."""
