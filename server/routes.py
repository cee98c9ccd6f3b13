"""The whole route table."""

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server import gateway_events, health, metrics, payments

Handler = Callable[[Request], Awaitable[Response]]


class Resource:
    """All the methods of one path, so that a 405 can name each of them."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._allow = ", ".join(handlers)
        self._handlers = dict(handlers)
        if "GET" in handlers:
            self._handlers["HEAD"] = handlers["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. What is raised, `Requests` answers."""
        handler = self._handlers.get(scope["method"])
        if handler is None:
            detail = f"This path allows {self._allow}."
            raise HTTPException(405, detail, {"Allow": self._allow})
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


TABLE: dict[str, dict[str, Handler]] = {
    "/v1/payments/charge": {"POST": payments.charge},
    "/v1/payments/{payment_id}": {"GET": payments.show, "DELETE": payments.cancel},
    "/v1/payments": {"GET": payments.list_payments, "POST": payments.create},
    "/v1/payments/order/{order_id}": {"GET": payments.show_order},
    "/v1/payments/transaction/{transaction_id}": {"GET": payments.show_transaction},
    "/v1/payments/{payment_id}/refund": {"POST": payments.refund},
    "/v1/payments/{payment_id}/status": {"PATCH": payments.update_status},
    "/v1/gateway/events": {"POST": gateway_events.take},
    "/health": {"GET": health.health},
    "/health/live": {"GET": health.health},
    "/health/startup": {"GET": health.health},
    "/health/ready": {"GET": health.ready},
    "/metrics": {"GET": metrics.metrics},
}
"""Order matters: the first pattern that a path fits has it, and they are tried one by one."""

ROUTES = [Route(path, Resource(handlers)) for path, handlers in TABLE.items()]
