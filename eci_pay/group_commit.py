"""Group commit: what concurrent requests of one process write at the same moment shares a statement and a commit.

A lone request is written at once. While a batch is on its way to the database, others gather and go with the next one;
so the load itself makes the batches, and nobody waits for company. What a batch may hold and how many may wait is
bounded: beyond, a request is refused before anything is recorded.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from eci_pay.errors import Unavailable

Row = TypeVar("Row")
Result = TypeVar("Result")

Write = Callable[[Sequence[Row]], Awaitable[Sequence[Result]]]


class GroupCommit(Generic[Row, Result]):
    """`write` is given rows and returns a result for each, in order; whatever it raises is raised for each of them.

    Up to `lanes` batches of up to `batch_max` rows are written at a time. With `queue_max` rows waiting, the next one
    is refused; without, none is: for what must be written because money has moved.
    """

    def __init__(self, write: Write[Row, Result], *, lanes: int, batch_max: int, queue_max: int | None = None) -> None:
        self._write = write
        self._lanes = lanes
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._waiting: deque[tuple[Row, asyncio.Future[Result]]] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()
        """Only kept so that none is collected while it runs."""

    async def __call__(self, row: Row) -> Result:
        """Writes a row, beside others if there are any. Raises Unavailable where too many wait.

        Who stops waiting is not written, unless that has begun; the rest of the batch does not notice.
        """
        if self._queue_max is not None and len(self._waiting) >= self._queue_max:
            raise Unavailable("too many requests wait to be written; nothing was sent")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._running < self._lanes:
            self._running += 1
            # In a context of its own, for it writes for others too: its log lines have no request's id.
            task = asyncio.get_running_loop().create_task(self._write_waiting(), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _write_waiting(self) -> None:
        """Writes batch after batch until nobody waits. It begins after whoever asks in the same turn of the loop."""
        try:
            while batch := self._next_batch():
                await self._write_batch(batch)
        finally:
            self._running -= 1

    async def _write_batch(self, batch: list[tuple[Row, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._write([row for row, _ in batch])
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(_for_waiters(error))
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Row, asyncio.Future[Result]]]:
        batch: list[tuple[Row, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._batch_max:
            row, future = self._waiting.popleft()
            if not future.done():
                batch.append((row, future))
        return batch


def _for_waiters(error: BaseException) -> Exception:
    """A cancelled batch is no cancellation of those that wait for it."""
    return error if isinstance(error, Exception) else Unavailable(f"the batch was broken off: {type(error).__name__}")
