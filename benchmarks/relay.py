"""How fast messages are delivered, and whether a backlog of them slows charges: `python -m benchmarks.relay`.

On one PostgreSQL (embedded, fsync on) and this machine's cores: a backlog of messages is drained by one relay and by
two, to peers that cost next to nothing; then `serve` is charged by wrk with an empty outbox and with a backlog, in
turns. Each step verifies that what the peers took is what the outbox held.
"""

import argparse
import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from psycopg.conninfo import make_conninfo

from benchmarks.stage import Stage
from eci_pay.database import create_database, drop_database
from eci_pay.embedded import embedded_url
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.settings import load_settings

DATABASE = "eci_pay_benchmark_relay"
MESSAGES_PER_PAYMENT = 2
DRAIN_SECONDS_MAX = 900

OUTBOXES = {
    "empty": "with an empty outbox at the start, the peers down",
    "waiting": "with a backlog, the peers down",
    "draining": "while a backlog is drained on the same cores",
}

BACKLOG = """
WITH paid AS (
    INSERT INTO payments (order_id, user_id, amount, payment_method, status, transaction_id, last_sequence)
    SELECT first + n, 7, 100, 'UPI', 'COMPLETED', 'TXNBACKLOG' || first + n, 2
    FROM generate_series(1, %(payments)s::bigint) AS n, (SELECT coalesce(max(order_id), 0) AS first FROM payments) AS f
    RETURNING payment_id
)
INSERT INTO outbox (payment_id, sequence, destination, event, payload)
SELECT payment_id, sequence, destination, 'payment.completed', payload
FROM paid
CROSS JOIN LATERAL (VALUES
    (1, 'order', jsonb_build_object('payment_id', payment_id, 'payment_status', 'COMPLETED')),
    (2, 'notification', jsonb_build_object('user_id', 7, 'type', 'PAYMENT_SUCCESS', 'channel', 'EMAIL', 'message',
        'Your payment of 100.00 INR was received. Reference: REFABCDEFGHIJKL.'))
) AS m (sequence, destination, payload)
"""


class Bench(Stage):
    """One run, over one database."""

    def __init__(self, url: str, messages: int) -> None:
        super().__init__(url)
        self.payments = messages // MESSAGES_PER_PAYMENT

    async def pending(self) -> int:
        """How many messages are not delivered."""
        return int(await self.value("SELECT count(*) AS n FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL"))

    async def fill(self) -> None:
        """Makes a backlog."""
        await self.execute("TRUNCATE outbox")
        await self.execute(BACKLOG, payments=self.payments)
        await self.execute("VACUUM ANALYZE outbox")
        await self.execute("VACUUM ANALYZE payments")
        await self.execute("CHECKPOINT")

    async def drain(self, relays: int) -> dict[str, Any]:
        """Delivers a backlog with so many relay processes."""
        await self.fill()
        messages = await self.pending()
        with self.peer() as peer:
            started = time.perf_counter()
            first_left: int | None = None
            with ExitStack() as stack:
                for _ in range(relays):
                    stack.enter_context(self.running("relay", ECI_PAY_RELAY_MESSAGES_PER_SECOND_MAX="1000000"))
                while left := await self.pending():
                    if first_left is None and left < messages:
                        started, first_left = time.perf_counter(), left  # what starting takes is not delivering
                    if time.perf_counter() - started > DRAIN_SECONDS_MAX:
                        raise TimeoutError(f"{left} messages are left after {DRAIN_SECONDS_MAX} s")
                    await asyncio.sleep(0.1)
                seconds = time.perf_counter() - started
        requests, different = peer()
        assert different == messages, f"{different} of {messages} messages arrived"
        return {
            "relays": relays,
            "messages": messages,
            "seconds": round(seconds, 2),
            "messages_per_second": round((first_left or 0) / seconds),
            "sent_twice": requests - different,
        }

    async def charge(self, outbox: str, first_order_id: int, seconds: int, connections: int) -> dict[str, Any]:
        """Charges over HTTP, the relay in a process of its own."""
        await (self.execute("TRUNCATE outbox") if outbox == "empty" else self.fill())
        with ExitStack() as stack:
            if outbox == "draining":
                stack.enter_context(self.peer())
            stack.enter_context(self.running("relay"))
            address = stack.enter_context(self.serving())
            told = self.wrk(
                address,
                "charge.lua",
                seconds=seconds,
                connections=connections,
                FIRST_ORDER_ID=str(first_order_id),
            )
        assert told["errors"] == 0, told
        return {"outbox": outbox, **told}


async def measure(server: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    await drop_database(server, DATABASE)
    url = await create_database(server, DATABASE)
    await migrate(url, bundled_migrations())
    bench = Bench(make_conninfo(url), arguments.messages)
    result: dict[str, Any] = {"drains": [], "charges": []}
    try:
        for _ in range(arguments.rounds):
            for relays in (1, 2):
                result["drains"].append(await bench.drain(relays))
                print(result["drains"][-1], flush=True)
        first_order_id = 1_000_000_000
        for _ in range(arguments.rounds):
            for outbox in OUTBOXES:
                charged = await bench.charge(outbox, first_order_id, arguments.seconds, arguments.connections)
                first_order_id += 1_000_000_000
                result["charges"].append(charged)
                print(result["charges"][-1], flush=True)
    finally:
        await drop_database(server, DATABASE)
    return result


def report(result: dict[str, Any]) -> None:
    """The medians, as ratios too."""
    rate = {
        relays: median(d["messages_per_second"] for d in result["drains"] if d["relays"] == relays) for relays in (1, 2)
    }
    one = [d for d in result["drains"] if d["relays"] == 1]
    print(
        f"\none relay:  {rate[1]:,.0f} messages/s; a backlog of {one[0]['messages']:,} takes "
        f"{median(d['seconds'] for d in one):.1f} s"
    )
    print(f"two relays: {rate[2]:,.0f} messages/s, {rate[2] / rate[1]:.2f} times one")
    charges = {
        outbox: median(c["per_second"] for c in result["charges"] if c["outbox"] == outbox) for outbox in OUTBOXES
    }
    for outbox, meaning in OUTBOXES.items():
        ratio = charges[outbox] / charges["empty"]
        print(f"charges:    {charges[outbox]:,.0f}/s, {ratio:.2f} times, {meaning}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of charging")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--database-url", help="a server of your own; the embedded one if left out")
    arguments = parser.parse_args()
    server = arguments.database_url or embedded_url(load_settings().embedded_data_dir())
    result = asyncio.run(measure(server, arguments))
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
