"""Logs: one JSON object per line on standard error, our own lines and the libraries' alike."""

import logging
import sys
from functools import cached_property
from typing import TYPE_CHECKING

from eci_pay.context import current_request_id

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger


class LogFormatter(logging.Formatter):
    """Makes lines with structlog, which is imported for the first: most commands have nothing to log."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        return self._lines.format(record)

    @cached_property
    def _lines(self) -> logging.Formatter:
        import structlog

        shared: list[Processor] = [
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            _drop_colours,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_request_id,
        ]
        return structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )


def configure_logs(level: str) -> None:
    """Sends every log line of this process through structlog, at `level` and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for noisy in ("asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))
    # While the database is away the pool tells so every second; whoever needs it tells it better.
    logging.getLogger("psycopg.pool").setLevel(max(root.level, logging.ERROR))


def _drop_colours(_: "WrappedLogger", __: str, event: "EventDict") -> "EventDict":
    """Uvicorn repeats its messages with escape codes."""
    event.pop("color_message", None)
    return event


def _add_request_id(_: "WrappedLogger", __: str, event: "EventDict") -> "EventDict":
    if request_id := current_request_id():
        event["request_id"] = request_id
    return event
