"""Logs: one line per event on standard error, our own lines and the libraries' alike, with nothing secret in them.

A line is a JSON object, or made for people where they look at it on a terminal.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from eci_pay.context import Subject, current_origin, current_subject, know
from eci_pay.masking import is_plain, masked_line

if TYPE_CHECKING:
    from structlog.dev import ConsoleRenderer
    from structlog.typing import EventDict, Processor

LogFormat = Literal["auto", "json", "console"]

_changes = logging.getLogger("eci_pay.changes")


def configure_logs(level: str, log_format: LogFormat = "auto") -> None:
    """Sends every log line and every warning of this process through structlog, at `level` and above; `auto` means for
    people where standard error is a terminal. Errors are made in any case, for they are counted."""
    # What no line tells need not be found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.captureWarnings(True)
    on_terminal = sys.stderr.isatty()
    readable = log_format == "console" or (log_format == "auto" and on_terminal)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        ConsoleLines(colours=on_terminal and not os.environ.get("NO_COLOR")) if readable else JsonLines()
    )
    root = logging.getLogger()
    handler.setLevel(level)
    root.handlers = [handler]
    root.setLevel(min(handler.level, logging.ERROR))
    for noisy in ("asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))
    # While the database is away the pool tells so every second; whoever needs it tells it better.
    logging.getLogger("psycopg.pool").setLevel(max(root.level, logging.ERROR))


def tell_of_payment(status: str, *, payment_id: int, order_id: int) -> None:
    """Tells that a payment has a new status: once, where it is booked."""
    know(payment_id=payment_id, order_id=order_id)
    _tell("payment", status)


def tell_of_refund(status: str, *, refund_id: int, payment_id: int, order_id: int) -> None:
    """As `tell_of_payment`."""
    know(refund_id=refund_id, payment_id=payment_id, order_id=order_id)
    _tell("refund", status)


def _tell(what: str, status: str) -> None:
    """In the request's own line if one is to come, for a line more would cost a charge a tenth of the server's time."""
    subject = current_subject()
    if subject is not None and subject.changes is not None:
        subject.changes[f"{what}_status"] = status
    else:
        _changes.info("%s changed", what, extra={f"{what}_status": status})


class JsonLines(logging.Formatter):
    """Makes a line of a record by structlog's processors. There is one for every request, and structlog's own formatter
    takes twice as long, for it serves any set of processors.

    structlog is imported with the first line, for it brings a good part of rich along: most commands log nothing.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        event: EventDict = {
            "event": _message(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            **{name: value for name, value in record.__dict__.items() if name not in _NOT_TOLD},
        }
        if record.exc_info:
            event["exc_info"] = record.exc_info
        if record.stack_info:
            event["stack"] = record.stack_info
        subject = current_subject()
        _add_context(event, subject)
        plain = is_plain(event)
        line: object = event
        for processor in self._processors:
            line = event = processor(None, record.levelname, event)  # type: ignore[assignment]
        text = str(line) if plain else masked_line(str(line), subject.ids.values() if subject else ())
        return text.replace("\x7f", r"\u007f")  # the one control character that JSON does not escape

    @cached_property
    def _processors(self) -> "tuple[Processor, ...]":
        from pydantic_core import to_json
        from structlog import processors

        return (
            processors.TimeStamper(fmt="iso", utc=True),
            processors.format_exc_info,
            processors.JSONRenderer(serializer=_json, dump=to_json),
        )


class ConsoleLines(JsonLines):
    """Makes a line for people of what would be JSON. Only a traceback has lines of its own, and those are indented, so
    that nothing from outside looks like a line of ours."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """One line, and its traceback."""
        event = json.loads(super().format(record))
        traces = [str(event.pop(name)) for name in ("exception", "stack") if name in event]
        shown = {_printable(name): _printable(value) for name, value in event.items()}
        line = str(self._renderer(None, record.levelname, shown))
        return "\n".join([line, *(f"    {_printable(line)}" for trace in traces for line in trace.split("\n"))])

    @cached_property
    def _renderer(self) -> "ConsoleRenderer":
        from structlog.dev import ConsoleRenderer

        return ConsoleRenderer(colors=self._colours, force_colors=self._colours, sort_keys=False, pad_event_to=0)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # logging would print its arguments, whatever they hold
        return f"{record.msg} {_text(record.args)}"


def _add_context(event: "EventDict", subject: Subject | None) -> None:
    origin = current_origin()
    if origin.request_id:
        event["request_id"] = origin.request_id
    if origin.traceparent:
        event["trace_id"] = origin.trace_id
    if subject is not None:
        event.update(subject.ids)


def _json(event: "EventDict", *, dump: Callable[..., bytes], **_: object) -> str:
    try:
        return dump(event, fallback=repr, ensure_ascii=True, inf_nan_mode="strings").decode()
    except Exception:  # whatever somebody gave us to log, the line must not be lost
        return json.dumps({str(name): _text(value) for name, value in event.items()})


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def _printable(value: object) -> str:
    """On one line, without the control characters that would give the terminal orders."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_NOT_TOLD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"}
"""What every record has. The last is uvicorn's, which repeats its messages with escape codes."""
