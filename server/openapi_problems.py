"""The problems by their codes: status, title and what members each has beside those that all have."""

import http
from dataclasses import dataclass
from typing import Any

from eci_pay import errors
from server import problems

_MEMBERS: dict[str, dict[str, Any]] = {
    "payment_id": {"type": "integer", "description": "The payment that the problem is about."},
    "decline_code": {"type": "string", "description": "Why, in a word that stays the same."},
    "errors": {
        "type": "array",
        "minItems": 1,
        "description": "The first fault of each field; the field is empty where the fault is the whole request's.",
        "items": {
            "type": "object",
            "required": ["field", "message"],
            "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A kind of problem. One that is recorded is an answer of its idempotency key."""

    status: int
    title: str
    members: tuple[str, ...] = ()
    is_recorded: bool = False

    def schema(self, code: str) -> dict[str, Any]:
        """The problem document (RFC 9457) with this code."""
        properties = {
            "type": {"const": f"urn:eci-pay:problem:{code}"},
            "title": {"type": "string", "description": "The same for every problem with this code."},
            "status": {"const": self.status},
            "detail": {"type": "string", "description": "What is wrong this time."},
            "code": {"const": code},
            "request_id": {"type": "string", "description": "As in the header X-Request-ID."},
            **{name: _MEMBERS[name] for name in self.members},
        }
        return {"type": "object", "description": self.title, "required": list(properties), "properties": properties}


def _members(kind: type[errors.PayError]) -> tuple[str, ...]:
    if issubclass(kind, errors.Conflict):
        return ("payment_id",)
    return ("errors",) if issubclass(kind, errors.ValidationFailed) else ()


def _of_errors(kind: type[errors.PayError]) -> dict[str, Problem]:
    """The problem of an error and those of the kinds below it that have a code of their own."""
    below = {code: problem for child in kind.__subclasses__() for code, problem in _of_errors(child).items()}
    own = Problem(status=problems.status_of(kind), title=kind.title(), members=_members(kind))
    return {**below, kind.code: own}


def _declined(operation: str) -> Problem:
    return Problem(
        status=int(http.HTTPStatus.PAYMENT_REQUIRED),
        title=f"The gateway declined the {operation}",
        members=("payment_id", "decline_code"),
        is_recorded=True,
    )


PROBLEMS: dict[str, Problem] = {
    **{code: problem for kind in problems.STATUS_OF_ERROR for code, problem in _of_errors(kind).items()},
    **{
        code: Problem(status=status, title=http.HTTPStatus(status).phrase)
        for status, code in problems.CODE_OF_STATUS.items()
    },
    **{f"{operation}-declined": _declined(operation) for operation in ("payment", "refund")},
}
