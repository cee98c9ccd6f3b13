"""Connections to clients: what one may take of memory, time and places before its request is begun.

uvicorn parses by httptools, whose rules for what a request may look like are strict. It bounds neither the size of a
head nor the time that a client takes, and answers faults in plain text, even before the answers to what was asked
earlier on the connection. All of that is mended here. What is refused once its application runs, that answers itself:
see `FAULT`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import copy_context
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.exceptions import HTTPException
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from eci_pay.context import bind_origin
from eci_pay.instruments import request_answered
from eci_pay.settings import Settings
from server.middleware import FAULT, NO_SNIFFING, NO_STORING, OTHER, SURPLUS
from server.problems import http_problem

HEADERS_MAX = 100
"""Fields of a request's head."""
PIPELINE_MAX = 16
"""Requests that a client may send ahead of their answers."""
SURPLUS_MAX = 100
"""Connections beyond the limit that are told so, or asked for health; the next is cut off."""
LINGER_SECONDS = 2.0
"""How long what a client still sends is read and dropped after it was refused: to close at once would make its system
throw the answer away."""
SWEEP_SECONDS_MAX = 1.0
"""How often connections are looked at."""

_log = logging.getLogger(__name__)


class Connections:
    """Those of one process, and their limits. One look at all of them now and then costs less than a timer for each
    request."""

    def __init__(self, settings: Settings) -> None:
        self.head_max_bytes = settings.eci_pay_headers_max_bytes
        self.timeout_seconds = settings.eci_pay_read_timeout_seconds
        self._max = settings.eci_pay_connections_max
        self._open: set[Connection] = set()
        self._is_full = False

    def add(self, connection: "Connection") -> int:
        """Returns how many there are now beyond the limit."""
        self._open.add(connection)
        surplus = len(self._open) - self._max
        if surplus > 0 and not self._is_full:
            self._is_full = True
            _log.warning("all %d connections are taken: others are told 503", self._max)
        return surplus

    def discard(self, connection: "Connection") -> None:
        """It has ended."""
        self._open.discard(connection)
        self._is_full = self._is_full and len(self._open) >= self._max

    async def watch(self) -> None:
        """Ends those whose clients take too long, until it is cancelled."""
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS_MAX, self.timeout_seconds / 4))
            now = time.monotonic()
            for connection in list(self._open):
                try:
                    connection.check(now)
                    if self._is_full:
                        connection.make_room()
                except Exception:
                    _log.exception("a connection cannot be watched")
                    connection.cut()


class _Ending:
    """The transport of a connection, as uvicorn sees it: to close it means to end it well."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, connection: "Connection", write: Callable[[bytes], None]) -> None:
        self.write = write
        self.close = connection.end
        self.is_closing = connection.is_ending


class Connection(HttpToolsProtocol):
    """One client's. Its state between two calls: within a message (`_open`), in its head or in its body."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self._connections: Connections = app_state["connections"]
        self._surplus = False
        self._open = False
        self._in_head = False
        self._ended = False
        """Whether a message has ended in the data at hand."""
        self._bytes = 0
        """How many have come since something was told of them: a head that is whole, a piece of a body."""
        self._bytes_at_hand = 0
        self._awaited_since: float | None = None
        self._stuck_since: float | None = None
        """Since when the client reads nothing."""
        self._lingering_since: float | None = None
        self._is_refused = False
        self._refusal: HTTPException | None = None
        """To be told after the answers that are still owed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._transport = transport
        self.transport = cast("asyncio.Transport", _Ending(self, transport.write))
        self._awaited_since = time.monotonic()
        surplus = self._connections.add(self)
        self._surplus = surplus > 0
        if surplus > SURPLUS_MAX:
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self._connections.discard(self)
        self.transport = self._transport
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what has come; whatever was refused is only read to be dropped."""
        self._unset_keepalive_if_required()
        if self._is_refused or self._lingering_since is not None:
            return
        self._bytes_at_hand = len(data)
        self._bytes += self._bytes_at_hand
        self._ended = False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            refused = cause if isinstance(cause, HTTPException) else None
            self._refuse(refused or HTTPException(HTTPStatus.BAD_REQUEST, f"This is not HTTP/1.1: {_words(error)}."))
            return
        if not self._open and self._ended:
            self._awaited_since = None
            self._bytes = 0
        elif self._bytes > self._connections.head_max_bytes:
            self._refuse(self._too_large())
        elif self._awaited_since is None:
            self._awaited_since = time.monotonic()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # There is nothing to upgrade to, so the request is one like any other, and so is what follows it.
                data = data[upgrade.args[0] :]
            else:
                return

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._open = self._in_head = True

    def on_headers_complete(self) -> None:
        """The head of a request is whole. Raises HTTPException."""
        if max(self._bytes, self._bytes_at_hand) > self._connections.head_max_bytes:
            self._check_size()
        self._bytes = 0
        self._awaited_since = None
        self._check_head()
        super().on_headers_complete()
        self._in_head = False
        if self._surplus:
            self._note(SURPLUS, True)
            self.cycle.keep_alive = False
        # What comes from now on are trailers: they are none of the request's headers (RFC 9110, 6.5.1).
        self.headers = []

    def _check_size(self) -> None:
        """Of a head that came with something else."""
        size = len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if size > self._connections.head_max_bytes:
            raise self._too_large()

    def _too_large(self) -> HTTPException:
        detail = f"The head of the request has more than {self._connections.head_max_bytes} bytes."
        return HTTPException(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)

    def _check_head(self) -> None:
        """What the parser lets pass, and others on the way may understand in another way."""
        if len(self.headers) > HEADERS_MAX:
            detail = f"The request has more than {HEADERS_MAX} headers."
            raise HTTPException(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
        if len(self.pipeline) >= PIPELINE_MAX:
            raise _bad(f"More than {PIPELINE_MAX} requests were sent ahead of their answers")
        version = self.parser.get_http_version()
        hosts = 0
        upgrades = self.parser.should_upgrade()
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif upgrades and name in (b"content-length", b"transfer-encoding") and value != b"0":
                raise _bad("A request with a body cannot ask for another protocol")  # whose the body might be
            elif name == b"transfer-encoding" and (version != "1.1" or value.lower() != b"chunked"):
                raise _bad("The only Transfer-Encoding that is understood is `chunked`, in HTTP/1.1")
        if version == "1.1" and hosts != 1:
            raise _bad("A request has one Host header")
        if version not in ("1.0", "1.1"):
            raise _bad("The version of HTTP is neither 1.0 nor 1.1")

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        super().on_message_complete()
        self._open = False
        self._ended = True
        self._bytes = 0
        self._awaited_since = None

    def on_response_complete(self) -> None:
        """The last byte of an answer."""
        super().on_response_complete()
        if self._refusal is not None and not self._is_answer_owed() and not self.is_ending():
            self._tell(self._refusal)

    def resume_writing(self) -> None:
        """The client reads on."""
        super().resume_writing()
        self._stuck_since = None

    def shutdown(self) -> None:
        """The server is about to stop."""
        if self._lingering_since is not None:
            self._transport.close()
        else:
            super().shutdown()

    def check(self, now: float) -> None:
        """Ends the connection if its client has had time enough."""
        timeout = self._connections.timeout_seconds
        if self._lingering_since is not None:
            if now - self._lingering_since > LINGER_SECONDS:
                self.cut()
        elif self._transport.is_closing() or self.flow.write_paused:
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since > timeout:
                self.cut()
        elif self._awaited_since is not None and not self._is_refused and now - self._awaited_since > timeout:
            self._time_out(now)

    def make_room(self) -> None:
        """Ends the connection if it has been kept without a request for as long as one may be awaited at most, for all
        places are taken: else they could be held for next to nothing."""
        kept = self.timeout_keep_alive_task
        if kept is None or self._open or self._is_answer_owed():
            return
        if kept.when() - self.loop.time() < self.timeout_keep_alive - self._connections.timeout_seconds:
            self.end()

    def _time_out(self, now: float) -> None:
        if self.flow.read_paused:
            self._awaited_since = now  # it is us who keep it waiting
        elif not self._open:
            self._awaited_since = None
            if not self._is_answer_owed():
                self.end()  # nothing has come: an answer might be taken for that to a request that is on its way
        else:
            part = "head" if self._in_head else "body"
            detail = f"The {part} of the request did not arrive within {self._connections.timeout_seconds:g} seconds."
            self._refuse(HTTPException(HTTPStatus.REQUEST_TIMEOUT, detail))

    def _refuse(self, fault: HTTPException) -> None:
        """Takes nothing more from this client, and tells why: by the application where that waits for a body."""
        self._is_refused = True
        if self._is_answer_owed():
            if self._open and not self._in_head:
                self._note(FAULT, fault)
                self.cycle.keep_alive = False
                self.cycle.message_event.set()
            else:
                self._refusal = fault
        elif self._open and not self._in_head:
            self.end()  # it was answered before its body had come
        else:
            self._tell(fault)

    def _note(self, name: str, value: object) -> None:
        """For the application that has this request."""
        cast("dict[str, object]", self.scope)[name] = value

    def _is_answer_owed(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _tell(self, fault: HTTPException) -> None:
        """Answers a request that no application has seen."""
        self._unset_keepalive_if_required()
        copy_context().run(self._write, fault)
        self._open = True  # whatever else it sends is dropped
        self.end()

    def _write(self, fault: HTTPException) -> None:
        request_id = bind_origin(None)
        answer = http_problem(fault.status_code, fault.detail, {"Connection": "close"})
        headers = [
            *self.server_state.default_headers,
            *answer.raw_headers,
            NO_SNIFFING,
            NO_STORING,
            (b"x-request-id", request_id.encode()),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self._transport.write(b"".join([STATUS_LINE[fault.status_code], *lines, b"\r\n", bytes(answer.body)]))
        request_answered(OTHER, OTHER, fault.status_code, 0.0)
        _log.info("request refused", extra={"status": fault.status_code, "reason": fault.detail})

    def is_ending(self) -> bool:
        """Whether nothing more will be answered."""
        return self._lingering_since is not None or self._transport.is_closing()

    def end(self) -> None:
        """Closes the connection once everything is written, and not before the client has stopped sending."""
        if self.is_ending():
            return
        if self._open:
            self._lingering_since = time.monotonic()
            self._transport.write_eof()
            self.flow.resume_reading()
        else:
            self._transport.close()

    def cut(self) -> None:
        """Ends the connection, whatever is still unread."""
        self._transport.abort()


def _bad(detail: str) -> HTTPException:
    return HTTPException(HTTPStatus.BAD_REQUEST, f"{detail}.")


def _words(error: httptools.HttpParserError) -> str:
    """The parser's, of which those about our callbacks tell nothing to a client."""
    if isinstance(error, httptools.HttpParserCallbackError | httptools.HttpParserInvalidURLError):
        return "its target cannot be understood"
    return str(error)
