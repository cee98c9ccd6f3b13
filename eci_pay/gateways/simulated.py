"""A gateway that moves no money: stateless and deterministic, so that a lookup after a crash agrees with the charge.

Its magic amounts act on CREDIT_CARD charges, and on refunds of any method.
"""

import asyncio
import hashlib
from decimal import Decimal
from enum import Enum, auto

from eci_pay.errors import EventRefused
from eci_pay.gateways import (
    Approved,
    Declined,
    GatewayCharge,
    GatewayEvent,
    GatewayRefund,
    NotFound,
    Outcome,
    Unknown,
)


class Behaviour(Enum):
    """What a magic amount makes the gateway do."""

    CARD_DECLINED = auto()
    INSUFFICIENT_FUNDS = auto()
    TIMEOUT_AFTER_ACTING = auto()
    TIMEOUT_BEFORE_ACTING = auto()
    SLOW = auto()
    SERVER_ERROR = auto()


MAGIC_AMOUNTS = {
    Decimal("4000.02"): Behaviour.CARD_DECLINED,
    Decimal("4000.03"): Behaviour.INSUFFICIENT_FUNDS,
    Decimal("4000.08"): Behaviour.TIMEOUT_AFTER_ACTING,
    Decimal("4000.09"): Behaviour.TIMEOUT_BEFORE_ACTING,
    Decimal("4000.10"): Behaviour.SLOW,
    Decimal("4000.11"): Behaviour.SERVER_ERROR,
}

_DECLINES = {
    Behaviour.CARD_DECLINED: Declined(code="card_declined", message="The card was declined."),
    Behaviour.INSUFFICIENT_FUNDS: Declined(code="insufficient_funds", message="The card has insufficient funds."),
}
_TIMEOUTS = (Behaviour.TIMEOUT_AFTER_ACTING, Behaviour.TIMEOUT_BEFORE_ACTING)
_NEVER_ACTS = (Behaviour.TIMEOUT_BEFORE_ACTING, Behaviour.SERVER_ERROR)


class SimulatedGateway:
    """The gateway of demonstrations, tests and benchmarks."""

    def __init__(self, *, latency_seconds: float, slow_seconds: float) -> None:
        self._latency_seconds = latency_seconds
        self._slow_seconds = slow_seconds

    def fault(self, charge: GatewayCharge) -> tuple[str, str] | None:  # noqa: ARG002
        """Charges anything."""
        return None

    async def charge(self, charge: GatewayCharge) -> Outcome:
        """Approves, or does what the magic amount says."""
        return await self._answer(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        """Approves, or does what the magic amount says."""
        return await self._answer(refund)

    async def lookup(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Tells what the operation came to, or would have come to."""
        behaviour = _behaviour(operation)
        return NotFound() if behaviour in _NEVER_ACTS else _result(operation, behaviour)

    async def rule_out(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """A lookup: it does nothing later that it has not done."""
        return await self.lookup(operation)

    def read_event(self, body: bytes, signature: str | None) -> GatewayEvent | None:  # noqa: ARG002
        """Nothing that arrives is from it, for it sends nothing."""
        raise EventRefused("the simulated gateway sends no events")

    async def close(self) -> None:
        """There is nothing to close."""

    async def _answer(self, operation: GatewayCharge | GatewayRefund) -> Outcome:
        behaviour = _behaviour(operation)
        slow = behaviour is Behaviour.SLOW or behaviour in _TIMEOUTS
        if pause_seconds := self._latency_seconds + (self._slow_seconds if slow else 0):
            await asyncio.sleep(pause_seconds)
        if behaviour in _TIMEOUTS:
            return Unknown(message="The gateway did not answer in time.")
        if behaviour is Behaviour.SERVER_ERROR:
            return Unknown(message="The gateway answered with error 500.")
        return _result(operation, behaviour)


def _behaviour(operation: GatewayCharge | GatewayRefund) -> Behaviour | None:
    if isinstance(operation, GatewayCharge) and operation.payment_method != "CREDIT_CARD":
        return None
    return MAGIC_AMOUNTS.get(operation.amount)


def _result(operation: GatewayCharge | GatewayRefund, behaviour: Behaviour | None) -> Approved | Declined:
    if behaviour in _DECLINES:
        return _DECLINES[behaviour]
    prefix = "AUTH" if isinstance(operation, GatewayCharge) else "RFND"
    return Approved(reference=prefix + hashlib.sha256(operation.key.encode()).hexdigest()[:12].upper())
