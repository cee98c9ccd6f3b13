"""The embedded PostgreSQL: shared by processes, stopped after the last, and unharmed by the death of any of them."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from eci_pay.embedded import CLUSTER
from tests.support import CommandLine, until
from tests.test_serving import SLOW_AMOUNT, all_ended, begun_over_http, charge, serving

CHARGE = ("charge", "--user-id", "7", "--amount", "100.00", "--method", "UPI", "--json")
REFUND = ("--amount", "10.00", "--reason", "Damaged in transit", "--yes", "--json")


@contextmanager
def new_data_dir() -> Iterator[Path]:
    """A data directory with a path short enough for a socket; its server is gone in the end, and so is it."""
    directory = Path(tempfile.mkdtemp(prefix="eci-", dir=tempfile.gettempdir())).resolve()
    try:
        yield directory
    finally:
        for server in servers(directory):
            for process in (server, *server.children()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """The data directory of the test's own embedded server."""
    with new_data_dir() as directory:
        yield directory


@pytest.fixture
def embedded(data_dir: Path, tmp_path: Path) -> CommandLine:
    """The installed command on an embedded server of its own."""
    return command_line_on(data_dir, tmp_path)


def command_line_on(data_dir: Path, tmp_path: Path) -> CommandLine:
    """The installed command on the embedded server of a directory."""
    return CommandLine({"ECI_PAY_DATA_DIR": str(data_dir), "ECI_PAY_SIMULATED_SLOW_SECONDS": "1.5"}, tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A data directory with one payment in its books, and the payment's id; its server is stopped."""
    with new_data_dir() as directory:
        yield directory, asyncio.run(charged(command_line_on(directory, tmp_path_factory.mktemp("made")), 1))


@pytest.fixture
def paid(made: tuple[Path, int], data_dir: Path) -> int:
    """A payment in the test's own books, which are a copy, for making new ones takes seconds."""
    directory, payment_id = made
    subprocess.run(["cp", "-a", f"{directory}/.", data_dir], check=True)
    return payment_id


async def charged(embedded: CommandLine, order_id: int) -> int:
    """Charges an order; returns its payment's id."""
    result = await embedded.run(*CHARGE, "--order-id", str(order_id))
    assert result.exit_code == 0, result.stderr
    payment_id: int = result.json["payment_id"]
    return payment_id


async def refunded(embedded: CommandLine, payment_id: int) -> float:
    """Refunds ten more; returns how much has been refunded by then."""
    result = await embedded.run("refund", str(payment_id), *REFUND)
    assert result.exit_code == 0, result.stderr
    amount: float = result.json["refunded_amount"]
    return amount


def holds(directory: Path, pattern: str) -> bool:
    """Whether the directory holds such a file."""
    return any(directory.glob(pattern))


def servers(data_dir: Path) -> list[psutil.Process]:
    """The PostgreSQL servers whose data is under the directory, unfinished ones included."""
    found: dict[int, tuple[psutil.Process, int]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "postgres" and any(str(data_dir) in part for part in process.cmdline()):
                found[process.pid] = (process, process.ppid())
    return [process for process, parent in found.values() if parent not in found]  # a backend starts as a copy


async def test_the_server_is_made_by_the_first_command_and_stopped_after_it(
    embedded: CommandLine, paid: int, data_dir: Path
) -> None:
    assert servers(data_dir) == []
    shown = await embedded.run("show", str(paid), "--json")
    assert (shown.json["payment_id"], shown.json["status"]) == (paid, "COMPLETED")
    assert servers(data_dir) == []


@pytest.mark.parametrize("workers", [1, 2])
async def test_commands_work_beside_a_server_that_outlives_them(
    embedded: CommandLine, paid: int, data_dir: Path, workers: int
) -> None:
    async with serving(embedded, workers=workers) as server, server.client() as client:
        refund, payment_id = await asyncio.gather(refunded(embedded, paid), charged(embedded, 2))
        assert (refund, payment_id) == (10, paid + 1)
        assert len(servers(data_dir)) == 1
        assert (await client.get(f"/v1/payments/{paid}")).json()["refunded_amount"] == 10
        assert await server.end(signal.SIGTERM) == 0
        assert servers(data_dir) == []
    assert servers(data_dir) == []


async def test_a_killed_server_costs_nobody_the_books(embedded: CommandLine, paid: int, data_dir: Path) -> None:
    async with serving(embedded) as server:
        slow = asyncio.create_task(
            embedded.run(*CHARGE, "--order-id", "2", "--amount", SLOW_AMOUNT, "--method", "CREDIT_CARD")
        )
        async with server.client() as client:
            await begun_over_http(client)
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        assert (await slow).exit_code == 0
    assert await refunded(embedded, paid) == 10
    assert servers(data_dir) == []


async def test_a_killed_command_costs_nobody_the_books(embedded: CommandLine, paid: int, data_dir: Path) -> None:
    async with serving(embedded) as server, server.client() as client:
        command = await embedded.start(
            *CHARGE, "--order-id", "2", "--amount", SLOW_AMOUNT, "--method", "CREDIT_CARD", "--idempotency-key", "k"
        )
        await begun_over_http(client)
        command.kill()
        await command.communicate()
        again = await charge(client, 2, amount=SLOW_AMOUNT)
        assert (again.status_code, again.json()["code"]) == (409, "idempotency-key-in-flight")
        assert (await client.get("/v1/payments/order/2")).json()["status"] == "PROCESSING"
        assert await server.end(signal.SIGTERM) == 0
    assert servers(data_dir) == []


async def test_a_killed_holder_is_forgotten_by_the_next(embedded: CommandLine, paid: int, data_dir: Path) -> None:
    async with serving(embedded) as server:
        await server.end(signal.SIGKILL)
    assert len(servers(data_dir)) == 1
    assert await refunded(embedded, paid) == 10
    assert servers(data_dir) == []


async def test_a_killed_postgres_recovers_at_the_next_command(embedded: CommandLine, paid: int, data_dir: Path) -> None:
    async with serving(embedded) as server:
        await server.end(signal.SIGKILL)
    (postmaster,) = servers(data_dir)
    postmaster.kill()
    await until(lambda: all_ended([postmaster]))
    assert await refunded(embedded, paid) == 10
    assert servers(data_dir) == []


async def test_a_list_of_holders_cut_off_by_a_kill_is_survived(
    embedded: CommandLine, paid: int, data_dir: Path
) -> None:
    (data_dir / CLUSTER / ".handle_pids.json").write_text("")
    assert await refunded(embedded, paid) == 10


@pytest.mark.parametrize("moment", ["create.lock", "new-*/PG_VERSION", f"{CLUSTER}/PG_VERSION"])
async def test_a_kill_during_the_very_first_start_breaks_nothing(
    embedded: CommandLine, data_dir: Path, moment: str
) -> None:
    async def reached() -> bool:
        return holds(data_dir, moment)

    first = await embedded.start(*CHARGE, "--order-id", "1")
    await until(reached)
    first.kill()
    await first.communicate()
    assert await charged(embedded, 2) > 0


async def test_a_kill_while_the_first_server_is_set_up_leaves_no_server_and_no_rubbish(
    embedded: CommandLine, data_dir: Path
) -> None:
    async def set_up_runs() -> bool:
        return holds(data_dir, "new-*/.s.PGSQL.*")

    first = await embedded.start(*CHARGE, "--order-id", "1")
    await until(set_up_runs)
    first.kill()
    await first.communicate()
    await charged(embedded, 2)
    assert servers(data_dir) == []
    assert sorted(os.listdir(data_dir)) == ["create.lock", CLUSTER]


async def test_several_first_starts_at_once_share_one_server(embedded: CommandLine, data_dir: Path) -> None:
    payments = await asyncio.gather(*(charged(embedded, order_id) for order_id in range(1, 5)))
    assert len(set(payments)) == 4
    assert json.loads((data_dir / CLUSTER / ".handle_pids.json").read_text()) == []
    assert servers(data_dir) == []


async def test_a_stale_postmaster_pid_that_names_another_program_is_survived(
    embedded: CommandLine, paid: int, data_dir: Path
) -> None:
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    await leave_a_stale_pid(embedded, data_dir, other.pid)
    assert await refunded(embedded, paid) == 10
    assert other.returncode is None
    assert servers(data_dir) == []
    await other.communicate(b"\n")


async def test_a_stale_postmaster_pid_that_names_another_postgresql_is_survived_and_that_one_left_alone(
    embedded: CommandLine, paid: int, data_dir: Path, tmp_path: Path
) -> None:
    with new_data_dir() as other_dir:
        async with serving(command_line_on(other_dir, tmp_path)):
            (other,) = servers(other_dir)
            await leave_a_stale_pid(embedded, data_dir, other.pid)
            refund = await embedded.run("refund", str(paid), *REFUND)
            assert (refund.exit_code, other.is_running()) == (0, True), refund.stderr
    assert servers(data_dir) == []


async def leave_a_stale_pid(embedded: CommandLine, data_dir: Path, pid: int) -> None:
    """Kills the server, and writes another process's id into what it leaves behind."""
    async with serving(embedded) as server:
        await server.end(signal.SIGKILL)
    (postmaster,) = servers(data_dir)
    pid_file = data_dir / CLUSTER / "postmaster.pid"
    _, *rest = pid_file.read_text().splitlines(keepends=True)
    postmaster.kill()
    await until(lambda: all_ended([postmaster]))
    pid_file.write_text("".join([f"{pid}\n", *rest]))
