"""Runs a use case from a synchronous command."""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from cli import output

if TYPE_CHECKING:
    from eci_pay.service import PaymentService
    from eci_pay.settings import Settings

EXIT_INTERRUPTED = 130
OPERATOR_LENGTH_MAX = 100

T = TypeVar("T")


def settings_of_command() -> "Settings":
    """The settings, with logs set up for a terminal: warnings and worse, unless LOG_LEVEL says otherwise."""
    from eci_pay.context import bind_origin
    from eci_pay.logs import configure_logs
    from eci_pay.settings import load_settings

    settings = load_settings()
    level = settings.log_level if "log_level" in settings.model_fields_set else "WARNING"
    configure_logs(level, settings.eci_pay_log_format)
    bind_origin(None, actor=f"operator:{operator()}")
    return settings


def settings_of_server() -> "Settings":
    """The settings of a command that runs until it is stopped, with the logs of a server."""
    from eci_pay.logs import configure_logs
    from eci_pay.settings import load_settings

    settings = load_settings()
    configure_logs(settings.log_level, settings.eci_pay_log_format)
    return settings


def run(work: Coroutine[Any, Any, T], *, busy: bool = False) -> T:
    """Runs a coroutine to its end; Ctrl-C ends the command with its own exit code. One that will be `busy` gets the
    faster event loop, which takes longer to import."""
    import asyncio

    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform == "win32":
        factory = asyncio.SelectorEventLoop  # psycopg needs it
    elif busy:
        with suppress(ImportError):  # it is not made for every platform
            from uvloop import new_event_loop as factory
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(work)
    except KeyboardInterrupt:
        output.note("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def run_use_case(use: Callable[["PaymentService"], Awaitable[T]], *, changes: bool = False) -> T:
    """Opens the service, runs one use case, and closes it when all that has begun has ended. One that `changes`
    payments warns first of services that would not be told."""
    result = run_with_service(use, changes=changes)
    if hasattr(signal, "SIGPIPE"):
        # Only output is left to do: a reader that has gone ends us as it ends every other program.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return result


def run_with_service(
    use: Callable[["PaymentService"], Awaitable[T]], *, changes: bool = False, busy: bool = False
) -> T:
    """`run_use_case` of a command that has more to do after it."""
    from cli.failures import is_defect
    from eci_pay.service import open_database, payment_service
    from eci_pay.totals import unexpected_errors

    settings = settings_of_command()

    async def work() -> T:
        url = await open_database(settings)
        async with payment_service(settings, url) as service:
            if changes:
                await service.warn_of_untold()
            async with service.totals.counting_errors():
                try:
                    return await use(service)
                except (typer.Exit, typer.Abort):
                    raise
                except Exception as error:
                    if is_defect(error):
                        unexpected_errors.add(1)
                    raise

    return run(work(), busy=busy)


def operator() -> str:
    """Who runs this command, as the audit trail names them."""
    import getpass

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = f"user {os.getuid()}" if hasattr(os, "getuid") else "somebody"
    return output.printable(name)[:OPERATOR_LENGTH_MAX]


def on_stop(callback: Callable[[], object]) -> None:
    """Lets SIGTERM and SIGINT call this instead of ending the process."""
    import asyncio

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if sys.platform == "win32":
            signal.signal(number, lambda _number, _frame: loop.call_soon_threadsafe(callback))
        else:
            loop.add_signal_handler(number, callback)


async def until_stopped() -> None:
    """Waits for SIGTERM or SIGINT."""
    import asyncio

    stopped = asyncio.Event()
    on_stop(stopped.set)
    await stopped.wait()
