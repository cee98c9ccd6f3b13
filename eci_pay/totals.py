"""Running totals of the books, kept by the database: true whoever has charged and after every restart, and read without
counting payments.

Each statement that changes payments or refunds notes by how much, in its own commit, as rows of `total_changes`: one
row per status, method and currency of a whole batch. Now and then they are added up.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal

from eci_pay.database import Connection, Database, Row, fetch
from eci_pay.errors import Unavailable
from eci_pay.lifecycle import PaymentMethod, PaymentStatus


@dataclass(frozen=True, slots=True)
class CurrencyTotal:
    """How many of something there are in one currency, and what they come to in major units."""

    count: int
    amount: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class BookTotals:
    """All payments ever recorded, by what they are now; completed ones stay so when they are refunded."""

    by_status: Mapping[PaymentStatus, int]
    by_method: Mapping[PaymentMethod, int]
    completed: Mapping[str, CurrencyTotal]
    refunds: Mapping[str, CurrencyTotal]
    failed_attempts: int
    errors: int

    @property
    def payments(self) -> int:
        """How many were recorded."""
        return sum(self.by_status.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """By how much a total was wrong: what it lacks by a count of the books, or, below zero, has too much."""

    metric: str
    label: str
    count: int
    amount: Decimal


class ErrorCount(logging.Handler):
    """Counts unexpected errors: whatever is logged with its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._guard = threading.Lock()
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One more, if it is one."""
        if record.exc_info and record.exc_info[0] is not None:
            self.add(1)

    def add(self, count: int) -> None:
        """So many more."""
        with self._guard:
            self._count += count

    def take(self) -> int:
        """Those since the last time."""
        with self._guard:
            count, self._count = self._count, 0
            return count


unexpected_errors = ErrorCount()
"""Those of this process that the database has not been told of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Every method raises Unavailable."""

    database: Database

    async def read(self) -> BookTotals:
        """All totals as of one moment, and what this process alone knows of."""
        found: dict[str, dict[str, CurrencyTotal]] = defaultdict(dict)
        for row in await self.database.read("totals_read"):
            found[row["metric"]][row["label"]] = CurrencyTotal(row["count"], row["amount"])

        def count(metric: str, label: str = "") -> int:
            total = found[metric].get(label)
            return total.count if total else 0

        return BookTotals(
            by_status={status: count("status", status) for status in PaymentStatus},
            by_method={method: count("method", method) for method in PaymentMethod},
            completed=found["completed"],
            refunds=found["refunds"],
            failed_attempts=count("failed"),
            errors=count("errors"),
        )

    async def add_up(self) -> None:
        """Adds up what was noted, so that it stays short, and notes this process's errors."""
        await self.note_errors()
        await self.database.fetch("totals_add_up")

    async def recount(self, *, dry_run: bool = False) -> list[Correction]:
        """Holds the totals against a count of the books, and puts them right unless it is a `dry_run`. They are wrong
        where somebody has changed payments without them: a release before them, or an operator by hand."""

        async def work(connection: Connection) -> list[Row]:
            await fetch(connection, "totals_recount_lock")
            return await fetch(connection, "totals_recount", {"notes": not dry_run})

        return [Correction(**row) for row in await self.database.transaction(work)]

    @asynccontextmanager
    async def counting_errors(self) -> AsyncIterator[None]:
        """Counts the unexpected errors of this process until the block ends, and tells the database of the last."""
        logging.getLogger().addHandler(unexpected_errors)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(unexpected_errors)
            with suppress(Unavailable):
                await self.note_errors()

    async def note_errors(self) -> None:
        """Tells the database of the unexpected errors of this process; they are kept where that fails."""
        if count := unexpected_errors.take():
            try:
                await self.database.fetch("totals_errors", {"count": count})
            except BaseException:
                unexpected_errors.add(count)
                raise
