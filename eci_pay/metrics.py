"""What is measured of this process and of the books, for Prometheus to scrape.

A scrape reads what it tells at that moment: nothing is counted on the path of a request for its sake.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from eci_pay.errors import Unavailable
from eci_pay.service import PaymentService

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class _Measured:
    """A scrape's metrics, as prometheus_client wants to collect them."""

    metrics: Iterable[Metric]

    def collect(self) -> Iterator[Metric]:
        """Each of them."""
        yield from self.metrics


async def exposition(service: PaymentService) -> bytes:
    """The metrics as text; while the database is away, those of this process alone."""
    metrics: list[Metric] = [_refused_events(service)]
    with suppress(Unavailable):
        metrics += await _recovery(service)
    return generate_latest(_Measured(metrics))


def _refused_events(service: PaymentService) -> Metric:
    return CounterMetricFamily(
        "eci_pay_gateway_events_refused",
        "Events that were not signed by the gateway, or too long ago, since the process began",
        value=service.gateway_events.refused,
    )


async def _recovery(service: PaymentService) -> list[Metric]:
    summary = await service.recovery.summary()
    unsettled = GaugeMetricFamily(
        "eci_pay_recovery_unsettled",
        "Charges and refunds whose outcome is to be found out or put right",
        labels=["state"],
    )
    unsettled.add_metric(["open"], summary.open)
    unsettled.add_metric(["late"], summary.late)
    return [
        unsettled,
        GaugeMetricFamily(
            "eci_pay_recovery_overdue", "Those of them that are older than the alert limit", value=summary.overdue
        ),
        GaugeMetricFamily(
            "eci_pay_recovery_oldest_seconds",
            "How long the oldest of them has been unknown",
            value=summary.oldest_seconds,
        ),
    ]
