"""Processes that deliver messages are killed at any moment: every message arrives, in order, and few arrive twice."""

import asyncio
import random
import signal
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from eci_pay.messages import Destination
from eci_pay.service import PaymentService
from tests.peers import HANG, Peers, Reply, Taken, well
from tests.rows import paid
from tests.support import FAULTS_IN_BOOKS, Books, CommandLine, charge_fields, refund_request, until
from tests.test_cli import elsewhere
from tests.test_relay_commands import end, requests, running, tally
from tests.test_serving import Serving, charge, serving

SEED = 20_261_101
KILLS_OF_EACH_REPLICA = 5
REQUESTS_BEFORE_KILL = (10, 80)
CUSTOMERS = 6
DECLINED_AMOUNT = "4000.02"
ANSWER_SECONDS_MAX = 0.06

TOLD_OF: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("PAYMENT", "COMPLETED"): [("order", "COMPLETED"), ("notification", "PAYMENT_SUCCESS")],
    ("PAYMENT", "FAILED"): [("order", "FAILED"), ("inventory", "Payment failed"), ("notification", "PAYMENT_FAILED")],
    ("PAYMENT", "CANCELLED"): [("order", "CANCELLED"), ("inventory", "Payment cancelled")],
    ("REFUND", "REFUNDED"): [("notification", "PAYMENT_REFUNDED")],
    ("PAYMENT", "REFUNDED"): [("order", "REFUNDED"), ("inventory", "Payment refunded")],
}
"""Who is told what of each row of an audit trail, by the contracts of those services; of other rows, nobody."""

PATHS = {
    "order": ("PATCH", "/v1/orders/{order_id}/payment-status"),
    "inventory": ("POST", "/v1/inventory/release"),
    "notification": ("POST", "/v1/notifications"),
}


@pytest.fixture
def relaying(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The installed command, which knows the peers and does not wait long for anything."""
    return elsewhere(
        command_line,
        ECI_PAY_RELAY_TIMEOUT_SECONDS="0.5",
        ECI_PAY_RELAY_POLL_SECONDS="0.05",
        ECI_PAY_RELAY_RETRY_SECONDS="0.2",
        **peers.environment(),
    )


@dataclass
class Shop:
    """Customers who charge, refund and cancel at whichever server is up, and bear with those that are not."""

    chance: random.Random
    open: list[Serving] = field(default_factory=list)
    closes: bool = False
    orders: int = 0
    answered: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """The statuses with which a server has answered about each payment."""

    async def business(self) -> None:
        """What one customer does, until the shop closes."""
        async with httpx.AsyncClient(timeout=30) as client:
            while not self.closes:
                if not self.open:
                    await asyncio.sleep(0.01)
                    continue
                try:
                    await self._purchase(client)
                except httpx.TransportError:
                    await asyncio.sleep(0.01)

    async def _purchase(self, client: httpx.AsyncClient) -> None:
        self.orders += 1
        order_id = self.orders
        kind = self.chance.choice(["kept", *4 * ["given back"], "declined", "cancelled"])
        fields = charge_fields(
            order_id,
            amount=DECLINED_AMOUNT if kind == "declined" else "100.00",
            payment_method="COD" if kind == "cancelled" else "CREDIT_CARD",
        )
        headers = {"Idempotency-Key": f"order {order_id}"}
        charged = await client.post(self._url("/v1/payments/charge"), json=fields, headers=headers)
        assert charged.status_code == (402 if kind == "declined" else 201), charged.text
        path = f"/v1/payments/{self._note(charged)}"
        if kind == "given back":
            for part in ({"amount": "40.00"}, {"amount": "25.00"}, {}):
                body = {"reason": "Customer changed their mind", **part}
                refunded = await client.post(self._url(f"{path}/refund"), json=body)
                assert refunded.status_code == 200, refunded.text
                self._note(refunded)
        if kind == "cancelled":
            cancelled = await client.delete(self._url(path))
            assert cancelled.status_code == 200, cancelled.text
            self._note(cancelled)

    def _url(self, path: str) -> str:
        """A path at any server that is up; at one that refuses connections, where there is none."""
        return (self.chance.choice(self.open).address if self.open else "http://127.0.0.1:1") + path

    def _note(self, answer: httpx.Response) -> int:
        payment_id: int = answer.json()["payment_id"]
        self.answered[payment_id].add(answer.status_code)
        return payment_id


@dataclass
class Kills:
    """Ends replicas without a word, and remembers what was in delivery then, by any of them."""

    command_line: CommandLine
    books: Books
    peers: Peers
    shop: Shop
    done: int = 0
    leases: set[tuple[int, uuid.UUID]] = field(default_factory=set)
    """The messages that were in delivery at a kill, each with its lease."""

    async def of_a_replica(self) -> None:
        """Starts it and kills it, again and again, each time after so many requests to the peers."""
        for _ in range(KILLS_OF_EACH_REPLICA):
            async with serving(self.command_line) as server:
                self.shop.open.append(server)
                await requests(self.peers, self.shop.chance.randint(*REQUESTS_BEFORE_KILL))
                self.shop.open.remove(server)
                assert await server.end(signal.SIGKILL) == -signal.SIGKILL
            self.done += 1
            leased = await self.books.rows("SELECT message_id, lease_id FROM outbox WHERE lease_id IS NOT NULL")
            self.leases.update((row["message_id"], row["lease_id"]) for row in leased)


async def test_whenever_replicas_are_killed_every_message_arrives_in_order_and_nothing_is_lost(
    relaying: CommandLine, books: Books, peers: Peers
) -> None:
    chance = random.Random(SEED)
    slow_down(peers, chance)
    shop = Shop(chance)
    kills = Kills(relaying, books, peers, shop)
    async with asyncio.TaskGroup() as group:
        for _ in range(CUSTOMERS):
            group.create_task(shop.business())
        await asyncio.gather(kills.of_a_replica(), kills.of_a_replica())
        shop.closes = True
    recovers_soon = elsewhere(
        relaying, ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS="0.5", ECI_PAY_RECOVERY_INTERVAL_SECONDS="0.1"
    )
    async with serving(recovers_soon) as last:
        await all_settled(books)
        await all_delivered(books)
        assert await last.end(signal.SIGTERM) == 0

    assert kills.done == 2 * KILLS_OF_EACH_REPLICA
    assert kills.leases, "no kill met a delivery: nothing was tried out"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    await assert_answers_are_kept(books, shop)
    await assert_every_change_was_told(books)
    await assert_messages_arrived_as_they_are(books, peers)
    await assert_lines_arrived_in_order(books, peers)
    kills_met = Counter(message_id for message_id, _ in kills.leases)
    assert {
        message_id: times for message_id, times in peers.repeated().items() if times > 1 + kills_met[message_id]
    } == {}
    assert peers.worked_on_at_once() == []


async def test_what_a_killed_relay_was_delivering_waits_for_the_lease_and_comes_again_as_the_same_message(
    relaying: CommandLine, books: Books, peers: Peers, telling: PaymentService
) -> None:
    (payment_id,) = await paid(telling, 1)
    await telling.refunds.refund(payment_id=payment_id, request=refund_request())
    peers.behaviour[Destination.ORDER] = lambda _: HANG
    async with running(relaying, "relay") as killed:
        await until(lambda: sent(peers, Destination.ORDER))
        assert await end(killed, signal.SIGKILL) == -signal.SIGKILL
    left = await books.rows("SELECT * FROM outbox WHERE destination = 'order' ORDER BY sequence")
    assert [row["lease_id"] is not None for row in left] == [True, False]
    assert [row["attempts"] for row in left] == [0, 0]
    peers.behaviour[Destination.ORDER] = well

    async with running(relaying, "relay") as other:
        await all_delivered(books)
        assert await end(other, signal.SIGTERM) == 0
    first, again = peers.tries(left[0]["message_id"])
    assert (first.status, again.status) == (None, 200)
    assert (again.headers["idempotency-key"], again.path, again.body) == (
        first.headers["idempotency-key"],
        first.path,
        first.body,
    )
    assert [one.body["payment_status"] for one in peers.accepted(Destination.ORDER)] == ["COMPLETED", "REFUNDED"]
    delivered = await books.rows("SELECT * FROM outbox WHERE destination = 'order' ORDER BY sequence")
    assert delivered[0]["delivered_at"] >= left[0]["next_attempt_at"]  # when the lease of the killed one ended
    assert delivered[1]["delivered_at"] >= delivered[0]["delivered_at"]
    assert [row["attempts"] for row in delivered] == [1, 1]
    await assert_messages_arrived_as_they_are(books, peers)


async def test_what_a_server_has_answered_is_told_by_a_relay_run_after_its_kill(
    relaying: CommandLine, books: Books, peers: Peers
) -> None:
    orders = range(1, 21)
    never_looks = elsewhere(relaying, ECI_PAY_RELAY_POLL_SECONDS="60")
    async with serving(never_looks) as server, server.client() as client:
        charging = [asyncio.create_task(charge(client, order_id, key=f"k{order_id}")) for order_id in orders]
        await asyncio.wait(charging, return_when=asyncio.FIRST_COMPLETED)
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        ends = await asyncio.gather(*charging, return_exceptions=True)
    answered = [end for end in ends if isinstance(end, httpx.Response)]
    assert {answer.status_code for answer in answered} == {201}
    assert peers.taken == []

    result = await elsewhere(relaying, ECI_PAY_RELAY_TIMEOUT_SECONDS="5").run("relay", "--once", "--json")
    assert result.exit_code == 0
    committed = await books.rows("SELECT payment_id FROM payments WHERE status = 'COMPLETED'")
    assert result.json == [tally(each, delivered=0 if each == "inventory" else len(committed)) for each in Destination]
    told = [one.body["payment_id"] for one in peers.accepted(Destination.ORDER)]
    assert sorted(told) == sorted(row["payment_id"] for row in committed)
    assert {answer.json()["payment_id"] for answer in answered} <= set(told)
    assert peers.repeated() == {}
    await assert_every_change_was_told(books)
    await assert_messages_arrived_as_they_are(books, peers)


async def test_what_a_killed_server_was_delivering_is_not_touched_by_a_relay_before_the_lease_has_ended(
    relaying: CommandLine, books: Books, peers: Peers
) -> None:
    peers.behaviour[Destination.ORDER] = lambda _: HANG
    long_leases = elsewhere(relaying, ECI_PAY_RELAY_TIMEOUT_SECONDS="60")
    async with serving(long_leases) as server, server.client() as client:
        assert (await charge(client)).status_code == 201
        await until(lambda: sent(peers, Destination.ORDER))
        await until(lambda: books.rows("SELECT 1 FROM outbox WHERE delivered_at IS NOT NULL"))  # the notification
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    peers.behaviour[Destination.ORDER] = well
    early = await relaying.run("relay", "--once", "--json")
    untouched = [tally(Destination.ORDER, pending=1), tally(Destination.INVENTORY), tally(Destination.NOTIFICATION)]
    assert (early.exit_code, early.json) == (0, untouched)
    assert len(peers.taken) == 2
    await books.rows("UPDATE outbox SET next_attempt_at = now() WHERE lease_id IS NOT NULL")
    late = await relaying.run("relay", "--once", "--json")
    assert (late.exit_code, late.json[0]) == (0, tally(Destination.ORDER, delivered=1))
    first, again = [one for one in peers.taken if one.destination is Destination.ORDER]
    assert (first.status, again.status, again.message_id) == (None, 200, first.message_id)
    await assert_messages_arrived_as_they_are(books, peers)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_server_stopped_under_load_exits_0_and_everything_arrives_exactly_once(
    relaying: CommandLine, books: Books, peers: Peers, workers: int
) -> None:
    chance = random.Random(SEED + workers)
    slow_down(peers, chance)
    shop = Shop(chance)
    # A machine that is busy may take long to answer; only what was not answered is sent again.
    falls_behind = elsewhere(relaying, ECI_PAY_RELAY_CONCURRENCY="1", ECI_PAY_RELAY_TIMEOUT_SECONDS="5")
    async with asyncio.TaskGroup() as group:
        for _ in range(CUSTOMERS):
            group.create_task(shop.business())
        async with serving(falls_behind, workers=workers) as server:
            shop.open.append(server)
            await requests(peers, 60)
            exit_code = await server.end(signal.SIGTERM)
        shop.closes = True
    assert exit_code == 0
    assert "Traceback" not in "\n".join(server.log)
    assert await books.rows("SELECT * FROM outbox WHERE lease_id IS NOT NULL") == []
    assert await books.rows("SELECT * FROM payments WHERE status = 'PROCESSING' OR refund_pending > 0") == []
    assert [one for one in peers.taken if one.ended is None] == []

    rest = await elsewhere(relaying, ECI_PAY_RELAY_TIMEOUT_SECONDS="5").run("relay", "--once", "--json")
    assert rest.exit_code == 0
    assert sum(each["delivered"] for each in rest.json) > 0, "nothing was left at the stop: nothing was tried out"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    await assert_answers_are_kept(books, shop)
    await assert_every_change_was_told(books)
    await assert_messages_arrived_as_they_are(books, peers)
    await assert_lines_arrived_in_order(books, peers)
    assert peers.repeated() == {}
    assert peers.worked_on_at_once() == []


async def sent(peers: Peers, destination: Destination) -> bool:
    """Whether a peer was sent anything."""
    return any(one.destination is destination for one in peers.taken)


def slow_down(peers: Peers, chance: random.Random) -> None:
    """Lets each answer take a moment."""

    def answer(_: Taken) -> Reply:
        return Reply(after_seconds=chance.uniform(0, ANSWER_SECONDS_MAX))

    for destination in Destination:
        peers.behaviour[destination] = answer


async def all_settled(books: Books) -> None:
    """Waits until recovery has settled what the killed have left."""

    async def reached() -> bool:
        unknown = "SELECT FROM payments WHERE status = 'PROCESSING' OR refund_pending > 0"
        return not await books.rows(unknown)

    await until(reached)


async def all_delivered(books: Books) -> None:
    """Waits until no message is pending."""

    async def reached() -> bool:
        return bool(await books.value("SELECT count(*) = 0 FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL"))

    await until(reached)


async def assert_answers_are_kept(books: Books, shop: Shop) -> None:
    """What a customer was told of stands in the books."""
    status_of = {row["payment_id"]: row["status"] for row in await books.rows("SELECT * FROM payments")}
    for payment_id, answers in shop.answered.items():
        if 402 in answers:
            assert status_of[payment_id] == "FAILED"
        else:
            assert status_of[payment_id] != "PROCESSING"


async def assert_every_change_was_told(books: Books) -> None:
    """Each payment has the messages of its audit trail, in its order, and no others."""
    expected: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for row in await books.rows("SELECT * FROM transactions ORDER BY transaction_log_id"):
        expected[row["payment_id"]] += TOLD_OF.get((row["transaction_type"], row["status"]), [])
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for row in await books.rows("SELECT * FROM outbox ORDER BY payment_id, sequence"):
        found[row["payment_id"]].append((row["destination"], what_it_says(row["payload"])))
        assert row["sequence"] == len(found[row["payment_id"]])
    assert found == {payment_id: messages for payment_id, messages in expected.items() if messages}


def what_it_says(payload: dict[str, Any]) -> str:
    """The part of a message's body that differs by change."""
    kind: str = payload.get("payment_status") or payload.get("type") or payload["reason"]
    return kind


async def assert_messages_arrived_as_they_are(books: Books, peers: Peers) -> None:
    """Every message is delivered, was accepted by its peer, and no request said anything else."""
    rows = await books.rows("SELECT * FROM outbox JOIN payments USING (payment_id)")
    assert [row for row in rows if row["delivered_at"] is None or row["lease_id"] is not None] == []
    messages = {row["message_id"]: row for row in rows}
    assert {one.message_id for one in peers.accepted()} == messages.keys()
    for one in peers.taken:
        row = messages[one.message_id]
        method, path = PATHS[row["destination"]]
        assert (one.destination, one.method) == (row["destination"], method)
        assert (one.path, one.body) == (path.format(order_id=row["order_id"]), row["payload"])


async def assert_lines_arrived_in_order(books: Books, peers: Peers) -> None:
    """The messages of one payment to one peer were first accepted in the order of its changes."""
    rows = await books.rows("SELECT * FROM outbox ORDER BY payment_id, sequence")
    line_of = {row["message_id"]: (row["payment_id"], row["destination"]) for row in rows}
    assert by_line(line_of, dict.fromkeys(one.message_id for one in peers.accepted())) == by_line(line_of, line_of)


def by_line(line_of: dict[int, tuple[int, str]], message_ids: Iterable[int]) -> dict[tuple[int, str], list[int]]:
    """The messages of each line, in the order in which they are given."""
    lines: dict[tuple[int, str], list[int]] = defaultdict(list)
    for message_id in message_ids:
        lines[line_of[message_id]].append(message_id)
    return lines
