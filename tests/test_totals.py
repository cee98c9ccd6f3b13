"""Running totals of the books: whatever happens, they are what a count of the books would tell."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator

import pytest

from cli.failures import EXIT_DEFECT
from eci_pay.background import background_tasks
from eci_pay.database import fetch
from eci_pay.errors import PayError
from eci_pay.lifecycle import PaymentMethod
from eci_pay.migrations import load_sample_data
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from eci_pay.totals import BookTotals, unexpected_errors
from tests.door import Door
from tests.ledger import Ledger
from tests.log_lines import logged
from tests.support import Books, CommandLine, ManualClock, charge_request, create_request, refund_request, until
from tests.test_recovery import charged, never_happened

COUNTED = """
SELECT 'status' AS metric, status AS label, count(*) AS count, 0::numeric AS amount FROM payments GROUP BY status
UNION ALL SELECT 'method', payment_method, count(*), 0 FROM payments GROUP BY payment_method
UNION ALL SELECT 'completed', currency, count(*), sum(amount) FROM payments
          WHERE status IN ('COMPLETED', 'REFUNDED') GROUP BY currency
UNION ALL SELECT 'failed', '', count(*), 0 FROM transactions WHERE transaction_type = 'PAYMENT' AND status = 'FAILED'
          HAVING count(*) > 0
UNION ALL SELECT 'refunds', p.currency, count(*), sum(f.amount) FROM refunds f JOIN payments p USING (payment_id)
          WHERE f.status = 'COMPLETED' GROUP BY p.currency
"""


async def assert_true(service: PaymentService, books: Books) -> BookTotals:
    """The totals are what a count finds; adding them up changes nothing."""
    counted = {(row["metric"], row["label"]): (row["count"], row["amount"]) for row in await books.rows(COUNTED)}
    for _ in range(2):
        rows = await service.database.read("totals_read")
        told = {(row["metric"], row["label"]): (row["count"], row["amount"]) for row in rows if row["count"]}
        assert told == counted
        await service.totals.add_up()
    assert await books.value("SELECT count(*) FROM total_changes") == 0
    return await service.totals.read()


@pytest.fixture(autouse=True)
def _no_errors() -> None:
    unexpected_errors.take()


@pytest.fixture
async def rolling(service: PaymentService) -> AsyncIterator[None]:
    """Somebody adds up all the time."""
    stopped = asyncio.Event()

    async def roll() -> None:
        while not stopped.is_set():
            await service.totals.add_up()

    rollers = [asyncio.create_task(roll()) for _ in range(2)]
    yield
    stopped.set()
    await asyncio.gather(*rollers)


async def test_each_change_counts(service: PaymentService, books: Books) -> None:
    paid = await service.charges.charge(request=charge_request(1, amount="100.00"), idempotency_key="1")
    await service.refunds.refund(payment_id=paid.payment_id, request=refund_request("30.00"))
    dollars = charge_request(2, amount="12.34", currency="USD", payment_method="UPI")
    whole = await service.charges.charge(request=dollars, idempotency_key="2")
    await service.refunds.refund(payment_id=whole.payment_id, request=refund_request())
    await service.charges.charge(request=charge_request(3, amount="4000.02"), idempotency_key="3")
    again = charge_request(3, amount="50.00", payment_method="WALLET")
    await service.charges.charge(request=again, idempotency_key="3 again")
    await service.charges.charge(request=charge_request(4, payment_method="COD"), idempotency_key="4")
    totals = await assert_true(service, books)
    assert (totals.payments, totals.failed_attempts) == (4, 1)
    assert {status.value: count for status, count in totals.by_status.items() if count} == {
        "COMPLETED": 2, "REFUNDED": 1, "PENDING": 1,
    }  # fmt: skip
    assert {method.value: count for method, count in totals.by_method.items() if count} == {
        "CREDIT_CARD": 1, "UPI": 1, "WALLET": 1, "COD": 1,
    }  # fmt: skip
    for each, inr in ((totals.completed, "150.00"), (totals.refunds, "30.00")):
        assert {currency: str(total.amount) for currency, total in each.items()} == {"INR": inr, "USD": "12.34"}


@pytest.mark.usefixtures("rolling")
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_at_once_the_totals_are_true(service: PaymentService, books: Books, seed: int) -> None:
    chance = random.Random(seed)
    methods = list(PaymentMethod)

    async def act(n: int) -> None:
        order_id = chance.randint(1, 25)
        amount = chance.choice(["10.00", "4000.02", "4000.09", "4000.11"])
        try:
            match chance.choice(["charge", "charge", "create", "refund", "patch", "cancel"]):
                case "charge":
                    method = chance.choice([*methods, PaymentMethod.CREDIT_CARD])
                    request = charge_request(order_id, amount=amount, payment_method=method)
                    await service.charges.charge(request=request, idempotency_key=f"{n}")
                case "create":
                    created = create_request(order_id, amount=amount, payment_method=chance.choice(methods))
                    await service.charges.create(request=created)
                case "refund":
                    view = await service.payments.by_order(order_id)
                    amount = chance.choice(["1.00", "10.00"])
                    await service.refunds.refund(payment_id=view.payment_id, request=refund_request(amount))
                case "patch":
                    view = await service.payments.by_order(order_id)
                    status = chance.choice(["COMPLETED", "FAILED", "CANCELLED"])
                    change = parse_request(StatusUpdateRequest, {"status": status})
                    await service.status_changes.update(payment_id=view.payment_id, request=change)
                case _:
                    view = await service.payments.by_order(order_id)
                    await service.status_changes.cancel(payment_id=view.payment_id)
        except PayError:
            pass  # most of it is refused

    for batch in range(4):
        await asyncio.gather(*(act(batch * 100 + n) for n in range(60)))
    await asyncio.sleep(0)
    counted = {(row["metric"], row["label"]): (row["count"], row["amount"]) for row in await books.rows(COUNTED)}
    rows = await service.database.read("totals_read")
    assert {(row["metric"], row["label"]): (row["count"], row["amount"]) for row in rows if row["count"]} == counted


async def test_what_recovery_books_counts(
    recovering: PaymentService, books: Books, clock: ManualClock, ledger: Ledger
) -> None:
    ledger.loses_requests = True
    await charged(recovering, 1)
    await never_happened(recovering, books, clock)
    ledger.loses_requests, ledger.loses_answers = False, True
    await charged(recovering, 2)
    clock.advance(seconds=60)
    await recovering.recovery.run_once()
    totals = await assert_true(recovering, books)
    assert (totals.payments, totals.failed_attempts, str(totals.completed["INR"].amount)) == (2, 1, "100.00")


async def test_what_is_rolled_back_does_not_count(service: PaymentService, books: Books) -> None:
    await charged(service, 1)
    with pytest.raises(ZeroDivisionError):
        await service.database.transaction(_change_and_fail)
    totals = await assert_true(service, books)
    assert totals.payments == 1


async def _change_and_fail(connection: object) -> None:
    change = {"count": 7}
    await fetch(connection, "totals_errors", change)  # type: ignore[arg-type]
    raise ZeroDivisionError


async def test_sample_data_counts(service: PaymentService, books: Books, database_url: str) -> None:
    assert await load_sample_data(database_url) == (await assert_true(service, books)).payments


async def test_unexpected_errors_count_once_the_database_can_be_told(service: PaymentService, books: Books) -> None:
    unexpected_errors.add(2)
    await service.totals.add_up()
    unexpected_errors.add(1)
    await service.totals.add_up()
    assert (await service.totals.read()).errors == 3
    await books.rows("ALTER TABLE total_changes RENAME TO elsewhere")
    unexpected_errors.add(5)
    with pytest.raises(PayError):
        await service.totals.add_up()
    await books.rows("ALTER TABLE elsewhere RENAME TO total_changes")
    await service.totals.add_up()
    assert (await service.totals.read()).errors == 8


async def test_an_error_counts_even_where_the_log_does_not_tell_it(service: PaymentService) -> None:
    with logged("json", level="CRITICAL") as lines:
        async with service.totals.counting_errors():
            logging.getLogger("some").error("failed", exc_info=ValueError("a defect"))
            logging.getLogger("some").error("no defect")
    assert lines() == []
    assert (await service.totals.read()).errors == 1


async def test_a_database_that_is_away_is_no_unexpected_error(
    settings: Settings, far: PaymentService, door: Door
) -> None:
    door.shut()
    with logged("json") as lines:

        async def told() -> bool:
            return "\n".join(lines()).count(" stay for now: the database cannot be reached") == 2

        async with background_tasks(settings, far):
            await until(told)
    assert unexpected_errors.take() == 0


async def test_a_commands_defect_counts(command_line: CommandLine, service: PaymentService, books: Books) -> None:
    await charged(service, 1)
    await books.rows("ALTER TABLE payments DROP CONSTRAINT payments_method_known")
    await books.rows("UPDATE payments SET payment_method = 'BARTER'")  # as a newer release may know it
    assert (await command_line.run("show", "1")).exit_code == EXIT_DEFECT
    assert (await command_line.run("show", "2")).exit_code != EXIT_DEFECT
    assert await books.value("SELECT sum(count) FROM total_changes WHERE metric = 'errors'") == 1


@pytest.mark.usefixtures("rolling")
async def test_a_recount_puts_right_what_was_changed_without_the_totals(service: PaymentService, books: Books) -> None:
    await charged(service, 1)
    await charged(service, 2)
    unexpected_errors.add(1)
    await service.totals.add_up()
    assert await service.totals.recount() == []
    await books.rows(
        "INSERT INTO payments (order_id, user_id, amount, currency, payment_method, status, transaction_id)"
        " VALUES (3, 7, 5, 'USD', 'UPI', 'COMPLETED', 'x')"
    )
    await books.rows("UPDATE payments SET status = 'FAILED', captured_at = NULL WHERE order_id = 2")
    lacking = [
        ("completed", "INR", -1, "-100.00"), ("completed", "USD", 1, "5.00"), ("method", "UPI", 1, "0"),
        ("status", "FAILED", 1, "0"),
    ]  # fmt: skip
    for dry_run in (True, False):
        told = await service.totals.recount(dry_run=dry_run)
        assert [(each.metric, each.label, each.count, str(each.amount)) for each in told] == lacking
    many = [service.totals.recount() for _ in range(5)]
    going_on = [charged(service, order_id) for order_id in range(10, 20)]
    found = (await asyncio.gather(asyncio.gather(*many), asyncio.gather(*going_on)))[0]
    assert found == [[]] * 5
    totals = await service.totals.read()
    assert (totals.payments, totals.errors, totals.completed["INR"].count) == (13, 1, 11)


async def test_the_command_recounts(command_line: CommandLine, service: PaymentService, books: Books) -> None:
    await charged(service, 1)
    assert (await command_line.run("recount")).stdout == "the totals are what the books tell\n"
    await books.rows("DELETE FROM total_changes WHERE metric = 'completed'")
    dry = await command_line.run("recount", "--dry-run")
    assert (dry.exit_code, "+100.00" in dry.stdout, "nothing was changed" in dry.stdout) == (0, True, True)
    put_right = await command_line.run("recount", "--json")
    correction = {"metric": "completed", "label": "INR", "count": 1, "amount": 100.0}
    assert put_right.json == {"corrected": True, "corrections": [correction]}
    await assert_true(service, books)
