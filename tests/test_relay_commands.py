"""`eci-pay relay` and `eci-pay peers` as operators run them: processes, their output, their exit codes."""

import asyncio
import json
import re
import signal
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import psutil
import pytest

from eci_pay.messages import Destination
from eci_pay.service import PaymentService
from tests.door import Door
from tests.peers import Peers, Reply
from tests.rows import paid
from tests.support import Books, CommandLine, CommandResult, Sessions, refund_request, until
from tests.test_cli import (
    DECLINED,
    INVALID,
    REASON,
    UNAVAILABLE,
    assert_no_traceback,
    charge_options,
    elsewhere,
)
from tests.test_serving import TIMEOUT_SECONDS, charge, serving

URL_NAMES = ("ORDER_SERVICE_URL", "INVENTORY_SERVICE_URL", "NOTIFICATION_SERVICE_URL")
URL_FAULT = "must be a base URL such as http://orders:8080, without user, query or fragment"
ORDER_PATH = "/v1/orders/41/payment-status"
TAKEN: dict[str, tuple[str, str, dict[str, object]]] = {
    "order": ("PATCH", ORDER_PATH, {"payment_id": 5, "payment_status": "COMPLETED"}),
    "inventory": ("POST", "/v1/inventory/release", {"order_id": 41, "reason": "Payment failed"}),
    "notification": (
        "POST",
        "/v1/notifications",
        {"user_id": 7, "type": "PAYMENT_SUCCESS", "message": "Thank you", "channel": "EMAIL"},
    ),
}
"""A message that each service takes."""


@pytest.fixture
def relaying(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The installed command, which knows the peers and does not wait long for anything."""
    return elsewhere(
        command_line,
        ECI_PAY_RELAY_TIMEOUT_SECONDS="3",
        ECI_PAY_RELAY_POLL_SECONDS="0.05",
        ECI_PAY_RELAY_RETRY_SECONDS="60",
        **peers.environment(),
    )


@pytest.fixture
def refusing_address() -> Iterator[str]:
    """Where connections are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@dataclass
class StandIns:
    """A running `eci-pay peers`, and what it has printed."""

    process: asyncio.subprocess.Process
    told: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that it tells to export."""
        return dict(line.removeprefix("export ").split("=", 1) for line in self.told if line.startswith("export "))

    def url(self, destination: str) -> str:
        """Where a destination takes its messages."""
        return self.environment[f"{destination.upper()}_SERVICE_URL"]

    async def has_shown(self, number: int) -> bool:
        """Whether so many messages were shown."""
        return len(self.shown) >= number


@asynccontextmanager
async def stand_ins(command_line: CommandLine, *options: str, number: int = 3) -> AsyncIterator[StandIns]:
    """Runs the command, on free ports as a rule; kills what is left of it in the end."""
    async with running(command_line, "peers", "--port=0", *options) as process:
        opened = StandIns(process)
        reading = asyncio.gather(_read(process.stderr, opened.told), _read(process.stdout, opened.shown))

        async def started() -> bool:
            return len(opened.environment) >= number or process.returncode is not None

        try:
            await until(started)
            assert len(opened.environment) == number, opened.told
            yield opened
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await reading


@asynccontextmanager
async def running(command_line: CommandLine, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command that runs until it is stopped; kills what is left of it in the end."""
    process = await command_line.start(*arguments)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def _read(stream: asyncio.StreamReader | None, lines: list[str]) -> None:
    assert stream is not None
    async for line in stream:
        lines.append(line.decode().rstrip("\n"))


async def end(process: asyncio.subprocess.Process, with_signal: signal.Signals) -> int:
    """Sends a signal and returns the exit code."""
    process.send_signal(with_signal)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return await process.wait()


async def all_at_once(command_line: CommandLine, *commands: tuple[str, ...]) -> list[CommandResult]:
    """How each of them ended."""
    return await asyncio.gather(*(command_line.run(*command) for command in commands))


def with_urls(command_line: CommandLine, *urls: str) -> CommandLine:
    """The same command line, where the three services have these URLs."""
    return elsewhere(command_line, **dict(zip(URL_NAMES, urls, strict=True)))


async def say(
    client: httpx.AsyncClient, running: StandIns, destination: str, key: str = "1", **request: Any
) -> httpx.Response:
    """Sends a stand-in a message that it takes, or a body of its own."""
    method, path, body = TAKEN[destination]
    headers = {"Idempotency-Key": key, **request.pop("headers", {})}
    return await client.request(method, running.url(destination) + path, headers=headers, **(request or {"json": body}))


def tally(
    destination: str, *, delivered: int = 0, failed: int = 0, dead: int = 0, pending: int = 0
) -> dict[str, object]:
    """What `eci-pay relay --once` tells of a peer."""
    return {"peer": str(destination), "delivered": delivered, "failed": failed, "dead": dead, "pending": pending}


def cells(result: CommandResult) -> list[list[str]]:
    """The rows of a table that was printed, its headings first."""
    lines = [line.strip() for line in result.stdout.splitlines()]
    return [re.split(r"\s{2,}", line) for line in lines if line and not set(line) <= set("─ ")]


async def requests(peers: Peers, number: int) -> None:
    """Waits until the peers were sent so many more requests."""
    enough = len(peers.taken) + number

    async def reached() -> bool:
        return len(peers.taken) >= enough

    await until(reached)


async def test_a_relay_without_any_url_exits_2_and_says_which_to_set(command_line: CommandLine) -> None:
    commands = (("relay",), ("relay", "--once"), ("relay", "--once", "--json"))
    for command, result in zip(commands, await all_at_once(command_line, *commands), strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, "")
        told = json.loads(result.stderr)["detail"] if "--json" in command else result.stderr
        for name in URL_NAMES:
            assert name in told
        assert_no_traceback(result)


async def test_urls_that_are_no_base_urls_exit_2_with_a_line_each_and_without_their_passwords(
    command_line: CommandLine,
) -> None:
    wrong = (
        ("ftp://orders:8080", "http://ada:s3cret@inventory", "http://notes/?token=s3cret"),
        ("http://", "http://inventory:0", "http://the notes"),
        ("orders:8080", "http://inventory:70000", "http://notes/#s3cret"),
        ("http://:8080", "http://inventory:s3cret", "http://bücher"),
        ("https://s3cret@orders", "//inventory", "postgresql://ada:s3cret@notes/books"),
    )
    commands = (("relay",), ("relay", "--once"), ("serve", "--port=0"), charge_options(), ("relay", "--once", "--json"))
    results = await asyncio.gather(
        *(with_urls(command_line, *urls).run(*command) for urls, command in zip(wrong, commands, strict=True))
    )
    for urls, command, result in zip(wrong, commands, results, strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, ""), urls
        told = json.loads(result.stderr)["detail"] if "--json" in command else result.stderr
        for name in URL_NAMES:
            assert told.count(f"{name}: {URL_FAULT}") == 1, (urls, told)
        assert "s3cret" not in result.stderr
        assert_no_traceback(result)


async def test_no_password_is_told_of_a_url_that_cannot_even_be_taken_apart(command_line: CommandLine) -> None:
    wrong = ("http://ada:[s3cret]@orders", "http://ada:s3cret\N{CARE OF}@inventory", "http://[ada:s3cret@notes")
    result = await with_urls(command_line, *wrong).run("relay", "--once")
    assert (result.exit_code, result.stdout) == (INVALID, "")
    for name in URL_NAMES:
        assert f"{name}: " in result.stderr
    assert "s3cret" not in result.stderr


async def test_a_url_with_an_empty_query_or_fragment_is_refused_because_no_path_can_follow_it(
    command_line: CommandLine,
) -> None:
    wrong = ("http://orders:8080?", "http://inventory#", "http://notes/base?")
    result = await with_urls(command_line, *wrong).run("relay", "--once")
    assert (result.exit_code, result.stdout) == (INVALID, "")
    for name in URL_NAMES:
        assert f"{name}: {URL_FAULT}" in result.stderr


async def test_a_relay_without_its_database_exits_5_and_tells_no_password(
    relaying: CommandLine, refusing_address: str
) -> None:
    away = elsewhere(relaying, DATABASE_URL=f"postgresql://nobody:s3cret@{refusing_address}/none")
    commands = (("relay",), ("relay", "--once"), ("relay", "--once", "--json"))
    for command, result in zip(commands, await all_at_once(away, *commands), strict=True):
        assert (result.exit_code, result.stdout) == (UNAVAILABLE, "")
        if "--json" in command:
            assert json.loads(result.stderr)["code"] == "unavailable"
        else:
            assert "the database cannot be reached" in result.stderr
            assert "[unavailable]" in result.stderr
        assert "s3cret" not in result.stderr
        assert_no_traceback(result)


async def test_once_delivers_whole_lines_in_order_and_counts_them(
    relaying: CommandLine, books: Books, peers: Peers, telling: PaymentService
) -> None:
    payment_ids = await paid(telling, 1, 2, 3)
    for payment_id in payment_ids:
        for amount in ("30.00", "20.00", None):
            await telling.refunds.refund(payment_id=payment_id, request=refund_request(amount))
    result = await relaying.run("relay", "--once", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.json == [
        tally("order", delivered=6),
        tally("inventory", delivered=3),
        tally("notification", delivered=12),
    ]
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    rows = {row["message_id"]: row for row in await books.rows("SELECT * FROM outbox")}
    assert len(peers.taken) == len(rows) == 21
    for one in peers.taken:
        assert (one.status, one.body) == (200, rows[one.message_id]["payload"])
        lines[one.destination, rows[one.message_id]["payment_id"]].append(rows[one.message_id]["sequence"])
    assert lines == {
        (destination, payment_id): sequences
        for payment_id in payment_ids
        for destination, sequences in {"order": [1, 6], "inventory": [7], "notification": [2, 3, 4, 5]}.items()
    }
    assert all(row["delivered_at"] is not None for row in rows.values())
    nothing_left = await relaying.run("relay", "--once")
    assert (nothing_left.exit_code, nothing_left.stderr) == (0, "")
    assert cells(nothing_left) == [
        ["Peer", "Delivered", "Failed", "Dead", "Still pending"],
        ["order", "0", "0", "0", "0"],
        ["inventory", "0", "0", "0", "0"],
        ["notification", "0", "0", "0", "0"],
    ]
    assert len(peers.taken) == 21


async def test_once_ends_by_itself_where_a_peer_is_down_and_tells_how_many_are_to_be_repeated(
    relaying: CommandLine, books: Books, peers: Peers, telling: PaymentService
) -> None:
    await paid(telling, *range(1, 6))
    await peers.shut(Destination.ORDER)
    down = await relaying.run("relay", "--once")
    assert down.exit_code == 0
    assert cells(down)[1:] == [
        ["order", "0", "5", "0", "5"],
        ["inventory", "0", "0", "0", "0"],
        ["notification", "5", "0", "0", "0"],
    ]
    told = re.findall(r"(\d+) deliveries to order failed and will be repeated", down.stderr)
    assert sum(map(int, told)) == 5
    assert_no_traceback(down)
    waiting = await books.rows("SELECT * FROM outbox WHERE destination = 'order'")
    assert {(row["attempts"], row["lease_id"], row["delivered_at"], row["dead_at"]) for row in waiting} == {
        (1, None, None, None)
    }
    not_due_yet = await relaying.run("relay", "--once", "--json")
    assert not_due_yet.json == [tally("order", pending=5), tally("inventory"), tally("notification")]
    await peers.start(Destination.ORDER)
    await books.rows("UPDATE outbox SET next_attempt_at = now() WHERE delivered_at IS NULL")
    up = await relaying.run("relay", "--once", "--json")
    assert up.json[0] == tally("order", delivered=5)
    assert peers.repeated() == {}


async def test_once_ends_by_itself_where_a_peer_is_down_that_many_messages_wait_for(
    relaying: CommandLine, books: Books, peers: Peers, telling: PaymentService
) -> None:
    await paid(telling, *range(1, 31))
    await peers.shut(Destination.ORDER)
    result = await relaying.run("relay", "--once", "--json")
    assert result.exit_code == 0
    order, _, notification = result.json
    assert notification == tally("notification", delivered=30)
    tried = await books.value("SELECT count(*) FROM outbox WHERE destination = 'order' AND attempts = 1")
    assert order == tally("order", failed=tried, pending=30)
    assert tried < 30  # the others were left in peace, and are due at once
    assert await books.value(
        "SELECT count(*) FROM outbox WHERE destination = 'order' AND attempts = 0 AND next_attempt_at <= now()"
        " AND lease_id IS NULL AND delivered_at IS NULL AND dead_at IS NULL"
    ) == (30 - tried)


async def test_once_tells_of_messages_that_a_peer_refuses_for_good(
    relaying: CommandLine, peers: Peers, telling: PaymentService
) -> None:
    await paid(telling, 1, 2, 3)
    peers.behaviour[Destination.ORDER] = lambda one: Reply(
        status=404 if one.path == "/v1/orders/2/payment-status" else 200
    )
    result = await relaying.run("relay", "--once")
    assert result.exit_code == 0
    assert cells(result)[1] == ["order", "2", "0", "1", "0"]
    assert "1 messages to order are dead" in result.stderr


async def test_once_exits_5_where_the_database_is_busy(
    relaying: CommandLine, telling: PaymentService, sessions: Sessions, peers: Peers
) -> None:
    await paid(telling, 1)
    session = await sessions()
    await session.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
    result = await elsewhere(relaying, ECI_PAY_LOCK_TIMEOUT_SECONDS="0.2").run("relay", "--once")
    assert (result.exit_code, result.stdout) == (UNAVAILABLE, "")
    assert "[unavailable]" in result.stderr
    assert peers.taken == []


async def test_once_ends_with_5_where_the_database_goes_away_while_it_delivers(
    relaying: CommandLine, telling: PaymentService, door: Door, peers: Peers
) -> None:
    await paid(telling, *range(1, 6))
    peers.behaviour[Destination.ORDER] = lambda _: Reply(after_seconds=0.3)
    async with door.opened() as url:
        behind_door = elsewhere(relaying, DATABASE_URL=url, ECI_PAY_DATABASE_POOL_TIMEOUT_SECONDS="0.5")
        async with running(behind_door, "relay", "--once") as process:
            await requests(peers, 1)
            door.shut()
            async with asyncio.timeout(TIMEOUT_SECONDS):
                _, told = await process.communicate()
    assert process.returncode == UNAVAILABLE
    assert "[unavailable]" in told.decode()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_relay_that_is_stopped_at_work_books_what_it_has_sent_and_lets_go_of_the_rest(
    relaying: CommandLine, books: Books, peers: Peers, telling: PaymentService, stop: signal.Signals
) -> None:
    await paid(telling, *range(1, 21))
    for destination in Destination:
        peers.behaviour[destination] = lambda _: Reply(after_seconds=0.1)
    async with running(elsewhere(relaying, ECI_PAY_RELAY_CONCURRENCY="2"), "relay") as process:
        await requests(peers, 10)
        assert await end(process, stop) == 0
        stdout, stderr = await process.communicate()
    addresses = ", ".join(f"{destination} {peers.urls[destination]}" for destination in Destination)
    told = [line for line in stderr.decode().splitlines() if "expired idempotency keys" not in line]
    assert told == [f"delivering to {addresses}", "stopped"]
    assert stdout == b""
    sent = {one.message_id for one in peers.taken}
    assert 10 <= len(sent) < 40
    delivered = await books.rows("SELECT message_id FROM outbox WHERE delivered_at IS NOT NULL")
    assert {row["message_id"] for row in delivered} == sent == {one.message_id for one in peers.accepted()}
    assert await books.value("SELECT count(*) FROM outbox WHERE lease_id IS NOT NULL") == 0
    rest = await relaying.run("relay", "--once", "--json")
    assert sum(each["delivered"] for each in rest.json) == 40 - len(sent)
    assert len(peers.accepted()) == len(peers.taken) == 40


async def test_a_relay_delivers_what_is_committed_after_its_start(
    relaying: CommandLine, peers: Peers, telling: PaymentService
) -> None:
    async with running(relaying, "relay") as process:
        assert process.stderr is not None
        assert (await process.stderr.readline()).startswith(b"delivering to ")
        assert peers.taken == []
        arriving = asyncio.create_task(requests(peers, 2))
        (payment_id,) = await paid(telling, 1)
        await arriving
        assert await end(process, signal.SIGTERM) == 0
    assert {one.destination for one in peers.accepted()} == {Destination.ORDER, Destination.NOTIFICATION}
    (order,) = peers.accepted(Destination.ORDER)
    assert order.body == {"payment_id": payment_id, "payment_status": "COMPLETED"}


async def test_a_server_that_is_told_not_to_relay_leaves_messages_to_others(
    relaying: CommandLine, books: Books, peers: Peers
) -> None:
    async with serving(elsewhere(relaying, ECI_PAY_RELAY_IN_SERVE="false")) as server, server.client() as client:
        for order_id in range(1, 21):  # each takes about as long as a relay would wait until it looks
            assert (await charge(client, order_id, key=f"k{order_id}")).status_code == 201
        others = await relaying.run("relay", "--once", "--json")
        assert await server.end(signal.SIGTERM) == 0
    assert others.json == [tally("order", delivered=20), tally("inventory"), tally("notification", delivered=20)]
    assert len(peers.taken) == 40
    assert await books.value("SELECT max(attempts) FROM outbox") == 1


async def test_several_workers_relay_beside_each_other_and_nothing_arrives_twice(
    relaying: CommandLine, books: Books, peers: Peers
) -> None:
    orders = range(1, 41)
    for destination in Destination:
        peers.behaviour[destination] = lambda _: Reply(after_seconds=0.02)
    async with serving(relaying, workers=3) as server, server.client() as client:
        arriving = asyncio.create_task(requests(peers, 2 * len(orders)))
        answers = await asyncio.gather(
            *(
                client.post(
                    "/v1/payments/charge",
                    json={"order_id": order_id, "user_id": 7, "amount": 100, "payment_method": "UPI"},
                    headers={"Idempotency-Key": f"k{order_id}", "X-Request-ID": f"checkout {order_id}"},
                )
                for order_id in orders
            )
        )
        assert {answer.status_code for answer in answers} == {201}
        await arriving
        await until(lambda: _all_delivered(books))
        assert await server.end(signal.SIGTERM) == 0
    payment_of = {answer.json()["order_id"]: answer.json()["payment_id"] for answer in answers}
    told = {
        one.path: (one.body["payment_id"], one.headers["x-request-id"]) for one in peers.accepted(Destination.ORDER)
    }
    assert told == {
        f"/v1/orders/{order_id}/payment-status": (payment_of[order_id], f"checkout {order_id}") for order_id in orders
    }
    assert len(peers.taken) == len(peers.accepted()) == 2 * len(orders)
    assert peers.worked_on_at_once() == []


async def _all_delivered(books: Books) -> bool:
    return bool(await books.value("SELECT count(*) = 0 FROM outbox WHERE delivered_at IS NULL"))


async def test_stand_ins_tell_what_to_export_and_show_each_message_for_people(command_line: CommandLine) -> None:
    async with stand_ins(command_line) as running, httpx.AsyncClient() as client:
        assert running.shown == []
        assert tuple(running.environment) == URL_NAMES
        assert len(running.told) == len(set(running.environment.values())) == 3
        for number, destination in enumerate(TAKEN):
            answer = await say(client, running, destination, key=f"4{number}")
            assert (answer.status_code, answer.json()) == (200, {"taken": True, "repeated": False})
        again = await say(client, running, "order", key="40")
        assert (again.status_code, again.json()) == (200, {"taken": True, "repeated": True})
        await until(lambda: running.has_shown(4))
        assert await end(running.process, signal.SIGTERM) == 0
    for line, number, repeated in zip(running.shown, (0, 1, 2, 0), ("", "", "", " (repeated)"), strict=True):
        destination = list(TAKEN)[number]
        method, path, body = TAKEN[destination]
        at, shown = line.split(" ", 1)
        assert datetime.fromisoformat(at).tzinfo is not None
        assert shown == f"{destination:12} 200 message 4{number}{repeated}: {method} {path} {json.dumps(body)}"
    assert len(running.told) == 3


async def test_stand_ins_show_messages_as_a_line_of_json_each_and_all_of_them_under_received(
    command_line: CommandLine,
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with stand_ins(command_line, "--json") as running, httpx.AsyncClient() as client:
        await say(client, running, "order", "1", headers={"X-Request-ID": "from-checkout", "traceparent": traceparent})
        await say(client, running, "notification", "2")
        await say(client, running, "order", "1")
        await until(lambda: running.has_shown(3))
        received = [(await client.get(url + "/received")).json() for url in running.environment.values()]
        assert await end(running.process, signal.SIGINT) == 0
    shown = [json.loads(line) for line in running.shown]
    assert received == [shown, shown, shown]
    assert shown[0] == {
        "destination": "order",
        "at": shown[0]["at"],
        "method": "PATCH",
        "path": ORDER_PATH,
        "body": TAKEN["order"][2],
        "idempotency_key": "1",
        "request_id": "from-checkout",
        "traceparent": traceparent,
        "status": 200,
        "repeated": False,
    }
    assert [(one["destination"], one["idempotency_key"], one["repeated"]) for one in shown] == [
        ("order", "1", False),
        ("notification", "2", False),
        ("order", "1", True),
    ]
    assert (shown[1]["request_id"], shown[1]["traceparent"]) == (None, None)
    assert sorted(one["at"] for one in shown) == [one["at"] for one in shown]


async def test_stand_ins_have_neighbouring_ports_and_who_is_down_refuses_connections(
    command_line: CommandLine,
) -> None:
    port = free_ports()
    options = (f"--port={port}", "--down", "Inventory")
    async with stand_ins(command_line, *options, number=2) as running, httpx.AsyncClient() as client:
        assert running.environment == {
            "ORDER_SERVICE_URL": f"http://127.0.0.1:{port}",
            "NOTIFICATION_SERVICE_URL": f"http://127.0.0.1:{port + 2}",
        }
        assert (await say(client, running, "order")).status_code == 200
        assert (await say(client, running, "notification")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port + 1}/received")


async def test_stand_ins_that_fail_answer_503_and_have_taken_nothing(command_line: CommandLine) -> None:
    async with stand_ins(command_line, "--json", "--fail-rate=1.0") as running, httpx.AsyncClient() as client:
        for destination in TAKEN:
            for _ in range(2):
                answer = await say(client, running, destination)
                assert (answer.status_code, answer.json()) == (503, {"taken": False, "repeated": False})
        await until(lambda: running.has_shown(6))
    shown = [json.loads(line) for line in running.shown]
    assert [(one["status"], one["repeated"]) for one in shown] == [(503, False)] * 6


async def test_stand_ins_that_fail_now_and_then_show_which_messages_they_did_not_take(
    command_line: CommandLine,
) -> None:
    async with stand_ins(command_line, "--fail-rate=0.5") as running, httpx.AsyncClient() as client:
        answers = [await say(client, running, "inventory", key=f"{number}") for number in range(30)]
        await until(lambda: running.has_shown(30))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert [int(line.split()[2]) for line in running.shown] == statuses


async def test_stand_ins_take_their_time_where_they_are_told_to(command_line: CommandLine) -> None:
    async with stand_ins(command_line, "--delay=0.4") as running, httpx.AsyncClient() as client:
        answer = await say(client, running, "order")
        assert answer.status_code == 200
        assert answer.elapsed.total_seconds() >= 0.4


async def test_stand_ins_that_are_stopped_do_not_sit_out_the_time_they_take(command_line: CommandLine) -> None:
    async with stand_ins(command_line, "--delay=3600") as running, httpx.AsyncClient(timeout=None) as client:
        waiting = asyncio.gather(say(client, running, "order"), return_exceptions=True)
        await until(lambda: _is_connected(running.process.pid))
        assert await end(running.process, signal.SIGTERM) == 0
        await waiting


async def test_stand_ins_take_nothing_but_the_bodies_of_the_contract(command_line: CommandLine) -> None:
    order: dict[str, object] = TAKEN["order"][2]
    bodies = [
        b"",
        b"payment",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        json.dumps({**order, "more": 1}).encode(),
        json.dumps({**order, "payment_id": "5"}).encode(),
        json.dumps({**order, "payment_id": 5.0}).encode(),
        json.dumps({**order, "payment_id": True}).encode(),
        json.dumps({"payment_id": 5}).encode(),
    ]
    async with stand_ins(command_line, "--json") as running, httpx.AsyncClient() as client:
        for content in bodies:
            answer = await say(client, running, "order", content=content)
            assert (answer.status_code, answer.json()) == (422, {"taken": False, "repeated": False}), content
        for destination in ("inventory", "notification"):
            answer = await say(client, running, destination, json=order)
            assert answer.status_code == 422
        well_formed = await say(client, running, "order")
        assert (well_formed.status_code, well_formed.json()) == (200, {"taken": True, "repeated": False})
        await until(lambda: running.has_shown(len(bodies) + 3))
    shown = [json.loads(line) for line in running.shown]
    assert [one["status"] for one in shown] == [422] * (len(bodies) + 2) + [200]
    assert [one["body"] for one in shown[:6]] == ["", "payment", "\ufffd", "null", "[]", "{}"]


async def test_stand_ins_survive_bodies_that_are_hardly_json(command_line: CommandLine) -> None:
    bodies = {
        "long number": b'{"payment_id": ' + b"5" * 5000 + b', "payment_status": "COMPLETED"}',
        "deep": b"[" * 100_000,
        "not a number": b'{"payment_id": NaN, "payment_status": "COMPLETED"}',
        "half a character": rb'{"payment_id": 5, "payment_status": "\ud800", "more": 1}',
    }
    found = {}
    async with stand_ins(command_line, "--json") as running, httpx.AsyncClient() as client:
        for name, content in bodies.items():
            answer = await say(client, running, "order", content=content)
            received = await client.get(running.url("order") + "/received")
            found[name] = (answer.status_code, received.status_code)
        assert found == dict.fromkeys(bodies, (422, 200))
        await until(lambda: running.has_shown(len(bodies)))
    for line in running.shown:
        json.loads(line, parse_constant=pytest.fail)


async def test_stand_ins_are_found_on_their_own_port_and_path_alone(command_line: CommandLine) -> None:
    async with stand_ins(command_line) as running, httpx.AsyncClient() as client:
        for destination, (method, path, body) in TAKEN.items():
            for other in TAKEN.keys() - {destination}:
                answer = await client.request(method, running.url(other) + path, json=body)
                assert answer.status_code == 404, (destination, other)
            assert (await client.get(running.url(destination) + path)).status_code == 405
        assert (await client.post(running.url("order") + "/v1/orders", json={})).status_code == 404
        assert (await client.get(running.url("order") + "/received")).json() == []
        assert await end(running.process, signal.SIGTERM) == 0
    assert running.shown == []


async def test_stand_ins_give_the_terminal_no_orders(command_line: CommandLine) -> None:
    reason = "Payment\x1b[2J failed\x9b31m\r\a"
    async with stand_ins(command_line) as running, httpx.AsyncClient() as client:
        answer = await say(client, running, "inventory", json={"order_id": 41, "reason": reason})
        assert answer.status_code == 200
        await until(lambda: running.has_shown(1))
    (line,) = running.shown
    assert line.isprintable()
    assert "Payment" in line


async def test_a_port_in_use_stops_the_stand_ins_with_5(command_line: CommandLine) -> None:
    port = free_ports()
    with socket.create_server(("127.0.0.1", port + 1)):
        commands = [("peers", f"--port={first}") for first in (port - 1, port, port + 1)]
        results = await all_at_once(command_line, *commands)
    for result in results:
        assert (result.exit_code, result.stdout) == (UNAVAILABLE, "")
        assert "the stand-ins could not start on 127.0.0.1" in result.stderr
        assert "export" not in result.stderr
        assert_no_traceback(result)


async def test_options_of_stand_ins_that_make_no_sense_exit_2_and_are_named(command_line: CommandLine) -> None:
    cases = {
        "--down=payments": "payments: is no peer: order, inventory, notification",
        "--fail-rate=1.1": "--fail-rate",
        "--fail-rate=-0.1": "--fail-rate",
        "--delay=-1": "--delay",
        "--port=65534": "--port",
    }
    results = await all_at_once(command_line, *(("peers", option) for option in cases))
    for word, result in zip(cases.values(), results, strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, ""), word
        assert word in result.stderr
        assert_no_traceback(result)


async def test_three_processes_charge_relay_and_take_exactly_what_is_to_be_told(command_line: CommandLine) -> None:
    async with stand_ins(command_line, "--json") as running:
        shop = elsewhere(command_line, **running.environment)
        charged = await shop.run(*charge_options(41), "--reference=R-41", "--json")
        number = str(charged.json["payment_id"])
        partly = await shop.run("refund", number, *REASON, "--amount=30.25", "--yes")
        whole = await shop.run("refund", number, *REASON, "--yes")
        declined = await shop.run(*charge_options(42, "4000.02"), "--reference=R-42", "--json")
        cash = await shop.run(*charge_options(43, method="COD"), "--json")
        cancelled = await shop.run("cancel", str(cash.json["payment_id"]))
        results = (charged, partly, whole, declined, cash, cancelled)
        assert [result.exit_code for result in results] == [0, 0, 0, DECLINED, 0, 0]
        assert running.shown == []
        relayed = await shop.run("relay", "--once", "--json")
        assert (relayed.exit_code, relayed.stderr) == (0, "")
        assert await end(running.process, signal.SIGTERM) == 0
    shown = [json.loads(line) for line in running.shown]
    assert {(one["status"], one["repeated"], one["traceparent"]) for one in shown} == {(200, False, None)}
    assert relayed.json == [
        tally("order", delivered=4),
        tally("inventory", delivered=3),
        tally("notification", delivered=4),
    ]

    def told(destination: str) -> list[tuple[str, str, Any]]:
        found = sorted(
            (one for one in shown if one["destination"] == destination), key=lambda one: int(one["idempotency_key"])
        )
        return [(one["method"], one["path"], one["body"]) for one in found]

    paid_id, declined_id, cash_id = (result.json["payment_id"] for result in (charged, declined, cash))
    assert told("order") == [
        ("PATCH", f"/v1/orders/{order_id}/payment-status", {"payment_id": payment_id, "payment_status": status})
        for order_id, payment_id, status in (
            (41, paid_id, "COMPLETED"),
            (41, paid_id, "REFUNDED"),
            (42, declined_id, "FAILED"),
            (43, cash_id, "CANCELLED"),
        )
    ]
    assert told("inventory") == [
        ("POST", "/v1/inventory/release", {"order_id": order_id, "reason": reason})
        for order_id, reason in ((41, "Payment refunded"), (42, "Payment failed"), (43, "Payment cancelled"))
    ]
    assert told("notification") == [
        ("POST", "/v1/notifications", {"user_id": 7, "type": kind, "message": message, "channel": "EMAIL"})
        for kind, message in (
            ("PAYMENT_SUCCESS", "Your payment of 100.00 INR was received. Reference: R-41."),
            (
                "PAYMENT_REFUNDED",
                "30.25 INR of your payment were refunded. Reference: R-41. Reason: Damaged in transit",
            ),
            (
                "PAYMENT_REFUNDED",
                "69.75 INR of your payment were refunded. Reference: R-41. Reason: Damaged in transit",
            ),
            ("PAYMENT_FAILED", "Your payment of 4000.02 INR failed. Reference: R-42."),
        )
    ]
    arrived = [int(one["idempotency_key"]) for one in shown if one["path"] == "/v1/orders/41/payment-status"]
    assert arrived == sorted(arrived)
    by_request: dict[str, set[str]] = defaultdict(set)
    for one in shown:
        by_request[one["request_id"]].add(one["destination"])
    assert sorted(map(sorted, by_request.values())) == [  # each of the five commands that told anybody anything
        ["inventory", "notification", "order"],
        ["inventory", "notification", "order"],
        ["inventory", "order"],
        ["notification"],
        ["notification", "order"],
    ]


async def _is_connected(pid: int) -> bool:
    """Whether somebody talks to a process."""
    return any(connection.status == psutil.CONN_ESTABLISHED for connection in psutil.Process(pid).net_connections())


def free_ports() -> int:
    """The first of three neighbouring ports that nobody uses."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, suppress(OSError, OverflowError):
            port: int = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)), socket.create_server(("127.0.0.1", port + 2)):
                return port
