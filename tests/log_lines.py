"""What is logged, as standard error gets it."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from eci_pay import context
from eci_pay.logs import LogFormat, configure_logs

QUIETED = ("asyncio", "httpx", "psycopg.pool")
"""The loggers whose levels `configure_logs` sets, too."""


class Terminal(io.StringIO):
    """Standard error as a terminal, or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@contextmanager
def logged(
    log_format: LogFormat, *, level: str = "INFO", is_terminal: bool = False
) -> Iterator[Callable[[], list[str]]]:
    """Logs go to the list of lines that this gives, as a process would have them."""
    stream = Terminal(is_terminal=is_terminal)
    root = logging.getLogger()
    handlers, before, source = root.handlers, root.level, logging._srcfile
    levels = {name: logging.getLogger(name).level for name in QUIETED}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(sys, "stderr", stream)
        # A server that another test ran without an access log leaves this off.
        patch.setattr(logging.getLogger("uvicorn.access"), "propagate", True)
        context._subject.set(None)
        configure_logs(level, log_format)
        try:
            yield lambda: stream.getvalue().splitlines()
        finally:
            logging.captureWarnings(False)
            root.handlers, logging._srcfile = handlers, source
            root.setLevel(before)
            for name, quiet in levels.items():
                logging.getLogger(name).setLevel(quiet)
            context._subject.set(None)
            context._origin.set(context.Origin())
