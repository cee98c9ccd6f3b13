"""`eci-pay doctor`: each check tells what is wrong and how to mend it, and none of them changes anything."""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from eci_pay import doctor
from eci_pay.access import Scope
from eci_pay.doctor import Diagnosis, Verdict, diagnose
from eci_pay.messages import Destination
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.door import Door
from tests.peers import HANG, Peers, Reply
from tests.rows import paid
from tests.support import Books, CommandLine, ManualClock, charge_request
from tests.test_cli import assert_no_traceback

FAULT, UNAVAILABLE = 1, 5
OK, WARNING = Verdict.OK, Verdict.WARNING
BACKEND_KEY = re.compile(rb"K\x00\x00\x00\x0c.{4}", re.DOTALL)


class Pooler(Door):
    """As poolers do, it tells clients another process id than PostgreSQL's."""

    async def _answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while chunk := await server.read(65536):
            client.write(BACKEND_KEY.sub(b"K\x00\x00\x00\x0c\x00\x00\x00\x07", chunk))


@pytest.fixture
async def clerk(books: Books) -> AsyncIterator[str]:
    """The name of a role without any rights."""
    name = f"eci_pay_clerk_{os.getpid()}"
    try:
        await books.rows(f"CREATE ROLE {name}")
        await books.rows(f"SET ROLE {name}")
        await books.rows("RESET ROLE")
    except psycopg.errors.InsufficientPrivilege as error:
        await books.rows(f"DROP ROLE IF EXISTS {name}")
        pytest.skip(f"the server lets nobody make a role: {error}")
    yield name
    await books.rows(f"DROP OWNED BY {name}")
    await books.rows(f"DROP ROLE {name}")


def at(settings: Settings, url: str) -> Settings:
    """The same settings with another database."""
    return settings.model_copy(update={"database_url": SecretStr(url)})


def as_role(settings: Settings, url: str, role: str) -> Settings:
    """The same settings with another role."""
    return at(settings, make_conninfo(url, options=f"-c role={role}"))


def of(diagnosis: Diagnosis, check: str) -> list[tuple[Verdict, str]]:
    """What one check has found."""
    return [(finding.verdict, finding.message) for finding in diagnosis.findings if finding.check == check]


async def alter(books: Books, change: str) -> None:
    """Changes what new sessions in the test's database begin with."""
    name = await books.value("SELECT current_database()")
    await books.rows(f"ALTER DATABASE {name} SET {change}")


async def test_what_is_well_is_told_check_by_check(command_line: CommandLine, peers: Peers, books: Books) -> None:
    before = await books.rows("SELECT relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_user_tables ORDER BY 1")
    operator = replace(command_line, environment={**command_line.environment, **peers.environment()})
    table, as_json = await asyncio.gather(operator.run("doctor"), operator.run("doctor", "--json"))
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    assert as_json.json["database_reached"] is True
    verdicts = {(each["check"], each["verdict"]) for each in as_json.json["findings"]} - {("durability", "warning")}
    assert verdicts - {("durability", "ok")} == {
        *((name, "ok") for name in ("settings", "database", "schema", "clocks", "rights", "powers", "pooler")),
        *(
            (name, "ok")
            for name in ("access", "keys", "messages", "outcomes", "peer order", "peer inventory", "peer notification")
        ),
        ("gateway", "warning"),
    }
    assert {each["remedy"] is None for each in as_json.json["findings"] if each["verdict"] == "ok"} == {True}
    assert table.exit_code == 0
    assert "simulated: no money moves" in table.stdout
    assert "-> set ECI_PAY_GATEWAY=stripe" in table.stdout
    assert_no_traceback(table)
    after = await books.rows("SELECT relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_user_tables ORDER BY 1")
    assert before == after


async def test_wrong_settings_are_a_fault_for_each_line(command_line: CommandLine) -> None:
    wrong = {"ECI_PAY_DATABASE_POOL_SIZE": "none", "ORDER_SERVICE_URL": "orders"}
    result = await replace(command_line, environment={**command_line.environment, **wrong}).run("doctor", "--json")
    assert result.exit_code == FAULT
    assert result.json["database_reached"] is None
    found = result.json["findings"]
    assert {(each["check"], each["verdict"]) for each in found} == {("settings", "fault")}
    assert [each["message"].split(":")[0] for each in found] == ["ORDER_SERVICE_URL", "ECI_PAY_DATABASE_POOL_SIZE"]


async def test_an_unreachable_database_leaves_the_other_checks(command_line: CommandLine, peers: Peers) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening
        url = f"postgresql://nobody:s3cret@127.0.0.1:{bound.getsockname()[1]}/none"
        environment = {**command_line.environment, **peers.environment(), "DATABASE_URL": url}
        result = await replace(command_line, environment=environment).run("doctor")
    assert result.exit_code == UNAVAILABLE
    assert "the database cannot be reached" in result.stdout
    assert result.stdout.count(" answers") == 3
    assert "s3cret" not in result.stdout + result.stderr
    assert_no_traceback(result)


async def test_a_database_that_is_silent_is_waited_for_only_so_long(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DATABASE_SECONDS_MAX", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        diagnosis = await diagnose(at(settings, url))
    assert of(diagnosis, "database") == [(Verdict.FAULT, "it did not answer within 0.3 s")]
    assert diagnosis.database_reached is False


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0.0, OK), (-0.5, OK), (5.0, WARNING), (-5.0, WARNING), (90.0, Verdict.FAULT)]
)
async def test_clocks_that_disagree_are_told(settings: Settings, seconds: float, verdict: Verdict) -> None:
    diagnosis = await diagnose(settings, lambda: datetime.now(UTC) + timedelta(seconds=seconds))
    [(found, message)] = of(diagnosis, "clocks")
    assert found is verdict
    if verdict is not OK:
        assert ("ahead of" in message, "behind" in message) == (seconds > 0, seconds < 0)
        [told] = re.findall(r"[0-9.]+", message)
        assert float(told) == pytest.approx(abs(seconds), abs=0.5)


async def test_a_missing_a_changed_and_an_unknown_migration_are_told(settings: Settings, books: Books) -> None:
    await books.rows("DELETE FROM schema_migrations WHERE version = 12")
    await books.rows("UPDATE schema_migrations SET checksum = 'x' WHERE version = 11")
    await books.rows("INSERT INTO schema_migrations (version, name, checksum) VALUES (9999, '9999_later.sql', 'y')")
    diagnosis = await diagnose(settings)
    assert [
        (verdict, message.split()[-1 if "lacks" in message else 0]) for verdict, message in of(diagnosis, "schema")
    ] == [
        (Verdict.FAULT, "0012_bulk_runs.sql"),
        (Verdict.FAULT, "0011_reconciliation.sql"),
        (WARNING, "9999_later.sql"),
    ]
    assert diagnosis.has_fault
    assert of(diagnosis, "messages") == []


async def test_an_empty_database_lacks_the_schema_and_no_rights(settings: Settings, empty_database_url: str) -> None:
    diagnosis = await diagnose(at(settings, empty_database_url))
    [(verdict, message)] = of(diagnosis, "schema")
    assert (verdict, message.startswith("it lacks 0001_payments.sql, ")) == (Verdict.FAULT, True)
    assert [verdict for verdict, _ in of(diagnosis, "rights")] == [OK]


@pytest.mark.parametrize(("versions", "verdict"), [(range(98, 99), Verdict.FAULT), (range(8, 9), WARNING)])
async def test_a_version_that_is_too_old_or_too_new_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, versions: range, verdict: Verdict
) -> None:
    monkeypatch.setattr(doctor, "MAJOR_VERSIONS", versions)
    assert [found for found, _ in of(await diagnose(settings), "database")] == [verdict]


async def test_every_table_that_the_role_may_not_use_is_told_with_the_grant_it_needs(
    settings: Settings, books: Books, *, database_url: str, clerk: str
) -> None:
    rows = await books.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    tables = {row["tablename"] for row in rows}
    diagnosis = await diagnose(as_role(settings, database_url, clerk))
    remedies = [str(finding.remedy) for finding in diagnosis.findings if finding.check == "rights"]
    assert {remedy.split(" ON ")[1].split(" TO ")[0] for remedy in remedies} == {
        *(f"TABLE {table}" for table in tables),
        "SEQUENCE transactions_transaction_log_id_seq",
    }
    for remedy in remedies:
        await books.rows(remedy)
    mended = await diagnose(as_role(settings, database_url, clerk))
    assert of(mended, "rights") == [(OK, f"{clerk} may do all that is needed")]
    assert [verdict for verdict, _ in of(mended, "messages")] == [OK]
    await books.rows(f"REVOKE INSERT ON payments FROM {clerk}")
    lacking = of(await diagnose(as_role(settings, database_url, clerk)), "rights")
    assert lacking == [(Verdict.FAULT, f"{clerk} lacks INSERT on payments")]


async def test_a_role_that_may_do_more_than_it_needs_is_advised_against(
    settings: Settings, books: Books, *, database_url: str, clerk: str
) -> None:
    assert {verdict for verdict, _ in of(await diagnose(as_role(settings, database_url, clerk)), "powers")} == {OK}
    for grant in ("UPDATE (status), DELETE ON transactions", "UPDATE ON SEQUENCE payments_payment_id_seq"):
        await books.rows(f"GRANT {grant} TO {clerk}")
    diagnosis = await diagnose(as_role(settings, database_url, clerk))
    assert of(diagnosis, "powers") == [
        (WARNING, f"{clerk} may UPDATE on payments_payment_id_seq, which nothing needs"),
        (WARNING, f"{clerk} may UPDATE, DELETE on transactions, which nothing needs"),
    ]
    await books.rows(f"REVOKE ALL ON transactions, payments_payment_id_seq FROM {clerk}")
    await books.rows("GRANT SELECT ON payments TO PUBLIC")
    diagnosis = await diagnose(as_role(settings, database_url, clerk))
    assert of(diagnosis, "powers") == [(WARNING, "everybody has privileges on payments")]


async def test_an_owner_and_a_superuser_are_advised_not_to_serve(
    settings: Settings, books: Books, *, database_url: str, clerk: str
) -> None:
    superuser = of(await diagnose(at(settings, database_url)), "powers")
    assert [(verdict, "is a superuser" in message) for verdict, message in superuser] == [(WARNING, True)]
    await books.rows(f"ALTER TABLE payments OWNER TO {clerk}")
    owner = of(await diagnose(as_role(settings, database_url, clerk)), "powers")
    assert [(verdict, "owns the tables" in message) for verdict, message in owner] == [(WARNING, True)]
    await books.rows("ALTER TABLE payments OWNER TO CURRENT_USER")


async def test_a_database_that_takes_no_writes_is_a_fault(settings: Settings, books: Books) -> None:
    await alter(books, "default_transaction_read_only = on")
    assert [verdict for verdict, _ in of(await diagnose(settings), "rights")] == [Verdict.FAULT]


async def test_commits_that_a_crash_may_lose_are_warned_of(settings: Settings, books: Books) -> None:
    await alter(books, "synchronous_commit = off")
    diagnosis = await diagnose(settings)
    assert any("synchronous_commit is off" in message for _, message in of(diagnosis, "durability"))
    assert {verdict for verdict, _ in of(diagnosis, "durability")} == {WARNING}


@pytest.mark.parametrize(("prepares", "verdict"), [(True, WARNING), (False, OK)])
async def test_prepared_statements_behind_a_pooler_are_warned_of(
    settings: Settings, database_url: str, *, prepares: bool, verdict: Verdict
) -> None:
    async with Pooler(database_url).opened() as url:
        changed = at(settings, url).model_copy(update={"eci_pay_prepare_statements": prepares})
        [(found, message)] = of(await diagnose(changed), "pooler")
    assert (found, "one stands between" in message) == (verdict, True)


async def test_what_waits_for_too_long_is_warned_of(
    settings: Settings, telling: PaymentService, books: Books, clock: ManualClock
) -> None:
    clock.now = datetime.now(UTC) - timedelta(hours=2)
    await paid(telling, 1)
    await telling.charges.charge(request=charge_request(2, amount="4000.08"), idempotency_key="unknown")
    await books.rows("UPDATE outbox SET dead_at = now() WHERE destination = 'order'")
    await books.rows(
        "INSERT INTO idempotency_keys (idempotency_key, request_hash, response_body, status_code, expires_at)"
        " SELECT 'k' || n, 'h', '{}', 201, now() - interval '3 hours' FROM generate_series(1, %s) n",
        doctor.EXPIRED_KEYS_MAX + 1,
    )
    diagnosis = await diagnose(settings)
    assert of(diagnosis, "keys") == [(WARNING, "more than 1,000 expired keys wait to be deleted")]
    assert of(diagnosis, "messages")[0] == (WARNING, "1 are dead")
    assert re.match(r"the oldest has waited for 7,2\d\d s", of(diagnosis, "messages")[1][1])
    assert re.match(r"1 are unknown for too long, the oldest for 7,2\d\d s", of(diagnosis, "outcomes")[0][1])
    assert of(diagnosis, "peer order") == [
        (WARNING, "ORDER_SERVICE_URL is not set here, though others tell that service of payments")
    ]
    assert of(diagnosis, "peer inventory") == [(OK, "is told nothing: INVENTORY_SERVICE_URL is not set")]
    assert not diagnosis.has_fault


async def test_a_peer_is_well_if_it_answers_anything_in_time(settings: Settings, peers: Peers) -> None:
    peers.behaviour[Destination.ORDER] = lambda _: Reply(status=500)
    peers.behaviour[Destination.NOTIFICATION] = lambda _: HANG
    await peers.shut(Destination.INVENTORY)
    before = asyncio.get_running_loop().time()
    diagnosis = await diagnose(settings.model_copy(update=peers.settings()))
    assert asyncio.get_running_loop().time() - before < doctor.PROBE_SECONDS_MAX + 6
    urls = peers.urls
    assert of(diagnosis, "peer order") == [(OK, f"{urls[Destination.ORDER]} answers")]
    assert of(diagnosis, "peer notification") == [
        (Verdict.FAULT, f"{urls[Destination.NOTIFICATION]}: no answer within 2 s")
    ]
    [(verdict, message)] = of(diagnosis, "peer inventory")
    assert (verdict, "Cannot connect" in message) == (Verdict.FAULT, True)
    assert {(taken.method, taken.body) for taken in peers.taken} == {("GET", None)}


async def test_stripe_is_reached_without_its_key_and_without_money(settings: Settings, peers: Peers) -> None:
    pytest.importorskip("stripe")
    stripe = {
        "eci_pay_gateway": "stripe",
        "eci_pay_stripe_secret_key": SecretStr("sk_test_1"),
        "eci_pay_stripe_api_base": peers.urls[Destination.ORDER],
    }
    diagnosis = await diagnose(settings.model_copy(update=stripe))
    assert of(diagnosis, "gateway") == [
        (OK, f"stripe: a key is set, and {peers.urls[Destination.ORDER]} answers"),
        (WARNING, "the key is one for tests: no money moves"),
        (WARNING, "no webhook secret is set: what Stripe tells is refused"),
    ]
    [taken] = peers.taken
    assert (taken.method, "authorization" in taken.headers) == ("GET", False)
    await peers.shut(Destination.ORDER)
    assert of(await diagnose(settings.model_copy(update=stripe)), "gateway")[0][0] is Verdict.FAULT


async def test_who_may_call_is_told_and_what_of_it_ends(
    settings: Settings, service: PaymentService, clock: ManualClock
) -> None:
    async def told(auth: str | None) -> list[tuple[Verdict, str]]:
        return of(await diagnose(settings.model_copy(update={"eci_pay_auth": auth}), clock), "access")

    [(verdict, message)] = await told("off")
    assert (verdict, "may charge" in message) == (WARNING, True)
    assert [verdict for verdict, _ in await told("on")] == [Verdict.FAULT]
    soon = clock() + timedelta(days=1)
    for name in ("shop", "desk"):
        await service.api_keys.create(name=name, scopes=[Scope.READ], expires_at=soon)
    await service.api_keys.create(name="desk", scopes=[Scope.READ])
    [(verdict, message)] = await told("on")
    assert (verdict, "of shop" in message) == (WARNING, True)
    assert [verdict for verdict, _ in await told(None)] == [OK]
