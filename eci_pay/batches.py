"""Runs set-based statements over many requests at once and gives each its own result.

A batch of one is the ordinary case. What holds for every batch: a row that conflicts with another of the batch
waits for the next round, a bad row does not fail its neighbours, and a lost connection is looked into before
anything is run again.
"""

from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import errors

from eci_pay.database import Database, Row, arrays
from eci_pay.errors import ConnectionLost, Unavailable

BEGIN_TRIES_MAX = 20
"""How often a begin that lost a race is run again with a new snapshot."""

T = TypeVar("T")


class BeginRow(Protocol):
    """A request as a row of a begin statement."""

    def columns(self) -> dict[str, Any]:
        """Its parameters."""

    def claims(self) -> tuple[Hashable, ...]:
        """What no other row of the same statement may have: its key, its order or payment."""

    def is_free(self, found: Row) -> bool:
        """Whether, by what the refusal statement found, nothing stands in its way."""


_AnyBeginRow = TypeVar("_AnyBeginRow", bound=BeginRow)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeginStatements:
    """The three statements of a kind of begin, by name."""

    begin: str
    begun: str
    refused: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The begin was committed; `row` is what the statement returned."""

    row: Row


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was recorded; `row` tells the state of the key and of the order or payment."""

    row: Row


BeginResult = Begun | Refused | Exception


def rounds(claims: Sequence[tuple[Hashable, ...]]) -> Iterator[list[int]]:
    """Splits row numbers so that no two rows of a round share a claim, each row as early as it can be."""
    waiting = list(range(len(claims)))
    while waiting:
        taken: set[Hashable] = set()
        this_round, next_round = [], []
        for number in waiting:
            if taken.isdisjoint(claims[number]):
                taken.update(claims[number])
                this_round.append(number)
            else:
                next_round.append(number)
        yield this_round
        waiting = next_round


async def isolated(rows: Sequence[T], run: Callable[[Sequence[T]], Awaitable[Sequence[Any]]]) -> list[Any]:
    """Runs all rows together; where the database rejects the batch, each alone, so that only the bad row fails.

    Returns a result per row, an exception in place of a rejected row's.
    """
    try:
        return list(await run(rows))
    except psycopg.Error as error:
        if len(rows) == 1:
            return [error]
    return [result for row in rows for result in await isolated([row], run)]


async def begin(
    database: Database,
    statements: BeginStatements,
    rows: Sequence[_AnyBeginRow],
    parameters: Mapping[str, Any],
) -> list[BeginResult]:
    """Begins every row; returns one result per row, in order. Raises Unavailable where the database is away."""
    results: dict[int, BeginResult] = {}

    async def run(batch: Sequence[_AnyBeginRow]) -> list[BeginResult]:
        return await _begin_batch(database, statements, batch, parameters)

    for numbers in rounds([row.claims() for row in rows]):
        outcome = await isolated([rows[number] for number in numbers], run)
        results.update(zip(numbers, outcome, strict=True))
    return [results[number] for number in range(len(rows))]


async def _begin_batch(
    database: Database,
    statements: BeginStatements,
    rows: Sequence[BeginRow],
    parameters: Mapping[str, Any],
) -> list[BeginResult]:
    results: dict[int, BeginResult] = {}
    connection_lost = False
    for _ in range(BEGIN_TRIES_MAX):
        waiting = [number for number in range(len(rows)) if number not in results]
        columns = arrays([rows[number].columns() for number in waiting])
        try:
            found = await database.fetch(statements.begin, {**columns, **parameters})
        except ConnectionLost:
            connection_lost = True
            found = await database.read(statements.begun, columns)
        except errors.NotNullViolation as error:
            if error.diag.column_name != "expires_at":
                raise
            continue  # one key raced for two orders: with a new snapshot, only the offender is refused
        if connection_lost and len(found) < len(waiting):
            # A statement whose connection was lost may commit later than it was looked for.
            known = {row["n"] for row in found}
            found += [row for row in await database.read(statements.begun, columns) if row["n"] not in known]
        results.update((waiting[row["n"]], Begun(row)) for row in found)
        if len(results) == len(rows):
            break
        for row in await database.read(statements.refused, columns):
            number = waiting[row["n"]]
            if number not in results and not rows[number].is_free(row):
                results[number] = Refused(row)
        if len(results) == len(rows):
            break
    else:
        unlucky = Unavailable("the request kept losing races for its key or order: try again")
        return [results.get(number, unlucky) for number in range(len(rows))]
    return [results[number] for number in range(len(rows))]
