"""Handler of `/v1/gateway/events`: where the gateway tells what became of charges and refunds, of its own accord."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eci_pay.service import PaymentService

SIGNATURE_HEADER = "stripe-signature"


async def take(request: Request) -> Response:
    """POST /v1/gateway/events"""
    service: PaymentService = request.state.service
    await service.gateway_events.take(await request.body(), request.headers.get(SIGNATURE_HEADER))
    return JSONResponse({"received": True})
