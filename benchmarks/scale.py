"""Whether size slows eci-pay down: `make bench BENCH=scale`.

Loads 10 million payments with their audit rows and keys (COPY, some minutes; 40 GB of disk), in a data directory of its
own, and compares charges with those on an empty database in turns; then times pages of the list and the expiry of a
million keys and scrapes of the metrics beside charges.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from psycopg.conninfo import make_conninfo

from benchmarks.charges import Charging
from benchmarks.stage import Stage, Template
from eci_pay.database import connect, create_database
from eci_pay.embedded import embedded_url
from eci_pay.migrations import bundled_migrations, migrate

DATABASE = "eci_pay_benchmark_scale"
CONNECTIONS = 128
ORDERS_MAX = 100_000_000
"""More than any step charges."""
PAGES = 20
"""How many of each list are timed."""
SCRAPES = 20
SCRAPE_SECONDS = 1.0
"""How often the metrics are scraped beside charges; Prometheus would do it every 15 seconds."""

PAYMENTS = """
SELECT n AS payment_id, n AS order_id, 1 + (hashint8(n) & 1048575) AS user_id, 1 + n % 9000 AS amount, 'INR',
       (ARRAY['UPI', 'CREDIT_CARD', 'DEBIT_CARD', 'NET_BANKING', 'COD', 'WALLET'])[1 + n % 6] AS payment_method,
       CASE WHEN n % 1000 = 0 THEN 'PENDING' WHEN n % 100 = 1 THEN 'CANCELLED' WHEN n % 25 = 2 THEN 'FAILED'
            ELSE 'COMPLETED' END AS status,
       'TXN01JD' || lpad(upper(to_hex(n)), 12, '0') || upper(left(md5(n::text), 10)) AS transaction_id,
       'REF' || upper(left(md5('reference' || n), 12)) AS reference, 'AUTH' || upper(left(md5('auth' || n), 12)),
       'Approved', at, at, at, at, 2
FROM generate_series(1, {payments}) AS n,
     LATERAL (SELECT now() - interval '365 days' * (1 - n::float8 / {payments}) AS at) AS _
"""
LOADS = {
    "payments (payment_id, order_id, user_id, amount, currency, payment_method, status, transaction_id, reference,"
    " authorization_code, gateway_response, created_at, updated_at, completed_at, captured_at,"
    " last_sequence)": PAYMENTS,
    "transactions (payment_id, transaction_type, amount, status, description, created_at)": """
SELECT n, 'PAYMENT', 1 + n % 9000, status, description, now() - interval '365 days' * (1 - n::float8 / {payments})
FROM generate_series(1, {payments}) AS n,
     (VALUES ('PROCESSING', 'Charge begun'), ('COMPLETED', 'Charge approved: AUTH0123456789AB'))
         AS t (status, description)
""",
}
"""What is copied into each table."""
KEYS_TABLE = (
    "idempotency_keys (idempotency_key, caller, payment_id, request_hash, response_body, status_code, created_at,"
    " expires_at)"
)
KEYS = """
SELECT md5('{name}' || n), '', n, repeat('0', 64), '{{' || repeat('x', 1000) || '}}', 201, now() - interval '1 day',
       now() + interval '{expires_in}'
FROM generate_series(1, {keys}) AS n
"""

LISTS = (
    (),
    ("status=COMPLETED",),
    ("status=PENDING",),
    ("status=PROCESSING",),
    ("user_id",),
    ("user_id", "status=COMPLETED"),
    ("payment_method=WALLET",),
    ("day",),
    ("day", "status=FAILED"),
)
"""The filters of lists; without a value, one is chosen for each page. 1 payment in 1,000 is PENDING, none is
PROCESSING."""


def _chosen(filter_: str, chance: random.Random) -> dict[str, str]:
    """The part of a query that a filter is."""
    name, _, value = filter_.partition("=")
    if name == "user_id":
        return {name: str(chance.randrange(1, 1_048_576))}
    if name == "day":
        day = datetime.now(UTC).date() - timedelta(days=chance.randrange(1, 360))
        return {"created_from": day.isoformat(), "created_to": (day + timedelta(days=1)).isoformat()}
    return {name: value}


class Scale(Charging):
    """A database with many payments."""

    loads = LOADS

    async def load(self, payments: int) -> None:
        """Copies them in, and lets the planner know."""
        for table, query in self.loads.items():
            await self._copy(table, query.format(payments=payments))
        await self._copy(KEYS_TABLE, KEYS.format(name="live", keys=payments, expires_in="20 days"))
        async with await connect(self.url) as connection:
            # Payments alone were copied with their ids.
            await connection.execute(
                b"SELECT setval(pg_get_serial_sequence('payments', 'payment_id'), max(payment_id)) FROM payments"
            )
            await connection.execute(b"VACUUM (FREEZE, ANALYZE)")
            await connection.execute(b"CHECKPOINT")

    async def load_expired(self, keys: int) -> None:
        """Copies keys in that have expired."""
        await self._copy(KEYS_TABLE, KEYS.format(name="expired", keys=keys, expires_in="-1 hour"))
        await self.execute("CHECKPOINT")

    async def _copy(self, table: str, query: str) -> None:
        started = time.monotonic()
        async with await connect(self.url) as source, await connect(self.url) as target:
            # It is right by construction; checking each row's references would take longer than the copy.
            await target.execute(b"SET session_replication_role = replica")
            async with (
                source.cursor().copy(f"COPY ({query}) TO STDOUT".encode()) as reading,
                target.cursor().copy(f"COPY {table} FROM STDIN".encode()) as writing,
            ):
                async for block in reading:
                    await writing.write(block)
        print(f"{table.split(maxsplit=1)[0]}: {time.monotonic() - started:.0f} s", flush=True)

    async def sizes(self) -> dict[str, str]:
        """What takes how much space."""
        async with await connect(self.url) as connection:
            cursor = await connection.execute(
                b"SELECT relname, pg_size_pretty(pg_relation_size(oid)) AS size FROM pg_class"
                b" WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"
                b" ORDER BY pg_relation_size(oid) DESC LIMIT 14"
            )
            return {row["relname"]: row["size"] for row in await cursor.fetchall()}

    def list_pages(self, payments: int) -> dict[str, dict[str, float]]:
        """How long pages take over HTTP, in ms: first ones, some after a random cursor, and the deepest by number."""
        chance, told = random.Random(1), {}  # noqa: S311 - chooses pages
        with self.serving() as address, httpx.Client(base_url=address, timeout=120) as client:
            for filters in LISTS:
                times = []
                for number in range(PAGES + 1):
                    query = {key: value for name in filters for key, value in _chosen(name, chance).items()}
                    if number % 2:
                        query["cursor"] = str(chance.randrange(payments // 100, payments))
                    elif number % 4 == 0 and not filters:
                        query |= {"page": "1000", "page_size": "100"}
                    started = time.perf_counter()
                    client.get("/v1/payments", params=query).raise_for_status()
                    times.append((time.perf_counter() - started) * 1000)
                times = times[1:]  # the first one also warms up
                told[" and ".join(filters) or "all"] = {
                    "median_ms": round(median(times), 1),
                    "max_ms": round(max(times), 1),
                }
        return told

    def scrapes(self) -> dict[str, float]:
        """How long a scrape of the metrics takes over HTTP while nothing else goes on, in ms."""
        with self.serving() as address:
            scrape(address)  # warms up
            times = [scrape(address) for _ in range(SCRAPES)]
        return {"median_ms": round(median(times), 1), "max_ms": round(max(times), 1)}

    async def expire(self, keys: int, per_second: float, seconds: int) -> dict[str, Any]:
        """Charges at a rate, first alone, then while so many expired keys are deleted."""
        first = await self.value("SELECT max(order_id) + 1 AS n FROM payments")
        pace = {"DELAY_MS": str(1000 * CONNECTIONS / per_second), "FIRST_ORDER_ID": str(first)}
        with ExitStack() as stack:
            # Its own expiry in the background would be there first.
            address = stack.enter_context(self.serving(ECI_PAY_EXPIRE_KEYS_INTERVAL_SECONDS="86400"))
            alone = self.wrk(address, "charge.lua", seconds=seconds, connections=CONNECTIONS, **pace)
            await self.load_expired(keys)
            pace["FIRST_ORDER_ID"] = str(first + ORDERS_MAX)
            loop = asyncio.get_running_loop()
            charging = loop.run_in_executor(
                None, lambda: self.wrk(address, "charge.lua", seconds=seconds, connections=CONNECTIONS, **pace)
            )
            started = time.monotonic()
            await loop.run_in_executor(None, lambda: self.run("expire-keys"))
            took = time.monotonic() - started
            beside = await charging
        return {"expired": keys, "seconds": round(took, 1), "alone": alone, "beside": beside}


async def measure(server: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    url = make_conninfo(server, dbname=DATABASE)
    async with await connect(server) as connection:
        found = await (await connection.execute(b"SELECT FROM pg_database WHERE datname = %s", [DATABASE])).fetchone()
    scale = Scale(url)
    if found is None:
        async with await connect(server) as connection:
            await connection.execute(b"ALTER SYSTEM SET max_wal_size = '8GB'")
            await connection.execute(b"SELECT pg_reload_conf()")
        await migrate(await create_database(server, DATABASE), bundled_migrations())
        await scale.load(arguments.payments)
    else:
        await migrate(url, bundled_migrations())
    result: dict[str, Any] = {"payments": arguments.payments, "sizes": await scale.sizes(), "empty": [], "full": []}
    print(result["sizes"], flush=True)
    first = await scale.value("SELECT max(order_id) + 1 AS n FROM payments")
    async with Template(server) as template:
        for _ in range(arguments.rounds):
            async with template.copy() as empty:
                result["empty"].append(charged(Stage(empty), first, arguments.seconds))
            print("empty", result["empty"][-1], flush=True)
            result["full"].append(charged(scale, first, arguments.seconds))
            print("full", result["full"][-1], flush=True)
            first += ORDERS_MAX
    result["lists"] = scale.list_pages(arguments.payments)
    result["scrapes"], result["beside_scrapes"] = scale.scrapes(), []
    for _ in range(arguments.rounds):
        result["beside_scrapes"].append(charged_beside_scrapes(scale, first, arguments.seconds))
        print("beside scrapes", result["beside_scrapes"][-1], flush=True)
        first += ORDERS_MAX
    rate = median(each["per_second"] for each in result["full"])
    result["expiry"] = await scale.expire(arguments.payments // 10, rate / 2, arguments.expiry_seconds)
    return result


def charged(stage: Stage, first_order_id: int, seconds: int) -> dict[str, Any]:
    """Charges, nobody told: what a relay takes does not depend on the size."""
    with stage.serving() as address:
        warm_up = str(first_order_id + ORDERS_MAX // 2)
        stage.wrk(address, "charge.lua", seconds=2, connections=CONNECTIONS, FIRST_ORDER_ID=warm_up)
        return stage.wrk(
            address, "charge.lua", seconds=seconds, connections=CONNECTIONS, FIRST_ORDER_ID=str(first_order_id)
        )


def charged_beside_scrapes(stage: Stage, first_order_id: int, seconds: int) -> dict[str, Any]:
    """Charges in two halves at one server: alone, then while it is scraped all the time."""
    times: list[float] = []
    ended = threading.Event()

    def scraping() -> None:
        while not ended.wait(SCRAPE_SECONDS):
            times.append(scrape(address))

    with stage.serving() as address:
        orders = {"FIRST_ORDER_ID": str(first_order_id)}
        stage.wrk(address, "charge.lua", seconds=2, connections=CONNECTIONS, **orders)
        orders = {"FIRST_ORDER_ID": str(first_order_id + ORDERS_MAX // 3)}
        alone = stage.wrk(address, "charge.lua", seconds=seconds, connections=CONNECTIONS, **orders)
        orders = {"FIRST_ORDER_ID": str(first_order_id + ORDERS_MAX // 3 * 2)}
        thread = threading.Thread(target=scraping)
        thread.start()
        try:
            beside = stage.wrk(address, "charge.lua", seconds=seconds, connections=CONNECTIONS, **orders)
        finally:
            ended.set()
            thread.join()
    return {"alone": alone, "beside": beside, "scrape_ms": round(median(times), 1)}


def scrape(address: str) -> float:
    """How long one took, in ms."""
    started = time.perf_counter()
    httpx.get(f"{address}/metrics", timeout=60).raise_for_status()
    return (time.perf_counter() - started) * 1000


def report(result: dict[str, Any]) -> None:
    """What it comes to."""
    empty, full = (median(each["per_second"] for each in result[name]) for name in ("empty", "full"))
    print(
        f"\ncharges: {full:,.0f}/s with {result['payments']:,} payments, {empty:,.0f}/s with none: {full / empty:.2f}"
    )
    for name, times in result["lists"].items():
        print(f"a page of {name:32} median {times['median_ms']:7.1f} ms, at most {times['max_ms']:7.1f} ms")
    scrapes, beside = result["scrapes"], result["beside_scrapes"]
    kept = median(each["beside"]["per_second"] / each["alone"]["per_second"] for each in beside)
    under_load_ms = median(each["scrape_ms"] for each in beside)
    print(
        f"a scrape: median {scrapes['median_ms']} ms, at most {scrapes['max_ms']} ms, {under_load_ms} ms under load; "
        f"one every {SCRAPE_SECONDS:g} s leaves {kept:.2f} of the charges"
    )
    expiry = result["expiry"]
    print(
        f"{expiry['expired']:,} keys expired in {expiry['seconds']} s; charges at half the load had a p99 of "
        f"{expiry['alone']['p99_ms']} ms alone, {expiry['beside']['p99_ms']} ms beside it"
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--payments", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement of charges")
    parser.add_argument("--expiry-seconds", type=int, default=40, help="of charges beside the expiry of keys")
    parser.add_argument(
        "--data-dir", type=Path, help="kept, and taken as it is the next time; a temporary one if left out"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = arguments.data_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="eci-pay-scale-"))
        )
        result = asyncio.run(measure(embedded_url(directory), arguments))
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
