"""The gateway: whoever moves the money. What eci-pay asks of one, and what it may answer.

A gateway is given a key of ours with every operation and acts at most once per key. A timeout, or a server error
after the request was sent, is `Unknown` and never a decline: the gateway may have acted.
"""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Protocol


class GatewayUnavailable(Exception):
    """The gateway was not reached: it is certain that nothing was sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayCharge:
    """A charge as the gateway sees it; `amount` in major units. `begun_at` tells a lookup where to look."""

    key: str
    amount: Decimal
    currency: str
    payment_method: str
    payment_token: str | None = field(default=None, repr=False)
    begun_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayRefund:
    """A refund as the gateway sees it, of the charge with `charge_key`, which the gateway calls `charge_reference`."""

    key: str
    charge_key: str
    charge_reference: str
    amount: Decimal
    currency: str
    payment_method: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Approved:
    """The gateway acted. `reference` is its own name for what it did."""

    reference: str
    message: str = "Approved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Declined:
    """The gateway refused and will not act on this key; `code` is stable, `message` is for people."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """The gateway may or may not have acted. It `answered` where it does not know itself yet; else it has failed."""

    message: str
    answered: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFound:
    """The gateway has never heard of this key; only a lookup says so."""


Outcome = Approved | Declined | Unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayEvent:
    """What the gateway tells of its own accord: the outcome of the operation with `key`."""

    key: str
    outcome: Approved | Declined


class Gateway(Protocol):
    """What eci-pay needs of a gateway. Operations raise GatewayUnavailable where nothing was sent."""

    def fault(self, charge: GatewayCharge) -> tuple[str, str] | None:
        """What it can never charge, known without asking it: the field at fault, and why."""

    async def charge(self, charge: GatewayCharge) -> Outcome:
        """Takes the money."""

    async def refund(self, refund: GatewayRefund) -> Outcome:
        """Gives money back."""

    async def lookup(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Tells what became of an operation."""

    async def rule_out(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Looks up an operation and keeps it from being done later, where the gateway can be kept from it."""

    def read_event(self, body: bytes, signature: str | None) -> GatewayEvent | None:
        """What the gateway has sent to our address: None where that settles nothing.
        Raises EventRefused for what it has not signed, or signed too long ago."""

    async def close(self) -> None:
        """Lets go of connections."""
