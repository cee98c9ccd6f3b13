"""Runs the application under uvicorn."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from eci_pay.settings import Settings

MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's name for where the workers of one server keep their figures."""


def run_server(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests that have begun.

    uvicorn raises the signal again after it has shut down; the handler turns that into an ordinary end, at which
    the embedded database is let go.
    """
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    with _common_figures(workers):
        uvicorn.run(
            "server.app:create_app",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            **server_options(settings),
        )


def server_options(settings: Settings) -> dict[str, Any]:
    """Those of uvicorn that make it our server."""
    return {
        "lifespan": "on",
        "http": "server.connections:Connection",
        "ws": "none",
        "proxy_headers": False,  # nobody asks who the client is
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": settings.eci_pay_keep_alive_seconds,
        "timeout_graceful_shutdown": settings.eci_pay_shutdown_timeout_seconds,
    }


@contextmanager
def _common_figures(workers: int) -> Iterator[None]:
    """Where workers keep what they measure, so that whichever of them is scraped tells of all. A single one needs no
    files. They are gone at the end; a directory that somebody else has named is theirs."""
    if workers == 1 or MULTIPROCESS_DIRECTORY in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="eci-pay-metrics-") as directory:
        os.environ[MULTIPROCESS_DIRECTORY] = directory
        try:
            yield
        finally:
            del os.environ[MULTIPROCESS_DIRECTORY]
