"""Between begin and settle: the gateway is asked, and whatever it does is booked."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from eci_pay.errors import Unavailable
from eci_pay.gateways import Approved, Declined, GatewayUnavailable, Outcome
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from eci_pay.views import PaymentView
from tests.rows import paid
from tests.support import Books, ManualClock, Opener, RecordingGateway, Scripted, charge_request, refund_request, until


async def test_a_charge_runs_to_its_end_although_its_waiter_is_cancelled(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    request = charge_request(1, amount="4000.10")
    waiter = asyncio.create_task(service.charges.charge(request=request, idempotency_key="k"))

    async def asked() -> bool:
        return bool(gateway.charges)

    await until(asked)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter

    async def completed() -> bool:
        return bool(await books.value("SELECT status FROM payments") == "COMPLETED")

    await until(completed)
    replay = await service.charges.charge(request=request, idempotency_key="k")
    assert (replay.status_code, replay.replayed, len(gateway.charges)) == (201, True, 1)


class RunningClock(ManualClock):
    """Jumps on whenever it is looked at, once it runs."""

    step = timedelta(0)

    def __call__(self) -> Any:
        self.now += self.step
        return self.now


async def test_what_comes_too_late_is_not_sent_and_its_key_is_free(
    settings: Settings, database_url: str, gateway: RecordingGateway, books: Books
) -> None:
    clock = RunningClock()
    async with payment_service(settings, database_url, gateway=gateway, clock=clock) as service:
        [payment_id] = await paid(service, 1)
        gateway.charges.clear()
        clock.step = timedelta(seconds=settings.eci_pay_send_deadline_seconds, microseconds=1)
        with pytest.raises(Unavailable):
            await service.charges.charge(request=charge_request(2), idempotency_key="k")
        with pytest.raises(Unavailable):
            await service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
        assert (gateway.charges, gateway.refunds) == ([], [])
        assert await books.value("SELECT status FROM payments WHERE order_id = 2") == "FAILED"
        assert await books.value("SELECT refunded_amount FROM payments WHERE order_id = 1") == 0
        clock.step = timedelta(0)
        answer = await service.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await service.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert (answer.status_code, refund.status_code, answer.replayed or refund.replayed) == (201, 200, False)
    assert [charge.key[-2:] for charge in gateway.charges] == ["-2"]


async def test_an_unreachable_gateway_fails_the_attempt_and_the_same_key_starts_the_next(
    opened: Opener, books: Books
) -> None:
    reachable = False

    def script() -> Outcome | None:
        if not reachable:
            raise GatewayUnavailable("refused")
        return None

    gateway = Scripted(script)
    async with opened(gateway=gateway) as service:
        with pytest.raises(Unavailable):
            await service.charges.charge(request=charge_request(1), idempotency_key="k")
        assert await books.value("SELECT status FROM payments") == "FAILED"
        reachable = True
        answer = await service.charges.charge(request=charge_request(1), idempotency_key="k")
        assert (answer.status_code, PaymentView.model_validate_json(answer.body).attempt) == (201, 2)
        reachable = False
        refund = partial(
            service.refunds.refund, payment_id=answer.payment_id, request=refund_request("40"), idempotency_key="r"
        )
        with pytest.raises(Unavailable):
            await refund()
        assert await books.value("SELECT refunded_amount FROM payments") == 0
        reachable = True
        assert (await refund()).status_code == 200
    assert await books.value("SELECT refunded_amount FROM payments") == 40
    assert (await books.rows("SELECT idempotency_key, status_code FROM idempotency_keys ORDER BY 1")) == [
        {"idempotency_key": "k", "status_code": 201},
        {"idempotency_key": "r", "status_code": 200},
    ]


async def test_an_adapter_that_breaks_leaves_the_outcome_unknown(
    opened: Opener, service: PaymentService, books: Books
) -> None:
    def broken() -> Outcome | None:
        raise KeyError("amount")

    [payment_id] = await paid(service, 1)
    async with opened(gateway=Scripted(broken)) as unlucky:
        charge = await unlucky.charges.charge(request=charge_request(2), idempotency_key="k")
        refund = await unlucky.refunds.refund(payment_id=payment_id, request=refund_request(), idempotency_key="r")
    assert charge.is_unknown
    assert refund.is_unknown
    assert await books.value("SELECT status FROM payments WHERE order_id = 2") == "PROCESSING"
    assert await books.value("SELECT refund_pending FROM payments WHERE order_id = 1") == 100
    assert (await service.charges.charge(request=charge_request(2), idempotency_key="k")).is_unknown


LONG = "\0\ud800é" * 1000


@pytest.mark.parametrize(
    ("outcome", "status_codes"),
    [(Approved(reference=LONG, message=LONG), [201, 200]), (Declined(code=LONG, message=LONG), [402])],
)
async def test_texts_of_the_gateway_are_cut_and_booked_however_long_and_strange(
    opened: Opener, books: Books, outcome: Outcome, status_codes: list[int]
) -> None:
    async with opened(gateway=Scripted(lambda: outcome)) as service:
        answer = await service.charges.charge(request=charge_request(1), idempotency_key="k")
        told = [answer.status_code]
        if not answer.is_declined:
            refund = await service.refunds.refund(payment_id=answer.payment_id, request=refund_request())
            told.append(refund.status_code)
    assert told == status_codes
    assert await books.value("SELECT length(gateway_response) FROM payments") >= 400
    assert (await books.value("SELECT status FROM payments")) in ("REFUNDED", "FAILED")


async def test_an_adapter_that_cancels_itself_leaves_the_outcome_unknown(
    settings: Settings, database_url: str, books: Books
) -> None:
    def cancel_itself() -> Outcome | None:
        raise asyncio.CancelledError

    async with payment_service(settings, database_url, gateway=Scripted(cancel_itself)) as service:
        answer = await service.charges.charge(request=charge_request(), idempotency_key="k")
        assert answer.is_unknown
    assert await books.value("SELECT status FROM payments") == "PROCESSING"
    assert await books.value("SELECT status_code FROM idempotency_keys") == 202
