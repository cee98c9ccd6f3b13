"""Reads request bodies and headers into validated requests."""

from typing import TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from eci_pay.errors import IdempotencyKeyInvalid, ValidationFailed
from eci_pay.idempotency import parse_key
from eci_pay.requests import ListRequest, parse_json, parse_request
from server.headers import header_value, header_values

_Model = TypeVar("_Model", bound=BaseModel)


async def read_body(request: Request, model: type[_Model]) -> _Model:
    """The JSON body as a validated request. Raises HTTPException 415, MalformedJson and ValidationFailed."""
    media_type = (header_value(request.scope, b"content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "The body must be application/json.")
    return parse_request(model, parse_json(await request.body()))


def read_query(request: Request) -> ListRequest:
    """The query string as a validated request; raises ValidationFailed, for repeated names too."""
    fields: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise ValidationFailed.of(name, "is given more than once")
        fields[name] = value
    return parse_request(ListRequest, fields)


def required_key(request: Request) -> str:
    """The Idempotency-Key; raises IdempotencyKeyMissing and IdempotencyKeyInvalid."""
    return parse_key(_single_header(request))


def optional_key(request: Request) -> str | None:
    """The Idempotency-Key, or None; raises as `required_key` for one that is there and no good."""
    raw = _single_header(request)
    return None if raw is None else parse_key(raw)


def _single_header(request: Request) -> str | None:
    values = header_values(request.scope, b"idempotency-key")
    if len(values) > 1:
        raise IdempotencyKeyInvalid("there is more than one Idempotency-Key header")
    return values[0] if values else None
