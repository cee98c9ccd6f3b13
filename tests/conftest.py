"""What tests share: a database of their own, a clock they move, a service, a real server and the command line."""

import asyncio
import hashlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import fasteners
import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from eci_pay.database import create_database, drop_database
from eci_pay.embedded import embedded_url
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.relay import Relay, connected_relay
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from tests.door import Door
from tests.http_server import client_of, opening
from tests.ledger import Ledger
from tests.peers import Peers
from tests.support import (
    Books,
    CommandLine,
    ManualClock,
    Opener,
    RecordingGateway,
    Relays,
    Session,
    Sessions,
    clone_database,
)

SHARED_DIR = Path(tempfile.gettempdir()) / f"eci-pay-tests-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
"""Kept between runs: its server is created once, and its template database once per set of migrations."""

_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--database-url` names a server of your own; its user may create databases."""
    parser.addoption("--database-url", default=None, help="a PostgreSQL server; the embedded one if left out")


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> str:
    """A PostgreSQL server on which databases can be made."""
    given: str | None = request.config.getoption("--database-url")
    return given or _shared_server()


def _shared_server() -> str:
    """The embedded server for all workers. No test cuts this machine's power, so it need not wait for its disk."""
    url = embedded_url(SHARED_DIR)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    return url


@pytest.fixture(scope="session")
def template(server_url: str) -> str:
    """The name of a migrated, empty database, made once for all workers."""
    migrations = bundled_migrations()
    checksums = "".join(migration.checksum for migration in migrations)
    name = f"eci_pay_template_{hashlib.sha256(checksums.encode()).hexdigest()[:16]}"

    async def make() -> None:
        async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
            cursor = await connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,))
            if await cursor.fetchone() is not None:
                return
        await drop_database(server_url, f"{name}_new")
        url = await create_database(server_url, f"{name}_new")
        await migrate(url, migrations)
        async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
            await connection.execute(f"ALTER DATABASE {name}_new RENAME TO {name}".encode())

    SHARED_DIR.mkdir(parents=True, exist_ok=True)
    with fasteners.InterProcessLock(SHARED_DIR / "template.lock"):
        asyncio.run(make())
    return name


@pytest.fixture
async def database_url(server_url: str, template: str) -> AsyncIterator[str]:
    """A migrated, empty database of the test's own."""
    name = f"eci_pay_test_{os.getpid()}_{next(_numbers)}"
    yield await clone_database(server_url, template, name)
    await drop_database(server_url, name)


@pytest.fixture
async def empty_database_url(server_url: str) -> AsyncIterator[str]:
    """A database of the test's own without a single table."""
    name = f"eci_pay_test_{os.getpid()}_{next(_numbers)}"
    yield await create_database(server_url, name)
    await drop_database(server_url, name)


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    """The tables of the test's database, read and written by hand."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        yield Books(connection)


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[Sessions]:
    """Makes further sessions, each in a transaction from its first statement on."""
    opened: list[Session] = []

    async def connect() -> Session:
        connection = await psycopg.AsyncConnection.connect(database_url, row_factory=dict_row)
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        await connection.close()


@pytest.fixture
def settings(database_url: str) -> Settings:
    """Settings of a service over the test's database, its waits short."""
    return Settings.model_validate(
        {
            "database_url": database_url,
            "eci_pay_simulated_slow_seconds": 0.05,
            "eci_pay_settle_retry_seconds": 2.0,
            "eci_pay_database_pool_timeout_seconds": 20.0,
            # However busy the machine is: the tests of these limits set their own.
            "eci_pay_group_commit_wait_seconds": 30.0,
            "eci_pay_gateway_wait_seconds": 30.0,
        }
    )


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until it is moved."""
    return ManualClock()


@pytest.fixture
def gateway(settings: Settings) -> RecordingGateway:
    """The simulated gateway, remembering what it was asked."""
    return RecordingGateway(slow_seconds=settings.eci_pay_simulated_slow_seconds)


@pytest.fixture
async def service(
    settings: Settings, database_url: str, gateway: RecordingGateway, clock: ManualClock
) -> AsyncIterator[PaymentService]:
    """The use cases over the test's database."""
    async with payment_service(settings, database_url, gateway=gateway, clock=clock) as opened:
        yield opened


@pytest.fixture
def door(database_url: str) -> Door:
    """The proxy between `far` and the database."""
    return Door(database_url)


@pytest.fixture
def opened(settings: Settings, database_url: str, gateway: RecordingGateway, clock: ManualClock) -> Opener:
    """Opens a service with another gateway, URL or settings."""

    def open_service(
        *, url: str = database_url, gateway: RecordingGateway = gateway, **changed: object
    ) -> AbstractAsyncContextManager[PaymentService]:
        return payment_service(settings.model_copy(update=changed), url, gateway=gateway, clock=clock)

    return open_service


@pytest.fixture
async def far(door: Door, opened: Opener) -> AsyncIterator[PaymentService]:
    """The use cases over a connection that the test can break."""
    async with (
        door.opened() as url,
        opened(url=url, eci_pay_settle_retry_seconds=0.5, eci_pay_database_pool_timeout_seconds=0.5) as service,
    ):
        yield service


@pytest.fixture
async def api(settings: Settings, service: PaymentService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real server on loopback, over the test's `service`. Each answer is held against the document."""

    async with client_of(settings, opening(service)) as client:
        yield client


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    """The services that are told of payments; they answer well until they are told otherwise."""
    async with Peers().running() as running:
        yield running


@pytest.fixture
async def telling(settings: Settings, opened: Opener, peers: Peers) -> AsyncIterator[PaymentService]:
    """The use cases over the test's database, where all three peers are configured."""
    async with opened(**peers.settings()) as service:
        yield service


@pytest.fixture
def relays(settings: Settings, telling: PaymentService, peers: Peers) -> Relays:
    """Opens a relay of its own connections over the outbox of `telling`, its waits short, or with other settings."""

    def open_relay(**changed: object) -> AbstractAsyncContextManager[Relay]:
        short: dict[str, object] = {
            "eci_pay_relay_poll_seconds": 0.05,
            "eci_pay_relay_timeout_seconds": 0.5,
            "eci_pay_relay_retry_seconds": 0.2,
        }
        update = {**peers.settings(), **short, **changed}
        return connected_relay(settings.model_copy(update=update), telling.outbox)

    return open_relay


@pytest.fixture
def ledger() -> Ledger:
    """The gateway of `recovering`."""
    return Ledger()


@pytest.fixture
async def recovering(opened: Opener, peers: Peers, ledger: Ledger) -> AsyncIterator[PaymentService]:
    """The use cases over `ledger`, where all three peers are configured."""
    async with opened(gateway=ledger, **peers.settings()) as service:
        yield service


@pytest.fixture
def command_line(database_url: str, tmp_path: Path) -> CommandLine:
    """The installed command `eci-pay`, on the test's database."""
    return CommandLine({"DATABASE_URL": database_url, "ECI_PAY_SIMULATED_SLOW_SECONDS": "0.05"}, tmp_path)
