"""Answers: what a caller is told, as recorded under its idempotency key and replayed byte for byte.

The record is an HTTP answer by contract (`idempotency_keys.status_code`, `response_body`), whichever edge the
request came through, so that a key used at the terminal can be replayed over HTTP and the other way round.
"""

import json
from dataclasses import dataclass
from http import HTTPStatus

from eci_pay.context import current_request_id
from eci_pay.errors import PayError
from eci_pay.views import PaymentView

RETRY_UNKNOWN_AFTER_SECONDS = 2
"""When it is worth asking again for an outcome that is not known yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A status and a body. A body of status 402 is a problem document, any other is a payment."""

    status_code: int
    body: str
    payment_id: int
    replayed: bool = False

    @property
    def is_declined(self) -> bool:
        """Whether the gateway said no."""
        return self.status_code == HTTPStatus.PAYMENT_REQUIRED

    @property
    def is_unknown(self) -> bool:
        """Whether the gateway may or may not have acted: the payment or refund is still PROCESSING."""
        return self.status_code == HTTPStatus.ACCEPTED


def created(view: PaymentView) -> Answer:
    """A payment was recorded."""
    return _of_view(HTTPStatus.CREATED, view)


def ok(view: PaymentView) -> Answer:
    """A payment was changed."""
    return _of_view(HTTPStatus.OK, view)


def unknown(view: PaymentView) -> Answer:
    """The outcome is not known yet; this is not stored as a key's answer."""
    return _of_view(HTTPStatus.ACCEPTED, view)


def declined(*, operation: str, payment_id: int, decline_code: str, message: str) -> Answer:
    """The gateway declined the `operation`, "payment" or "refund"."""
    document = problem_document(
        status=HTTPStatus.PAYMENT_REQUIRED,
        code=f"{operation}-declined",
        title=f"The gateway declined the {operation}",
        detail=message,
        members={"payment_id": payment_id, "decline_code": decline_code},
    )
    body = json.dumps(document, ensure_ascii=False)
    return Answer(status_code=int(HTTPStatus.PAYMENT_REQUIRED), body=body, payment_id=payment_id)


def problem_of(error: PayError, status: int) -> dict[str, object]:
    """The problem document of an error that is not recorded."""
    return problem_document(
        status=status, code=error.code, title=error.title(), detail=error.detail, members=error.members()
    )


def problem_document(
    *, status: int, code: str, title: str, detail: str, members: dict[str, object]
) -> dict[str, object]:
    """A problem document (RFC 9457). Its type is a name, not an address: there is nothing to fetch."""
    return {
        "type": f"urn:eci-pay:problem:{code}",
        "title": title,
        "status": int(status),
        "detail": detail,
        "code": code,
        "request_id": current_request_id(),
        **members,
    }


def _of_view(status: HTTPStatus, view: PaymentView) -> Answer:
    return Answer(status_code=int(status), body=view.model_dump_json(), payment_id=view.payment_id)
