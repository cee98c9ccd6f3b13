"""Reconciliation: our books against themselves, and against what the gateway says: of what is open, and in its file.

A run looks and records what it found; nothing else is changed until somebody asks for the repairs that it proposes.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, assert_never

from eci_pay import settlement_matching as matching
from eci_pay.book_checks import UNSETTLED_MAX, BookChecks, Found
from eci_pay.context import acting_for
from eci_pay.database import Connection, Database, Row, fetch
from eci_pay.differences import DIFFERENCES_SHOWN_MAX, BookFault, Check, Difference, LineClass, Report
from eci_pay.errors import InvalidRequest, Unavailable
from eci_pay.gateway_calls import LOOKS_AT_ONCE_MAX
from eci_pay.gateways import Approved, Declined, NotFound, Outcome, Unknown
from eci_pay.looks import Looks, Schedule, Unsettled
from eci_pay.messages import Destination
from eci_pay.outbox import Outbox
from eci_pay.repairs import BookRefund, Repair, Repaired, Repairs, SendAgain, SettleOutcome
from eci_pay.settlement_file import copy_lines
from eci_pay.settlement_matching import Matched, Period
from eci_pay.table_files import TableFile

ONE_DAY = timedelta(days=1)
REFUNDS_REPAIRED_MAX = 10_000
"""How many refunds that the gateway made after all one run proposes to book."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be reconciled: with a file or without, of a time (the second instant exclusive) or of all; on whose
    behalf. Where no time is given, a file is of the days (UTC) of its lines. It was made at some moment, now if left
    out, and cannot have what happened later."""

    operator: str
    file: TableFile | None = None
    made_at: datetime | None = None
    period_from: datetime | None = None
    period_to: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Who is told meanwhile: of the bytes that were read, of the part of the books that is checked (0 to 1), and of
    every difference, of which the report has only some."""

    on_bytes: Callable[[int], None] = lambda _: None
    on_books: Callable[[float], None] = lambda _: None
    on_difference: Callable[[Difference], None] = lambda _: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run as it was recorded; counts are by class and currency, and by check."""

    run_id: int
    operator: str
    started_at: datetime
    ended_at: datetime
    file_name: str | None
    file_hash: str | None
    period_from: datetime | None
    period_to: datetime | None
    payments: int
    lines: int
    differences: int
    faults: int
    repaired: int
    counts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the gateway says of an outcome that our books do not have."""

    unsettled: Unsettled
    outcome: Outcome | NotFound


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compared:
    """What came of comparing: without a file, nothing but the run itself."""

    run_id: int
    seen_in_run_id: int | None
    matched: Matched | None
    differences: tuple[Difference, ...]
    open_lines: tuple[Row, ...]
    late_refunds: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciliation:
    """Every method raises Unavailable."""

    database: Database
    checks: BookChecks
    looks: Looks
    outbox: Outbox
    schedule: Schedule
    clock: Callable[[], datetime]

    async def run(self, job: Job, watch: Watch) -> tuple[Report, list[Repair]]:
        """Compares, records the run, and proposes what can be repaired for certain. Raises FileInvalid, and
        InvalidRequest for a period that is none."""
        started_at = self.clock()
        _refuse_reversed(job.period_from, job.period_to)
        unsettled, more = await self.checks.unsettled()
        asked = await self._ask(unsettled, self.looks.outcome)
        found = Found()
        for each in asked:
            if self._is_fault(each):
                found.add(_unknown(each))
        in_time = len(asked) - found.counts[Check.OUTCOME_UNKNOWN]
        found.counts[Check.OUTCOME_UNKNOWN] += more
        dead = await self._dead_messages()
        compared = await self._compare(job, watch, found, started_at)
        matched = compared.matched
        report = Report(
            run_id=compared.run_id,
            operator=job.operator,
            started_at=started_at,
            seconds=(self.clock() - started_at).total_seconds(),
            file=job.file.name if job.file else None,
            file_hash=job.file.digest if job.file else None,
            seen_in_run_id=compared.seen_in_run_id,
            period_from=matched.period.start if matched else job.period_from,
            period_to=matched.period.end if matched else job.period_to,
            payments=found.payments,
            lines=matched.lines if matched else 0,
            sums=matched.sums if matched else (),
            days=matched.days if matched else (),
            differences=compared.differences,
            fault_counts={check: count for check, count in found.counts.items() if count},
            faults=tuple(found.faults),
            open_in_time=in_time,
            warnings=() if matched is None else _warnings(matched, job, started_at),
        )
        settles = [repair for each in asked if (repair := _settle(each, self._is_fault(each), compared.open_lines))]
        return report, [*settles, *await self._late_refunds(compared.late_refunds), *dead]

    async def repair(self, report: Report, repairs: Sequence[Repair]) -> list[Repaired]:
        """Makes the repairs of a run; the audit trail names the run and its operator."""
        with acting_for(f"reconciliation {report.run_id} of {report.operator}"):
            made = await Repairs(looks=self.looks, outbox=self.outbox).make(repairs)
        repaired = {"run_id": report.run_id, "repaired": sum(each.findings for each in made)}
        try:
            await self.database.fetch("reconciliation_repaired", repaired)
        except Unavailable as error:  # what was made is told all the same
            _log.warning("the history does not know of %d repairs: %s", len(made), error)
        return made

    async def close(self, payment_id: int, *, operator: str) -> int:
        """Ends what runs have left open of a payment, because somebody has settled it by hand; how much that was."""
        params = {"payment_id": payment_id, "operator": operator, "at": self.clock()}
        (row,) = await self.database.fetch("settlement_close", params)
        return int(row["closed"])

    async def history(self, *, before: int, count_max: int) -> list[Run]:
        """The runs before that one, the latest first."""
        rows = await self.database.read("reconciliation_history", {"before": before, "count_max": count_max})
        return [Run(**row) for row in rows]

    async def _ask(
        self, unsettled: Sequence[Unsettled], ask: Callable[[Unsettled], Awaitable[Outcome | NotFound | None]]
    ) -> list[_Asked]:
        """Asks the gateway, a few at a time; no further where it does not answer any of them."""
        asked: list[_Asked] = []
        for start in range(0, len(unsettled), LOOKS_AT_ONCE_MAX):
            few = unsettled[start : start + LOOKS_AT_ONCE_MAX]
            outcomes = await asyncio.gather(*(ask(each) for each in few))
            asked += [_Asked(each, outcome) for each, outcome in zip(few, outcomes, strict=True) if outcome is not None]
            if all(isinstance(outcome, Unknown) and not outcome.answered for outcome in outcomes):
                left = Unknown(message="not asked: the gateway does not answer")
                return asked + [_Asked(each, left) for each in unsettled[start + LOOKS_AT_ONCE_MAX :]]
        return asked

    def _is_fault(self, asked: _Asked) -> bool:
        """Whether it has been unknown for too long: recovery books at its first look what the gateway tells."""
        is_told = isinstance(asked.outcome, Approved | Declined)
        return asked.unsettled.age_seconds > (self.schedule.first if is_told else self.schedule.alert)

    async def _compare(self, job: Job, watch: Watch, found: Found, started_at: datetime) -> _Compared:
        """Checks the books and, beside that, matches the file; records the run with what was matched."""
        checking = asyncio.create_task(
            self.checks.check(found, changed_from=job.period_from, changed_to=job.period_to, on_progress=watch.on_books)
        )

        async def work(connection: Connection) -> _Compared:
            matched = None
            if job.file is not None:
                matched = await self._match(connection, job.file, job, watch)
            await checking
            return await self._recorded(
                connection, job, watch=watch, found=found, matched=matched, started_at=started_at
            )

        try:
            if job.file is None:
                await checking
            return await self.database.long_transaction(work)
        finally:
            checking.cancel()
            await asyncio.wait({checking})

    async def _match(self, connection: Connection, file: TableFile, job: Job, watch: Watch) -> Matched:
        await matching.copy(connection, copy_lines(file), lambda: watch.on_bytes(file.bytes_read))
        lines, days = await matching.days_of(connection)
        start = job.period_from or (days.start if days else None)
        end = job.period_to or (days.end if days else None)
        if start is None or end is None:
            raise InvalidRequest(f"{file.name}: has no lines: say which days it is of, with --from and --to")
        _refuse_reversed(start, end)
        now = self.clock()
        return await matching.match(
            connection,
            Period(start=start, end=end),
            lines=lines,
            # A time before the period is not the file's: somebody has unpacked or copied it with another.
            made_at=job.made_at if job.made_at and job.made_at > start else now,
            now=now,
            unknown_max=timedelta(seconds=self.schedule.alert),
        )

    async def _recorded(
        self,
        connection: Connection,
        job: Job,
        *,
        watch: Watch,
        found: Found,
        matched: Matched | None,
        started_at: datetime,
    ) -> _Compared:
        """Tells of the differences and records the run, with what it leaves to the next one."""
        shown: list[Difference] = []
        counts: Counter[LineClass] = Counter()
        open_lines: list[Row] = []
        late_refunds: list[Row] = []
        if matched is not None:
            async for difference in matching.differences(connection):
                watch.on_difference(difference)
                counts[difference.line_class] += 1
                if counts[difference.line_class] <= DIFFERENCES_SHOWN_MAX:
                    shown.append(difference)
            open_lines = await fetch(connection, "settlement_processing", {"count_max": UNSETTLED_MAX})
            late_refunds = await fetch(connection, "settlement_repairable", {"count_max": REFUNDS_REPAIRED_MAX})
        digest = job.file.digest if job.file else None
        seen = await fetch(connection, "reconciliation_seen", {"file_hash": digest})
        (row,) = await fetch(
            connection,
            "reconciliation_record",
            {
                "operator": job.operator,
                "started_at": started_at,
                "ended_at": self.clock(),
                "file_name": job.file and job.file.name,
                "file_hash": digest,
                "period_from": matched.period.start if matched else job.period_from,
                "period_to": matched.period.end if matched else job.period_to,
                "payments": found.payments,
                "lines": matched.lines if matched else 0,
                "differences": sum(count for line_class, count in counts.items() if line_class.is_difference),
                "faults": sum(found.counts.values()),
                "counts": json.dumps(_counts(matched, found)),
            },
        )
        if matched is not None:
            await matching.carry(connection, matched, row["run_id"])
        return _Compared(
            run_id=row["run_id"],
            seen_in_run_id=seen[0]["run_id"] if seen else None,
            matched=matched,
            differences=tuple(shown),
            open_lines=tuple(open_lines),
            late_refunds=tuple(late_refunds),
        )

    async def _late_refunds(self, rows: Sequence[Row]) -> list[Repair]:
        """Refunds that failed by our books and are settled by the file: those that the gateway confirms."""
        references = [row.pop("gateway_reference") for row in rows]
        asked = await self._ask(
            [Unsettled(**row) for row in rows], lambda each: self.looks.gateway.look_up(each.operation)
        )
        return [
            BookRefund(unsettled=each.unsettled, outcome=each.outcome)
            for each, reference in zip(asked, references, strict=True)
            if isinstance(each.outcome, Approved) and each.outcome.reference == reference
        ]

    async def _dead_messages(self) -> list[Repair]:
        return [
            SendAgain(destination=Destination(each.destination), findings=each.dead)
            for each in await self.outbox.stats()
            if each.dead
        ]


def _refuse_reversed(start: datetime | None, end: datetime | None) -> None:
    if start and end and start >= end:
        raise InvalidRequest(f"the period ends before it begins: {start.isoformat()} to {end.isoformat()}")


def _warnings(matched: Matched, job: Job, now: datetime) -> tuple[str, ...]:
    """What may make differences that are none."""
    warnings = []
    if (job.period_from is None or job.period_to is None) and matched.period.end - matched.period.start > ONE_DAY:
        days = (matched.period.end - matched.period.start) // ONE_DAY
        warnings.append(f"the file's lines are of {days} days (UTC): --from and --to tell of which it should have all")
    if matched.period.end > now:
        warnings.append("the period is not over: reconcile its whole file when it is")
    return tuple(warnings)


def _counts(matched: Matched | None, found: Found) -> dict[str, Any]:
    return {
        "lines": [
            {
                "class": each.line_class.value,
                "currency": each.currency,
                "count": each.count,
                "gateway_net": str(each.gateway_net),
                "our_net": str(each.our_net),
            }
            for each in (matched.sums if matched else ())
        ],
        "faults": {check.value: count for check, count in found.counts.items() if count},
    }


def _unknown(asked: _Asked) -> BookFault:
    match asked.outcome:
        case Approved(reference=reference):
            told = f"the gateway says approved ({reference})"
        case Declined(code=code):
            told = f"the gateway says declined ({code})"
        case NotFound():
            told = "the gateway has not heard of it"
        case Unknown(message=message):
            told = message
        case _:
            assert_never(asked.outcome)
    return BookFault(
        check=Check.OUTCOME_UNKNOWN,
        detail=f"{asked.unsettled.amount} {asked.unsettled.currency} for {asked.unsettled.age_seconds:.0f} s: {told}",
        payment_id=asked.unsettled.payment_id,
        refund_id=asked.unsettled.refund_id,
    )


def _settle(asked: _Asked, is_fault: bool, open_lines: Sequence[Row]) -> SettleOutcome | None:
    """The repair of an outcome that the gateway tells. It puts right the lines of the file that say the same."""
    unsettled, outcome = asked.unsettled, asked.outcome
    if not isinstance(outcome, Approved | Declined):
        return None
    lines = [
        line
        for line in open_lines
        if (line["payment_id"], line["refund_id"]) == (unsettled.payment_id, unsettled.refund_id)
        and line["same_money"]
        and (
            (line["gateway_status"], line["gateway_reference"]) == ("settled", outcome.reference)
            if isinstance(outcome, Approved)
            else line["gateway_status"] == "failed"
        )
    ]
    return SettleOutcome(unsettled=unsettled, outcome=outcome, findings=int(is_fault) + len(lines))
