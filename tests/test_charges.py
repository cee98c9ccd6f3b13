"""Charging an order: what the caller is told, and what the books say."""

import pytest

from eci_pay.errors import InvalidState, OrderAlreadyPaid, OrderExists, OrderInProgress
from eci_pay.lifecycle import PaymentStatus
from eci_pay.service import PaymentService
from eci_pay.views import PaymentView
from tests.support import Books, RecordingGateway, charge_request, create_request


async def test_an_approved_charge_is_captured_with_its_audit_trail(
    service: PaymentService, books: Books, gateway: RecordingGateway
) -> None:
    answer = await service.charges.charge(request=charge_request(), idempotency_key="k")
    assert answer.status_code == 201
    view = PaymentView.model_validate_json(answer.body)
    assert view == await service.payments.by_id(view.payment_id)
    assert view.status is PaymentStatus.COMPLETED
    assert view.captured_at is not None
    assert await books.audit_trail(view.payment_id) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    assert [charge.key for charge in gateway.charges] == [f"{view.transaction_id}-1"]


async def test_a_declined_order_is_charged_again_in_the_same_row_and_keeps_its_history(
    service: PaymentService, books: Books
) -> None:
    declined = await service.charges.charge(request=charge_request(amount="4000.02"), idempotency_key="first")
    assert declined.is_declined
    answer = await service.charges.charge(
        request=charge_request(amount="4000.02", payment_method="UPI"), idempotency_key="second"
    )
    view = PaymentView.model_validate_json(answer.body)
    assert (view.payment_id, view.attempt) == (declined.payment_id, 2)
    assert view == await service.payments.by_id(view.payment_id)
    assert [transaction.status for transaction in view.transactions] == [
        "PROCESSING",
        "FAILED",
        "PROCESSING",
        "COMPLETED",
    ]


async def test_cash_on_delivery_asks_no_gateway_and_waits(service: PaymentService, gateway: RecordingGateway) -> None:
    answer = await service.charges.charge(request=charge_request(payment_method="COD"), idempotency_key="cod")
    assert (answer.status_code, PaymentView.model_validate_json(answer.body).status) == (201, "PENDING")
    assert gateway.charges == []
    with pytest.raises(OrderInProgress):
        await service.charges.charge(request=charge_request(payment_method="COD"), idempotency_key="cod again")


async def test_an_unknown_outcome_is_told_and_leaves_the_payment_processing(
    service: PaymentService, books: Books
) -> None:
    request = charge_request(amount="4000.08")
    answer = await service.charges.charge(request=request, idempotency_key="k")
    assert answer.is_unknown
    again = await service.charges.charge(request=request, idempotency_key="k")
    assert again.is_unknown
    assert await books.value("SELECT status FROM payments") == "PROCESSING"
    with pytest.raises(OrderInProgress):
        await service.charges.charge(request=request, idempotency_key="other")


async def test_a_paid_created_or_cancelled_order_refuses_what_would_pay_it_twice(service: PaymentService) -> None:
    await service.charges.charge(request=charge_request(1), idempotency_key="a")
    with pytest.raises(OrderAlreadyPaid):
        await service.charges.charge(request=charge_request(1), idempotency_key="b")
    created = await service.charges.create(request=create_request(2))
    with pytest.raises(OrderExists):
        await service.charges.create(request=create_request(2))
    await service.status_changes.cancel(payment_id=created.payment_id)
    with pytest.raises(InvalidState):
        await service.charges.charge(request=charge_request(2), idempotency_key="c")
