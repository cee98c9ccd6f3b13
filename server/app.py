"""The ASGI application, made from the settings."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from eci_pay.background import background_tasks
from eci_pay.errors import SettingsInvalid
from eci_pay.instruments import start_measuring
from eci_pay.logs import configure_logs
from eci_pay.rate_limit import RateLimit
from eci_pay.service import PaymentService, open_database, payment_service
from eci_pay.settings import Settings, load_settings
from server.access import AccessControl
from server.connections import Connections
from server.cors import allow_origins
from server.middleware import BodyLimit, Requests
from server.routes import ROUTES

GARBAGE_THRESHOLDS = (20_000, 20, 20)
"""Allocations between two collections, then collections between those of the older generations. Python's own 700 cost
charges a tenth of their rate, and at the 99th percentile half their time."""

ServiceFactory = Callable[[], AbstractAsyncContextManager[PaymentService]]


def create_app() -> ASGIApp:
    """The application of a worker: settings and logs from the environment, the service for as long as it runs. Raises
    SettingsInvalid where nobody has said who may call: any other server but ours may listen anywhere."""
    settings = load_settings()
    if settings.eci_pay_auth is None:
        raise SettingsInvalid(("ECI_PAY_AUTH: must be `on` or `off`, unless `eci-pay serve` starts the server",))
    configure_logs(settings.log_level, settings.eci_pay_log_format)

    @asynccontextmanager
    async def service_of_worker() -> AsyncIterator[PaymentService]:
        async with payment_service(settings, await open_database(settings)) as service:
            _collect_garbage_rarely()
            yield service

    return build_app(settings, service_of_worker)


def _collect_garbage_rarely() -> None:
    """Nearly everything that a request leaves behind is freed without the collector. What it walks in vain, again and
    again, is what was there when the server started, which it need not look at."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def build_app(settings: Settings, open_service: ServiceFactory) -> ASGIApp:
    """The application over a service that is opened when it starts and closed when it has stopped.

    Of Starlette's layers only the router is there: those that turn exceptions into responses cost as much as it, and
    `Requests` does that anyway.
    """

    start_measuring()

    @asynccontextmanager
    async def lifespan(_: Router) -> AsyncIterator[dict[str, Any]]:
        async with (
            open_service() as service,
            background_tasks(settings, service, relays=settings.eci_pay_relay_in_serve, recovers=True),
            _watched(Connections(settings)) as connections,
        ):
            yield {
                "service": service,
                "service_name": settings.service_name,
                "access_control": _access_control(settings, service),
                "connections": connections,
            }

    router = Router(ROUTES, redirect_slashes=False, default=_nothing_here, lifespan=lifespan)
    limited = BodyLimit(router, max_bytes=settings.eci_pay_body_max_bytes)
    requests = Requests(limited, requests_max=settings.eci_pay_requests_max)
    return allow_origins(requests, settings.eci_pay_cors_origins) if settings.eci_pay_cors_origins else requests


@asynccontextmanager
async def _watched(connections: Connections) -> AsyncIterator[Connections]:
    watching = asyncio.create_task(connections.watch())
    try:
        yield connections
    finally:
        watching.cancel()


def _access_control(settings: Settings, service: PaymentService) -> AccessControl | None:
    if settings.eci_pay_auth != "on":
        return None
    return AccessControl(service.api_keys, RateLimit(settings.eci_pay_caller_requests_per_second))


async def _nothing_here(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise HTTPException(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
