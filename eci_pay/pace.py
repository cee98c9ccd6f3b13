"""A pace that is not exceeded: so many a second on average, a burst of so many at once (a token bucket)."""

import time
from collections.abc import Callable


class Pace:
    """Tells how many of something may be begun now."""

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left = float(burst)
        self._seen_at = clock()

    def available(self) -> int:
        """How many may be begun now, at most a burst."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen_at) * self._per_second)
        self._seen_at = now
        return int(self._left)

    def take(self, count: int) -> None:
        """So many were begun."""
        self._left -= count

    def wait_seconds(self, count: int) -> float:
        """How long it takes until so many may be begun; 0 if they may be now."""
        return max(0.0, (count - self.available()) / self._per_second)
