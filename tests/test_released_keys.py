"""Keys that are released, claimed anew or left behind: no answer lands under a claim that it is not of."""

import asyncio
from dataclasses import replace

import pytest

from eci_pay import idempotency
from eci_pay.answers import Answer
from eci_pay.errors import IdempotencyKeyInFlight, OrderAlreadyPaid, OrderExists, OrderInProgress, Unavailable
from eci_pay.gateways import GatewayCharge, GatewayRefund, GatewayUnavailable, Outcome
from eci_pay.idempotency import Finish
from eci_pay.payments import Payments
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.rows import paid
from tests.support import (
    FAULTS_IN_BOOKS,
    UNTIL_TIMEOUT_SECONDS,
    Books,
    ManualClock,
    Opener,
    RecordingGateway,
    Session,
    Sessions,
    charge_request,
    create_request,
    refund_request,
    until,
)

BOTH = pytest.mark.parametrize("kind", ["charge", "refund"])
WAITING = """
SELECT pid, query_start FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


async def happened(event: asyncio.Event) -> None:
    """Waits for an event, but not for ever: a test that fails must end."""
    async with asyncio.timeout(UNTIL_TIMEOUT_SECONDS):
        await event.wait()


class FirstUnreachable(RecordingGateway):
    """Cannot be reached the first time, as soon as it may say so; what comes later it answers when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_refuse = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.times_asked = 0

    async def charge(self, charge: GatewayCharge) -> Outcome:
        await self._wait()
        return await super().charge(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        await self._wait()
        return await super().refund(refund)

    async def asked(self, times: int) -> None:
        """Waits until it was asked so often."""

        async def reached() -> bool:
            return self.times_asked == times

        await until(reached)

    async def _wait(self) -> None:
        self.times_asked += 1
        if self.times_asked == 1:
            await happened(self.may_refuse)
            raise GatewayUnavailable("refused")
        await happened(self.may_answer)


class Leisurely(Payments):
    """Stops before it reads a payment, and again when it has."""

    def __init__(self, payments: Payments) -> None:
        super().__init__(payments._database, payments._read_payment)
        self.arrived, self.may_read = asyncio.Event(), asyncio.Event()
        self.has_read, self.may_return = asyncio.Event(), asyncio.Event()

    async def by_id(self, payment_id: int | None) -> PaymentView:
        await self._before()
        view = await super().by_id(payment_id)
        await self._after()
        return view

    async def with_begin_id(self, payment_id: int) -> tuple[PaymentView, str | None]:
        await self._before()
        found = await super().with_begin_id(payment_id)
        await self._after()
        return found

    async def _before(self) -> None:
        self.arrived.set()
        await happened(self.may_read)

    async def _after(self) -> None:
        self.has_read.set()
        await happened(self.may_return)


async def ask(service: PaymentService, kind: str, payments: Payments | None = None) -> Answer:
    """The charge of order 1, or a part refunded of payment 1, always under the key `k`."""
    payments = payments or service.payments
    if kind == "charge":
        return await replace(service.charges, payments=payments).charge(request=charge_request(1), idempotency_key="k")
    return await replace(service.refunds, payments=payments).refund(
        payment_id=1, request=refund_request("40"), idempotency_key="k"
    )


async def prepare(service: PaymentService, kind: str) -> None:
    """A refund needs a payment that was made."""
    if kind == "refund":
        assert await paid(service, 1) == [1]


async def assert_booked_once(books: Books, kind: str) -> None:
    """The later request's operation is booked, the released one is not, and the key holds the later's answer."""
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    assert await books.value("SELECT status FROM payments") == "COMPLETED"
    assert await books.value("SELECT refunded_amount FROM payments") == (40 if kind == "refund" else 0)
    status_code = await books.value("SELECT status_code FROM idempotency_keys WHERE idempotency_key = 'k'")
    assert status_code == (200 if kind == "refund" else 201)


# Released and claimed anew


@BOTH
@pytest.mark.parametrize("answered", [False, True])
async def test_a_replayer_of_a_released_claim_stores_nothing_into_the_claim_that_follows(
    opened: Opener, service: PaymentService, books: Books, *, kind: str, answered: bool
) -> None:
    await prepare(service, kind)
    gateway = FirstUnreachable()
    async with opened(gateway=gateway) as busy:
        first = asyncio.create_task(ask(busy, kind))
        await gateway.asked(1)
        leisurely = Leisurely(busy.payments)
        replayer = asyncio.create_task(ask(busy, kind, leisurely))
        await happened(leisurely.arrived)
        gateway.may_refuse.set()
        with pytest.raises(Unavailable):
            await first
        leisurely.may_read.set()
        await happened(leisurely.has_read)
        anew = asyncio.create_task(ask(busy, kind))
        await gateway.asked(2)
        if answered:
            gateway.may_answer.set()
            await anew
        leisurely.may_return.set()
        with pytest.raises(IdempotencyKeyInFlight):
            await replayer
        gateway.may_answer.set()
        told = await anew
        replay = await ask(busy, kind)
    assert (told.status_code, told.replayed) == (200 if kind == "refund" else 201, False)
    assert replay == replace(told, replayed=True)
    await assert_booked_once(books, kind)


@BOTH
async def test_an_answer_with_the_begin_id_of_an_earlier_claim_is_not_stored(
    opened: Opener, service: PaymentService, books: Books, clock: ManualClock, kind: str
) -> None:
    await prepare(service, kind)
    gateway = FirstUnreachable()
    gateway.may_refuse.set()
    stale = Answer(status_code=402, body="of the earlier claim", payment_id=1)
    row = "SELECT * FROM idempotency_keys WHERE idempotency_key = 'k'"
    async with opened(gateway=gateway) as busy:
        with pytest.raises(Unavailable):
            await ask(busy, kind)
        [earlier] = await books.rows(row)
        finish = Finish(key_id=earlier["id"], begin_id=earlier["begin_id"], answer=stale, at=clock.now)
        assert await busy.charges.phases.finish_for_another(finish) is None  # released
        assert await books.rows(row) == [earlier]
        anew = asyncio.create_task(ask(busy, kind))
        await gateway.asked(2)
        [claimed] = await books.rows(row)
        assert (claimed["id"], claimed["response_body"]) == (earlier["id"], None)
        assert claimed["begin_id"] != earlier["begin_id"]
        stored = await busy.database.transaction(lambda connection: idempotency.finish(connection, [finish]))
        assert (stored, await books.rows(row)) == ({}, [claimed])
        gateway.may_answer.set()
        told = await anew
        assert await busy.charges.phases.finish_for_another(finish) is None  # claimed anew and finished
        assert await ask(busy, kind) == replace(told, replayed=True)
    await assert_booked_once(books, kind)


@BOTH
async def test_a_replay_while_its_key_is_released_is_told_in_flight_and_never_that_it_was_declined(
    opened: Opener, service: PaymentService, books: Books, kind: str
) -> None:
    await prepare(service, kind)
    gateway = FirstUnreachable()
    async with opened(gateway=gateway) as busy:
        first = asyncio.create_task(ask(busy, kind))
        await gateway.asked(1)
        leisurely = Leisurely(busy.payments)
        replayer = asyncio.create_task(ask(busy, kind, leisurely))
        await happened(leisurely.arrived)
        gateway.may_refuse.set()
        with pytest.raises(Unavailable):
            await first
        leisurely.may_read.set()
        leisurely.may_return.set()
        with pytest.raises(IdempotencyKeyInFlight):
            await replayer
        gateway.may_answer.set()
        again = await ask(busy, kind)
    assert (again.status_code, again.replayed) == (200 if kind == "refund" else 201, False)
    await assert_booked_once(books, kind)


@BOTH
async def test_replays_at_any_moment_of_a_release_are_told_in_flight_or_start_anew(
    opened: Opener, service: PaymentService, books: Books, kind: str
) -> None:
    await prepare(service, kind)
    gateway = FirstUnreachable()
    gateway.may_answer.set()
    async with opened(gateway=gateway) as busy:
        first = asyncio.create_task(ask(busy, kind))
        await gateway.asked(1)
        replays = [asyncio.create_task(ask(busy, kind)) for _ in range(40)]
        gateway.may_refuse.set()
        with pytest.raises(Unavailable):
            await first
        replays += [asyncio.create_task(ask(busy, kind)) for _ in range(10)]
        results = await asyncio.gather(*replays, return_exceptions=True)
        last = await ask(busy, kind)
    for result in results:
        if isinstance(result, Answer):
            assert result.body == last.body
        else:
            assert isinstance(result, IdempotencyKeyInFlight | OrderInProgress)
    await assert_booked_once(books, kind)


class LockedAndUnreachable(RecordingGateway):
    """Cannot be reached; as it says so, somebody holds the payment."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self.reachable = False

    async def charge(self, charge: GatewayCharge) -> Outcome:
        await self._refuse()
        return await super().charge(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        await self._refuse()
        return await super().refund(refund)

    async def _refuse(self) -> None:
        if not self.reachable:
            await self._session.execute("SELECT FROM payments FOR UPDATE")
            raise GatewayUnavailable("refused")


@BOTH
async def test_a_release_that_finds_its_payment_locked_is_tried_again(
    opened: Opener, service: PaymentService, books: Books, sessions: Sessions, kind: str
) -> None:
    await prepare(service, kind)
    session = await sessions()
    gateway = LockedAndUnreachable(session)
    tries = set()

    async def tried_again() -> bool:
        tries.update([tuple(row.values()) for row in await books.rows(WAITING)])
        return len(tries) > 1

    short = {"eci_pay_lock_timeout_seconds": 0.1, "eci_pay_settle_retry_seconds": 15.0}
    async with opened(gateway=gateway, **short) as busy:
        asking = asyncio.create_task(ask(busy, kind))
        await until(tried_again)
        await session.rollback()
        with pytest.raises(Unavailable, match="gateway"):
            await asking
        if kind == "charge":
            assert await books.value("SELECT status FROM payments") == "FAILED"
        else:
            assert await books.value("SELECT status FROM refunds") == "FAILED"
            assert await books.value("SELECT refunded_amount FROM payments") == 0
        assert await books.rows(FAULTS_IN_BOOKS, 1) == []
        gateway.reachable = True
        assert not (await ask(busy, kind)).replayed
    await assert_booked_once(books, kind)


# Left unfinished


UNFINISHED = "UPDATE idempotency_keys SET response_body = NULL, status_code = NULL WHERE idempotency_key = 'c'"


async def test_an_unfinished_key_of_a_creation_tells_nobody_of_the_charge_that_took_its_payment_over(
    service: PaymentService, books: Books
) -> None:
    create = create_request(1, user_id=7, amount="5")
    created = await service.charges.create(request=create, idempotency_key="c")
    await books.rows(UNFINISHED)
    charged = await service.charges.charge(request=charge_request(1, user_id=9, amount="70"), idempotency_key="k")
    assert (charged.status_code, charged.payment_id) == (201, created.payment_id)
    with pytest.raises(OrderExists) as told:
        await service.charges.create(request=create, idempotency_key="c")
    assert told.value.payment_id == created.payment_id
    assert await books.value("SELECT response_body FROM idempotency_keys WHERE idempotency_key = 'c'") is None
    assert (await service.payments.by_order(1)).user_id == 9


@pytest.mark.parametrize(("amount", "status_code", "error"), [("70", 201, OrderAlreadyPaid), ("4000.11", 202, None)])
async def test_an_unfinished_key_of_a_cash_charge_tells_nobody_of_the_card_that_took_its_payment_over(
    service: PaymentService, books: Books, *, amount: str, status_code: int, error: type[Exception] | None
) -> None:
    cash = charge_request(1, payment_method="COD")
    await service.charges.charge(request=cash, idempotency_key="c")
    await books.rows(UNFINISHED)
    card = charge_request(1, user_id=9, amount=amount)
    assert (await service.charges.charge(request=card, idempotency_key="k")).status_code == status_code
    with pytest.raises(error or OrderInProgress):
        await service.charges.charge(request=cash, idempotency_key="c")
    assert await books.value("SELECT response_body FROM idempotency_keys WHERE idempotency_key = 'c'") is None
