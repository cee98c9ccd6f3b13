"""Lets in who has an API key with the scope that an operation wants (RFC 6750)."""

from starlette.requests import Request
from starlette.types import Scope as Connection

from eci_pay.access import ApiKeys, Caller, Scope
from eci_pay.context import act_as
from eci_pay.errors import Forbidden, Unauthorized
from eci_pay.rate_limit import RateLimit
from server.headers import header_values

ANYBODY = ""
"""The caller where access is not controlled."""
CALLER = "eci_pay.caller"
"""Where the connection's scope has it."""


class AccessControl:
    """Stands before every operation that wants a scope."""

    def __init__(self, keys: ApiKeys, rate_limit: RateLimit) -> None:
        self._keys = keys
        self._rate_limit = rate_limit

    async def admit(self, connection: Connection, wanted: Scope) -> None:
        """Notes who calls. Raises Unauthorized, RateLimited, Forbidden, and Unavailable."""
        # Without the database nothing can be changed, but who watches should still see the metrics.
        caller = await self._keys.caller(
            _token(header_values(connection, b"authorization")), may_be_outdated=wanted is Scope.METRICS
        )
        act_as(caller.actor)
        connection[CALLER] = caller
        self._rate_limit.take(caller.name)
        if not caller.may(wanted):
            raise Forbidden(f"this wants the scope {wanted}", wanted=wanted)


def caller_of(request: Request) -> str:
    """Whose idempotency keys they are."""
    caller: Caller | None = request.scope.get(CALLER)
    return ANYBODY if caller is None else caller.name


def _token(values: list[str]) -> str:
    if not values:
        raise Unauthorized("give an API key: `Authorization: Bearer ecipay_...`", key_was_given=False)
    if len(values) > 1:
        raise Unauthorized("there is more than one Authorization header", key_was_given=True)
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("the Authorization must be `Bearer ecipay_...`", key_was_given=False)
    return token.strip(" ")
