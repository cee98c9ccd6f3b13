"""What belongs to the request at hand and travels with its task: the request id, the trace it is part of, and on whose
behalf the books are changed where that is not the customer's."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID_LENGTH_MAX = 128

# Version 00 of W3C Trace Context; ids of nothing but zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The request that causes something, as the messages about it will name it."""

    request_id: str = ""
    traceparent: str | None = None


_NO_ORIGIN = Origin()
_acting: ContextVar[str] = ContextVar("acting", default="")
_origin: ContextVar[Origin] = ContextVar("origin", default=_NO_ORIGIN)


def current_origin() -> Origin:
    """The request at hand; empty where there is none, as in a background task."""
    return _origin.get()


def current_request_id() -> str:
    """The id of the request at hand; empty where there is none."""
    return _origin.get().request_id


def bind_origin(request_id: str | None, traceparent: str | None = None) -> str:
    """Takes over the caller's id if it is printable ASCII of a sane length, else makes one; returns it.

    A `traceparent` that W3C Trace Context calls invalid is ignored, as it says.
    """
    usable = (
        request_id and len(request_id) <= REQUEST_ID_LENGTH_MAX and request_id.isascii() and request_id.isprintable()
    )
    bound = request_id if request_id and usable else uuid.uuid4().hex
    valid = traceparent is not None and _TRACEPARENT.fullmatch(traceparent) is not None
    _origin.set(Origin(bound, traceparent if valid else None))
    return bound


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
