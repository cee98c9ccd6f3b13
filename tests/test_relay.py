"""The relay against services that misbehave: every message ends as it should, and nobody else waits for it."""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import psycopg
import pytest

from eci_pay.background import background_tasks
from eci_pay.errors import Unavailable
from eci_pay.lanes import BOOK_GATHER_SECONDS, Tally
from eci_pay.messages import Destination
from eci_pay.outbox import PURGE_BATCH_SIZE_MAX
from eci_pay.relay import Relay, connected_relay
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.door import Door
from tests.peers import HANG, RESET, Behaviour, Peers, Reply, Taken, well
from tests.rows import paid
from tests.support import Books, ManualClock, Opener, Relays, charge_request, refund_request, until

ORDER, INVENTORY, NOTIFICATION = Destination
PATIENT = {"eci_pay_relay_timeout_seconds": 5.0}
"""Where nothing may be sent twice: a machine that is busy may take long to answer."""
TRIES = {ORDER: 3, INVENTORY: 2, NOTIFICATION: 2}
"""How often one delivery tries."""
LATER_SECONDS = 60.0
"""When a failed delivery is repeated, where a test wants it to end before that."""
END_SECONDS = 30.0
"""How long the slowest of these relays may take to end."""
DECLINED_AMOUNT = "4000.02"

TAKEN_FOR_DOWN = "is taken for down"
RECONNECTING = "reconnection attempt in pool"


# What happens to payments, and what came of the messages


async def failed(service: PaymentService, *order_ids: int) -> None:
    """Declined charges: each tells all three services."""
    for order_id in order_ids:
        request = charge_request(order_id, amount=DECLINED_AMOUNT)
        answer = await service.charges.charge(request=request, idempotency_key=f"fail {order_id}")
        assert answer.status_code == 402


async def refunded(service: PaymentService, *payment_ids: int, amount: str | None = None) -> None:
    """Refunds of payments: in full where no amount is given."""
    for payment_id in payment_ids:
        answer = await service.refunds.refund(payment_id=payment_id, request=refund_request(amount))
        assert answer.status_code == 200


async def lived(service: PaymentService, *order_ids: int) -> None:
    """Whole lives of payments, at once: charged, refunded in part, refunded in full. Each has two messages to order,
    one to inventory, three to notification."""

    async def live(order_id: int) -> None:
        [payment_id] = await paid(service, order_id)
        await refunded(service, payment_id, amount="40.00")
        await refunded(service, payment_id)

    await asyncio.gather(*(live(order_id) for order_id in order_ids))


async def messages(books: Books, destination: Destination | None = None, *, order_id: int = 0) -> list[dict[str, Any]]:
    """The messages of a destination and an order, or of all, in the order of their commits."""
    return await books.rows(
        "SELECT m.*, order_id, CASE WHEN delivered_at IS NOT NULL THEN 'delivered' WHEN dead_at IS NOT NULL THEN 'dead'"
        " WHEN lease_id IS NOT NULL THEN 'leased' ELSE 'pending' END AS state"
        " FROM outbox m JOIN payments USING (payment_id) WHERE %s IN ('', destination) AND %s IN (0, order_id)"
        " ORDER BY payment_id, sequence",
        destination or "",
        order_id,
    )


async def states(books: Books, destination: Destination | None = None, *, order_id: int = 0) -> list[str]:
    """Their states, in the same order."""
    return [row["state"] for row in await messages(books, destination, order_id=order_id)]


async def only(books: Books, destination: Destination, *, order_id: int = 0) -> dict[str, Any]:
    """The only such message."""
    [row] = await messages(books, destination, order_id=order_id)
    return row


async def now(books: Books) -> datetime:
    """By the database's clock, as schedules are."""
    moment: datetime = await books.value("SELECT clock_timestamp()")
    return moment


async def make_due(books: Books) -> None:
    """Makes every message due that waits for its next delivery."""
    await books.rows("UPDATE outbox SET next_attempt_at = now() WHERE delivered_at IS NULL AND dead_at IS NULL")


async def until_all(books: Books, state: str, *destinations: Destination) -> None:
    """Waits until every message of these destinations, or of all, is in a state."""

    async def reached() -> bool:
        return not await books.value(
            "SELECT count(*) FROM outbox WHERE destination = ANY (%s) AND NOT"
            " CASE %s WHEN 'delivered' THEN delivered_at IS NOT NULL ELSE dead_at IS NOT NULL END",
            list(destinations or Destination),
            state,
        )

    await until(reached)


async def until_told(caplog: pytest.LogCaptureFixture, words: str, times: int = 1) -> None:
    """Waits until the log has said something so often."""

    async def told() -> bool:
        return sum(words in line for line in caplog.messages) >= times

    await until(told)


async def until_asked(peers: Peers, destination: Destination, times: int) -> None:
    """Waits until a peer has been sent that many requests."""

    async def asked() -> bool:
        return len(requests(peers, destination)) >= times

    await until(asked)


def requests(peers: Peers, destination: Destination) -> list[Taken]:
    """What a peer was sent, whatever it answered."""
    return [one for one in peers.taken if one.destination is destination]


async def assert_all_arrived_in_order(books: Books, peers: Peers) -> None:
    """Every message is delivered, and each line was first accepted in the order of its commits."""
    assert set(await states(books)) == {"delivered"}
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    line_of: dict[int, tuple[str, int]] = {}
    for row in await messages(books):
        line_of[row["message_id"]] = (row["destination"], row["payment_id"])
        lines[line_of[row["message_id"]]].append(row["message_id"])
    arrived: dict[tuple[str, int], list[int]] = defaultdict(list)
    for message_id in dict.fromkeys(one.message_id for one in peers.accepted()):
        arrived[line_of[message_id]].append(message_id)
    assert arrived == lines


# Relays and peers


@asynccontextmanager
async def delivering(relay: Relay) -> AsyncIterator[None]:
    """Runs a relay until the block ends, and then until it has ended by itself."""
    stopped = asyncio.Event()
    running = asyncio.create_task(relay.run_until(stopped))
    try:
        yield
    finally:
        stopped.set()
        async with asyncio.timeout(END_SECONDS):
            await running


async def drain(relays: Relays, **changed: object) -> dict[Destination, Tally]:
    """What a relay books that delivers what is due, and ends; what fails is not repeated before that."""
    async with relays(**{"eci_pay_relay_retry_seconds": LATER_SECONDS, **changed}) as relay:
        async with asyncio.timeout(END_SECONDS):
            return await relay.drain()


def always(reply: Reply) -> Behaviour:
    """The same answer to everything."""
    return lambda _: reply


def order_of(one: Taken) -> int:
    """Which order a request to the Order service is about."""
    return int(one.path.split("/")[3])


def telling_of(one: Taken) -> tuple[int, str]:
    """Which order it is about, and what it says of its payment."""
    return order_of(one), one.body["payment_status"]


Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class BluntServer:
    """Answers every request with the same bytes, be they HTTP or not, and counts connections and requests.

    After bytes the connection stays open; a function may close it.
    """

    answer: Answer
    url: str = ""
    connections: int = 0
    paths: list[str] = field(default_factory=list)
    under_way_max: int = 0
    _under_way: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["BluntServer"]:
        """Serves on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                await self._take(reader, writer)
        self._open.discard(writer)
        writer.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        self.paths.append(head.split(" ")[1])
        self._under_way += 1
        self.under_way_max = max(self.under_way_max, self._under_way)
        try:
            if isinstance(self.answer, bytes):
                writer.write(self.answer)
            else:
                await self.answer(writer)
            await writer.drain()
        finally:
            self._under_way -= 1


def and_close(answer: bytes) -> Answer:
    """These bytes, and then the connection's end."""

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    return say


def in_two_parts(first: bytes, second: bytes) -> Answer:
    """The second part comes when the first has surely arrived."""

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(second)

    return say


async def silence(_: asyncio.StreamWriter) -> None:
    """No answer for a long time."""
    await asyncio.sleep(600)


# How often a message is tried


async def test_a_peer_that_fails_is_tried_a_few_times_and_its_message_is_put_off(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, always(Reply(500, body="out of order")))
    await failed(telling, 1)
    started = await now(books)
    assert await drain(relays) == dict.fromkeys(Destination, Tally(failed=1))
    ended = await now(books)
    assert Counter(one.destination for one in peers.taken) == TRIES
    rows = await messages(books)
    assert [row["destination"] for row in rows] == list(Destination)
    for row in rows:
        assert (row["state"], row["attempts"], row["lease_id"]) == ("pending", 1, None)
        assert row["last_error"] == "HTTP 500 Because: out of order"
        assert started <= row["first_attempt_at"] <= ended
        assert started + timedelta(seconds=0.8 * LATER_SECONDS) <= row["next_attempt_at"]
        assert row["next_attempt_at"] <= ended + timedelta(seconds=LATER_SECONDS)


async def test_every_try_says_the_same_under_the_same_key(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, always(Reply(500)))
    await failed(telling, 1)
    await drain(relays)
    await make_due(books)
    peers.behaviour = dict.fromkeys(Destination, well)
    await drain(relays)
    for row in await messages(books):
        tries = peers.tries(row["message_id"])
        assert [one.status for one in tries] == [500] * TRIES[Destination(row["destination"])] + [200]
        assert all(
            (one.method, one.path, one.body) == (tries[0].method, tries[0].path, row["payload"]) for one in tries
        )


async def test_a_delivery_that_succeeds_at_its_second_try_is_not_put_off(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    def at_the_second_try(one: Taken) -> Reply:
        return Reply(503 if len(peers.tries(one.message_id)) == 1 else 200)

    peers.behaviour = dict.fromkeys(Destination, at_the_second_try)
    await failed(telling, 1)
    assert await drain(relays) == dict.fromkeys(Destination, Tally(delivered=1))
    assert Counter(one.destination for one in peers.taken) == dict.fromkeys(Destination, 2)
    for row in await messages(books):
        assert (row["state"], row["attempts"], row["last_error"]) == ("delivered", 1, None)


async def test_the_distance_between_deliveries_doubles_up_to_its_maximum(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour[INVENTORY] = always(Reply(500))
    await failed(telling, 1)
    for attempts, seconds in ((1, 10), (2, 20), (3, 40), (4, 60), (5, 60), (2_000_001, 60)):
        await books.rows("UPDATE outbox SET attempts = %s - 1 WHERE destination = 'inventory'", attempts)
        await make_due(books)
        started = await now(books)
        tallies = await drain(relays, eci_pay_relay_retry_seconds=10.0, eci_pay_relay_retry_max_seconds=60.0)
        assert tallies[INVENTORY] == Tally(failed=1)
        row = await only(books, INVENTORY)
        assert row["attempts"] == attempts
        assert started + timedelta(seconds=0.8 * seconds) <= row["next_attempt_at"]
        assert row["next_attempt_at"] <= await now(books) + timedelta(seconds=seconds)


@pytest.mark.parametrize("reply", [Reply(500), Reply(503, {"Retry-After": "7200"})])
@pytest.mark.parametrize("ends_well", [False, True])
async def test_after_72_hours_a_message_is_tried_a_last_time(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, *, reply: Reply, ends_well: bool
) -> None:
    peers.behaviour[INVENTORY] = always(reply)
    await failed(telling, 1)
    await drain(relays)
    in_ten_seconds = "first_attempt_at = now() - interval '72 hours' + interval '10 seconds'"
    await books.rows(f"UPDATE outbox SET {in_ten_seconds} WHERE destination = 'inventory'")
    await make_due(books)
    await drain(relays)
    row = await only(books, INVENTORY)
    assert (row["state"], row["attempts"]) == ("pending", 2)
    assert row["next_attempt_at"] == row["first_attempt_at"] + timedelta(hours=72)
    await books.rows(
        "UPDATE outbox SET next_attempt_at = next_attempt_at - interval '1 minute',"
        " first_attempt_at = first_attempt_at - interval '1 minute' WHERE destination = 'inventory'"
    )
    sent = len(requests(peers, INVENTORY))
    if ends_well:
        peers.behaviour[INVENTORY] = well
    tallies = await drain(relays)
    row = await only(books, INVENTORY)
    assert (row["state"], row["attempts"]) == ("delivered" if ends_well else "dead", 3)
    assert row["last_error"] == f"HTTP {reply.status} Because: {{}}"
    assert tallies[INVENTORY] == (Tally(delivered=1) if ends_well else Tally(dead=1))
    assert len(requests(peers, INVENTORY)) - sent == (2 if reply.status == 500 and not ends_well else 1)
    await books.rows("UPDATE outbox SET next_attempt_at = now()")
    sent = len(peers.taken)
    await drain(relays)
    assert len(peers.taken) == sent


# What a peer asks for with Retry-After


async def test_a_short_retry_after_is_waited_for_while_other_messages_are_sent(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    def busy_at_first(status: int) -> Behaviour:
        def answer(one: Taken) -> Reply:
            first = one.message_id == requests(peers, one.destination)[0].message_id
            busy = first and len(peers.tries(one.message_id)) == 1
            return Reply(status, {"Retry-After": "1"}) if busy else Reply()

        return answer

    peers.behaviour = {ORDER: busy_at_first(503), INVENTORY: busy_at_first(429), NOTIFICATION: well}
    await failed(telling, 1, 2, 3)
    await drain(relays, eci_pay_relay_timeout_seconds=5.0, eci_pay_relay_concurrency=1)
    for destination in (ORDER, INVENTORY):
        first, *others, last = requests(peers, destination)
        assert (last.message_id, last.status) == (first.message_id, 200)
        assert first.ended is not None
        assert last.started - first.ended >= 0.99
        assert [(one.status, one.started < last.started) for one in others] == [(200, True)] * 2
        rows = await messages(books, destination)
        assert [(row["state"], row["attempts"]) for row in rows] == [("delivered", 1)] * 3


async def test_a_long_retry_after_ends_the_delivery_and_says_when_the_next_one_is(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    date = (datetime.now(UTC) + timedelta(minutes=10)).replace(microsecond=0)
    peers.behaviour = {
        ORDER: always(Reply(503, {"Retry-After": "120"})),
        INVENTORY: always(Reply(429, {"Retry-After": format_datetime(date, usegmt=True)})),
        NOTIFICATION: always(Reply(503, {"Retry-After": "99999999999999"})),
    }
    await failed(telling, 1)
    started = await now(books)
    await drain(relays, eci_pay_relay_retry_seconds=0.2)
    ended = await now(books)
    assert Counter(one.destination for one in peers.taken) == dict.fromkeys(Destination, 1)
    expected = {
        ORDER: (started + timedelta(seconds=120), ended + timedelta(seconds=120)),
        # The date is told by this machine's clock, of which the database's may be a little off.
        INVENTORY: (date - timedelta(seconds=2), date + (ended - started) + timedelta(seconds=2)),
        NOTIFICATION: (started + timedelta(days=1), ended + timedelta(days=1)),
    }
    for destination, (earliest, latest) in expected.items():
        row = await only(books, destination)
        assert (row["state"], row["attempts"]) == ("pending", 1)
        assert earliest <= row["next_attempt_at"] <= latest
    peers.behaviour = dict.fromkeys(Destination, well)
    await make_due(books)
    await drain(relays)
    assert await states(books) == ["delivered"] * 3


@pytest.mark.parametrize(
    "values",
    [
        (
            "soon",
            "-120",
            "1.5",
            " ",
            "120, 240",
            "Mon, 01 Jan 2001 00:00:00 GMT",
            "Mon, 99 Foo 2099 25:61:61 GMT",
            "١٢٠",
        ),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2099 00:00:00 +99999999999999999999"),
    ],
    ids=["no sense", "beyond all dates"],
)
async def test_a_retry_after_that_makes_no_sense_is_ignored(
    telling: PaymentService,
    relays: Relays,
    peers: Peers,
    books: Books,
    caplog: pytest.LogCaptureFixture,
    *,
    values: Sequence[str],
) -> None:
    peers.behaviour[ORDER] = lambda one: Reply(503, {"Retry-After": values[order_of(one) - 1]})
    await failed(telling, *range(1, len(values) + 1))
    started = await now(books)
    await drain(relays)
    ended = await now(books)
    sent = Counter(values[order_of(one) - 1] for one in requests(peers, ORDER))
    assert sent == dict.fromkeys(values, TRIES[ORDER])
    for row in await messages(books, ORDER):
        assert (row["state"], row["attempts"], row["last_error"]) == ("pending", 1, "HTTP 503 Because: {}")
        assert started < row["next_attempt_at"] <= ended + timedelta(seconds=LATER_SECONDS)
    assert [record for record in caplog.records if record.exc_info] == []


# What the statuses mean


async def test_answers_that_may_change_are_tried_again_and_put_off(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    statuses = (408, 425, 429, 500, 502, 503, 504, 507, 599)
    peers.behaviour[ORDER] = lambda one: Reply(statuses[order_of(one) - 1])
    await failed(telling, *range(1, len(statuses) + 1))
    assert (await drain(relays))[ORDER] == Tally(failed=len(statuses))
    assert Counter(one.status for one in peers.taken) == {**dict.fromkeys(statuses, 3), 200: 2 * len(statuses)}
    rows = await messages(books, ORDER)
    assert [(row["state"], row["attempts"], row["last_error"]) for row in rows] == [
        ("pending", 1, f"HTTP {status} Because: {{}}") for status in statuses
    ]


async def test_a_refused_message_is_dead_at_once_and_the_next_of_its_line_is_delivered(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = (400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 451)
    body = "no\x00such\r\norder: " + 1000 * "é"

    def answer(one: Taken) -> Reply:
        order_id, status = telling_of(one)
        return Reply(statuses[order_id - 1], body=body) if status == "COMPLETED" else Reply()

    peers.behaviour[ORDER] = answer
    payment_ids = await paid(telling, *range(1, len(statuses) + 1))
    await refunded(telling, *payment_ids)
    assert (await drain(relays))[ORDER] == Tally(delivered=len(statuses), dead=len(statuses))
    assert Counter(one.status for one in requests(peers, ORDER)) == {**dict.fromkeys(statuses, 1), 200: len(statuses)}
    rows = await messages(books, ORDER)
    assert [row["state"] for row in rows] == ["dead", "delivered"] * len(statuses)
    for status, row in zip(statuses, rows[::2], strict=True):
        assert row["last_error"] == (f"HTTP {status} Because: no such  order: " + 500 * r"\xe9")[:500]
        assert (row["attempts"], row["lease_id"]) == (1, None)
    told = "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "to order are dead" in told
    assert str(rows[0]["message_id"]) in told
    sent = len(peers.taken)
    await books.rows("UPDATE outbox SET next_attempt_at = now()")
    await drain(relays)
    assert len(peers.taken) == sent


async def test_a_redirection_is_not_followed_and_the_message_put_off(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    statuses = (301, 302, 303, 307, 308)
    elsewhere = {"Location": f"{peers.urls[INVENTORY]}/elsewhere"}
    peers.behaviour[ORDER] = lambda one: Reply(statuses[order_of(one) - 1], elsewhere)
    await failed(telling, *range(1, len(statuses) + 1))
    await drain(relays)
    assert Counter(one.status for one in requests(peers, ORDER)) == dict.fromkeys(statuses, TRIES[ORDER])
    assert "/elsewhere" not in {one.path for one in peers.taken}
    rows = await messages(books, ORDER)
    assert [(row["state"], row["attempts"], row["last_error"]) for row in rows] == [
        ("pending", 1, f"HTTP {status} Because: {{}}") for status in statuses
    ]


# No answer, or a strange one

NO_ANSWERS = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": and_close(b""),
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "half a head, closed": and_close(b"HTTP/1.1 200 OK\r\nContent-"),
    "a status that is none": b"HTTP/1.1 2000 Fine\r\nContent-Length: 0\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX-Filler: " + 1_000_000 * b"y" + b"\r\n\r\n",
    "another protocol from now on": b"HTTP/1.1 101 Switching\r\nUpgrade: chat\r\nConnection: upgrade\r\n\r\n",
    "a status, and half its text": b"HTTP/1.1 500 Broken\r\nContent-Length: 100\r\n\r\nhalf",
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
async def test_what_is_no_answer_counts_as_a_failure(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, *, answer: Answer
) -> None:
    await failed(telling, 1)
    async with BluntServer(answer).running() as server:
        tallies = await drain(relays, order_service_url=server.url, eci_pay_relay_timeout_seconds=0.2)
    assert tallies[ORDER] == Tally(failed=1)
    assert len(server.paths) == TRIES[ORDER]
    row = await only(books, ORDER)
    assert (row["state"], row["attempts"], row["lease_id"]) == ("pending", 1, None)
    assert 0 < len(row["last_error"]) <= 500
    assert row["last_error"].isprintable()
    assert await states(books, INVENTORY) + await states(books, NOTIFICATION) == ["delivered"] * 2


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (HANG, ("no answer within 0.2 s",)),
        (RESET, ("ServerDisconnectedError: ", "ClientOSError: ", "ClientConnectionResetError: ")),
        (None, ("ClientConnectorError: ",)),
    ],
    ids=["hangs", "resets", "refuses"],
)
async def test_a_peer_that_hangs_resets_or_refuses_is_tried_again_and_its_message_put_off(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, *, reply: Reply | None, error: tuple[str, ...]
) -> None:
    if reply is None:
        await peers.shut(ORDER)
    else:
        peers.behaviour[ORDER] = always(reply)
    await failed(telling, 1)
    assert await drain(relays, eci_pay_relay_timeout_seconds=0.2) == {
        ORDER: Tally(failed=1),
        INVENTORY: Tally(delivered=1),
        NOTIFICATION: Tally(delivered=1),
    }
    row = await only(books, ORDER)
    assert (row["state"], row["attempts"], row["lease_id"]) == ("pending", 1, None)
    assert row["last_error"].startswith(error)
    assert len(requests(peers, ORDER)) == (0 if reply is None else TRIES[ORDER])
    if reply is None:
        await peers.start(ORDER)
    peers.behaviour[ORDER] = well
    await make_due(books)
    assert (await drain(relays))[ORDER] == Tally(delivered=1)


GOOD_ANSWERS = {
    "created": b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}",
    "accepted": b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "another success": b"HTTP/1.1 299 Fine\r\nContent-Length: 0\r\n\r\n",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
    "continue first": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.0": and_close(b"HTTP/1.0 200 OK\r\n\r\n{}"),
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{{\xff",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "half a body, closed": and_close(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
    "no gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "a broken chunk later": in_two_parts(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n{}"),
}


@pytest.mark.parametrize("answer", GOOD_ANSWERS.values(), ids=GOOD_ANSWERS.keys())
async def test_a_success_counts_by_its_status_alone(
    telling: PaymentService, relays: Relays, books: Books, *, answer: Answer
) -> None:
    await failed(telling, 1)
    async with BluntServer(answer).running() as server:
        tallies = await drain(relays, order_service_url=server.url)
    assert tallies[ORDER] == Tally(delivered=1)
    assert server.paths == ["/v1/orders/1/payment-status"]
    row = await only(books, ORDER)
    assert (row["state"], row["attempts"], row["last_error"]) == ("delivered", 1, None)


@pytest.mark.parametrize(("status", "state"), [(200, "delivered"), (422, "dead"), (500, "pending")])
async def test_of_an_endless_answer_only_a_little_is_read(
    telling: PaymentService, relays: Relays, books: Books, *, status: int, state: str
) -> None:
    sent: list[int] = []

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status} Because\r\nContent-Length: 999999999999\r\n\r\n".encode())
        sent.append(0)
        number = len(sent) - 1
        while True:
            writer.write(65_536 * b"x")
            await writer.drain()
            sent[number] += 65_536

    await failed(telling, 1)
    async with BluntServer(endless).running() as server:
        await drain(relays, order_service_url=server.url, eci_pay_relay_timeout_seconds=60.0)
    row = await only(books, ORDER)
    assert row["state"] == state
    assert row["last_error"] == (None if status == 200 else f"HTTP {status} Because: {1000 * 'x'}"[:500])
    assert len(sent) == (TRIES[ORDER] if status == 500 else 1)
    assert max(sent) < 50_000_000  # what both ends of the connection hold back included


# One peer, or one message, and the others


@pytest.mark.parametrize("fault", ["hangs", "fails", "resets", "refuses", "is no HTTP"])
async def test_a_peer_that_misbehaves_does_not_slow_the_others(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, *, fault: str
) -> None:
    count = 40
    changed: dict[str, object] = {"eci_pay_relay_timeout_seconds": 60.0}
    if fault == "refuses":
        await peers.shut(ORDER)
    elif fault != "is no HTTP":
        peers.behaviour[ORDER] = always({"hangs": HANG, "fails": Reply(500), "resets": RESET}[fault])
    async with BluntServer(b"220 mail.example ESMTP\r\n").running() as server:
        if fault == "is no HTTP":
            changed["order_service_url"] = server.url
        async with relays(**changed) as relay, delivering(relay):
            await failed(telling, *range(1, count + 1))
            await until_all(books, "delivered", INVENTORY, NOTIFICATION)
            assert len(peers.accepted(INVENTORY)) == len(peers.accepted(NOTIFICATION)) == count
            assert "delivered" not in await states(books, ORDER)
            if fault == "hangs":
                await until_asked(peers, ORDER, 16)
                assert [(one.ended, len(peers.tries(one.message_id))) for one in requests(peers, ORDER)] == [
                    (None, 1)
                ] * 16
                await peers.shut(ORDER)


async def test_a_hanging_peer_does_not_slow_another_behind_the_same_address(
    telling: PaymentService, relays: Relays, books: Books
) -> None:
    """Services often stand behind one gateway, and differ in their paths alone."""
    async with BluntServer(silence).running() as server:

        async def answer(writer: asyncio.StreamWriter) -> None:
            if "/v1/orders/" in server.paths[-1]:
                await silence(writer)
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

        server.answer = answer
        urls = {f"{destination}_service_url": f"{server.url}/{destination}" for destination in Destination}
        async with relays(**urls, eci_pay_relay_timeout_seconds=20.0) as relay, delivering(relay):
            await failed(telling, *range(1, 41))
            try:
                await until_all(books, "delivered", INVENTORY, NOTIFICATION)
            finally:
                server.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
                server.cut()
        assert "/order/v1/orders/1/payment-status" in server.paths


@pytest.mark.parametrize("end", ["delivered", "dead"])
async def test_a_stuck_message_holds_back_only_its_own_line(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, *, end: str
) -> None:
    replies = {"stuck": Reply(503), "delivered": Reply(), "dead": Reply(422)}
    current = "stuck"
    peers.behaviour[ORDER] = lambda one: replies[current] if telling_of(one) == (1, "COMPLETED") else Reply()
    async with relays(**PATIENT) as relay, delivering(relay):
        await lived(telling, *range(1, 11))
        await until_all(books, "delivered", INVENTORY, NOTIFICATION)

        async def stuck_again_and_again() -> bool:
            others = [await states(books, ORDER, order_id=order_id) for order_id in range(2, 11)]
            first, _ = await messages(books, ORDER, order_id=1)
            return others == [["delivered", "delivered"]] * 9 and first["attempts"] >= 2

        await until(stuck_again_and_again)
        assert {telling_of(one) for one in requests(peers, ORDER) if order_of(one) == 1} == {(1, "COMPLETED")}
        current = end

        async def both_ended() -> bool:
            return await states(books, ORDER, order_id=1) == [end, "delivered"]

        await until(both_ended)
    last = [(telling_of(one)[1], one.status) for one in requests(peers, ORDER) if order_of(one) == 1][-2:]
    assert last == [("COMPLETED", replies[end].status), ("REFUNDED", 200)]
    assert peers.repeated() == {}
    assert peers.worked_on_at_once() == []
    if end == "delivered":
        await assert_all_arrived_in_order(books, peers)


async def test_a_peer_that_is_down_is_left_in_peace_until_it_is_back(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="eci_pay")
    peers.behaviour[ORDER] = always(Reply(503))
    await paid(telling, *range(1, 101))
    await lived(telling, *range(101, 161))
    caplog.clear()
    async with relays(**PATIENT) as relay, delivering(relay):
        await until_told(caplog, TAKEN_FOR_DOWN)
        await until_all(books, "delivered", INVENTORY, NOTIFICATION)
        before_probe = len(requests(peers, ORDER))
        await until_asked(peers, ORDER, before_probe + 1)
        assert len(requests(peers, ORDER)) <= 40
        rows = await messages(books, ORDER)
        assert (len(rows), {row["state"] for row in rows} <= {"pending", "leased"}) == (220, True)
        assert sum(row["attempts"] > 0 for row in rows) <= 40
        assert len(caplog.messages) <= 3
        assert sum(TAKEN_FOR_DOWN in line for line in caplog.messages) == 1
        peers.behaviour[ORDER] = well
        await until_all(books, "delivered")
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers)
    assert sum("order answers again, after" in line for line in caplog.messages) == 1
    assert len(caplog.messages) <= 5


async def test_a_peer_that_refuses_connections_gets_everything_in_order_when_it_is_back(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    await peers.shut(ORDER)
    await peers.shut(NOTIFICATION)
    await lived(telling, *range(1, 61))
    async with relays(**PATIENT) as relay, delivering(relay):
        await until_told(caplog, TAKEN_FOR_DOWN, times=2)
        await until_all(books, "delivered", INVENTORY)
        assert {*await states(books, ORDER), *await states(books, NOTIFICATION)} <= {"pending", "leased"}
        await peers.start(ORDER)
        await peers.start(NOTIFICATION)
        await until_all(books, "delivered")
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers)


async def test_a_drain_ends_where_a_peer_is_down_and_leaves_its_messages_to_a_later_one(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    count = 60
    peers.behaviour[ORDER] = always(Reply(503))
    await failed(telling, *range(1, count + 1))
    tallies = await drain(relays)
    assert [tallies[destination].delivered for destination in Destination] == [0, count, count]
    rows = await messages(books, ORDER)
    assert {(row["state"], row["lease_id"]) for row in rows} == {("pending", None)}
    assert 0 < tallies[ORDER].failed == sum(row["attempts"] for row in rows) < count
    peers.behaviour[ORDER] = well
    await make_due(books)
    assert (await drain(relays))[ORDER] == Tally(delivered=count)


async def test_a_drain_ends_though_what_has_failed_is_due_again_before_that(
    telling: PaymentService, relays: Relays, peers: Peers
) -> None:
    peers.behaviour[INVENTORY] = always(Reply(500, after_seconds=0.05))
    await failed(telling, *range(1, 7))
    often = {"eci_pay_relay_retry_seconds": 0.1, "eci_pay_relay_retry_max_seconds": 0.1}
    async with relays(**often, eci_pay_relay_concurrency=1) as relay, asyncio.timeout(END_SECONDS / 3):
        tallies = await relay.drain()
    assert tallies[ORDER] == Tally(delivered=6)
    assert tallies[INVENTORY].failed >= 6


async def test_one_message_that_always_fails_is_no_outage(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="eci_pay")
    peers.behaviour[ORDER] = lambda one: Reply(500 if order_of(one) == 1 else 200)
    await failed(telling, 1)

    async def the_others_are_delivered() -> bool:
        return (await states(books, ORDER)).count("delivered") == 30

    often = {"eci_pay_relay_retry_seconds": 0.01, "eci_pay_relay_retry_max_seconds": 0.01}
    async with relays(**often) as relay, delivering(relay):
        await until_asked(peers, ORDER, 12)
        assert TAKEN_FOR_DOWN not in caplog.text
        await failed(telling, *range(2, 32))
        await until(the_others_are_delivered)
        await until_asked(peers, ORDER, len(requests(peers, ORDER)) + 4)
    assert (await only(books, ORDER, order_id=1))["state"] == "pending"
    assert TAKEN_FOR_DOWN not in caplog.text


async def test_lines_arrive_in_order_through_random_failures(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    chance = random.Random(20261101)
    faults = [Reply(500), Reply(503, {"Retry-After": "0"}), Reply(429), Reply(408, after_seconds=0.02), Reply(302)]

    def moody(_: Taken) -> Reply:
        return chance.choice(faults) if chance.random() < 0.3 else Reply(after_seconds=chance.random() * 0.02)

    peers.behaviour = dict.fromkeys(Destination, moody)
    often = {**PATIENT, "eci_pay_relay_retry_seconds": 0.05, "eci_pay_relay_retry_max_seconds": 0.2}
    async with relays(**often) as relay, delivering(relay):
        await lived(telling, *range(1, 61))
        await until_all(books, "delivered")
    assert len(peers.taken) > len(peers.accepted()) == 60 * 6
    assert peers.repeated() == {}
    assert peers.worked_on_at_once() == []
    await assert_all_arrived_in_order(books, peers)


# Leases, and the relay's end


async def test_a_stopped_relay_ends_soon_and_gives_back_what_it_has_not_tried(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    count = 20
    peers.behaviour[ORDER] = always(HANG)
    async with relays(eci_pay_relay_concurrency=2, eci_pay_relay_timeout_seconds=1.0) as relay:
        async with delivering(relay):
            await failed(telling, *range(1, count + 1))
            await until_all(books, "delivered", INVENTORY, NOTIFICATION)
            await until_asked(peers, ORDER, 2)
            leased = (await states(books, ORDER)).count("leased")
            sent = len(requests(peers, ORDER))
        # All tries of all messages would take half a minute. A try may have begun between the count and the stop.
        assert len(requests(peers, ORDER)) - sent <= 2
    assert leased > 2
    tried = {one.message_id for one in requests(peers, ORDER)}
    due = await now(books)
    for row in await messages(books, ORDER):
        was_tried = row["message_id"] in tried
        assert (row["state"], row["lease_id"], row["attempts"]) == ("pending", None, int(was_tried))
        assert was_tried or (row["next_attempt_at"] <= due and row["first_attempt_at"] is None)
        assert row["last_error"] == ("no answer within 1 s" if was_tried else None)


async def test_a_stopped_relay_does_not_wait_for_the_next_try(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour[ORDER] = always(Reply(503, {"Retry-After": "50"}))
    await failed(telling, 1)
    started = await now(books)
    async with relays(eci_pay_relay_timeout_seconds=60.0) as relay, delivering(relay):
        await until_asked(peers, ORDER, 1)
        await until_all(books, "delivered", INVENTORY, NOTIFICATION)
    row = await only(books, ORDER)
    assert (row["state"], row["lease_id"], row["attempts"]) == ("pending", None, 1)
    assert row["last_error"] == "HTTP 503 Because: {}"
    assert started + timedelta(seconds=50) <= row["next_attempt_at"]
    assert row["next_attempt_at"] <= await now(books) + timedelta(seconds=50)
    assert len(requests(peers, ORDER)) == 1


async def test_a_stopped_relay_books_what_is_taken_while_it_stops(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour = dict.fromkeys(Destination, always(Reply(after_seconds=0.3)))
    await failed(telling, *range(1, 31))
    async with relays(eci_pay_relay_concurrency=4, eci_pay_relay_timeout_seconds=10.0) as relay, delivering(relay):
        for destination in Destination:
            await until_asked(peers, destination, 5)
        accepted_before = len(peers.accepted())
    accepted = {one.message_id for one in peers.accepted()}
    assert accepted_before < len(accepted) < 90
    rows = await messages(books)
    assert {row["message_id"] for row in rows if row["state"] == "delivered"} == accepted
    assert {(row["lease_id"], row["attempts"]) for row in rows if row["state"] != "delivered"} == {(None, 0)}
    peers.behaviour = dict.fromkeys(Destination, well)
    tallies = await drain(relays, **PATIENT)
    assert sum(tally.delivered for tally in tallies.values()) == 90 - len(accepted)
    assert peers.repeated() == {}


async def test_a_delivery_whose_lease_somebody_else_has_taken_over_is_not_booked(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    peers.behaviour = {**peers.behaviour, INVENTORY: always(Reply(after_seconds=0.5)), ORDER: always(Reply(422))}
    await failed(telling, 1)
    async with relays(eci_pay_relay_timeout_seconds=10.0) as relay:
        draining = asyncio.create_task(relay.drain())
        await until_asked(peers, INVENTORY, 1)
        taken_over = await books.value(
            "UPDATE outbox SET lease_id = gen_random_uuid(), next_attempt_at = now() + interval '1 hour'"
            " WHERE destination = 'inventory' AND lease_id IS NOT NULL RETURNING lease_id"
        )
        assert peers.accepted(INVENTORY) == []
        tallies = await draining
    assert len(peers.accepted(INVENTORY)) == 1
    assert (tallies[INVENTORY], tallies[ORDER]) == (Tally(), Tally(dead=1))
    row = await only(books, INVENTORY)
    assert (row["lease_id"], row["attempts"], row["delivered_at"]) == (taken_over, 0, None)


async def test_a_leased_message_and_its_line_are_left_alone_until_the_lease_ends(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    payment_ids = await paid(telling, 1, 2)
    await refunded(telling, *payment_ids)
    lease = "lease_id = gen_random_uuid(), next_attempt_at = now() + interval '1 hour'"
    await books.rows(f"UPDATE outbox SET {lease} WHERE payment_id = %s AND sequence = 1", payment_ids[0])
    await drain(relays, **PATIENT)
    assert await states(books, ORDER, order_id=1) == ["leased", "pending"]
    assert {order_of(one) for one in requests(peers, ORDER)} == {2}
    assert (await states(books)).count("delivered") == 8
    await books.rows("UPDATE outbox SET next_attempt_at = now() WHERE lease_id IS NOT NULL")
    await drain(relays, **PATIENT)
    await assert_all_arrived_in_order(books, peers)
    assert peers.repeated() == {}


async def test_no_try_begins_after_the_lease_of_its_message_has_ended(
    telling: PaymentService, relays: Relays, peers: Peers, books: Books
) -> None:
    """Eight messages are leased for a peer that hangs, one request at a time: their leases do not last for all."""
    await books.rows("CREATE TABLE lease (message_id bigint, begins timestamptz, ends timestamptz)")
    await books.rows(
        "CREATE FUNCTION note_lease() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        " INSERT INTO lease VALUES (new.message_id, now(), new.next_attempt_at); RETURN NULL; END $$"
    )
    await books.rows(
        "CREATE TRIGGER note_lease AFTER UPDATE ON outbox FOR EACH ROW"
        " WHEN (new.lease_id IS NOT NULL) EXECUTE FUNCTION note_lease()"
    )
    peers.behaviour[INVENTORY] = always(HANG)
    await failed(telling, *range(1, 9))
    tallies = await drain(relays, eci_pay_relay_timeout_seconds=0.2, eci_pay_relay_concurrency=1)
    assert tallies[INVENTORY] == Tally(failed=8)
    asked = time.monotonic()  # asked first, so that what asking takes counts as later; a try leaves that much time
    epoch = (await now(books)).timestamp() - asked
    leases = await books.rows("SELECT * FROM lease JOIN outbox USING (message_id) WHERE destination = 'inventory'")
    assert len(leases) > 8
    for one in requests(peers, INVENTORY):
        begun = epoch + one.started
        assert any(
            lease["begins"].timestamp() <= begun <= lease["ends"].timestamp()
            for lease in leases
            if lease["message_id"] == one.message_id
        )


# The database


@asynccontextmanager
async def database_away(server_url: str, books: Books) -> AsyncIterator[None]:
    """Cuts the relay's connections, and lets it make no new ones while the block runs."""
    name = await books.value("SELECT current_database()")
    async with await psycopg.AsyncConnection.connect(server_url, autocommit=True) as connection:
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'.encode())
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = %s AND application_name = 'payment-service'",
            (name,),
        )
        try:
            yield
        finally:
            await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'.encode())


@asynccontextmanager
async def far_relay(
    door: Door, opened: Opener, settings: Settings, peers: Peers, *, try_seconds: float
) -> AsyncIterator[Relay]:
    """A relay whose connections to the database a test can cut. Its leases take eight tries at most."""
    short = {
        **peers.settings(),
        "eci_pay_relay_poll_seconds": 0.05,
        "eci_pay_relay_timeout_seconds": try_seconds,
    }
    async with (
        door.opened() as url,
        opened(url=url, eci_pay_database_pool_timeout_seconds=0.5, **short) as service,
        connected_relay(settings.model_copy(update=short), service.outbox) as relay,
    ):
        yield relay


async def test_a_relay_outlives_the_database_and_delivers_when_it_is_back(
    server_url: str,
    settings: Settings,
    opened: Opener,
    peers: Peers,
    books: Books,
    *,
    telling: PaymentService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    short: dict[str, object] = {**peers.settings(), "eci_pay_relay_poll_seconds": 0.05}
    peers.behaviour = dict.fromkeys(Destination, always(Reply(after_seconds=0.2)))
    await failed(telling, *range(1, 41))
    async with (
        opened(eci_pay_database_pool_timeout_seconds=0.3, **short) as service,
        connected_relay(settings.model_copy(update=short), service.outbox) as relay,
        delivering(relay),
    ):
        await until_asked(peers, ORDER, 10)
        async with database_away(server_url, books):
            await until_told(caplog, " wait: ", times=3)

            async def all_leased_have_arrived() -> bool:
                return len(peers.accepted()) == 3 * 40

            await until(all_leased_have_arrived)
            # Then it is long enough for their bookings to have failed as well.
            await until_told(caplog, RECONNECTING, times=6 + sum(RECONNECTING in line for line in caplog.messages))
            peers.behaviour = dict.fromkeys(Destination, well)
        await until_told(caplog, "are delivered again", times=3)
        await failed(telling, *range(41, 61))
        await until_all(books, "delivered")
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers)
    told = [record for record in caplog.records if record.name.startswith("eci_pay")]
    ours = [record.getMessage() for record in told if record.name != "eci_pay.changes"]
    for destination in Destination:
        assert sum(line.startswith(f"messages to {destination} wait: ") for line in ours) == 1
        assert ours.count(f"messages to {destination} are delivered again") == 1
    assert len(ours) == 6


async def test_a_relay_whose_connections_are_cut_again_and_again_delivers_everything_in_order(
    door: Door, settings: Settings, opened: Opener, peers: Peers, books: Books, *, telling: PaymentService
) -> None:
    peers.behaviour = dict.fromkeys(Destination, always(Reply(after_seconds=0.01)))
    await lived(telling, *range(1, 41))
    async with far_relay(door, opened, settings, peers, try_seconds=0.5) as relay, delivering(relay):
        for number in range(1, 5):
            await until_asked(peers, NOTIFICATION, 25 * number)
            door.cut()
        await until_all(books, "delivered")
    await assert_all_arrived_in_order(books, peers)


async def test_messages_of_a_lease_that_was_not_heard_of_are_delivered_when_it_ends(
    door: Door, settings: Settings, opened: Opener, peers: Peers, books: Books, *, telling: PaymentService
) -> None:
    await failed(telling, 1, 2, 3)
    door.lose_answer_to("COMMIT")
    async with far_relay(door, opened, settings, peers, try_seconds=0.6) as relay, delivering(relay):
        await until_all(books, "delivered")
    assert door.has_lost
    assert {row["attempts"] for row in await messages(books)} == {1}
    assert peers.repeated() == {}
    await assert_all_arrived_in_order(books, peers)


async def test_deliveries_whose_booking_was_not_heard_of_are_booked_once(
    door: Door, settings: Settings, opened: Opener, peers: Peers, books: Books, *, telling: PaymentService
) -> None:
    peers.behaviour[ORDER] = always(Reply(422))
    await failed(telling, 1, 2, 3)
    door.lose_answer_to("UPDATE outbox m SET\n    lease_id = NULL")
    async with far_relay(door, opened, settings, peers, try_seconds=10.0) as relay, delivering(relay):
        await until_all(books, "delivered", INVENTORY, NOTIFICATION)
        await until_all(books, "dead", ORDER)
    assert door.has_lost
    assert {row["attempts"] for row in await messages(books)} == {1}
    assert len(peers.taken) == 9


async def test_a_drain_says_that_the_database_is_away(
    server_url: str, settings: Settings, opened: Opener, peers: Peers, books: Books, *, telling: PaymentService
) -> None:
    await failed(telling, 1)
    short = {**peers.settings(), "eci_pay_database_pool_timeout_seconds": 0.2}
    async with opened(**short) as service, connected_relay(settings.model_copy(update=short), service.outbox) as relay:
        await service.check_ready()
        async with database_away(server_url, books):
            with pytest.raises(Unavailable):
                await relay.drain()
    assert peers.taken == []


# What a relay costs


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_connections_are_kept_and_never_more_requests_are_under_way_than_allowed(
    telling: PaymentService, relays: Relays, books: Books, *, concurrency: int
) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.002)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    count = 200
    await asyncio.gather(*(failed(telling, order_id) for order_id in range(1, count + 1)))
    async with BluntServer(answer).running() as server:
        tallies = await drain(relays, order_service_url=server.url, eci_pay_relay_concurrency=concurrency)
    assert tallies[ORDER] == Tally(delivered=count)
    assert len(server.paths) == len(set(server.paths)) == count
    assert server.under_way_max == concurrency
    assert server.connections == concurrency


async def test_delivered_messages_are_deleted_after_their_retention_in_batches_and_no_others(
    telling: PaymentService,
    settings: Settings,
    peers: Peers,
    books: Books,
    clock: ManualClock,
    *,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="eci_pay")
    await failed(telling, 1, 2)
    [overtaken, paid_only] = await paid(telling, 3, 4)
    await refunded(telling, overtaken)
    old, day = "now() - interval '7 days 1 minute'", "now() - interval '6 days 23 hours'"
    await books.rows(
        "UPDATE outbox SET created_at = now() - interval '1 year', next_attempt_at = now() + interval '1 year'"
    )
    await books.rows(f"UPDATE outbox SET dead_at = {old} WHERE payment_id = %s AND sequence = 1", overtaken)
    await books.rows(f"UPDATE outbox SET delivered_at = {old} WHERE payment_id = %s AND sequence > 1", overtaken)
    await books.rows(f"UPDATE outbox SET delivered_at = {day} WHERE payment_id = %s", paid_only)
    kept = {row["message_id"] for row in await messages(books)}
    # Of that payment, the second message to order stays, because the first of its line is dead; the others go.
    kept -= {
        row["message_id"]
        for row in await messages(books, order_id=3)
        if row["state"] == "delivered" and row["destination"] != "order"
    }
    assert len(kept) == 6 + 2 + 2
    count = 2 * PURGE_BATCH_SIZE_MAX + 500 - 3
    await books.rows(
        "INSERT INTO outbox (payment_id, sequence, destination, event, payload, attempts, delivered_at)"
        f" SELECT %s, 100 + n, 'inventory', 'payment.failed', '{{}}', 1, {old} FROM generate_series(1, %s) AS n",
        paid_only,
        count,
    )
    keys = await books.value("SELECT count(*) FROM idempotency_keys")
    clock.advance(hours=25)
    often = {"eci_pay_outbox_purge_interval_seconds": 0.05, "eci_pay_expire_keys_interval_seconds": 0.05}

    async def only_the_kept_are_left() -> bool:
        return bool(await books.value("SELECT count(*) FROM outbox") == len(kept))

    async def no_key_is_left() -> bool:
        return bool(await books.value("SELECT count(*) FROM idempotency_keys") == 0)

    async with background_tasks(settings.model_copy(update=often), telling, relays=False):
        await until(only_the_kept_are_left)
        await until(no_key_is_left)
        await until_told(caplog, "expired idempotency keys")
        await until_told(caplog, "deleted 500 delivered messages")
    assert {row["message_id"] for row in await messages(books)} == kept
    assert [line for line in caplog.messages if "delivered messages" in line] == [
        "deleted 1000 delivered messages",
        "deleted 1000 delivered messages",
        "deleted 500 delivered messages",
    ]
    assert f"deleted {keys} expired idempotency keys" in caplog.messages
    assert peers.taken == []


async def test_a_purge_that_fails_stops_neither_itself_nor_the_expiry_of_keys(
    telling: PaymentService, settings: Settings, books: Books, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    await paid(telling, 1)
    await books.rows("UPDATE outbox SET delivered_at = now() - interval '8 days'")
    await books.rows("ALTER TABLE outbox RENAME TO away")
    often = {"eci_pay_outbox_purge_interval_seconds": 0.05, "eci_pay_expire_keys_interval_seconds": 0.05}
    async with background_tasks(settings.model_copy(update=often), telling, relays=False):
        await until_told(caplog, "delivered messages stay for now", times=2)
        assert [record for record in caplog.records if record.exc_info] == []  # which would be an unexpected error
        clock.advance(hours=25)

        async def no_key_is_left() -> bool:
            return bool(await books.value("SELECT count(*) FROM idempotency_keys") == 0)

        await until(no_key_is_left)
        await books.rows("ALTER TABLE away RENAME TO outbox")

        async def no_message_is_left() -> bool:
            return bool(await books.value("SELECT count(*) FROM outbox") == 0)

        await until(no_message_is_left)


async def test_the_background_tasks_of_a_server_deliver_what_it_changes(
    telling: PaymentService, settings: Settings, peers: Peers, books: Books
) -> None:
    update = {**peers.settings(), "eci_pay_relay_poll_seconds": 0.05}
    async with background_tasks(settings.model_copy(update=update), telling, relays=True):
        await lived(telling, 1, 2, 3)
        await until_all(books, "delivered")
    await assert_all_arrived_in_order(books, peers)
    assert peers.repeated() == {}


async def test_messages_that_come_one_by_one_are_booked_together(
    telling: PaymentService, settings: Settings, peers: Peers, books: Books
) -> None:
    """Every booking, and the lease after it, costs commits that charges wait for."""
    update = {**peers.settings(), "eci_pay_relay_poll_seconds": 0.05}
    begun = time.monotonic()
    async with background_tasks(settings.model_copy(update=update), telling, relays=True):
        for order_id in range(1, 201):
            await paid(telling, order_id)
        await until_all(books, "delivered")
    seconds = time.monotonic() - begun
    for destination in (ORDER, NOTIFICATION):
        bookings = await books.value(
            "SELECT count(DISTINCT delivered_at) FROM outbox WHERE destination = %s", destination
        )
        assert bookings <= seconds / BOOK_GATHER_SECONDS + 200 / 64 + 1  # 64 at once need not wait


async def test_a_drain_is_no_faster_than_it_may_be_and_yet_delivers_all(
    telling: PaymentService, relays: Relays, peers: Peers
) -> None:
    """Beyond a first burst of 8 for each request that may be under way."""
    await paid(telling, *range(1, 61))
    begun = time.monotonic()
    await drain(relays, eci_pay_relay_messages_per_second_max=50, eci_pay_relay_concurrency=1)
    assert time.monotonic() - begun >= (60 - 8 - 8) / 50
    assert len(peers.accepted()) == 120
