"""What belongs to the request at hand and travels with its task: the request id."""

import uuid
from contextvars import ContextVar

_request_id: ContextVar[str] = ContextVar("request_id", default="")

REQUEST_ID_LENGTH_MAX = 128


def current_request_id() -> str:
    """The id of the request at hand; empty where there is none, as in a background task."""
    return _request_id.get()


def bind_request_id(given: str | None) -> str:
    """Takes over the caller's id if it is printable ASCII of a sane length, else makes one."""
    usable = given and len(given) <= REQUEST_ID_LENGTH_MAX and given.isascii() and given.isprintable()
    request_id = given if given and usable else uuid.uuid4().hex
    _request_id.set(request_id)
    return request_id
