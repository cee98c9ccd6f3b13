"""What belongs to the request at hand and travels with its task: the request id, the trace it is part of, who makes
it, the payment it is about, and on whose behalf the books are changed where that is not the customer's."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field, replace

REQUEST_ID_LENGTH_MAX = 128

# Version 00 of W3C Trace Context; ids of nothing but zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The request that causes something, as the messages about it will name it."""

    request_id: str = ""
    traceparent: str | None = None
    actor: str | None = None
    """Who makes it, as the audit trail names them; None where nobody knows."""

    @property
    def trace_id(self) -> str:
        """The trace that the request is part of; empty where there is none."""
        return self.traceparent[3:35] if self.traceparent else ""


@dataclass(slots=True)
class Subject:
    """What a piece of work is about. The tasks of a request share it, so that its line has what they have found out."""

    ids: dict[str, int] = field(default_factory=dict)
    changes: dict[str, str] | None = None
    """The statuses that it has changed, where a line that is still to come will tell them."""

    def told(self) -> dict[str, str]:
        """What it has changed, for that line. What its tasks change after it has lines of its own."""
        told, self.changes = self.changes, None
        return told or {}


_NO_ORIGIN = Origin()
_acting: ContextVar[str] = ContextVar("acting", default="")
_origin: ContextVar[Origin] = ContextVar("origin", default=_NO_ORIGIN)
_subject: ContextVar[Subject | None] = ContextVar("subject", default=None)


def current_origin() -> Origin:
    """The request at hand; empty where there is none, as in a background task."""
    return _origin.get()


def current_actor() -> str | None:
    """Who makes the request at hand; None where nobody knows."""
    return _origin.get().actor


def current_request_id() -> str:
    """The id of the request at hand; empty where there is none."""
    return _origin.get().request_id


def bind_origin(request_id: str | None, traceparent: str | None = None, *, actor: str | None = None) -> str:
    """Takes over the caller's id if it is printable ASCII of a sane length, else makes one; returns it.

    A `traceparent` that W3C Trace Context calls invalid is ignored, as it says.
    """
    usable = (
        request_id and len(request_id) <= REQUEST_ID_LENGTH_MAX and request_id.isascii() and request_id.isprintable()
    )
    bound = request_id if request_id and usable else secrets.token_hex(16)
    valid = traceparent is not None and _TRACEPARENT.fullmatch(traceparent) is not None
    _origin.set(Origin(bound, traceparent if valid else None, actor))
    return bound


def act_as(actor: str) -> None:
    """From here on it is known who makes the request."""
    _origin.set(replace(_origin.get(), actor=actor))


def continue_origin(request_id: str | None, traceparent: str | None) -> None:
    """Goes on for a request that was made before, perhaps elsewhere."""
    _origin.set(Origin(request_id or "", traceparent))


def current_subject() -> Subject | None:
    """What is being worked on, as far as it is known."""
    return _subject.get()


def begin_subject(*, line_to_come: bool = False, **ids: int | None) -> Subject:
    """Begins a piece of work, about nothing that was known before."""
    subject = Subject(changes={} if line_to_come else None)
    _subject.set(subject)
    know(**ids)
    return subject


def context_of_use_case() -> Context:
    """That of the request; where no line of one is to come, with a subject of its own."""
    context, subject = copy_context(), _subject.get()
    if subject is None or subject.changes is None:
        context.run(begin_subject)
    return context


def know(**ids: int | None) -> None:
    """Takes note of what is being worked on, for every line from here on: `payment_id`, `order_id`, `refund_id`."""
    subject = _subject.get()
    if subject is None:
        subject = Subject()
        _subject.set(subject)
    for name, number in ids.items():
        if number is not None:
            subject.ids[name] = number


@contextmanager
def acting_for(whom: str) -> Iterator[None]:
    """What is written to the audit trail in this block says on whose behalf, and why."""
    token = _acting.set(f" ({whom})")
    try:
        yield
    finally:
        _acting.reset(token)


def on_behalf() -> str:
    """What the audit trail adds to a description: empty where nobody else acts than the request itself."""
    return _acting.get()
