"""A circuit breaker: whoever is down is left in peace, and asked now and then whether it is back.

Written by hand because the libraries wrap single calls, while a relay asks how many messages are worth claiming.
"""

import random
import time
from collections.abc import Callable, Hashable

FAILURES_MAX = 10
"""How many different things must fail, with nothing succeeding in between. One thing that always fails is no outage."""
OPEN_SECONDS_FIRST = 1.0
OPEN_SECONDS_MAX = 30.0
JITTER = 0.2


class Breaker:
    """Closed: everything may be tried. Open: nothing. After a while probes may be, and one success closes it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: set[Hashable] = set()
        self._open_until: float | None = None
        self._open_seconds = OPEN_SECONDS_FIRST
        self._opened_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether everything may be tried."""
        return self._open_until is None

    @property
    def wait_seconds(self) -> float:
        """How long nothing may be tried: 0 where it is closed, or time for a probe."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def succeed(self) -> float | None:
        """Something worked: closes. Returns for how many seconds it was open, None where it was not."""
        was_open = None if self._open_until is None else self._clock() - self._opened_at
        self._failed.clear()
        self._open_until = None
        self._open_seconds = OPEN_SECONDS_FIRST
        return was_open

    def fail(self, what: Hashable, *, retry_after_seconds: float = 0.0) -> bool:
        """Something failed; returns whether that opened it. Open, it stays so for longer each time, and at least as
        long as the other side has asked for, but never longer than `OPEN_SECONDS_MAX`."""
        now = self._clock()
        self._failed.add(what)
        if self._open_until is None:
            if len(self._failed) < FAILURES_MAX:
                return False
            self._opened_at = now
            self._open_for(now, retry_after_seconds)
            return True
        if now >= self._open_until:  # a probe; what was under way before says nothing new
            self._open_seconds = min(2 * self._open_seconds, OPEN_SECONDS_MAX)
            self._open_for(now, retry_after_seconds)
        return False

    def _open_for(self, now: float, retry_after_seconds: float) -> None:
        seconds = max(self._open_seconds, min(retry_after_seconds, OPEN_SECONDS_MAX))
        self._open_until = now + seconds * random.uniform(1, 1 + JITTER)  # noqa: S311 - spreads, hides nothing
