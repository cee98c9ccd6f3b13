"""A primary that dies, and one that lives on without its standby: what was acknowledged is kept, and nothing is charged
twice. Figures of many failovers: `python -m tests.faults.failover`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from eci_pay import database
from eci_pay.answers import Answer
from eci_pay.errors import Unavailable
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from tests.faults.failover import POOLERS, Failover
from tests.faults.pgbouncer import WITH_PREPARED_STATEMENTS, pgbouncer_version
from tests.faults.postgres import Cluster
from tests.faults.proxy import HOST, Proxy
from tests.rows import paid
from tests.support import Books, RecordingGateway, charge_request, refund_request, until

RESUMED_SECONDS_MAX = 5.0
"""From the promotion to the first charge. It takes half a second; this machine may be busy."""
SILENT_SECONDS_MAX = 8.0
"""For half a second a statement is waited for, for two the host that does not answer."""
WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

Serving = Callable[..., AbstractAsyncContextManager[PaymentService]]


@dataclass(frozen=True)
class Pair:
    """Two servers, the second of which has all that the first has committed."""

    primary: Cluster
    standby: Cluster


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with Cluster() as primary:
        await migrate(primary.url, bundled_migrations())
        async with Cluster(standby_of=primary) as standby:
            await primary.wait_for_standbys()
            yield Pair(primary, standby)


@asynccontextmanager
async def books_of(cluster: Cluster) -> AsyncIterator[Books]:
    connecting = psycopg.AsyncConnection.connect(cluster.url, autocommit=True, row_factory=dict_row)
    async with await connecting as connection:
        yield Books(connection)


@pytest.fixture
def gateway() -> RecordingGateway:
    return RecordingGateway()


@pytest.fixture
def serving(gateway: RecordingGateway) -> Serving:
    """Opens a service on some servers, the first of which is tried first."""

    def serve(*ports: int, **changed: Any) -> AbstractAsyncContextManager[PaymentService]:
        url = f"postgresql://postgres@{','.join(f'{HOST}:{port}' for port in ports)}/postgres"
        return payment_service(Settings.model_validate({"database_url": url, **changed}), url, gateway=gateway)

    return serve


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Settings with which a server that does not answer is given up after half a second."""
    monkeypatch.setattr(database, "ANSWER_MARGIN_SECONDS", 0.3)
    return {"eci_pay_statement_timeout_seconds": 0.2, "eci_pay_lock_timeout_seconds": 0.2}


@pytest.mark.parametrize("pooler", POOLERS)
async def test_nothing_that_was_acknowledged_is_lost_when_the_primary_dies(tmp_path: Path, pooler: str) -> None:
    version = pgbouncer_version()
    if pooler != "none" and not version:
        pytest.skip("there is no pgbouncer (Debian's package of that name)")
    if pooler == "new" and version < WITH_PREPARED_STATEMENTS:
        pytest.skip("this pgbouncer cannot carry prepared statements in transaction mode: it is older than 1.21")
    short = {"ECI_PAY_DATABASE_POOL_TIMEOUT_SECONDS": "0.5"}
    figures = await Failover(1, tmp_path, pooler=pooler, settings=short).run()
    assert figures.violations == []
    without_primary, afterwards = figures.probes
    assert afterwards == (201, None)
    if pooler == "none":  # a pooler may let a statement wait until there is a primary again
        assert without_primary == (503, "2")
        assert figures.readiness[503] > 0
    assert figures.resumed_seconds < RESUMED_SECONDS_MAX


async def test_a_commit_that_waits_for_its_standby_is_not_taken_for_done(
    pair: Pair, serving: Serving, gateway: RecordingGateway, impatient: dict[str, float]
) -> None:
    await pair.standby.stop_immediate()
    async with serving(pair.primary.port, **impatient) as service:
        with pytest.raises(Unavailable):
            await service.charges.charge(request=charge_request(1), idempotency_key="k")
    async with books_of(pair.primary) as books:
        assert await books.value("SELECT count(*) FROM payments") == 0
    assert gateway.charges == []
    await pair.primary.kill()
    await pair.standby.start()
    await pair.standby.promote()
    async with serving(pair.standby.port) as service:
        answer = await service.charges.charge(request=charge_request(1), idempotency_key="k")
    assert (answer.status_code, len(gateway.charges)) == (201, 1)


@pytest.mark.parametrize("operation", ["charge", "refund"])
async def test_a_begin_that_only_the_primary_has_is_not_sent_until_its_standby_has_it(
    pair: Pair, serving: Serving, gateway: RecordingGateway, operation: str
) -> None:
    async with serving(pair.primary.port) as service, books_of(pair.primary) as books:
        [payment_id] = await paid(service, 1)
        gateway.charges.clear()

        async def ask() -> Answer:
            if operation == "charge":
                return await service.charges.charge(request=charge_request(2), idempotency_key="k")
            return await service.refunds.refund(payment_id=payment_id, request=refund_request("40"))

        await pair.standby.stop_immediate()
        asking = asyncio.create_task(ask())
        await until(lambda: books.rows(WAITING))
        [first] = await books.rows(WAITING)
        await books.rows("SELECT pg_terminate_backend(%s)", first["pid"])

        async def another_waits() -> bool:
            return await books.rows(WAITING) not in ([], [first])

        await until(another_waits)
        assert (gateway.charges, gateway.refunds) == ([], [])
        await pair.standby.start()
        assert (await asking).status_code == (201 if operation == "charge" else 200)
    assert len([*gateway.charges, *gateway.refunds]) == 1


async def test_a_server_that_takes_no_more_writes_is_left_for_the_one_that_does(
    pair: Pair, serving: Serving, gateway: RecordingGateway
) -> None:
    async with serving(pair.primary.port, pair.standby.port) as service, serving(pair.primary.port) as stranded:
        await paid(service, 1)
        await stranded.check_ready()
        await pair.standby.promote()
        async with books_of(pair.primary) as books:
            await books.rows("ALTER SYSTEM SET default_transaction_read_only = on")
            await books.rows("SELECT pg_reload_conf()")
        await until(lambda: is_read_only(pair.primary))
        await paid(service, 2)
        await service.check_ready()
        with pytest.raises(Unavailable):
            await stranded.check_ready()
    async with books_of(pair.standby) as books:
        assert await books.value("SELECT count(*) FROM payments") == 2
    assert len(gateway.charges) == 2


async def is_read_only(cluster: Cluster) -> bool:
    async with books_of(cluster) as books:
        return bool(await books.value("SHOW default_transaction_read_only") == "on")


async def test_a_host_that_falls_silent_is_given_up_once_and_not_by_each_connection(
    pair: Pair, serving: Serving, gateway: RecordingGateway, impatient: dict[str, float]
) -> None:
    async with (
        Proxy(HOST, pair.primary.port).running() as proxy,
        serving(proxy.port, pair.standby.port, **impatient) as service,
    ):
        await asyncio.gather(*(paid(service, order_id) for order_id in range(1, 21)))
        assert proxy.connections > 1
        await pair.standby.promote()
        proxy.stall()
        async with asyncio.timeout(SILENT_SECONDS_MAX):
            await paid(service, 21)
    assert len(gateway.charges) == 21
