"""What a file of refunds or charges comes to: each row held against the books before the first of them is made.

Rows whose key is live were begun by an earlier run, or by another that goes on beside this one: they are no faults,
whatever their payment's state, for it may be that state because of them.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal

from eci_pay.bulk_files import FAULTS_SHOWN_MAX, BulkFile, BulkKind, BulkRow, ChargeRow, Faults, RefundRow
from eci_pay.charges import Charges
from eci_pay.database import Row
from eci_pay.errors import FileFault, PayError, RefundExceedsBalance, ValidationFailed
from eci_pay.idempotency import Claim
from eci_pay.refund_records import RefundBegin
from eci_pay.requests import ChargeRequest, RefundRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A row that can be done, or was begun before, or, in a rerun, is tried though it would be refused. `amount` is
    what it comes to, in major units; a charge that was not begun may have no payment yet."""

    line: int
    payment_id: int | None
    order_id: int
    amount: Decimal
    currency: str
    file: BulkFile
    was_begun: bool
    would_be_refused: bool
    request: RefundRequest | ChargeRequest

    @property
    def key(self) -> str:
        """Its idempotency key."""
        return self.file.key(self.line)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All rows of a file, none at fault; in a rerun, some may be refused when they are tried. `warnings` tell of what
    may be meant, and may not."""

    file: BulkFile
    tasks: Sequence[Task]
    warnings: Sequence[str]

    @property
    def to_do(self) -> list[Task]:
        """What was not begun before, and can be done."""
        return [task for task in self.tasks if not (task.was_begun or task.would_be_refused)]

    @property
    def begun_before(self) -> int:
        """How many rows were."""
        return sum(task.was_begun for task in self.tasks)

    @property
    def would_be_refused(self) -> int:
        """How many rows would be, as the books are."""
        return sum(task.would_be_refused for task in self.tasks)

    def lanes(self) -> list[list[Task]]:
        """The rows of each order, which is to say of each payment, in the file's order: they are done one by one."""
        lanes: dict[int, list[Task]] = defaultdict(list)
        for task in self.tasks:
            lanes[task.order_id].append(task)
        return list(lanes.values())


@dataclass(kw_only=True, slots=True)
class Planner(ABC):
    """Takes the rows of a file, one after the other, each with what `bulk_standing.sql` found of it."""

    file: BulkFile
    at: datetime
    tasks: list[Task] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _faults: Faults = field(init=False)
    _faults_of_reruns: Faults = field(init=False)
    """Those that no other payment or refund can have brought about."""

    def __post_init__(self) -> None:
        self._faults = Faults(self.file.name)
        self._faults_of_reruns = Faults(self.file.name)
        self.file = replace(self.file, rows=())  # they go on as tasks: both would take twice the memory

    @abstractmethod
    def add(self, row: BulkRow, found: Row) -> None:
        """Plans one more row, or notes its fault."""

    def plan(self) -> Plan:
        """Raises FileInvalid with the faults of all rows. Where some were begun before, a row that fits no longer is
        tried, and refused alone: if it stopped the others, somebody would take it out of the file, and another file
        asks for all its rows again."""
        is_rerun = any(task.was_begun for task in self.tasks)
        (self._faults_of_reruns if is_rerun else self._faults).refuse()
        return Plan(file=self.file, tasks=self.tasks, warnings=self.warnings)

    def _fault(self, row: BulkRow, column: str, message: str) -> None:
        fault = FileFault(message=message, line=row.line, column=column)
        self._faults.add(fault)
        self._faults_of_reruns.add(fault)

    def _refuse(self, row: BulkRow, found: Row, currency: str, error: PayError, column: str) -> None:
        message = error.errors[0].message if isinstance(error, ValidationFailed) else error.detail
        self._faults.add(FileFault(message=message, line=row.line, column=column))
        self._task(row, found, row.request.amount or Decimal(0), currency, would_be_refused=True)

    def _task(
        self, row: BulkRow, found: Row, amount: Decimal, currency: str, *, would_be_refused: bool = False
    ) -> None:
        task = Task(
            line=row.line,
            payment_id=found["payment_id"],
            order_id=row.order_id or found["order_id"],
            amount=amount,
            currency=currency,
            file=self.file,
            was_begun=found["key_id"] is not None,
            would_be_refused=would_be_refused,
            request=row.request,
        )
        self.tasks.append(task)


@dataclass(kw_only=True, slots=True)
class RefundPlanner(Planner):
    """Every row is held to the rule of a refund's begin, what the rows before it ask for taken as refunded."""

    _refunded: dict[int, Decimal] = field(default_factory=dict)
    """By payment: what is, and what the rows so far ask for. It begins with the first look at the payment, so that rows
    which another run of the file does meanwhile do not count twice."""
    _lines: dict[tuple[int, Decimal | None, str], int] = field(default_factory=dict)
    """By what is asked for: where it was seen first."""

    def add(self, row: BulkRow, found: Row) -> None:
        """As above."""
        assert isinstance(row, RefundRow)
        payment_id = found["payment_id"]
        if payment_id is None:
            column, number = ("payment_id", row.payment_id) if row.payment_id else ("order_id", row.order_id)
            self._fault(row, column, f"there is no payment {'of order ' if column == 'order_id' else ''}{number}")
            return
        self._warn_where_repeated(row, payment_id)
        refunded = self._refunded.setdefault(payment_id, found["refunded_amount"])
        if found["key_id"] is not None:
            # Nobody but us makes keys like ours; whoever did so for no refund has it refused later.
            self._task(row, found, found["refund_amount"] or row.request.amount or Decimal(0), found["currency"])
            return
        begin = RefundBegin.of(payment_id, row.request, Claim(value=None, caller="", request_hash=None), self.at)
        if error := begin.fault({**found, "refunded_amount": refunded}):
            is_amount = isinstance(error, RefundExceedsBalance | ValidationFailed)
            column = "amount" if is_amount else "payment_id" if row.payment_id else "order_id"
            self._refuse(row, found, found["currency"], error, column)
            return
        amount = found["amount"] - refunded if row.request.amount is None else row.request.amount
        self._refunded[payment_id] = refunded + amount
        self._task(row, found, amount, found["currency"])

    def _warn_where_repeated(self, row: RefundRow, payment_id: int) -> None:
        """Two equal refunds may be meant; a row that was copied is not."""
        asked = (payment_id, row.request.amount, row.request.reason)
        if (first := self._lines.setdefault(asked, row.line)) == row.line:
            return
        if len(self.warnings) < FAULTS_SHOWN_MAX:
            self.warnings.append(f"lines {first} and {row.line} ask for the same refund of payment {payment_id}")
        elif len(self.warnings) == FAULTS_SHOWN_MAX:
            self.warnings.append("and more rows ask for the same as others")


@dataclass(kw_only=True, slots=True)
class ChargePlanner(Planner):
    """Every order once, and every row held to the rules of a charge's begin."""

    charges: Charges
    _lines: dict[int, int] = field(default_factory=dict)
    """By order: where it was seen first."""

    def add(self, row: BulkRow, found: Row) -> None:
        """As above."""
        assert isinstance(row, ChargeRow)
        if (first := self._lines.setdefault(row.order_id, row.line)) != row.line:
            self._fault(row, "order_id", f"order {row.order_id} is there twice, first in line {first}")
        elif found["key_id"] is None and (error := self.charges.fault(row.request, found)):
            fields = [fault.field for fault in error.errors] if isinstance(error, ValidationFailed) else ["order_id"]
            self._refuse(row, found, row.request.currency, error, fields[0])
        else:
            self._task(row, found, row.request.amount, row.request.currency)


def sums_by_currency(tasks: Sequence[Task]) -> Mapping[str, Decimal]:
    """What they come to, in major units."""
    sums: dict[str, Decimal] = defaultdict(Decimal)
    for task in tasks:
        sums[task.currency] += task.amount
    return dict(sorted(sums.items()))


def planner_of(file: BulkFile, charges: Charges, at: datetime) -> Planner:
    """The planner of a file's kind."""
    if file.kind is BulkKind.REFUND:
        return RefundPlanner(file=file, at=at)
    return ChargePlanner(file=file, at=at, charges=charges)
