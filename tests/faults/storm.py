"""A storm: replicas that are killed, a database, a gateway and a network that fail, and customers all the while.

Everything is drawn from one seed: what the customers do, where the replicas die, what breaks and when. The clock of the
machine is not, so a seed repeats the plan and not every interleaving.
"""

import asyncio
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import psycopg
from psycopg.rows import dict_row

from eci_pay.messages import Destination
from eci_pay.migrations import bundled_migrations, migrate
from tests.faults.checker import violations
from tests.faults.customers import Customers, History
from tests.faults.ledger_gateway import Ledger, LedgerGateway, read_ledger
from tests.faults.mortal import CLOCK_OFFSET, DIE_AT, DIE_ON, POINTS
from tests.faults.postgres import Cluster
from tests.faults.proxy import HOST, Proxy, free_port
from tests.peers import HANG, RESET, Peers, Reply, Taken, well
from tests.support import Books

ROOT = Path(__file__).parents[2]
REPLICAS = 2
CUSTOMERS = 12
START_SECONDS_MAX = 30.0
LIFE_SECONDS = (1.0, 6.0)
"""How long a replica lives that does not come to the point where it was to die."""
PAUSE_SECONDS = (0.1, 0.8)
"""Between two disturbances."""
DISTURBANCE_SECONDS = (0.05, 1.0)
PAUSE_FACTOR = 8
SETTLE_SECONDS_MAX = 90.0
UNAVAILABLE = 5
"""How a replica ends that finds no database when it starts; it is started again."""
CLOCK_OFFSET_SECONDS_MAX = 11 * 3600
"""Two replicas may be twice that apart, less than the lifetime of an idempotency key."""
WEBHOOK_SECRET = "whsec_storm"
GATEWAY_FAULTS = {
    "delay": 0.15,
    "delay_seconds": 1.2,
    "drop_request": 0.05,
    "error_before": 0.04,
    "drop_answer": 0.08,
    "error_after": 0.05,
    "answer_twice": 0.1,
}
LATE_FAULTS = {"delay": 0.4, "delay_seconds": 8.0, "drop_answer": 0.2}
"""The gateway acts after everybody has given up, the grace period is over, and so is another one, but while what was
booked as never happened is still watched. What it does after that, and tells nobody of, is found by nobody."""
SETTINGS = {
    "ECI_PAY_GATEWAY": "stripe",
    "ECI_PAY_STRIPE_SECRET_KEY": "sk_test_storm",
    "ECI_PAY_STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
    "ECI_PAY_SEND_DEADLINE_SECONDS": "1",
    "ECI_PAY_GATEWAY_TIMEOUT_SECONDS": "1",
    "ECI_PAY_GATEWAY_WAIT_SECONDS": "1",
    "ECI_PAY_SETTLE_RETRY_SECONDS": "2",
    "ECI_PAY_DATABASE_POOL_TIMEOUT_SECONDS": "2",
    "ECI_PAY_LOCK_TIMEOUT_SECONDS": "2",
    "ECI_PAY_STATEMENT_TIMEOUT_SECONDS": "4",
    "ECI_PAY_RECOVERY_INTERVAL_SECONDS": "0.2",
    "ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS": "0.5",
    "ECI_PAY_RECOVERY_LOOK_MAX_SECONDS": "1",
    "ECI_PAY_RECOVERY_GRACE_SECONDS": "3",
    "ECI_PAY_RECOVERY_WATCH_SECONDS": "12",
    "ECI_PAY_RELAY_POLL_SECONDS": "0.1",
    "ECI_PAY_RELAY_TIMEOUT_SECONDS": "1",
    "ECI_PAY_RELAY_RETRY_SECONDS": "0.2",
    "ECI_PAY_RELAY_RETRY_MAX_SECONDS": "1",
    "ECI_PAY_EXPIRE_KEYS_INTERVAL_SECONDS": "0.5",
    "ECI_PAY_SHUTDOWN_TIMEOUT_SECONDS": "10",
}

OFTEN = tuple(point for point in POINTS if "charge" in point or "outbox" in point or "answer" in point)
"""Points that are passed all the time: the replica lives a little before it dies there."""

Disturbance = Callable[[float], Awaitable[None]]


@dataclass
class Figures:
    """What happened in a storm."""

    seed: int
    operations: int = 0
    orders: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    """How often a replica died at each point, or "at random"."""
    disturbances: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    gateway_faults: Counter[str] = field(default_factory=Counter)
    charged: int = 0
    refunded: int = 0
    recovered: Counter[str] = field(default_factory=Counter)
    """How recoveries ended."""
    settle_seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many replicas were killed."""
        return self.deaths.total()


class Replica:
    """A server that is started again whenever it has died."""

    def __init__(self, number: int, port: int, environment: dict[str, str], log: IO[bytes]) -> None:
        self.number = number
        self.port = port
        self.address = f"http://{HOST}:{port}"
        self._environment = environment
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **environment: str) -> None:
        """Starts it and waits until it serves, or has died."""
        command = [sys.executable, "-m", "tests.faults.mortal", "serve", "--port", str(self.port)]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **self._environment, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_SECONDS_MAX):
            while self._process.returncode is None:
                with suppress(aiohttp.ClientError, OSError):
                    async with session.get(self.address + "/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)

    async def died(self, within_seconds: float) -> int | None:
        """How it ended, if it ends in time."""
        assert self._process is not None
        try:
            async with asyncio.timeout(within_seconds):
                return await self._process.wait()
        except TimeoutError:
            return None

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal, if it lives."""
        with suppress(ProcessLookupError):
            if self._process is not None:
                self._process.send_signal(number)

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int | None:
        """Ends it with a signal, if it lives; how it ended."""
        self.tell(number)
        return None if self._process is None else await self._process.wait()


class Storm:
    """One storm from one seed. `points` are where replicas die, in turn; None: drawn."""

    def __init__(self, seed: int, directory: Path, *, points: tuple[str, ...] | None = None) -> None:
        self.seed = seed
        self.history = History()
        self.figures = Figures(seed)
        self._directory = directory
        self._chance = random.Random(f"{seed} storm")
        self._points = None if points is None else iter(points)
        self._is_over = asyncio.Event()
        self._cluster = Cluster()
        self._peers = Peers()
        self._ledger_path = directory / "ledger.sqlite"
        self._replicas: list[Replica] = []

    async def run(self, seconds: float) -> Figures:
        """Rages for so long, or until every point was tried; then calms down and compares the books. What goes wrong
        with the storm itself is a violation too: it must not hide one."""
        try:
            await self._rage(seconds)
        except Exception as error:  # the history is kept all the same
            self.figures.violations.append("the storm broke off: " + "".join(traceback.format_exception(error)))
            self._keep(read_ledger(self._ledger_path))
        return self.figures

    async def _rage(self, seconds: float) -> None:
        async with AsyncExitStack() as stack:
            await self._set_up(stack)
            customers = Customers(
                self.seed, [replica.address for replica in self._replicas], self.history, number=CUSTOMERS
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(customers.business())
                lives = [group.create_task(self._live(replica)) for replica in self._replicas]
                disturbing = group.create_task(self._disturb())
                if self._points is None:
                    await asyncio.sleep(seconds)
                    self._is_over.set()
                await asyncio.gather(*lives)
                self._is_over.set()
                await disturbing
                await self._calm()
                customers.go_home()
            await self._settle()
            await customers.ask_again()
            await self._settle()
            await self._take_stock()

    async def _set_up(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self._cluster)
        await migrate(self._cluster.url, bundled_migrations())
        ports = [free_port() for _ in range(REPLICAS)]
        self._gateway = await stack.enter_async_context(
            LedgerGateway(
                self._ledger_path,
                seed=self.seed,
                search_lag=0.5,
                webhook_url=f"http://{HOST}:{ports[0]}/v1/gateway/events" if self.seed % 2 else None,
                webhook_secret=WEBHOOK_SECRET,
                faults=GATEWAY_FAULTS,
            )
        )
        await stack.enter_async_context(self._peers.running())
        peer_ports = {destination: int(url.rsplit(":", 1)[1]) for destination, url in self._peers.urls.items()}
        to_peers = {destination: await self._proxy(stack, port) for destination, port in peer_ports.items()}
        self._to_peers = list(to_peers.values())
        self._to_database = await self._proxy(stack, self._cluster.port)
        self._to_gateway = await self._proxy(stack, self._gateway.port)
        environment = {
            **SETTINGS,
            **{f"{name.upper()}_SERVICE_URL": f"http://{HOST}:{proxy.port}" for name, proxy in to_peers.items()},
            "DATABASE_URL": self._cluster.url.replace(f":{self._cluster.port}", f":{self._to_database.port}"),
            "ECI_PAY_STRIPE_API_BASE": f"http://{HOST}:{self._to_gateway.port}",
        }
        log = stack.enter_context((self._directory / "replicas.log").open("wb"))
        self._replicas = [Replica(number, port, environment, log) for number, port in enumerate(ports)]
        stack.push_async_callback(self._end_all)

    async def _proxy(self, stack: AsyncExitStack, port: int) -> Proxy:
        return await stack.enter_async_context(Proxy(HOST, port).running())

    async def _end_all(self) -> None:
        for replica in self._replicas:
            await replica.end()

    async def _live(self, replica: Replica) -> None:
        """Starts a replica and lets it die, again and again."""
        chance = random.Random(f"{self.seed} replica {replica.number}")
        while not self._is_over.is_set() and (point := self._next_point(chance)) is not None:
            offset = chance.uniform(-1, 1) * CLOCK_OFFSET_SECONDS_MAX
            on = chance.randint(1, 10 if self._points is None else 3) if point in OFTEN else 1
            environment = {DIE_AT: point, DIE_ON: str(on), CLOCK_OFFSET: f"{offset:.0f}"}
            seconds = chance.uniform(*LIFE_SECONDS) if self._points is None else LIFE_SECONDS[1]
            code: int | None = UNAVAILABLE
            while code == UNAVAILABLE and not self._is_over.is_set():
                await replica.start(**environment)
                code = await replica.died(within_seconds=seconds)
            if code == -signal.SIGKILL:
                self.figures.deaths[point] += 1
            elif code is None:
                await replica.end()
                self.figures.deaths["at random"] += 1
            elif code != UNAVAILABLE:
                self.figures.violations.append(f"replica {replica.number} ended by itself with {code}")

    def _next_point(self, chance: random.Random) -> str | None:
        if self._points is not None:
            return next(self._points, None)
        return chance.choice(POINTS)

    async def _disturb(self) -> None:
        """One thing after another goes wrong, and is mended again."""
        kinds: dict[str, Disturbance] = {
            "database crash": self._crash_database,
            "sessions terminated": self._terminate_sessions,
            "database cut": self._cut(self._to_database),
            "database slow": self._slow(self._to_database),
            "database stalls": self._stall(self._to_database),
            "gateway cut": self._cut(self._to_gateway),
            "gateway slow": self._slow(self._to_gateway),
            "gateway stalls": self._stall(self._to_gateway),
            "gateway refuses": self._refuse(self._to_gateway),
            "gateway killed": self._kill_gateway,
            "replica paused": self._pause_replica,
            "peer cut": self._cut(self._chance.choice(self._to_peers)),
            "peer slow": self._slow(self._chance.choice(self._to_peers)),
            "gateway late": self._late_gateway,
            "peer down": self._fail_peer,
            "peer hangs": self._hang_peer,
        }
        while not self._is_over.is_set():
            await asyncio.sleep(self._chance.uniform(*PAUSE_SECONDS))
            name = self._chance.choice(list(kinds))
            await kinds[name](self._chance.uniform(*DISTURBANCE_SECONDS))
            self.figures.disturbances[name] += 1

    async def _crash_database(self, seconds: float) -> None:
        await self._cluster.stop_immediate()
        await asyncio.sleep(seconds / 2)
        await self._cluster.start()

    async def _terminate_sessions(self, _: float) -> None:
        await self._cluster.terminate_backends()

    def _cut(self, proxy: Proxy) -> Disturbance:
        async def disturb(_: float) -> None:
            proxy.cut()

        return disturb

    def _slow(self, proxy: Proxy) -> Disturbance:
        async def disturb(seconds: float) -> None:
            proxy.delay_seconds = seconds / 10
            await asyncio.sleep(seconds)
            proxy.delay_seconds = 0

        return disturb

    def _stall(self, proxy: Proxy) -> Disturbance:
        async def disturb(seconds: float) -> None:
            proxy.stall()
            await asyncio.sleep(seconds * 2)
            proxy.resume()

        return disturb

    def _refuse(self, proxy: Proxy) -> Disturbance:
        async def disturb(seconds: float) -> None:
            async with proxy.refusing():
                proxy.cut()
                await asyncio.sleep(seconds)

        return disturb

    async def _pause_replica(self, seconds: float) -> None:
        """Holds a replica up, sometimes for longer than any grace: what it was about to send is then booked as never
        happened."""
        replica = self._chance.choice(self._replicas)
        replica.tell(signal.SIGSTOP)
        await asyncio.sleep(seconds * PAUSE_FACTOR)
        replica.tell(signal.SIGCONT)

    async def _kill_gateway(self, seconds: float) -> None:
        await self._gateway.kill()
        await asyncio.sleep(seconds / 2)
        await self._gateway.restart()

    async def _late_gateway(self, seconds: float) -> None:
        await self._gateway.set_faults(**LATE_FAULTS)
        await asyncio.sleep(seconds * 2)
        await self._gateway.set_faults(**GATEWAY_FAULTS)

    async def _fail_peer(self, seconds: float) -> None:
        destination = self._chance.choice(list(Destination))
        await self._peers.shut(destination)
        await asyncio.sleep(seconds)
        await self._peers.start(destination)

    async def _hang_peer(self, seconds: float) -> None:
        destination = self._chance.choice(list(Destination))
        replies = [HANG, RESET, Reply(status=503), Reply(status=500)]
        reply = self._chance.choice(replies)

        def misbehave(_: Taken) -> Reply:
            return reply

        self._peers.behaviour[destination] = misbehave
        await asyncio.sleep(seconds)
        self._peers.behaviour[destination] = well

    async def _calm(self) -> None:
        """Everything works again, and the replicas are well."""
        await self._gateway.set_faults()
        for replica in self._replicas:
            await replica.end()
            await replica.start()

    async def _settle(self) -> None:
        """Waits until nothing is open any more, as long as it may take."""
        started = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS_MAX), self._books() as books:
                while await books.rows(OPEN):  # noqa: ASYNC110 - other processes do it
                    await asyncio.sleep(0.1)
        self.figures.settle_seconds += time.monotonic() - started

    @asynccontextmanager
    async def _books(self) -> AsyncIterator[Books]:
        connecting = psycopg.AsyncConnection.connect(self._cluster.url, autocommit=True, row_factory=dict_row)
        async with await connecting as connection:
            yield Books(connection)

    async def _take_stock(self) -> None:
        """Compares the books and counts what happened."""
        figures, history = self.figures, self.history
        ledger = await self._gateway.ledger()
        async with self._books() as books:
            figures.violations += await violations(books, ledger, history, self._peers)
            figures.orders = await books.value("SELECT count(*) FROM payments")
            for row in await books.rows("SELECT last_result, count(*) AS number FROM recoveries GROUP BY 1"):
                figures.recovered[str(row["last_result"]).split(":")[0]] += row["number"]
        figures.operations = history.operations
        figures.statuses = history.statuses
        figures.cuts = sum(proxy.cuts for proxy in (self._to_database, self._to_gateway, *self._to_peers))
        figures.gateway_faults.update(ledger.faults)
        figures.charged = sum(charge.took_money for charge in ledger.charges)
        figures.refunded = len(ledger.refunds)
        self._keep(ledger)

    def _keep(self, ledger: Ledger) -> None:
        """Writes the history where a violation is to be understood."""
        import json

        if self.figures.violations:
            document: dict[str, Any] = {
                "seed": self.seed,
                "violations": self.figures.violations,
                "requests": [request.document() for request in self.history.requests],
                "charges": [vars(charge) for charge in ledger.charges],
                "refunds": [vars(refund) for refund in ledger.refunds],
            }
            (self._directory / "history.json").write_text(json.dumps(document, indent=1))


OPEN = """
SELECT 1 FROM payments WHERE status = 'PROCESSING' OR refund_pending > 0
UNION ALL SELECT 1 FROM recoveries WHERE state <> 'DONE'
UNION ALL SELECT 1 FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL
LIMIT 1
"""
