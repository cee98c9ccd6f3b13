"""Our application on a real server of its own, on loopback."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn

from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from server.app import ServiceFactory, build_app
from server.run import server_options
from tests import contract

CONNECTIONS_MAX = 250


def opening(service: PaymentService) -> ServiceFactory:
    """Of a service that is open already, and stays so."""

    @asynccontextmanager
    async def open_service() -> AsyncIterator[PaymentService]:
        yield service

    return open_service


@asynccontextmanager
async def client_of(
    settings: Settings, open_service: ServiceFactory, *, checked: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server over such a service. Each answer is held against the document, unless it is not `checked`:
    browsers' own questions are not in it."""
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio sets it on sockets that it makes itself; without it, every answer waits for a delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(build_app(settings, open_service), **server_options(settings))
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    limits = httpx.Limits(max_connections=CONNECTIONS_MAX)
    hooks = {"response": [contract.check] if checked else []}
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60, event_hooks=hooks) as client:
        yield client
    server.should_exit = True
    await running
