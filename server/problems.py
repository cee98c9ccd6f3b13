"""Errors as problem documents (RFC 9457): the one table from errors to statuses."""

import http
import logging

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from eci_pay import errors
from eci_pay.answers import problem_document, problem_of

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = {"idempotency-key-in-flight": 1, "unavailable": 2}

REALM = "eci-pay"

STATUS_OF_ERROR: dict[type[errors.PayError], int] = {
    errors.MalformedJson: 400,
    errors.IdempotencyKeyMissing: 400,
    errors.IdempotencyKeyInvalid: 400,
    errors.IdempotencyKeyReused: 422,
    errors.EventRefused: 400,
    errors.ValidationFailed: 422,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.RateLimited: 429,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Unavailable: 503,
}

CODE_OF_STATUS = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
    408: "request-timeout",
    413: "body-too-large",
    415: "unsupported-media-type",
    431: "headers-too-large",
    500: "internal-error",
}

_log = logging.getLogger(__name__)


class ProblemResponse(JSONResponse):
    """A problem document."""

    media_type = MEDIA_TYPE


def status_of(kind: type[errors.PayError]) -> int:
    """The status of a kind of error: its own row of the table, or that of the nearest class above it."""
    return next(STATUS_OF_ERROR[above] for above in kind.__mro__ if above in STATUS_OF_ERROR)


def response_to(error: Exception) -> Response:
    """What a request is answered that ended in an error."""
    match error:
        case errors.PayError():
            return _refusal(error)
        case HTTPException():
            # What the router and the framework refuse: unknown paths and methods, media types.
            return http_problem(error.status_code, error.detail, dict(error.headers or {}))
        case _:
            # Nobody foresaw it: the caller learns the request id, the log the rest.
            _log.error("unexpected error", exc_info=error)
            return http_problem(500, "An unexpected error occurred; it has been logged under this request id.", {})


def _refusal(error: errors.PayError) -> Response:
    status = status_of(type(error))
    if isinstance(error, errors.Unavailable):
        _log.warning("unavailable: %s", error.detail)
    return ProblemResponse(problem_of(error, status), status_code=status, headers=_headers(error))


def _headers(error: errors.PayError) -> dict[str, str]:
    match error:
        case errors.Unauthorized():
            # RFC 6750 3.1: without a key there is nothing to say of it.
            fault = ', error="invalid_token"' if error.key_was_given else ""
            return {"WWW-Authenticate": f'Bearer realm="{REALM}"{fault}'}
        case errors.Forbidden():
            fault = f', error="insufficient_scope", scope="{error.wanted}"'
            return {"WWW-Authenticate": f'Bearer realm="{REALM}"{fault}'}
        case errors.RateLimited():
            return {"Retry-After": str(error.retry_after_seconds)}
        case _ if error.code in RETRY_AFTER_SECONDS:
            return {"Retry-After": str(RETRY_AFTER_SECONDS[error.code])}
        case _:
            return {}


def http_problem(status: int, detail: str, headers: dict[str, str]) -> Response:
    """A problem that is HTTP's alone."""
    document = problem_document(
        status=status,
        code=CODE_OF_STATUS.get(status, f"http-{status}"),
        title=http.HTTPStatus(status).phrase,
        detail=detail,
        members={},
    )
    return ProblemResponse(document, status_code=status, headers=headers)
