"""`eci-pay show`: a payment's history in the order of time, with what other services were told."""

from dataclasses import replace
from datetime import datetime

import pytest

from eci_pay.outbox import MESSAGES_OF_PAYMENT_MAX
from eci_pay.service import PaymentService
from tests.peers import Peers
from tests.rows import paid
from tests.support import Books, CommandLine, ManualClock, refund_request
from tests.test_cli import assert_no_traceback

DEAD = (
    "dead_at = '2026-11-01 15:00Z', attempts = 9, first_attempt_at = '2026-11-01 12:00:01.5Z', last_error = 'HTTP 500'"
)
DELIVERED = "delivered_at = '2026-11-01 12:00:00.25Z', attempts = 1, first_attempt_at = '2026-11-01 12:00:00.25Z'"
WAITING = (
    "next_attempt_at = '2999-01-01Z', attempts = 2, first_attempt_at = '2026-11-01 12:30Z', last_error = 'refused [x]'"
)

LONG = f"{(datetime(2999, 1, 1) - datetime(2026, 11, 1, 15)).days}d 9h"  # noqa: DTZ001


@pytest.fixture
def operator(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The command line where all three peers are configured."""
    return replace(command_line, environment={**command_line.environment, **peers.environment()})


async def become(books: Books, what: str, destination: str, event: str) -> None:
    """A message is what its deliveries have made of it."""
    await books.rows(f"UPDATE outbox SET {what} WHERE destination = %s AND event = %s", destination, event)


def steps_of(shown: str) -> list[str]:
    """The rows of the timeline, each in one line."""
    lines = shown.split("Description")[1].splitlines()[2:]
    unfolded = "".join(f"\n{line}" if line.startswith(" 2") else line for line in lines)
    return [" ".join(row.split()) for row in unfolded.strip().splitlines()]


async def test_a_history_is_told_in_the_order_of_time_with_the_distance_of_each_step(
    operator: CommandLine, telling: PaymentService, books: Books, clock: ManualClock
) -> None:
    [payment_id] = await paid(telling, 1)
    clock.advance(seconds=0.012)
    await telling.refunds.refund(payment_id=payment_id, request=refund_request("40.00"))
    await become(books, DELIVERED, "notification", "payment.completed")
    await become(books, DEAD, "order", "payment.completed")
    await become(books, WAITING, "notification", "refund.completed")
    result = await operator.run("show", str(payment_id))
    assert (result.exit_code, result.stderr) == (0, "")
    assert_no_traceback(result)
    steps = steps_of(result.stdout)
    assert steps[0] == "2026-11-01 12:00:00.000 PAYMENT 100.00 PROCESSING Charge begun"
    assert steps[1].startswith("2026-11-01 12:00:00.000 +0.000 s PAYMENT 100.00 COMPLETED Charge approved")
    assert steps[2:4] == [
        "2026-11-01 12:00:00.000 +0.000 s to order queued message 1, payment.completed",
        "2026-11-01 12:00:00.000 +0.000 s to notification queued message 2, payment.completed",
    ]
    assert steps[4] == (
        "2026-11-01 12:00:00.012 +0.012 s REFUND 40.00 PROCESSING Refund begun: Customer changed their mind"
    )
    assert "+0.000 s refund 1 40.00 COMPLETED Customer changed their mind (RFND" in steps[6]
    assert steps[8:] == [
        "2026-11-01 12:00:00.250 +0.238 s to notification delivered message 2, payment.completed, after 1 delivery",
        "2026-11-01 12:00:01.500 +1.250 s to order failed message 1, payment.completed, delivery 1",
        "2026-11-01 12:30:00.000 +29m 58s to notification failed message 3, refund.completed, delivery 1",
        "2026-11-01 15:00:00.000 +2h 30m to order dead message 1, payment.completed, after 9 deliveries: HTTP 500",
        f"2999-01-01 00:00:00.000 +{LONG} to notification waiting until "
        "message 3, refund.completed, after 2 deliveries: refused [x]",
    ]


async def test_json_has_the_messages_beside_the_members_of_the_http_answer(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(telling, 1)
    view = await telling.payments.by_id(payment_id)
    shown = (await operator.run("show", "--order=1", "--json")).json
    assert shown.keys() == {*view.model_dump(), "messages", "messages_left_out"}
    told = view.model_dump(mode="json")
    assert shown == {
        **told,
        "transactions": [{**each, "actor": None} for each in told["transactions"]],
        **{name: shown[name] for name in ("messages", "messages_left_out")},
    }
    assert [(each["destination"], each["state"]) for each in shown["messages"]] == [
        ("order", "pending"),
        ("notification", "pending"),
    ]
    assert shown["messages_left_out"] == 0


async def test_of_very_many_messages_the_latest_are_shown(
    operator: CommandLine, telling: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(telling, 1)
    await books.rows(
        "INSERT INTO outbox (payment_id, sequence, destination, event, payload)"
        " SELECT %s, n, 'order', 'payment.completed', '{}' FROM generate_series(3, %s) n",
        payment_id,
        MESSAGES_OF_PAYMENT_MAX + 5,
    )
    table = await operator.run("show", str(payment_id))
    assert table.stdout.count("to order") == 2 * MESSAGES_OF_PAYMENT_MAX  # queued, and waiting
    assert "and 5 messages more" in table.stderr
    as_json = (await operator.run("show", str(payment_id), "--json")).json
    sequences = [message["sequence"] for message in as_json["messages"]]
    assert sequences == list(range(6, MESSAGES_OF_PAYMENT_MAX + 6))
    assert as_json["messages_left_out"] == 5
