"""`refund --batch` and `charge --batch`, run as their users run them: processes, their files, their ends."""

import csv
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cli.bulk import exit_code
from cli.bulk_results import COLUMNS, results_of, results_path
from cli.failures import exit_code_of
from eci_pay.bulk_runs import CONCURRENCY_MAX, End, Outcome
from eci_pay.errors import InvalidRequest, OutputLost
from eci_pay.service import PaymentService
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    CommandLine,
    CommandResult,
    ManualClock,
    charge_fields,
    until,
)
from tests.test_bulk import REASON, charges, outcomes, refunds, run
from tests.test_cli import assert_no_traceback, at_terminal, elsewhere, safe_command
from tests.test_cli_output import NEEDS_FULL, full_disk, run_into

NOT_ALL, INVALID, TOO_LATE, UNAVAILABLE, OUTPUT_LOST, INTERRUPTED = 1, 2, 3, 5, 74, 130
ROWS = 80


@pytest.fixture
def clock() -> ManualClock:
    """The services of the test and the processes live on the same day."""
    clock = ManualClock()
    clock.now = datetime.now(UTC)
    return clock


@pytest.fixture
def slow(command_line: CommandLine) -> CommandLine:
    """The installed command with a gateway that takes its time, and recovery that looks soon."""
    return elsewhere(command_line, ECI_PAY_SIMULATED_LATENCY_SECONDS="0.05", ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS="0.1")


async def charged(service: PaymentService, number: int, amount: str = "100.00") -> None:
    """So many orders, from 1 on, that are paid."""
    fields = [charge_fields(order_id, amount=amount, payment_method="UPI") for order_id in range(1, number + 1)]
    assert set(outcomes(await run(service, charges(*fields)))) == {"done"}


def write_refunds(directory: Path, amounts: Sequence[str], name: str = "refunds.csv") -> Path:
    """A file of a refund of each amount, by order, from 1 on."""
    file = directory / name
    rows = [f"{order_id},{amount},{REASON}\n" for order_id, amount in enumerate(amounts, start=1)]
    file.write_text("".join(["order_id,amount,reason\n", *rows]))
    return file


def read_results(file: Path) -> list[dict[str, str]]:
    """The rows of a file of results."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


async def refund_count(books: Books) -> int:
    """How many refunds have begun, whatever became of them."""
    count: int = await books.value("SELECT count(*) FROM refunds")
    return count


async def test_a_batch_is_refunded_told_in_the_results_and_replayed(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 4, "9000.00")
    file = write_refunds(tmp_path, ["10", "4000.02", "4000.08", ""])
    dry = await command_line.run("refund", "--batch", "refunds.csv", "--dry-run", "--json")
    assert (dry.exit_code, await refund_count(books)) == (0, 0)
    assert (dry.json["rows"], dry.json["begun_before"]) == (4, 0)
    assert dry.json["to_do"] == [{"currency": "INR", "count": 4, "sum": 17_010.1}]
    assert (
        "Refund 4 payments, 17,010.10 INR"
        in (await command_line.run("refund", "--batch", str(file), "--dry-run")).stdout
    )
    assert not (tmp_path / "refunds.csv.results.csv").exists()

    done = await command_line.run("refund", "--batch", "refunds.csv", "--yes", "--json")
    assert done.exit_code == NOT_ALL
    assert_no_traceback(done)
    assert safe_command(done) == ["refund", "--batch", "refunds.csv", "--yes", "--json"]
    assert done.json["outcomes"] == [
        {"outcome": "done", "currency": "INR", "count": 2, "sum": 9010.0},
        {"outcome": "declined", "currency": "INR", "count": 1, "sum": 4000.02},
        {"outcome": "unknown", "currency": "INR", "count": 1, "sum": 4000.08},
    ]
    assert done.json.keys() == {"kind", "file", "file_hash", "first_run_at", "end", "rows", "outcomes", "results_file"}
    assert (done.json["kind"], done.json["end"], done.json["rows"]) == ("refund", "complete", 4)
    results = read_results(tmp_path / done.json["results_file"])
    assert [(row["line"], row["order_id"], row["amount"], row["outcome"]) for row in results] == [
        ("2", "1", "10.00", "done"),
        ("3", "2", "4000.02", "declined"),
        ("4", "3", "4000.08", "unknown"),
        ("5", "4", "9000.00", "done"),
    ]
    booked = await books.rows("SELECT refund_id, idempotency_key FROM idempotency_keys JOIN refunds USING (refund_id)")
    assert {row["idempotency_key"]: row["refund_id"] for row in results} == {
        row["idempotency_key"]: str(row["refund_id"]) for row in booked
    }
    assert "card_declined" in results[1]["detail"]

    again = await command_line.run("refund", "--batch", "refunds.csv", "--yes", "--results=other.csv")
    assert again.exit_code == NOT_ALL
    assert "replayed" in again.stdout
    assert "9,010.00" in again.stdout
    assert [row["outcome"] for row in read_results(tmp_path / "other.csv")][0::3] == ["replayed", "replayed"]
    assert await refund_count(books) == 4


async def test_a_batch_of_charges_is_read_from_standard_input(command_line: CommandLine, tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(charge_fields(order_id))}\n" for order_id in (1, 2, 3))
    where = ("charge", "--batch", "-", "--results", "told.csv", "--yes", "--json")
    done = await command_line.run(*where, stdin=lines)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.json["outcomes"] == [{"outcome": "done", "currency": "INR", "count": 3, "sum": 300.0}]
    results = read_results(tmp_path / "told.csv")
    assert [(row["line"], row["order_id"], row["outcome"]) for row in results] == [
        (str(number), str(number), "done") for number in (1, 2, 3)
    ]
    assert all(row["transaction_id"].startswith("TXN") and row["payment_id"] for row in results)
    again = await command_line.run(*where, stdin=lines)
    assert (again.exit_code, again.json["outcomes"][0]["outcome"]) == (0, "replayed")


async def test_bad_files_and_usage_exit_2_and_nothing_is_done(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 2)
    good = write_refunds(tmp_path, ["10", "10"])
    write_refunds(tmp_path, ["10", "1O"], "bad.csv")
    write_refunds(tmp_path, ["100.01", "10"], "much.csv")
    cases: dict[tuple[str, ...], str] = {
        ("refund", "--batch", "bad.csv", "--yes"): "bad.csv: line 3, column amount: must be a number",
        (
            "refund",
            "--batch",
            "much.csv",
            "--yes",
        ): "much.csv: line 2, column amount: 100.00 INR of the payment are left",
        ("refund", "--batch", "absent.csv", "--yes"): "absent.csv: No such file",
        ("refund", "--batch", "refunds.csv"): "add --yes to refund them",
        ("refund", "1", "--batch", "refunds.csv", "--yes"): "--batch excludes PAYMENT_ID",
        (
            "refund",
            "--batch",
            "refunds.csv",
            "--reason=Damaged",
            "--yes",
        ): "--batch excludes PAYMENT_ID, --amount, --reason",
        ("charge", "--batch", "refunds.csv", "--order-id=1"): "--batch excludes FILE",
        ("refund", "1", "--reason=Damaged", "--yes", "--dry-run"): "want --batch",
        ("charge", "--order-id=9", "--results=x"): "want --batch",
        ("refund", "--yes"): "give a PAYMENT_ID and --reason, or --batch",
        ("refund", "--batch", "-", "--yes"): "--results",
        ("refund", "--batch", "refunds.csv", "--results=refunds.csv", "--yes"): "would replace the batch itself",
        ("refund", "--batch", "refunds.csv", f"--concurrency={CONCURRENCY_MAX + 1}", "--yes"): "--concurrency",
    }
    before = good.read_bytes()
    for arguments, words in cases.items():
        result = await command_line.run(*arguments)
        assert (result.exit_code, result.stdout) == (INVALID, ""), arguments
        assert words in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert_no_traceback(result)
    as_json = await command_line.run("refund", "--batch", "bad.csv", "--yes", "--json")
    assert json.loads(as_json.stderr)["errors"][0]["line"] == 3
    assert await refund_count(books) == 0
    assert await books.value("SELECT count(*) FROM bulk_runs WHERE kind = 'refund'") == 0
    assert good.read_bytes() == before


async def test_a_batch_at_a_terminal_is_asked_for_with_its_count_and_sums(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    fields = [charge_fields(1, amount="45300.00"), charge_fields(2), charge_fields(3, amount="12", currency="USD")]
    await run(service, charges(*fields))
    write_refunds(tmp_path, ["", "20.00", ""])
    exit_code, shown = await at_terminal(command_line, "refund", "--batch", "refunds.csv", typed="n\n")
    assert (exit_code, await refund_count(books)) == (INVALID, 0)
    assert "Refund 3 payments, 45,320.00 INR and 12.00 USD?" in shown
    exit_code, shown = await at_terminal(command_line, "refund", "--batch", "refunds.csv", typed="y\n")
    assert (exit_code, await refund_count(books)) == (0, 3)
    assert "refunds.csv.results.csv" in shown


async def test_a_file_that_was_run_too_long_ago_exits_3_and_its_results_stay(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 1)
    write_refunds(tmp_path, ["10"])
    command = ("refund", "--batch", "refunds.csv", "--yes")
    assert (await command_line.run(*command)).exit_code == 0
    results = (tmp_path / "refunds.csv.results.csv").read_bytes()
    await books.rows("UPDATE bulk_runs SET started_at = started_at - interval '22 hours'")
    late = await command_line.run(*command)
    assert (late.exit_code, late.stdout) == (TOO_LATE, "")
    assert "[file-run-too-long-ago]" in late.stderr
    assert "results file" in late.stderr
    assert (tmp_path / "refunds.csv.results.csv").read_bytes() == results
    assert await refund_count(books) == 1


async def test_without_a_database_a_batch_exits_5_and_tells_the_command_that_is_safe(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 1)
    write_refunds(tmp_path, ["10"])
    nowhere = elsewhere(command_line, DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
    failed = await nowhere.run("refund", "--batch", "refunds.csv", "--yes")
    assert (failed.exit_code, failed.stdout) == (UNAVAILABLE, "")
    assert_no_traceback(failed)
    assert (await command_line.run(*safe_command(failed))).exit_code == 0
    assert await refund_count(books) == 1


async def test_a_batch_that_is_killed_leaves_what_it_knows_and_run_again_refunds_each_row_once(
    slow: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, ROWS)
    write_refunds(tmp_path, ["10.00"] * ROWS)
    command = ("refund", "--batch", "refunds.csv", "--yes", "--concurrency=8", "--json")
    killed = await slow.start(*command)
    await until(lambda: begun(books, ROWS // 3))
    killed.kill()
    await killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    booked = await books.rows("SELECT idempotency_key AS key FROM idempotency_keys WHERE refund_id IS NOT NULL")
    assert ROWS // 3 <= len(booked) < ROWS, "it was not killed in the middle"
    journal = read_results(tmp_path / "refunds.csv.results.csv")
    assert {row["key"] for row in booked} <= {row["idempotency_key"] for row in journal}
    assert {"begun", "done"} == {row["outcome"] for row in journal}
    last = {row["line"]: row["outcome"] for row in journal}
    assert "begun" in last.values(), "nothing was under way: nothing was tried out"

    again = await slow.run(*command)
    assert again.exit_code == 0, again.stderr
    ends = {each["outcome"]: each["count"] for each in again.json["outcomes"]}
    assert ends.keys() == {"done", "replayed"}
    assert len(booked) <= ends["replayed"] <= len(journal)
    results = read_results(tmp_path / "refunds.csv.results.csv")
    assert [row["line"] for row in results] == [str(line) for line in range(2, ROWS + 2)]
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
    whole = "SELECT payment_id FROM refunds WHERE status = 'COMPLETED' GROUP BY payment_id HAVING sum(amount) = 10"
    assert len(await books.rows(whole)) == await refund_count(books) == ROWS


async def test_a_rerun_keeps_what_earlier_runs_have_begun_in_its_results_from_its_start(
    service: PaymentService, tmp_path: Path
) -> None:
    await charged(service, 3)
    file = refunds(*(f",{order_id},10,{REASON}" for order_id in (1, 2, 3)))
    first = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    await first(concurrency=1, on_row=lambda result: first.stop() if result.task.line == 3 else None)
    again = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    with results_of(file, tmp_path / "results.csv") as results:
        results.begin(await again.begun_before())
        kept = read_results(results.path)  # as a kill would leave it
    assert [(row["line"], row["outcome"], row["detail"]) for row in kept] == [
        ("2", "begun", "by an earlier run"),
        ("3", "begun", "by an earlier run"),
    ]


async def test_of_two_runs_with_the_same_results_the_second_keeps_what_the_first_has_told(
    service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 3)
    file = refunds(*(f",{order_id},10,{REASON}" for order_id in (1, 2, 3)))
    path = tmp_path / "results.csv"
    plan = await service.bulk.plan(file)  # and while somebody thinks about it,
    first = await service.bulk.begin(await service.bulk.plan(file), operator="other")
    with results_of(file, path) as results:
        results.begin(await first.begun_before())
        results.complete(await first(concurrency=1, on_row=results.add))
    told = read_results(path)
    assert [row["outcome"] for row in told] == ["done"] * 3
    second = await service.bulk.begin(plan, operator="me")
    with results_of(file, path) as results:
        results.begin(await second.begun_before())  # and then it is killed
    assert read_results(path) == told
    with results_of(file, tmp_path / "others.csv") as results:
        results.begin(await second.begun_before())
    assert [row["outcome"] for row in read_results(tmp_path / "others.csv")] == ["begun"] * 3


async def test_a_line_of_the_journal_that_a_power_failure_has_cut_off_is_left_out(
    service: PaymentService, tmp_path: Path
) -> None:
    await charged(service, 2)
    file = refunds(f",1,10,{REASON}", f",2,10,{REASON}")
    path = tmp_path / "results.csv"
    begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    with results_of(file, path) as results:
        results.begin(await begun.begun_before())
        await begun(concurrency=1, on_row=results.add)
    path.write_bytes(path.read_bytes()[:-90])
    with results_of(file, path) as results:
        results.begin(await begun.begun_before())
    assert [(row["line"], row["outcome"]) for row in read_results(path)] == [
        ("2", "begun"),
        ("2", "done"),
        ("3", "begun"),
        ("3", "begun"),
    ]


def test_results_have_one_writer_at_a_time_and_leave_no_trace(tmp_path: Path) -> None:
    file, path = refunds(f",1,10,{REASON}"), tmp_path / "results.csv"
    with (
        results_of(file, path),
        pytest.raises(InvalidRequest, match="another run is writing it"),
        results_of(file, path),
    ):
        pass
    with results_of(file, path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_results_replace_nothing_but_the_same_files_results(tmp_path: Path) -> None:
    file, other = refunds(f",1,10,{REASON}"), refunds(f",1,11,{REASON}")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("line,payment_id\n")
    (tmp_path / "image.png").write_bytes(bytes(range(256)))
    key = other.key(2)
    (tmp_path / "other.csv").write_text(f"{','.join(COLUMNS)}\n2,1,1,11,INR,refused,,,,{key}\n")
    (tmp_path / "mine.csv").write_text(f"{','.join(COLUMNS)}\n2,1,1,10,INR,refused,,,,{file.key(2)}\n")
    cases = {
        "pipe": "is no file",
        "/dev/null": "is no file",
        "-": "wants a file",
        "notes.txt": "holds no results",
        "image.png": "holds no results",
        "other.csv": "holds the results of another file",
        "nowhere/new.csv": "cannot be written",
        "n" * 250: "name too long",
    }
    before = {path.name for path in tmp_path.iterdir()}
    for name, words in cases.items():
        given = name if name in ("-", "/dev/null") else str(tmp_path / name)
        with pytest.raises(InvalidRequest, match=words), results_of(file, results_path("batch.csv", given)):
            pass
    (tmp_path / "link.csv").symlink_to("mine.csv")
    with results_of(file, results_path("batch.csv", str(tmp_path / "link.csv"))) as results:
        results.begin([])
    assert (tmp_path / "link.csv").is_symlink()
    assert [row["outcome"] for row in read_results(tmp_path / "mine.csv")] == ["refused"]
    assert {path.name for path in tmp_path.iterdir()} == before | {"link.csv"}


async def test_a_disk_that_is_full_loses_no_line_of_the_journal_and_is_told(
    service: PaymentService, tmp_path: Path
) -> None:
    await charged(service, 2)
    file = refunds(f",1,10,{REASON}", f",2,10,{REASON}")
    begun = await service.bulk.begin(await service.bulk.plan(file), operator="me")
    path = tmp_path / "results.csv"
    with results_of(file, path) as results:
        results.begin(await begun.begun_before())
        report = await begun(concurrency=1, on_row=results.add)
        with no_space():
            with pytest.raises(OutputLost, match=r"results\.csv: File too large; rows were begun"):
                results.add(report.results[0])
            with pytest.raises(OutputLost, match="rows were begun") as caught:
                results.complete(report)
    assert exit_code_of(caught.value) == OUTPUT_LOST
    assert [row["outcome"] for row in read_results(path)] == ["begun", "done"] * 2
    assert os.listdir(tmp_path) == ["results.csv"]
    new = tmp_path / "new.csv"
    with no_space(), pytest.raises(InvalidRequest, match="cannot be written"), results_of(file, new):
        pass


@contextmanager
def no_space() -> Iterator[None]:
    """No file grows any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_runs_exit_code_tells_why_it_ended(service: PaymentService) -> None:
    await charged(service, 1)
    report = await run(service, refunds(f",1,10,{REASON}"))
    for end, outcome, code in [
        (End.COMPLETE, Outcome.DONE, 0),
        (End.COMPLETE, Outcome.REPLAYED, 0),
        (End.COMPLETE, Outcome.DECLINED, NOT_ALL),
        (End.COMPLETE, Outcome.UNKNOWN, NOT_ALL),
        (End.COMPLETE, Outcome.NOT_TRIED, NOT_ALL),
        (End.COMPLETE, Outcome.UNAVAILABLE, UNAVAILABLE),
        (End.UNAVAILABLE, Outcome.UNKNOWN, UNAVAILABLE),
        (End.TOO_LATE, Outcome.DONE, TOO_LATE),
        (End.INTERRUPTED, Outcome.NOT_TRIED, INTERRUPTED),
    ]:
        ended = replace(report, end=end, results=[replace(report.results[0], outcome=outcome)])
        assert exit_code(ended) == code, (end, outcome)


@NEEDS_FULL
async def test_output_that_is_lost_does_not_hide_what_came_of_the_rows(
    command_line: CommandLine, service: PaymentService, tmp_path: Path
) -> None:
    await charged(service, 1, "9000.00")
    write_refunds(tmp_path, ["4000.02"])
    with full_disk() as full:
        lost = await run_into(command_line, full, "refund", "--batch", "refunds.csv", "--yes")
    assert lost.exit_code == NOT_ALL
    assert "the output could not be written" in lost.stderr
    assert [row["outcome"] for row in read_results(tmp_path / "refunds.csv.results.csv")] == ["declined"]


async def test_a_name_that_is_not_utf_8_is_shown_and_recorded_as_far_as_it_can_be(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 1)
    name = os.fsdecode(b"r\xe9fund.csv")
    write_refunds(tmp_path, ["10"], name)
    done = await command_line.run("refund", "--batch", name, "--yes", "--json")
    assert (done.exit_code, done.json["file"]) == (0, "r\ufffdfund.csv")
    assert await books.value("SELECT file_name FROM bulk_runs WHERE kind = 'refund'") == "r\ufffdfund.csv"
    assert len(read_results(tmp_path / f"{name}.results.csv")) == 1


async def test_a_machine_whose_clock_is_off_runs_no_batch(
    command_line: CommandLine, service: PaymentService, books: Books, tmp_path: Path
) -> None:
    await charged(service, 1)
    write_refunds(tmp_path, ["10"])
    await books.rows(
        "CREATE FUNCTION now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT pg_catalog.now() + interval '1 hour' $$"
    )
    where = f"{command_line.environment['DATABASE_URL']} options='-c search_path=public,pg_catalog'"
    off = await elsewhere(command_line, DATABASE_URL=where).run("refund", "--batch", "refunds.csv", "--yes")
    assert (off.exit_code, await refund_count(books)) == (UNAVAILABLE, 0)
    assert "clock is more than 15 minutes off" in off.stderr
    assert os.listdir(tmp_path) == ["refunds.csv"]


async def begun(books: Books, number: int) -> bool:
    """Whether so many refunds have."""
    return await refund_count(books) >= number


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_batch_ends_what_has_begun_and_goes_on_when_it_is_run_again(
    slow: CommandLine, service: PaymentService, books: Books, tmp_path: Path, how: signal.Signals
) -> None:
    await charged(service, ROWS)
    write_refunds(tmp_path, ["10.00"] * ROWS)
    interrupted = await slow.start("refund", "--batch", "refunds.csv", "--yes", "--concurrency=8")
    await until(lambda: begun(books, 10))
    interrupted.send_signal(how)
    stdout, stderr = await interrupted.communicate()
    result = CommandResult(interrupted.returncode or 0, stdout.decode(), stderr.decode())
    assert result.exit_code == INTERRUPTED
    assert_no_traceback(result)
    assert await books.value("SELECT sum(refund_pending) FROM payments") == 0
    ends = Counter(row["outcome"] for row in read_results(tmp_path / "refunds.csv.results.csv"))
    assert ends == {"done": await refund_count(books), "not-tried": ROWS - await refund_count(books)}
    assert ends["not-tried"] > 0
    rest = await slow.run(*safe_command(result))
    assert (rest.exit_code, await refund_count(books)) == (0, ROWS)
    assert await books.rows(FAULTS_IN_BOOKS, 1) == []
