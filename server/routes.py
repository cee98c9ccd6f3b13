"""The whole route table."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eci_pay.access import Scope as Access
from server import docs, gateway_events, health, metrics, payments
from server.access import AccessControl

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a method of a path does, and the codes of the problems that it may answer, beside the `internal-error` that
    any of them may."""

    handler: Handler
    codes: tuple[str, ...] = ()
    wants: Access | None = None
    """What a caller's API key must be for; None lets everybody in."""


class Resource:
    """All the methods of one path, so that a 405 can name each of them."""

    def __init__(self, path: str, operations: dict[str, Operation]) -> None:
        self._path = path
        self._allow = ", ".join(operations)
        self._operations = dict(operations)
        if "GET" in operations:
            self._operations["HEAD"] = operations["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. What is raised, `Requests` answers."""
        operation = self._operations.get(scope["method"])
        if operation is None:
            detail = f"This path allows {self._allow}."
            raise HTTPException(405, detail, {"Allow": self._allow})
        scope["eci_pay.route"] = self._path
        access_control: AccessControl | None = scope["state"]["access_control"]
        if operation.wants is not None and access_control is not None:
            await access_control.admit(scope, operation.wants)
        response = await operation.handler(Request(scope, receive, send))
        await response(scope, receive, send)


_BODY = ("malformed-json", "body-too-large", "unsupported-media-type", "validation-error")
_KEY = ("idempotency-key-missing", "idempotency-key-invalid", "idempotency-key-in-flight", "idempotency-key-reused")
_ONE = ("payment-not-found", "not-found", "unavailable")
"""A name in a path may hold a slash, and then it is another path."""
_NUMBERED = (*_ONE, "validation-error")

TABLE: dict[str, dict[str, Operation]] = {
    "/v1/payments/charge": {
        "POST": Operation(
            payments.charge,
            (
                *_BODY,
                *_KEY,
                "payment-declined",
                "order-in-progress",
                "order-already-paid",
                "invalid-state",
                "unavailable",
            ),
            Access.CHARGE,
        ),
    },
    "/v1/payments/{payment_id}": {
        "GET": Operation(payments.show, _NUMBERED, Access.READ),
        "DELETE": Operation(payments.cancel, (*_NUMBERED, "invalid-state"), Access.WRITE),
    },
    "/v1/payments": {
        "GET": Operation(payments.list_payments, ("validation-error", "unavailable"), Access.READ),
        "POST": Operation(payments.create, (*_BODY, *_KEY, "order-exists", "unavailable"), Access.WRITE),
    },
    "/v1/payments/order/{order_id}": {"GET": Operation(payments.show_order, _NUMBERED, Access.READ)},
    "/v1/payments/transaction/{transaction_id}": {"GET": Operation(payments.show_transaction, _ONE, Access.READ)},
    "/v1/payments/{payment_id}/refund": {
        "POST": Operation(
            payments.refund,
            (*_BODY, *_KEY, *_ONE, "refund-declined", "invalid-state", "refund-exceeds-balance"),
            Access.REFUND,
        ),
    },
    "/v1/payments/{payment_id}/status": {
        "PATCH": Operation(payments.update_status, (*_BODY, *_ONE, "invalid-state"), Access.WRITE),
    },
    "/v1/gateway/events": {
        "POST": Operation(gateway_events.take, ("event-refused", "body-too-large", "unavailable")),
    },
    "/health": {"GET": Operation(health.health)},
    "/health/live": {"GET": Operation(health.health)},
    "/health/startup": {"GET": Operation(health.health)},
    "/health/ready": {"GET": Operation(health.ready, ("unavailable",))},
    "/metrics": {"GET": Operation(metrics.metrics, ("unavailable",), Access.METRICS)},
    "/openapi.json": {"GET": Operation(docs.openapi)},
    "/docs": {"GET": Operation(docs.page)},
    "/docs/{version}/{file}": {"GET": Operation(docs.file, ("not-found",))},
}
"""Order matters: the first pattern that a path fits has it, and they are tried one by one."""

ROUTES = [Route(path, Resource(path, operations)) for path, operations in TABLE.items()]
