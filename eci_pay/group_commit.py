"""Group commit: what concurrent requests of one process write at the same moment shares a statement and a commit.

A lone request is written at once. While a batch is on its way to the database, others gather and go with the next one;
so the load itself makes the batches, and nobody waits for company. What a batch may hold, how many may wait and for how
long is bounded: beyond, a request is refused before anything is recorded. A row that somebody has locked leaves its
batch, and waits for the lock by itself.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from eci_pay.errors import Busy, Unavailable, apart
from eci_pay.instruments import batch_begun, rows_waiting

ASIDE_SECONDS_MAX = 5.0
"""How long a row that has left its batch waits to be written, where its kind has no such bound itself."""

Row = TypeVar("Row")
Result = TypeVar("Result")

Write = Callable[[Sequence[Row], bool], Awaitable[Sequence[Result]]]


@dataclass(eq=False, slots=True)
class _Entry(Generic[Row, Result]):
    """A row that is to be written, and whoever waits for its result."""

    row: Row
    claims: tuple[Hashable, ...]
    future: "asyncio.Future[Result]"
    asked_at: float


class Aside:
    """Where rows are written that have left their batch, of all kinds of a process: so many at a time that the others
    keep most of its connections."""

    def __init__(self, connections: int) -> None:
        self.trying = asyncio.Semaphore(max(1, connections // 4))
        """Each for a moment."""
        self.waiting = asyncio.Semaphore(max(1, connections // 4))
        """For a lock, as long as any statement may."""


class GroupCommit(Generic[Row, Result]):
    """`write` is given rows, and whether it may wait for locks as long as any statement may, or only for a moment; it
    returns a result for each row, in order. Those that are Busy are written again alone. What it raises is raised for
    each row.

    Up to `lanes` batches of up to `batch_max` rows are written at a time, no two rows with the same claim: the second
    one waits for the next batch. With `queue_max` rows waiting, the next one is refused, and so is one that has waited
    for `wait_seconds`; without them none is: for what must be written because money has moved.
    """

    def __init__(
        self,
        write: Write[Row, Result],
        *,
        kind: str = "",
        lanes: int,
        batch_max: int,
        aside: Aside | None = None,
        claims: Callable[[Row], tuple[Hashable, ...]] = lambda _: (),
        queue_max: int | None = None,
        wait_seconds: float | None = None,
    ) -> None:
        self._write = write
        self._kind = kind
        self._lanes = lanes
        self._batch_max = batch_max
        self._claims = claims
        self._queue_max = queue_max
        self._wait_seconds = wait_seconds
        self._waiting: deque[_Entry[Row, Result]] = deque()
        self._claimed: set[Hashable] = set()
        """By the rows that are being written."""
        self._running: set[asyncio.Task[None]] = set()
        self._aside = aside or Aside(connections=10)
        self._alone = 0
        """How many rows have left their batch and are not written yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Only kept so that none is collected while it runs."""

    async def __call__(self, row: Row) -> Result:
        """Writes a row, beside others if there are any. Raises Unavailable where too many wait, or it waits too long.

        Who stops waiting is not written, unless that has begun; the rest of the batch does not notice.
        """
        if self._is_full():
            raise Unavailable("too many requests wait to be written; nothing was sent")
        loop = asyncio.get_running_loop()
        entry = _Entry[Row, Result](row, self._claims(row), loop.create_future(), loop.time())
        self._waiting.append(entry)
        self._fill_lanes()
        return await entry.future

    def measure(self) -> None:
        """Notes how many wait: only now and then, for it changes with every request."""
        rows_waiting(self._kind, len(self._waiting) + self._alone)

    def _is_full(self) -> bool:
        if self._queue_max is None or len(self._waiting) + self._alone < self._queue_max:
            return False
        self._waiting = deque(entry for entry in self._waiting if not entry.future.done())
        return len(self._waiting) + self._alone >= self._queue_max

    def _fill_lanes(self) -> None:
        if self._waiting and len(self._running) < self._lanes:
            lane = self._start(self._write_waiting())
            self._running.add(lane)
            lane.add_done_callback(self._lane_ended)

    def _lane_ended(self, lane: asyncio.Task[None]) -> None:
        """One that was broken off, perhaps before it began, has left others waiting."""
        self._running.discard(lane)
        if lane.cancelled() or lane.exception() is not None:
            self._fill_lanes()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """In a context of its own, for it writes for others too: its log lines have no request's id."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _write_waiting(self) -> None:
        """Writes batch after batch until nobody waits. It begins after whoever asks in the same turn of the loop."""
        while batch := self._next_batch():
            for entry in await self._written(batch, patient=False):
                self._start(self._write_alone(entry, was_alone=len(batch) == 1))
        # At once: whoever asks before the task's end is known must not take it for a lane that will come for them.
        self._running.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next_batch(self) -> list[_Entry[Row, Result]]:
        """The first of those that wait, without those whose claims are being written."""
        batch: list[_Entry[Row, Result]] = []
        later: list[_Entry[Row, Result]] = []
        while self._waiting and len(batch) < self._batch_max:
            entry = self._waiting.popleft()
            if entry.future.done():
                continue
            if self._has_waited_too_long(entry):
                entry.future.set_exception(Unavailable("it took too long to be written; nothing was sent"))
            elif self._claimed.isdisjoint(entry.claims):
                self._claimed.update(entry.claims)
                batch.append(entry)
            else:
                later.append(entry)
        self._waiting.extendleft(reversed(later))
        if batch:
            batch_begun(self._kind, len(batch))
        return batch

    def _has_waited_too_long(self, entry: _Entry[Row, Result]) -> bool:
        waited_seconds = asyncio.get_running_loop().time() - entry.asked_at
        return self._wait_seconds is not None and waited_seconds > self._wait_seconds

    async def _written(self, batch: list[_Entry[Row, Result]], *, patient: bool) -> list[_Entry[Row, Result]]:
        """Writes rows and tells whoever waits; returns those that are locked, unless that was waited for."""
        locked: list[_Entry[Row, Result]] = []
        try:
            results = await self._write([entry.row for entry in batch], patient)
            for entry, result in zip(batch, results, strict=True):
                if isinstance(result, Busy) and not patient:
                    locked.append(entry)
                else:
                    self._tell(entry, result)
        except BaseException as error:
            for entry in batch:
                self._fail(entry, error)
            if not isinstance(error, Exception):
                raise
            return []
        return locked

    async def _write_alone(self, entry: _Entry[Row, Result], *, was_alone: bool) -> None:
        """Writes a row that is locked, or has shared a batch with one. Which of them it is, shows when each is tried
        for a moment; who is still locked then, waits as long as any statement may."""
        give_up_at = entry.asked_at + (self._wait_seconds or ASIDE_SECONDS_MAX)
        self._alone += 1
        try:
            is_locked = was_alone or await self._tried(entry, self._aside.trying, give_up_at, patient=False)
            if is_locked:
                await self._tried(entry, self._aside.waiting, give_up_at, patient=True)
        except BaseException as error:
            self._fail(entry, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._alone -= 1
            self._fill_lanes()  # with those that waited for its claims

    async def _tried(
        self, entry: _Entry[Row, Result], slots: asyncio.Semaphore, give_up_at: float, *, patient: bool
    ) -> bool:
        """Whether it was written in vain, for it is locked. Raises Busy where there is no slot in time."""
        try:
            async with asyncio.timeout_at(give_up_at):
                await slots.acquire()
        except TimeoutError:
            raise Busy("too many wait for what others have locked") from None
        try:
            if entry.future.done():  # nobody waits for it any more
                self._claimed.difference_update(entry.claims)
                return False
            return bool(await self._written([entry], patient=patient))
        finally:
            slots.release()

    def _tell(self, entry: _Entry[Row, Result], result: Result) -> None:
        self._claimed.difference_update(entry.claims)
        if not entry.future.done():
            entry.future.set_result(result)

    def _fail(self, entry: _Entry[Row, Result], error: BaseException) -> None:
        self._claimed.difference_update(entry.claims)
        if entry.future.done():
            return
        if isinstance(error, Exception):
            entry.future.set_exception(apart(error))
        else:
            # That a batch is cancelled does not cancel those that wait for it.
            entry.future.set_exception(Unavailable(f"the batch was broken off: {type(error).__name__}"))
