"""Matches a gateway's settlement file with our books: lines are copied into a temporary table, and each is given its
class by a few statements over all of them.

It all happens in one transaction, at whose end the tables are gone. The statements tell the rules.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import LiteralString

from psycopg import sql

from eci_pay.database import Connection, Row, fetch
from eci_pay.differences import ClassSum, DaySum, Difference, LineClass, Operation
from eci_pay.statements import statement

GATEWAY_PENDING_MAX = timedelta(days=3)
"""For how long after we booked it a gateway may call an operation pending."""
PERIOD_MARGIN = timedelta(minutes=15)
"""What was booked that shortly before the end of a period that is over may be in the next file."""
DIFFERENCES_PAGE = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """The time of which a file should have everything: from the first instant to before the second."""

    start: datetime
    end: datetime

    def cut_off(self, made_at: datetime) -> datetime:
        """After which moment a file that was made at `made_at` need not have what we booked."""
        return self.end - PERIOD_MARGIN if made_at >= self.end else made_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """What the lines of a file came to."""

    lines: int
    period: Period
    cut_off: datetime
    sums: tuple[ClassSum, ...]
    days: tuple[DaySum, ...]


async def copy(connection: Connection, chunks: Iterable[str], on_chunk: Callable[[], None]) -> None:
    """Copies lines, as `settlement_file.copy_lines` writes them, into their table; raises what that raises."""
    await fetch(connection, "settlement_lines")
    async with connection.cursor() as cursor, cursor.copy(statement("settlement_copy")) as copying:
        for chunk in chunks:
            await copying.write(chunk)
            on_chunk()


async def days_of(connection: Connection) -> tuple[int, Period | None]:
    """How many lines were copied, and the days (UTC) that they are of."""
    (row,) = await fetch(connection, "settlement_period")
    period = Period(start=row["period_from"], end=row["period_to"]) if row["lines"] else None
    return row["lines"], period


async def match(
    connection: Connection, period: Period, *, lines: int, made_at: datetime, now: datetime, unknown_max: timedelta
) -> Matched:
    """Gives each line, each line that earlier runs left pending, and each operation of ours in the period without a
    line, its class. What has no outcome yet is pending for `unknown_max`."""
    since = {"unknown_since": now - unknown_max, "pending_since": now - GATEWAY_PENDING_MAX}
    cut_off = period.cut_off(made_at)
    await fetch(connection, "settlement_carry_in")
    await _analyze(connection, "settlement_lines")
    await fetch(connection, "settlement_findings")
    await fetch(connection, "settlement_match_charges", since)
    await fetch(connection, "settlement_refund_lines")
    await _analyze(connection, "settlement_refund_lines")
    # What it joins is small or hashed; the planner takes it for a row or two, and would walk all of it for each line.
    await connection.execute(b"SET LOCAL enable_nestloop = off")
    await fetch(connection, "settlement_match_refunds", since)
    await connection.execute(b"SET LOCAL enable_nestloop = on")
    await _analyze(connection, "settlement_findings")
    ours = {"period_from": period.start, "period_to": period.end, "cut_off": cut_off}
    await fetch(connection, "settlement_match_ours", ours)
    sums = await fetch(connection, "settlement_sums")
    days = await fetch(connection, "settlement_days")
    return Matched(
        lines=lines,
        period=period,
        cut_off=cut_off,
        sums=tuple(sorted(map(_sum, sums), key=lambda each: (list(LineClass).index(each.line_class), each.currency))),
        days=tuple(DaySum(**row) for row in days),
    )


async def carry(connection: Connection, matched: Matched, run_id: int) -> None:
    """Notes what concerns other files than this one: what is left to later runs, and what they need not look for."""
    run = {"run_id": run_id}
    await fetch(connection, "settlement_await", run)
    await fetch(
        connection, "settlement_arrived", {**run, "period_from": matched.period.start, "cut_off": matched.cut_off}
    )
    await fetch(connection, "settlement_carry_out", run)
    await fetch(connection, "settlement_carried_end", run)


async def differences(connection: Connection) -> AsyncIterator[Difference]:
    """All that is not matched, class by class; read in pages, for it may be everything."""
    async with connection.cursor("differences") as cursor:
        cursor.itersize = DIFFERENCES_PAGE
        await cursor.execute(statement("settlement_differences"), {"classes": [each.value for each in LineClass]})
        async for row in cursor:
            yield _difference(row)


async def _analyze(connection: Connection, table: LiteralString) -> None:
    """Tells the planner how many rows there are: nobody else does for a temporary table."""
    await connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))


def _sum(row: Row) -> ClassSum:
    return ClassSum(line_class=LineClass(row.pop("class")), **row)


def _difference(row: Row) -> Difference:
    line_class, operation = LineClass(row.pop("class")), Operation(row.pop("operation"))
    if row["line"] is not None and row["line"] < 0:
        row |= {"line": None, "detail": f"{row['detail']} (a line of an earlier file)"}
    return Difference(line_class=line_class, operation=operation, **row)
