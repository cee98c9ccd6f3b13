"""What the command line says of an error, and the exit code it has."""

import logging

from cli import output
from eci_pay import errors

EXIT_DEFECT = 70
"""EX_SOFTWARE of sysexits.h: a defect of ours."""
EXIT_OUTPUT_LOST = 74
"""EX_IOERR: what was asked was done, but could not be printed."""

EXIT_OF_ERROR: dict[type[errors.PayError], int] = {
    errors.InvalidRequest: 2,
    errors.SettingsInvalid: 2,
    errors.Conflict: 3,
    errors.MigrationError: 3,
    errors.NotFound: 4,
    errors.Unavailable: 5,
    errors.OutputLost: EXIT_OUTPUT_LOST,
}


def is_defect(error: Exception) -> bool:
    """Whether it is one of ours, which nobody foresaw."""
    return not isinstance(error, errors.PayError | OSError)


def tell(error: Exception) -> int:
    """Prints what is to be said of an error; returns its exit code."""
    if isinstance(error, errors.PayError):
        output.print_error(error)
        return exit_code_of(error)
    if isinstance(error, OSError):
        output.note(f"error: {error}")
        return EXIT_OUTPUT_LOST
    # a defect of ours: its class and words for the person, the rest for the log
    logging.getLogger(__name__).debug("unexpected error", exc_info=error)
    output.note(f"error: unexpected {type(error).__name__}: {error} (LOG_LEVEL=DEBUG tells more)")
    return EXIT_DEFECT


def tell_lost_output(fault: str) -> int:
    """Says that the output could not be written; returns the exit code of that."""
    output.note(f"error: the output could not be written: {fault}")
    return EXIT_OUTPUT_LOST


def exit_code_of(error: errors.PayError) -> int:
    """The exit code of an error: its own row of the table, or that of the nearest class above it."""
    return next(EXIT_OF_ERROR[kind] for kind in type(error).__mro__ if kind in EXIT_OF_ERROR)
