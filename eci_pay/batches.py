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

from eci_pay.database import Connection, Database, Row, arrays, fetch
from eci_pay.errors import Busy, ConnectionLost, Unavailable, apart

MOMENT = "100ms"
"""How long a statement that must not keep others waiting waits for a lock."""
BEGIN_TRIES_MAX = 20
"""How often a begin that lost a race is run again with a new snapshot."""

T = TypeVar("T")
R = TypeVar("R")

_REJECTIONS = (psycopg.Error, UnicodeError)
"""What one row may be refused for, by the database or on the way there."""


class BeginRow(Protocol):
    """A request as a row of a begin statement."""

    def columns(self) -> dict[str, Any]:
        """Its parameters."""

    def claims(self) -> tuple[Hashable, ...]:
        """What no other row of the same statement may have: its key, its order or payment."""

    def is_free(self, found: Row) -> bool:
        """Whether, by what the refusal statement found, nothing stands in its way."""


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
Then = Callable[[Connection, list[Row]], Awaitable[None]]


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


def lock_wait(*, patient: bool) -> str | None:
    """The parameter of that name, with which a statement bounds its waits for locks; None leaves it to the settings."""
    return None if patient else MOMENT


async def settle(rows: Sequence[T], run: Callable[[Sequence[T]], Awaitable[Sequence[R]]]) -> list[R | Exception]:
    """Runs all rows together; where the database rejects the batch, each alone, so that only the bad row fails.

    Returns a result per row, an exception in place of a rejected row's. Running a settled row again is safe.
    """
    try:
        return list(await run(rows))
    except Unavailable as error:
        return [apart(error) for _ in rows]
    except _REJECTIONS as error:
        if len(rows) == 1:
            return [error]
    return [result for row in rows for result in await settle([row], run)]


async def begin(
    database: Database,
    statements: BeginStatements,
    rows: Sequence[BeginRow],
    parameters: Mapping[str, Any],
    then: Then | None = None,
) -> list[BeginResult]:
    """Begins every row; returns one result per row, in order, an exception in place of a failed row's.

    `then` is what belongs to the same commit, given the connection and the rows that have begun.
    """
    results: dict[int, BeginResult] = {}
    for numbers in rounds([row.claims() for row in rows]):
        passes = _Passes(database, statements, parameters, then)
        outcome = await _begin_round(passes, [rows[number] for number in numbers])
        results.update(zip(numbers, outcome, strict=True))
    return [results[number] for number in range(len(rows))]


async def standing(database: Database, statements: BeginStatements, row: BeginRow) -> Row:
    """The state of a row's key and of its order or payment, for `is_free` to judge; nothing is begun."""
    (found,) = await database.read(statements.refused, arrays([row.columns()]))
    return found


async def _begin_round(passes: "_Passes", rows: Sequence[BeginRow]) -> list[BeginResult]:
    """Runs the statement until each row has begun, was refused or has failed. What has begun is never run again."""
    results: dict[int, BeginResult] = {}
    failure: Exception = Unavailable("the request kept losing races for its key or order: try again")
    for _ in range(BEGIN_TRIES_MAX):
        waiting = [number for number in range(len(rows)) if number not in results]
        if not waiting:
            break
        found: dict[int, BeginResult] = {}
        try:
            await passes.run([rows[number] for number in waiting], found)
        except Unavailable as error:
            failure = error
            break
        except _REJECTIONS as error:
            failure = error
            if len(waiting) - len(found) == 1:
                break
            for n, number in enumerate(waiting):
                if n not in found:
                    (results[number],) = await _begin_round(passes, [rows[number]])
        finally:
            results.update({waiting[n]: result for n, result in found.items()})
    return [results.get(number) or apart(failure) for number in range(len(rows))]


class _Passes:
    """Runs a begin statement again and again, and remembers whether a connection was lost in between."""

    def __init__(
        self, database: Database, statements: BeginStatements, parameters: Mapping[str, Any], then: Then | None
    ) -> None:
        self._database = database
        self._statements = statements
        self._parameters = parameters
        self._then = then
        self._connection_lost = False

    async def run(self, rows: Sequence[BeginRow], results: dict[int, BeginResult]) -> None:
        """Adds the rows, by number, that have begun or were refused, as soon as that is known: what has begun counts
        even if this fails afterwards. A row that is missing in the end lost a race: it is free."""
        columns = arrays([row.columns() for row in rows])
        results.update({row["n"]: Begun(row) for row in await self._begun(columns)})
        if len(results) < len(rows):
            for row in await self._database.read(self._statements.refused, columns):
                if row["n"] not in results and not rows[row["n"]].is_free(row):
                    results[row["n"]] = Refused(row)

    async def _execute(self, params: dict[str, Any]) -> list[Row]:
        then = self._then
        if then is None:
            return await self._database.fetch(self._statements.begin, params)

        async def work(connection: Connection) -> list[Row]:
            rows = await fetch(connection, self._statements.begin, params)
            await then(connection, rows)
            return rows

        return await self._database.transaction(work)

    async def _begun(self, columns: dict[str, list[Any]]) -> list[Row]:
        found: list[Row] = []
        parameters = dict(self._parameters)
        if self._connection_lost:
            # The statement that it was lost with may still be committing. It is waited for, and whatever comes of that,
            # nobody may begin these rows anew.
            parameters["lock_wait"] = lock_wait(patient=True)
        try:
            found = await self._execute({**columns, **parameters})
        except Busy as error:
            if self._connection_lost:
                raise Unavailable(f"a connection was lost, and what became of it is not known: {error}") from error
            raise
        except ConnectionLost:
            self._connection_lost = True
        except errors.NotNullViolation as error:
            # One key raced for two orders: with a new snapshot, only the offender is refused.
            if error.diag.column_name != "expires_at":
                raise
        except errors.UniqueViolation:
            # The statement whose connection was lost has committed in the meantime.
            if not self._connection_lost:
                raise
        if self._connection_lost and len(found) < len(columns["n"]):
            # That statement may also commit later than it was looked for: so it is looked for in every pass.
            known = {row["n"] for row in found}
            begun = await self._database.read(self._statements.begun, columns)
            found += [row for row in begun if row["n"] not in known]
        return found
