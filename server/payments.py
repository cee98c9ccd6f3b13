"""Handlers of `/v1/payments`."""

from starlette.requests import Request
from starlette.responses import Response

from eci_pay.answers import RETRY_UNKNOWN_AFTER_SECONDS, Answer
from eci_pay.requests import (
    ChargeRequest,
    CreateRequest,
    RefundRequest,
    StatusUpdateRequest,
    parse_order_id,
    parse_payment_id,
)
from eci_pay.service import PaymentService
from eci_pay.views import View
from server import problems
from server.access import caller_of
from server.bodies import optional_key, read_body, read_query, required_key

CREATED, ACCEPTED = 201, 202


async def charge(request: Request) -> Response:
    """POST /v1/payments/charge"""
    key = required_key(request)
    body = await read_body(request, ChargeRequest)
    return answered(
        await _service(request).charges.charge(request=body, idempotency_key=key, caller=caller_of(request))
    )


async def create(request: Request) -> Response:
    """POST /v1/payments"""
    key = optional_key(request)
    body = await read_body(request, CreateRequest)
    return answered(
        await _service(request).charges.create(request=body, idempotency_key=key, caller=caller_of(request))
    )


async def refund(request: Request) -> Response:
    """POST /v1/payments/{payment_id}/refund"""
    payment_id = parse_payment_id(request.path_params["payment_id"])
    key = optional_key(request)
    body = await read_body(request, RefundRequest)
    service = _service(request)
    return answered(
        await service.refunds.refund(
            payment_id=payment_id, request=body, idempotency_key=key, caller=caller_of(request)
        )
    )


async def update_status(request: Request) -> Response:
    """PATCH /v1/payments/{payment_id}/status"""
    payment_id = parse_payment_id(request.path_params["payment_id"])
    body = await read_body(request, StatusUpdateRequest)
    return shown(await _service(request).status_changes.update(payment_id=payment_id, request=body))


async def cancel(request: Request) -> Response:
    """DELETE /v1/payments/{payment_id}"""
    payment_id = parse_payment_id(request.path_params["payment_id"])
    return shown(await _service(request).status_changes.cancel(payment_id=payment_id))


async def show(request: Request) -> Response:
    """GET /v1/payments/{payment_id}"""
    payment_id = parse_payment_id(request.path_params["payment_id"])
    return shown(await _service(request).payments.by_id(payment_id))


async def show_order(request: Request) -> Response:
    """GET /v1/payments/order/{order_id}"""
    order_id = parse_order_id(request.path_params["order_id"])
    return shown(await _service(request).payments.by_order(order_id))


async def show_transaction(request: Request) -> Response:
    """GET /v1/payments/transaction/{transaction_id}"""
    return shown(await _service(request).payments.by_transaction(request.path_params["transaction_id"]))


async def list_payments(request: Request) -> Response:
    """GET /v1/payments"""
    return shown(await _service(request).payments.page(read_query(request)))


def answered(answer: Answer) -> Response:
    """A recorded answer, its bytes as they were stored."""
    headers = {}
    if answer.status_code in (CREATED, ACCEPTED):
        headers["Location"] = f"/v1/payments/{answer.payment_id}"
    if answer.is_unknown:
        headers["Retry-After"] = str(RETRY_UNKNOWN_AFTER_SECONDS)
    if answer.replayed:
        headers["Idempotent-Replayed"] = "true"
    media_type = problems.MEDIA_TYPE if answer.is_declined else "application/json"
    return Response(answer.body, answer.status_code, headers, media_type)


def shown(view: View) -> Response:
    """What is in the books."""
    return Response(view.model_dump_json(), media_type="application/json")


def _service(request: Request) -> PaymentService:
    service: PaymentService = request.state.service
    return service
