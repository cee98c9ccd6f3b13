"""What charges and refunds do alike between begin and the caller's answer.

They book what the gateway answered however long the database is away, and run to their end whoever stops waiting.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from eci_pay import idempotency
from eci_pay.answers import Answer
from eci_pay.context import context_of_use_case
from eci_pay.database import Database
from eci_pay.errors import Unavailable
from eci_pay.idempotency import Finish

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """`settle_retry_seconds` bounds how long an answer's booking is tried."""

    database: Database
    settle_retry_seconds: float
    _tasks: set[asyncio.Task[Answer]] = field(default_factory=set)

    async def run_to_end(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Waits for `work`; if the waiter is cancelled, the work goes on."""
        task = asyncio.create_task(work, context=context_of_use_case())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Waits for all that has begun."""
        while self._tasks:
            _log.info("waiting for %d requests to end", len(self._tasks))
            await asyncio.wait(self._tasks)

    async def book(self, settle: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer | None:
        """Runs `settle` until it is committed; None where it could not be.

        Nothing is raised: the gateway has acted, and an error would invite the caller to pay again.
        """
        try:
            try:
                return await settle()
            except Unavailable:
                return await self._book_again(settle)
        except Unavailable as error:
            _log.error("what the gateway answered could not be booked: %s", error)
            return None
        except Exception:
            _log.exception("what the gateway answered could not be booked")
            return None

    async def _book_again(self, settle: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_delay(self.settle_retry_seconds),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            reraise=True,
        )

        async def run() -> Answer:
            return await settle()

        return await retrying(run)

    async def finish_for_another(self, finish: Finish) -> Answer | None:
        """Finishes a key that its first request has left; the answer it holds now, a replay for this request.

        None where the first request has released the key in the meantime, or another has claimed it anew.
        """
        stored = await self.database.transaction(lambda connection: idempotency.finish(connection, [finish]))
        answer = stored.get(finish.key_id)
        return answer and replace(answer, replayed=True)

    async def mark_unknown(self, key_id: int | None) -> Answer | None:
        """Lets replays of the key answer 202; if that fails, they answer "in flight", which is no less true. Returns
        the key's answer where somebody has found the outcome out meanwhile."""
        if key_id is None:
            return None
        try:
            await idempotency.mark_unknown(self.database, key_id)
            return await idempotency.read_answer(self.database, key_id)
        except Unavailable as error:
            _log.warning("idempotency key %d stays in flight: %s", key_id, error)
            return None
        except Exception:  # the gateway was asked: the caller is told 202 whatever happens here
            _log.exception("idempotency key %d stays in flight", key_id)
            return None
