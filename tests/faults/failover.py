"""A failover: the primary of a synchronous pair is killed under load, and some time later its standby is promoted.

Customers go on charging and refunding at a real server all the while; then the books are compared, as after a storm.

    python -m tests.faults.failover --times=10 --pooler=none
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psycopg
from psycopg.rows import dict_row

from eci_pay.migrations import bundled_migrations, migrate
from tests.faults.checker import violations
from tests.faults.customers import GOOD_CARD, Customers, History
from tests.faults.ledger_gateway import LedgerGateway
from tests.faults.pgbouncer import Bouncer
from tests.faults.postgres import Cluster
from tests.faults.proxy import HOST, free_port
from tests.faults.storm import SETTINGS, SETTLE_SECONDS_MAX, Replica
from tests.peers import Peers
from tests.support import Books

CUSTOMERS = 24
CHARGED_BEFORE = 40
"""How many charges are acknowledged before the primary is killed."""
LOAD_SECONDS_AFTER = 1.5
RESUME_SECONDS_MAX = 30.0
PROBE_SECONDS_MAX = 20.0
PROBE_PAUSE_SECONDS = 0.05
OWN_ORDER = 1_000_000
"""Of the charge that is tried while there is no primary."""
OF_THE_DATABASE = ("DATABASE", "LOCK", "STATEMENT", "SETTLE")
SERVER = {
    **{name: value for name, value in SETTINGS.items() if not any(part in name for part in OF_THE_DATABASE)},
    "ECI_PAY_SEND_DEADLINE_SECONDS": "3",
    "ECI_PAY_GATEWAY_TIMEOUT_SECONDS": "3",
    "ECI_PAY_GATEWAY_WAIT_SECONDS": "5",
    "ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS": "3",
    "ECI_PAY_RECOVERY_GRACE_SECONDS": "7",
}
"""How long it waits for its database is left to the defaults; it sends what has waited for that, and looks only for
what a failover has left."""
OPEN = """
SELECT 1 FROM payments WHERE status = 'PROCESSING' OR refund_pending > 0
UNION ALL SELECT 1 FROM recoveries WHERE state IN ('OPEN', 'LATE')
UNION ALL SELECT 1 FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL
LIMIT 1
"""
"""Not what was booked as never happened: this gateway is never late."""
BEHIND_A_POOLER = {"ECI_PAY_LOCK_TIMEOUT_SECONDS": "0", "ECI_PAY_STATEMENT_TIMEOUT_SECONDS": "0"}
"""The role has them instead."""
LIMITS_OF_ROLE = "ALTER ROLE postgres SET lock_timeout = '5s'; ALTER ROLE postgres SET statement_timeout = '30s'"

POOLERS = ("none", "old", "new")
"""None; a PgBouncer that carries no prepared statements; one that does."""


@dataclass
class Figures:
    """What a failover came to; instants are in seconds after the kill."""

    seed: int
    promoted_at: float = 0.0
    """When the standby was told to be the primary."""
    charged_at: float = 0.0
    """When the first charge after that was acknowledged."""
    ready_at: float = 0.0
    """When the server called itself ready again."""
    probes: list[tuple[int, str | None]] = field(default_factory=list)
    """What a charge was answered that was sent without a primary, and when to try again; then its repetition."""
    readiness: Counter[int] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    orders: int = 0
    settle_seconds: float = 0.0
    recovered: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    @property
    def resumed_seconds(self) -> float:
        """From the promotion to the first acknowledged charge."""
        return self.charged_at - self.promoted_at


class Failover:
    """One failover, `outage_seconds` after which the standby is promoted."""

    def __init__(
        self,
        seed: int,
        directory: Path,
        *,
        pooler: str = "none",
        outage_seconds: float = 2.0,
        settings: dict[str, str] | None = None,
    ) -> None:
        assert pooler in POOLERS
        self.figures = Figures(seed)
        self.history = History()
        self._seed = seed
        self._directory = directory
        self._pooler = pooler
        self._outage_seconds = outage_seconds
        self._settings = settings or {}
        self._peers = Peers()

    async def run(self) -> Figures:
        """Sets everything up, lets the primary die, and compares the books afterwards."""
        async with AsyncExitStack() as stack:
            await self._set_up(stack)
            customers = Customers(self._seed, [self._replica.address], self.history, number=CUSTOMERS)
            async with asyncio.TaskGroup() as group:
                group.create_task(customers.business())
                await self._until(lambda: self._charged() >= CHARGED_BEFORE)
                await self._fail_over()
                await asyncio.sleep(LOAD_SECONDS_AFTER)
                customers.go_home()
            await self._settle()
            await customers.ask_again()
            await self._settle()
            await self._take_stock()
        return self.figures

    async def _set_up(self, stack: AsyncExitStack) -> None:
        self._primary = await stack.enter_async_context(Cluster())
        await migrate(self._primary.url, bundled_migrations())
        self._standby = await stack.enter_async_context(Cluster(standby_of=self._primary))
        await self._primary.wait_for_standbys()
        self._gateway = await stack.enter_async_context(
            LedgerGateway(self._directory / "ledger.sqlite", seed=self._seed, search_lag=0.2)
        )
        await stack.enter_async_context(self._peers.running())
        environment = {
            **SERVER,
            **{f"{name.upper()}_SERVICE_URL": url for name, url in self._peers.urls.items()},
            "ECI_PAY_STRIPE_API_BASE": self._gateway.url,
            **(await self._way_to_the_database(stack)),
            **self._settings,
        }
        log = stack.enter_context((self._directory / "replica.log").open("wb"))
        self._replica = Replica(0, free_port(), environment, log)
        stack.push_async_callback(self._replica.end)
        await self._replica.start()

    async def _way_to_the_database(self, stack: AsyncExitStack) -> dict[str, str]:
        """The settings that name it."""
        self._bouncer: Bouncer | None = None
        if self._pooler == "none":
            hosts = ",".join(f"{HOST}:{cluster.port}" for cluster in (self._primary, self._standby))
            return {"DATABASE_URL": f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"}
        async with await psycopg.AsyncConnection.connect(self._primary.url, autocommit=True) as connection:
            await connection.execute(LIMITS_OF_ROLE)
        prepares = self._pooler == "new"
        self._bouncer = await stack.enter_async_context(Bouncer(self._primary, carries_prepared=prepares))
        prepared = {"ECI_PAY_PREPARE_STATEMENTS": str(prepares).lower()}
        return {"DATABASE_URL": self._bouncer.url, **prepared, **BEHIND_A_POOLER}

    async def _fail_over(self) -> None:
        """Kills the primary, looks at how its absence is borne, and measures how soon it is over."""
        killed_at = time.monotonic()
        await self._primary.kill()
        probing = asyncio.create_task(self._probe_charge())
        watching = asyncio.create_task(self._watch_readiness(killed_at))
        await asyncio.sleep(killed_at + self._outage_seconds - time.monotonic())
        told_before = len(self._acknowledged())
        self.figures.promoted_at = time.monotonic() - killed_at
        await self._standby.promote()
        if self._bouncer is not None:
            self._bouncer.point_to(self._standby)
        await self._until(lambda: len(self._acknowledged()) > told_before)
        self.figures.charged_at = self._acknowledged()[told_before] - (killed_at - self.history.started)
        async with asyncio.timeout(PROBE_SECONDS_MAX):
            await probing
            await watching
            await self._probe_charge()

    async def _probe_charge(self) -> None:
        """Charges an order of its own, each time the same."""
        body = {"order_id": OWN_ORDER, "user_id": 1, "amount": "5.00", "payment_method": "CREDIT_CARD"}
        body["payment_token"] = GOOD_CARD
        async with aiohttp.ClientSession() as session:
            address = f"{self._replica.address}/v1/payments/charge"
            async with session.post(address, json=body, headers={"Idempotency-Key": "no primary"}) as response:
                self.figures.probes.append((response.status, response.headers.get("Retry-After")))

    async def _watch_readiness(self, killed_at: float) -> None:
        """Asks the server whether it is ready, until it is not, and is again after the promotion."""
        async with aiohttp.ClientSession() as session:
            while not self.figures.ready_at:
                async with session.get(f"{self._replica.address}/health/ready") as response:
                    self.figures.readiness[response.status] += 1
                    if response.status == 200 and self.figures.promoted_at:
                        self.figures.ready_at = time.monotonic() - killed_at
                await asyncio.sleep(PROBE_PAUSE_SECONDS)

    def _acknowledged(self) -> list[float]:
        """When charges were acknowledged, in seconds after the history began."""
        charges = (request for request in self.history.requests if request.kind == "charge")
        return sorted(told.at for request in charges for told in request.told if told.status == 201)

    def _charged(self) -> int:
        return len(self._acknowledged())

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(RESUME_SECONDS_MAX):
            while not condition():  # noqa: ASYNC110 - the history has no event for it
                await asyncio.sleep(0.01)

    async def _settle(self) -> None:
        """Waits until nothing is open any more."""
        started = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS_MAX), self._books() as books:
                while await books.rows(OPEN):  # noqa: ASYNC110 - other processes do it
                    await asyncio.sleep(0.1)
        self.figures.settle_seconds += time.monotonic() - started

    @asynccontextmanager
    async def _books(self) -> AsyncIterator[Books]:
        connecting = psycopg.AsyncConnection.connect(self._standby.url, autocommit=True, row_factory=dict_row)
        async with await connecting as connection:
            yield Books(connection)

    async def _take_stock(self) -> None:
        figures = self.figures
        async with self._books() as books:
            figures.violations += await violations(books, await self._gateway.ledger(), self.history, self._peers)
            figures.orders = await books.value("SELECT count(*) FROM payments")
            for row in await books.rows("SELECT last_result, count(*) AS number FROM recoveries GROUP BY 1"):
                figures.recovered[str(row["last_result"]).split(":", maxsplit=1)[0]] += row["number"]
        figures.statuses = self.history.statuses


async def main(options: argparse.Namespace) -> int:
    """Runs some, one after another; tells how many violations there were."""
    runs: list[Figures] = []
    for seed in range(options.first, options.first + options.times):
        directory = Path(tempfile.mkdtemp(prefix=f"eci-failover-{seed}-"))
        settings = dict(setting.split("=", 1) for setting in options.setting)
        run = Failover(seed, directory, pooler=options.pooler, outage_seconds=options.outage, settings=settings)
        figures = await run.run()
        print(
            f"seed {seed}: promoted {figures.promoted_at:.2f} s after the kill, charged {figures.charged_at:.2f} s, "
            f"ready {figures.ready_at:.2f} s; {figures.orders} orders, {sorted(figures.statuses.items())}, "
            f"probes {figures.probes}, readiness {dict(figures.readiness)}, settled in {figures.settle_seconds:.1f} s, "
            f"recovered {dict(figures.recovered)}, {len(figures.violations)} violations",
            *figures.violations,
            sep="\n",
            flush=True,
        )
        runs.append(figures)
    for what, seconds in {
        "from the kill to the first charge": [run.charged_at for run in runs],
        "from the promotion to the first charge": [run.resumed_seconds for run in runs],
    }.items():
        print(f"{what}: {min(seconds):.2f} to {max(seconds):.2f} s, median {statistics.median(seconds):.2f} s")
    return sum(len(run.violations) for run in runs)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.failover", description="Failovers under load")
    parser.add_argument("--times", type=int, default=10, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--outage", type=float, default=2.0, help="seconds between the kill and the promotion")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the server")
    parser.add_argument("--pooler", choices=POOLERS, default="none", help="a PgBouncer that prepares nothing, or does")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main(options())) else 0)
