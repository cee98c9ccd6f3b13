"""A lane of the relay: leases the messages of one destination, sends a few at a time, and books what came of them.

All but the sending is done for many messages at once. A message whose delivery fails is due again later; meanwhile
its line waits, and no other does. What a killed relay had leased is due again when the leases end: so every message
is delivered at least once, and may be delivered twice.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from eci_pay.breaker import Breaker
from eci_pay.context import begin_subject, continue_origin
from eci_pay.errors import Unavailable
from eci_pay.failure_digest import FailureDigest
from eci_pay.outbox import Delivery, LeasedMessage, Marked, Outbox, Outcome
from eci_pay.pace import Pace
from eci_pay.peers import Peer, Try
from eci_pay.settings import Settings

LEASED_PER_REQUEST_MAX = 8
"""How many messages are leased for each request that may be under way: enough to keep the sending busy."""
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 2.0
"""Between the tries of one delivery."""
DELAY_JITTER = 0.2
"""By which part the distance between deliveries of a message varies."""
BOOK_GATHER_SECONDS = 0.1
"""How long ended deliveries are gathered before they are booked together, and the next messages leased: each time costs
two commits, which the charges wait for too. What is worth leasing anew is booked at once."""
BOOK_SECONDS_AT_END_MAX = 10.0
"""How long a lane that stops tries to book what it has delivered; else that is delivered again."""
PROBES = 10
"""How many messages find out whether a peer that was down is back: half of them the longest due, half the newest, for
those that have waited longest may be the very ones that it cannot take."""
LEASE_MARGIN_SECONDS = 1.0
"""How much longer than its timeout a try may take: timeouts of more than 5 s are rounded up by aiohttp."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What a lane has booked. A message that failed is pending and will be delivered again."""

    delivered: int = 0
    failed: int = 0
    dead: int = 0


class Lane:
    """The deliveries of this process to one destination."""

    def __init__(self, outbox: Outbox, peer: Peer, settings: Settings) -> None:
        self.tally = Tally()
        self._outbox = outbox
        self._peer = peer
        self._poll_seconds = settings.eci_pay_relay_poll_seconds
        self._retry_seconds = settings.eci_pay_relay_retry_seconds
        self._retry_max_seconds = settings.eci_pay_relay_retry_max_seconds
        self._try_seconds = settings.eci_pay_relay_timeout_seconds
        # Each try may take that long, and each but the first is waited for at most as long.
        self._delivery_max_seconds = (2 * peer.endpoint.tries_max - 1) * self._try_seconds
        self._lease_seconds = self._delivery_max_seconds + 3 * self._try_seconds + LEASE_MARGIN_SECONDS
        self._leased_max = LEASED_PER_REQUEST_MAX * settings.eci_pay_relay_concurrency
        self._worth_leasing = self._leased_max // 2
        self._slots = asyncio.Semaphore(settings.eci_pay_relay_concurrency)
        self._breaker = Breaker()
        self._pace = Pace(per_second=settings.eci_pay_relay_messages_per_second_max, burst=self._leased_max)
        self._digest = FailureDigest(peer.destination)
        self._stopped = asyncio.Event()
        self._wake = asyncio.Event()
        self._leased = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._ended: list[Delivery] = []
        """And not booked yet."""
        self._any_ended = asyncio.Event()
        self._many_ended = asyncio.Event()
        self._all_ended = False
        self._drains = False
        self._started = 0.0
        self._not_booked: Exception | None = None

    def stop(self) -> None:
        """Lets `run` end soon: no new try is begun."""
        self._stopped.set()
        self._wake.set()
        self._many_ended.set()

    async def run(self, *, until_empty: bool = False) -> None:
        """Delivers until it is stopped or, if so wanted, until nothing is due that could be delivered now.

        Where the database is away, it waits for it; with `until_empty` it raises Unavailable.
        """
        self._drains = until_empty
        self._started = time.monotonic()
        booking = asyncio.create_task(self._book_all())
        try:
            while not self._stopped.is_set():
                self._wake.clear()
                self._digest.tell()
                wanted = self._wanted()
                claimed = await self._claim(wanted) if wanted else 0
                if self._drains and not self._leased and (wanted or not self._breaker.is_closed):
                    break
                if claimed < wanted or not wanted:
                    await self._wait(self._wait_seconds(wanted))
        finally:
            self.stop()
            if self._sending:
                await asyncio.wait(self._sending)
            self._all_ended = True
            self._any_ended.set()
            await asyncio.wait({booking}, timeout=BOOK_SECONDS_AT_END_MAX)
            if not booking.done():
                _log.warning("deliveries to %s are not booked: they will be repeated", self._peer.destination)
                booking.cancel()
            self._digest.tell(at_once=True)
        if self._drains and self._not_booked:
            raise self._not_booked

    def _wanted(self) -> int:
        """How many messages to lease: as many as are worth it, or a few to see whether a peer is back."""
        if not self._breaker.is_closed:
            return 0 if self._leased or self._breaker.wait_seconds else PROBES
        wanted = min(self._leased_max - self._leased, self._pace.available())
        return wanted if wanted >= self._worth_leasing else 0

    def _wait_seconds(self, wanted: int) -> float | None:
        """How long until more may be worth leasing; None: until something under way has ended."""
        if self._leased and (self._drains or not self._breaker.is_closed):
            return None
        if wanted or not self._breaker.is_closed:
            return self._poll_seconds
        is_room = self._leased_max - self._leased >= self._worth_leasing
        return self._pace.wait_seconds(self._worth_leasing) if is_room else None

    async def _wait(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _claim(self, count_max: int) -> int:
        """Leases messages and starts to deliver them."""
        probe = not self._breaker.is_closed
        lease_ends = time.monotonic() + self._lease_seconds
        try:
            messages = await self._lease(count_max // 2 if probe else count_max)
            if probe:
                messages += await self._lease(count_max - count_max // 2, newest=True)
        except Exception as error:  # whatever it is, it must not end a lane that serves
            if self._drains:
                raise
            self._digest.database_failed(error)
            return 0
        self._digest.database_worked()
        self._leased += len(messages)
        self._pace.take(len(messages))
        for message in messages:
            task = asyncio.create_task(self._deliver(message, lease_ends, probe=probe))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(messages)

    async def _lease(self, count_max: int, *, newest: bool = False) -> list[LeasedMessage]:
        return await self._outbox.claim(
            self._peer.destination,
            count_max=count_max,
            lease_seconds=self._lease_seconds,
            # What fails while a lane drains may be due again before that has ended: once is enough.
            due_for_seconds=time.monotonic() - self._started if self._drains else 0.0,
            newest=newest,
        )

    async def _deliver(self, message: LeasedMessage, lease_ends: float, *, probe: bool) -> None:
        """Tries until it is delivered or refused, or not worth trying before its next delivery."""
        continue_origin(message.request_id, message.traceparent)
        begin_subject(payment_id=message.payment_id, order_id=message.order_id)
        tried: Try | None = None
        for number in range(self._peer.endpoint.tries_max):
            if number:
                assert tried is not None
                await self._sleep(max(_backoff(number), tried.retry_after_seconds))
            async with self._slots:
                if not self._may_try(lease_ends, first=tried is None, probe=probe):
                    break
                tried = await self._try(message)
            if tried.outcome is not Outcome.FAILED or tried.retry_after_seconds > self._try_seconds:
                break
        self._ended.append(self._delivery(message, tried))
        self._any_ended.set()
        if len(self._ended) >= (self._leased if self._drains else self._worth_leasing):
            self._many_ended.set()

    def _may_try(self, lease_ends: float, *, first: bool, probe: bool) -> bool:
        """Whether a try may begin: the lease outlasts it, and the peer is not known to be down."""
        needed_seconds = self._delivery_max_seconds if first else self._try_seconds
        if self._stopped.is_set() or time.monotonic() + needed_seconds + LEASE_MARGIN_SECONDS > lease_ends:
            return False
        return self._breaker.is_closed or (probe and first)

    async def _try(self, message: LeasedMessage) -> Try:
        """Sends a message, and learns from the answer whether the peer is up."""
        try:
            tried = await self._peer.send(message)
        except Exception:  # a defect of ours: the message must not keep its line waiting without a trace
            _log.exception("message %d could not be sent", message.message_id)
            tried = Try(outcome=Outcome.FAILED, error="it could not be sent: see the log")
        if tried.outcome is not Outcome.FAILED:
            open_seconds = self._breaker.succeed()
            if open_seconds is not None:
                _log.info("%s answers again, after %.0f s", self._peer.destination, open_seconds)
        elif self._breaker.fail(message.message_id, retry_after_seconds=tried.retry_after_seconds):
            _log.warning("%s is taken for down, its messages wait: %s", self._peer.destination, tried.error)
        return tried

    async def _sleep(self, seconds: float) -> None:
        """Between two tries; a lane that stops does not wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    def _delivery(self, message: LeasedMessage, tried: Try | None) -> Delivery:
        if tried is None:
            return Delivery(message=message, outcome=Outcome.RELEASED)
        distance = min(self._retry_seconds * 2.0 ** min(message.attempts, 50), self._retry_max_seconds)
        distance *= random.uniform(1 - DELAY_JITTER, 1)  # noqa: S311 - spreads, hides nothing
        return Delivery(
            message=message,
            outcome=tried.outcome,
            error=tried.error,
            delay_seconds=max(distance, tried.retry_after_seconds),
        )

    async def _book_all(self) -> None:
        """Books deliveries as they end, many at a time, until the lane's end."""
        while self._ended or not self._all_ended:
            await self._any_ended.wait()
            if not self._stopped.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(BOOK_GATHER_SECONDS):
                        await self._many_ended.wait()
            deliveries, self._ended = self._ended, []
            self._any_ended.clear()
            self._many_ended.clear()
            if deliveries:
                await self._book(deliveries)

    async def _book(self, deliveries: Sequence[Delivery]) -> None:
        def gives_up(state: RetryCallState) -> bool:
            ends = self._stopped.is_set() or self._drains
            return ends and (state.seconds_since_start or 0.0) >= BOOK_SECONDS_AT_END_MAX

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=gives_up,
            wait=wait_random_exponential(multiplier=0.05, max=1),
            reraise=True,
        )
        try:
            booked: list[Marked] = await retrying(self._outbox.mark, deliveries)
            for marked in booked:
                self.tally.delivered += marked.delivered
                self.tally.dead += marked.dead
                self.tally.failed += marked.failed
                self._digest.add(marked)
        except Exception as error:  # their leases end: what has arrived is delivered once more
            _log.exception("%d deliveries to %s could not be booked", len(deliveries), self._peer.destination)
            self._not_booked = error
            if self._drains:
                self.stop()
        finally:
            self._leased -= len(deliveries)
            self._wake.set()


def _backoff(failures: int) -> float:
    """Anything up to a bound that doubles with each failure. By hand: tenacity costs each message as much as its
    request."""
    bound = min(BACKOFF_FIRST_SECONDS * 2.0 ** (failures - 1), BACKOFF_MAX_SECONDS)
    return random.uniform(0, bound)  # noqa: S311 - spreads, hides nothing
