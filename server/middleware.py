"""What every request passes: its id, its errors, its log line, the limits of its body and of requests in progress.

Plain ASGI, for it is on the hot path.
"""

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eci_pay.access import Caller
from eci_pay.context import begin_subject, bind_origin
from eci_pay.errors import Unavailable
from eci_pay.instruments import request_answered
from server.access import CALLER
from server.headers import header_value, header_values
from server.problems import http_problem, response_to

STATUS_CLIENT_GONE = 499
"""In the log: the client went before it had sent its body. Nothing was begun. (nginx's number; never sent.)"""

OTHER = "other"
"""In the metrics: a path that no route has, or a method that its path does not take."""

FAULT = "eci_pay.fault"
"""Where a scope has why its body does not come: an HTTPException."""
SURPLUS = "eci_pay.surplus"
"""In the scope of a request whose connection is beyond the limit."""
ALWAYS_ANSWERED = {"/health", "/health/live", "/health/startup", "/health/ready", "/metrics"}
"""Whatever else is in progress."""
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
NO_STORING = (b"cache-control", b"no-store")
"""Nobody on the way keeps what is told of payments."""

PATH_LOGGED_MAX = 500
"""Characters of a path in the log: to search a long one for secrets takes its time, in which nobody else is served."""

_log = logging.getLogger("server.requests")


class Requests:
    """Takes over `X-Request-ID` or makes one, returns it with every response, answers what was raised with a problem
    document, and logs one line per request. Refuses what comes while too many are in progress."""

    def __init__(self, app: ASGIApp, requests_max: int) -> None:
        self._app = app
        self._max = requests_max
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        traces = header_values(scope, b"traceparent")
        # Two are none: which of them is meant, W3C Trace Context leaves open.
        request_id = bind_origin(header_value(scope, b"x-request-id"), traces[0] if len(traces) == 1 else None)
        subject = begin_subject(line_to_come=True)
        encoded_id = request_id.encode("latin-1")
        started = time.perf_counter()
        status = 0  # no response has started

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                for name, _ in headers:
                    if name == b"cache-control":
                        break
                else:
                    headers.append(NO_STORING)
                headers.append(NO_SNIFFING)
                headers.append((b"x-request-id", encoded_id))
            await send(message)

        self._in_progress += 1
        try:
            self._check_room(scope)
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = STATUS_CLIENT_GONE
        except Exception as error:
            if status:
                raise
            await response_to(error)(scope, receive, send_with_id)
        finally:
            self._in_progress -= 1
            seconds = time.perf_counter() - started
            _measure(scope, status, seconds)
            _log.info(
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"][:PATH_LOGGED_MAX],
                    "status": status,
                    "duration_ms": round(seconds * 1000, 2),
                    **_caller(scope),
                    **subject.told(),
                },
            )

    def _check_room(self, scope: Scope) -> None:
        if scope["path"] in ALWAYS_ANSWERED:
            return
        if self._in_progress > self._max:
            raise Unavailable(f"{self._max} requests are in progress; nothing was recorded")
        if SURPLUS in scope:
            raise Unavailable("all connections are taken; nothing was recorded")


def _caller(scope: Scope) -> dict[str, str]:
    caller: Caller | None = scope.get(CALLER)
    return {} if caller is None else {"caller": caller.actor}


def _measure(scope: Scope, status: int, seconds: float) -> None:
    """Under the route's path, as the table has it, for there is no end of those that clients make up."""
    route = scope.get("eci_pay.route")
    method, path = (OTHER, OTHER) if route is None else (scope["method"], route)
    request_answered(method, path, status, seconds)


class BodyLimit:
    """Refuses bodies above a number of bytes with 413, whether announced or streamed, and those that do not come.

    Starlette's own limit answers in plain text when the length is announced; ours is a problem document always.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header_value(scope, b"content-length") or ""
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            if FAULT in scope:
                raise scope[FAULT]
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLarge
            return message

        try:
            await self._app(scope, receive_limited, send)
        except _BodyTooLarge:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"The body has more than {self._max_bytes} bytes."
        await http_problem(413, detail, {"Connection": "close"})(scope, receive, send)


class _BodyTooLarge(Exception):
    """Raised through the application by the request's own stream, before anything was answered."""
