"""The ASGI application, made from the settings."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from eci_pay.background import background_tasks
from eci_pay.errors import PayError
from eci_pay.logs import configure_logs
from eci_pay.service import PaymentService, open_database, payment_service
from eci_pay.settings import Settings, load_settings
from server.middleware import BodyLimit, RequestIds
from server.problems import handle_error, handle_http_exception
from server.routes import ROUTES

ServiceFactory = Callable[[], AbstractAsyncContextManager[PaymentService]]


def create_app() -> Starlette:
    """The application of a worker: settings and logs from the environment, the service for as long as it runs."""
    settings = load_settings()
    configure_logs(settings.log_level)

    @asynccontextmanager
    async def service_of_worker() -> AsyncIterator[PaymentService]:
        async with payment_service(settings, await open_database(settings)) as service:
            yield service

    return build_app(settings, service_of_worker)


def build_app(settings: Settings, open_service: ServiceFactory) -> Starlette:
    """The application over a service that is opened when it starts and closed when it has stopped."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with (
            open_service() as service,
            background_tasks(settings, service, relays=settings.eci_pay_relay_in_serve, recovers=True),
        ):
            yield {"service": service, "service_name": settings.service_name}

    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(RequestIds),
            Middleware(BodyLimit, max_bytes=settings.eci_pay_body_max_bytes),
        ],
        exception_handlers={PayError: handle_error, HTTPException: handle_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app
