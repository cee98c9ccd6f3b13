"""What the command line does where its output cannot be written: a charge that was made is never called declined."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support import COMMAND, COMMAND_TIMEOUT_SECONDS, Books, CommandLine, CommandResult

UNAVAILABLE, UNKNOWN, OUTPUT_LOST = 5, 6, 74
FULL = Path("/dev/full")
CHARGE = ("charge", "--order-id=1", "--user-id=7", "--method=CREDIT_CARD", "--idempotency-key=k")
FORMATS = pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
NEEDS_FULL = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def charge(amount: str = "100.00") -> tuple[str, ...]:
    """A charge by options, under the key `k`."""
    return (*CHARGE, f"--amount={amount}")


async def run_into(command_line: CommandLine, stdout: int, *arguments: str) -> CommandResult:
    """Runs a command with its output sent elsewhere."""
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *arguments,
        cwd=command_line.directory,
        env=command_line.full_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
        _, stderr = await process.communicate()
    assert process.returncode is not None
    return CommandResult(process.returncode, "", stderr.decode())


@contextmanager
def abandoned_pipe() -> Iterator[int]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    """A file that takes nothing."""
    descriptor = os.open(FULL, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def assert_charged_once(books: Books, command_line: CommandLine) -> None:
    """The books tell of one charge, and the same command tells of it again."""
    rows = await books.rows("SELECT order_id, status, attempt, captured_at IS NOT NULL AS captured FROM payments")
    assert rows == [{"order_id": 1, "status": "COMPLETED", "attempt": 1, "captured": True}]
    assert await books.audit_trail(1) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    replay = await command_line.run(*charge(), "--json")
    assert (replay.exit_code, replay.json["status"]) == (0, "COMPLETED")
    assert "first answer again" in replay.stderr


def assert_no_traceback(result: CommandResult) -> None:
    """Whatever went wrong, the person at the terminal is spoken to in words."""
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@FORMATS
async def test_a_reader_that_has_gone_ends_a_completed_charge_by_sigpipe_and_not_as_a_decline(
    command_line: CommandLine, books: Books, form: tuple[str, ...]
) -> None:
    with abandoned_pipe() as stdout:
        result = await run_into(command_line, stdout, *charge(), *form)
    assert result.exit_code in (-signal.SIGPIPE, OUTPUT_LOST)
    assert_no_traceback(result)
    await assert_charged_once(books, command_line)


async def test_a_reader_that_goes_after_one_byte_sees_a_completed_charge_not_as_a_decline(
    command_line: CommandLine, books: Books
) -> None:
    reader, writer = os.pipe()
    running = asyncio.create_task(run_into(command_line, writer, *charge()))
    first = await asyncio.to_thread(os.read, reader, 1)
    os.close(reader)
    result = await running
    os.close(writer)
    assert len(first) == 1
    assert result.exit_code in (0, -signal.SIGPIPE, OUTPUT_LOST)
    assert_no_traceback(result)
    await assert_charged_once(books, command_line)


@NEEDS_FULL
@FORMATS
async def test_a_completed_charge_that_cannot_be_printed_exits_74_and_says_why(
    command_line: CommandLine, books: Books, form: tuple[str, ...]
) -> None:
    with full_disk() as stdout:
        result = await run_into(command_line, stdout, *charge(), *form)
    assert result.exit_code == OUTPUT_LOST
    assert "No space left on device" in result.stderr
    assert_no_traceback(result)
    await assert_charged_once(books, command_line)


@NEEDS_FULL
@FORMATS
async def test_an_unknown_outcome_that_cannot_be_printed_is_no_decline(
    command_line: CommandLine, books: Books, form: tuple[str, ...]
) -> None:
    with full_disk() as stdout:
        result = await run_into(command_line, stdout, *charge("4000.08"), *form)
    assert result.exit_code in (UNKNOWN, OUTPUT_LOST)
    assert_no_traceback(result)
    assert await books.value("SELECT status FROM payments") == "PROCESSING"


@NEEDS_FULL
@FORMATS
async def test_what_is_only_read_and_cannot_be_printed_exits_74(
    command_line: CommandLine, form: tuple[str, ...]
) -> None:
    assert (await command_line.run(*charge())).exit_code == 0
    for command in (("show", "1"), ("list",), ("refund", "1", "--reason=Damaged in transit", "--yes")):
        with full_disk() as stdout:
            result = await run_into(command_line, stdout, *command, *form)
        assert result.exit_code == OUTPUT_LOST, command
        assert_no_traceback(result)
    shown = await command_line.run("show", "1", "--json")
    assert (shown.json["status"], len(shown.json["refunds"])) == ("REFUNDED", 1)


@FORMATS
async def test_a_reference_that_the_output_cannot_spell_is_escaped(
    command_line: CommandLine, books: Books, form: tuple[str, ...]
) -> None:
    ascii_only = replace(command_line, environment={**command_line.environment, "PYTHONIOENCODING": "ascii"})
    result = await ascii_only.run(*charge(), "--reference=Café Ω", *form)
    assert result.exit_code == 0
    assert result.stdout.isascii()
    if form:
        assert result.json["reference"] == "Café Ω"
    else:
        assert r"Caf\xe9 \u03a9" in result.stdout
    assert_no_traceback(result)
    assert await books.rows("SELECT reference, status FROM payments") == [
        {"reference": "Café Ω", "status": "COMPLETED"}
    ]


@FORMATS
@pytest.mark.parametrize(("redirection", "exit_code"), [(">&-", OUTPUT_LOST), ("2>&-", 0), ("2>/dev/full", 0)])
async def test_a_stream_that_is_closed_or_full_is_not_mistaken_for_a_decline(
    command_line: CommandLine, books: Books, redirection: str, exit_code: int, form: tuple[str, ...]
) -> None:
    script = f'"$0" "$@" {redirection}'
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        script,
        COMMAND,
        *charge(),
        *form,
        cwd=command_line.directory,
        env=command_line.full_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
        stdout, stderr = await process.communicate()
    assert process.returncode == exit_code, stderr
    assert b"Traceback" not in stderr
    assert b"error" not in stdout
    assert await books.value("SELECT status FROM payments") == "COMPLETED"


@pytest.fixture
async def nobody(books: Books, database_url: str) -> AsyncIterator[str]:
    """The name of a role that may log in, and nothing else."""
    name = f"eci_pay_nobody_{os.getpid()}"
    role = sql.Identifier(name).as_string()
    try:
        await books.rows(f"CREATE ROLE {role} LOGIN PASSWORD 'nobody'")
    except psycopg.errors.InsufficientPrivilege as error:
        pytest.skip(f"the server lets nobody make a role: {error}")
    try:
        try:
            async with await psycopg.AsyncConnection.connect(_url_of(name, database_url)):
                pass
        except psycopg.OperationalError as error:
            pytest.skip(f"the server does not let a new role in: {error}")
        yield name
    finally:
        await books.rows(f"DROP OWNED BY {role}")
        await books.rows(f"DROP ROLE {role}")


def _url_of(role: str, database_url: str) -> str:
    return make_conninfo(database_url, user=role, password="nobody")


@pytest.mark.parametrize("granted", ["nothing", "schema_migrations", "reads"])
async def test_a_role_without_privileges_is_told_so_in_a_line(
    command_line: CommandLine, nobody: str, books: Books, *, database_url: str, granted: str
) -> None:
    if granted != "nothing":
        tables = "ALL TABLES IN SCHEMA public" if granted == "reads" else granted
        await books.rows(f"GRANT SELECT ON {tables} TO {nobody}")
    as_nobody = replace(
        command_line, environment={**command_line.environment, "DATABASE_URL": _url_of(nobody, database_url)}
    )
    reading = [("list",), ("show", "1"), ("expire-keys", "--dry-run")] if granted != "reads" else []
    for command in (charge(), *reading, ("cancel", "1")):
        result = await as_nobody.run(*command)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("safe to run again: ")]
        assert (result.exit_code, result.stdout, len(lines)) == (UNAVAILABLE, "", 1), (command, result)
        assert lines[0].startswith("error: ")
        assert "permission denied" in lines[0]
        assert_no_traceback(result)
    assert await books.value("SELECT count(*) FROM payments") == 0
