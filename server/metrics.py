"""Handler of `/metrics`."""

from starlette.requests import Request
from starlette.responses import Response

from eci_pay.metrics import CONTENT_TYPE, exposition


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(await exposition(request.state.service), headers={"Content-Type": CONTENT_TYPE})
