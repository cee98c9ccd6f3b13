"""A payment on the terminal: its facts, and its history as a timeline."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from eci_pay.views import MessageView, PaymentMessages, PaymentView

SHORT_SECONDS = 60
NOBODY: Mapping[int, str] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Something that happened to a payment, or is due."""

    at: datetime
    what: str
    status: str
    amount: Decimal | None = None
    description: str | None = None


def print_payment(view: "PaymentView") -> None:
    """A payment with its history."""
    if output.Mode.json:
        output.print_json(view.model_dump(mode="json"))
        return
    out = output.console()
    out.print(output.facts(_facts(view), title=f"Payment {view.payment_id}"))
    out.print(_timeline(moments(view)))


def print_story(view: "PaymentView", messages: "PaymentMessages", actors: dict[int, str]) -> None:
    """A payment with its history, what others were told of it, and who made its changes where that is known."""
    if output.Mode.json:
        told = {**view.model_dump(mode="json"), **messages.model_dump(mode="json")}
        for transaction in told["transactions"]:
            transaction["actor"] = actors.get(transaction["transaction_log_id"])
        output.print_json(told)
        return
    out = output.console()
    out.print(output.facts(_facts(view), title=f"Payment {view.payment_id}"))
    out.print(_timeline(moments(view, messages.messages, actors)))
    if messages.messages_left_out:
        output.note(f"and {output.counted(messages.messages_left_out, 'message')} more, earlier ones")


def moments(
    view: "PaymentView", messages: "Iterable[MessageView]" = (), actors: Mapping[int, str] = NOBODY
) -> list[Moment]:
    """All that is known to have happened, in the order of time."""
    found = [
        Moment(
            at=t.created_at,
            what=t.transaction_type,
            amount=t.amount,
            status=t.status,
            description=_by(t.description, actors.get(t.transaction_log_id)),
        )
        for t in view.transactions
    ]
    for r in view.refunds:
        reference = f" ({r.gateway_reference})" if r.gateway_reference else ""
        what, description = f"refund {r.refund_id}", f"{r.reason}{reference}"
        found.append(Moment(at=r.created_at, what=what, amount=r.amount, status=r.status, description=description))
    for message in messages:
        found += _deliveries(message)
    return sorted(found, key=lambda moment: moment.at)


def _by(description: str | None, actor: str | None) -> str | None:
    return f"{description or ''} by {actor}" if actor else description


def _deliveries(message: "MessageView") -> Iterator[Moment]:
    """What is kept of a message's deliveries: the first that failed, and the last."""
    what, name = f"to {message.destination}", f"message {message.message_id}, {message.event}"
    tried = f"{name}, after {message.attempts} {'delivery' if message.attempts == 1 else 'deliveries'}"
    failed = f"{tried}: {message.last_error}" if message.last_error else tried
    yield Moment(at=message.created_at, what=what, status="queued", description=name)
    ended_at = message.delivered_at or message.dead_at
    if message.first_attempt_at is not None and (ended_at is None or message.attempts > 1):
        yield Moment(at=message.first_attempt_at, what=what, status="failed", description=f"{name}, delivery 1")
    if message.delivered_at is not None:
        yield Moment(at=message.delivered_at, what=what, status="delivered", description=tried)
    elif message.dead_at is not None:
        yield Moment(at=message.dead_at, what=what, status="dead", description=failed)
    elif message.next_attempt_at is not None:
        status = "waiting until" if message.state == "pending" else "in delivery until"
        description = failed if message.attempts else name
        yield Moment(at=message.next_attempt_at, what=what, status=status, description=description)


def _timeline(found: list[Moment]) -> "Table":
    distances = ["", *(_distance((later.at - earlier.at).total_seconds()) for earlier, later in pairwise(found))]
    rows = [
        (
            f"{moment.at:%Y-%m-%d %H:%M:%S}.{moment.at.microsecond // 1000:03}",
            distance,
            moment.what,
            f"{moment.amount:,.2f}" if moment.amount is not None else "",
            output.styled(moment.status),
            output.shown(moment.description),
        )
        for moment, distance in zip(found, distances, strict=True)
    ]
    headings = ("When (UTC)", "After", "What", "Amount", "Status", "Description")
    return output.table(headings, rows, right=("After", "Amount"))


def _distance(seconds: float) -> str:
    return f"+{seconds:.3f} s" if seconds < SHORT_SECONDS else f"+{output.duration(seconds)}"


def _facts(view: "PaymentView") -> Iterable[tuple[str, Any]]:
    refunded = f"{view.refunded_amount:,.2f} {view.currency}" if view.refunded_amount else None
    if view.refund_pending:
        refunded = f"{refunded} ({view.refund_pending:,.2f} in flight)"
    return (
        ("Status", output.styled(view.status)),
        ("Amount", f"{view.amount:,.2f} {view.currency}"),
        ("Refunded", refunded),
        ("Method", view.payment_method.value),
        ("Order", view.order_id),
        ("User", view.user_id),
        ("Transaction", view.transaction_id),
        ("Reference", output.shown(view.reference)),
        ("Authorization", output.shown(view.authorization_code)),
        ("Gateway said", output.shown(view.gateway_response)),
        ("Attempt", view.attempt),
        ("Created", f"{view.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("Completed", f"{view.completed_at:%Y-%m-%d %H:%M:%S} UTC" if view.completed_at else None),
    )
