"""`eci-pay serve` as operators run it: it starts or says why not, serves, and ends without losing anything."""

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from eci_pay.errors import SettingsInvalid
from server.app import create_app
from tests.support import Books, CommandLine, ManualClock, RecordingGateway, charge_fields, until

TIMEOUT_SECONDS = 15
SLOW_SECONDS = 1.5
SLOW_AMOUNT = "4000.10"


@dataclass
class Serving:
    """A running `eci-pay serve`, and what it has logged."""

    process: asyncio.subprocess.Process
    workers: int
    log: list[str] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""

    async def read_log(self) -> None:
        """Reads what the process logs, until it ends; learns the address from it."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode().rstrip())
            if found := re.search(r"running on (http://[\d.]+:\d+)", self.log[-1]):
                self.address = found[1]
            if self.address and sum("startup complete" in logged for logged in self.log) == self.workers:
                self.started.set()
        self.started.set()

    def client(self) -> httpx.AsyncClient:
        """A client of this server."""
        return httpx.AsyncClient(base_url=self.address, timeout=TIMEOUT_SECONDS)

    async def end(self, with_signal: signal.Signals) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(with_signal)
        return await self.exit_code()

    async def exit_code(self) -> int:
        """How the process ended."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def serving(command_line: CommandLine, *, workers: int = 1, host: str = "127.0.0.1") -> AsyncIterator[Serving]:
    """Runs the command on a free port; kills what is left of it in the end."""
    process = await command_line.start("serve", "--host", host, "--port", "0", "--workers", str(workers))
    server = Serving(process, workers)
    reading = asyncio.create_task(server.read_log())
    children: list[psutil.Process] = []
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await server.started.wait()
        assert server.address, server.log
        children = psutil.Process(process.pid).children(recursive=True)
        yield server
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        await process.wait()
        await reading


@pytest.fixture
def slow_command_line(command_line: CommandLine, tmp_path: Path) -> CommandLine:
    """The installed command, whose gateway takes its time where it is told to be slow."""
    return CommandLine({**command_line.environment, "ECI_PAY_SIMULATED_SLOW_SECONDS": str(SLOW_SECONDS)}, tmp_path)


async def charge(client: httpx.AsyncClient, order_id: int = 1, key: str = "k", **fields: object) -> httpx.Response:
    """Charges an order over HTTP."""
    body = charge_fields(order_id, **fields)
    return await client.post("/v1/payments/charge", json=body, headers={"Idempotency-Key": key})


async def begun(books: Books) -> None:
    """Waits until a charge is with the gateway."""
    await until(lambda: books.rows("SELECT 1 FROM payments WHERE status = 'PROCESSING'"))


async def begun_over_http(client: httpx.AsyncClient) -> None:
    """As `begun`, for who cannot look into the books."""

    async def processing() -> int:
        total: int = (await client.get("/v1/payments", params={"status": "PROCESSING"})).json()["total"]
        return total

    await until(processing)


async def refuses_connections(address: str) -> bool:
    """Whether nobody listens there any more."""
    async with httpx.AsyncClient() as client:
        try:
            await client.get(address + "/health")
        except httpx.TransportError:
            return True
        return False


async def test_a_server_on_a_free_port_says_where_it_listens_and_serves(command_line: CommandLine) -> None:
    async with serving(command_line) as server, server.client() as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "healthy")
        assert (await client.get("/health/ready")).status_code == 200
        answer = await charge(client)
        assert (answer.status_code, answer.json()["status"]) == (201, "COMPLETED")
        assert (await client.get(answer.headers["Location"])).json() == answer.json()
        assert await server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stopped_server_answers_what_has_begun_and_takes_nothing_new(
    slow_command_line: CommandLine, books: Books, workers: int, stop: signal.Signals
) -> None:
    async with serving(slow_command_line, workers=workers) as server, server.client() as client:
        children = psutil.Process(server.process.pid).children(recursive=True)
        charging = asyncio.create_task(charge(client, amount=SLOW_AMOUNT))
        await begun(books)
        server.process.send_signal(stop)
        if workers == 1:  # with more, the supervisor's socket stays open until the last worker has ended
            await until(lambda: refuses_connections(server.address))
        assert not charging.done()
        answer = await charging
        assert (answer.status_code, answer.json()["status"]) == (201, "COMPLETED")
        assert await server.exit_code() == 0
        await until(lambda: all_ended(children))
    assert "Traceback" not in "\n".join(server.log)
    assert await books.value("SELECT status FROM payments") == "COMPLETED"


async def test_two_workers_share_the_port_and_the_books(command_line: CommandLine, books: Books) -> None:
    async with serving(command_line, workers=2) as server, server.client() as client:
        answers = await asyncio.gather(*(charge(client, order, key=f"k{order}") for order in range(1, 21)))
        assert {answer.status_code for answer in answers} == {201}
        again = await asyncio.gather(*(charge(client, order, key=f"k{order}") for order in range(1, 21)))
        assert [answer.content for answer in again] == [answer.content for answer in answers]
        assert await server.end(signal.SIGTERM) == 0
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'COMPLETED'") == 20


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_database_without_migrations_stops_the_start(
    empty_database_url: str, tmp_path: Path, workers: str
) -> None:
    result = await CommandLine({"DATABASE_URL": empty_database_url}, tmp_path).run("serve", "--workers", workers)
    assert result.exit_code == 5
    assert "run `eci-pay migrate`" in result.stderr
    assert "Traceback" not in result.stderr


async def test_an_unreachable_database_stops_the_start_and_no_password_is_told(tmp_path: Path) -> None:
    url = f"postgresql://ada:hunter2secret@127.0.0.1:{_free_port()}/books"
    result = await CommandLine({"DATABASE_URL": url}, tmp_path).run("serve", "--port", "0")
    assert result.exit_code == 5
    assert "the database cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert "hunter2secret" not in result.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_in_use_stops_every_start(command_line: CommandLine, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ("serve", "--port", address.split(":")[1], "--workers", workers)
        ends = await asyncio.gather(*(_run_or_kill(command_line, *options) for _ in range(3)))
    for exit_code, told in ends:
        assert exit_code == 5, told
        assert f"could not start on {address}" in told
        assert "Traceback" not in told


async def test_every_log_line_is_json_and_a_request_has_its_id(command_line: CommandLine) -> None:
    async with serving(command_line) as server, server.client() as client:
        await client.get("/v1/payments/1", headers={"X-Request-ID": "from-the-checkout"})
        made_up = (await client.get("/health")).headers["X-Request-ID"]
        assert await server.end(signal.SIGTERM) == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in server.log]
    assert all({"event", "level", "timestamp", "logger"} <= line.keys() for line in lines)
    requests = {line["request_id"]: line for line in lines if line["event"] == "request"}
    assert requests.keys() == {"from-the-checkout", made_up}
    missing = requests["from-the-checkout"]
    assert (missing["method"], missing["path"], missing["status"]) == ("GET", "/v1/payments/1", 404)


async def test_a_server_killed_while_it_charges_loses_nothing_and_is_not_charged_again(
    slow_command_line: CommandLine,
    books: Books,
    api: httpx.AsyncClient,
    gateway: RecordingGateway,
    clock: ManualClock,
) -> None:
    clock.now = datetime.now(UTC)
    async with serving(slow_command_line) as server, server.client() as client:
        charging = asyncio.create_task(charge(client, amount=SLOW_AMOUNT))
        await begun(books)
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(httpx.TransportError):
            await charging
    again = await charge(api, amount=SLOW_AMOUNT)
    assert (again.status_code, again.json()["code"]) == (409, "idempotency-key-in-flight")
    assert again.headers["Retry-After"] == "1"
    other_key = await charge(api, amount=SLOW_AMOUNT, key="other")
    assert (other_key.status_code, other_key.json()["code"]) == (409, "order-in-progress")
    assert again.json()["payment_id"] == other_key.json()["payment_id"]
    assert await books.audit_trail(again.json()["payment_id"]) == [("PAYMENT", "PROCESSING")]
    assert await books.value("SELECT count(*) FROM idempotency_keys WHERE response_body IS NULL") == 1
    assert gateway.charges == []


@pytest.mark.parametrize("request_kind", ["read", "charge", "refund", "cancel", "readiness"])
async def test_the_request_after_every_connection_was_terminated_succeeds(
    command_line: CommandLine, database_url: str, request_kind: str
) -> None:
    async with serving(command_line) as server, server.client() as client:
        answers = await asyncio.gather(*(charge(client, order, key=f"k{order}") for order in range(1, 11)))
        paid = answers[0].json()["payment_id"]
        cash = (await charge(client, 99, key="cash", payment_method="COD")).json()["payment_id"]
        await _terminate_all(database_url)
        match request_kind:
            case "read":
                answer = await client.get(f"/v1/payments/{paid}")
            case "charge":
                answer = await charge(client, 100, key="after")
            case "refund":
                answer = await client.post(f"/v1/payments/{paid}/refund", json={"reason": "Changed their mind"})
            case "cancel":
                answer = await client.delete(f"/v1/payments/{cash}")
            case _:
                answer = await client.get("/health/ready")
        assert answer.is_success, answer.text


async def _run_or_kill(command_line: CommandLine, *arguments: str) -> tuple[int | None, str]:
    """Exit code and standard error of a command that should end, and is killed if it does not."""
    process = await command_line.start(*arguments)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            _, told = await process.communicate()
    except TimeoutError:
        process.kill()
        _, told = await process.communicate()
    return process.returncode, told.decode()


async def all_ended(processes: list[psutil.Process]) -> bool:
    """Whether none of them works any more; one whose parent is gone may wait for init to bury it."""
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


async def _terminate_all(url: str) -> None:
    """Ends every connection to the database but those of the tests themselves."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'payment-service'"
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def test_only_on_loopback_may_access_go_without_a_word_be_uncontrolled(command_line: CommandLine) -> None:
    for host in ("0.0.0.0", "::", "payments.example"):
        refused = await command_line.run("serve", "--host", host, "--port", "0")
        assert refused.exit_code == 2
        assert "ECI_PAY_AUTH" in refused.stderr
    for auth, status in (("off", 200), ("on", 401)):
        environment = {**command_line.environment, "ECI_PAY_AUTH": auth}
        daring = replace(command_line, environment=environment)
        async with serving(daring, host="0.0.0.0") as server, server.client() as client:
            assert (await client.get("/v1/payments")).status_code == status
            assert any("access is not controlled" in line for line in server.log) == (auth == "off")


def test_under_another_server_it_must_be_said_who_may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECI_PAY_AUTH", "")
    with pytest.raises(SettingsInvalid, match="ECI_PAY_AUTH"):
        create_app()
