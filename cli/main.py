"""The command `eci-pay`: its groups of commands and its exit codes.

Heavy modules load inside the commands that need them, so that `--help` stays quick.
"""

import sys
from typing import NoReturn

import typer

from cli import demo, maintenance, output, payments, serving
from eci_pay import errors

EXIT_OF_ERROR: dict[type[errors.PayError], int] = {
    errors.InvalidRequest: 2,
    errors.SettingsInvalid: 2,
    errors.Conflict: 3,
    errors.MigrationError: 3,
    errors.PaymentNotFound: 4,
    errors.Unavailable: 5,
}

app = typer.Typer(
    name="eci-pay",
    help="The payment service of ECI: charge, refund and query payments.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 declined, 2 invalid, 3 conflict, 4 not found, 5 unavailable, 6 outcome unknown.",
)
for commands in (serving, payments, maintenance, demo):
    commands.register(app)


def exit_code_of(error: errors.PayError) -> int:
    """The exit code of an error: its own row of the table, or that of the nearest class above it."""
    return next(EXIT_OF_ERROR[kind] for kind in type(error).__mro__ if kind in EXIT_OF_ERROR)


def main() -> NoReturn:
    """Runs the command line."""
    try:
        app()
    except errors.PayError as error:
        output.print_error(error)
        sys.exit(exit_code_of(error))
    sys.exit(0)
