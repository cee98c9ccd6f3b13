"""Requests, parsed and validated once for every edge: what comes out of here is valid."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from eci_pay import money, request_schemas
from eci_pay.errors import FieldError, MalformedJson, ValidationFailed
from eci_pay.lifecycle import PaymentMethod, PaymentStatus

ID_MAX = 2**63 - 1
REFERENCE_LENGTH_MAX = 100
REASON_LENGTH_MIN, REASON_LENGTH_MAX = 5, 400
TOKEN_LENGTH_MAX = 500
GATEWAY_RESPONSE_LENGTH_MAX = 500
TRANSACTION_ID_LENGTH_MAX = 50
NUMBER_LENGTH_MAX = 4300
"""The most digits of a whole number in JSON; none that we take has more than 19."""
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 10, 100
FIELD_ERRORS_MAX = 20
"""Of how many fields the faults are told: an answer should not be a multiple of its request."""
LIST_DEPTH_MAX = 100_000
"""The furthest row that `page` reaches; a cursor walks further at constant cost."""

_Request = TypeVar("_Request", bound=BaseModel)


def _explained(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Passes a ValueError's words on as the field's message, braces and all."""

    def validate(value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise PydanticCustomError("invalid", "{reason}", {"reason": str(error)}) from None

    return validate


def _storable(text: str) -> str:
    """PostgreSQL's text holds no NUL, and UTF-8 no lone surrogate."""
    if "\0" in text:
        raise PydanticCustomError("invalid", "must not contain NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("invalid", "must not contain lone surrogates")
    return text


def _storable_secret(secret: SecretStr) -> SecretStr:
    _storable(secret.get_secret_value())
    return secret


def _digits(value: Any) -> Any:
    """A number in a query string is digits and nothing else."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError("must be a whole number")
    return value


def _currency(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be an ISO 4217 currency code")  # noqa: TRY004 - pydantic reads ValueErrors
    return money.parse_currency(value)


def _upper_name(value: Any) -> Any:
    return value.upper() if isinstance(value, str) and value.isascii() else value


_UTC_OFFSET_READ_AS_SPACE = re.compile(r"(?<=T)(.+) (?=\d\d:?\d\d$)")


def _instant(value: Any) -> datetime:
    """An ISO 8601 instant with a zone, or a date, which means its midnight UTC."""
    if isinstance(value, datetime):
        instant = value
    else:
        # In a query string a bare plus sign is read as a space.
        text = _UTC_OFFSET_READ_AS_SPACE.sub(r"\1+", str(value))
        try:
            instant = datetime.combine(date.fromisoformat(text), time.min, UTC)
        except ValueError:
            try:
                instant = datetime.fromisoformat(text)
            except ValueError:
                raise ValueError("must be an ISO 8601 date or instant") from None
    if instant.tzinfo is None:
        raise ValueError("must have a time zone, such as Z or +05:30")
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("is out of range") from None


Text = Annotated[str, AfterValidator(_storable), Field(json_schema_extra={"pattern": request_schemas.STORABLE})]
Id = Annotated[int, Field(strict=True, ge=1, le=ID_MAX)]
AmountField = Annotated[
    Decimal, BeforeValidator(_explained(money.parse_amount)), WithJsonSchema(request_schemas.AMOUNT)
]
CurrencyField = Annotated[
    str, BeforeValidator(_explained(_currency)), Field(json_schema_extra=request_schemas.describe_currency)
]
Instant = Annotated[datetime, BeforeValidator(_explained(_instant)), WithJsonSchema(request_schemas.INSTANT)]
Reason = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=REASON_LENGTH_MIN, max_length=REASON_LENGTH_MAX),
    AfterValidator(_storable),
    WithJsonSchema(request_schemas.REASON),
]

_OF_DIGITS = BeforeValidator(_explained(_digits))
_PAGE_SCHEMA: JsonDict = {
    "maximum": LIST_DEPTH_MAX,
    "description": f"Not beside a cursor; `page * page_size` is at most {LIST_DEPTH_MAX}.",
}


class Request(BaseModel):
    """A frozen, valid request that knows no other fields than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CreateRequest(Request):
    """A payment of an order, as the legacy creation takes it."""

    model_config = ConfigDict(json_schema_extra=request_schemas.describe_creation)

    order_id: Id
    user_id: Id
    amount: AmountField
    currency: CurrencyField = money.DEFAULT_CURRENCY
    payment_method: PaymentMethod
    reference: Annotated[Text, Field(min_length=1, max_length=REFERENCE_LENGTH_MAX)] | None = None

    @model_validator(mode="after")
    def _whole_where_the_currency_has_no_minor_unit(self) -> Self:
        try:
            money.check_minor_unit(self.amount, self.currency)
        except ValueError as error:
            raise PydanticCustomError("amount", "{reason}", {"reason": str(error)}) from None
        return self


class ChargeRequest(CreateRequest):
    """A charge of an order. The token is passed to the gateway, never stored and never logged."""

    payment_token: (
        Annotated[
            SecretStr,
            Field(min_length=1, max_length=TOKEN_LENGTH_MAX, json_schema_extra={"pattern": request_schemas.STORABLE}),
            AfterValidator(_storable_secret),
        ]
        | None
    ) = None


class RefundRequest(Request):
    """A refund; without an amount, of all that is left."""

    amount: AmountField | None = None
    reason: Reason


class StatusUpdateRequest(Request):
    """A change of status by hand."""

    status: PaymentStatus
    gateway_response: Annotated[Text, Field(max_length=GATEWAY_RESPONSE_LENGTH_MAX)] | None = None


class ListRequest(Request):
    """The filters of a list and the part of it that is wanted. Values may be text, as in a query string."""

    status: Annotated[PaymentStatus | None, BeforeValidator(_upper_name)] = None
    payment_method: Annotated[PaymentMethod | None, BeforeValidator(_upper_name)] = None
    user_id: Annotated[int, Field(ge=1, le=ID_MAX), _OF_DIGITS] | None = None
    created_from: Instant | None = None
    created_to: Instant | None = None
    page: Annotated[int, Field(ge=1, json_schema_extra=_PAGE_SCHEMA), _OF_DIGITS] | None = None
    page_size: Annotated[int, Field(ge=1, le=PAGE_SIZE_MAX), _OF_DIGITS] = PAGE_SIZE_DEFAULT
    cursor: Annotated[int, Field(ge=1, le=ID_MAX), _OF_DIGITS] | None = None

    @model_validator(mode="after")
    def _within_depth(self) -> Self:
        if self.cursor is not None and self.page is not None:
            raise PydanticCustomError("page", "give a page or a cursor, not both")
        if (self.page or 1) * self.page_size > LIST_DEPTH_MAX:
            raise PydanticCustomError(
                "page",
                "page * page_size must not exceed {depth}: walk further with next_cursor",
                {"depth": LIST_DEPTH_MAX},
            )
        return self


def parse_instant(text: str, field: str) -> datetime:
    """A date (UTC) or an instant with its zone; raises ValidationFailed."""
    try:
        return _instant(text)
    except ValueError as error:
        raise ValidationFailed.of(field, str(error)) from None


def parse_request(model: type[_Request], fields: object) -> _Request:
    """Validates decoded fields; raises ValidationFailed with one entry per field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise ValidationFailed(_field_errors(error)) from None


def parse_json(body: bytes) -> object:
    """Decodes a JSON body without a float in between; raises MalformedJson.

    Refuses what RFC 8259 leaves open or forbids: duplicate names, NaN and Infinity, text that is not UTF-8.
    """
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_int=_integer,
            parse_float=_decimal,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_names,
        )
    except UnicodeDecodeError:
        raise MalformedJson("The body is not UTF-8.") from None
    except RecursionError:
        raise MalformedJson("The body is nested too deeply.") from None
    except ValueError as error:
        raise MalformedJson(f"The body is not valid JSON: {error}.") from None


def parse_payment_id(text: str) -> int | None:
    """A payment's id as a path or an argument gives it; None for a number that no payment can have.

    Raises ValidationFailed for what is no number.
    """
    return _parse_id(text, "payment_id")


def parse_order_id(text: str) -> int | None:
    """An order's id, as `parse_payment_id`."""
    return _parse_id(text, "order_id")


def parse_message_id(text: str, field: str = "message_id") -> int | None:
    """A message's id, as `parse_payment_id`."""
    return _parse_id(text, field)


def _parse_id(text: str, field: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        raise ValidationFailed.of(field, "must be a whole number")
    stripped = text.lstrip("0")
    if not stripped or len(stripped) > len(str(ID_MAX)) or int(stripped) > ID_MAX:
        return None
    return int(stripped)


def _integer(digits: str) -> int:
    if len(digits) > NUMBER_LENGTH_MAX:
        raise ValueError(f"a number has more than {NUMBER_LENGTH_MAX} digits")
    return int(digits)


def _decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation:
        raise ValueError("a number has an exponent beyond reason") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same name twice")
    return members


_MESSAGES: Mapping[str, str] = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "string_type": "must be a string",
    "string_too_short": "is too short",
    "string_too_long": "is too long",
    "too_short": "must not be empty",
    "too_long": "is too long",
}


def _field_errors(error: ValidationError) -> tuple[FieldError, ...]:
    """One entry per field, the first of its faults, and never the value: it may be a secret."""
    found: dict[str, str] = {}
    for fault in error.errors(include_input=False, include_url=False, include_context=False):
        whole_request = fault["type"] in ("amount", "page")
        field = fault["type"] if whole_request else str(fault["loc"][0]) if fault["loc"] else ""
        found.setdefault(_storable_name(field), _message(fault["type"], fault["msg"]))
        if len(found) == FIELD_ERRORS_MAX:
            break
    return tuple(FieldError(field=field, message=message) for field, message in found.items())


def _message(kind: str, message: str) -> str:
    words = _MESSAGES.get(kind, message)
    return words.replace("Input should be", "must be").replace("String should have", "must have")


def _storable_name(field: str) -> str:
    """An unknown field's name, fit for an answer: a client may send any."""
    return field.encode("utf-8", "replace").decode()[:100]
