"""What other services are told of a payment, and which of them hears of what.

The bodies are contracts of those services; where each is sent is written in `peers.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from typing import Any

from eci_pay.lifecycle import PaymentStatus
from eci_pay.money import plain
from eci_pay.settings import Settings
from eci_pay.views import PaymentView


class Destination(StrEnum):
    """A service that is told of changes."""

    ORDER = "order"
    INVENTORY = "inventory"
    NOTIFICATION = "notification"


def service_urls(settings: Settings) -> dict[Destination, str]:
    """The base URL of each service that is told of changes; the others are told nothing."""
    urls = {
        Destination.ORDER: settings.order_service_url,
        Destination.INVENTORY: settings.inventory_service_url,
        Destination.NOTIFICATION: settings.notification_service_url,
    }
    return {destination: url for destination, url in urls.items() if url is not None}


class Event(StrEnum):
    """A change of state that somebody is told of. The last refund of a payment is two of them."""

    PAYMENT_COMPLETED = "payment.completed"
    PAYMENT_FAILED = "payment.failed"
    PAYMENT_CANCELLED = "payment.cancelled"
    REFUND_COMPLETED = "refund.completed"
    PAYMENT_REFUNDED = "payment.refunded"


@dataclass(frozen=True, slots=True)
class _Told:
    """What each service hears of an event: the order's new status, the inventory's reason to release what it holds,
    the notification's type and text. None: nothing."""

    order: str | None = None
    inventory: str | None = None
    notification: tuple[str, str] | None = None


WHO_HEARS_OF_WHAT = {
    Event.PAYMENT_COMPLETED: _Told(
        order="COMPLETED",
        notification=("PAYMENT_SUCCESS", "Your payment of {amount} {currency} was received.{reference}"),
    ),
    Event.PAYMENT_FAILED: _Told(
        order="FAILED",
        inventory="Payment failed",
        notification=("PAYMENT_FAILED", "Your payment of {amount} {currency} failed.{reference}"),
    ),
    Event.PAYMENT_CANCELLED: _Told(
        order="CANCELLED",
        inventory="Payment cancelled",
    ),
    Event.REFUND_COMPLETED: _Told(
        notification=(
            "PAYMENT_REFUNDED",
            "{amount} {currency} of your payment were refunded.{reference} Reason: {reason}",
        ),
    ),
    Event.PAYMENT_REFUNDED: _Told(
        order="REFUNDED",
        inventory="Payment refunded",
    ),
}

EVENT_OF_STATUS = {
    PaymentStatus.COMPLETED: Event.PAYMENT_COMPLETED,
    PaymentStatus.FAILED: Event.PAYMENT_FAILED,
    PaymentStatus.CANCELLED: Event.PAYMENT_CANCELLED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What messages tell of a payment; none of it changes after the payment was begun."""

    payment_id: int
    order_id: int
    user_id: int
    amount: Decimal
    currency: str
    reference: str | None

    @classmethod
    def of_view(cls, view: PaymentView) -> "Subject":
        """The subject of messages about a payment that is at hand."""
        return cls(
            payment_id=view.payment_id,
            order_id=view.order_id,
            user_id=view.user_id,
            amount=view.amount,
            currency=view.currency,
            reference=view.reference,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Subject":
        """The same from a row that has its columns."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A message to be written with the change that it tells of."""

    destination: Destination
    event: Event
    payload: str


@dataclass(frozen=True, slots=True)
class Messages:
    """Writes messages to those services that are configured; the others get none."""

    destinations: frozenset[Destination]

    def of_change(self, status: PaymentStatus, payment: Subject) -> tuple[Message, ...]:
        """What is told of a payment that is now COMPLETED, FAILED or CANCELLED."""
        return self._of(EVENT_OF_STATUS[status], payment, amount=payment.amount)

    def of_refund(self, payment: Subject, *, amount: Decimal, reason: str) -> tuple[Message, ...]:
        """What is told of a refund that was completed, and then what is told only if nothing is left after it."""
        completed = self._of(Event.REFUND_COMPLETED, payment, amount=amount, reason=reason)
        return completed + self._of(Event.PAYMENT_REFUNDED, payment, amount=payment.amount)

    def _of(self, event: Event, payment: Subject, *, amount: Decimal, reason: str = "") -> tuple[Message, ...]:
        told = WHO_HEARS_OF_WHAT[event]
        payloads: dict[Destination, dict[str, Any]] = {}
        if told.order is not None:
            payloads[Destination.ORDER] = {"payment_id": payment.payment_id, "payment_status": told.order}
        if told.inventory is not None:
            payloads[Destination.INVENTORY] = {"order_id": payment.order_id, "reason": told.inventory}
        if told.notification is not None:
            kind, text = told.notification
            payloads[Destination.NOTIFICATION] = {
                "user_id": payment.user_id,
                "type": kind,
                "message": text.format(
                    amount=plain(amount, payment.currency),
                    currency=payment.currency,
                    reference=f" Reference: {payment.reference}." if payment.reference else "",
                    reason=reason,
                ),
                "channel": "EMAIL",
            }
        return tuple(
            Message(destination=destination, event=event, payload=json.dumps(payload))
            for destination, payload in payloads.items()
            if destination in self.destinations
        )


def message_arrays(messages: Sequence[Sequence[Message]]) -> dict[str, list[Any]]:
    """The messages of rows as parameters of a statement that writes them, each with the number `n` of its row and
    its own number, from 1, among those of the row."""
    flat = [(n, number, message) for n, of_row in enumerate(messages) for number, message in enumerate(of_row, start=1)]
    return {
        "message_n": [n for n, _, _ in flat],
        "message_number": [number for _, number, _ in flat],
        "message_destination": [message.destination.value for _, _, message in flat],
        "message_event": [message.event.value for _, _, message in flat],
        "message_payload": [message.payload for _, _, message in flat],
    }
