"""Deleting much beside charges: in batches, and after each a pause as long as it took."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic


async def delete_all(
    delete_batch: Callable[[], Awaitable[int]], batch_size_max: int, on_progress: Callable[[int], None] = lambda _: None
) -> int:
    """Deletes batch after batch until one is not full; tells the running total after each, and at the end returns it.

    Without the pauses, the p99 of charges was up to five times as high meanwhile.
    """
    total = 0
    while True:
        started = monotonic()
        deleted = await delete_batch()
        total += deleted
        on_progress(total)
        if deleted < batch_size_max:
            return total
        await asyncio.sleep(monotonic() - started)
