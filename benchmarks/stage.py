"""What benchmarks stand on: our commands as processes, peers that cost next to nothing, and wrk."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from psycopg.conninfo import make_conninfo

from eci_pay.database import connect, create_database, drop_database
from eci_pay.messages import Destination
from eci_pay.migrations import bundled_migrations, migrate

DATABASE = "eci_pay_benchmark"
COMMAND = str(Path(sys.executable).parent / "eci-pay")
UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


class Template:
    """A migrated, empty database, to be copied for each measurement."""

    def __init__(self, server: str) -> None:
        self._server = server

    async def __aenter__(self) -> "Template":
        await drop_database(self._server, DATABASE)
        await migrate(await create_database(self._server, DATABASE), bundled_migrations())
        return self

    async def __aexit__(self, *_: object) -> None:
        await drop_database(self._server, DATABASE)

    @asynccontextmanager
    async def copy(self) -> AsyncIterator[str]:
        """The URL of a copy, which is gone at the end."""
        name = f"{DATABASE}_copy"
        await drop_database(self._server, name)
        async with await connect(self._server) as connection:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE {DATABASE}".encode())
            await connection.execute(b"CHECKPOINT")
        try:
            yield make_conninfo(self._server, dbname=name)
        finally:
            await drop_database(self._server, name)


class Stage:
    """One database, and processes over it. All three peers are configured."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ports = [free_port() for _ in Destination]
        self.environment = {
            **os.environ,
            "DATABASE_URL": url,
            "ECI_PAY_RELAY_IN_SERVE": "false",
            **{
                f"{name.upper()}_SERVICE_URL": f"http://127.0.0.1:{port}"
                for name, port in zip(Destination, self.ports, strict=True)
            },
        }

    async def execute(self, statement: str, **params: Any) -> None:
        """Runs a statement."""
        async with await connect(self.url) as connection:
            await connection.execute(statement.encode(), params or None)

    async def value(self, query: str, **params: Any) -> Any:
        """The only value of a query."""
        async with await connect(self.url) as connection:
            cursor = await connection.execute(query.encode(), params or None)
            row = await cursor.fetchone()
            assert row is not None
            (value,) = row.values()
            return value

    @contextmanager
    def running(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Runs one of our commands, its log lines written to nowhere, and ends it as an operator would."""
        process = subprocess.Popen(
            [COMMAND, *arguments], env={**self.environment, **environment}, stderr=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.terminate()
            exit_code = process.wait()
        assert exit_code == 0, f"{arguments}: {exit_code}"

    def run(self, *arguments: str) -> None:
        """Runs one of our commands to its end."""
        subprocess.run([COMMAND, *arguments], env=self.environment, check=True, capture_output=True)

    @contextmanager
    def serving(self, *, workers: int = 1, **environment: str) -> Iterator[str]:
        """Runs a server; yields its address."""
        port = free_port()
        with self.running("serve", "--port", str(port), "--workers", str(workers), **environment):
            wait_for(port)
            yield f"http://127.0.0.1:{port}"

    @contextmanager
    def peer(self) -> Iterator[Any]:
        """Runs the peers; what it yields tells, after they have ended, how many requests and keys they saw."""
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer", *map(str, self.ports)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        counted: list[int] = []
        try:
            yield lambda: tuple(counted)
        finally:
            process.terminate()
            counted += [int(number) for number in process.stdout.read().split()]
            process.wait()

    def wrk(self, address: str, script: str, *, seconds: float, connections: int, **environment: str) -> dict[str, Any]:
        """Sends the requests of a script for so long; tells their rate, their latencies in ms, and how many failed."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "30s"]
        told = subprocess.run(
            [*command, "-s", str(Path(__file__).with_name(script)), address],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        failures = re.findall(r"(?:Non-2xx or 3xx responses:|connect|read|write|timeout) (\d+)", told)
        return {
            "connections": connections,
            "requests": int(found(r"(\d+) requests in", told)),
            "per_second": float(found(r"Requests/sec:\s+([\d.]+)", told)),
            "p50_ms": milliseconds(found(r"(?m)^ +50% +(\S+)", told)),
            "p99_ms": milliseconds(found(r"(?m)^ +99% +(\S+)", told)),
            "errors": sum(map(int, failures)),
        }


def found(pattern: str, text: str) -> str:
    """What a pattern catches in a program's output."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def milliseconds(text: str) -> float:
    """A duration as wrk writes it."""
    match = re.fullmatch(r"([\d.]+)([a-z]+)", text)
    assert match is not None, text
    return round(float(match[1]) * UNITS[match[2]], 3)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Waits until somebody listens."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nobody listens on {port}")
