"""The command line, run as its users run it: processes, their output, their exit codes."""

import asyncio
import json
import os
import pty
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.support import COMMAND, Books, CommandLine, CommandResult, ManualClock, charge_fields

DECLINED, INVALID, CONFLICT, NOT_FOUND, UNAVAILABLE, UNKNOWN = 1, 2, 3, 4, 5, 6
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(\d+;)*(3[0-7]|9[0-7])(;\d+)*m")
REASON = ("--reason", "Damaged in transit")
KEY = re.compile(r"^Idempotency-Key: (\S+)$", re.MULTILINE)


@pytest.fixture
def clock() -> ManualClock:
    """Where a test mixes processes and the server: both live today."""
    clock = ManualClock()
    clock.now = datetime.now(UTC)
    return clock


@pytest.fixture
def closed_port_url() -> Iterator[str]:
    """A database that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening
        yield f"postgresql://nobody:s3cret@127.0.0.1:{bound.getsockname()[1]}/none"


def charge_options(order_id: int = 1, amount: str = "100.00", method: str = "CREDIT_CARD") -> tuple[str, ...]:
    """A charge by options."""
    return ("charge", f"--order-id={order_id}", "--user-id=7", f"--amount={amount}", f"--method={method}")


def elsewhere(command_line: CommandLine, **environment: str) -> CommandLine:
    """The same command line in another environment."""
    return replace(command_line, environment={**command_line.environment, **environment})


def safe_command(result: CommandResult) -> list[str]:
    """The arguments of the command that is told to be safe to run again."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("safe to run again: ")]
    program, *arguments = shlex.split(line.removeprefix("safe to run again: "))
    assert program == "eci-pay"
    return arguments


def assert_no_traceback(result: CommandResult) -> None:
    """Whatever went wrong, the person at the terminal is spoken to in words."""
    assert "Traceback" not in result.stderr + result.stdout
    assert ESCAPE not in result.stderr + result.stdout


async def at_terminal(command_line: CommandLine, *arguments: str, typed: str = "") -> tuple[int, str]:
    """Runs a command at a terminal of its own; returns its exit code and what the terminal showed."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", **command_line.full_environment()}
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, cwd=command_line.directory, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    shown = asyncio.create_task(asyncio.to_thread(_read_to_end, ours))
    async with asyncio.timeout(60):
        exit_code = await process.wait()
        return exit_code, (await shown).decode()


def _read_to_end(terminal: int) -> bytes:
    """What a terminal shows, until nobody writes to it any more."""
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # Linux's way to say that the other side is closed
        pass
    finally:
        os.close(terminal)
    return shown


async def test_a_charge_from_a_file_prints_the_payment_on_stdout_and_its_key_on_stderr(
    command_line: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "a charge.json"
    file.write_text(json.dumps({**charge_fields(41), "amount": 1499.5, "reference": "Order 41"}))
    result = await command_line.run("charge", str(file), "--json")
    assert result.exit_code == 0
    payment = result.json
    assert (payment["order_id"], payment["amount"], payment["status"]) == (41, 1499.5, "COMPLETED")
    assert [row["status"] for row in payment["transactions"]] == ["PROCESSING", "COMPLETED"]
    assert KEY.fullmatch(result.stderr.strip())
    shown = await command_line.run("show", str(payment["payment_id"]))
    assert shown.exit_code == 0
    for text in ("COMPLETED", "1,499.50 INR", "CREDIT_CARD", "Order 41", payment["transaction_id"], "Charge begun"):
        assert text in shown.stdout
    assert shown.stderr == ""
    assert_no_traceback(shown)


async def test_a_charge_is_read_from_standard_input_and_from_options(command_line: CommandLine) -> None:
    piped = await command_line.run("charge", "-", "--json", stdin=json.dumps(charge_fields(1)))
    given = await command_line.run(
        *charge_options(2, "12.345", "UPI"), "--currency=usd", "--reference=R-2", "--idempotency-key=mine", "--json"
    )
    assert (piped.exit_code, piped.json["order_id"]) == (0, 1)
    assert given.exit_code == 0
    expected = {"order_id": 2, "user_id": 7, "amount": 12.34, "currency": "USD", "reference": "R-2"}
    assert {name: given.json[name] for name in expected} == expected
    assert given.stderr == ""  # the key is the caller's own
    again = await command_line.run(*charge_options(2, "12.34", "UPI"), "--currency=USD", "--reference=R-2",
                                   '--idempotency-key="mine"', "--json")  # fmt: skip
    assert (again.exit_code, again.json) == (0, given.json)
    assert "first answer again" in again.stderr


async def test_a_payment_is_refunded_in_part_and_whole_and_shown_by_each_of_its_names(
    command_line: CommandLine,
) -> None:
    payment = (await command_line.run(*charge_options(8), "--json")).json
    number = str(payment["payment_id"])
    partly = await command_line.run("refund", number, *REASON, "--amount=30.25", "--yes", "--json")
    assert (partly.exit_code, partly.json["status"], partly.json["refunded_amount"]) == (0, "COMPLETED", 30.25)
    assert KEY.search(partly.stderr)
    whole = await command_line.run("refund", number, *REASON, "--yes")
    assert whole.exit_code == 0
    for text in ("REFUNDED", "100.00 INR", "30.25", "69.75", "Damaged in transit"):
        assert text in whole.stdout
    by_id, by_order, by_transaction = await asyncio.gather(
        command_line.run("show", number, "--json"),
        command_line.run("show", "--order=8", "--json"),
        command_line.run("show", "--transaction", payment["transaction_id"], "--json"),
    )
    assert by_id.json == by_order.json == by_transaction.json
    assert [refund["amount"] for refund in by_id.json["refunds"]] == [30.25, 69.75]
    assert len(by_id.json["transactions"]) == 7


async def test_payments_are_listed_by_filter_and_page(command_line: CommandLine) -> None:
    for options in (charge_options(1), charge_options(2, method="COD"), charge_options(3, "4000.02")):
        await command_line.run(*options)

    async def orders(*filters: str) -> list[int]:
        page = (await command_line.run("list", "--json", *filters)).json
        return [payment["order_id"] for payment in page["payments"]]

    found = await asyncio.gather(
        orders(),
        orders("--status=failed"),
        orders("--method=COD", "--user=7"),
        orders("--from=2020-01-01", "--to=2020-01-02"),
        orders("--page=2", "--page-size=2"),
    )
    assert list(found) == [[3, 2, 1], [3], [2], [], [1]]
    page = await command_line.run("list", "--page-size=2")
    assert "4,000.02 INR" in page.stdout
    assert "2 of 3 payments" in page.stderr
    cursor = re.search(r"--cursor (\d+)", page.stderr)
    assert cursor is not None
    assert await orders("--cursor", cursor[1]) == [1]


async def test_a_pending_payment_is_cancelled_once(command_line: CommandLine) -> None:
    payment_id = (await command_line.run(*charge_options(method="COD"), "--json")).json["payment_id"]
    cancelled = await command_line.run("cancel", str(payment_id), "--json")
    assert (cancelled.exit_code, cancelled.json["status"]) == (0, "CANCELLED")
    again = await command_line.run("cancel", str(payment_id))
    assert (again.exit_code, again.stdout) == (CONFLICT, "")
    assert "CANCELLED" in again.stderr
    assert "[invalid-state]" in again.stderr


async def test_a_decline_exits_1_and_offers_no_command_to_repeat(command_line: CommandLine) -> None:
    declined = await command_line.run(*charge_options(amount="4000.03"))
    assert (declined.exit_code, declined.stdout) == (DECLINED, "")
    assert "insufficient_funds" in declined.stderr
    assert "safe to run again" not in declined.stderr
    as_json = await command_line.run(*charge_options(2, "4000.02"), "--json")
    assert as_json.exit_code == DECLINED
    assert (as_json.json["code"], as_json.json["decline_code"]) == ("payment-declined", "card_declined")
    await command_line.run(*charge_options(3, "4000.02", "UPI"))
    refund = await command_line.run("refund", "3", *REASON, "--yes")
    assert (refund.exit_code, refund.stdout) == (DECLINED, "")
    assert "The gateway declined the refund" in refund.stderr


async def test_what_is_invalid_exits_2_and_is_named(command_line: CommandLine, tmp_path: Path, books: Books) -> None:
    (tmp_path / "broken.json").write_text('{"order_id": 1,')
    cases: dict[tuple[str, ...], str] = {
        ("charge",): "--order-id",
        ("charge", "absent.json"): "absent.json",
        ("charge", "."): ".",
        ("charge", "broken.json"): "[malformed-json]",
        ("charge", "broken.json", "--order-id=1"): "FILE",
        charge_options(0): "order_id",
        charge_options(amount="1e2"): "amount",
        charge_options(method="CASH"): "payment_method",
        (*charge_options(), "--idempotency-key="): "[idempotency-key-missing]",
        (*charge_options(), "--idempotency-key=ü"): "[idempotency-key-invalid]",
        ("refund", "x", *REASON, "--yes"): "payment_id",
        ("refund", "1", "--reason= abc ", "--yes"): "reason",
        ("refund", "1", "--yes"): "--reason",
        ("show",): "--order",
        ("show", "1", "--order=1"): "--order",
        ("list", "--page=0"): "page",
        ("list", "--from=yesterday"): "created_from",
        ("list", "--page=1", "--cursor=1"): "cursor",
        ("migrate", "--status", "--dry-run"): "--dry-run",
        ("no-such-command",): "no-such-command",
        ("list", "--no-such-option"): "--no-such-option",
    }
    for arguments, word in cases.items():
        result = await command_line.run(*arguments)
        assert (result.exit_code, result.stdout) == (INVALID, ""), arguments
        assert word in result.stderr, arguments
        assert_no_traceback(result)
    as_json = await command_line.run("list", "--page=0", "--page-size=0", "--json")
    assert {error["field"] for error in json.loads(as_json.stderr)["errors"]} == {"page", "page_size"}
    assert await books.value("SELECT count(*) FROM payments") == 0


async def test_a_key_used_for_another_charge_exits_2(command_line: CommandLine) -> None:
    await command_line.run(*charge_options(1), "--idempotency-key=k")
    reused = await command_line.run(*charge_options(2), "--idempotency-key=k")
    assert (reused.exit_code, reused.stdout) == (INVALID, "")
    assert "[idempotency-key-reused]" in reused.stderr


async def test_a_conflict_exits_3_and_an_unknown_payment_4(command_line: CommandLine) -> None:
    await command_line.run(*charge_options(1))
    paid_twice = await command_line.run(*charge_options(1), "--json")
    assert (paid_twice.exit_code, paid_twice.stdout) == (CONFLICT, "")
    problem = json.loads(next(line for line in paid_twice.stderr.splitlines() if line.startswith("{")))
    assert (problem["code"], problem["payment_id"]) == ("order-already-paid", 1)
    too_much = await command_line.run("refund", "1", *REASON, "--amount=100.01", "--yes")
    assert too_much.exit_code == CONFLICT
    assert "100.00 INR" in too_much.stderr
    for arguments in (
        ("show", "99"),
        ("show", "--order=99"),
        ("show", "--transaction=TXN"),
        ("cancel", "99"),
        ("refund", "99999999999999999999", *REASON, "--yes"),
    ):
        result = await command_line.run(*arguments)
        assert (result.exit_code, result.stdout) == (NOT_FOUND, ""), arguments
        assert "[payment-not-found]" in result.stderr
        assert_no_traceback(result)


async def test_without_a_database_every_command_exits_5_and_the_charge_can_be_run_again_as_told(
    command_line: CommandLine, closed_port_url: str, books: Books
) -> None:
    away = elsewhere(command_line, DATABASE_URL=closed_port_url)
    for arguments in (("show", "1"), ("list", "--json"), ("expire-keys",), ("migrate",), ("migrate", "--status")):
        result = await away.run(*arguments)
        assert (result.exit_code, result.stdout) == (UNAVAILABLE, ""), arguments
        assert "unavailable" in result.stderr
        assert "s3cret" not in result.stderr
        assert_no_traceback(result)
    failed = await away.run(*charge_options(), "--reference=It's 5 o'clock; $HOME", "--json")
    assert (failed.exit_code, failed.stdout) == (UNAVAILABLE, "")
    key = KEY.search(failed.stderr)
    assert key is not None
    assert failed.stderr.index(key[0]) < failed.stderr.index("unavailable")
    first, second = [await command_line.run(*safe_command(failed)) for _ in range(2)]
    assert (first.exit_code, second.exit_code, second.json) == (0, 0, first.json)
    assert first.json["reference"] == "It's 5 o'clock; $HOME"
    assert await books.rows("SELECT idempotency_key FROM idempotency_keys") == [{"idempotency_key": key[1]}]


async def test_an_unknown_outcome_exits_6_and_the_told_command_asks_without_charging_again(
    command_line: CommandLine, books: Books
) -> None:
    unknown = await command_line.run(*charge_options(amount="4000.08"), "--json")
    assert (unknown.exit_code, unknown.json["status"]) == (UNKNOWN, "PROCESSING")
    assert "not known" in unknown.stderr
    again = await command_line.run(*safe_command(unknown))
    assert (again.exit_code, again.json) == (UNKNOWN, unknown.json)
    assert await books.value("SELECT max(attempt) FROM payments") == 1
    await command_line.run(*charge_options(2, "5000"))
    refund = await command_line.run("refund", "2", *REASON, "--amount=4000.09", "--yes", "--json")
    repeated = await command_line.run(*safe_command(refund))
    assert (refund.exit_code, repeated.exit_code) == (UNKNOWN, UNKNOWN)
    assert await books.value("SELECT count(*) FROM refunds") == 1


async def test_a_refund_without_a_terminal_needs_yes_and_says_so(command_line: CommandLine, books: Books) -> None:
    await command_line.run(*charge_options())
    refused = await command_line.run("refund", "1", *REASON, stdin="y\n")
    assert (refused.exit_code, refused.stdout) == (INVALID, "")
    assert "--yes" in refused.stderr
    assert_no_traceback(refused)
    assert await books.value("SELECT count(*) FROM refunds") == 0


async def test_a_refund_at_a_terminal_asks_first(command_line: CommandLine, books: Books) -> None:
    await command_line.run(*charge_options())
    for answer in ("n\n", "\n", "\x04"):
        exit_code, shown = await at_terminal(command_line, "refund", "1", *REASON, typed=answer)
        assert exit_code != 0
        assert "Refund all that is left of payment 1?" in shown
        assert "Traceback" not in shown
        assert await books.value("SELECT count(*) FROM refunds") == 0
    exit_code, shown = await at_terminal(command_line, "refund", "1", *REASON, "--amount=10", typed="y\n")
    assert exit_code == 0
    assert "Refund 10.00 of payment 1?" in shown
    assert await books.value("SELECT refunded_amount FROM payments") == 10


async def test_colours_are_for_terminals_alone_and_not_even_there_with_no_color(command_line: CommandLine) -> None:
    await command_line.run(*charge_options())
    _, coloured = await at_terminal(command_line, "show", "1")
    assert COLOUR.search(coloured)
    _, plain = await at_terminal(elsewhere(command_line, NO_COLOR="1"), "show", "1")
    assert "COMPLETED" in plain
    assert not COLOUR.search(plain)
    for arguments in (("show", "1"), ("list",), ("migrate", "--status"), ("--help",), ("list", "--help")):
        piped = await elsewhere(command_line, TERM="xterm-256color").run(*arguments)
        assert piped.exit_code == 0
        assert ESCAPE not in piped.stdout + piped.stderr, arguments


async def test_texts_from_outside_are_shown_as_they_are(command_line: CommandLine) -> None:
    reference, reason = "[red]R[/red] [/] \\[x]", "[bold]broken [/] [/bold]"
    charged = await command_line.run(*charge_options(), "--reference", reference)
    refunded = await command_line.run("refund", "1", "--reason", reason, "--yes")
    shown = await command_line.run("show", "1")
    for result in (charged, refunded, shown):
        assert_no_traceback(result)
        assert result.exit_code == 0
    assert reference in shown.stdout
    assert shown.stdout.count(reason) == 2  # the refund, and the audit row that tells of it
    as_json = (await command_line.run("show", "1", "--json")).json
    assert (as_json["reference"], as_json["refunds"][0]["reason"]) == (reference, reason)


async def test_texts_from_outside_give_the_terminal_no_orders(command_line: CommandLine) -> None:
    orders = f"{ESCAPE}[2J{ESCAPE}]0;title\a{ESCAPE}[31m\x9b31m\r"
    charged = await command_line.run(*charge_options(), "--reference", f"R{orders}X")
    refunded = await command_line.run("refund", "1", "--reason", f"Broken{orders}X", "--yes")
    as_json = await command_line.run("show", "1", "--json")
    for result in (charged, refunded):
        assert result.exit_code == 0
        for character in (ESCAPE, "\a", "\x9b", "\r"):
            assert character not in result.stdout
    assert ESCAPE not in as_json.stdout
    assert as_json.json["reference"] == f"R{orders}X"


async def test_migrations_are_shown_printed_and_applied_once(
    command_line: CommandLine, empty_database_url: str
) -> None:
    empty = elsewhere(command_line, DATABASE_URL=empty_database_url)
    before = (await empty.run("migrate", "--status", "--json")).json
    assert before
    assert all(state["applied_at"] is None and state["fault"] is None for state in before)
    too_early = await empty.run("list")
    assert (too_early.exit_code, too_early.stdout) == (UNAVAILABLE, "")
    assert "eci-pay migrate" in too_early.stderr
    dry = await empty.run("migrate", "--dry-run")
    assert "CREATE TABLE payments" in dry.stdout
    assert f"{len(before)} migrations would be applied" in dry.stderr
    assert [file["name"] for file in (await empty.run("migrate", "--dry-run", "--json")).json] == [
        state["name"] for state in before
    ]
    applied = await empty.run("migrate", "--json")
    assert applied.json["applied"] == [state["name"] for state in before]
    again = await empty.run("migrate")
    assert again.exit_code == 0
    assert f"the schema is at version {before[-1]['version']}" in again.stdout
    after = (await empty.run("migrate", "--status", "--json")).json
    assert all(datetime.fromisoformat(state["applied_at"]).tzinfo for state in after)
    table = await empty.run("migrate", "--status")
    assert all(state["name"] in table.stdout for state in before)
    assert "pending" not in table.stdout


async def test_a_migration_that_was_changed_exits_3_and_is_named(command_line: CommandLine, books: Books) -> None:
    await books.rows("UPDATE schema_migrations SET checksum = 'other' WHERE version = 2")
    for arguments in (("migrate",), ("migrate", "--status"), ("migrate", "--dry-run")):
        result = await command_line.run(*arguments)
        assert result.exit_code == CONFLICT
        assert "0002_audit_trail.sql" in result.stderr
        assert_no_traceback(result)


async def test_expired_keys_are_counted_and_then_deleted(command_line: CommandLine, books: Books) -> None:
    for order_id in (1, 2):
        await command_line.run(*charge_options(order_id))
    await command_line.run(*charge_options(3, "4000.08"))
    await books.rows("UPDATE idempotency_keys SET expires_at = now() - interval '1 s' WHERE payment_id <> 2")
    dry = await command_line.run("expire-keys", "--dry-run", "--json")
    assert (dry.exit_code, dry.json) == (0, {"expired": 1})  # the unfinished key never expires
    assert (await command_line.run("expire-keys", "--dry-run")).stdout == "1 keys would be deleted\n"
    deleted = await command_line.run("expire-keys", "--json")
    assert (deleted.exit_code, deleted.json) == (0, {"deleted": 1})
    left = await books.rows("SELECT payment_id FROM idempotency_keys ORDER BY payment_id")
    assert [row["payment_id"] for row in left] == [2, 3]
    assert (await command_line.run("expire-keys")).stdout == "deleted 0 expired keys\n"


async def test_wrong_settings_exit_2_with_a_line_per_fault_and_no_secret(command_line: CommandLine) -> None:
    wrong = elsewhere(
        command_line,
        DATABASE_URL="postgresql://me:s3cret@host/name?no-such-option=1",
        LOG_LEVEL="LOUD",
        ECI_PAY_DATABASE_POOL_SIZE="many",
        ECI_PAY_SIMULATED_SLOW_SECONDS="-1",
    )
    for arguments in (("list",), charge_options(), ("serve", "--port=0"), ("migrate",), ("expire-keys",)):
        result = await wrong.run(*arguments)
        assert (result.exit_code, result.stdout) == (INVALID, ""), arguments
        for name in ("DATABASE_URL", "LOG_LEVEL", "ECI_PAY_DATABASE_POOL_SIZE", "ECI_PAY_SIMULATED_SLOW_SECONDS"):
            assert len([line for line in result.stderr.splitlines() if f"{name}: " in line]) == 1, (arguments, name)
        assert "s3cret" not in result.stderr
        assert_no_traceback(result)


async def test_every_command_has_help_with_an_example(command_line: CommandLine) -> None:
    overview = await command_line.run("--help")
    commands = re.findall(r"^  ([a-z][a-z-]*)  ", overview.stdout, re.MULTILINE)
    assert {"serve", "relay", "outbox", "peers", "migrate", "charge", "refund", "show", "list"} <= set(commands)
    assert {"cancel", "expire-keys", "demo"} <= set(commands)
    for group in ("outbox", "settlement"):
        within = await command_line.run(group, "--help")
        commands += [f"{group} {name}" for name in re.findall(r"^  ([a-z]+)  ", within.stdout, re.MULTILINE)]
    assert {"outbox purge", "settlement export"} <= set(commands)
    for command in commands:
        result = await command_line.run(*command.split(), "--help")
        assert (result.exit_code, result.stderr) == (0, "")
        example = re.search(rf"Example: eci-pay {command}\b", re.sub(r"\s+", " ", result.stdout))
        assert example, command
    for text in ("Exit codes", "6 outcome unknown"):
        assert text in re.sub(r"\s+", " ", overview.stdout)
    nothing = await command_line.run()
    assert nothing.exit_code == INVALID
    assert "Usage: eci-pay" in nothing.stdout + nothing.stderr


async def test_a_key_used_over_http_is_replayed_at_the_terminal(
    api: httpx.AsyncClient, command_line: CommandLine
) -> None:
    charged = await api.post("/v1/payments/charge", json=charge_fields(1), headers={"Idempotency-Key": "shared"})
    replay = await command_line.run(*charge_options(1), "--idempotency-key=shared", "--json")
    assert (replay.exit_code, replay.json) == (0, charged.json())
    assert "first answer again" in replay.stderr
    declined = await api.post(
        "/v1/payments/charge", json=charge_fields(2, amount="4000.02"), headers={"Idempotency-Key": "declined"}
    )
    replay = await command_line.run(*charge_options(2, "4000.02"), "--idempotency-key=declined", "--json")
    assert (replay.exit_code, replay.json) == (DECLINED, declined.json())


async def test_a_key_used_at_the_terminal_is_replayed_over_http(
    api: httpx.AsyncClient, command_line: CommandLine
) -> None:
    charged = await command_line.run(*charge_options(1), "--json")
    key = KEY.search(charged.stderr)
    assert key is not None
    replay = await api.post("/v1/payments/charge", json=charge_fields(1), headers={"Idempotency-Key": key[1]})
    assert (replay.status_code, replay.json()) == (201, charged.json)
    assert replay.headers["Idempotent-Replayed"] == "true"
    refunded = await command_line.run("refund", "1", *REASON, "--amount=1", "--yes", "--idempotency-key=r", "--json")
    replay = await api.post(
        "/v1/payments/1/refund", json={"reason": REASON[1], "amount": 1}, headers={"Idempotency-Key": "r"}
    )
    assert (replay.status_code, replay.json()) == (200, refunded.json)
    assert replay.headers["Idempotent-Replayed"] == "true"
