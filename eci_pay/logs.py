"""Logs: one JSON object per line on standard error, our own lines and the libraries' alike."""

import json
import logging
import sys
from functools import cached_property
from typing import TYPE_CHECKING

from eci_pay.context import current_request_id

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger


def configure_logs(level: str) -> None:
    """Sends every log line of this process through structlog, at `level` and above."""
    # What no line tells need not be found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for noisy in ("asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))
    # While the database is away the pool tells so every second; whoever needs it tells it better.
    logging.getLogger("psycopg.pool").setLevel(max(root.level, logging.ERROR))


class JsonLines(logging.Formatter):
    """Makes a line of a record by structlog's processors. There is one for every request, and structlog's own formatter
    takes twice as long, for it serves any set of processors.

    structlog is imported with the first line, for it brings a good part of rich along: most commands log nothing.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        event: EventDict = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            **{name: value for name, value in record.__dict__.items() if name not in _NOT_TOLD},
        }
        if record.exc_info:
            event["exc_info"] = record.exc_info
        if record.stack_info:
            event["stack"] = record.stack_info
        line: object = event
        for processor in self._processors:
            line = event = processor(None, record.levelname, event)  # type: ignore[assignment]
        return str(line)

    @cached_property
    def _processors(self) -> "tuple[Processor, ...]":
        from structlog import processors

        return (
            processors.TimeStamper(fmt="iso", utc=True),
            _add_request_id,
            processors.format_exc_info,
            processors.JSONRenderer(serializer=_json),
        )


def _add_request_id(_: "WrappedLogger", __: str, event: "EventDict") -> "EventDict":
    if request_id := current_request_id():
        event["request_id"] = request_id
    return event


def _json(event: "EventDict", **_: object) -> str:
    from pydantic_core import to_json

    try:
        return to_json(event, fallback=repr, ensure_ascii=True).decode()
    except Exception:  # whatever somebody gave us to log, the line must not be lost
        return json.dumps({str(name): _text(value) for name, value in event.items()})


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


_NOT_TOLD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"}
"""What every record has. The last is uvicorn's, which repeats its messages with escape codes."""
