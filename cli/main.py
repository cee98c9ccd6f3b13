"""The command `eci-pay`: its groups of commands and its exit codes.

Heavy modules load inside the commands that need them, so that `--help` stays quick.
"""

import io
import logging
import os
import sys
from typing import Annotated, NoReturn, TextIO

import typer

from cli import demo, maintenance, outbox, output, payments, recovering, relaying, serving
from eci_pay import errors

EXIT_OF_ERROR: dict[type[errors.PayError], int] = {
    errors.InvalidRequest: 2,
    errors.SettingsInvalid: 2,
    errors.Conflict: 3,
    errors.MigrationError: 3,
    errors.NotFound: 4,
    errors.Unavailable: 5,
}

EXIT_DEFECT = 70
"""EX_SOFTWARE of sysexits.h: a defect of ours."""
EXIT_OUTPUT_LOST = 74
"""EX_IOERR: what was asked was done, but could not be printed."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"eci-pay {version('eci-pay')}")
        raise typer.Exit


app = typer.Typer(
    name="eci-pay",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 declined, 2 invalid, 3 conflict, 4 not found, 5 unavailable, 6 outcome unknown.",
)


@app.callback()
def eci_pay(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The payment service of ECI: charge, refund and query payments."""


for commands in (serving, relaying, recovering, payments, outbox, maintenance, demo):
    commands.register(app)


def exit_code_of(error: errors.PayError) -> int:
    """The exit code of an error: its own row of the table, or that of the nearest class above it."""
    return next(EXIT_OF_ERROR[kind] for kind in type(error).__mro__ if kind in EXIT_OF_ERROR)


def main() -> NoReturn:
    """Runs the command line. What nobody foresaw has exit codes of its own: 1 would mean "declined"."""
    fault = _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    fault = _flush(sys.stdout) or fault
    if fault:
        output.note(f"error: the output could not be written: {fault}")
    _flush(sys.stderr)
    sys.exit(code or (EXIT_OUTPUT_LOST if fault else 0))


def _open_closed_streams() -> str | None:
    """Lets no file or connection take the place of a closed standard stream; tells where output was closed."""
    closed = sys.stdout is None
    if closed:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return "it was closed" if closed else None


def _flush(stream: TextIO) -> str | None:
    """What kept the stream from being written. The rest is thrown away, else Python would end with its own code."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error.strerror or str(error)
    return None


def _run() -> int:
    try:
        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except errors.PayError as error:
        output.print_error(error)
        return exit_code_of(error)
    except OSError as error:
        output.note(f"error: {error}")
        return EXIT_OUTPUT_LOST
    except Exception as error:  # a defect of ours: its class and words for the person, the rest for the log
        logging.getLogger(__name__).debug("unexpected error", exc_info=error)
        output.note(f"error: unexpected {type(error).__name__}: {error} (LOG_LEVEL=DEBUG tells more)")
        return EXIT_DEFECT
    return 0
