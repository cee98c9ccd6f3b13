"""What is measured of this process and of the books, for Prometheus to scrape.

The books' figures come from the database at that moment: they are the same whichever process is asked. Eight of them
have the names that dashboards of the platform expect, which prometheus_client would not give them.
"""

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from eci_pay.errors import Unavailable
from eci_pay.instruments import start_measuring
from eci_pay.service import PaymentService
from eci_pay.totals import BookTotals, CurrencyTotal

CONTENT_TYPE = CONTENT_TYPE_LATEST
BOOKS_SECONDS_MAX = 5.0
"""How long a scrape waits for the figures of the books: Prometheus gives up after 10 s, and would then know nothing."""
READS_AT_ONCE_MAX = 3
"""How many scrapes of a process may read the books, those included that were not waited for."""

_reads: "set[asyncio.Task[list[Metric]]]" = set()


@dataclass(frozen=True, slots=True)
class _Measured:
    """A scrape's metrics, as prometheus_client wants to collect them."""

    metrics: Iterable[Metric]

    def collect(self) -> Iterator[Metric]:
        """Each of them."""
        yield from self.metrics


async def exposition(service: PaymentService) -> bytes:
    """The metrics as text; while the database is away or does not answer, those of the processes alone."""
    service.measure()
    metrics = await _read_in_time(service)
    return _of_processes() + generate_latest(_Measured(metrics))


async def _read_in_time(service: PaymentService) -> list[Metric]:
    """The figures of the books; none where they take too long. They are not broken off then, for that may take as long
    as they: they end by the limits of a statement."""
    if len(_reads) >= READS_AT_ONCE_MAX:
        return []
    reading = asyncio.create_task(_read(service))
    _reads.add(reading)
    reading.add_done_callback(_reads.discard)
    done, _ = await asyncio.wait({reading}, timeout=BOOKS_SECONDS_MAX)
    return reading.result() if done else []


async def _read(service: PaymentService) -> list[Metric]:
    with suppress(Unavailable):
        return [
            *_books(await service.totals.read()),
            *await _recovery(service),
            *await _outbox(service),
            await _keys(service),
        ]
    return []


def _of_processes() -> bytes:
    """What this process has measured, or all workers of its server."""
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None:
        return generate_latest(start_measuring())
    _forget_the_dead(Path(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _forget_the_dead(directory: Path) -> None:
    """What a worker that was killed did at its end is no more. What it has counted stays."""
    for file in directory.glob("gauge_live*_*.db"):
        if not _is_alive(int(file.stem.rpartition("_")[2])):
            file.unlink(missing_ok=True)


def _is_alive(process_id: int) -> bool:
    if sys.platform == "win32":  # there the question would end the process
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _books(totals: BookTotals) -> Iterator[Metric]:
    yield CounterMetricFamily("payments_created", "Payments that were recorded", value=totals.payments)
    yield CounterMetricFamily("payments_failed", "Attempts to pay that failed", value=totals.failed_attempts)
    yield UnknownMetricFamily(
        "total_amount_processed", "Sum of all completed payments, in major units", value=_sum(totals.completed)
    )
    yield UnknownMetricFamily(
        "total_refunds", "Sum of all completed refunds, in major units", value=_sum(totals.refunds)
    )
    refunds = sum(each.count for each in totals.refunds.values())
    yield CounterMetricFamily("refunds_processed", "Completed refunds", value=refunds)
    yield UnknownMetricFamily("payment_processing_errors", "Unexpected errors", value=totals.errors)
    yield _labelled("payments_by_status", "Payments now in each status", "status", totals.by_status)
    yield _labelled("payments_by_method", "Payments by method", "method", totals.by_method)
    for name, text, each in (
        ("completed", "Completed payments", totals.completed),
        ("refunded", "Completed refunds", totals.refunds),
    ):
        family = CounterMetricFamily(
            f"eci_pay_{name}_amount", f"{text} by currency, in major units", labels=["currency"]
        )
        for currency, total in sorted(each.items()):
            family.add_metric([currency], float(total.amount))
        yield family


def _sum(totals: Mapping[str, CurrencyTotal]) -> float:
    return float(sum(each.amount for each in totals.values()))


def _labelled(name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([str(value)], count)
    return family


async def _recovery(service: PaymentService) -> list[Metric]:
    summary = await service.recovery.summary()
    return [
        _labelled(
            "eci_pay_recovery_unsettled",
            "Charges and refunds whose outcome is to be found out or put right",
            "state",
            {"open": summary.open, "late": summary.late},
        ),
        GaugeMetricFamily(
            "eci_pay_recovery_overdue", "Those of them that are older than the alert limit", value=summary.overdue
        ),
        GaugeMetricFamily(
            "eci_pay_recovery_oldest_seconds",
            "How long the oldest of them has been unknown",
            value=summary.oldest_seconds,
        ),
    ]


async def _outbox(service: PaymentService) -> list[Metric]:
    stats = {each.destination: each for each in await service.outbox.recent_stats()}
    return [
        _labelled(
            "eci_pay_outbox_pending_messages",
            "Messages that are to be delivered, by service",
            "peer",
            {peer: each.pending for peer, each in stats.items()},
        ),
        _labelled(
            "eci_pay_outbox_oldest_pending_seconds",
            "How long the oldest of them has waited; 0 where there is none",
            "peer",
            {peer: each.oldest_pending_seconds or 0 for peer, each in stats.items()},
        ),
        _labelled(
            "eci_pay_outbox_dead_messages",
            "Messages that are given up, by service",
            "peer",
            {peer: each.dead for peer, each in stats.items()},
        ),
    ]


async def _keys(service: PaymentService) -> Metric:
    return GaugeMetricFamily(
        "eci_pay_idempotency_keys_estimate",
        "About how many idempotency keys there are, as the database last estimated",
        value=await service.keys.estimate(),
    )
