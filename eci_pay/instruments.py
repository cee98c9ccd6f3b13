"""What a process measures of itself, for `metrics.py` to tell: nothing, until a server asks for it.

With several workers each is a process of its own, and a scrape reaches one of them: prometheus_client keeps their
figures in files of a common directory then, which `server/run.py` names in the environment before any of them starts.
prometheus_client takes as long to import as all else that a command at the terminal does.
"""

from functools import lru_cache
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


class _Instruments:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "eci_pay_http_request_duration_seconds",
            "How long requests took, from their first byte to the last one of the answer",
            ["method", "route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.gateway_seconds = Histogram(
            "eci_pay_gateway_request_duration_seconds",
            "How long the gateway took to answer, and what",
            ["operation", "outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        # From nothing on, else Prometheus would not see the first ones increase.
        for operation, outcome in product(("charge", "refund"), ("approved", "declined", "unknown", "unavailable")):
            self.gateway_seconds.labels(operation, outcome)
        self.batch_rows = Histogram(
            "eci_pay_group_commit_batch_rows",
            "How many rows shared a statement and a commit",
            ["kind"],
            buckets=_ROWS,
            registry=registry,
        )
        self.waiting_rows = Gauge(
            "eci_pay_group_commit_waiting_rows",
            "Rows that wait for a batch",
            ["kind"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.replays = Counter(
            "eci_pay_idempotent_replays",
            "Requests that were told the recorded answer of their key",
            registry=registry,
        )
        self.refused_events = Counter(
            "eci_pay_gateway_events_refused",
            "Events that were not signed by the gateway, or too long ago",
            registry=registry,
        )
        self.connections = Gauge(
            "eci_pay_database_connections",
            "Connections of the pool, by what they do",
            ["state"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.connections_waited_for = Gauge(
            "eci_pay_database_connections_waited_for",
            "Requests that wait for a connection",
            multiprocess_mode="livesum",
            registry=registry,
        )
        build_info = Gauge(
            "eci_pay_build_info",
            "1, and which release this is",
            ["version"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        build_info.labels(version("eci-pay")).set(1)


_instruments: _Instruments | None = None


def start_measuring() -> "CollectorRegistry":
    """From now on this process measures; returns what it measures with."""
    global _instruments  # noqa: PLW0603 - a process has one set, as it has one set of loggers
    if _instruments is None:
        _instruments = _Instruments()
    return _instruments.registry


@lru_cache(1024)
def _labelled(histogram: "Histogram", *labels: str | int) -> "Histogram":
    """prometheus_client makes texts of them each time, under a lock."""
    return histogram.labels(*labels)


def request_answered(method: str, route: str, status: int, seconds: float) -> None:
    """An HTTP request has ended."""
    if _instruments:
        _labelled(_instruments.request_seconds, method, route, status).observe(seconds)


def gateway_answered(operation: str, outcome: str, seconds: float) -> None:
    """The gateway has answered, or has not."""
    if _instruments:
        _labelled(_instruments.gateway_seconds, operation, outcome).observe(seconds)


def batch_begun(kind: str, rows: int) -> None:
    """So many rows share a statement."""
    if _instruments:
        _labelled(_instruments.batch_rows, kind).observe(rows)


def rows_waiting(kind: str, rows: int) -> None:
    """So many rows wait for a batch now."""
    if _instruments:
        _instruments.waiting_rows.labels(kind).set(rows)


def replayed() -> None:
    """A request was told the recorded answer of its key."""
    if _instruments:
        _instruments.replays.inc()


def event_refused() -> None:
    """An event was not the gateway's."""
    if _instruments:
        _instruments.refused_events.inc()


def connections_now(*, idle: int, busy: int, waited_for: int) -> None:
    """What the pool's connections do now."""
    if _instruments:
        _instruments.connections.labels("idle").set(idle)
        _instruments.connections.labels("busy").set(busy)
        _instruments.connections_waited_for.set(waited_for)
