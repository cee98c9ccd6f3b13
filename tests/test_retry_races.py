"""What an operator puts back meets relays that are at work: the line stays in order all the same."""

import asyncio
from typing import Any

import pytest

from eci_pay.database import fetch
from eci_pay.messages import Destination
from eci_pay.outbox import Delivery, Outcome
from eci_pay.service import PaymentService
from tests.peers import Peers, Reply, Taken
from tests.rows import paid
from tests.support import Books, Relays, Session, Sessions, refund_request, until, until_lock_waits

ORDER = Destination.ORDER
CANDIDATES: dict[str, Any] = {"destination": "order", "count_max": 10, "due_for_seconds": 0.0}
LEASE: dict[str, Any] = {"lease_seconds": 60.0, "lease_id": "00000000-0000-4000-8000-000000000001"}
POISONED, HEALTHY = 60, 100


async def dead_before_pending(telling: PaymentService, books: Books) -> tuple[int, int]:
    """A line to Order whose first message is dead and whose second is still to be delivered."""
    [payment_id] = await paid(telling, 1)
    await telling.refunds.refund(payment_id=payment_id, request=refund_request())
    first, second = await books.rows("SELECT message_id FROM outbox WHERE destination = 'order' ORDER BY sequence")
    await books.rows("UPDATE outbox SET dead_at = now() WHERE message_id = %s", first["message_id"])
    return first["message_id"], second["message_id"]


async def locked(session: Session, message_id: int) -> dict[str, Any]:
    """A relay's claim of this very message, half done: what it will lease."""
    [found] = await fetch(session, "outbox_candidates", CANDIDATES)
    assert found["message_id"] == message_id
    return {**LEASE, "message_ids": [message_id], "due_at": [found["due_at"]]}


async def test_a_retry_that_meets_a_claim_of_the_next_message_sees_itself_overtaken(
    telling: PaymentService, books: Books, sessions: Sessions
) -> None:
    first, second = await dead_before_pending(telling, books)
    relay = await sessions()
    lease = await locked(relay, second)
    retrying = asyncio.create_task(telling.outbox.retry([first]))
    await until_lock_waits(books)
    assert [row["message_id"] for row in await fetch(relay, "outbox_lease", lease)] == [second]
    await relay.commit()
    [retried] = await retrying
    assert (retried.requeued, retried.overtaken_by) == (False, second)
    assert await books.value("SELECT dead_at FROM outbox WHERE message_id = %s", first) is not None


async def test_a_claim_takes_no_message_before_which_another_was_put_back_meanwhile(
    telling: PaymentService, books: Books, sessions: Sessions
) -> None:
    first, second = await dead_before_pending(telling, books)
    relay = await sessions()
    lease = await locked(relay, second)
    await books.rows("UPDATE outbox SET dead_at = NULL WHERE message_id = %s", first)
    assert await fetch(relay, "outbox_lease", lease) == []
    await relay.commit()
    claimed = await telling.outbox.claim(ORDER, count_max=10, lease_seconds=60)
    assert [message.message_id for message in claimed] == [first]


async def test_a_retry_waits_for_the_messages_that_are_being_written(
    telling: PaymentService, books: Books, sessions: Sessions
) -> None:
    """Else the next message could be committed, leased and delivered between its look and its commit."""
    [payment_id] = await paid(telling, 1)
    first = await books.value("SELECT message_id FROM outbox WHERE destination = 'order'")
    await books.rows("UPDATE outbox SET dead_at = now() WHERE message_id = %s", first)
    settling = await sessions()
    await settling.execute("SELECT FROM payments WHERE payment_id = %s FOR NO KEY UPDATE", (payment_id,))
    retrying = asyncio.create_task(telling.outbox.retry([first]))
    await until_lock_waits(books)
    await settling.execute(
        "INSERT INTO outbox (payment_id, sequence, destination, event, payload, delivered_at)"
        " VALUES (%s, 3, 'order', 'payment.refunded', '{}', now())",
        (payment_id,),
    )
    await settling.commit()
    [retried] = await retrying
    assert not retried.requeued
    assert retried.overtaken_by is not None


async def test_messages_that_are_put_back_together_arrive_in_their_order(
    telling: PaymentService, books: Books, relays: Relays, peers: Peers
) -> None:
    first, second = await dead_before_pending(telling, books)
    await books.rows("UPDATE outbox SET dead_at = now() WHERE message_id = %s", second)
    assert [result.requeued for result in await telling.outbox.retry([second, first])] == [True, True]
    async with relays() as relay:
        await relay.drain()
    assert [one.message_id for one in peers.accepted(ORDER)] == [first, second]


@pytest.mark.parametrize("booked", [True, False])
async def test_a_delivery_that_cannot_be_booked_does_not_keep_others_from_it(
    telling: PaymentService, books: Books, *, booked: bool
) -> None:
    await paid(telling, 1, 2, 3)
    messages = await telling.outbox.claim(ORDER, count_max=10, lease_seconds=60)
    if not booked:
        await books.rows(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$"
        )
        await books.rows(
            "CREATE TRIGGER refuse BEFORE UPDATE ON outbox FOR EACH ROW"
            f" WHEN (new.message_id = {messages[1].message_id}) EXECUTE FUNCTION refuse()"
        )
    marked = await telling.outbox.mark([Delivery(message=message, outcome=Outcome.DELIVERED) for message in messages])
    expected = {message.message_id for message in messages} - (set() if booked else {messages[1].message_id})
    assert {one.message_id for one in marked} == expected
    found = await books.rows("SELECT message_id FROM outbox WHERE delivered_at IS NOT NULL")
    assert {row["message_id"] for row in found} == expected


async def test_many_messages_that_a_peer_cannot_take_do_not_keep_it_closed_for_the_others(
    telling: PaymentService, relays: Relays, peers: Peers
) -> None:
    """They have waited longest, so that they alone would ever be tried."""

    def poisoned(one: Taken) -> Reply:
        return Reply(status=500) if int(one.path.split("/")[3]) <= POISONED else Reply()

    peers.behaviour[ORDER] = poisoned
    await paid(telling, *range(1, POISONED + HEALTHY + 1))
    stopped = asyncio.Event()

    async def all_arrived() -> bool:
        return len(peers.accepted(ORDER)) == HEALTHY

    async with relays(eci_pay_relay_retry_seconds=60.0, eci_pay_relay_timeout_seconds=5.0) as relay:
        running = asyncio.create_task(relay.run_until(stopped))
        await until(all_arrived)
        stopped.set()
        await running
    assert peers.repeated() == {}
