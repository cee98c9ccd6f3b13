"""Parameters, headers and security schemes of the OpenAPI document."""

from typing import Any

from eci_pay.context import REQUEST_ID_LENGTH_MAX
from eci_pay.idempotency import KEY_LENGTH_MAX
from eci_pay.requests import ID_MAX
from server import docs
from server import openapi_examples as examples

_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": (
        f"Up to {KEY_LENGTH_MAX} printable ASCII characters, bare or as a quoted string (RFC 8941), which are equal. "
        "A new key for each new request, the same key when it is sent again."
    ),
    "schema": {
        "type": "string",
        # Bare, or quoted, where \" and \\ stand for a quote and a backslash.
        "pattern": (
            rf'^(?:[!#-~](?:[ -~]{{0,{KEY_LENGTH_MAX - 2}}}[!-~])?|"(?:[ !#-\[\]-~]|\\["\\]){{1,{KEY_LENGTH_MAX}}}")$'
        ),
    },
    "example": "order-1001",
}
_ID = {"type": "integer", "minimum": 1, "maximum": ID_MAX}


def _header(name: str, description: str) -> dict[str, Any]:
    """Without an example: the page would send it with every request."""
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}


def _in_path(name: str, schema: dict[str, Any], example: object) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema, "example": example}


PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {**_KEY, "required": True},
    "Optional-Idempotency-Key": _KEY,
    "X-Request-ID": _header(
        "X-Request-ID",
        f"Taken over if it is printable ASCII of up to {REQUEST_ID_LENGTH_MAX} characters; else one is made.",
    ),
    "traceparent": _header(
        "traceparent",
        "W3C Trace Context, as `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`; an invalid one is ignored.",
    ),
    "Stripe-Signature": _header("Stripe-Signature", "The gateway's signature of the body."),
    "payment_id": _in_path("payment_id", _ID, 1),
    "order_id": _in_path("order_id", _ID, 1001),
    "transaction_id": _in_path("transaction_id", {"type": "string", "minLength": 1}, examples.TRANSACTION_ID),
    "version": _in_path("version", {"const": docs.version()}, docs.version()),
    "file": _in_path("file", {"enum": sorted(docs.files())}, "page.js"),
}

HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-ID": {
        "description": "The id of the request, in the log and in problems as well.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": REQUEST_ID_LENGTH_MAX},
    },
    "Location": {
        "description": "Where the payment is.",
        "required": True,
        "schema": {"type": "string", "pattern": "^/v1/payments/[1-9][0-9]*$"},
    },
    "Retry-After": {
        "description": "After how many seconds to ask again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "description": "What is wrong with the API key, as RFC 6750 has it.",
        "required": True,
        "schema": {"type": "string", "pattern": "^Bearer realm="},
    },
    "Idempotent-Replayed": {
        "description": "There, and true, where the answer was given before to a request with the same key.",
        "schema": {"type": "string", "const": "true"},
    },
    "Cache-Control": {"description": "For how long it may be kept.", "required": True, "schema": {"type": "string"}},
}

SECURITY_SCHEMES = {
    "apiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, made with `eci-pay api-key create`; what it is for, its scopes say.",
    }
}
