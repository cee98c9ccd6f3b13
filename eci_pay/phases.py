"""What charges and refunds do alike between begin and the caller's answer.

They ask the gateway in time or not at all, never mistake silence for a refusal, book what it answered however long
the database is away, and run to their end whoever stops waiting.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, assert_never

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from eci_pay import idempotency
from eci_pay.answers import Answer
from eci_pay.database import Database
from eci_pay.errors import Unavailable
from eci_pay.gateways import Approved, Declined, GatewayUnavailable, NotFound, Outcome, Unknown
from eci_pay.idempotency import Finish

GATEWAY_REFERENCE_LENGTH_MAX = 50
DECLINE_CODE_LENGTH_MAX = 50
GATEWAY_MESSAGE_LENGTH_MAX = 400

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """`send_deadline` is how long after its begin a request may still be sent: recovery takes an operation for never
    sent after a grace period of more than twice that. `gateway_timeout_seconds` bounds the wait for an answer,
    `settle_retry_seconds` its booking."""

    database: Database
    clock: Callable[[], datetime]
    send_deadline: timedelta
    gateway_timeout_seconds: float
    settle_retry_seconds: float
    _tasks: set[asyncio.Task[Answer]] = field(default_factory=set)

    async def run_to_end(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Waits for `work`; if the waiter is cancelled, the work goes on."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Waits for all that has begun."""
        while self._tasks:
            _log.info("waiting for %d requests to end", len(self._tasks))
            await asyncio.wait(self._tasks)

    async def ask(self, send: Callable[[], Awaitable[Outcome]], *, begun_at: datetime) -> Outcome:
        """The gateway's answer. Raises Unavailable where it is certain that nothing was sent."""
        if self.clock() - begun_at > self.send_deadline:
            raise Unavailable("it took too long to reach the gateway; nothing was sent")
        try:
            async with asyncio.timeout(self.gateway_timeout_seconds):
                return _fitted(await send())
        except TimeoutError:
            return Unknown(message="The gateway did not answer in time.")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # The adapter's own cancellation, not ours.
            return Unknown(message="The gateway's answer was not waited for.")
        except GatewayUnavailable as error:
            raise Unavailable(f"the gateway cannot be reached; nothing was sent: {error}") from error
        except Exception:  # whatever broke in the adapter, the request may have been sent
            _log.exception("the gateway's adapter failed")
            return Unknown(message="The gateway's answer could not be read.")

    async def look_up(self, ask: Callable[[], Awaitable[Outcome | NotFound]]) -> Outcome | NotFound:
        """What the gateway says of an earlier operation; Unknown where it cannot be reached."""
        try:
            async with asyncio.timeout(self.gateway_timeout_seconds):
                outcome = await ask()
        except TimeoutError:
            return Unknown(message="The gateway did not answer in time.")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            return Unknown(message="The gateway's answer was not waited for.")
        except GatewayUnavailable as error:
            return Unknown(message=f"The gateway cannot be reached: {error}")
        except Exception:  # whatever broke in the adapter, another look may work
            _log.exception("the gateway's adapter failed")
            return Unknown(message="The gateway's answer could not be read.")
        return outcome if isinstance(outcome, NotFound) else _fitted(outcome)

    async def book(self, settle: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer | None:
        """Runs `settle` until it is committed; None where it could not be.

        Nothing is raised: the gateway has acted, and an error would invite the caller to pay again.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_delay(self.settle_retry_seconds),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            reraise=True,
        )

        async def run() -> Answer:
            return await settle()

        try:
            return await retrying(run)
        except Exception:
            _log.exception("what the gateway answered could not be booked")
            return None

    async def finish_for_another(self, finish: Finish) -> Answer | None:
        """Finishes a key that its first request has left; the answer it holds now, a replay for this request.

        None where the first request has released the key in the meantime, or another has claimed it anew.
        """
        stored = await self.database.transaction(lambda connection: idempotency.finish(connection, [finish]))
        answer = stored.get(finish.key_id)
        return answer and replace(answer, replayed=True)

    async def mark_unknown(self, key_id: int | None) -> None:
        """Lets replays of the key answer 202. If that fails, they answer "in flight", which is no less true."""
        if key_id is None:
            return
        try:
            await idempotency.mark_unknown(self.database, key_id)
        except Exception:  # the gateway was asked: the caller is told 202 whatever happens here
            _log.exception("idempotency key %d stays in flight", key_id)


def _fitted(outcome: Outcome) -> Outcome:
    """A gateway's texts, cut to what the books hold: a long one must not stop the booking of the money."""
    match outcome:
        case Approved(reference=reference, message=message):
            return replace(
                outcome,
                reference=_text(reference, GATEWAY_REFERENCE_LENGTH_MAX),
                message=_text(message, GATEWAY_MESSAGE_LENGTH_MAX),
            )
        case Declined(code=code, message=message):
            return replace(
                outcome,
                code=_text(code, DECLINE_CODE_LENGTH_MAX),
                message=_text(message, GATEWAY_MESSAGE_LENGTH_MAX),
            )
        case Unknown():
            return outcome
        case _:
            assert_never(outcome)


def _text(text: str, length_max: int) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:length_max]
