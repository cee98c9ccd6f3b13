"""What a process measures of itself, for `metrics.py` to tell.

With several workers each is a process of its own, and a scrape reaches one of them: prometheus_client keeps their
figures in files of a common directory then, which `server/run.py` names in the environment before any of them starts.
"""

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)

request_seconds = Histogram(
    "eci_pay_http_request_duration_seconds",
    "How long requests took, from their first byte to the last one of the answer",
    ["method", "route", "status"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
gateway_seconds = Histogram(
    "eci_pay_gateway_request_duration_seconds",
    "How long the gateway took to answer, and what",
    ["operation", "outcome"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
batch_rows = Histogram(
    "eci_pay_group_commit_batch_rows",
    "How many rows shared a statement and a commit",
    ["kind"],
    buckets=_ROWS,
    registry=REGISTRY,
)
batch_waiting = Gauge(
    "eci_pay_group_commit_waiting_rows",
    "Rows that wait for a batch",
    ["kind"],
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
replays = Counter(
    "eci_pay_idempotent_replays",
    "Requests that were told the recorded answer of their key",
    registry=REGISTRY,
)
refused_events = Counter(
    "eci_pay_gateway_events_refused",
    "Events that were not signed by the gateway, or too long ago",
    registry=REGISTRY,
)
connections = Gauge(
    "eci_pay_database_connections",
    "Connections of the pool, by what they do",
    ["state"],
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
connections_waited_for = Gauge(
    "eci_pay_database_connections_waited_for",
    "Requests that wait for a connection",
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
build_info = Gauge(
    "eci_pay_build_info",
    "1, and which release this is",
    ["version"],
    multiprocess_mode="livemax",
    registry=REGISTRY,
)
build_info.labels(version("eci-pay")).set(1)
