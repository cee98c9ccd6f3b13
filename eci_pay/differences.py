"""What a reconciliation finds: how each line of a settlement file compares with our books, and faults of the books
themselves. Each kind says what to do about it.

Sums are net: what was charged less what was refunded, each by its own side's word. What is pending or failed at the
gateway is no money there; what is not captured or not completed is none in our books.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum

DIFFERENCES_SHOWN_MAX = 1000
"""How many differences of each class a report shows one by one; the CSV has them all."""


class LineClass(StrEnum):
    """Each line of the file, and each operation of ours without a line, is in exactly one."""

    MATCHED = "matched"
    PENDING = "pending"
    MISSING_AT_GATEWAY = "missing_at_gateway"
    MISSING_IN_OUR_BOOKS = "missing_in_our_books"
    AMOUNT_OVER = "amount_over"
    AMOUNT_UNDER = "amount_under"
    CURRENCY_DIFFERS = "currency_differs"
    STATUS_DIFFERS = "status_differs"
    REFUND_MISSING_AT_GATEWAY = "refund_missing_at_gateway"
    REFUND_MISSING_IN_OUR_BOOKS = "refund_missing_in_our_books"
    DUPLICATE_AT_GATEWAY = "duplicate_at_gateway"

    @property
    def is_difference(self) -> bool:
        """Whether somebody has to look into it."""
        return self not in (LineClass.MATCHED, LineClass.PENDING)

    @property
    def label(self) -> str:
        """For people."""
        return self.value.replace("_", " ").capitalize()


ADVICE: Mapping[LineClass, str] = {
    LineClass.MATCHED: "Nothing to do.",
    LineClass.PENDING: "Wait: it is within its time limit, and the next run looks again.",
    LineClass.MISSING_AT_GATEWAY: "We booked money that the gateway does not settle: ask it, with our reference.",
    LineClass.MISSING_IN_OUR_BOOKS: "The gateway took money that we have not booked: find whose it is and return it.",
    LineClass.AMOUNT_OVER: "The gateway took more than we booked: return the difference at the gateway.",
    LineClass.AMOUNT_UNDER: "The gateway took less than we booked: claim the difference from the gateway.",
    LineClass.CURRENCY_DIFFERS: "The same operation in another currency: ask the gateway which one was taken.",
    LineClass.STATUS_DIFFERS: "One side says that it happened: --fix books what is certain; the rest is for you.",
    LineClass.REFUND_MISSING_AT_GATEWAY: "We booked a refund that the gateway does not settle: a customer may wait.",
    LineClass.REFUND_MISSING_IN_OUR_BOOKS: "The gateway gave money back that we have not booked: find out who asked.",
    LineClass.DUPLICATE_AT_GATEWAY: "The gateway settles the same operation again: have the second one returned.",
}


class Operation(StrEnum):
    """What a line settles."""

    CHARGE = "charge"
    REFUND = "refund"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One line of the file that is not matched, or one operation of ours without a line; `line` counts from 1, the
    header among them. Amounts are in major units and never negative; a side that knows nothing of it has None."""

    line_class: LineClass
    operation: Operation
    detail: str
    at: datetime
    line: int | None = None
    payment_id: int | None = None
    order_id: int | None = None
    refund_id: int | None = None
    transaction_id: str
    gateway_reference: str | None = None
    our_reference: str | None = None
    gateway_amount: Decimal | None = None
    our_amount: Decimal | None = None
    gateway_currency: str | None = None
    our_currency: str | None = None
    gateway_status: str | None = None
    our_status: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSum:
    """What one class comes to in one currency; `difference` is what the gateway has more than we do."""

    line_class: LineClass
    currency: str
    count: int
    gateway_net: Decimal
    our_net: Decimal

    @property
    def difference(self) -> Decimal:
        """In major units; negative where the gateway has less."""
        return self.gateway_net - self.our_net


@dataclass(frozen=True, kw_only=True, slots=True)
class DaySum:
    """How many lines and operations of one day (UTC) are matched, pending, and different."""

    day: date
    matched: int
    pending: int
    different: int


class Check(StrEnum):
    """What the books are checked for without anybody's word but their own and the gateway's; each fault is of one."""

    STATUS_NOT_AUDITED = "status_not_audited"
    PAID_TWICE = "paid_twice"
    REFUNDS_NOT_AUDITED = "refunds_not_audited"
    REFUNDS_DO_NOT_ADD_UP = "refunds_do_not_add_up"
    KEY_UNFINISHED = "key_unfinished"
    OUTCOME_UNKNOWN = "outcome_unknown"
    TAKEN_LATE = "taken_late"
    MESSAGE_OVERDUE = "message_overdue"
    MESSAGE_DEAD = "message_dead"

    @property
    def label(self) -> str:
        """For people."""
        return self.value.replace("_", " ").capitalize()


CHECK_ADVICE: Mapping[Check, str] = {
    Check.STATUS_NOT_AUDITED: "The audit trail tells another status: somebody changed the books by hand. Find out who.",
    Check.PAID_TWICE: "The audit trail tells of two successful charges of one order: look both up at the gateway.",
    Check.REFUNDS_NOT_AUDITED: "The audit trail tells other refunds: somebody changed the books by hand. Find out who.",
    Check.REFUNDS_DO_NOT_ADD_UP: "The refunds add up to another amount than the payment says: find out which is right.",
    Check.KEY_UNFINISHED: "A request without an answer, though its payment is settled: its sender's next try is told.",
    Check.OUTCOME_UNKNOWN: "The gateway may or may not have acted: --fix books what it says; see `eci-pay recover`.",
    Check.TAKEN_LATE: "The gateway acted after it was booked as never happened: see `eci-pay recover --dry-run`.",
    Check.MESSAGE_OVERDUE: "A service has not been told for long: see whether it and a relay run.",
    Check.MESSAGE_DEAD: "A service was not told, nor will be: --fix sends it again (`eci-pay outbox list --dead`).",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BookFault:
    """One fault of the books."""

    check: Check
    detail: str
    payment_id: int | None = None
    refund_id: int | None = None
    message_id: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One reconciliation. Without a file there are no lines, sums, days and differences.

    The period is from `period_from` (inclusive) to `period_to` (exclusive). Of each class at most
    `DIFFERENCES_SHOWN_MAX` differences are in `differences`, and of each check as many faults in `faults`: the counts
    are of all. Unknown outcomes that are within their time limit are no faults: `open_in_time` counts them.
    """

    run_id: int
    operator: str
    started_at: datetime
    seconds: float
    file: str | None
    file_hash: str | None
    seen_in_run_id: int | None
    period_from: datetime | None
    period_to: datetime | None
    payments: int
    lines: int
    sums: tuple[ClassSum, ...]
    days: tuple[DaySum, ...]
    differences: tuple[Difference, ...]
    fault_counts: Mapping[Check, int]
    faults: tuple[BookFault, ...]
    open_in_time: int
    warnings: tuple[str, ...] = ()
    repaired: int = 0

    @property
    def difference_count(self) -> int:
        """Lines and operations that somebody has to look into."""
        return sum(each.count for each in self.sums if each.line_class.is_difference)

    @property
    def fault_count(self) -> int:
        """Faults of the books, of all checks."""
        return sum(self.fault_counts.values())

    @property
    def is_clean(self) -> bool:
        """Whether nobody has to look into anything."""
        return self.difference_count + self.fault_count <= self.repaired
