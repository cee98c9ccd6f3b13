"""A PgBouncer of a test's own, in transaction mode, that the test points to another server as operators do."""

import asyncio
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults.postgres import UNPRIVILEGED, Cluster, is_root, open_to_others
from tests.faults.proxy import HOST, free_port

START_SECONDS_MAX = 10.0
WITH_PREPARED_STATEMENTS = (1, 21)
"""The first version that carries prepared statements in transaction mode."""

CONFIGURATION = """
[databases]
postgres = host={host} port={port} dbname=postgres user=postgres

[pgbouncer]
listen_addr = {host}
listen_port = {own_port}
unix_socket_dir =
logfile = {log}
auth_type = any
pool_mode = transaction
default_pool_size = 20
max_client_conn = 500
server_login_retry = 1
server_connect_timeout = 2
query_wait_timeout = 5
{more}
"""
"""The last three as docs/OPERATIONS.md has them."""


def pgbouncer() -> str | None:
    """The program, where it is installed."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


def pgbouncer_version() -> tuple[int, ...]:
    """Its version; nothing where it is not installed."""
    program = pgbouncer()
    if program is None:
        return ()
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
    return tuple(int(part) for part in found.groups()) if found else ()


class Bouncer:
    """`async with Bouncer(cluster, carries_prepared=False) as bouncer`: a pooler in front of a server."""

    def __init__(self, target: Cluster, *, carries_prepared: bool) -> None:
        self.port = free_port()
        self._target = target
        self._more = "max_prepared_statements = 200" if carries_prepared else ""
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "Bouncer":
        self._directory = Path(tempfile.mkdtemp(prefix="eci-bouncer-"))
        privileges: dict[str, Any] = {}
        if is_root():
            open_to_others(self._directory)
            shutil.chown(self._directory, UNPRIVILEGED)
            privileges = {"user": UNPRIVILEGED, "extra_groups": ()}
        self._configure()
        program = pgbouncer()
        assert program is not None
        self._process = await asyncio.create_subprocess_exec(
            program,
            "--quiet",
            str(self._directory / "pgbouncer.ini"),
            cwd=self._directory,
            stdin=asyncio.subprocess.DEVNULL,
            **privileges,
        )
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not await self._listens():
                    assert self._process.returncode is None, self.log
                    await asyncio.sleep(0.02)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def url(self) -> str:
        """The database behind it."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    @property
    def log(self) -> str:
        """What it has logged."""
        path = self._home / "log"
        return path.read_text() if path.exists() else ""

    def point_to(self, target: Cluster) -> None:
        """Changes its configuration and has it read again."""
        self._target = target
        self._configure()
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    @property
    def _home(self) -> Path:
        assert self._directory is not None, "it is not started yet"
        return self._directory

    def _configure(self) -> None:
        text = CONFIGURATION.format(
            host=HOST, port=self._target.port, own_port=self.port, log=self._home / "log", more=self._more
        )
        (self._home / "pgbouncer.ini").write_text(text)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)
