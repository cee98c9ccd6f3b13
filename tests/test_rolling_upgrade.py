"""The release before and this one serve the same books at the same time, on the schema of this one."""

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import permutations
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from eci_pay.migrations import bundled_migrations
from tests.peers import Peers
from tests.previous_release import RELEASES, PreviousRelease
from tests.support import FAULTS_IN_BOOKS, Books, CommandLine, charge_fields, names, until
from tests.test_serving import charge, serving

LATE = "4000.08"
"""Of this amount the gateway tells nothing until it is asked what became of it."""
DECLINED = "4000.02"
RACES = 8
REASON = "Customer changed their mind"


@dataclass(frozen=True)
class Upgrade:
    """One database, of the schema of the release before, and the two releases' commands on it."""

    old: CommandLine
    new: CommandLine
    owner: CommandLine
    books: Books
    service_role: str | None


@pytest.fixture
async def upgrade(
    empty_database_url: str,
    service_role: str | None,
    previous_release: PreviousRelease,
    peers: Peers,
    tmp_path: Path,
) -> AsyncIterator[Upgrade]:
    """Who serves looks for no unknown outcomes by itself: the tests say who finds them out."""
    url, role = empty_database_url, service_role
    served = url if role is None else make_conninfo(url, options=f"-c role={role}")
    environment = {
        **peers.environment(),
        "ECI_PAY_SIMULATED_SLOW_SECONDS": "0.05",
        "ECI_PAY_RECOVERY_FIRST_LOOK_SECONDS": "0.05",
        "ECI_PAY_RECOVERY_INTERVAL_SECONDS": "3600",
        "ECI_PAY_RELAY_POLL_SECONDS": "0.05",
    }
    old = previous_release.command_line({**environment, "DATABASE_URL": url}, tmp_path)
    assert (await old.run("--version")).stdout == f"eci-pay {previous_release.version}\n"
    assert (await old.run("migrate")).exit_code == 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        yield Upgrade(
            old=old,
            new=CommandLine({**environment, "DATABASE_URL": served}, tmp_path),
            owner=CommandLine({**environment, "DATABASE_URL": url}, tmp_path),
            books=Books(connection),
            service_role=role,
        )


async def migrate(upgrade: Upgrade) -> None:
    """Brings the schema to that of this release, as its owner."""
    role = () if upgrade.service_role is None else ("--service-role", upgrade.service_role)
    migrated = await upgrade.owner.run("migrate", *role)
    assert (migrated.exit_code, migrated.stderr) == (0, "")


def as_service(upgrade: Upgrade) -> CommandLine:
    """The release before, as the role to which this one has granted what it needs."""
    served = {"DATABASE_URL": upgrade.new.environment["DATABASE_URL"]}
    return replace(upgrade.old, environment={**upgrade.old.environment, **served})


def money(answer: httpx.Response) -> tuple[object, ...]:
    """What an answer says of a payment; a newer release may say more."""
    body = answer.json()
    trail = [(each["transaction_type"], each["status"], each["amount"]) for each in body["transactions"]]
    return (body["payment_id"], body["status"], body["amount"], body["refunded_amount"], body["refunds"], trail)


async def refund(client: httpx.AsyncClient, payment_id: int, key: str, **fields: object) -> httpx.Response:
    """Refunds a payment over HTTP."""
    body = {"reason": REASON, **fields}
    return await client.post(f"/v1/payments/{payment_id}/refund", json=body, headers={"Idempotency-Key": key})


async def figures(client: httpx.AsyncClient) -> dict[str, str]:
    """The metrics of the books."""
    text = (await client.get("/metrics")).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, value in pairs if name.startswith(("payments_", "total_", "refunds_"))}


@asynccontextmanager
async def charging(client: httpx.AsyncClient, orders: Iterator[int]) -> AsyncIterator[list[httpx.Response]]:
    """Charges one order after another meanwhile."""
    answers: list[httpx.Response] = []
    is_over = asyncio.Event()

    async def work() -> None:
        while not is_over.is_set():
            order_id = next(orders)
            answers.append(await charge(client, order_id, f"steady-{order_id}"))

    working = asyncio.create_task(work())
    yield answers
    is_over.set()
    await working


def test_the_wheel_is_that_of_an_earlier_release(previous_release: PreviousRelease) -> None:
    digest = hashlib.sha256(previous_release.wheel.read_bytes()).hexdigest()
    assert f"`{previous_release.wheel.name}`" in (RELEASES / "README.md").read_text()
    assert f"`{digest}`" in (RELEASES / "README.md").read_text()
    numbers = [tuple(int(part) for part in text.split(".")) for text in (previous_release.version, version("eci-pay"))]
    assert numbers[0] < numbers[1]


async def test_two_releases_serve_the_same_books_at_once(
    upgrade: Upgrade, previous_release: PreviousRelease, peers: Peers
) -> None:
    orders = itertools.count(1)
    known = {migration.name for migration in previous_release.migrations()}
    newer = [migration.name for migration in bundled_migrations() if migration.name not in known]
    async with serving(upgrade.old) as before, before.client() as old:
        async with charging(old, orders) as steadily:
            await until(lambda: asyncio.sleep(0, len(steadily) > 10))  # its statements are prepared by now
            await migrate(upgrade)
            number = len(steadily)
            await until(lambda: asyncio.sleep(0, len(steadily) > number + 10))
        assert names(steadily) == Counter({"201": len(steadily)})
        async with serving(upgrade.new) as after, serving(as_service(upgrade)) as restarted:
            for name in newer:
                assert any(f"{name}: the schema is newer than this release" in line for line in restarted.log)
            async with after.client() as new, restarted.client() as granted:
                for one, other in (*permutations((old, new)), (granted, new)):
                    await exchange(one, other, orders)
                await race(old, new, orders)
                pages = [(await client.get("/v1/payments", params={"page_size": 100})).json() for client in (old, new)]
                seen = [[(each["payment_id"], each["status"]) for each in page["payments"]] for page in pages]
                assert seen[0] == seen[1]
                assert pages[0]["total"] == pages[1]["total"]
                assert await figures(old) == await figures(new)
        rolled_back = await charge(old, next(orders))
        assert rolled_back.status_code == 201
        await until(lambda: nothing_is_open(upgrade.books))
    assert await upgrade.books.rows(FAULTS_IN_BOOKS, 1) == []
    assert len({taken.message_id for taken in peers.taken}) == await upgrade.books.value("SELECT count(*) FROM outbox")
    for command_line in (upgrade.old, upgrade.new):
        checked = await command_line.run("reconcile", "--json")
        assert (checked.exit_code, checked.json["fault_counts"]) == (0, {}), checked.stdout


async def nothing_is_open(books: Books) -> bool:
    """Whether all messages are delivered."""
    return await books.rows("SELECT 1 FROM outbox WHERE delivered_at IS NULL LIMIT 1") == []


async def exchange(one: httpx.AsyncClient, other: httpx.AsyncClient, orders: Iterator[int]) -> None:
    """What the one release has begun, the other goes on with, and each replays the other's answers byte for byte."""
    order_id = next(orders)
    charged = await charge(one, order_id, f"charge-{order_id}")
    payment_id = charged.json()["payment_id"]
    part = await refund(other, payment_id, f"part-{order_id}", amount="40.00")
    rest = await refund(one, payment_id, f"rest-{order_id}")
    declined_id = next(orders)
    declined = await charge(other, declined_id, f"charge-{declined_id}", amount=DECLINED)
    assert [each.status_code for each in (charged, part, rest, declined)] == [201, 200, 200, 402]
    again = [
        await charge(other, order_id, f"charge-{order_id}"),
        await refund(one, payment_id, f"part-{order_id}", amount="40.00"),
        await refund(other, payment_id, f"rest-{order_id}"),
        await charge(one, declined_id, f"charge-{declined_id}", amount=DECLINED),
    ]
    for first, replayed in zip((charged, part, rest, declined), again, strict=True):
        assert (replayed.status_code, replayed.content) == (first.status_code, first.content)
        assert replayed.headers["Idempotent-Replayed"] == "true"
    created = await one.post("/v1/payments", json=charge_fields(next(orders)))
    cancelled = await other.delete(f"/v1/payments/{created.json()['payment_id']}")
    assert (created.status_code, cancelled.status_code) == (201, 200)
    retaken = await charge(one, declined_id, f"again-{declined_id}")
    assert retaken.status_code == 201
    for each in (payment_id, created.json()["payment_id"], retaken.json()["payment_id"]):
        seen = [money(await client.get(f"/v1/payments/{each}")) for client in (one, other)]
        assert seen[0] == seen[1]
    await find_out(one, other, orders)


async def find_out(one: httpx.AsyncClient, other: httpx.AsyncClient, orders: Iterator[int]) -> None:
    """Of what the one release never got an answer, the other finds out."""
    order_id = next(orders)
    unknown = await charge(one, order_id, f"late-{order_id}", amount=LATE)
    found = await known(lambda: charge(other, order_id, f"late-{order_id}", amount=LATE))
    assert (unknown.status_code, found.status_code) == (202, 201)
    payment_id = (await charge(one, next(orders), f"much-{order_id}", amount="5000.00")).json()["payment_id"]
    unknown = await refund(one, payment_id, f"late-refund-{order_id}", amount=LATE)
    found = await known(lambda: refund(other, payment_id, f"late-refund-{order_id}", amount=LATE))
    assert (unknown.status_code, found.status_code) == (202, 200)
    replayed = await refund(one, payment_id, f"late-refund-{order_id}", amount=LATE)
    assert replayed.content == found.content


async def known(ask: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
    """The first answer that tells an outcome: what has only just begun is not looked at."""
    answers: list[httpx.Response] = []

    async def is_known() -> bool:
        answers.append(await ask())
        return answers[-1].status_code != 202

    await until(is_known)
    return answers[-1]


async def race(old: httpx.AsyncClient, new: httpx.AsyncClient, orders: Iterator[int]) -> None:
    """The same request to both at once is one charge, and so are two requests for one order."""
    for number in range(RACES):
        order_id = next(orders)
        same = number % 2 == 0
        answers = await asyncio.gather(
            *(
                charge(client, order_id, "race" + (f"{order_id}" if same else f"{order_id}-{id(client)}"))
                for client in (old, new)
            )
        )
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses in ([[201, 201], [201, 409]] if same else [[201, 409]])
        (payment_id,) = {answer.json()["payment_id"] for answer in answers if answer.status_code == 201}
        refunds = await asyncio.gather(
            *(refund(client, payment_id, f"r{number}-{id(client)}") for client in (old, new))
        )
        assert sorted(answer.status_code for answer in refunds) == [200, 409]


async def test_the_commands_of_two_releases_go_on_with_each_others_work(upgrade: Upgrade, tmp_path: Path) -> None:
    await migrate(upgrade)
    orders = itertools.count(1)
    for one, other in permutations((upgrade.old, upgrade.new)):
        order_id = next(orders)
        paying = ("--user-id=7", "--method=CREDIT_CARD", f"--idempotency-key=k{order_id}")
        begun = await one.run("charge", f"--order-id={order_id}", f"--amount={LATE}", *paying)
        assert begun.exit_code == 6
        assert (await other.run("recover", "--once")).exit_code == 0
        assert await upgrade.books.value("SELECT status FROM payments WHERE order_id = %s", order_id) == "COMPLETED"
        file = tmp_path / f"refunds-{order_id}.csv"
        file.write_text(f"order_id,amount,reason\n{order_id},10.00,{REASON}\n{order_id},20.00,{REASON}\n")
        done = await one.run("refund", "--batch", str(file), "--yes", "--json")
        repeated = await other.run("refund", "--batch", str(file), "--yes", "--json")
        assert (done.exit_code, repeated.exit_code) == (0, 0)
        assert "replayed" in repeated.stdout
    assert await upgrade.books.value("SELECT sum(refunded_amount)::text FROM payments") == "60.00"
    diagnosis = await as_service(upgrade).run("doctor", "--json")
    assert [each for each in diagnosis.json["findings"] if each["verdict"] == "fault"] == []
