"""What a server does beside its requests: it delivers messages and deletes what is past its time.

Safe in any number of replicas, and never on the path of a request.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

from eci_pay.errors import Unavailable
from eci_pay.idempotency import EXPIRE_BATCH_SIZE_MAX
from eci_pay.outbox import PURGE_BATCH_SIZE_MAX
from eci_pay.service import PaymentService
from eci_pay.settings import Settings

TOTALS_INTERVAL_SECONDS = 5.0
"""How often changes of the totals are added up."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def background_tasks(
    settings: Settings, service: PaymentService, *, relays: bool = False, recovers: bool = False
) -> AsyncIterator[None]:
    """Runs them until the block ends; with `relays`, messages are delivered too, with `recovers`, unknown outcomes
    are looked up.

    They are stopped by an event: on Python 3.11 a cancellation may be lost while a connection is waited for.
    """
    stopped = asyncio.Event()
    tasks = [
        asyncio.create_task(work)
        for work in (
            _warn(service),
            _delete_until(
                stopped,
                "expired idempotency keys",
                service.keys.delete_batch,
                batch_size_max=EXPIRE_BATCH_SIZE_MAX,
                interval_seconds=settings.eci_pay_expire_keys_interval_seconds,
            ),
            _delete_until(
                stopped,
                "delivered messages",
                service.outbox.purge_batch,
                batch_size_max=PURGE_BATCH_SIZE_MAX,
                interval_seconds=settings.eci_pay_outbox_purge_interval_seconds,
            ),
        )
    ]
    tasks.append(asyncio.create_task(_add_up_until(stopped, service)))
    if recovers:
        interval_seconds = settings.eci_pay_recovery_interval_seconds
        tasks.append(asyncio.create_task(service.recovery.run_until(stopped, interval_seconds=interval_seconds)))
    if relays:
        tasks.append(asyncio.create_task(_relay_until(stopped, settings, service)))
    async with service.totals.counting_errors():
        try:
            yield
        finally:
            stopped.set()
            await asyncio.gather(*tasks)


async def _warn(service: PaymentService) -> None:
    try:
        await service.warn_of_untold()
    except Exception as error:  # it is only a warning
        _log.info("not known whom others tell of payments: %s", error)


async def _delete_until(
    stopped: asyncio.Event,
    what: str,
    delete_batch: Callable[[], Awaitable[int]],
    *,
    batch_size_max: int,
    interval_seconds: float,
) -> None:
    """Deletes what is past its time now and then, a batch at a time."""
    while not stopped.is_set():
        deleted, started = 0, monotonic()
        try:
            deleted = await delete_batch()
        except Unavailable as error:
            _log.warning("%s stay for now: %s", what, error)
        except Exception:  # whatever it is, it must not end the task: the next round tries again
            _log.exception("%s stay for now", what)
        if deleted:
            _log.info("deleted %d %s", deleted, what)
        # After a full batch as in `deletion.delete_all`, for charges go on.
        pause_seconds = interval_seconds if deleted < batch_size_max else monotonic() - started
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_seconds):
                await stopped.wait()


async def _add_up_until(stopped: asyncio.Event, service: PaymentService) -> None:
    """Adds up the totals now and then, and at the end."""
    while True:
        ends = stopped.is_set()
        service.measure()
        try:
            await service.totals.add_up()
        except Unavailable as error:
            _log.info("totals are not added up for now: %s", error)
        except Exception:  # whatever it is, it must not end the task: the next round tries again
            _log.exception("totals are not added up for now")
        if ends:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(TOTALS_INTERVAL_SECONDS):
                await stopped.wait()


async def _relay_until(stopped: asyncio.Event, settings: Settings, service: PaymentService) -> None:
    from eci_pay.relay import connected_relay

    async with connected_relay(settings, service.outbox) as relay:
        await relay.run_until(stopped)
