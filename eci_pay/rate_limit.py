"""How many requests a second each caller may send to this process: a token bucket for each."""

import math
import time
from collections.abc import Callable

from eci_pay.errors import RateLimited

BURST_SECONDS = 2.0
"""So many seconds' worth of requests may come at once."""

ROUNDING = 1e-6
"""Of a token: whoever comes when told to must not miss it by the last bit of a float."""


class RateLimit:
    """Buckets by the caller's name: callers are known ones, so there are not many."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = max(1.0, per_second * BURST_SECONDS)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> None:
        """One more request. Raises RateLimited, which takes nothing, so that a caller who keeps on trying is served at
        the rate; 0 a second means that there is no limit."""
        if not self._per_second:
            return
        now = self._clock()
        tokens, at = self._buckets.get(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._per_second)
        if tokens < 1 - ROUNDING:
            self._buckets[caller] = (tokens, now)
            seconds = math.ceil((1 - tokens) / self._per_second)
            raise RateLimited(
                f"{caller} may send {self._per_second:g} requests a second; nothing was done",
                retry_after_seconds=seconds,
            )
        self._buckets[caller] = (tokens - 1, now)
