"""Group commit: concurrent writes share a commit, a lone one waits for nobody, every waiter has its own result."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import psycopg
import pytest

from eci_pay.answers import Answer
from eci_pay.context import bind_origin, current_request_id
from eci_pay.errors import Busy, OrderAlreadyPaid, Unavailable
from eci_pay.gateways import GatewayCharge, Outcome
from eci_pay.group_commit import Aside, GroupCommit
from eci_pay.service import PaymentService
from tests.support import (
    Books,
    Opener,
    RecordingGateway,
    Sessions,
    assert_books_are_true,
    charge_request,
    names,
    refund_request,
    until_lock_waits,
)


class Writer:
    """Writes numbers when it may, and remembers its batches. A negative number is its own error."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.request_ids: list[str] = []
        self.may_write = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self, rows: Sequence[int], patient: bool) -> list[int | Exception]:
        self.batches.append(list(rows))
        self.request_ids.append(current_request_id())
        await self.may_write.wait()
        if self.error is not None:
            raise self.error
        return [ValueError(row) if row < 0 else 10 * row for row in rows]

    async def has_begun(self, batches: int) -> None:
        """Waits until so many batches are on their way."""
        async with asyncio.timeout(5):
            while len(self.batches) < batches:  # noqa: ASYNC110 - it is told by the turn of the loop
                await asyncio.sleep(0)


async def asked(write: GroupCommit[int, int | Exception], *rows: int) -> list[asyncio.Task[int | Exception]]:
    """Asks for rows and lets the loop turn, so that they wait or are on their way."""
    tasks = [asyncio.create_task(write(row)) for row in rows]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_a_lone_row_is_written_at_once_and_those_that_come_meanwhile_go_together() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=1, batch_max=3)
    first = await asked(write, 1)
    assert writer.batches == [[1]]
    others = await asked(write, 2, 3, 4, 5)
    assert writer.batches == [[1]]
    writer.may_write.set()
    assert await asyncio.gather(*first, *others) == [10, 20, 30, 40, 50]
    assert writer.batches == [[1], [2, 3, 4], [5]]
    assert await write(6) == 60


async def test_who_asks_at_the_very_moment_at_which_a_lane_ends_is_written() -> None:
    writer = Writer()
    writer.may_write.set()
    write = GroupCommit(writer, lanes=1, batch_max=3)
    async with asyncio.timeout(5):
        assert [await write(row) for row in range(3)] == [0, 10, 20]


async def test_those_that_ask_in_the_same_turn_share_the_first_batch() -> None:
    writer = Writer()
    writer.may_write.set()
    write = GroupCommit(writer, lanes=2, batch_max=10)
    assert await asyncio.gather(*(write(row) for row in range(4))) == [0, 10, 20, 30]
    assert writer.batches == [[0, 1, 2, 3]]


async def test_no_more_batches_are_on_their_way_than_there_are_lanes() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=2, batch_max=1)
    tasks = await asked(write, 1, 2, 3)
    assert writer.batches == [[1], [2]]
    writer.may_write.set()
    assert await asyncio.gather(*tasks) == [10, 20, 30]


async def test_one_too_many_is_refused_and_the_others_are_written() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=1, batch_max=1, queue_max=2)
    tasks = [*await asked(write, 1), *await asked(write, 2, 3)]
    with pytest.raises(Unavailable, match="too many"):
        await write(4)
    writer.may_write.set()
    assert await asyncio.gather(*tasks) == [10, 20, 30]
    assert await write(5) == 50


async def test_each_waiter_has_its_own_result_and_an_error_of_the_whole_batch_reaches_them_all() -> None:
    writer = Writer()
    writer.may_write.set()
    write = GroupCommit(writer, lanes=1, batch_max=10)
    good, bad, other = await asyncio.gather(write(1), write(-2), write(3))
    assert (good, str(bad), other) == (10, "-2", 30)
    writer.error = Unavailable("the database is away")
    results = await asyncio.gather(write(1), write(2), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, Unavailable]
    writer.error = None
    assert await write(4) == 40


async def test_a_batch_that_is_cancelled_is_an_error_of_its_waiters_and_not_their_cancellation() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=1, batch_max=10)
    (waiting,) = await asked(write, 1)
    (running,) = write._tasks
    running.cancel()
    with pytest.raises(Unavailable):
        await waiting
    writer.may_write.set()
    assert await write(2) == 20


async def test_who_stops_waiting_breaks_off_nobody_else_and_is_not_written_any_more() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=1, batch_max=10)
    in_batch, beside = await asked(write, 1, 2)
    waiting, gone = await asked(write, 3, 4)
    in_batch.cancel()
    gone.cancel()
    writer.may_write.set()
    assert (await beside, await waiting) == (20, 30)
    assert writer.batches == [[1, 2], [3]]


async def test_a_batch_has_no_requests_id_for_it_has_many() -> None:
    writer = Writer()
    writer.may_write.set()
    write = GroupCommit(writer, lanes=1, batch_max=10)
    bind_origin("the first request")
    await write(1)
    assert writer.request_ids == [""]
    assert current_request_id() == "the first request"


async def test_concurrent_charges_and_refunds_share_commits_and_lose_nothing(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    charges = (service.charges.charge(request=charge_request(n), idempotency_key=f"k{n}") for n in range(1, 201))
    answers = await asyncio.gather(*charges)
    assert names(answers) == {"201": 200}
    commits = "SELECT count(DISTINCT xmin::text) FROM transactions WHERE transaction_type = %s"
    assert await books.value(commits, "PAYMENT") < 200
    refunds = (
        service.refunds.refund(payment_id=answer.payment_id, request=refund_request("40"), idempotency_key=f"r{n}")
        for n, answer in enumerate(answers)
    )
    assert names(await asyncio.gather(*refunds)) == {"200": 200}
    assert await books.value(commits, "REFUND") < 200
    await assert_books_are_true(books, gateway)


async def test_rows_with_the_same_claim_are_written_one_after_the_other_and_hold_up_nobody_else() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=2, batch_max=10, claims=lambda row: (row % 10,))
    tasks = await asked(write, 1, 11, 2, 21)
    assert writer.batches == [[1, 2]]
    tasks += await asked(write, 31, 3)
    assert writer.batches == [[1, 2], [3]]
    writer.may_write.set()
    assert await asyncio.gather(*tasks) == [10, 110, 20, 210, 310, 30]
    assert writer.batches == [[1, 2], [3], [11], [21], [31]]


class Locks(Writer):
    """Some numbers are locked: whoever writes them patiently waits, for the others they are Busy together."""

    def __init__(self) -> None:
        super().__init__()
        self.locked = {7}
        self.unlocked = asyncio.Event()
        self.may_write.set()

    async def __call__(self, rows: Sequence[int], patient: bool) -> list[int | Exception]:
        results = await super().__call__(rows, patient)
        if self.locked.isdisjoint(rows):
            return results
        if patient:
            await self.unlocked.wait()
            return results
        return [Busy("it is locked") for _ in rows]


async def test_a_locked_row_leaves_its_batch_and_waits_alone() -> None:
    locks = Locks()
    write = GroupCommit(locks, lanes=1, batch_max=10)
    locked, *others = await asked(write, 7, 1, 2)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*others) == [10, 20]
    assert not locked.done()
    # So many locked rows wait elsewhere, and one more row is written all the same.
    locks.locked |= set(range(100, 120))
    waiting = await asked(write, *range(100, 120))
    async with asyncio.timeout(5):
        assert await write(3) == 30
    locks.unlocked.set()
    assert await asyncio.gather(locked, *waiting) == [70, *range(1000, 1200, 10)]


async def test_rows_that_find_no_room_beside_the_lanes_are_busy_after_a_while() -> None:
    locks = Locks()
    locks.locked = {7, 8, 9}
    write = GroupCommit(locks, lanes=1, batch_max=10, aside=Aside(connections=4), wait_seconds=0.2)
    first, *others = await asked(write, 7, 8, 9)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*others, return_exceptions=True)
    assert [type(result) for result in results] == [Busy, Busy]
    locks.unlocked.set()
    assert (await first, await write(8)) == (70, 80)


async def test_a_row_waits_no_longer_than_it_may_and_is_not_written_then() -> None:
    writer = Writer()
    write = GroupCommit(writer, lanes=1, batch_max=1, wait_seconds=0.05)
    first, late = await asked(write, 1, 2)
    await asyncio.sleep(0.1)  # this is what takes too long
    writer.may_write.set()
    assert await first == 10
    with pytest.raises(Unavailable, match="too long"):
        await late
    assert (await write(3), writer.batches) == (30, [[1], [3]])


async def test_a_defect_of_the_writer_reaches_those_who_wait_and_ends_nothing() -> None:
    async def forgets_one(rows: Sequence[int], _patient: bool) -> list[int]:
        return list(rows[1:])

    write = GroupCommit(forgets_one, lanes=1, batch_max=10)
    for _ in range(2):
        results = await asyncio.gather(write(1), write(2), return_exceptions=True)
        assert [type(result) for result in results] == [int, ValueError]


async def test_a_lane_that_is_cancelled_before_it_begins_is_replaced() -> None:
    writer = Writer()
    writer.may_write.set()
    write = GroupCommit(writer, lanes=1, batch_max=10)
    asking = asyncio.ensure_future(write(1))
    await asyncio.sleep(0)
    (lane,) = write._tasks
    lane.cancel()
    async with asyncio.timeout(5):
        assert await asking == 10


ORDERS = range(1, 33)
LOCKED_ORDER = 9


class Gathering(RecordingGateway):
    """Answers no charge before it has all of them, and something was done then."""

    def __init__(self, do: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self._do = do
        self._may_answer = asyncio.Event()

    async def charge(self, charge: GatewayCharge) -> Outcome:
        outcome = await super().charge(charge)
        if len(self.charges) == len(ORDERS):
            await self._do()
            self._may_answer.set()
        await self._may_answer.wait()
        return outcome


async def charged(service: PaymentService, order_id: int) -> Answer:
    return await service.charges.charge(request=charge_request(order_id), idempotency_key=f"k{order_id}")


async def refunded(service: PaymentService, order_id: int) -> Answer:
    payment_id = (await service.payments.by_order(order_id)).payment_id
    request = refund_request("40")
    return await service.refunds.refund(payment_id=payment_id, request=request, idempotency_key=f"r{order_id}")


@pytest.mark.parametrize("phase", ["begin", "settle", "refund"])
async def test_a_locked_payment_holds_up_none_of_those_that_share_its_batch(
    opened: Opener, books: Books, sessions: Sessions, phase: str
) -> None:
    locker = await sessions()

    async def lock() -> None:
        await locker.execute(b"SELECT FROM payments WHERE order_id = %s FOR UPDATE", [LOCKED_ORDER])

    gateway = Gathering(lock) if phase == "settle" else RecordingGateway()
    async with opened(eci_pay_lock_timeout_seconds=5.0, gateway=gateway) as service:
        ask = charged
        if phase == "begin":
            declined = charge_request(LOCKED_ORDER, amount="4000.02", payment_method="CREDIT_CARD")
            await service.charges.charge(request=declined, idempotency_key="declined")
            await lock()
        elif phase == "refund":
            await asyncio.gather(*(charged(service, order_id) for order_id in ORDERS))
            await lock()
            ask = refunded
        asking = {order_id: asyncio.create_task(ask(service, order_id)) for order_id in ORDERS}
        locked = asking.pop(LOCKED_ORDER)
        async with asyncio.timeout(3):
            answers = await asyncio.gather(*asking.values())
        assert {answer.status_code for answer in answers} == {200 if phase == "refund" else 201}
        assert not locked.done()
        await locker.rollback()
        assert (await locked).status_code == answers[0].status_code
    await assert_books_are_true(books, gateway)


async def test_overload_is_refused_before_anything_is_recorded(
    opened: Opener, books: Books, sessions: Sessions, gateway: RecordingGateway
) -> None:
    async with opened(
        eci_pay_group_commit_lanes=1, eci_pay_group_commit_batch_max=1, eci_pay_group_commit_queue_max=2
    ) as busy:
        blocker = await sessions()
        await blocker.execute("LOCK TABLE payments IN EXCLUSIVE MODE")

        async def charge(order_id: int) -> Answer:
            return await busy.charges.charge(request=charge_request(order_id), idempotency_key=f"k{order_id}")

        first = asyncio.create_task(charge(1))
        await until_lock_waits(books)
        charging = [asyncio.create_task(charge(order_id)) for order_id in range(2, 11)]
        while sum(task.done() for task in charging) < 7:
            await asyncio.wait([task for task in charging if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        assert not first.done()
        await blocker.rollback()
        answers = await asyncio.gather(first, *charging, return_exceptions=True)
    assert names(answers) == {"201": 3, "Unavailable": 7}
    assert await books.value("SELECT count(*) FROM payments") == 3
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 3
    await assert_books_are_true(books, gateway)


async def test_a_row_that_the_database_rejects_does_not_fail_those_that_share_its_batch(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    await books.rows(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.order_id = 5 THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$"
    )
    await books.rows("CREATE TRIGGER refuse BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION refuse()")
    charges = (service.charges.charge(request=charge_request(n), idempotency_key=f"k{n}") for n in range(1, 11))
    results = await asyncio.gather(*charges, return_exceptions=True)
    assert isinstance(results[4], psycopg.Error)
    assert names(results) == {"201": 9, "RaiseException": 1}
    await assert_books_are_true(books, gateway)


async def test_one_order_in_one_batch_is_charged_once(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    charges = (service.charges.charge(request=charge_request(1), idempotency_key=f"k{n}") for n in range(20))
    results = await asyncio.gather(*charges, return_exceptions=True)
    counted = names(results)
    assert counted["201"] == 1
    assert set(counted) <= {"201", OrderAlreadyPaid.__name__, "OrderInProgress"}
    assert len(gateway.charges) == 1
    await assert_books_are_true(books, gateway)
