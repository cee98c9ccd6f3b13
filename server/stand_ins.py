"""Stand-ins of the Order, Inventory and Notification services, for demonstrations and trials on one machine.

They take the messages of the contract, each on a port of its own, remember them in memory, and can be made to
misbehave. `GET /received` on any of the ports shows what came.
"""

import asyncio
import random
import socket
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eci_pay.errors import MalformedJson
from eci_pay.messages import Destination
from eci_pay.peers import ENDPOINTS
from eci_pay.requests import parse_json

RECEIVED_MAX = 10_000
"""How many messages are shown: the latest."""
BODY_SHOWN_BYTES_MAX = 1000
"""How much is shown of a body that is not taken."""
SHUTDOWN_SECONDS_MAX = 1
"""How long requests that are under way are waited for at the end."""
KNOWN_IDS_MAX = 1_000_000
"""How many message ids are remembered, to tell a repeated message from a new one."""

FIELDS = {
    Destination.ORDER: {"payment_id": int, "payment_status": str},
    Destination.INVENTORY: {"order_id": int, "reason": str},
    Destination.NOTIFICATION: {"user_id": int, "type": str, "message": str, "channel": str},
}
"""The body that each service takes: exactly these fields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A request as it arrived, and how it was answered. `repeated` tells that it had been taken before."""

    destination: Destination
    at: str
    method: str
    path: str
    body: Any
    idempotency_key: str | None
    request_id: str | None
    traceparent: str | None
    status: int
    repeated: bool


@dataclass(kw_only=True)
class StandIns:
    """The three services. `fail_rate` of the requests, from 0 to 1, are answered with 503; those to a destination in
    `failing` are all. Every answer takes `delay_seconds`."""

    fail_rate: float = 0.0
    delay_seconds: float = 0.0
    on_received: Callable[[Received], None] = lambda _: None
    failing: set[Destination] = field(default_factory=set)
    received: deque[Received] = field(default_factory=lambda: deque(maxlen=RECEIVED_MAX))
    _taken: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def app(self, port_of: Mapping[Destination, int]) -> Starlette:
        """The services as one application; which of them is meant is told by the port."""
        routes = [Route("/received", self._show)]
        for destination, endpoint in ENDPOINTS.items():
            take = self._taker(destination, port_of.get(destination))
            routes.append(Route(endpoint.path, take, methods=[endpoint.method]))
        return Starlette(routes=routes)

    def _taker(self, destination: Destination, port: int | None) -> Callable[[Request], Any]:
        async def take(request: Request) -> Response:
            if request.scope["server"][1] != port:
                return JSONResponse({"detail": f"this is not the {destination} service"}, 404)
            content = await request.body()
            body = _parsed(destination, content)
            await asyncio.sleep(self.delay_seconds)
            key = request.headers.get("idempotency-key")
            repeated = key in self._taken
            status = self._status(destination, taken=body is not None)
            if status == 200 and key is not None:  # noqa: PLR2004
                self._remember(key)
            received = Received(
                destination=destination,
                at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                method=request.method,
                path=request.url.path,
                body=content[:BODY_SHOWN_BYTES_MAX].decode("utf-8", "replace") if body is None else body,
                idempotency_key=key,
                request_id=request.headers.get("x-request-id"),
                traceparent=request.headers.get("traceparent"),
                status=status,
                repeated=repeated,
            )
            self.received.append(received)
            self.on_received(received)
            return JSONResponse({"taken": status == 200, "repeated": repeated}, status)  # noqa: PLR2004

        return take

    def _status(self, destination: Destination, *, taken: bool) -> int:
        if destination in self.failing or random.random() < self.fail_rate:  # noqa: S311 - fails, hides nothing
            return 503
        return 200 if taken else 422

    def _remember(self, key: str) -> None:
        self._taken[key] = None
        if len(self._taken) > KNOWN_IDS_MAX:
            self._taken.popitem(last=False)

    async def _show(self, _: Request) -> Response:
        return JSONResponse([asdict(received) for received in self.received])


def _parsed(destination: Destination, content: bytes) -> Any:
    """The body, if it is what the service takes."""
    try:
        body = parse_json(content)
    except MalformedJson:
        return None
    fits = isinstance(body, dict) and {name: type(value) for name, value in body.items()} == FIELDS[destination]
    return body if fits else None


@asynccontextmanager
async def running(
    stand_ins: StandIns, ports: Mapping[Destination, int], *, host: str = "127.0.0.1"
) -> AsyncIterator[dict[Destination, str]]:
    """Serves each destination that has a port, 0 for a free one; yields their URLs. Raises OSError."""
    listeners = {destination: _listener(host, port) for destination, port in ports.items()}
    port_of = {destination: listener.getsockname()[1] for destination, listener in listeners.items()}
    config = uvicorn.Config(
        stand_ins.app(port_of),
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS_MAX,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=list(listeners.values())))
    try:
        while not (server.started or serving.done()):  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        address = f"[{host}]" if ":" in host else host
        yield {destination: f"http://{address}:{port}" for destination, port in port_of.items()}
    finally:
        server.should_exit = True
        await serving


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # asyncio sets it on sockets that it makes itself; without it, every answer waits for a delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield
