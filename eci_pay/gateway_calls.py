"""How the gateway is asked: in time or not at all, by so many requests at once and no more, and not while it is down.

Silence is never taken for a refusal: what was sent and not answered is `Unknown`. Whoever wants to move money takes a
place first, before anything is recorded; where there is none, because the gateway is down or busy, the caller is
refused at once or after a short wait, and nothing piles up.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from time import perf_counter
from types import TracebackType
from typing import TypeVar, assert_never

from eci_pay.breaker import Breaker
from eci_pay.errors import Unavailable
from eci_pay.gateways import (
    Approved,
    Declined,
    Gateway,
    GatewayCharge,
    GatewayEvent,
    GatewayRefund,
    GatewayUnavailable,
    NotFound,
    Outcome,
    Unknown,
)
from eci_pay.instruments import gateway_answered
from eci_pay.settings import Settings

LOOKS_AT_ONCE_MAX = 8
"""How many requests of recovery one process has under way at the gateway, beside those that have a place."""
REFERENCE_LENGTH_MAX = 50
DECLINE_CODE_LENGTH_MAX = 50
MESSAGE_LENGTH_MAX = 400
OUT_OF_ORDER = "the gateway is out of order; nothing was sent"

Answered = TypeVar("Answered", Outcome, Outcome | NotFound)
Told = TypeVar("Told", Approved | Declined, Outcome, Outcome | NotFound)

_OUTCOMES = {Approved: "approved", Declined: "declined", Unknown: "unknown", NotFound: "not_found"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """`send_deadline_seconds` is how long after it took its place a request may still be sent: recovery takes an
    operation for never sent after a grace period of more than twice that. `timeout_seconds` bounds the wait for an
    answer, `places` the requests that are under way, `queue_max` those that wait for a place, for at most
    `wait_seconds`."""

    send_deadline_seconds: float
    timeout_seconds: float
    places: int
    queue_max: int
    wait_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """As the settings say."""
        return cls(
            send_deadline_seconds=settings.eci_pay_send_deadline_seconds,
            timeout_seconds=settings.eci_pay_gateway_timeout_seconds,
            places=settings.eci_pay_gateway_concurrency,
            queue_max=settings.eci_pay_gateway_queue_max,
            wait_seconds=settings.eci_pay_gateway_wait_seconds,
        )


class Place:
    """One of the requests that may be under way; it is left at the end of its `with` block, answered or not.

    It keeps the time by two clocks: the one that recovery's instants come from, which somebody may set back, and the
    machine's own, which stands still while the machine sleeps. Either is enough to be too late.
    """

    __slots__ = ("_clock", "_leave", "_started", "_started_monotonic")

    def __init__(self, clock: Callable[[], datetime], leave: Callable[[], None]) -> None:
        self._clock = clock
        self._leave = leave
        self._started = clock()
        self._started_monotonic = time.monotonic()

    @property
    def age(self) -> timedelta:
        """How long ago it was taken."""
        return max(self._clock() - self._started, timedelta(seconds=time.monotonic() - self._started_monotonic))

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()


class GatewayCalls:
    """The gateway of one process, with its limits and its circuit breaker."""

    def __init__(self, gateway: Gateway, limits: Limits, clock: Callable[[], datetime]) -> None:
        self._gateway = gateway
        self._limits = limits
        self._clock = clock
        self._places = asyncio.Semaphore(limits.places)
        self._looks = asyncio.Semaphore(LOOKS_AT_ONCE_MAX)
        self._waiting = 0
        self._breaker = Breaker()
        self._probe: object | None = None
        """The request that tries whether the gateway is back."""

    def fault(self, charge: GatewayCharge) -> tuple[str, str] | None:
        """What this gateway can never charge: the field at fault, and why."""
        return self._gateway.fault(charge)

    async def place(self) -> Place:
        """Takes a place; raises Unavailable where the gateway is down, or there is none in time."""
        probe = self._admit()
        try:
            await self._wait_for_place()
        except BaseException:
            self._end_probe(probe)
            raise
        if probe is None and not self._breaker.is_closed:  # it has opened while we waited
            self._places.release()
            raise Unavailable(OUT_OF_ORDER)
        return Place(self._clock, lambda: self._leave(probe))

    async def charge(self, charge: GatewayCharge, place: Place) -> Outcome:
        """Takes the money. Raises Unavailable where it is certain that nothing was sent."""
        return await self._move("charge", lambda: self._gateway.charge(charge), charge.key, place)

    async def refund(self, refund: GatewayRefund, place: Place) -> Outcome:
        """Gives money back. Raises Unavailable where it is certain that nothing was sent."""
        return await self._move("refund", lambda: self._gateway.refund(refund), refund.key, place)

    async def look_up(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """What the gateway says of an earlier operation; Unknown where it cannot be reached."""
        return await self._unhurried("lookup", lambda: self._gateway.lookup(operation))

    async def rule_out(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Keeps the gateway from acting on a key that it has not heard of, where it can: NotFound says that it has not
        acted, and where it can be kept from it, never will. Unknown where it cannot be reached."""
        return await self._unhurried("rule_out", lambda: self._gateway.rule_out(operation))

    async def give_back(self, refund: GatewayRefund) -> Outcome:
        """A refund of recovery's own; Unknown where it cannot be reached, for it is asked for again under its key."""
        return await self._unhurried("refund", lambda: self._gateway.refund(refund))

    def read_event(self, body: bytes, signature: str | None) -> GatewayEvent | None:
        """What the gateway has sent to our address: None where that settles nothing; raises EventRefused."""
        event = self._gateway.read_event(body, signature)
        return event and replace(event, outcome=_fitted(event.outcome))

    async def close(self) -> None:
        """Lets go of the gateway's connections."""
        await self._gateway.close()

    def _admit(self) -> object | None:
        """Refuses while the gateway is down; what it returns then is the request that tries whether it is back."""
        if self._breaker.is_closed:
            return None
        if self._probe is not None or self._breaker.wait_seconds > 0:
            raise Unavailable(OUT_OF_ORDER)
        self._probe = object()
        return self._probe

    async def _wait_for_place(self) -> None:
        if not self._places.locked():
            await self._places.acquire()  # at once: nobody is before us
            return
        if self._waiting >= self._limits.queue_max:
            raise Unavailable("too many requests wait for the gateway; nothing was sent")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.wait_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise Unavailable("the gateway is busy; nothing was sent") from None
        finally:
            self._waiting -= 1

    def _leave(self, probe: object | None) -> None:
        self._places.release()
        self._end_probe(probe)

    def _end_probe(self, probe: object | None) -> None:
        if probe is not None and self._probe is probe:
            self._probe = None

    async def _move(self, operation: str, send: Callable[[], Awaitable[Outcome]], key: str, place: Place) -> Outcome:
        if place.age > timedelta(seconds=self._limits.send_deadline_seconds):
            raise Unavailable("it took too long to reach the gateway; nothing was sent")
        try:
            outcome = await self._measured(operation, send)
        except GatewayUnavailable as error:
            self._failed(key, str(error))
            raise Unavailable(f"the gateway cannot be reached; nothing was sent: {error}") from error
        if isinstance(outcome, Unknown) and not outcome.answered:
            self._failed(key, outcome.message)
        else:
            self._succeeded()
        return outcome

    def _succeeded(self) -> None:
        self._probe = None  # whoever it was, the next outage is another
        if (seconds := self._breaker.succeed()) is not None:
            _log.warning("the gateway works again after %.0f s", seconds)

    def _failed(self, key: str, why: str) -> None:
        payment = key.rpartition("-")[0]  # each retry has a key of its own, and one payment is no outage
        if self._breaker.fail(payment):
            _log.error("the gateway is out of order: requests are refused before they begin: %s", why)

    async def _unhurried(self, operation: str, ask: Callable[[], Awaitable[Answered]]) -> Answered:
        async with self._looks:
            try:
                return await self._measured(operation, ask)
            except GatewayUnavailable as error:
                return Unknown(message=f"The gateway cannot be reached: {error}"[:MESSAGE_LENGTH_MAX])

    async def _measured(self, operation: str, ask: Callable[[], Awaitable[Answered]]) -> Answered:
        started, outcome = perf_counter(), "unavailable"
        try:
            answer = await self._answer(ask)
            outcome = _OUTCOMES[type(answer)]
        finally:
            gateway_answered(operation, outcome, perf_counter() - started)
        return answer

    async def _answer(self, ask: Callable[[], Awaitable[Answered]]) -> Answered:
        """Passes on GatewayUnavailable alone."""
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                return _fitted(await ask())
        except TimeoutError:
            return Unknown(message="The gateway did not answer in time.")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # The adapter's own cancellation, not ours.
            return Unknown(message="The gateway's answer was not waited for.")
        except GatewayUnavailable:
            raise
        except Exception:  # whatever broke in the adapter, the request may have been sent
            _log.exception("the gateway's adapter failed")
            return Unknown(message="The gateway's answer could not be read.")


def _fitted(outcome: Told) -> Told:
    """A gateway's texts, cut to what the books hold: a long one must not stop the booking of the money."""
    match outcome:
        case Approved(reference=reference, message=message):
            return replace(
                outcome, reference=_text(reference, REFERENCE_LENGTH_MAX), message=_text(message, MESSAGE_LENGTH_MAX)
            )
        case Declined(code=code, message=message):
            return replace(
                outcome, code=_text(code, DECLINE_CODE_LENGTH_MAX), message=_text(message, MESSAGE_LENGTH_MAX)
            )
        case Unknown(message=message):
            return replace(outcome, message=_text(message, MESSAGE_LENGTH_MAX))
        case NotFound():
            return outcome
        case _:
            assert_never(outcome)


def _text(text: str, length_max: int) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:length_max]
