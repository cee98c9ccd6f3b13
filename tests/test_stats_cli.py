"""`eci-pay stats` as operators run it: what became of the payments of late, and what is left to do."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cli.stats import ASCII_BLOCKS, BLOCKS, CHART_HEIGHT, chart
from eci_pay.service import PaymentService
from eci_pay.stats import BARS_MAX
from tests.peers import Peers
from tests.rows import paid
from tests.support import Books, CommandLine, ManualClock, charge_request, refund_request
from tests.test_cli import assert_no_traceback, elsewhere

INVALID, UNAVAILABLE = 2, 5


@pytest.fixture
def clock() -> ManualClock:
    """Commands live today, and what the service books does too."""
    clock = ManualClock()
    clock.now = datetime.now(UTC) - timedelta(minutes=10)
    return clock


@pytest.fixture
def operator(command_line: CommandLine, peers: Peers) -> CommandLine:
    """The command line where all three peers are configured."""
    return replace(command_line, environment={**command_line.environment, **peers.environment()})


async def trade(service: PaymentService, clock: ManualClock) -> None:
    """An old payment, and of today: two completed, one of them refunded in part, a decline, an unknown outcome."""
    clock.advance(days=-3)
    await paid(service, 1, amount="1000.00")
    clock.advance(days=3)
    [refunded, _] = await paid(service, 2, 3, amount="250.50")
    await service.refunds.refund(payment_id=refunded, request=refund_request("50.00"))
    for order_id, amount in ((4, "4000.02"), (5, "4000.08")):
        request = charge_request(order_id, amount=amount, currency="USD")
        await service.charges.charge(request=request, idempotency_key=f"pay {order_id}")


async def test_payments_attempts_money_and_backlog_of_the_last_day_are_summed_up(
    operator: CommandLine, telling: PaymentService, clock: ManualClock, books: Books
) -> None:
    await trade(telling, clock)
    first_to_order = "SELECT min(message_id) FROM outbox WHERE destination = 'order'"
    await books.rows(f"UPDATE outbox SET dead_at = now() WHERE message_id = ({first_to_order})")
    result = await operator.run("stats", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    stats = result.json
    assert stats["payments"] == 4
    assert {status: count for status, count in stats["by_status"].items() if count} == {
        "COMPLETED": 2,
        "FAILED": 1,
        "PROCESSING": 1,
    }
    assert stats["by_method"]["UPI"]["COMPLETED"] == 2
    assert stats["by_method"]["CREDIT_CARD"]["FAILED"] == 1
    assert (len(stats["by_method"]), {len(each) for each in stats["by_method"].values()}) == (6, {6})
    assert stats["attempts"] == {"completed": 2, "failed": 1, "success_rate": pytest.approx(2 / 3)}
    assert stats["money"] == [
        {"currency": "INR", "charges": 2, "charged": 501.0, "refunds": 1, "refunded": 50.0},
        {"currency": "USD", "charges": 0, "charged": 0.0, "refunds": 0, "refunded": 0.0},
    ]
    assert stats["step_seconds"] == 1800
    assert sum(bar["count"] for bar in stats["bars"]) == 4
    assert [(each["destination"], each["dead"]) for each in stats["backlog"]["messages"]] == [
        ("order", 1),
        ("inventory", 0),
        ("notification", 0),
    ]
    assert stats["backlog"]["messages"][2]["pending"] == 5
    assert stats["backlog"]["outcomes"] | {"oldest_seconds": 0} == {
        "open": 1,
        "late": 0,
        "overdue": 0,
        "oldest_seconds": 0,
    }
    assert 500 < stats["backlog"]["outcomes"]["oldest_seconds"] < 900


async def test_a_longer_time_and_a_date_reach_the_payments_of_before(
    operator: CommandLine, telling: PaymentService, clock: ManualClock
) -> None:
    await trade(telling, clock)
    for since in (
        "7d",
        f"{clock.now - timedelta(days=6):%Y-%m-%d}",
        f"{clock.now - timedelta(days=6):%Y-%m-%dT%H:%MZ}",
    ):
        assert (await operator.run("stats", "--since", since, "--json")).json["payments"] == 5, since


async def test_the_table_tells_since_when_and_draws_the_charges(
    operator: CommandLine, telling: PaymentService, clock: ManualClock
) -> None:
    await trade(telling, clock)
    result = await operator.run("stats")
    assert result.exit_code == 0
    assert result.stdout.startswith("4 payments created since ")
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["UPI", "0", "2", "0", "2"] in words
    assert ["INR", "2", "501.00", "1", "50.00"] in words
    assert "succeeded: 66.7% (2 of 3 attempts that ended)" in result.stdout
    assert "payments per 30 minutes, from " in result.stdout
    assert "█" in result.stdout
    assert "without an outcome: 1, to be put right by hand: 0, of both overdue: 0, the oldest for 10m" in result.stdout
    assert_no_traceback(result)
    ascii_only = await elsewhere(operator, PYTHONIOENCODING="ascii").run("stats")
    assert ascii_only.stdout.isascii()
    assert "\\u" not in ascii_only.stdout


async def test_payments_by_a_clock_that_is_ahead_are_in_the_last_bar(
    operator: CommandLine, telling: PaymentService, clock: ManualClock
) -> None:
    clock.now = datetime.now(UTC) + timedelta(minutes=10)
    await paid(telling, 1, 2)
    assert (await operator.run("stats", "--since=2m", "--json")).json["bars"][-1]["count"] == 2
    assert "succeeded: 100.0% (2 of 2 attempts that ended)" in (await operator.run("stats", "--since=2m")).stdout


async def test_no_payments_are_no_picture_and_no_rate(command_line: CommandLine) -> None:
    result = await command_line.run("stats", "--since=90s")
    assert (result.exit_code, result.stdout.splitlines()[0][:26]) == (0, "0 payments created since 2")
    assert "%" not in result.stdout
    assert (await command_line.run("stats", "--json")).json["attempts"]["success_rate"] is None


@pytest.mark.parametrize(
    "since", ["yesterday", "24", "999999999w", "2026-13-01", "2026-11-01T10:00", "2199-01-01", "1066-10-14"]
)
async def test_a_time_that_is_none_or_to_come_is_refused(command_line: CommandLine, since: str) -> None:
    result = await command_line.run("stats", f"--since={since}")
    assert (result.exit_code, result.stdout) == (INVALID, "")
    assert result.stderr.startswith("error: ")


async def test_more_than_can_be_read_in_time_ends_with_a_hint(command_line: CommandLine, books: Books) -> None:
    await books.rows(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id)"
        " SELECT n, 7, 1, 'UPI', 'TXN' || n FROM generate_series(1, 20000) n"
    )
    result = await elsewhere(command_line, ECI_PAY_STATEMENT_TIMEOUT_SECONDS="0.004").run("stats")
    assert (result.exit_code, result.stdout) == (UNAVAILABLE, "")
    assert "statement timeout" in result.stderr
    assert "a shorter time has fewer payments to read" in result.stderr


@pytest.mark.parametrize(
    ("hours", "step_seconds"),
    [(0.5, 60), (2, 120), (24, 1800), (168, 10800), (24 * 60, 86_400), (24 * 9000, 364 * 86_400)],
)
async def test_the_steps_are_as_short_as_sixty_bars_allow(
    service: PaymentService, clock: ManualClock, hours: float, step_seconds: int
) -> None:
    view = await service.stats.since(clock.now - timedelta(hours=hours))
    assert view.step_seconds == step_seconds
    assert len(view.bars) <= BARS_MAX + 1
    assert view.bars[0].begins_at <= view.since < view.bars[1].begins_at
    assert view.bars[-1].begins_at <= view.until < view.bars[-1].begins_at + timedelta(seconds=step_seconds)


def test_bars_are_as_high_as_their_counts_and_never_vanish() -> None:
    lines = list(chart([0, 1, 500, 1000] * 15, BLOCKS))
    assert len(lines) == CHART_HEIGHT
    assert lines[0] == "1,000 |" + "   █" * 15 + "|"
    assert lines[2] == "      |" + "   █" * 15 + "|"
    assert lines[3] == "      |" + "  ██" * 15 + "|"
    assert lines[-1] == "    0 |" + " ▁██" * 15 + "|"
    assert list(chart([1, 2], ASCII_BLOCKS))[-1] == "0 |########|"
