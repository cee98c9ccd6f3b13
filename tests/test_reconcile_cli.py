"""`eci-pay reconcile` as operators run it, at a terminal and from cron."""

import csv
import io
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from eci_pay.service import PaymentService
from tests.rows import paid
from tests.settlements import csv_text, line, true_lines
from tests.support import Books, CommandLine, ManualClock, charge_request
from tests.test_cli import assert_no_traceback, at_terminal, elsewhere

CLEAN, DIFFERENCES, INVALID, NOT_FOUND, UNAVAILABLE = 0, 1, 2, 4, 5
NOT_OVER = "warning: the period is not over: reconcile its whole file when it is\n"


@pytest.fixture(autouse=True)
def _now(clock: ManualClock) -> None:
    """The clock of the service shows the time of the commands."""
    clock.now = datetime.now(UTC)


def files_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


async def test_books_without_a_fault_are_clean(service: PaymentService, command_line: CommandLine) -> None:
    await paid(service, 1)
    result = await command_line.run("reconcile")
    assert (result.exit_code, result.stderr) == (CLEAN, "")
    assert result.stdout.endswith("clean: no differences\n")


async def test_a_file_is_compared_and_every_difference_explained(
    service: PaymentService, books: Books, command_line: CommandLine, tmp_path: Path
) -> None:
    await paid(service, 1, 2)
    lines = await true_lines(books)
    file = tmp_path / "settlement.csv"
    file.write_text(csv_text(lines))
    result = await command_line.run("reconcile", "settlement.csv")
    assert (result.exit_code, result.stderr) == (CLEAN, NOT_OVER)
    lines[0]["amount"] = "120.00"
    lines.append(line("TXNUNKNOWN", "=HYPERLINK()", settled_at=lines[0]["settled_at"]))
    file.write_text(csv_text(lines))
    result = await command_line.run("reconcile", "settlement.csv", "--csv", "all.csv", "--report", "all.html")
    assert result.exit_code == DIFFERENCES
    assert result.stdout.endswith("2 differences, 0 faults of our books\n")
    assert "Amount over: The gateway took more than we booked: return the difference at the gateway." in result.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [(row["line"], row["class"], row["gateway_amount"], row["our_amount"]) for row in rows] == [
        ("4", "missing_in_our_books", "100.00", ""),
        ("2", "amount_over", "120.00", "100.00"),
    ]
    assert rows[0]["gateway_reference"] == "'=HYPERLINK()"
    assert rows[1]["advice"].startswith("The gateway took more than we booked")
    page = (tmp_path / "all.html").read_text()
    assert "TXNUNKNOWN" in page
    assert files_in(tmp_path) == {"all.csv", "all.html", "settlement.csv"}


async def test_json_is_complete_and_standard_input_is_a_file_like_any_other(
    service: PaymentService, books: Books, command_line: CommandLine
) -> None:
    await paid(service, 1)
    lines = await true_lines(books)
    lines[0]["currency"] = "USD"
    result = await command_line.run("reconcile", "-", "--json", stdin=csv_text(lines))
    assert (result.exit_code, result.stderr) == (DIFFERENCES, NOT_OVER)
    document = result.json
    assert (document["clean"], document["difference_count"], document["fault_count"]) == (False, 1, 0)
    assert [(s["class"], s["currency"], s["count"], s["gateway_net"], s["our_net"]) for s in document["sums"]] == [
        ("currency_differs", "INR", 0, 0.0, 100.0),
        ("currency_differs", "USD", 1, 100.0, 0.0),
    ]
    [difference] = document["differences"]
    assert (difference["line"], difference["class"], difference["gateway_amount"]) == (2, "currency_differs", 100.0)
    [run] = (await command_line.run("reconcile", "history", "--json")).json
    assert (run["run_id"], run["file_name"], run["lines"], run["differences"]) == (document["run_id"], "-", 1, 1)
    assert run["file_hash"] == document["file_hash"]
    table = await command_line.run("reconcile", "history")
    assert (table.exit_code, table.stderr) == (CLEAN, "1 run\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "bad.csv: is empty"),
        (b"\x1f\x8b\x08\x00", "bad.csv: is compressed (gzip): unpack it first"),
        (b"a;b;c\n1;2;3\n", "columns are separated by commas"),
        (b"gateway_reference,transaction_id,type,amount,currency,fee,status\n", "the header lacks settled_at"),
        (
            b"gateway_reference,transaction_id,type,amount,currency,fee,status,settled_at\n"
            b'A,TXN1,charge,"1,234.50",INR,,settled,2026-11-01T00:00:00Z\n',
            "bad.csv: line 2, column amount",
        ),
        (
            b"gateway_reference,transaction_id,type,amount,currency,fee,status,settled_at\n"
            b"A,TXN1,charge,100.00,INR,,settled,2026-11-01T00:00:00Z\nA,TXN2,charge,100.00,IN",
            "bad.csv: line 3: has 5 fields",
        ),
        (
            b"gateway_reference,transaction_id,type,amount,currency,fee,status,settled_at\n"
            b"A\xff,TXN1,charge,100.00,INR,,settled,2026-11-01T00:00:00Z\n",
            "bad.csv: line 2",
        ),
    ],
)
async def test_a_bad_file_is_refused_with_its_place_and_nothing_is_written(
    books: Books, command_line: CommandLine, tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    (tmp_path / "all.csv").write_text("of yesterday")
    result = await command_line.run("reconcile", "bad.csv", "--csv", "all.csv", "--report", "all.html")
    assert (result.exit_code, result.stdout) == (INVALID, "")
    assert complaint in result.stderr
    assert_no_traceback(result)
    assert await books.value("SELECT count(*) FROM reconciliation_runs") == 0
    assert (tmp_path / "all.csv").read_text() == "of yesterday"
    assert files_in(tmp_path) == {"bad.csv", "all.csv"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--from", "yesterday"], "--from: must be an ISO 8601 date or instant"),
        (["--from", "2026-11-02", "--to", "2026-11-01"], "the period ends before it begins"),
        (["--dry-run"], "--dry-run and --yes go with --fix"),
        (["--fix"], "there is no terminal to ask at: add --yes to repair"),
        (["--csv", "-"], "--report and --csv write files"),
        (["--report", "missing/folder.html"], "missing/folder.html: cannot be written"),
        (["--format", "xlsx"], "xlsx"),
        (["history", "--limit", "0"], "--limit"),
        (["settlement.csv", "--csv", "settlement.csv"], "settlement.csv: is the settlement file itself"),
        (["close", "many"], "payment_id: must be a whole number"),
    ],
)
async def test_wrong_usage_is_refused(
    command_line: CommandLine, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "settlement.csv").write_text(csv_text([]))
    result = await command_line.run("reconcile", *arguments)
    assert (result.exit_code, result.stdout) == (INVALID, "")
    assert complaint in result.stderr
    assert_no_traceback(result)


async def test_what_was_left_open_is_closed_by_hand(
    service: PaymentService, books: Books, command_line: CommandLine, tmp_path: Path
) -> None:
    [payment_id] = await paid(service, 1)
    (tmp_path / "settlement.csv").write_text(csv_text([{**(await true_lines(books))[0], "status": "pending"}]))
    assert (await command_line.run("reconcile", "settlement.csv")).exit_code == CLEAN
    closed = await command_line.run("reconcile", "close", str(payment_id))
    assert (closed.exit_code, closed.stderr) == (0, f"closed 1 open operation of payment {payment_id}\n")
    again = await command_line.run("reconcile", "close", str(payment_id))
    assert (again.exit_code, again.stdout) == (NOT_FOUND, "")


async def test_a_file_whose_name_is_no_text_is_read_all_the_same(
    command_line: CommandLine, tmp_path: Path, books: Books
) -> None:
    name = os.fsdecode(b"\xff.csv")
    (tmp_path / name).write_text(csv_text([]))
    result = await command_line.run("reconcile", name, "--from", "2026-11-01", "--to", "2026-11-02")
    assert result.exit_code == CLEAN
    assert await books.value("SELECT file_name FROM reconciliation_runs") == "\N{REPLACEMENT CHARACTER}.csv"


async def test_a_database_that_is_away_is_unavailable(command_line: CommandLine) -> None:
    result = await elsewhere(command_line, DATABASE_URL="postgresql://127.0.0.1:1/nothing").run("reconcile")
    assert result.exit_code == UNAVAILABLE
    assert_no_traceback(result)


async def unknown_outcome(service: PaymentService, clock: ManualClock) -> None:
    """A charge whose outcome only the gateway knows, for a minute."""
    clock.advance(seconds=-60)
    request = charge_request(1, amount="4000.08")
    answer = await service.charges.charge(request=request, idempotency_key="unknown")
    assert answer.is_unknown


async def test_a_repair_is_shown_first_and_made_with_yes(
    service: PaymentService, books: Books, command_line: CommandLine, clock: ManualClock
) -> None:
    await unknown_outcome(service, clock)
    plan = await command_line.run("reconcile", "--fix", "--dry-run")
    assert plan.exit_code == DIFFERENCES
    assert "  book payment 1 as approved\n" in plan.stderr
    assert plan.stderr.count("nothing was repaired") == 1
    assert await books.value("SELECT status FROM payments") == "PROCESSING"
    made = await command_line.run("reconcile", "--fix", "--yes", "--json")
    assert made.exit_code == CLEAN
    assert (made.json["clean"], made.json["repaired"]) == (True, 1)
    assert made.json["repairs"] == [{"repair": "book payment 1 as approved", "findings": 1, "repaired": 1, "left": ""}]
    assert await books.value("SELECT status FROM payments") == "COMPLETED"
    trail = await books.rows("SELECT description FROM transactions ORDER BY transaction_log_id DESC LIMIT 1")
    assert "(reconciliation 2 of " in trail[0]["description"]
    assert (await command_line.run("reconcile")).exit_code == CLEAN


@pytest.mark.parametrize("reply", ["n", "y"])
async def test_at_a_terminal_the_operator_is_asked(
    service: PaymentService, books: Books, command_line: CommandLine, clock: ManualClock, reply: str
) -> None:
    await unknown_outcome(service, clock)
    exit_code, shown = await at_terminal(command_line, "reconcile", "--fix", typed=f"{reply}\n")
    assert "book payment 1 as approved" in shown
    assert "Make 1 repair? [y/N]" in shown
    booked = await books.value("SELECT status FROM payments")
    assert (exit_code, booked) == ((DIFFERENCES, "PROCESSING") if reply == "n" else (CLEAN, "COMPLETED"))
