"""The process `eci-pay`: its streams, its memory and its end. The commands are in `cli.commands`.

Heavy modules load inside what needs them, so that `--help` stays quick.
"""

import gc
import io
import os
import signal
import sys
from typing import NoReturn, TextIO

GARBAGE_THRESHOLD = 100_000
"""Allocations between two collections, more than a command makes before its work begins. Nearly all of them live until
its end: to walk through them again and again takes Python's own 700 a tenth of the time in which a payment is shown."""


def main() -> NoReturn:
    """Runs the command line. What nobody foresaw has exit codes of its own: 1 would mean "declined"."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    if os.getpid() == 1:
        # As the first process of a container, it gets only those signals that it handles; others just kill it.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    fault = _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    fault = _flush(sys.stdout) or fault
    if fault:
        from cli.failures import tell_lost_output

        lost = tell_lost_output(fault)
        code = code or lost
    _flush(sys.stderr)
    gc.freeze()  # else the interpreter looks for garbage in all of it, more than once, before it lets go of it
    sys.exit(code)


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
        from cli.commands import app

        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        from cli.failures import tell

        return tell(error)
    return 0
