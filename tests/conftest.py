"""What tests share: a database of their own, a clock they move, a service, a real server and the command line."""

import asyncio
import hashlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import fasteners
import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from eci_pay.database import create_database, drop_database
from eci_pay.embedded import embedded_url
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.privileges import NEEDED
from eci_pay.relay import Relay, connected_relay
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from tests.door import Door
from tests.http_server import client_of, opening
from tests.ledger import Ledger
from tests.peers import Peers
from tests.previous_release import PreviousRelease, unpacked
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

SERVICE_ROLE = "eci_pay_tests_service"

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
def service_role(server_url: str) -> str | None:
    """The role as which the service runs in all tests, kept like the template; None where the server lets nobody make
    one."""
    with fasteners.InterProcessLock(_shared_lock()), psycopg.connect(server_url, autocommit=True) as connection:
        try:
            if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (SERVICE_ROLE,)).fetchone() is None:
                connection.execute(f"CREATE ROLE {SERVICE_ROLE}")
            connection.execute(f"SET ROLE {SERVICE_ROLE}")
        except psycopg.errors.InsufficientPrivilege:
            return None
    return SERVICE_ROLE


@pytest.fixture(scope="session")
def template(server_url: str, service_role: str | None) -> str:
    """The name of a migrated, empty database, made once for all workers."""
    migrations = bundled_migrations()
    makings = [*(migration.checksum for migration in migrations), repr(NEEDED), str(service_role)]
    name = f"eci_pay_template_{hashlib.sha256(''.join(makings).encode()).hexdigest()[:16]}"

    async def make() -> None:
        async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
            cursor = await connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,))
            if await cursor.fetchone() is not None:
                return
        await drop_database(server_url, f"{name}_new")
        url = await create_database(server_url, f"{name}_new")
        await migrate(url, migrations, service_role=service_role)
        async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
            await connection.execute(f"ALTER DATABASE {name}_new RENAME TO {name}".encode())

    with fasteners.InterProcessLock(_shared_lock()):
        asyncio.run(make())
    return name


def _shared_lock() -> Path:
    SHARED_DIR.mkdir(parents=True, exist_ok=True)
    return SHARED_DIR / "template.lock"


@pytest.fixture
async def database_url(server_url: str, template: str) -> AsyncIterator[str]:
    """A migrated, empty database of the test's own, for the owner of its tables."""
    name = f"eci_pay_test_{os.getpid()}_{next(_numbers)}"
    yield await clone_database(server_url, template, name)
    await drop_database(server_url, name)


@pytest.fixture
def service_url(database_url: str, service_role: str | None) -> str:
    """The same database for whoever serves, with the privileges of that alone."""
    return database_url if service_role is None else make_conninfo(database_url, options=f"-c role={service_role}")


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
def settings(service_url: str) -> Settings:
    """Settings of a service over the test's database, its waits short."""
    return Settings.model_validate(
        {
            "database_url": service_url,
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
    settings: Settings, service_url: str, gateway: RecordingGateway, clock: ManualClock
) -> AsyncIterator[PaymentService]:
    """The use cases over the test's database."""
    async with payment_service(settings, service_url, gateway=gateway, clock=clock) as opened:
        yield opened


@pytest.fixture
def door(service_url: str) -> Door:
    """The proxy between `far` and the database."""
    return Door(service_url)


@pytest.fixture
def opened(settings: Settings, service_url: str, gateway: RecordingGateway, clock: ManualClock) -> Opener:
    """Opens a service with another gateway, URL or settings."""

    def open_service(
        *, url: str = service_url, gateway: RecordingGateway = gateway, **changed: object
    ) -> AbstractAsyncContextManager[PaymentService]:
        return payment_service(settings.model_copy(update=changed), url, gateway=gateway, clock=clock)

    return open_service


@pytest.fixture
async def far(door: Door, opened: Opener) -> AsyncIterator[PaymentService]:
    """The use cases over a connection that the test can break."""
    async with (
        door.opened() as url,
        opened(url=url, eci_pay_settle_retry_seconds=0.5, eci_pay_database_pool_timeout_seconds=2.0) as service,
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


@pytest.fixture(scope="session")
def previous_release(tmp_path_factory: pytest.TempPathFactory) -> PreviousRelease:
    """The release before this one."""
    return unpacked(tmp_path_factory.mktemp("previous_release"))


@pytest.fixture
def command_line(service_url: str, tmp_path: Path) -> CommandLine:
    """The installed command `eci-pay`, on the test's database."""
    return CommandLine({"DATABASE_URL": service_url, "ECI_PAY_SIMULATED_SLOW_SECONDS": "0.05"}, tmp_path)


@pytest.fixture
def owner_command_line(command_line: CommandLine, database_url: str) -> CommandLine:
    """The same for the owner of the tables, who may also make databases."""
    return replace(command_line, environment={**command_line.environment, "DATABASE_URL": database_url})
