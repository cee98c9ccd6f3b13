"""Checks of the books by themselves: whether the audit trail, the refunds, the keys and the messages say the same as
the payments (the invariants that the README publishes).

Payments and keys are walked through in ranges, each by one short statement that sees them as of one moment: so charges
go on meanwhile, and the memory does not depend on their number.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from eci_pay.database import Database, Row
from eci_pay.differences import DIFFERENCES_SHOWN_MAX, BookFault, Check
from eci_pay.looks import Unsettled

RANGE_PAYMENTS = 50_000
RANGE_KEYS = 200_000
UNSETTLED_MAX = 10_000
"""How many outcomes that are unknown are looked at; where there are more, the gateway is down."""
MESSAGE_WAITS_MAX = timedelta(hours=1)
"""How long a message may wait for its delivery."""


@dataclass(slots=True)
class Found:
    """Faults, of each check as many as are shown, and how many there are of each."""

    counts: Counter[Check] = field(default_factory=Counter)
    faults: list[BookFault] = field(default_factory=list)
    payments: int = 0

    def add(self, fault: BookFault) -> None:
        """Takes note of a fault."""
        if self.counts[fault.check] < DIFFERENCES_SHOWN_MAX:
            self.faults.append(fault)
        self.counts[fault.check] += 1

    def add_counted(self, rows: Sequence[Row]) -> None:
        """As `add`, for the rows of a statement that shows some and counts all."""
        for row in rows:
            self.add(_fault(row))
        # Beyond those that it has shown.
        for check, counted in {row["check_name"]: row["count"] for row in rows}.items():
            self.counts[Check(check)] += counted - sum(row["check_name"] == check for row in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class BookChecks:
    """Every method raises Unavailable."""

    database: Database
    clock: Callable[[], datetime]

    async def check(
        self,
        found: Found,
        *,
        changed_from: datetime | None,
        changed_to: datetime | None,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Adds the faults of all books, or of the payments that were changed last in that time; tells from 0 to 1
        how far it is."""
        (ends,) = await self.database.read("books_ranges")
        payments = list(_ranges(ends["first_payment_id"], ends["last_payment_id"], RANGE_PAYMENTS))
        keys = list(_ranges(ends["first_key_id"], ends["last_key_id"], RANGE_KEYS))
        steps = len(payments) + len(keys) + 1
        for done, (first_id, last_id) in enumerate(payments):
            on_progress(done / steps)
            params = {
                "first_id": first_id,
                "last_id": last_id,
                "changed_from": changed_from,
                "changed_to": changed_to,
            }
            rows = await self.database.read("books_faults", params)
            found.payments += rows[0]["payments"]
            for row in rows:
                if row["check_name"] is not None:
                    found.add(_fault(row))
        for done, (first_id, last_id) in enumerate(keys, start=len(payments)):
            on_progress(done / steps)
            params = {"first_id": first_id, "last_id": last_id, "count_max": DIFFERENCES_SHOWN_MAX}
            found.add_counted(await self.database.read("books_keys", params))
        found.add_counted(await self.database.read("books_late", {"count_max": DIFFERENCES_SHOWN_MAX}))
        waits = {"count_max": DIFFERENCES_SHOWN_MAX, "overdue_before": self.clock() - MESSAGE_WAITS_MAX}
        found.add_counted(await self.database.read("books_messages", waits))
        on_progress(1.0)

    async def unsettled(self) -> tuple[list[Unsettled], int]:
        """What has no outcome, the oldest first, at most `UNSETTLED_MAX`; and how much more there is."""
        rows = await self.database.read("books_unsettled", {"now": self.clock(), "count_max": UNSETTLED_MAX})
        counts = [row.pop("count") for row in rows]
        return [Unsettled(**row) for row in rows], counts[0] - len(rows) if rows else 0


def _ranges(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last + 1, size):
        yield start, start + size - 1


def _fault(row: Row) -> BookFault:
    return BookFault(
        check=Check(row["check_name"]),
        detail=row["detail"],
        payment_id=row["payment_id"],
        refund_id=row.get("refund_id"),
        message_id=row.get("message_id"),
    )
