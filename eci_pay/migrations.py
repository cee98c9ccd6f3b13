"""Applies `sql/migrations/*.sql`, each once, in order, safely from several processes at a time.

A file and its record in `schema_migrations` commit together. A file headed `-- no-transaction` holds a single
statement that cannot run in a transaction and can be run again (`CREATE INDEX CONCURRENTLY IF NOT EXISTS`).
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise

import psycopg
from psycopg import sql
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from eci_pay import privileges
from eci_pay.database import Connection, connect, fetch, first_line
from eci_pay.errors import MigrationError, SchemaOutdated, Unavailable
from eci_pay.statements import statement

LOCK_ID = 0x6563695F706179  # "eci_pay" in ASCII
LOCK_POLL_SECONDS = 0.1
LOCK_WAIT_MAX_SECONDS = 300.0
LOCK_TRY_SECONDS, LOCK_PAUSE_SECONDS = 2, 1.0
"""How long a migration waits for a table at a time, and how long it then lets others have it."""

_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_CREATE_RECORD = b"""
CREATE TABLE schema_migrations (
    version integer PRIMARY KEY,
    name varchar(200) NOT NULL,
    checksum varchar(64) NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """One file of migrations."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, whatever line ends the checkout gave it."""
        return hashlib.sha256("\n".join(self.text.splitlines()).encode()).hexdigest()

    @property
    def in_transaction(self) -> bool:
        """Whether the file and its record can commit together."""
        return not self.text.startswith("-- no-transaction")


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationState:
    """A migration of this release, or one that the database knows, and when it was applied."""

    version: int
    name: str
    applied_at: datetime | None
    fault: str | None
    is_unknown: bool = False


def bundled_migrations(directory: Traversable | None = None) -> list[Migration]:
    """The migrations of this release, in order; raises MigrationError for a file whose name does not fit."""
    folder = directory if directory is not None else files("eci_pay.sql") / "migrations"
    migrations = []
    for file in folder.iterdir():
        if not file.name.endswith(".sql"):
            continue
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise MigrationError(f"{file.name}: a migration is named NNNN_name.sql")
        text = file.read_text(encoding="utf-8")
        migrations.append(Migration(version=int(match[1]), name=file.name, text=text))
    migrations.sort(key=lambda migration: migration.version)
    for before, after in pairwise(migrations):
        if before.version == after.version:
            raise MigrationError(f"{before.name} and {after.name} have the same version")
    return migrations


async def migration_states(url: str, migrations: list[Migration]) -> list[MigrationState]:
    """Every migration of this release and of the database, with what is wrong with it."""
    async with _connected(url) as connection:
        return await _states(connection, migrations)


async def migrate(url: str, migrations: list[Migration], *, service_role: str | None = None) -> list[Migration]:
    """Applies what is pending and returns it; then gives `service_role` the privileges that it needs, and no others.

    Raises MigrationError, naming the file or the privilege, and Unavailable.
    """
    async with _connected(url) as connection, _exclusively(connection):
        if service_role is not None:
            await privileges.check_bound(connection, service_role)
        if not await _is_recorded(connection):
            await connection.execute(_CREATE_RECORD)
        pending = await _pending(connection, migrations)
        for migration in pending:
            await _apply(connection, migration)
        if service_role is not None:
            await privileges.grant(connection, service_role)
        return pending


async def pending_migrations(url: str, migrations: list[Migration]) -> list[Migration]:
    """What `migrate` would apply; raises MigrationError as it would."""
    async with _connected(url) as connection:
        return await _pending(connection, migrations)


async def privilege_changes(url: str, service_role: str) -> list[str]:
    """The statements with which `migrate` would change the role's privileges on what is there already; raises
    MigrationError as it would."""
    async with _connected(url) as connection:
        await privileges.check_bound(connection, service_role)
        return [change.as_string() for change in await privileges.changes_for(connection, service_role)]


async def check_schema(url: str, migrations: list[Migration]) -> list[str]:
    """Raises SchemaOutdated where migrations are missing and MigrationError where one was changed; returns the names
    of those that are newer than us.

    A newer schema is no error, so that releases can be rolled out one replica at a time.
    """
    states = await migration_states(url, migrations)
    changed = [state.fault for state in states if state.fault and not state.is_unknown]
    if changed:
        raise MigrationError("; ".join(changed))
    missing = [state.name for state in states if state.applied_at is None]
    if missing:
        raise SchemaOutdated(f"the database lacks {', '.join(missing)}: run `eci-pay migrate` as the tables' owner")
    return [state.name for state in states if state.is_unknown]


async def load_sample_data(url: str) -> int:
    """Fills an empty database with payments of every status and method; returns how many.

    Raises MigrationError where there are payments already.
    """
    async with _connected(url) as connection, connection.transaction():
        await connection.execute(b"LOCK TABLE payments IN SHARE ROW EXCLUSIVE MODE")
        cursor = await connection.execute(b"SELECT EXISTS (SELECT FROM payments) AS taken")
        row = await cursor.fetchone()
        if row is not None and row["taken"]:
            raise MigrationError("sample data is only loaded into an empty database, and this one has payments")
        await connection.execute(statement("sample_data"))
        await fetch(connection, "totals_recount", {"notes": True})
        cursor = await connection.execute(b"SELECT count(*) AS loaded FROM payments")
        row = await cursor.fetchone()
        return 0 if row is None else int(row["loaded"])


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection]:
    async with await connect(url) as connection:
        try:
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            hint = "the owner of the tables has to run `eci-pay migrate --service-role` for the role that serves"
            raise Unavailable(f"the database refuses: {first_line(error)}: {hint}") from error
        except psycopg.Error as error:
            raise Unavailable(f"the database refuses: {error}") from error


async def _is_recorded(connection: Connection) -> bool:
    """Whether there is a record of migrations; who finds one need not be allowed to make one."""
    cursor = await connection.execute(b"SELECT to_regclass('schema_migrations') IS NOT NULL AS present")
    row = await cursor.fetchone()
    return row is not None and bool(row["present"])


async def _states(connection: Connection, migrations: list[Migration]) -> list[MigrationState]:
    applied = {}
    if await _is_recorded(connection):
        cursor = await connection.execute(b"SELECT version, name, checksum, applied_at FROM schema_migrations")
        applied = {record["version"]: record for record in await cursor.fetchall()}
    states = []
    for migration in migrations:
        record = applied.pop(migration.version, None)
        fault = None
        if record is not None and (record["name"], record["checksum"]) != (
            migration.name,
            migration.checksum,
        ):
            fault = f"{migration.name} differs from {record['name']}, which was applied: a migration never changes"
        states.append(
            MigrationState(
                version=migration.version,
                name=migration.name,
                applied_at=None if record is None else record["applied_at"],
                fault=fault,
            )
        )
    for version, record in sorted(applied.items()):
        fault = f"{record['name']} was applied to the database and is unknown to this release"
        states.append(
            MigrationState(
                version=version, name=record["name"], applied_at=record["applied_at"], fault=fault, is_unknown=True
            )
        )
    return states


async def _pending(connection: Connection, migrations: list[Migration]) -> list[Migration]:
    states = await _states(connection, migrations)
    faults = [state.fault for state in states if state.fault]
    if faults:
        raise MigrationError("; ".join(faults))
    applied = {state.version for state in states if state.applied_at is not None}
    return [migration for migration in migrations if migration.version not in applied]


async def _apply(connection: Connection, migration: Migration) -> None:
    try:
        if migration.in_transaction:
            await _patiently(connection, migration)
        else:
            await _drop_cut_off_indexes(connection, migration)
            await connection.execute(migration.text.encode())
            await _record(connection, migration)
    except psycopg.errors.InsufficientPrivilege as error:
        reason = f"{first_line(error)}: migrations run as the owner of the tables"
        raise MigrationError(f"{migration.name}: {reason}") from error
    except psycopg.OperationalError as error:
        raise Unavailable(f"{migration.name}: {error}") from error
    except psycopg.Error as error:
        raise MigrationError(f"{migration.name}: {error}") from error


async def _patiently(connection: Connection, migration: Migration) -> None:
    """Runs it again and again until it gets its locks: while it waits for one, everybody else waits behind it. So does
    one that was the victim of a deadlock, because it wants several tables."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type((psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)),
        stop=stop_after_delay(LOCK_WAIT_MAX_SECONDS),
        wait=wait_fixed(LOCK_PAUSE_SECONDS),
        reraise=True,
    )

    async def run() -> None:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TRY_SECONDS}s'".encode())
            await connection.execute(migration.text.encode())
            await _record(connection, migration)

    await retrying(run)


async def _drop_cut_off_indexes(connection: Connection, migration: Migration) -> None:
    """A CREATE INDEX CONCURRENTLY that was cut off leaves an invalid index, which IF NOT EXISTS takes for done."""
    cursor = await connection.execute(
        b"SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        b" WHERE NOT i.indisvalid AND c.relnamespace = current_schema()::regnamespace"
    )
    for row in await cursor.fetchall():
        if re.search(rf"\b{re.escape(row['relname'])}\b", migration.text):
            drop = sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(row["relname"]))
            await connection.execute(drop)


async def _record(connection: Connection, migration: Migration) -> None:
    await connection.execute(
        b"INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
        (migration.version, migration.name, migration.checksum),
    )


@asynccontextmanager
async def _exclusively(connection: Connection) -> AsyncIterator[None]:
    """Polls for the lock. Waiting inside pg_advisory_lock would deadlock with CREATE INDEX CONCURRENTLY, which
    waits for every older snapshot, that of the waiting call included."""
    try:
        async with asyncio.timeout(LOCK_WAIT_MAX_SECONDS):
            while not await _try_lock(connection):  # noqa: ASYNC110 - the lock is another process's
                await asyncio.sleep(LOCK_POLL_SECONDS)
    except TimeoutError:
        raise Unavailable(f"another migration has been running for {LOCK_WAIT_MAX_SECONDS:.0f} s") from None
    try:
        yield
    finally:
        if not connection.closed:
            await connection.execute("SELECT pg_advisory_unlock(%s)", (LOCK_ID,))


async def _try_lock(connection: Connection) -> bool:
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s) AS locked", (LOCK_ID,))
    row = await cursor.fetchone()
    return row is not None and bool(row["locked"])
