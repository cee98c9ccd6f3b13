"""`eci-pay outbox ...` as operators run it: what is stuck is seen, sent again or deleted, and nothing by mistake."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from eci_pay.messages import Destination
from eci_pay.service import PaymentService
from tests.peers import Peers, Reply
from tests.rows import paid
from tests.support import Books, CommandLine, CommandResult, charge_request, refund_request
from tests.test_cli import ESCAPE, assert_no_traceback, at_terminal, charge_options, elsewhere

INVALID, LEFT_ALONE, NOT_FOUND, UNAVAILABLE = 2, 3, 4, 5
FIELDS = {
    "message_id", "payment_id", "sequence", "destination", "event", "state", "attempts", "created_at",
    "first_attempt_at", "next_attempt_at", "delivered_at", "dead_at", "last_error", "request_id", "traceparent",
    "payload",
}  # fmt: skip

DELIVERED = "delivered_at = now()"
DEAD = "dead_at = now(), attempts = 9, first_attempt_at = now() - interval '3 days', last_error = 'HTTP 500'"
LEASED = "lease_id = gen_random_uuid(), next_attempt_at = now() + interval '1 hour'"
ABANDONED = "lease_id = gen_random_uuid(), next_attempt_at = now() - interval '1 minute'"
WAITING = "next_attempt_at = now() + interval '1 hour', attempts = 3, first_attempt_at = now(), last_error = 'reset'"
"""What a message may have become, as an UPDATE writes it."""


@pytest.fixture
def operator(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The command line where all three peers are configured."""
    return replace(command_line, environment={**command_line.environment, **peers.environment()})


async def become(books: Books, what: str, *message_ids: int) -> None:
    """Messages are what deliveries, or their failure, have made of them."""
    await books.rows(f"UPDATE outbox SET {what} WHERE message_id = ANY (%s)", list(message_ids))


async def messages_of(books: Books, payment_id: int) -> dict[tuple[str, str], int]:
    """The ids of a payment's messages, by destination and event."""
    rows = await books.rows("SELECT * FROM outbox WHERE payment_id = %s", payment_id)
    return {(row["destination"], row["event"]): row["message_id"] for row in rows}


async def refunded(service: PaymentService, books: Books, order_id: int = 1) -> dict[tuple[str, str], int]:
    """The messages of a payment that was charged and refunded: two of them to the order service."""
    [payment_id] = await paid(service, order_id)
    await service.refunds.refund(payment_id=payment_id, request=refund_request())
    return await messages_of(books, payment_id)


async def everything(books: Books) -> list[dict[str, Any]]:
    """The outbox as it is."""
    return await books.rows("SELECT * FROM outbox ORDER BY message_id")


async def only(books: Books, message_id: int) -> dict[str, Any]:
    """One message as it is, and whether it is due."""
    query = "SELECT *, next_attempt_at <= now() AS is_due FROM outbox WHERE message_id = %s"
    (row,) = await books.rows(query, message_id)
    return row


async def many(books: Books, count: int, what: str, *, then: str | None = None, destination: str = "order") -> None:
    """Adds payments with a message each and, where `then` says what it became, a later one to the same peer."""
    await books.rows(
        "WITH payment AS ("
        " INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id, last_sequence)"
        " SELECT (SELECT count(*) FROM payments) + n, 7, 1, 'UPI', gen_random_uuid(), 2 FROM generate_series(1, %s) n"
        " RETURNING payment_id"
        ") INSERT INTO outbox (payment_id, sequence, destination, event, payload)"
        " SELECT payment_id, 1, %s, 'payment.completed', '{}' FROM payment",
        count,
        destination,
    )
    added = "SELECT message_id FROM outbox ORDER BY message_id DESC LIMIT %s"
    await books.rows(f"UPDATE outbox SET {what} WHERE message_id IN ({added})", count)
    if then is not None:
        await books.rows(
            "INSERT INTO outbox (payment_id, sequence, destination, event, payload)"
            f" SELECT payment_id, 2, destination, 'payment.refunded', '{{}}' FROM outbox WHERE message_id IN ({added})",
            count,
        )
        await books.rows(f"UPDATE outbox SET {then} WHERE message_id IN ({added})", count)


def ids_in(result: CommandResult) -> list[int]:
    """The messages of a page."""
    assert result.exit_code == 0, result.stderr
    return [message["message_id"] for message in result.json["messages"]]


# list and show


async def test_messages_that_are_not_delivered_are_listed_with_all_that_is_known_of_them(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    message = await refunded(telling, books)
    order, email = message["order", "payment.completed"], message["notification", "payment.completed"]
    last = message["notification", "refund.completed"]
    await become(books, DEAD, order)
    await become(books, DELIVERED, email)
    await become(books, LEASED, last)
    await become(books, ABANDONED, message["order", "payment.refunded"])
    result = await operator.run("outbox", "list", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.json.keys() == {"messages", "next_cursor"}
    assert result.json["next_cursor"] is None
    listed = result.json["messages"]
    assert [set(row) for row in listed] == [FIELDS] * 4
    assert [(row["message_id"], row["state"]) for row in listed] == [
        (order, "dead"),
        (last, "in-delivery"),
        (message["order", "payment.refunded"], "pending"),
        (message["inventory", "payment.refunded"], "pending"),
    ]
    dead = listed[0]
    assert (dead["destination"], dead["event"], dead["sequence"]) == ("order", "payment.completed", 1)
    assert dead["payload"] == {"payment_id": dead["payment_id"], "payment_status": "COMPLETED"}
    assert (dead["attempts"], dead["last_error"], dead["next_attempt_at"]) == (9, "HTTP 500", None)
    assert dead["dead_at"].endswith("Z")
    assert dead["created_at"] == "2026-11-01T12:00:00Z"
    table = await operator.run("outbox", "list")
    assert table.exit_code == 0
    shown = [line.split() for line in table.stdout.splitlines() if "payment.completed" in line]
    assert shown == [[str(order), "1", "order", "payment.completed", "dead", "9", "HTTP", "500"]]
    assert "4 messages" in table.stderr
    assert "--cursor" not in table.stderr


async def test_the_list_is_filtered_by_state_and_peer(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    first, second = await refunded(telling, books, 1), await refunded(telling, books, 2)
    await become(books, DEAD, first["order", "payment.completed"], second["notification", "payment.completed"])
    await become(books, DELIVERED, first["notification", "payment.completed"])
    undelivered = {**{(1, *name): number for name, number in first.items()},
                   **{(2, *name): number for name, number in second.items()}}  # fmt: skip
    del undelivered[1, "notification", "payment.completed"]
    dead = [first["order", "payment.completed"], second["notification", "payment.completed"]]
    pending = sorted(set(undelivered.values()) - set(dead))

    def to(peer: str, among: list[int]) -> list[int]:
        return [number for (_, name, _), number in undelivered.items() if name == peer and number in among]

    expected: dict[tuple[str, ...], list[int]] = {
        ("--dead",): dead,
        ("--pending",): pending,
        ("--dead", "--pending"): sorted(undelivered.values()),
        ("--peer=order",): sorted(to("order", dead + pending)),
        ("--peer=ORDER", "--dead"): dead[:1],
        ("--peer=notification", "--pending"): sorted(to("notification", pending)),
        ("--peer=inventory", "--dead"): [],
    }
    results = await asyncio.gather(*(operator.run("outbox", "list", "--json", *filters) for filters in expected))
    assert dict(zip(expected, map(ids_in, results), strict=True)) == expected
    none = await operator.run("outbox", "list", "--peer=inventory", "--dead")
    assert (none.exit_code, none.stderr.strip()) == (0, "0 messages")


@pytest.mark.parametrize("limit", [4, 5])
async def test_a_cursor_walks_all_pages_in_order(
    operator: CommandLine, telling: PaymentService, books: Books, limit: int
) -> None:
    """Ten messages: the last page is full for some limits, and no empty one follows."""
    await refunded(telling, books, 1)
    await refunded(telling, books, 2)
    ids = [row["message_id"] for row in await everything(books)]
    await become(books, DEAD, *ids[1::3])
    await become(books, "destination = 'notification'", *ids[::2])
    pages: list[list[int]] = []
    cursor: str | None = None
    while not pages or cursor is not None:
        after = () if cursor is None else ("--cursor", cursor)
        result = await operator.run("outbox", "list", "--json", f"--limit={limit}", *after)
        pages.append(ids_in(result))
        cursor = result.json["next_cursor"]
    assert [number for page in pages for number in page] == ids
    assert [len(page) for page in pages] == [limit] * (len(ids) // limit) + [len(ids) % limit] * bool(len(ids) % limit)


async def test_the_table_tells_how_to_see_the_next_page(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, *range(1, 12))
    first = await operator.run("outbox", "list")
    assert "20 messages" in first.stderr
    option = re.search(r"next page: --cursor (\d+)$", first.stderr, re.MULTILINE)
    assert option is not None
    rest = await operator.run("outbox", "list", "--json", "--cursor", option[1])
    assert ids_in(rest) == [row["message_id"] for row in await everything(books)][20:]
    beyond = await operator.run("outbox", "list", "--json", f"--cursor={2**64}")
    assert ids_in(beyond) == []


async def test_a_cursor_of_0_does_not_hide_what_there_is(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    """It is the start, or it is refused: an empty page would say that nothing is stuck."""
    await paid(telling, 1)
    result = await operator.run("outbox", "list", "--json", "--cursor=0")
    assert result.exit_code == INVALID or ids_in(result) == [row["message_id"] for row in await everything(books)]


async def test_a_message_is_shown_by_its_number(operator: CommandLine, telling: PaymentService, books: Books) -> None:
    request = charge_request(1, reference="[bold]\x1b[31mRed")
    payment_id = (await telling.charges.charge(request=request, idempotency_key="k")).payment_id
    message = await messages_of(books, payment_id)
    email, order = message["notification", "payment.completed"], message["order", "payment.completed"]
    await become(books, WAITING.replace("reset", "HTTP 503 [red]\x1b[2J"), email)
    await become(books, DELIVERED, order)
    waiting, delivered = await asyncio.gather(
        operator.run("outbox", "show", str(email), "--json"), operator.run("outbox", "show", f"0{order}", "--json")
    )
    for result, row, state in ((waiting, await only(books, email), "pending"),
                               (delivered, await only(books, order), "delivered")):  # fmt: skip
        assert result.exit_code == 0
        assert result.json.keys() == FIELDS
        same = ("message_id", "payment_id", "sequence", "destination", "event", "payload", "attempts", "last_error")
        assert {name: result.json[name] for name in same} == {name: row[name] for name in same}
        assert result.json["state"] == state
    assert waiting.json["next_attempt_at"] is not None
    assert waiting.json["delivered_at"] is None
    assert (delivered.json["next_attempt_at"], delivered.json["delivered_at"] is None) == (None, False)
    shown = await operator.run("outbox", "show", str(email))
    assert shown.exit_code == 0
    for text in (f"Message {email}", "pending", "payment.completed", "HTTP 503 [red]", "[bold]", "100.00 INR"):
        assert text in shown.stdout
    assert ESCAPE not in shown.stdout


async def test_what_is_no_message_exits_4_and_what_is_no_number_2(
    operator: CommandLine, telling: PaymentService
) -> None:
    await paid(telling, 1)
    unknown = ["3", "0", "9223372036854775807", "9" * 40]
    no_number = ["x", "", "1.0", "+1", "\u0661", "1,2"]
    arguments = [("outbox", "show", text) for text in unknown] + [("outbox", "retry", text) for text in unknown[:2]]
    results = await asyncio.gather(*(operator.run(*each) for each in arguments))
    for each, result in zip(arguments, results, strict=True):
        assert result.exit_code == NOT_FOUND, each
        assert "[message-not-found]" in result.stderr
        assert_no_traceback(result)
    results = await asyncio.gather(*(operator.run("outbox", "show", text) for text in no_number))
    for text, result in zip(no_number, results, strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, ""), text
        assert "message_id: must be a whole number" in result.stderr
        assert_no_traceback(result)
    as_json = await operator.run("outbox", "show", "99", "--json")
    assert (as_json.exit_code, as_json.stdout) == (NOT_FOUND, "")
    assert json.loads(as_json.stderr)["code"] == "message-not-found"


async def test_what_is_invalid_exits_2_is_named_and_changes_nothing(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    message = await refunded(telling, books)
    dead = message["order", "payment.completed"]
    await become(books, DEAD, dead)
    await become(books, DELIVERED, message["notification", "payment.completed"])
    before = await everything(books)
    cases: dict[tuple[str, ...], str] = {
        ("list", "--peer=bank"): "bank: is no peer: order, inventory, notification",
        ("list", "--peer="): "is no peer",
        ("list", "--limit=0"): "--limit",
        ("list", "--limit=1001"): "--limit",
        ("list", "--cursor=x"): "must be a whole number",
        ("show",): "MESSAGE_ID",
        ("retry",): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", "--dead"): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", "--peer=order"): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", "--overtaken"): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", str(dead), "--dead"): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", str(dead), "--peer=order", "--dead"): "give MESSAGE_IDs, or --peer with --dead",
        ("retry", "--peer=bank", "--dead"): "bank: is no peer",
        ("retry", str(dead), "x"): "must be a whole number",
        ("retry", *map(str, range(1, 1002))): "at most 1000 messages",
        ("purge",): "--older-than",
        ("purge", "--older-than=1s", "--dead"): "--yes",
        ("stats", "extra"): "extra",
        ("no-such-command",): "no-such-command",
    }
    for age in ("", "7", "d", "7x", "-7d", "1.5d", "7 d", "\uff17d", "36501d", "9999999999s"):
        cases["purge", f"--older-than={age}"] = f"{age}: is no time such as 90d, 12h or 30m"
    results = await asyncio.gather(*(operator.run("outbox", *arguments) for arguments in cases))
    for (arguments, words), result in zip(cases.items(), results, strict=True):
        assert (result.exit_code, result.stdout) == (INVALID, ""), arguments
        assert words in " ".join(result.stderr.replace("│", " ").split()), (arguments, result.stderr)
        assert_no_traceback(result)
    assert await everything(books) == before


async def test_without_a_database_each_command_exits_5(tmp_path: Any) -> None:
    away = CommandLine({"DATABASE_URL": "postgresql://nobody:s3cret@127.0.0.1:1/none"}, tmp_path)
    commands = [("list",), ("retry", "--peer=order", "--dead"), ("purge", "--older-than=1d"), ("stats", "--json")]
    for result in await asyncio.gather(*(away.run("outbox", *arguments) for arguments in commands)):
        assert (result.exit_code, result.stdout) == (UNAVAILABLE, "")
        assert "unavailable" in result.stderr
        assert "s3cret" not in result.stderr
        assert_no_traceback(result)


# retry


async def test_a_dead_message_that_is_retried_is_delivered_by_the_next_relay(
    operator: CommandLine, telling: PaymentService, books: Books, peers: Peers
) -> None:
    """From the refusal of a peer to the repair, with nothing but commands."""
    await paid(telling, 1)
    peers.behaviour[Destination.ORDER] = lambda _: Reply(400, body="no such order")
    relayed = await operator.run("relay", "--once", "--json")
    assert relayed.exit_code == 0
    tally = {row["peer"]: (row["delivered"], row["failed"], row["dead"]) for row in relayed.json}
    assert tally == {"order": (0, 0, 1), "inventory": (0, 0, 0), "notification": (1, 0, 0)}
    [stuck] = (await operator.run("outbox", "list", "--dead", "--json")).json["messages"]
    assert (stuck["state"], stuck["attempts"]) == ("dead", 1)
    assert "no such order" in stuck["last_error"]
    del peers.behaviour[Destination.ORDER]
    peers.behaviour[Destination.ORDER] = lambda _: Reply()
    assert (await operator.run("relay", "--once", "--json")).json[0]["delivered"] == 0
    retried = await operator.run("outbox", "retry", str(stuck["message_id"]))
    assert (retried.exit_code, retried.stdout, retried.stderr) == (0, "requeued 1 of 1 messages\n", "")
    row = await only(books, stuck["message_id"])
    assert (row["dead_at"], row["first_attempt_at"], row["attempts"], row["is_due"]) == (None, None, 0, True)
    assert (await operator.run("outbox", "show", f"{stuck['message_id']}", "--json")).json["state"] == "pending"
    assert (await operator.run("relay", "--once", "--json")).json[0]["delivered"] == 1
    assert [one.status for one in peers.tries(stuck["message_id"])] == [400, 200]
    assert (await operator.run("outbox", "list", "--json")).json == {"messages": [], "next_cursor": None}
    assert peers.repeated() == {}


async def test_all_dead_messages_of_a_peer_are_retried_and_no_others(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    payments = [await refunded(telling, books, order_id) for order_id in (1, 2, 3)]
    to_order = [message["order", "payment.completed"] for message in payments]
    overtaken, *fine = to_order
    others = [message["notification", "payment.completed"] for message in payments]
    await become(books, DEAD, *to_order, *others)
    later = payments[0]["order", "payment.refunded"]
    await become(books, DELIVERED, later)
    result = await operator.run("outbox", "retry", "--peer=order", "--dead", "--json")
    assert result.exit_code == LEFT_ALONE
    assert result.json == [
        {
            "message_id": number,
            "requeued": number != overtaken,
            "delivered": False,
            "in_delivery": False,
            "overtaken_by": later if number == overtaken else None,
        }
        for number in to_order
    ]
    states = await books.rows("SELECT message_id FROM outbox WHERE dead_at IS NOT NULL ORDER BY message_id")
    assert [row["message_id"] for row in states] == sorted([overtaken, *others])
    assert {(await only(books, number))["attempts"] for number in fine} == {0}
    again = await operator.run("outbox", "retry", "--peer=Order", "--dead", "--overtaken")
    assert (again.exit_code, again.stdout) == (0, "requeued 1 of 1 messages\n")
    none = await operator.run("outbox", "retry", "--peer=order", "--dead")
    assert (none.exit_code, none.stdout) == (0, "requeued 0 of 0 messages\n")


@pytest.mark.parametrize("is_overtaken", [False, True])
async def test_thousands_of_dead_messages_are_retried_by_one_command(
    operator: CommandLine, books: Books, is_overtaken: bool
) -> None:
    """More than one batch; also where the whole of a batch is left alone."""
    await many(books, 2500, DEAD, then=DELIVERED if is_overtaken else None)
    result = await operator.run("outbox", "retry", "--peer=order", "--dead", "--json")
    assert result.exit_code == (LEFT_ALONE if is_overtaken else 0)
    assert len({row["message_id"] for row in result.json}) == len(result.json) == 2500
    assert {row["requeued"] for row in result.json} == {not is_overtaken}
    dead = await books.value("SELECT count(*) FROM outbox WHERE dead_at IS NOT NULL")
    assert dead == (2500 if is_overtaken else 0)


async def test_what_was_delivered_or_is_in_delivery_is_left_alone(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, 1)
    delivered, leased = (row["message_id"] for row in await everything(books))
    await become(books, DELIVERED, delivered)
    await become(books, LEASED, leased)
    before = await everything(books)
    for overtaken in ((), ("--overtaken",)):
        result = await operator.run("outbox", "retry", str(delivered), str(leased), *overtaken)
        assert (result.exit_code, result.stdout) == (LEFT_ALONE, "requeued 0 of 2 messages\n")
        assert result.stderr.splitlines() == [
            f"message {delivered}: was delivered",
            f"message {leased}: is in delivery now",
        ]
        assert await everything(books) == before
    as_json = await operator.run("outbox", "retry", str(leased), str(delivered), "--json")
    assert (as_json.exit_code, as_json.stderr) == (LEFT_ALONE, "")
    assert [(row["message_id"], row["requeued"], row["delivered"], row["in_delivery"]) for row in as_json.json] == [
        (delivered, False, True, False),
        (leased, False, False, True),
    ]


async def test_a_message_that_waits_or_whose_relay_is_gone_is_due_at_once(
    operator: CommandLine, telling: PaymentService, books: Books, peers: Peers
) -> None:
    await paid(telling, 1)
    waiting, abandoned = (row["message_id"] for row in await everything(books))
    await become(books, WAITING, waiting)
    await become(books, ABANDONED, abandoned)
    result = await operator.run("outbox", "retry", str(waiting), str(abandoned))
    assert (result.exit_code, result.stdout) == (0, "requeued 2 of 2 messages\n")
    for number in (waiting, abandoned):
        row = await only(books, number)
        assert (row["is_due"], row["lease_id"], row["attempts"], row["first_attempt_at"]) == (True, None, 0, None)
    relayed = await operator.run("relay", "--once", "--json")
    assert sum(row["delivered"] for row in relayed.json) == 2
    assert {one.message_id for one in peers.accepted()} == {waiting, abandoned}


@pytest.mark.parametrize("later", [DELIVERED, LEASED], ids=["delivered", "in delivery"])
async def test_a_message_whose_peer_heard_of_a_later_change_is_left_alone_unless_that_is_wanted(
    operator: CommandLine, telling: PaymentService, books: Books, peers: Peers, later: str
) -> None:
    message = await refunded(telling, books)
    old, new = message["order", "payment.completed"], message["order", "payment.refunded"]
    await become(books, DELIVERED, *(set(message.values()) - {old, new}))
    await become(books, DEAD, old)
    await become(books, later, new)
    before = await everything(books)
    refused = await operator.run("outbox", "retry", str(old))
    assert (refused.exit_code, refused.stdout) == (LEFT_ALONE, "requeued 0 of 1 messages\n")
    assert f"message {old}: message {new}, of a later change" in refused.stderr
    assert "--overtaken" in refused.stderr
    as_json = await operator.run("outbox", "retry", str(old), "--json")
    assert (as_json.exit_code, as_json.json[0]["overtaken_by"]) == (LEFT_ALONE, new)
    assert await everything(books) == before
    wanted = await operator.run("outbox", "retry", str(old), "--overtaken")
    assert (wanted.exit_code, wanted.stdout) == (0, "requeued 1 of 1 messages\n")
    assert (await everything(books))[1:] == before[1:]
    relayed = await operator.run("relay", "--once", "--json")
    assert relayed.json[0]["delivered"] == 1
    assert [one.message_id for one in peers.accepted()] == [old]


async def test_a_message_is_not_overtaken_by_what_waits_behind_it_or_was_told_to_somebody_else(
    operator: CommandLine, telling: PaymentService, books: Books, peers: Peers
) -> None:
    """What waits comes after it, in its order."""
    first, second, third = [await refunded(telling, books, order_id) for order_id in (1, 2, 3)]
    olds = [message["order", "payment.completed"] for message in (first, second, third)]
    others = [number for message in (first, second, third) for (peer, _), number in message.items() if peer != "order"]
    await become(books, DELIVERED, *others)
    await become(books, DEAD, *olds, second["order", "payment.refunded"])
    await become(books, ABANDONED, third["order", "payment.refunded"])
    result = await operator.run("outbox", "retry", *map(str, olds))
    assert (result.exit_code, result.stdout) == (0, "requeued 3 of 3 messages\n")
    assert (await only(books, second["order", "payment.refunded"]))["dead_at"] is not None
    await books.rows("UPDATE outbox SET next_attempt_at = now() WHERE next_attempt_at < now() + interval '1 minute'")
    relayed = await operator.run("relay", "--once", "--json")
    assert relayed.json[0] == {"peer": "order", "delivered": 5, "failed": 0, "dead": 0, "pending": 0}
    heard = [(one.path.split("/")[3], one.body["payment_status"]) for one in peers.accepted()]
    assert sorted(heard, key=lambda told: told[0]) == [
        ("1", "COMPLETED"),
        ("1", "REFUNDED"),
        ("2", "COMPLETED"),
        ("3", "COMPLETED"),
        ("3", "REFUNDED"),
    ]


async def test_what_is_known_among_unknown_messages_is_retried_and_the_unknown_are_named(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, 1)
    one, other = (row["message_id"] for row in await everything(books))
    await become(books, DEAD, one, other)
    huge = str(2**70)
    mixed = await operator.run("outbox", "retry", "98", str(one), huge, "99")
    assert (mixed.exit_code, mixed.stdout) == (NOT_FOUND, "requeued 1 of 1 messages\n")
    assert f"there is no message 98, {huge}, 99 [message-not-found]" in mixed.stderr
    assert ((await only(books, one))["dead_at"], (await only(books, other))["dead_at"] is None) == (None, False)
    as_json = await operator.run("outbox", "retry", "98", str(other), str(other), f"00{other}", "--json")
    assert as_json.exit_code == NOT_FOUND
    assert [(row["message_id"], row["requeued"]) for row in as_json.json] == [(other, True)]
    assert json.loads(as_json.stderr)["detail"] == "there is no message 98"
    assert await books.value("SELECT count(*) FROM outbox WHERE dead_at IS NOT NULL") == 0


# purge


async def aged(books: Books, column: str, **hours: int) -> None:
    """Moves messages into the past: `m7=3` means message 7, three hours."""
    for name, age in hours.items():
        await books.rows(
            f"UPDATE outbox SET {column} = now() - make_interval(hours => %s) WHERE message_id = %s", age, int(name[1:])
        )


async def ids(books: Books) -> list[int]:
    """The messages that are left."""
    return [row["message_id"] for row in await everything(books)]


async def test_a_purge_deletes_what_was_delivered_longer_ago_and_keeps_the_undelivered(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, *range(1, 6))
    assert await ids(books) == [*range(1, 11)]
    await books.rows("UPDATE outbox SET created_at = now() - interval '1 year'")
    await become(books, DEAD, 9)
    await become(books, LEASED, 8)
    await aged(books, "dead_at", m9=24 * 365)
    await aged(books, "delivered_at", m1=24 * 8, m2=24 * 6, m3=13, m4=11, m5=24 * 15, m6=0)
    weeks = await operator.run("outbox", "purge", "--older-than", "2w", "--json")
    assert (weeks.exit_code, weeks.json) == (0, {"deleted": 1})
    days = await operator.run("outbox", "purge", "--older-than", "7d")
    assert (days.exit_code, days.stdout) == (0, "deleted 1 delivered messages\n")
    assert await ids(books) == [2, 3, 4, 6, 7, 8, 9, 10]
    hours = await operator.run("outbox", "purge", "--older-than= 12H ", "--json")
    assert (hours.exit_code, hours.json) == (0, {"deleted": 2})
    assert await ids(books) == [4, 6, 7, 8, 9, 10]
    minutes = await operator.run("outbox", "purge", "--older-than", "30m", "--json")
    assert (minutes.json, await ids(books)) == ({"deleted": 1}, [6, 7, 8, 9, 10])
    none = await operator.run("outbox", "purge", "--older-than", "36500d", "--json")
    assert (none.json, await ids(books)) == ({"deleted": 0}, [6, 7, 8, 9, 10])
    await books.rows("UPDATE outbox SET delivered_at = now() - interval '1 minute' WHERE message_id = 6")
    all_ = await operator.run("outbox", "purge", "--older-than", "5s", "--json")
    assert (all_.json, await ids(books)) == ({"deleted": 1}, [7, 8, 9, 10])


async def test_a_purge_of_dead_messages_wants_yes_and_deletes_nothing_else(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, 1, 2, 3)
    await become(books, DEAD, 1, 3, 4)
    await aged(books, "dead_at", m1=24 * 8, m3=24 * 6, m4=24 * 8)
    await aged(books, "delivered_at", m2=24 * 8)
    before = await everything(books)
    refused = await operator.run("outbox", "purge", "--older-than=7d", "--dead", stdin="y\n")
    assert (refused.exit_code, refused.stdout) == (INVALID, "")
    assert "add --yes to delete dead messages" in refused.stderr
    for typed in ("n\n", "\n"):
        exit_code, shown = await at_terminal(operator, "outbox", "purge", "--older-than=7d", "--dead", typed=typed)
        assert exit_code == INVALID
        assert "Delete dead messages? Nobody will be told what they say." in shown
    assert await everything(books) == before
    at_a_terminal = await at_terminal(operator, "outbox", "purge", "--older-than=8d", "--dead", typed="y\n")
    assert at_a_terminal[0] == 0
    assert "deleted 2 dead messages" in at_a_terminal[1]
    assert await ids(books) == [2, 3, 5, 6]
    with_yes = await operator.run("outbox", "purge", "--older-than=1h", "--dead", "--yes", "--json")
    assert (with_yes.exit_code, with_yes.json) == (0, {"deleted": 1})
    assert await ids(books) == [2, 5, 6]


async def test_thousands_of_messages_are_purged_by_one_command(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    await paid(telling, 1)
    await many(books, 2500, "delivered_at = now() - interval '2 days'")
    result = await operator.run("outbox", "purge", "--older-than", "1d")
    assert (result.exit_code, result.stdout) == (0, "deleted 2,500 delivered messages\n")
    assert await ids(books) == [1, 2]


async def test_a_delivered_message_stays_while_a_dead_one_before_it_may_be_retried(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    """Else a retry would not see that it was overtaken. What is dead of another line, or later, does not count."""
    message, other = await refunded(telling, books, 1), await refunded(telling, books, 2)
    dead, overtook = message["order", "payment.completed"], message["order", "payment.refunded"]
    dead_later = other["order", "payment.refunded"]
    await books.rows("UPDATE outbox SET delivered_at = now() - interval '9 days'")
    for number in (dead, dead_later):
        await become(books, f"{DEAD}, delivered_at = NULL", number)
        await become(books, "dead_at = now() - interval '9 days'", number)
    purged = await operator.run("outbox", "purge", "--older-than=7d", "--json")
    assert purged.json == {"deleted": 7}
    assert await ids(books) == [dead, overtook, dead_later]
    retried = await operator.run("outbox", "retry", str(dead), "--json")
    assert (retried.exit_code, retried.json[0]["overtaken_by"]) == (LEFT_ALONE, overtook)
    gone = await operator.run("outbox", "purge", "--older-than=7d", "--dead", "--yes", "--json")
    assert (gone.json, await ids(books)) == ({"deleted": 2}, [overtook])
    assert (await operator.run("outbox", "purge", "--older-than=7d", "--json")).json == {"deleted": 1}


# stats


async def test_stats_count_by_state_and_tell_the_age_of_the_oldest(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    empty = await operator.run("outbox", "stats", "--json")
    nothing = {"pending": 0, "in_delivery": 0, "oldest_pending_seconds": None, "dead": 0, "oldest_dead_seconds": None}
    assert empty.json == [{"destination": name, **nothing} for name in ("order", "inventory", "notification")]
    await paid(telling, *range(1, 7))
    numbers = [row["message_id"] for row in await everything(books)]
    to_order, emails = numbers[::2], numbers[1::2]
    await books.rows("UPDATE outbox SET created_at = now() - interval '77 hours 30 minutes'")
    await become(books, "created_at = now() - interval '200 hours'", to_order[0], emails[0])
    await become(books, DELIVERED, to_order[0])
    await become(books, LEASED, to_order[1])
    await become(books, ABANDONED, to_order[2])
    await become(books, DEAD, emails[0], emails[1])
    result = await operator.run("outbox", "stats", "--json")
    assert result.exit_code == 0
    order, inventory, notification = result.json
    hour = 3600
    for each, age in ((order.pop("oldest_pending_seconds"), 77.5), (notification.pop("oldest_pending_seconds"), 77.5),
                      (notification.pop("oldest_dead_seconds"), 200)):  # fmt: skip
        assert age * hour <= each < (age + 0.25) * hour
    assert order == {
        "destination": "order", "pending": 5, "in_delivery": 1, "dead": 0, "oldest_dead_seconds": None
    }  # fmt: skip
    assert inventory == {"destination": "inventory", **nothing}
    assert notification == {"destination": "notification", "pending": 4, "in_delivery": 0, "dead": 2}
    table = await operator.run("outbox", "stats")
    rows = [line.split() for line in table.stdout.splitlines()]
    assert ["order", "5", "1", "3d", "5h", "0"] in rows
    assert ["inventory", "0", "0", "0"] in rows
    assert ["notification", "4", "0", "3d", "5h", "2", "8d", "8h"] in rows


# A process that is configured for fewer peers than others


def warned_of(result: CommandResult) -> list[str]:
    """The variables that standard error says are not set."""
    return re.findall(r"(\w+_SERVICE_URL) is not set here", result.stderr)


async def test_a_command_that_would_tell_nobody_warns_where_others_do_tell(
    command_line: CommandLine, operator: CommandLine, telling: PaymentService, books: Books, peers: Peers
) -> None:
    quiet = await command_line.run("outbox", "stats")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    await refunded(telling, books)
    for reading in (("outbox", "stats", "--json"), ("outbox", "list", "--json"), ("list", "--json")):
        result = await command_line.run(*reading)
        assert (result.exit_code, result.stderr) == (0, "")
    for changing in (charge_options(3), ("cancel", "9"), ("refund", "9", "--reason=Changed their mind", "--yes")):
        result = await command_line.run(*changing)
        assert warned_of(result) == ["INVENTORY_SERVICE_URL", "NOTIFICATION_SERVICE_URL", "ORDER_SERVICE_URL"]
    partly = elsewhere(command_line, NOTIFICATION_SERVICE_URL=peers.environment()["NOTIFICATION_SERVICE_URL"])
    charged = await partly.run(*charge_options(2))
    assert charged.exit_code == 0
    assert warned_of(charged) == ["INVENTORY_SERVICE_URL", "ORDER_SERVICE_URL"]
    payment_id = await books.value("SELECT payment_id FROM payments WHERE order_id = 2")
    assert list(await messages_of(books, payment_id)) == [("notification", "payment.completed")]
    assert warned_of(await operator.run(*charge_options(4))) == []


async def test_a_peer_that_nobody_has_told_anything_lately_is_not_missed(
    command_line: CommandLine, telling: PaymentService, books: Books
) -> None:
    message = await refunded(telling, books)
    await many(books, 999, DELIVERED, destination="notification")
    assert max(message.values()) == message["inventory", "payment.refunded"]
    lately = await command_line.run("cancel", "999")
    assert warned_of(lately) == ["INVENTORY_SERVICE_URL", "NOTIFICATION_SERVICE_URL"]
    await many(books, 1, DELIVERED, destination="notification")
    assert warned_of(await command_line.run("cancel", "999")) == ["NOTIFICATION_SERVICE_URL"]
