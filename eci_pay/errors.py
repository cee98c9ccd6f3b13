"""The error tree. Each error has a stable `code`; status and exit codes belong to the edges.

PayError
├── InvalidRequest
│   ├── MalformedJson
│   ├── ValidationFailed            carries one `FieldError` per field
│   ├── IdempotencyKeyMissing
│   ├── IdempotencyKeyInvalid
│   ├── IdempotencyKeyReused
│   ├── EventRefused
│   └── FileInvalid                 carries one `FileFault` per fault, with its line and column
├── AccessRefused
│   ├── Unauthorized
│   ├── Forbidden
│   └── RateLimited                 carries after how many seconds to come again
├── NotFound
│   ├── ApiKeyNotFound
│   ├── PaymentNotFound
│   ├── MessageNotFound
│   └── RecoveryNotFound
├── Conflict                        carries the `payment_id` it is about, where there is one
│   ├── OrderInProgress
│   ├── OrderAlreadyPaid
│   ├── OrderExists
│   ├── InvalidState
│   ├── RefundExceedsBalance
│   ├── IdempotencyKeyInFlight
│   ├── RequestTooLate
│   └── FileRunTooLongAgo
├── Unavailable                     nothing was sent to the gateway
│   ├── Busy                        somebody else has locked what is wanted
│   ├── ConnectionLost              the statement under way may have been committed
│   │   └── DatabaseSilent          and to ask again would be to wait again
│   └── SchemaOutdated
├── OutputLost                      what was asked may have been done
├── SettingsInvalid                 carries one line per fault
└── MigrationError

A decline is no error: it is a recorded answer (`eci_pay.answers`).
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, TypeVar

E = TypeVar("E", bound=Exception)


class PayError(Exception):
    """Payment error"""

    code: ClassVar[str] = "error"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or self.title())
        self.detail = str(self)

    @classmethod
    def title(cls) -> str:
        """What kind of error this is, the same for every occurrence (RFC 9457): the class's docstring."""
        return cls.__doc__ or cls.__name__

    def members(self) -> dict[str, object]:
        """The facts beside the detail, as extension members of a problem document."""
        return {}


class InvalidRequest(PayError):
    """The request is not valid"""

    code = "invalid-request"


class MalformedJson(InvalidRequest):
    """The body is not valid JSON"""

    code = "malformed-json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldError:
    """One fault of one field; `field` is empty where the fault is the whole request's."""

    field: str
    message: str


class ValidationFailed(InvalidRequest):
    """The request has invalid fields"""

    code = "validation-error"

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors))

    @classmethod
    def of(cls, field: str, message: str) -> "ValidationFailed":
        """The fault of a single field."""
        return cls((FieldError(field=field, message=message),))

    def members(self) -> dict[str, object]:
        return {"errors": [{"field": e.field, "message": e.message} for e in self.errors]}


class IdempotencyKeyMissing(InvalidRequest):
    """An Idempotency-Key is required"""

    code = "idempotency-key-missing"


class IdempotencyKeyInvalid(InvalidRequest):
    """The Idempotency-Key is not valid"""

    code = "idempotency-key-invalid"


class IdempotencyKeyReused(InvalidRequest):
    """The Idempotency-Key was used with a different request"""

    code = "idempotency-key-reused"


class EventRefused(InvalidRequest):
    """The event is not signed by the gateway, or was signed too long ago"""

    code = "event-refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFault:
    """One fault of a file; lines count from 1, the header among them. There is no line where it is the whole file's."""

    message: str
    line: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        place = [] if self.line is None else [f"line {self.line}"]
        if self.column is not None:
            place.append(f"column {self.column}")
        return f"{', '.join(place)}: {self.message}" if place else self.message


class FileInvalid(InvalidRequest):
    """The file is not valid"""

    code = "file-invalid"

    def __init__(self, file: str, faults: tuple[FileFault, ...]) -> None:
        self.file = file
        self.faults = faults
        super().__init__("\n".join(f"{file}: {fault}" for fault in faults))

    def members(self) -> dict[str, object]:
        return {
            "file": self.file,
            "errors": [{"line": f.line, "column": f.column, "message": f.message} for f in self.faults],
        }


class AccessRefused(PayError):
    """Access is refused"""

    code = "access-refused"


class Unauthorized(AccessRefused):
    """A valid API key is required"""

    code = "unauthorized"

    def __init__(self, detail: str, *, key_was_given: bool) -> None:
        super().__init__(detail)
        self.key_was_given = key_was_given


class Forbidden(AccessRefused):
    """The API key does not have the scope that this wants"""

    code = "forbidden"

    def __init__(self, detail: str, *, wanted: str) -> None:
        super().__init__(detail)
        self.wanted = wanted


class RateLimited(AccessRefused):
    """The caller sends too many requests"""

    code = "rate-limited"

    def __init__(self, detail: str, *, retry_after_seconds: int) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class NotFound(PayError):
    """There is no such thing"""

    code = "not-found"


class ApiKeyNotFound(NotFound):
    """There is no such API key"""

    code = "api-key-not-found"


class PaymentNotFound(NotFound):
    """There is no such payment"""

    code = "payment-not-found"


class MessageNotFound(NotFound):
    """There is no such message"""

    code = "message-not-found"


class RecoveryNotFound(NotFound):
    """There is no such recovery"""

    code = "recovery-not-found"


class Conflict(PayError):
    """The request conflicts with the state of the payment"""

    code = "conflict"

    def __init__(self, detail: str | None = None, *, payment_id: int | None = None) -> None:
        super().__init__(detail)
        self.payment_id = payment_id

    def members(self) -> dict[str, object]:
        return {} if self.payment_id is None else {"payment_id": self.payment_id}


class OrderInProgress(Conflict):
    """A payment for this order is in progress"""

    code = "order-in-progress"


class OrderAlreadyPaid(Conflict):
    """This order has been paid"""

    code = "order-already-paid"


class OrderExists(Conflict):
    """This order has a payment"""

    code = "order-exists"


class InvalidState(Conflict):
    """The payment's status does not allow this"""

    code = "invalid-state"


class RefundExceedsBalance(Conflict):
    """The refund exceeds what is left of the payment"""

    code = "refund-exceeds-balance"


class IdempotencyKeyInFlight(Conflict):
    """The first request with this Idempotency-Key is still running"""

    code = "idempotency-key-in-flight"


class RequestTooLate(Conflict):
    """The time in which this could be begun has passed"""

    code = "request-too-late"


class FileRunTooLongAgo(Conflict):
    """The file was first run too long ago to be run again"""

    code = "file-run-too-long-ago"


class Unavailable(PayError):
    """The service is unavailable"""

    code = "unavailable"


class Busy(Unavailable):
    """Somebody else has locked what is wanted"""


class ConnectionLost(Unavailable):
    """The connection to the database was lost"""


class DatabaseSilent(ConnectionLost):
    """The database took a statement and does not answer"""


class SchemaOutdated(Unavailable):
    """The database lacks migrations: run `eci-pay migrate`"""


class OutputLost(PayError):
    """The output could not be written"""

    code = "output-lost"


class SettingsInvalid(PayError):
    """The settings are not valid"""

    code = "settings-invalid"

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class MigrationError(PayError):
    """The database cannot be migrated"""

    code = "migration-error"


def apart(error: E) -> E:
    """The error for one of many whom it concerns: whoever raises it adds to its own traceback."""
    try:
        return copy.copy(error).with_traceback(None)
    except Exception:  # not every exception can be made anew from its arguments
        return error
