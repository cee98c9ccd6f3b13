"""The outbox: messages that were committed with the changes they tell of, until they are delivered or dead.

The messages of one payment to one destination are a line. Only the first open message of a line is ever handed out,
and only to one relay at a time: it holds the message by a lease. All times are those of the database's clock.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from eci_pay.batches import settle
from eci_pay.database import Connection, Database, Row, fetch
from eci_pay.deletion import delete_all
from eci_pay.errors import MessageNotFound, Unavailable
from eci_pay.messages import Destination
from eci_pay.views import MessagePage, MessageView, OutboxStats, PaymentMessages

PURGE_BATCH_SIZE_MAX = 1000
RETRY_BATCH_SIZE_MAX = 1000
MESSAGES_OF_PAYMENT_MAX = 50
COUNTED_AT_ONCE_MAX = 20_000
"""Up to so many messages are counted in about 20 ms; whoever asks for recent figures does not wait for more."""

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What came of a delivery."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    """For good: the message is dead."""
    FAILED = "failed"
    """For now: it is tried again later."""
    RELEASED = "released"
    """It was not tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeasedMessage:
    """A message that this process may deliver until its lease ends."""

    message_id: int
    payment_id: int
    order_id: int
    destination: Destination
    body: str
    attempts: int
    lease_id: uuid.UUID
    request_id: str | None
    traceparent: str | None
    due_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A delivery that has ended. `delay_seconds` is when a failed one is repeated."""

    message: LeasedMessage
    outcome: Outcome
    error: str | None = None
    delay_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """What was booked of a delivery; without an entry, its lease was lost."""

    message_id: int
    delivered: bool
    failed: bool
    dead: bool
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Retried:
    """What `retry` did with a message: requeued it, or why not."""

    message_id: int
    requeued: bool
    delivered: bool
    in_delivery: bool
    overtaken_by: int | None


class Outbox:
    """Every method raises Unavailable."""

    def __init__(self, database: Database, *, give_up_after: timedelta, retention: timedelta) -> None:
        self._database = database
        self._give_up_after = give_up_after
        self._retention = retention
        self._counting: asyncio.Task[tuple[OutboxStats, ...]] | None = None
        self._counted: tuple[OutboxStats, ...] = ()

    async def claim(
        self,
        destination: Destination,
        *,
        count_max: int,
        lease_seconds: float,
        due_for_seconds: float = 0.0,
        newest: bool = False,
    ) -> list[LeasedMessage]:
        """Leases messages that have been due for so long, the longest waiting first, or the newest."""
        wanted = {"destination": destination.value, "count_max": count_max, "due_for_seconds": due_for_seconds}

        async def work(connection: Connection) -> list[Row]:
            found = await fetch(connection, "outbox_candidates_newest" if newest else "outbox_candidates", wanted)
            if not found:
                return []
            lease = {
                "message_ids": [row["message_id"] for row in found],
                "due_at": [row["due_at"] for row in found],
                "lease_seconds": lease_seconds,
                "lease_id": uuid.uuid4(),
            }
            return await fetch(connection, "outbox_lease", lease)

        rows = await self._database.transaction(work)
        return [LeasedMessage(**{**row, "destination": Destination(row["destination"])}) for row in rows]

    async def mark(self, deliveries: Sequence[Delivery]) -> list[Marked]:
        """Books deliveries and ends their leases. Running it again is safe.

        One that the database rejects does not keep the others from being booked.
        """
        results = await settle(deliveries, self._mark)
        for delivery, result in zip(deliveries, results, strict=True):
            if isinstance(result, Unavailable):
                raise result
            if isinstance(result, Exception):
                told = {"payment_id": delivery.message.payment_id, "order_id": delivery.message.order_id}
                _log.error("message %d could not be booked", delivery.message.message_id, exc_info=result, extra=told)
        return [result for result in results if isinstance(result, Marked)]

    async def _mark(self, deliveries: Sequence[Delivery]) -> list[Marked | None]:
        params = {
            "message_id": [delivery.message.message_id for delivery in deliveries],
            "lease_id": [delivery.message.lease_id for delivery in deliveries],
            "outcome": [delivery.outcome.value for delivery in deliveries],
            "error": [delivery.error for delivery in deliveries],
            "delay_seconds": [float(delivery.delay_seconds) for delivery in deliveries],
            "due_at": [delivery.message.due_at for delivery in deliveries],
            "give_up_seconds": self._give_up_after.total_seconds(),
        }
        rows = await self._database.fetch("outbox_mark", params)
        marked = {row["message_id"]: Marked(**row) for row in rows}
        return [marked.get(delivery.message.message_id) for delivery in deliveries]

    async def purge_batch(self) -> int:
        """Deletes up to `PURGE_BATCH_SIZE_MAX` messages that were delivered before the retention; returns how many."""
        return await self._purge(self._retention, dead=False)

    async def purge(self, older_than: timedelta, *, dead: bool = False) -> int:
        """Deletes all messages delivered, or instead dead, for longer than that, in batches; returns how many."""
        return await delete_all(lambda: self._purge(older_than, dead=dead), PURGE_BATCH_SIZE_MAX)

    async def _purge(self, older_than: timedelta, *, dead: bool) -> int:
        params = {
            "older_than_seconds": older_than.total_seconds(),
            "dead": dead,
            "batch_size_max": PURGE_BATCH_SIZE_MAX,
        }
        rows = await self._database.fetch("outbox_purge", params)
        return int(rows[0]["deleted"])

    async def page(
        self, *, destinations: Sequence[Destination], pending: bool, dead: bool, after: int, count_max: int
    ) -> MessagePage:
        """Undelivered messages, oldest first, from the one after `after`."""
        params = {
            "destinations": [destination.value for destination in destinations],
            "pending": pending,
            "dead": dead,
            "after": after,
            "count_max": count_max + 1,
        }
        rows = await self._database.read("outbox_list", params)
        messages = tuple(MessageView.of_row(row) for row in rows[:count_max])
        return MessagePage(
            messages=messages,
            next_cursor=str(messages[-1].message_id) if len(rows) > count_max else None,
        )

    async def by_id(self, message_id: int | None) -> MessageView:
        """One message; raises MessageNotFound. None is the id of no message."""
        rows = [] if message_id is None else await self._database.read("outbox_by_id", {"message_id": message_id})
        if not rows:
            raise MessageNotFound(
                "there is no such message" if message_id is None else f"there is no message {message_id}"
            )
        return MessageView.of_row(rows[0])

    async def of_payment(self, payment_id: int) -> PaymentMessages:
        """The messages of one payment, oldest first: of more than `MESSAGES_OF_PAYMENT_MAX` the latest."""
        params = {"payment_id": payment_id, "count_max": MESSAGES_OF_PAYMENT_MAX}
        rows = await self._database.read("outbox_of_payment", params)
        return PaymentMessages(
            messages=tuple(MessageView.of_row(row) for row in reversed(rows)),
            messages_left_out=rows[0]["total"] - len(rows) if rows else 0,
        )

    async def stats(self) -> tuple[OutboxStats, ...]:
        """Counts and ages of each destination."""
        rows = await self._database.read("outbox_stats", {"destinations": [each.value for each in Destination]})
        return tuple(OutboxStats.model_validate(row) for row in rows)

    async def recent_stats(self) -> tuple[OutboxStats, ...]:
        """As `stats`; of a backlog that takes long to count, as it was when it was asked for last."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._count())
            # Nobody may be waiting for it.
            self._counting.add_done_callback(lambda counted: counted.cancelled() or counted.exception())
        counted = self._counted
        if sum(each.pending + each.dead for each in counted) <= COUNTED_AT_ONCE_MAX:
            return await asyncio.shield(self._counting)
        return counted

    async def _count(self) -> tuple[OutboxStats, ...]:
        try:
            self._counted = await self.stats()
        except Unavailable:
            self._counted = ()  # whoever asks next waits to be told so
            raise
        return self._counted

    async def lately_told(self) -> frozenset[Destination]:
        """Who was told of payments lately, by any process."""
        rows = await self._database.read("outbox_destinations")
        known = {destination.value for destination in Destination}  # a newer release may have more
        return frozenset(Destination(row["destination"]) for row in rows if row["destination"] in known)

    async def retry(
        self, message_ids: Sequence[int], *, overtaken: bool = False, note: str | None = None
    ) -> list[Retried]:
        """Makes undelivered messages due at once, as if they were new; those that do not exist are missing.

        A dead message whose line went on without it is requeued only where `overtaken` says so: it would tell its
        peer of a past that is over. A `note` is added to its last error: who has asked for it, and why.
        """
        ids = list(message_ids)

        async def work(connection: Connection) -> list[Row]:
            await fetch(connection, "outbox_lock_payments", {"message_ids": ids})
            await fetch(connection, "outbox_lock_lines", {"message_ids": ids})
            return await fetch(connection, "outbox_retry", {"message_ids": ids, "overtaken": overtaken, "note": note})

        return [Retried(**row) for row in await self._database.transaction(work)]

    async def retry_dead(
        self, destination: Destination, *, overtaken: bool = False, note: str | None = None
    ) -> list[Retried]:
        """As `retry`, for all dead messages of a destination, in batches."""
        results: list[Retried] = []
        after = 0
        while True:
            params = {"destination": destination.value, "after": after, "count_max": RETRY_BATCH_SIZE_MAX}
            ids = [row["message_id"] for row in await self._database.read("outbox_dead_ids", params)]
            if not ids:
                return results
            results += await self.retry(ids, overtaken=overtaken, note=note)
            after = ids[-1]
