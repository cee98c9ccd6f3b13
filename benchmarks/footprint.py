"""What a payment leaves behind: `make bench BENCH=footprint`.

In a data directory of its own, charges 200,000 orders through the use case (what HTTP calls, without HTTP), delivers
their messages, and deletes messages and keys as if their time were over. Each step tells its WAL, commits and flushes;
at the end, how many rows and bytes each table and index has for a payment.
"""

import argparse
import asyncio
import atexit
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.stage import Stage, Template
from eci_pay.database import connect
from eci_pay.embedded import embedded_url
from eci_pay.lifecycle import PaymentMethod
from eci_pay.relay import connected_relay
from eci_pay.requests import ChargeRequest
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings

AFTER_CHECKPOINT = 256
"""Charges so few that each meets pages that nobody has written since the checkpoint, where the indexes are large."""
AT_A_TIME = 128
USERS = 10_000_000
SERVER = {"max_wal_size": "32GB", "checkpoint_timeout": "1h", "autovacuum_naptime": "1s"}
"""Checkpoints only where a step begins. Autovacuum as soon as the thresholds of the tables say: a minute of this load
is a greater part of these tables than it is of large ones."""
SESSIONS_END_TRIES_MAX = 200

COUNTERS = """
SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS wal_bytes,
       (SELECT wal_fpi FROM pg_stat_wal) AS full_pages,
       (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()) AS commits,
       (SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal') AS flushes
"""
OTHERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
SIZES = """
SELECT c.relname AS name, t.relname AS table, pg_relation_size(c.oid) AS bytes
FROM pg_class c
LEFT JOIN pg_index i ON i.indexrelid = c.oid
JOIN pg_class t ON t.oid = coalesce(i.indrelid, c.oid)
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'i')
ORDER BY t.relname, c.relkind DESC, bytes DESC
"""


class Footprint(Stage):
    """A database that nobody else writes to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._orders = itertools.count(1)
        self._chance = random.Random(1)  # noqa: S311 - chooses users

    @asynccontextmanager
    async def service(self, *, clock_ahead: timedelta = timedelta(0)) -> AsyncIterator[tuple[PaymentService, Settings]]:
        """The service of a process, in this one."""
        urls = {name: self.environment[name] for name in self.environment if name.endswith("_SERVICE_URL")}
        settings = Settings.model_validate(
            {
                "database_url": self.url,
                "eci_pay_relay_messages_per_second_max": 1_000_000,
                **{name.lower(): url for name, url in urls.items()},
            }
        )
        async with payment_service(settings, self.url, clock=lambda: datetime.now(UTC) + clock_ahead) as service:
            yield service, settings

    async def charge(self, charges: int, *, at_a_time: int) -> None:
        """Charges new orders of random users, under random keys."""
        numbers = iter(range(charges))

        async def customer(service: PaymentService) -> None:
            for _ in numbers:
                request = ChargeRequest(
                    order_id=next(self._orders),
                    user_id=self._chance.randrange(1, USERS),
                    amount="649.50",
                    payment_method=PaymentMethod.UPI,
                )
                answer = await service.charges.charge(request=request, idempotency_key=str(uuid4()))
                assert answer.status_code == 201, answer

        async with self.service() as (service, _):
            await asyncio.gather(*(customer(service) for _ in range(at_a_time)))

    async def deliver(self) -> None:
        """Delivers all messages."""
        with self.peer():
            async with self.service() as (service, settings), connected_relay(settings, service.outbox) as relay:
                tallies = await relay.drain()
        assert all(tally.failed == 0 for tally in tallies.values()), tallies

    async def purge(self) -> None:
        """Deletes all messages."""
        async with self.service() as (service, _):
            await service.outbox.purge(timedelta(0))

    async def expire(self) -> None:
        """Deletes all keys."""
        async with self.service(clock_ahead=timedelta(days=2)) as (service, _):
            await service.keys.delete()

    async def counters(self) -> dict[str, int]:
        """What the server has written since its start. Sessions tell their statistics when they end."""
        for _ in range(SESSIONS_END_TRIES_MAX):
            if not await self.value(OTHERS):
                break
            await asyncio.sleep(0.05)
        else:
            raise TimeoutError("sessions of the service did not end")
        async with await connect(self.url) as connection:
            row = await (await connection.execute(COUNTERS.encode())).fetchone()
        assert row is not None
        return {name: int(value) for name, value in row.items()}

    async def sizes(self) -> dict[str, tuple[str, int]]:
        """The table and the size of each table and index."""
        async with await connect(self.url) as connection:
            cursor = await connection.execute(SIZES.encode())
            return {row["name"]: (row["table"], row["bytes"]) for row in await cursor.fetchall()}


async def measure(server: str, charges: int) -> dict[str, Any]:
    """The whole run."""
    async with await connect(server) as connection:
        for name, value in SERVER.items():
            await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        await connection.execute(b"SELECT pg_reload_conf()")
    async with Template(server) as template, template.copy() as url:
        stage = Footprint(url)
        steps: list[dict[str, Any]] = []

        async def step(name: str, rows: int, work: Awaitable[None]) -> None:
            await stage.execute("CHECKPOINT")
            before = await stage.counters()
            await work
            after = await stage.counters()
            steps.append({"step": name, "rows": rows, **{each: (after[each] - before[each]) / rows for each in after}})
            print(steps[-1], flush=True)

        empty = await stage.sizes()
        for at_a_time, share in ((1, 100), (8, 25), (AT_A_TIME, 1)):
            count = charges // share
            await step(f"charge, {at_a_time} at a time", count, stage.charge(count, at_a_time=at_a_time))
        await step(
            "charge, right after a checkpoint",
            AFTER_CHECKPOINT,
            stage.charge(AFTER_CHECKPOINT, at_a_time=AT_A_TIME),
        )
        payments = await stage.value("SELECT count(*) FROM payments")
        messages = await stage.value("SELECT count(*) FROM outbox")
        await step("message delivered", messages, stage.deliver())
        rows = {
            table: await stage.value(f"SELECT count(*) FROM {table}") / payments
            for table in ("payments", "transactions", "idempotency_keys", "outbox")
        }
        sizes = [
            {"table": table, "name": name, "bytes": (size - empty[name][1]) / payments}
            for name, (table, size) in (await stage.sizes()).items()
            if table in rows
        ]
        await step("message deleted", messages, stage.purge())
        await step("key deleted", payments, stage.expire())
    return {"steps": steps, "rows": rows, "sizes": sizes}


def report(result: dict[str, Any]) -> None:
    """Two tables."""
    print(f"\n{'per row of each step':36}{'rows':>9}{'WAL bytes':>12}{'full pages':>12}{'commits':>10}{'flushes':>10}")
    for each in result["steps"]:
        print(
            f"{each['step']:36}{each['rows']:9,}{each['wal_bytes']:12,.0f}{each['full_pages']:12.2f}"
            f"{each['commits']:10.3f}{each['flushes']:10.3f}"
        )
    print(f"\n{'per payment':36}{'rows':>9}{'bytes':>9}")
    for table, rows in result["rows"].items():
        of_table = [each for each in result["sizes"] if each["table"] == table]
        print(f"{table + ', all':36}{rows:9.2f}{sum(each['bytes'] for each in of_table):9,.0f}")
        for each in of_table:
            print(f"  {each['name']:43}{each['bytes']:9,.0f}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    parser.add_argument("--charges", type=int, default=200_000)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="eci-pay-footprint-")
    # Registered first and so run last: the embedded server is stopped at the exit too.
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    result = asyncio.run(measure(embedded_url(Path(directory)), arguments.charges))
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
