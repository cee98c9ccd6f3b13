"""The scripted demonstrations, run as a user runs them: against a real server, and `eci-pay demo` by itself."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from tests.support import COMMAND, Books, CommandLine

SAMPLES = Path(__file__).parent.parent / "sample_requests"
DEMOS = sorted(file.name for file in SAMPLES.glob("*.sh") if file.name not in ("lib.sh", "through_server.sh"))
TIMEOUT_SECONDS = 90


async def run_script(command_line: CommandLine, *arguments: str) -> tuple[int, str]:
    environment = command_line.full_environment()
    environment["PATH"] = f"{COMMAND.parent}:{environment['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *arguments, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(TIMEOUT_SECONDS):
        printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def test_every_scripted_demo_passes_against_a_real_server(command_line: CommandLine, books: Books) -> None:
    exit_code, printed = await run_script(command_line, str(SAMPLES / "through_server.sh"), *DEMOS)
    assert exit_code == 0, printed
    assert "FAIL" not in printed
    assert len(re.findall(r"^PASS$", printed, re.MULTILINE)) == len(DEMOS)
    assert await books.value("SELECT count(*) FROM payments") == len(DEMOS)


async def test_a_demo_fails_where_the_server_does_not_answer(command_line: CommandLine) -> None:
    nowhere = CommandLine({"ECI_PAY_URL": "http://127.0.0.1:9"}, command_line.directory)
    exit_code, printed = await run_script(nowhere, str(SAMPLES / "charge_payment_idempotent.sh"))
    assert exit_code == 1
    assert "FAIL" in printed.splitlines()[-1]


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.json")), ids=lambda file: file.name)
def test_every_sample_is_json_that_says_what_its_request_needs(sample: Path) -> None:
    assert isinstance(json.loads(sample.read_text()), dict)


async def test_the_charge_sample_is_charged_from_the_terminal(command_line: CommandLine) -> None:
    result = await command_line.run("charge", str(SAMPLES / "charge_payment.json"), "--json")
    assert result.exit_code == 0, result.stderr
    assert (result.json["status"], result.json["amount"]) == ("COMPLETED", 1499.0)


async def test_the_batch_samples_are_charged_and_refunded_from_the_terminal(command_line: CommandLine) -> None:
    for kind, sample, total in (("charge", "charge_batch.jsonl", 2148.5), ("refund", "refund_batch.csv", 1148.5)):
        batch = ("--batch", str(SAMPLES / sample), "--results", f"{kind}.csv", "--yes", "--json")
        result = await command_line.run(kind, *batch)
        assert result.exit_code == 0, result.stderr
        assert result.json["outcomes"] == [{"outcome": "done", "currency": "INR", "count": 2, "sum": total}]


async def test_the_demo_proves_its_claims_and_leaves_nothing_behind(
    owner_command_line: CommandLine, books: Books
) -> None:
    result = await owner_command_line.run("demo")
    assert result.exit_code == 0, result.stderr
    assert "13 of 13 claims proved" in result.stdout
    assert "NOT SO" not in result.stdout
    assert await books.value("SELECT count(*) FROM payments") == 0
    assert await books.value("SELECT count(*) FROM pg_database WHERE datname LIKE 'eci_pay_demo_%%'") == 0


async def test_sample_data_has_every_status_and_method_and_books_that_agree(
    owner_command_line: CommandLine, books: Books
) -> None:
    result = await owner_command_line.run("migrate", "--with-sample-data", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json["sample_payments"] == await books.value("SELECT count(*) FROM payments")
    assert await books.value("SELECT count(DISTINCT status) FROM payments") == 6
    assert await books.value("SELECT count(DISTINCT payment_method) FROM payments") == 6
    latest = """
        SELECT count(*) FROM payments p WHERE status <> (
            SELECT t.status FROM transactions t
            WHERE t.payment_id = p.payment_id AND transaction_type = 'PAYMENT'
            ORDER BY transaction_log_id DESC LIMIT 1)
    """
    assert await books.value(latest) == 0
    refunded = """
        SELECT count(*) FROM payments p WHERE refunded_amount <> (
            SELECT coalesce(sum(CASE status WHEN 'PROCESSING' THEN amount WHEN 'FAILED' THEN -amount ELSE 0 END), 0)
            FROM transactions t WHERE t.payment_id = p.payment_id AND transaction_type = 'REFUND')
    """
    assert await books.value(refunded) == 0
    again = await owner_command_line.run("migrate", "--with-sample-data")
    assert again.exit_code == 3
    assert "empty database" in again.stderr
