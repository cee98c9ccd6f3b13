"""Reconciliation: every line of a settlement file has its class, and so has what the file lacks."""

import io
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from eci_pay.differences import ADVICE, CHECK_ADVICE, Check, Difference, LineClass
from eci_pay.errors import FileInvalid, InvalidRequest
from eci_pay.reconciliation import Job, Watch
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from eci_pay.table_files import TableFile
from tests.ledger import Ledger
from tests.rows import paid
from tests.settlements import Line, classes, counts, csv_text, line, reconciled, settlement, true_lines
from tests.support import Books, ManualClock, charge_request, create_request, refund_request
from tests.test_recovery import charged, never_happened, travel

DAY = datetime(2026, 11, 1, tzinfo=UTC)


async def refunded(service: PaymentService, payment_id: int, amount: str | None = None) -> None:
    """Refunds a payment, whole or in part."""
    answer = await service.refunds.refund(payment_id=payment_id, request=refund_request(amount))
    assert answer.status_code == 200


def by_id(lines: list[Line], transaction_id: str) -> Line:
    return next(each for each in lines if each["transaction_id"] == transaction_id and each["type"] == "charge")


async def test_a_file_that_says_what_our_books_say_is_clean_and_its_sums_are_ours(
    service: PaymentService, books: Books
) -> None:
    first, second, _ = await paid(service, 1, 2, 3)
    await refunded(service, first, "30.00")
    await refunded(service, second)
    dollars = charge_request(4, currency="USD", amount="12.34", payment_method="UPI")
    await service.charges.charge(request=dollars, idempotency_key="dollars")
    report, repairs = await reconciled(service, await true_lines(books))
    assert (report.is_clean, repairs, classes(report)) == (True, [], [])
    assert [(s.line_class.value, s.currency, s.count, str(s.gateway_net), str(s.our_net)) for s in report.sums] == [
        ("matched", "INR", 5, "170.00", "170.00"),
        ("matched", "USD", 1, "12.34", "12.34"),
    ]
    assert [(each.day, each.matched, each.pending, each.different) for each in report.days] == [(DAY.date(), 6, 0, 0)]
    assert (report.lines, report.payments, report.fault_count) == (6, 4, 0)
    assert (report.period_from, report.period_to) == (DAY, DAY + timedelta(days=1))


async def test_each_difference_has_its_class(service: PaymentService, books: Books) -> None:
    ids = await paid(service, *range(1, 12))
    for payment_id in ids[7:10]:
        await refunded(service, payment_id, "40.00")
    txn = {
        row["order_id"]: row["transaction_id"]
        for row in await books.rows("SELECT order_id, transaction_id FROM payments")
    }
    lines = await true_lines(books)
    of_order = {order: by_id(lines, txn[order]) for order in txn}
    refunds = {each["transaction_id"]: each for each in lines if each["type"] == "refund"}
    of_order[1]["amount"] = "100.01"
    of_order[2]["amount"] = "99.99"
    of_order[3]["currency"] = "USD"
    of_order[4]["status"] = "failed"
    lines.remove(of_order[5])
    lines.append(of_order[6])
    lines.append(line(txn[7], "ANOTHER"))
    refunds[txn[8]]["amount"] = "41.00"
    lines.remove(refunds[txn[9]])
    lines.append(line(txn[11], "RFNDUNKNOWN", type="refund", amount="1.00"))
    lines.append(line("TXNUNKNOWN", "AUTHUNKNOWN"))
    lines.append(line("TXNUNKNOWN", "RFNDNOBODYS", type="refund"))
    report, repairs = await reconciled(service, lines)

    def found(order: int | None, operation: str = "charge") -> list[str]:
        return [
            each.line_class.value
            for each in report.differences
            if each.order_id == order and each.operation == operation
        ]

    assert {order: found(order) for order in txn} == {
        1: ["amount_over"],
        2: ["amount_under"],
        3: ["currency_differs"],
        4: ["status_differs"],
        5: ["missing_at_gateway"],
        6: ["duplicate_at_gateway"],
        7: ["duplicate_at_gateway"],
        **{order: [] for order in range(8, 12)},
    }
    assert {order: found(order, "refund") for order in (8, 9, 10, 11)} == {
        8: ["amount_over"],
        9: ["refund_missing_at_gateway"],
        10: [],
        11: ["refund_missing_in_our_books"],
    }
    assert (found(None), found(None, "refund")) == (["missing_in_our_books"], ["refund_missing_in_our_books"])
    assert sum(counts(report).values()) == len(lines) + 2
    assert repairs == []
    differences = {(s.line_class.value, s.currency): s.difference for s in report.sums if s.difference}
    assert differences == {
        ("amount_over", "INR"): Decimal("0.01") - Decimal(1),
        ("amount_under", "INR"): Decimal("-0.01"),
        ("currency_differs", "INR"): Decimal(-100),
        ("currency_differs", "USD"): Decimal(100),
        ("status_differs", "INR"): Decimal(-100),
        ("missing_at_gateway", "INR"): Decimal(-100),
        ("missing_in_our_books", "INR"): Decimal(100),
        ("refund_missing_at_gateway", "INR"): Decimal(40),
        ("refund_missing_in_our_books", "INR"): Decimal(-101),
        ("duplicate_at_gateway", "INR"): Decimal(200),
    }


async def test_what_no_gateway_was_asked_for_is_not_expected_in_its_file(service: PaymentService, books: Books) -> None:
    cash = charge_request(1, payment_method="COD")
    await service.charges.charge(request=cash, idempotency_key="cash")
    created = await service.charges.create(request=create_request(2))
    completed = parse_request(StatusUpdateRequest, {"status": "COMPLETED"})
    await service.status_changes.update(payment_id=created.payment_id, request=completed)
    await refunded(service, created.payment_id, "10.00")
    declined = charge_request(3, amount="4000.02")
    await service.charges.charge(request=declined, idempotency_key="declined")
    await paid(service, 4)
    report, _ = await reconciled(service, await true_lines(books))
    assert (report.is_clean, report.lines, counts(report)) == (True, 1, {"matched": 1})
    # But if it is there nevertheless, it differs.
    rows = await books.rows("SELECT transaction_id, amount FROM payments WHERE order_id < 4 ORDER BY order_id")
    lines = [line(row["transaction_id"], f"REF{n}", amount=row["amount"]) for n, row in enumerate(rows)]
    report, repairs = await reconciled(service, [*lines, *await true_lines(books)])
    assert [each.line_class for each in report.differences] == [LineClass.STATUS_DIFFERS] * 3
    assert repairs == []
    # That it failed at the gateway is what our books say of the third.
    failed = line(rows[2]["transaction_id"], "REF", amount="4000.02", status="failed")
    report, _ = await reconciled(service, [failed, *await true_lines(books)])
    assert report.is_clean


async def test_what_the_gateway_calls_pending_is_pending_for_three_days(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1)
    [of_charge] = await true_lines(books)
    of_charge["status"] = "pending"
    report, _ = await reconciled(service, [of_charge])
    assert (report.is_clean, counts(report)) == (True, {"pending": 1})
    clock.advance(days=3, seconds=1)
    report, _ = await reconciled(service, [of_charge])
    assert (report.is_clean, counts(report)) == (False, {"status_differs": 1})


async def test_money_that_came_too_late_and_went_back_is_matched_on_both_ways(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering)
    await never_happened(recovering, books, clock)
    charge_key = ledger.charges[0].key
    taken = ledger.act(charge_key)
    transaction_id = await books.value("SELECT transaction_id FROM payments")
    lines = [line(transaction_id, taken.reference)]  # type: ignore[union-attr]
    report, repairs = await reconciled(recovering, lines)
    assert (classes(report), repairs) == ([(2, "status_differs")], [])
    ledger.loses_requests = False
    await travel(books)
    assert [look.state for look in await recovering.recovery.run_once()] == ["LATE", "DONE"]
    [given_back] = ledger.given_back()
    lines.append(line(transaction_id, ledger.booked[given_back].reference, type="refund"))  # type: ignore[union-attr]
    report, _ = await reconciled(recovering, lines)
    assert (report.is_clean, counts(report)) == (True, {"matched": 2})


async def test_an_attempt_that_failed_is_no_difference_and_one_that_did_not_is_one(
    service: PaymentService, books: Books
) -> None:
    declined = charge_request(1, amount="4000.02")
    await service.charges.charge(request=declined, idempotency_key="first")
    await service.charges.charge(request=charge_request(1), idempotency_key="second")
    lines = await true_lines(books)
    transaction_id = lines[0]["transaction_id"]
    first = line(transaction_id, "FIRST", amount="4000.02", status="failed")
    report, _ = await reconciled(service, [first, *lines])
    assert (report.is_clean, counts(report)) == (True, {"matched": 2})
    first["status"] = "settled"
    report, _ = await reconciled(service, [first, *lines])
    assert classes(report) == [(2, "duplicate_at_gateway")]
    # Alone in the file it is not what our books hold: that is missing.
    report, _ = await reconciled(service, [first])
    assert classes(report) == [(None, "missing_at_gateway"), (2, "missing_in_our_books")]


async def test_what_was_booked_at_the_end_of_a_day_may_be_in_the_next_file_and_is_missing_after_that(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1)
    clock.now = DAY + timedelta(hours=23, minutes=50)
    charge_2, charge_3 = await paid(service, 2, 3)
    await refunded(service, charge_2, "5.00")
    lines = await true_lines(books)
    clock.advance(minutes=30)
    report, _ = await reconciled(service, lines[:1])
    assert (report.is_clean, counts(report)) == (True, {"matched": 1, "pending": 3})
    again, _ = await reconciled(service, lines[:1])
    assert counts(again) == {"matched": 1, "pending": 3}
    clock.advance(hours=12)
    await paid(service, 4)
    tomorrow = {"period_from": DAY + timedelta(days=1), "period_to": DAY + timedelta(days=2)}
    late = [each for each in await true_lines(books) if each not in lines[:1]]
    of_third = await books.value("SELECT transaction_id FROM payments WHERE payment_id = %s", charge_3)
    present = [each for each in late if each["transaction_id"] != of_third]
    report, _ = await reconciled(service, present, **tomorrow)
    assert counts(report) == {"matched": 3, "missing_at_gateway": 1}
    assert [each.payment_id for each in report.differences] == [charge_3]
    # And so says every run, until a file has it, or somebody has settled it by hand.
    for of_run in (present, []):
        report, _ = await reconciled(service, of_run, **tomorrow)
        assert charge_3 in [each.payment_id for each in report.differences if each.at < tomorrow["period_from"]]
    assert await service.reconciliation.close(charge_3, operator="olga") == 1
    report, _ = await reconciled(service, present, **tomorrow)
    assert counts(report) == {"matched": 3}
    [closed] = await books.rows("SELECT payment_id, closed_by FROM settlements_awaited WHERE closed_at IS NOT NULL")
    assert closed == {"payment_id": charge_3, "closed_by": "olga"}


async def test_the_period_limits_what_is_missing_and_no_line(
    service: PaymentService, books: Books, clock: ManualClock
) -> None:
    await paid(service, 1)
    clock.advance(days=1)
    await paid(service, 2)
    clock.advance(days=1)
    await paid(service, 3)
    lines = await true_lines(books)
    report, _ = await reconciled(service, lines[1:2])
    assert (report.is_clean, report.period_from) == (True, DAY + timedelta(days=1))
    report, _ = await reconciled(service, lines[2:], period_from=DAY)
    assert counts(report) == {"matched": 1, "missing_at_gateway": 2}
    report, _ = await reconciled(service, lines, period_from=DAY, period_to=DAY + timedelta(days=1))
    assert counts(report) == {"matched": 3}
    with pytest.raises(InvalidRequest, match="ends before it begins"):
        await reconciled(service, lines, period_from=DAY, period_to=DAY)
    with pytest.raises(InvalidRequest, match="has no lines: say which days"):
        await reconciled(service, [])
    report, _ = await reconciled(service, [], period_from=DAY, period_to=DAY + timedelta(days=1))
    assert counts(report) == {"missing_at_gateway": 1}


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_a_file_says_each_line_is_in_one_class_and_our_money_is_counted_once(
    service: PaymentService, books: Books, seed: int
) -> None:
    """The money of our books is the sum over all classes, whatever the lines are."""
    chance = random.Random(seed)
    ids = await paid(service, *range(1, 13))
    for payment_id in chance.sample(ids, 5):
        for _ in range(chance.randint(1, 3)):
            await refunded(service, payment_id, chance.choice(["10.00", "10.00", "20.00"]))
    true = await true_lines(books)
    lines = [dict(each) for each in true if chance.random() < 0.8]
    for each in [*lines, *lines]:
        if chance.random() < 0.5:
            name = chance.choice(["gateway_reference", "transaction_id", "type", "amount", "currency", "status"])
            wrong = {"type": chance.choice(["charge", "refund"]), "amount": chance.choice(["10.00", "100.00", "7.5"])}
            wrong |= {
                "currency": chance.choice(["INR", "USD"]),
                "status": chance.choice(["settled", "pending", "failed"]),
            }
            each[name] = wrong.get(name, chance.choice(true)[name])
        if chance.random() < 0.3:
            lines.append(dict(each))
        if len(lines) > 60:
            break
    seen: list[Difference] = []
    watch = Watch(on_difference=seen.append)
    period = {"period_from": DAY, "period_to": DAY + timedelta(days=1)}
    report, _ = await service.reconciliation.run(Job(operator="olga", file=settlement(lines), **period), watch)
    numbered = Counter(each.line for each in seen if each.line is not None)
    matched = counts(report).get("matched", 0)
    assert set(numbered.values()) <= {1}
    assert len(numbered) + matched == len(lines)
    assert sum(each.our_net for each in report.sums) == sum(
        each["amount"] if each["type"] == "charge" else -each["amount"] for each in true
    )
    at_gateway: dict[str, Decimal] = {}
    for each in lines:
        if each["status"] == "settled":
            sign = 1 if each["type"] == "charge" else -1
            at_gateway[each["currency"]] = at_gateway.get(each["currency"], Decimal(0)) + sign * Decimal(each["amount"])
    assert {c: sum(s.gateway_net for s in report.sums if s.currency == c) for c in at_gateway} == dict(at_gateway)
    assert tuple(seen) == report.differences


async def test_a_run_is_recorded_and_the_same_file_is_known_again(service: PaymentService, books: Books) -> None:
    await paid(service, 1)
    lines = await true_lines(books)
    first, _ = await reconciled(service, lines)
    second, _ = await reconciled(service, lines)
    other, _ = await reconciled(service, [*lines, line("TXN", "REF")])
    assert [each.seen_in_run_id for each in (first, second, other)] == [None, first.run_id, None]
    assert first.file_hash == second.file_hash != other.file_hash
    latest, *_ = runs = await service.reconciliation.history(before=100, count_max=2)
    assert [run.run_id for run in runs] == [other.run_id, second.run_id]
    assert (latest.operator, latest.lines, latest.differences, latest.faults) == ("olga", 2, 1, 0)
    assert latest.counts["lines"][1] == {
        "class": "missing_in_our_books",
        "currency": "INR",
        "count": 1,
        "gateway_net": "100.00",
        "our_net": "0",
    }


async def test_a_bad_file_leaves_nothing_behind(service: PaymentService, books: Books) -> None:
    await paid(service, 1)
    good = csv_text(await true_lines(books))
    for bad in (good + "half a line", good.replace("100.00", "1,00.00"), ""):
        job = Job(operator="olga", file=TableFile(io.BytesIO(bad.encode()), "bad.csv"))
        with pytest.raises(FileInvalid, match=r"bad\.csv: "):
            await service.reconciliation.run(job, Watch())
    for table in ("reconciliation_runs", "settlements_awaited"):
        assert await books.value(f"SELECT count(*) FROM {table}") == 0
    report, _ = await reconciled(service, await true_lines(books))
    assert report.is_clean


async def test_refunds_without_a_reference_are_paired_by_their_amount(
    recovering: PaymentService, books: Books, ledger: Ledger, clock: ManualClock
) -> None:
    """Two of the same amount have no outcome; the file settles one of them, and one that we do not know."""
    [payment_id] = await paid(recovering, 1)
    ledger.loses_requests = True
    for amount in ("10.00", "10.00", "20.00"):
        answer = await recovering.refunds.refund(payment_id=payment_id, request=refund_request(amount))
        assert answer.status_code == 202
    [of_charge] = await true_lines(books)
    lines = [of_charge] + [
        line(of_charge["transaction_id"], reference, type="refund", amount=amount)
        for reference, amount in (("A", "10.00"), ("B", "30.00"))
    ]
    report, _ = await reconciled(recovering, lines)
    assert classes(report) == [(3, "pending"), (4, "refund_missing_in_our_books")]
    assert (report.open_in_time, report.fault_count) == (3, 0)
    clock.advance(hours=1)
    report, _ = await reconciled(recovering, lines)
    assert classes(report) == [(3, "status_differs"), (4, "refund_missing_in_our_books")]
    assert report.fault_counts == {Check.OUTCOME_UNKNOWN: 3}


def test_each_class_and_each_check_says_what_to_do() -> None:
    assert set(ADVICE) == set(LineClass)
    assert set(CHECK_ADVICE) == set(Check)
