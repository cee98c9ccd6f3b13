"""Runs the application under uvicorn."""

import ipaddress
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from eci_pay.errors import SettingsInvalid
from eci_pay.settings import Settings
from server.connections import SURPLUS_MAX

OTHER_FILES = 500
"""Open files beside connections: to the gateway and the peers, of the program itself."""

_log = logging.getLogger(__name__)

MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's name for where the workers of one server keep their figures."""


def run_server(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests that have begun. `check_access` comes first.

    uvicorn raises the signal again after it has shut down; the handler turns that into an ordinary end, at which
    the embedded database is let go.
    """
    allow_open_files(settings)
    if settings.eci_pay_auth is None:
        os.environ["ECI_PAY_AUTH"] = "off"  # for the workers, who do not know the address
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


def check_access(auth: str | None, host: str) -> None:
    """Raises SettingsInvalid where anybody on the network could charge and refund and nobody has said so."""
    if auth == "on" or is_loopback(host):
        return
    if auth is None:
        raise SettingsInvalid(
            (
                f"ECI_PAY_AUTH: must be set to serve on {host}: `on` wants API keys (`eci-pay api-key create`), `off` "
                "lets everybody charge and refund who reaches it",
            )
        )
    _log.warning("access is not controlled (ECI_PAY_AUTH=off): whoever reaches %s may charge and refund", host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name that is not known to be one is none."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allow_open_files(settings: Settings) -> None:
    """Raises this process's limit of open files, which its workers inherit, to what its connections need: on many
    systems it is 1,024, unless one asks for more."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    wanted = settings.eci_pay_connections_max + SURPLUS_MAX + settings.eci_pay_database_pool_size + OTHER_FILES
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    if allowed < wanted:
        _log.warning("this system allows %d open files, ECI_PAY_CONNECTIONS_MAX wants %d", allowed, wanted)


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
