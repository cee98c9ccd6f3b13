"""Handlers of `/health`: is the process alive, has it started, can it work."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eci_pay.service import PaymentService


async def health(request: Request) -> Response:
    """GET /health and /health/live: asks nothing of anybody. /health/startup: the server answers only once it has
    started, so it is the same."""
    return _healthy(request)


async def ready(request: Request) -> Response:
    """GET /health/ready: 503 while the database does not answer."""
    service: PaymentService = request.state.service
    await service.check_ready()
    return _healthy(request)


def _healthy(request: Request) -> Response:
    service: PaymentService = request.state.service
    return JSONResponse(
        {
            "status": "healthy",
            "service": request.state.service_name,
            "timestamp": service.clock().isoformat(),
        }
    )
