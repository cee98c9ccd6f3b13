"""Before recovery books that something never happened: nobody may do it any more, and no sender does it later."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from eci_pay import gateway_calls
from eci_pay.answers import Answer
from eci_pay.batches import BeginResult, Begun
from eci_pay.charge_records import begin_charges
from eci_pay.errors import Unavailable
from eci_pay.gateways import Approved, Declined, GatewayUnavailable, NotFound, Outcome, Unknown
from eci_pay.group_commit import Row, Write
from eci_pay.refund_records import begin_refunds
from eci_pay.service import PaymentService
from tests.ledger import NOT_IN_TIME, Ledger, Operation
from tests.rows import charge_begin, paid, refund_begin
from tests.support import FAULTS_IN_BOOKS, Books, CommandLine, ManualClock
from tests.test_recovery import (
    DECLINED,
    NOT_HEARD_OF,
    TOLD_OF_FAILURE,
    TOLD_OF_SUCCESS,
    aged,
    assert_finished,
    charged,
    never_happened,
    recoveries,
    refund_statuses,
    refunded,
    status_of,
    told,
    travel,
)

TURNED_UP = Approved(reference="REF TURNED UP")
EACH_OPERATION = pytest.mark.parametrize("operation", ["charge", "refund"])


class Ruling(Ledger):
    """Answers what it is told to when it is asked to rule a key out."""

    ruling: Outcome | NotFound | BaseException | None = None

    async def rule_out(self, operation: Operation) -> Outcome | NotFound:
        answer = await super().rule_out(operation)
        if isinstance(self.ruling, BaseException):
            raise self.ruling
        if isinstance(self.ruling, Approved | Declined):
            self.booked[operation.key] = self.ruling
        return self.ruling or answer


@pytest.fixture
def ledger() -> Ruling:
    """The gateway of `recovering`."""
    return Ruling()


async def lost(service: PaymentService, ledger: Ruling, operation: str) -> int:
    """A charge, or a refund, that never arrived at the gateway; the id of its payment."""
    if operation == "charge":
        ledger.loses_requests = True
        unknown = await charged(service)
    else:
        [payment_id] = await paid(service, 1)
        ledger.loses_requests = True
        unknown = await refunded(service, payment_id)
    assert unknown.is_unknown
    return unknown.payment_id


async def replayed(service: PaymentService, payment_id: int, operation: str) -> Answer:
    """What the key of `lost` answers."""
    return await (charged(service) if operation == "charge" else refunded(service, payment_id))


async def standing(books: Books, operation: str) -> str:
    """The status of what was `lost`."""
    return await status_of(books) if operation == "charge" else (await refund_statuses(books))[0]


def sent_key(ledger: Ruling, operation: str) -> str:
    """The key under which it was sent."""
    return (ledger.charges if operation == "charge" else ledger.refunds)[-1].key


# 1. Ruling out


@EACH_OPERATION
async def test_the_gateway_is_asked_to_rule_a_key_out_only_after_the_grace_period_and_before_anything_is_booked(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling, operation: str
) -> None:
    payment_id = await lost(recovering, ledger, operation)
    [look] = await aged(recovering, clock)
    for seconds in (100, 40):
        await travel(books, seconds=seconds)
        [look] = await recovering.recovery.run_once()
        assert (look.state, look.result) == NOT_HEARD_OF
    assert ledger.ruled_out == []
    await travel(books, seconds=11)
    [look] = await recovering.recovery.run_once()
    assert ledger.ruled_out == [sent_key(ledger, operation)]
    assert (look.state, await standing(books, operation)) == ("CHECKING", "FAILED")
    replay = await replayed(recovering, payment_id, operation)
    assert (replay.status_code, json.loads(replay.body)["decline_code"]) == (402, "not_processed")
    # The last look only looks: there is nothing left to be ruled out.
    await travel(books, hours=1)
    await recovering.recovery.run_once()
    assert ([state for state, _ in await recoveries(books)], len(ledger.ruled_out)) == (["DONE"], 1)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@EACH_OPERATION
async def test_what_turns_up_just_when_it_is_ruled_out_is_completed(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling, operation: str
) -> None:
    payment_id = await lost(recovering, ledger, operation)
    ledger.ruling = TURNED_UP
    await never_happened(recovering, books, clock)
    assert (await recoveries(books), await standing(books, operation)) == ([("DONE", "approved")], "COMPLETED")
    audit_trail = await books.audit_trail(payment_id)
    replay = await replayed(recovering, payment_id, operation)
    if operation == "charge":
        assert audit_trail == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
        assert await books.value("SELECT authorization_code FROM payments") == TURNED_UP.reference
        assert await told(books) == TOLD_OF_SUCCESS
        await assert_finished(recovering, books, replay, 201)
    else:
        assert audit_trail[2:] == [("REFUND", "PROCESSING"), ("REFUND", "REFUNDED")]
        assert await books.value("SELECT refunded_amount FROM payments") == 40
        await assert_finished(recovering, books, replay, 200, key="refund")
    await travel(books)
    assert await recovering.recovery.run_once() == []
    assert (len(ledger.charges), len(ledger.ruled_out), ledger.given_back()) == (1, 1, [])


@EACH_OPERATION
async def test_what_turns_out_to_be_declined_when_it_is_ruled_out_is_told_so(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling, operation: str
) -> None:
    payment_id = await lost(recovering, ledger, operation)
    ledger.ruling = DECLINED
    await never_happened(recovering, books, clock)
    assert await recoveries(books) == [("DONE", "declined: card_declined")]
    replay = await replayed(recovering, payment_id, operation)
    assert (replay.status_code, json.loads(replay.body)["decline_code"]) == (402, "card_declined")
    assert await told(books) == (TOLD_OF_FAILURE if operation == "charge" else TOLD_OF_SUCCESS)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@EACH_OPERATION
@pytest.mark.parametrize(
    "ruling",
    [
        NOT_IN_TIME,
        GatewayUnavailable("refused"),
        RuntimeError("an adapter's bug"),
        asyncio.CancelledError("the adapter's own"),
    ],
    ids=["unknown", "unreachable", "error", "cancelled"],
)
async def test_what_cannot_be_ruled_out_stays_unknown_and_is_asked_for_again(
    recovering: PaymentService,
    books: Books,
    clock: ManualClock,
    ledger: Ruling,
    *,
    operation: str,
    ruling: Unknown | BaseException,
) -> None:
    payment_id = await lost(recovering, ledger, operation)
    ledger.ruling = ruling
    await aged(recovering, clock)
    for number in (1, 2, 3):
        await travel(books, days=1)
        [look] = await recovering.recovery.run_once()
        assert (look.state, len(ledger.ruled_out)) == ("OPEN", number)
        assert await standing(books, operation) == "PROCESSING"
        assert await recovering.recovery.run_once() == []  # it is due later, not at once
    assert [each.payment_id for each in await recovering.recovery.overdue()] == [payment_id]
    assert (await replayed(recovering, payment_id, operation)).is_unknown
    assert await told(books) == ([] if operation == "charge" else TOLD_OF_SUCCESS)
    ledger.ruling = None
    await travel(books)
    [look] = await recovering.recovery.run_once()
    assert (look.state, await standing(books, operation)) == ("CHECKING", "FAILED")
    assert set(ledger.ruled_out) == {sent_key(ledger, operation)}
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@EACH_OPERATION
@pytest.mark.parametrize("how", ["unknown", "unreachable", "approved", "declined"])
async def test_what_the_gateway_does_not_call_unheard_of_is_never_ruled_out(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling, *, operation: str, how: str
) -> None:
    await lost(recovering, ledger, operation)
    match how:
        case "unknown":
            ledger.lookup_answer = NOT_IN_TIME
        case "unreachable":
            ledger.is_reachable = False
        case "declined":
            ledger.booked[sent_key(ledger, operation)] = DECLINED
        case _:
            ledger.booked[sent_key(ledger, operation)] = TURNED_UP
    await travel(books, days=1)
    await never_happened(recovering, books, clock)
    await travel(books, days=1)
    await recovering.recovery.run_once()
    statuses = {"approved": "COMPLETED", "declined": "FAILED"}
    assert (await standing(books, operation), ledger.ruled_out) == (statuses.get(how, "PROCESSING"), [])


async def test_a_request_that_meets_what_is_unheard_of_for_long_rules_it_out_before_it_charges_anew(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling
) -> None:
    await lost(recovering, ledger, "charge")
    await aged(recovering, clock)
    await travel(books)
    ledger.loses_requests = False
    assert (await charged(recovering, key="another")).status_code == 201
    first, second = [sent.key for sent in ledger.charges]
    assert (ledger.ruled_out, first != second) == ([first], True)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 2. A sender that was held up


@dataclass
class HeldUp:
    """Holds a sender up between the commit of its begin and the gateway."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    elapsed: float = 5000.0
    """The machine's own clock."""

    def after(self, write: Write[Row, BeginResult]) -> Write[Row, BeginResult]:
        """Begins, and then waits."""

        async def begin(rows: Sequence[Row], patient: bool) -> Sequence[BeginResult]:
            results = await write(rows, patient)
            self.begun.set()
            await self.may_go_on.wait()
            return results

        return begin


@pytest.fixture
def held_up(recovering: PaymentService, monkeypatch: pytest.MonkeyPatch) -> HeldUp:
    """Holds up everybody who begins from now on, and lets the test move the machine's own clock."""
    held_up = HeldUp()
    begins_charge, begins_refund = recovering.charges.begin_charge, recovering.refunds.begin_refund
    monkeypatch.setattr(begins_charge, "_write", held_up.after(begins_charge._write))
    monkeypatch.setattr(begins_refund, "_write", held_up.after(begins_refund._write))
    monkeypatch.setattr(gateway_calls, "time", SimpleNamespace(monotonic=lambda: held_up.elapsed))
    return held_up


EACH_CLOCK = pytest.mark.parametrize(
    ("wall", "monotonic"),
    [(600.0, 600.0), (600.0, 0.0), (-3600.0, 600.0)],
    ids=["both clocks", "a machine that slept", "a clock that was set back"],
)


@EACH_OPERATION
@EACH_CLOCK
async def test_a_sender_that_slept_until_its_request_was_booked_as_never_happened_does_not_send_it(
    recovering: PaymentService,
    books: Books,
    clock: ManualClock,
    ledger: Ruling,
    request: pytest.FixtureRequest,
    *,
    operation: str,
    wall: float,
    monotonic: float,
) -> None:
    payment_id = (await paid(recovering, 1))[0] if operation == "refund" else 1
    sent_before = len(ledger.charges)
    held_up: HeldUp = request.getfixturevalue("held_up")
    sending = asyncio.create_task(replayed(recovering, payment_id, operation))
    await held_up.begun.wait()
    await never_happened(recovering, books, clock)
    assert await standing(books, operation) == "FAILED"
    clock.advance(seconds=wall)
    held_up.elapsed += monotonic
    held_up.may_go_on.set()
    told_itself = await sending
    assert (len(ledger.charges), ledger.refunds) == (sent_before, [])
    replay = await replayed(recovering, payment_id, operation)
    assert (replay.status_code, json.loads(replay.body)["decline_code"]) == (402, "not_processed")
    assert (told_itself.status_code, told_itself.body) == (402, replay.body)
    await travel(books, hours=1)
    await recovering.recovery.run_once()
    assert await recoveries(books) == [("DONE", "never happened")]
    assert (len(ledger.charges), ledger.refunds, ledger.given_back()) == (sent_before, [], [])
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


@EACH_OPERATION
@EACH_CLOCK
async def test_a_sender_that_slept_beyond_the_deadline_gives_up_and_frees_its_key(
    recovering: PaymentService,
    books: Books,
    clock: ManualClock,
    ledger: Ruling,
    request: pytest.FixtureRequest,
    *,
    operation: str,
    wall: float,
    monotonic: float,
) -> None:
    payment_id = (await paid(recovering, 1))[0] if operation == "refund" else 1
    sent_before = len(ledger.charges)
    held_up: HeldUp = request.getfixturevalue("held_up")
    sending = asyncio.create_task(replayed(recovering, payment_id, operation))
    await held_up.begun.wait()
    clock.advance(seconds=wall)
    held_up.elapsed += monotonic
    held_up.may_go_on.set()
    with pytest.raises(Unavailable, match="nothing was sent"):
        await sending
    assert (len(ledger.charges), ledger.refunds) == (sent_before, [])
    assert await standing(books, operation) == "FAILED"
    assert await recovering.recovery.run_once() == []  # there is nothing unknown about it
    answer = await replayed(recovering, payment_id, operation)
    assert (answer.status_code, answer.replayed) == (201 if operation == "charge" else 200, False)
    assert len(ledger.charges) + len(ledger.refunds) == sent_before + 1
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_sender_that_slept_while_another_paid_the_order_changes_nothing(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ruling, held_up: HeldUp
) -> None:
    sending = asyncio.create_task(charged(recovering))
    await held_up.begun.wait()
    await never_happened(recovering, books, clock)
    clock.advance(minutes=10)
    held_up.elapsed += 600
    another = asyncio.create_task(charged(recovering, key="another"))
    held_up.may_go_on.set()
    assert (await sending).status_code == 402  # as recovery has booked it
    assert (await another).status_code == 201
    assert [sent.key[-2:] for sent in ledger.charges] == ["-2"]
    assert await status_of(books) == "COMPLETED"
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []


# 3. What recovery has not scheduled yet


async def left_processing(
    service: PaymentService, books: Books, clock: ManualClock, ago: timedelta
) -> tuple[int, int, int]:
    """A charge and a refund that a crash cut off so long ago; the ids of the charge, of the refund's payment, and of
    the refund."""
    clock.now = datetime.now(UTC)
    [of_refund] = await paid(service, 50)
    begun: list[Any] = [
        *await begin_charges(service.database, [charge_begin(1)]),
        *await begin_refunds(service.database, [refund_begin(of_refund, "40.00", "refund")]),
    ]
    assert all(isinstance(result, Begun) for result in begun)
    charge, refund = [result.row for result in begun]
    at = datetime.now(UTC) - ago
    await books.rows("UPDATE payments SET updated_at = %s WHERE status = 'PROCESSING'", at)
    await books.rows("UPDATE refunds SET created_at = %s", at)
    return charge["payment_id"], of_refund, refund["refund_id"]


async def everything(books: Books) -> list[dict[str, Any]]:
    """What a look would change."""
    return await books.rows(
        "SELECT to_jsonb(p) AS payment,"
        " (SELECT jsonb_agg(f) FROM refunds f WHERE f.payment_id = p.payment_id) AS refunds,"
        " (SELECT count(*) FROM transactions) AS audit_rows, (SELECT count(*) FROM outbox) AS messages"
        " FROM payments p ORDER BY payment_id"
    )


@pytest.mark.parametrize(
    ("ago", "exit_code"),
    [(timedelta(minutes=1), 0), (timedelta(minutes=14), 0), (timedelta(minutes=16), 6), (timedelta(days=2), 6)],
    ids=str,
)
async def test_a_dry_run_shows_what_recovery_has_not_scheduled_and_changes_nothing(
    service: PaymentService,
    books: Books,
    clock: ManualClock,
    command_line: CommandLine,
    *,
    ago: timedelta,
    exit_code: int,
) -> None:
    charge, of_refund, refund = await left_processing(service, books, clock, ago)
    before = await everything(books)
    shown = await command_line.run("recover", "--dry-run", "--json")
    assert shown.exit_code == exit_code, shown.stderr
    found = {(look["payment_id"], look["refund_id"]): look for look in shown.json}
    assert found.keys() == {(charge, None), (of_refund, refund)}
    for look in shown.json:
        assert (look["recovery_id"], look["looks"], look["state"]) == (None, 0, "OPEN")
        assert ago.total_seconds() <= look["age_seconds"] < ago.total_seconds() + 60
    assert ("2 outcomes have been unknown for too long" in shown.stderr) == (exit_code == 6)
    assert await books.rows("SELECT * FROM recoveries") == []
    assert await everything(books) == before


async def test_a_dry_run_shows_both_what_is_scheduled_and_what_is_not(
    service: PaymentService, books: Books, clock: ManualClock, command_line: CommandLine
) -> None:
    charge, of_refund, refund = await left_processing(service, books, clock, timedelta(hours=1))
    await books.rows("UPDATE refunds SET created_at = now() + interval '30 seconds'")
    await service.recovery.find()
    await books.rows("UPDATE refunds SET created_at = now() - interval '1 hour'")
    shown = await command_line.run("recover", "--dry-run", "--json")
    scheduled = [(look["payment_id"], look["refund_id"], look["recovery_id"] is not None) for look in shown.json]
    # Both count from their begin.
    assert (shown.exit_code, scheduled) == (6, [(charge, None, True), (of_refund, refund, False)])
    assert "2 outcomes have been unknown for too long" in shown.stderr
    people = await command_line.run("recover", "--dry-run")
    assert (people.exit_code, "not looked at yet" in people.stdout) == (6, True)
    assert await books.value("SELECT count(*) FROM recoveries") == 1


async def test_a_dry_run_shows_nothing_where_there_is_nothing_or_it_has_only_just_begun(
    service: PaymentService, books: Books, clock: ManualClock, command_line: CommandLine
) -> None:
    clock.now = datetime.now(UTC)
    await paid(service, 2)
    nothing = await command_line.run("recover", "--dry-run", "--json")
    assert (nothing.exit_code, nothing.json) == (0, [])
    await left_processing(service, books, clock, timedelta(seconds=-30))
    just_begun = await command_line.run("recover", "--dry-run", "--json")
    assert (just_begun.exit_code, just_begun.json) == (0, [])
    assert await books.rows("SELECT * FROM recoveries") == []
