"""Several relays over one outbox: each message is delivered by one of them, and each line stays in order."""

import asyncio
import math
import random
import re
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest

from eci_pay.messages import Destination
from eci_pay.outbox import Delivery, LeasedMessage, Outcome
from eci_pay.relay import connected_relay
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.peers import Peers, Reply, Taken, well
from tests.rows import paid
from tests.support import Books, CommandLine, Opener, charge_fields, refund_request, until

ORDER, INVENTORY, NOTIFICATION = Destination
END_SECONDS = 30.0
MESSAGES_OF_A_LIFE = 6


async def lived(service: PaymentService, *order_ids: int) -> None:
    """Whole lives of payments, at once: charged, refunded in part, refunded in full. Each has two messages to order,
    one to inventory, three to notification."""

    async def live(order_id: int) -> None:
        [payment_id] = await paid(service, order_id)
        for amount in ("40.00", None):
            answer = await service.refunds.refund(payment_id=payment_id, request=refund_request(amount))
            assert answer.status_code == 200

    await asyncio.gather(*(live(order_id) for order_id in order_ids))


async def until_all_are_delivered(books: Books) -> None:
    """Waits until no message is open any more."""
    await until(lambda: books.rows("SELECT 1 WHERE NOT EXISTS (SELECT FROM outbox WHERE delivered_at IS NULL)"))


async def assert_all_arrived_in_order(books: Books, peers: Peers, count: int) -> None:
    """So many messages are delivered, and each line was first accepted in the order of its commits."""
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    line_of: dict[int, tuple[str, int]] = {}
    rows = await books.rows("SELECT * FROM outbox ORDER BY sequence")
    for row in rows:
        line_of[row["message_id"]] = (row["destination"], row["payment_id"])
        lines[line_of[row["message_id"]]].append(row["message_id"])
    assert [row["message_id"] for row in rows if row["delivered_at"] is None or row["lease_id"] is not None] == []
    arrived: dict[tuple[str, int], list[int]] = defaultdict(list)
    for message_id in dict.fromkeys(one.message_id for one in peers.accepted()):
        arrived[line_of[message_id]].append(message_id)
    assert arrived == lines
    assert len(rows) == count


@asynccontextmanager
async def relaying(opened: Opener, settings: Settings, peers: Peers, count: int) -> AsyncIterator[None]:
    """Runs that many relays, which share nothing but the database, until the block ends."""
    fields: dict[str, object] = {
        **peers.settings(),
        "eci_pay_relay_poll_seconds": 0.02,
        "eci_pay_relay_timeout_seconds": 5.0,
        "eci_pay_relay_retry_seconds": 0.05,
        "eci_pay_relay_retry_max_seconds": 0.2,
        "eci_pay_relay_concurrency": 4,
    }
    stopped = asyncio.Event()
    async with AsyncExitStack() as stack:
        running = []
        for _ in range(count):
            service = await stack.enter_async_context(opened(**fields))
            relay = await stack.enter_async_context(connected_relay(settings.model_copy(update=fields), service.outbox))
            running.append(asyncio.create_task(relay.run_until(stopped)))
        try:
            yield
        finally:
            stopped.set()
            async with asyncio.timeout(END_SECONDS):
                await asyncio.gather(*running)


@pytest.mark.parametrize("count", [2, 4])
async def test_relays_side_by_side_deliver_each_message_once_and_in_order_while_new_ones_are_committed(
    opened: Opener, settings: Settings, telling: PaymentService, peers: Peers, books: Books, *, count: int
) -> None:
    chance = random.Random(count)
    peers.behaviour = dict.fromkeys(Destination, lambda _: Reply(after_seconds=chance.random() * 0.02))
    await lived(telling, *range(1, 31))
    async with relaying(opened, settings, peers, count):
        for first in range(31, 91, 20):
            await lived(telling, *range(first, first + 20))
        await until_all_are_delivered(books)
    assert peers.worked_on_at_once() == []
    assert peers.repeated() == {}
    assert len(peers.taken) == 90 * MESSAGES_OF_A_LIFE
    await assert_all_arrived_in_order(books, peers, 90 * MESSAGES_OF_A_LIFE)


@pytest.mark.parametrize("count", [2, 4])
async def test_relays_side_by_side_keep_the_order_where_peers_fail_at_random(
    opened: Opener, settings: Settings, telling: PaymentService, peers: Peers, books: Books, *, count: int
) -> None:
    chance = random.Random(10 + count)

    def moody(_: Taken) -> Reply:
        return Reply(chance.choice([500, 503, 429, 408, 302]) if chance.random() < 0.3 else 200)

    peers.behaviour = dict.fromkeys(Destination, moody)
    async with relaying(opened, settings, peers, count):
        for first in range(1, 61, 20):
            await lived(telling, *range(first, first + 20))
        await until_all_are_delivered(books)
    assert len(peers.taken) > len(peers.accepted())
    assert peers.worked_on_at_once() == []
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers, 60 * MESSAGES_OF_A_LIFE)


async def test_claims_at_the_same_time_never_hand_a_message_out_twice_nor_two_of_a_line(
    opened: Opener, telling: PaymentService, books: Books
) -> None:
    """Eight claim as fast as they can, and end deliveries at random; each tells when it works on a line."""
    chance = random.Random(8)
    lives = 60
    in_work: set[int] = set()
    finished: dict[int, list[int]] = defaultdict(list)
    faults: list[str] = []

    def note(message: LeasedMessage) -> None:
        if message.payment_id in in_work:
            faults.append(f"message {message.message_id}: its line is worked on already")
        in_work.add(message.payment_id)

    async def claim_and_end(service: PaymentService) -> None:
        while sum(map(len, finished.values())) < 3 * lives:
            claimed = await service.outbox.claim(NOTIFICATION, count_max=chance.randint(1, 20), lease_seconds=60)
            for message in claimed:
                note(message)
            await asyncio.sleep(chance.random() * 0.01)
            outcomes = [chance.choice([Outcome.DELIVERED, Outcome.FAILED, Outcome.RELEASED]) for _ in claimed]
            for message, outcome in zip(claimed, outcomes, strict=True):
                in_work.remove(message.payment_id)
                if outcome is Outcome.DELIVERED:
                    finished[message.payment_id].append(message.message_id)
            deliveries = [Delivery(message=m, outcome=o) for m, o in zip(claimed, outcomes, strict=True)]
            assert len(await service.outbox.mark(deliveries)) == len(claimed)

    await lived(telling, *range(1, lives + 1))
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(opened()) for _ in range(8)]
        async with asyncio.timeout(END_SECONDS):
            await asyncio.gather(*(claim_and_end(service) for service in services))
    assert faults == []
    rows = await books.rows(
        "SELECT payment_id, array_agg(message_id ORDER BY sequence) AS line FROM outbox"
        " WHERE destination = 'notification' GROUP BY payment_id"
    )
    assert finished == {row["payment_id"]: row["line"] for row in rows}


# Processes


@dataclass
class Running:
    """A command that runs, and what it has said on standard error."""

    process: asyncio.subprocess.Process
    said: list[str] = field(default_factory=list)

    async def read(self) -> None:
        """Reads what it says until it ends."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(line.decode())

    async def until_said(self, pattern: str) -> str:
        """Waits until it has said something, and returns the part that was asked for."""

        async def found() -> bool:
            return re.search(pattern, "".join(self.said)) is not None

        await until(found)
        match = re.search(pattern, "".join(self.said))
        assert match is not None
        return match[1]

    async def end(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def running(command_line: CommandLine, *arguments: str) -> AsyncIterator[Running]:
    """Runs a command; kills it in the end if it still runs."""
    command = Running(await command_line.start(*arguments))
    reading = asyncio.create_task(command.read())
    try:
        yield command
    finally:
        with suppress(ProcessLookupError):
            command.process.kill()
        await command.process.wait()
        await reading


def with_peers(command_line: CommandLine, peers: Peers, **more: object) -> CommandLine:
    """The installed command, which tells the peers, two at a time."""
    variables = {
        **command_line.environment,
        **peers.environment(),
        "ECI_PAY_RELAY_POLL_SECONDS": "0.02",
        "ECI_PAY_RELAY_CONCURRENCY": "2",
        **{name: str(value) for name, value in more.items()},
    }
    return CommandLine(variables, command_line.directory)


def most_at_once(peers: Peers, destination: Destination) -> int:
    """How many requests of a destination were under way at the same time."""
    found = [one for one in peers.taken if one.destination is destination]
    return max(sum(one.started <= at.started < (one.ended or math.inf) for one in found) for at in found)


async def lived_over_http(client: httpx.AsyncClient, order_id: int) -> None:
    """As `lived`, for one order."""
    fields = charge_fields(order_id, payment_method="UPI")
    key = {"Idempotency-Key": f"pay {order_id}"}
    charged = await client.post("/v1/payments/charge", json=fields, headers=key)
    assert charged.status_code == 201
    for part in ({"amount": "40.00"}, {}):
        body = {**part, "reason": "Customer changed their mind"}
        refunded = await client.post(f"{charged.headers['Location']}/refund", json=body)
        assert refunded.status_code == 200


async def test_two_relay_processes_and_a_server_deliver_side_by_side_and_end_with_exit_code_0(
    command_line: CommandLine, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, lambda _: Reply(after_seconds=0.02))
    told = with_peers(command_line, peers)
    async with (
        running(told, "relay") as first,
        running(told, "relay") as second,
        running(told, "serve", "--port", "0") as server,
    ):
        await first.until_said("(delivering to order)")
        await second.until_said("(delivering to order)")
        address = await server.until_said(r"running on (http://[\d.]+:\d+)")
        async with httpx.AsyncClient(base_url=address, timeout=END_SECONDS) as client:
            await asyncio.gather(*(lived_over_http(client, order_id) for order_id in range(1, 51)))
        await until_all_are_delivered(books)
        codes = await asyncio.gather(first.end(), second.end(), server.end())
    assert list(codes) == [0, 0, 0]
    assert "Traceback" not in "".join(first.said + second.said + server.said)
    assert peers.worked_on_at_once() == []
    assert peers.repeated() == {}
    assert most_at_once(peers, NOTIFICATION) > 2  # more than one process may have under way
    await assert_all_arrived_in_order(books, peers, 50 * MESSAGES_OF_A_LIFE)


async def test_relay_processes_that_are_stopped_amid_their_work_book_what_was_taken_and_give_back_the_rest(
    command_line: CommandLine, telling: PaymentService, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, lambda _: Reply(after_seconds=0.1))
    await lived(telling, *range(1, 41))
    told = with_peers(command_line, peers)
    async with running(told, "relay") as first, running(told, "relay") as second:
        await first.until_said("(delivering to order)")
        await second.until_said("(delivering to order)")

        async def amid_their_work() -> bool:
            return len(peers.taken) >= 24

        await until(amid_their_work)
        codes = await asyncio.gather(first.end(), second.end())
    assert list(codes) == [0, 0]
    assert "Traceback" not in "".join(first.said + second.said)
    accepted = {one.message_id for one in peers.accepted()}
    assert 24 <= len(accepted) == len(peers.taken) < 40 * MESSAGES_OF_A_LIFE
    rows = await books.rows("SELECT * FROM outbox")
    assert {row["message_id"] for row in rows if row["delivered_at"] is not None} == accepted
    assert {(row["lease_id"], row["attempts"]) for row in rows if row["delivered_at"] is None} == {(None, 0)}
    peers.behaviour = dict.fromkeys(Destination, well)
    rest = await told.run("relay", "--once", "--json")
    assert rest.exit_code == 0
    assert sum(peer["delivered"] for peer in rest.json) == len(rows) - len(accepted)
    assert peers.worked_on_at_once() == []
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers, 40 * MESSAGES_OF_A_LIFE)


async def test_what_a_killed_relay_had_leased_another_one_delivers_when_the_leases_end(
    command_line: CommandLine, telling: PaymentService, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, lambda _: Reply(after_seconds=0.1))
    await lived(telling, *range(1, 21))

    async def amid_its_work() -> bool:
        return len(peers.accepted()) >= 6 and len(peers.taken) > len(peers.accepted())

    async with running(with_peers(command_line, peers, ECI_PAY_RELAY_TIMEOUT_SECONDS=0.5), "relay") as killed:
        await until(amid_its_work)
        killed.process.kill()
        await killed.process.wait()
    begun = {one.message_id for one in peers.taken}
    leased = await books.value("SELECT count(*) FROM outbox WHERE lease_id IS NOT NULL")
    assert leased > 0
    peers.behaviour = dict.fromkeys(Destination, well)
    async with running(with_peers(command_line, peers), "relay") as other:
        await until_all_are_delivered(books)
        assert await other.end() == 0
    assert peers.repeated().keys() <= begun
    assert len(peers.repeated()) <= leased
    await assert_all_arrived_in_order(books, peers, 20 * MESSAGES_OF_A_LIFE)
