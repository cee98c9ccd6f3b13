"""The pool of connections to PostgreSQL, bounded retries, and the translation of driver errors.

Connections are in autocommit: a single statement is a transaction of its own and costs one round trip. Nothing
is kept in a session between statements, so it works behind a pooler in transaction mode.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from datetime import datetime
from decimal import Decimal
from types import NoneType
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, IsolationLevel, errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_loads
from psycopg.types.numeric import Int8
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from pydantic_core import from_json
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eci_pay.errors import Busy, ConnectionLost, DatabaseSilent, SchemaOutdated, Unavailable, apart
from eci_pay.instruments import connections_now
from eci_pay.settings import Settings
from eci_pay.statements import numbered, statement

T = TypeVar("T")
Row = DictRow
Connection = AsyncConnection[DictRow]
Params = Mapping[str, Any]

CONNECT_TIMEOUT_SECONDS = 5
CONNECT_TIMEOUT_SECONDS_OF_EACH = 2
"""Where the URL names several hosts: the next one is tried then. A host that drops packets must not use up the time
for which a connection is waited for."""
RECONNECT_SECONDS = 0.5
"""How long after a failed try to connect the next one follows while somebody waits for a connection."""
IDLE_SECONDS = 60.0
"""How often a connection is closed that nobody has needed meanwhile: what stands between us and the server may cut off
who is silent for some minutes, and whoever gets such a connection pays for it."""
STATEMENT_MAX_SECONDS = 60.0
"""How long a statement may take where the settings leave that to the role."""
ANSWER_MARGIN_SECONDS = 5.0
"""How much later than its statement_timeout a server may answer before its connection is given up."""
CONFLICT_TRIES_MAX = 6
"""How often a transaction is run before its serialization failures or deadlocks are passed on."""
READ_TRIES_MAX = 3
"""How often a read is run before the loss of its connection is passed on."""
LONG_STATEMENT_SECONDS_MAX = 600.0
"""How long one statement of a long transaction may take."""
LONG_WORK_MEM = "64MB"

_LONG_LIMITS = (
    f"SELECT set_config('statement_timeout', '{LONG_STATEMENT_SECONDS_MAX:.0f}s', true),"
    f" set_config('work_mem', '{LONG_WORK_MEM}', true), set_config('idle_in_transaction_session_timeout', '0', true)"
).encode()
_CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
_SCHEMA = (errors.UndefinedTable, errors.UndefinedColumn, errors.UndefinedFunction)
_OUT_OF_ORDER = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    errors.ReadOnlySqlTransaction,
    errors.InsufficientPrivilege,
)


class _PooledConnection(AsyncConnection[DictRow]):
    """A connection that is given up where another would cancel its statement.

    A commit that waits for its synchronous standby ends when it is cancelled, and counts, but on that server alone:
    after a failover it would never have been.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made_at = time.monotonic()
        set_json_loads(from_json, self)  # for histories of payments: in less than half the time of Python's own

    async def cancel_safe(self, *, timeout: float = 0.0) -> None:  # noqa: ARG002, ASYNC109 - psycopg's signature
        self.pgconn.finish()


class _Pool(AsyncConnectionPool[_PooledConnection]):
    """Hands out what was used last, not longest ago: its server process is warm, has the statements prepared, and the
    connections that a peak has left are idle until they are closed."""

    async def _get_ready_connection(self, timeout: float | None) -> _PooledConnection | None:  # noqa: ASYNC109
        self._pool.rotate(1)
        return await super()._get_ready_connection(timeout)


class Database:
    """One pool of one process. Every method raises Unavailable where the database cannot be reached."""

    def __init__(self, url: str, settings: Settings) -> None:
        statement_seconds = settings.eci_pay_statement_timeout_seconds or STATEMENT_MAX_SECONDS
        self._limit_seconds = statement_seconds + ANSWER_MARGIN_SECONDS
        self._info = connection_info(url, settings)
        self._dropped_at = -math.inf
        self._pinging: asyncio.Task[None] | None = None
        self._pool = _Pool(
            self._info,
            connection_class=_PooledConnection,
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "prepare_threshold": 5 if settings.eci_pay_prepare_statements else None,
            },
            min_size=1,
            max_size=settings.eci_pay_database_pool_size,
            timeout=settings.eci_pay_database_pool_timeout_seconds,
            max_waiting=settings.eci_pay_database_queue_max,
            max_idle=IDLE_SECONDS,
            # Its own distance between tries begins at a second and doubles: it would sleep through a failover's end.
            reconnect_timeout=RECONNECT_SECONDS,
            reconnect_failed=_connect_for_those_who_wait,
            open=False,
        )

    async def open(self) -> None:
        """Makes the first connection in the background; an unreachable database shows at the first use."""
        await self._pool.open()

    async def close(self) -> None:
        """Closes every connection."""
        await self._pool.close()

    def measure(self) -> None:
        """Notes what the connections do."""
        stats = self._pool.get_stats()
        size, idle = stats.get("pool_size", 0), stats.get("pool_available", 0)
        connections_now(idle=idle, busy=size - idle, waited_for=stats.get("requests_waiting", 0))

    async def ping(self) -> None:
        """Raises Unavailable where the database does not answer, lacks its tables, or takes no writes. Who asks
        meanwhile shares the answer: anybody may ask for our health, and must not get what charges need."""
        if self._pinging is None:
            self._pinging = asyncio.create_task(self._ping(), context=Context())
            self._pinging.add_done_callback(self._pinged)
        try:
            await asyncio.shield(self._pinging)
        except Unavailable as error:
            raise apart(error) from None

    def _pinged(self, _: asyncio.Task[None]) -> None:
        self._pinging = None

    async def _ping(self) -> None:
        async def run(connection: Connection) -> None:
            (row,) = await fetch(connection, "ping")
            if row["is_read_only"]:
                raise errors.ReadOnlySqlTransaction("it is a standby, or read-only")

        await self._repeated(lambda: self._run(run))

    async def fetch(self, name: str, params: Params | None = None) -> list[Row]:
        """Runs one named statement as a transaction of its own; ConnectionLost leaves open whether it committed."""

        async def run(connection: Connection) -> list[Row]:
            return await fetch(connection, name, params)

        return await self._retried(run)

    async def read(self, name: str, params: Params | None = None) -> list[Row]:
        """Runs one named statement that writes nothing, again on another connection where one is lost."""
        return await self._repeated(lambda: self.fetch(name, params))

    async def read_text(self, text: str, params: Params) -> list[Row]:
        """Runs a SELECT that was composed by SQLAlchemy, as `read` does. It is planned each time: one filter of a list
        may fit nearly every row or hardly any, and a plan made for both would be right for neither."""
        bound = {key: _bound(value) for key, value in params.items()}

        async def run(connection: Connection) -> list[Row]:
            cursor = await connection.execute(text.encode(), bound, prepare=False)
            return await cursor.fetchall()

        return await self._repeated(lambda: self._retried(run))

    async def transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Runs `work` in one transaction, from its start again after a conflict or where a connection is lost before
        its commit was sent; ConnectionLost leaves open whether it committed."""
        commit_sent = False

        async def run(connection: Connection) -> T:
            nonlocal commit_sent
            async with connection.transaction():
                result = await work(connection)
                commit_sent = True
            return result

        for _ in range(READ_TRIES_MAX - 1):
            try:
                return await self._retried(run)
            except ConnectionLost as error:
                if commit_sent or isinstance(error, DatabaseSilent):
                    raise
        return await self._retried(run)

    async def long_transaction(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Runs `work` once, in one transaction on a connection beside the pool: a large one, of which each statement
        may take `LONG_STATEMENT_SECONDS_MAX` and `LONG_WORK_MEM` for each of its sorts, and which sees the books as
        of one moment. Every error leaves nothing, but ConnectionLost leaves open whether it committed."""
        async with await connect(self._info) as connection:
            try:
                with _translated(connection, LONG_STATEMENT_SECONDS_MAX):
                    await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
                    async with connection.transaction():
                        await connection.execute(_LONG_LIMITS)
                        return await work(connection)
            except _CONFLICTS as error:
                raise Unavailable(f"the database is too contended: {first_line(error)}") from error

    async def _repeated(self, read: Callable[[], Awaitable[T]]) -> T:
        for _ in range(READ_TRIES_MAX - 1):
            try:
                return await read()
            except DatabaseSilent:
                raise
            except ConnectionLost:
                continue
        return await read()

    async def _retried(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            return await self._run(work)
        except _CONFLICTS:
            retrying = AsyncRetrying(
                retry=retry_if_exception_type(_CONFLICTS),
                stop=stop_after_attempt(CONFLICT_TRIES_MAX - 1),
                wait=wait_random_exponential(multiplier=0.01, max=0.5),
                reraise=True,
            )
            try:
                return await retrying(self._run, work)
            except _CONFLICTS as error:
                raise Unavailable(f"the database is too contended: {error}") from error

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            connection = await self._pool.getconn()
        except (PoolTimeout, TooManyRequests, PoolClosed) as error:
            raise Unavailable(f"the database cannot be reached: {error}") from error
        try:
            with _translated(connection, self._limit_seconds):
                try:
                    async with asyncio.timeout(self._limit_seconds):
                        return await work(connection)
                except errors.ReadOnlySqlTransaction:
                    # Of a server that is not the primary any more: kept, it would refuse for ever.
                    await connection.close()
                    raise
        except ConnectionLost:
            await self._drop_others(connection)
            raise
        finally:
            await self._pool.putconn(connection)

    async def _drop_others(self, lost: _PooledConnection) -> None:
        """After a failover or a restart the others are gone as well. To ask each whether it is would take as long as
        TCP bears with a host that is silent. The loss of one that was made before the last time tells nothing new."""
        if lost.made_at > self._dropped_at:
            self._dropped_at = time.monotonic()
            await self._pool.drain()


async def _connect_for_those_who_wait(pool: AsyncConnectionPool[_PooledConnection]) -> None:
    """The pool has given a connection up, and would try again only for who asks next."""
    if pool.get_stats()["requests_waiting"]:
        await pool.check()  # there are none to check: this lets it grow


@contextmanager
def _translated(connection: Connection, limit_seconds: float) -> Iterator[None]:
    """Turns what the driver raises into our errors; conflicts are passed on, for they are worth another try."""
    try:
        yield
    except _CONFLICTS:
        raise
    except TimeoutError as error:
        # The server does not even keep its own statement_timeout. Nobody knows what it will still do.
        raise DatabaseSilent(f"the database did not answer within {limit_seconds:.0f} s") from error
    except errors.LockNotAvailable as error:
        raise Busy(f"the database is busy: {first_line(error)}") from error
    except errors.QueryCanceled as error:
        raise Unavailable(f"the database is busy: {first_line(error)}") from error
    except _SCHEMA as error:
        raise SchemaOutdated(f"{first_line(error)}: run `eci-pay migrate`") from error
    except _OUT_OF_ORDER as error:
        if connection.broken or connection.closed:
            raise ConnectionLost(f"the connection to the database was lost: {first_line(error)}") from error
        raise Unavailable(f"the database refuses: {first_line(error)}") from error
    except psycopg.InternalError as error:
        # A pooler tells of its server's death beside the server's own last words: at a BEGIN or COMMIT two results.
        if connection.broken or connection.closed:
            raise ConnectionLost(f"the connection to the database was lost: {first_line(error)}") from error
        raise


async def fetch(connection: Connection, name: str, params: Params | None = None) -> list[Row]:
    """Runs one named statement on a connection, inside whatever transaction is open on it."""
    cursor = AsyncRawCursor(connection)
    if params is None:
        await cursor.execute(statement(name))
    else:
        text, names = numbered(name)
        await cursor.execute(text, [_bound(params[each]) for each in names])
    # Its description would be a list of objects, made for nothing else.
    return await cursor.fetchall() if cursor.pgresult and cursor.pgresult.nfields else []


def arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows as one list per column, for `unnest`, with their number as column `n`."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {"n": list(range(len(rows))), **columns}


def _bound(value: Any) -> Any:
    """A parameter as psycopg is given it: integers as bigint, for it would choose their type by their value and prepare
    one statement several times; lists as text, which it would take twenty times as long for."""
    if isinstance(value, list):
        return array_text(value)
    return Int8(value) if isinstance(value, int) and not isinstance(value, bool) else value


def array_text(values: Sequence[Any]) -> str:
    """The values as PostgreSQL reads an array (8.15.2 and 8.15.6 of its manual)."""
    try:
        return f"{{{','.join([_ELEMENTS[type(value)](value) for value in values])}}}"
    except KeyError as error:
        raise psycopg.DataError(f"there is no array of {error}") from None


def _quoted(text: str) -> str:
    if "\\" in text:
        text = text.replace("\\", "\\\\")
    if '"' in text:
        text = text.replace('"', '\\"')
    return f'"{text}"'


_ELEMENTS: dict[type, Callable[[Any], str]] = {
    NoneType: lambda _: "NULL",
    bool: lambda value: "t" if value else "f",
    int: str,
    float: repr,
    Decimal: str,
    datetime: datetime.isoformat,
    UUID: str,
    str: _quoted,
}


def connection_info(url: str, settings: Settings) -> str:
    """The connection string: the URL, with the bounds that the settings give where the URL gives none."""
    limits = {
        "lock_timeout": settings.eci_pay_lock_timeout_seconds,
        "statement_timeout": settings.eci_pay_statement_timeout_seconds,
    }
    given = conninfo_to_dict(url)
    options = [f"-c {name}={max(1, round(value * 1000))}" for name, value in limits.items() if value]
    if options:
        options.append("-c jit=off")  # it takes longer than any statement of ours
    defaults: dict[str, Any] = {
        "application_name": settings.service_name,
        # A host that has vanished is noticed in half the time after which a failover manager promotes another.
        "keepalives_idle": 5,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
    # What the URL says comes last, and so counts.
    if all_options := " ".join([*options, str(given.get("options", ""))]).strip():
        given["options"] = all_options
    return make_conninfo("", **{**defaults, **_choice_of_host(given), **given})


def _choice_of_host(given: Mapping[str, Any]) -> dict[str, Any]:
    """How long a host is tried, and of several, which one is wanted: the primary, whichever that is now."""
    if "," not in str(given.get("host") or given.get("hostaddr")):
        return {"connect_timeout": CONNECT_TIMEOUT_SECONDS}
    return {"connect_timeout": CONNECT_TIMEOUT_SECONDS_OF_EACH, "target_session_attrs": "read-write"}


async def connect(url: str) -> Connection:
    """A connection beside the pool, for what takes longer than a request; raises Unavailable."""
    given = conninfo_to_dict(url)
    info = {**_choice_of_host(given), **given}
    try:
        return await AsyncConnection[DictRow].connect(make_conninfo("", **info), autocommit=True, row_factory=dict_row)
    except psycopg.OperationalError as error:
        raise Unavailable(f"the database cannot be reached: {first_line(error)}") from error


async def create_database(url: str, name: str) -> str:
    """Creates an empty database beside the one that `url` names; returns its URL."""
    async with await connect(url) as connection:
        try:
            await connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except psycopg.Error as error:
            raise Unavailable(f"database {name} cannot be created: {first_line(error)}") from error
    return make_conninfo(url, dbname=name)


async def drop_database(url: str, name: str) -> None:
    """Drops a database of `create_database`, whoever is connected to it."""
    async with await connect(url) as connection:
        await connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def first_line(error: Exception) -> str:
    """What the driver says, without the place in the statement that it says it of."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
