"""Runs the application under uvicorn."""

import signal
import sys

import uvicorn

from eci_pay.settings import Settings


def run_server(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests that have begun.

    uvicorn raises the signal again after it has shut down; the handler turns that into an ordinary end, at which
    the embedded database is let go.
    """
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    uvicorn.run(
        "server.app:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        lifespan="on",
        ws="none",
        proxy_headers=False,  # nobody asks who the client is
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.eci_pay_shutdown_timeout_seconds,
    )
