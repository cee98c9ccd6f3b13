"""One run of a file: its rows, so many at a time, and what came of each."""

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from http import HTTPStatus
from typing import TypeVar

from eci_pay.answers import Answer
from eci_pay.bulk_plans import Plan, Task
from eci_pay.database import Row
from eci_pay.errors import Conflict, IdempotencyKeyInFlight, NotFound, PayError, RequestTooLate, Unavailable
from eci_pay.idempotency import KEY_LIFETIME

CONCURRENCY_DEFAULT, CONCURRENCY_MAX = 16, 100
UNAVAILABLE_ROWS_MAX = 20
"""So many rows in a row that find the database or the gateway out of order end the run."""
RERUN_MARGIN = timedelta(hours=2)
"""How long before its first key may expire a file is left alone: for clocks that differ, and for rows that wait."""
RERUN_WITHIN = KEY_LIFETIME - RERUN_MARGIN
CLOCKS_DIFFER_MAX = timedelta(minutes=15)
"""How far a clock may be from the database's, or back from where it was: keys expire by the clock that made them."""
LOOKED_UP_ROWS_MAX = 5000
"""How many rows are looked up in the books at a time."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a row ended. REPLAYED was done before; UNAVAILABLE and NOT_TRIED have moved nothing; BEGUN is under way."""

    DONE = "done"
    REPLAYED = "replayed"
    DECLINED = "declined"
    UNKNOWN = "unknown"
    CONFLICT = "conflict"
    NOT_FOUND = "not-found"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    NOT_TRIED = "not-tried"
    BEGUN = "begun"


MOVED_NOTHING = (Outcome.UNAVAILABLE, Outcome.NOT_TRIED)


class End(StrEnum):
    """Why a run ended."""

    COMPLETE = "complete"
    INTERRUPTED = "interrupted"
    TOO_LATE = "too-late"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of a row; `amount` is in major units. Its ids are known once the run has ended."""

    task: Task
    outcome: Outcome
    amount: Decimal
    detail: str = ""
    payment_id: int | None = None
    refund_id: int | None = None
    transaction_id: str | None = None

    @classmethod
    def of(cls, task: Task, outcome: Outcome, detail: str = "") -> "Result":
        """By what the plan knows of the row."""
        return cls(task=task, outcome=outcome, detail=detail, amount=task.amount, payment_id=task.payment_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeSum:
    """How many rows ended like this, and what they come to, in major units."""

    outcome: Outcome
    currency: str
    count: int
    sum: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A run that has ended: a result for every row, in the file's order."""

    plan: Plan
    first_run_at: datetime
    end: End
    results: Sequence[Result]

    def sums(self) -> list[OutcomeSum]:
        """What the rows come to, by outcome and currency."""
        amounts: dict[tuple[Outcome, str], list[Decimal]] = defaultdict(list)
        for result in self.results:
            amounts[result.outcome, result.task.currency].append(result.amount)
        order = list(Outcome)
        return [
            OutcomeSum(outcome=outcome, currency=currency, count=len(some), sum=sum(some, Decimal(0)))
            for (outcome, currency), some in sorted(
                amounts.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
            )
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """Until when rows of a file may be begun, by two clocks, as a `Place`: one may be set back, the other stands still
    while the machine sleeps."""

    first_run_at: datetime
    clock: Callable[[], datetime]
    monotonic_max: float

    @classmethod
    def of(cls, first_run_at: datetime, clock: Callable[[], datetime]) -> "Deadline":
        """That of a file whose first run began then."""
        seconds_left = (first_run_at + RERUN_WITHIN - clock()).total_seconds()
        return cls(first_run_at=first_run_at, clock=clock, monotonic_max=time.monotonic() + seconds_left)

    @property
    def not_after(self) -> datetime:
        """The last instant at which a row may be begun."""
        return self.first_run_at + RERUN_WITHIN

    @property
    def has_passed(self) -> bool:
        """Whether it is too late."""
        return not may_run(self.first_run_at, self.clock()) or time.monotonic() > self.monotonic_max

    @property
    def keys_may_have_expired(self) -> bool:
        """Whether the books may have forgotten what was done."""
        return self.clock() > self.first_run_at + KEY_LIFETIME

    def check(self) -> None:
        """Raises RequestTooLate once it has passed."""
        if self.has_passed:
            raise RequestTooLate


@dataclass(kw_only=True, slots=True)
class BulkRun:
    """A run that is recorded: call it once. `ask` does a row, and raises RequestTooLate after the `deadline`; `look_up`
    tells what the books know of rows by now."""

    plan: Plan
    deadline: Deadline
    ask: Callable[[Task], Awaitable[Answer]]
    look_up: Callable[[Sequence[Task]], Awaitable[Sequence[Row]]]
    end: End | None = None
    _unavailable: int = 0
    """Rows in a row that were."""

    def stop(self, end: End = End.INTERRUPTED) -> None:
        """Begins no further row; what has begun is waited for."""
        self.end = self.end or end

    async def __call__(
        self, *, concurrency: int = CONCURRENCY_DEFAULT, on_row: Callable[[Result], None] = lambda _: None
    ) -> Report:
        """Does all rows, up to `concurrency` at a time. `on_row` is told of each before it begins, as BEGUN, and when
        it has ended; what that raises ends the run, and is raised here."""
        told: dict[int, Result] = {}
        lanes = iter(self.plan.lanes())
        workers = [self._work(lanes, told, on_row) for _ in range(concurrency)]
        for failure in await asyncio.gather(*workers, return_exceptions=True):
            if failure is not None:
                raise failure
        results = [told.pop(task.line, Result.of(task, Outcome.NOT_TRIED)) for task in self.plan.tasks]
        await self._complete(results)
        return Report(
            plan=self.plan,
            first_run_at=self.deadline.first_run_at,
            end=self.end or End.COMPLETE,
            results=results,
        )

    async def begun_before(self) -> list[Task]:
        """The rows that were begun by now, before this run begins any. Raises Unavailable."""
        begun: list[Task] = []
        for some in chunks(self.plan.tasks):
            found = await self.look_up(some)
            begun += [task for task, row in zip(some, found, strict=True) if row["key_id"] is not None]
        return begun

    async def _work(
        self, lanes: Iterator[list[Task]], told: dict[int, Result], on_row: Callable[[Result], None]
    ) -> None:
        try:
            for lane in lanes:
                for task in lane:
                    if self.deadline.has_passed:
                        self.stop(End.TOO_LATE)
                    if self.end:
                        return
                    on_row(Result.of(task, Outcome.BEGUN))
                    result = told[task.line] = await self._result(task)
                    on_row(result)
                    if result.outcome in MOVED_NOTHING:
                        break  # the payment's other rows must not take what this one asks for in the next run
        except BaseException:
            self.stop()
            raise

    async def _result(self, task: Task) -> Result:
        try:
            result = await self._asked(task)
        except Unavailable as error:
            self._unavailable += 1
            if self._unavailable >= UNAVAILABLE_ROWS_MAX:
                self.stop(End.UNAVAILABLE)
            return Result.of(task, Outcome.UNKNOWN if task.was_begun else Outcome.UNAVAILABLE, error.detail)
        self._unavailable = 0
        return result

    async def _asked(self, task: Task) -> Result:
        try:
            return _told(task, await self.ask(task))
        except Unavailable:
            raise
        except RequestTooLate as error:
            self.stop(End.TOO_LATE)
            return Result.of(task, Outcome.NOT_TRIED, error.detail)
        except IdempotencyKeyInFlight as error:
            return Result.of(task, Outcome.UNKNOWN, error.detail)
        except PayError as error:
            return Result.of(task, _refusal(error), error.detail)
        except Exception as error:  # a defect: the other rows go on, and nobody may guess what became of this one
            _log.exception("the row in line %d failed", task.line)
            return Result.of(task, Outcome.UNKNOWN, f"unexpected {type(error).__name__}: {error}")

    async def _complete(self, results: list[Result]) -> None:
        """Adds what the books know in the end: ids, sums of refunds, and what became of rows that this run has not done
        but another has begun."""
        try:
            for some in chunks(range(len(results))):
                found = await self.look_up([results[number].task for number in some])
                for number, row in zip(some, found, strict=True):
                    results[number] = _looked_up(results[number], row)
        except Unavailable as error:
            _log.warning("what others have done cannot be looked up: %s", error)
            if any(result.outcome in MOVED_NOTHING for result in results):
                self.stop(End.UNAVAILABLE)
            results[:] = [_not_guessed(result) for result in results]
        if self.deadline.keys_may_have_expired:
            results[:] = [_not_guessed(result) for result in results]


def may_run(first_run_at: datetime, now: datetime) -> bool:
    """Whether no key of the file has expired. A first run in the future is one by a clock that ours cannot follow."""
    return -CLOCKS_DIFFER_MAX <= now - first_run_at <= RERUN_WITHIN


def chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """The rows, as many at a time as are looked up."""
    for start in range(0, len(rows), LOOKED_UP_ROWS_MAX):
        yield rows[start : start + LOOKED_UP_ROWS_MAX]


def _told(task: Task, answer: Answer) -> Result:
    if answer.is_declined:
        problem = json.loads(answer.body)
        return Result.of(task, Outcome.DECLINED, f"{problem['decline_code']}: {problem['detail']}")
    if answer.is_unknown:
        return Result.of(task, Outcome.UNKNOWN, "the gateway may or may not have acted")
    return Result.of(task, Outcome.REPLAYED if answer.replayed else Outcome.DONE)


def _refusal(error: PayError) -> Outcome:
    if isinstance(error, NotFound):
        return Outcome.NOT_FOUND
    return Outcome.CONFLICT if isinstance(error, Conflict) else Outcome.REFUSED


def _not_guessed(result: Result) -> Result:
    """A row that this run has not done, where the books do not tell whether another has."""
    if result.outcome in MOVED_NOTHING:
        detail = result.detail or "not tried"
        return replace(result, outcome=Outcome.UNKNOWN, detail=f"{detail}; another run may have done it")
    return result


def _looked_up(result: Result, found: Row) -> Result:
    ids = replace(
        result,
        payment_id=found["payment_id"],
        refund_id=found["refund_id"],
        transaction_id=found["transaction_id"],
        amount=found["refund_amount"] or result.amount,
    )
    if found["key_id"] is None or result.outcome not in MOVED_NOTHING:
        return ids
    match found["answered_status_code"]:
        case None:
            return replace(ids, outcome=Outcome.UNKNOWN, detail="it was begun, and its outcome is not known yet")
        case HTTPStatus.PAYMENT_REQUIRED:
            return replace(ids, outcome=Outcome.DECLINED, detail="it was declined before")
        case _:
            return replace(ids, outcome=Outcome.REPLAYED, detail="it was done before")
