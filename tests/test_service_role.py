"""Who serves may do what the service needs and nothing else, as `migrate --service-role` has granted it.

All other tests run the service as such a role as well (`tests.conftest.service_url`).
"""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from eci_pay.errors import MigrationError
from eci_pay.migrations import bundled_migrations, check_schema, migrate, privilege_changes
from eci_pay.privileges import NEEDED
from tests.support import Books, CommandLine
from tests.test_audit_trail import CHANGES
from tests.test_cli import assert_no_traceback
from tests.test_migrations import query
from tests.test_schema import TABLES

CONFLICT, INVALID, UNAVAILABLE = 3, 2, 5
PAYMENT = (
    "INSERT INTO payments (order_id, user_id, amount, payment_method, status, transaction_id)"
    " VALUES (1, 7, 100, 'UPI', 'COMPLETED', 'TXN1')"
)
TRAIL = (
    "INSERT INTO transactions (payment_id, transaction_type, amount, status)"
    " SELECT payment_id, 'PAYMENT', 100, 'COMPLETED' FROM payments"
)


@dataclass(frozen=True)
class Roles:
    """An owner of a database, and one that serves; neither is a superuser. Its name wants quoting."""

    owner: str
    service: str
    owner_url: str
    service_url: str

    @property
    def quoted(self) -> str:
        """The name of the role that serves, as SQL wants it."""
        return sql.Identifier(self.service).as_string()


@pytest.fixture
async def roles(server_url: str, empty_database_url: str) -> AsyncIterator[Roles]:
    """Two roles and an empty database of the one."""
    owner, service = f"eci_pay_owner_{os.getpid()}", f'Eci"Pay serves {os.getpid()}'
    names = [sql.Identifier(name) for name in (owner, service)]
    database = psycopg.conninfo.conninfo_to_dict(empty_database_url)["dbname"]
    async with await psycopg.AsyncConnection.connect(empty_database_url, autocommit=True) as administrator:
        try:
            for name in names:
                await administrator.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'tests'").format(name))
        except psycopg.errors.InsufficientPrivilege as error:
            pytest.skip(f"the server lets nobody make a role: {error}")
        try:
            await administrator.execute(f"ALTER DATABASE {database} OWNER TO {owner}".encode())
            await administrator.execute(f"ALTER SCHEMA public OWNER TO {owner}".encode())
            urls = [make_conninfo(empty_database_url, user=name, password="tests") for name in (owner, service)]
            yield Roles(owner, service, *urls)
        finally:
            await administrator.execute(f"ALTER DATABASE {database} OWNER TO CURRENT_USER".encode())
            for name in names:
                await administrator.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(name))
                await administrator.execute(sql.SQL("DROP ROLE {}").format(name))


@pytest.fixture
def as_owner(roles: Roles, tmp_path: Path) -> CommandLine:
    """`eci-pay` as the owner."""
    return CommandLine({"DATABASE_URL": roles.owner_url}, tmp_path)


@pytest.fixture
def as_service(roles: Roles, as_owner: CommandLine) -> CommandLine:
    """`eci-pay` as whoever serves."""
    return replace(as_owner, environment={"DATABASE_URL": roles.service_url})


async def refused(url: str, statement: str) -> str:
    """With what words the database refuses a statement."""
    try:
        await query(url, statement)
    except psycopg.errors.InsufficientPrivilege as error:
        return str(error).split("\n", 1)[0]
    pytest.fail(f"nobody refused {statement}")


async def acl(url: str) -> list[dict[str, object]]:
    """All privileges on relations, as the catalog has them."""
    return await query(
        url, "SELECT relname, relacl::text FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    )


def test_every_table_is_declared() -> None:
    assert {name for name in NEEDED if not name.endswith("_seq")} == {*TABLES, "schema_migrations"}


async def test_migrate_grants_all_that_the_service_needs_and_a_second_run_changes_nothing(
    roles: Roles, as_owner: CommandLine, as_service: CommandLine
) -> None:
    applied = await as_owner.run("migrate", "--service-role", roles.service)
    assert (applied.exit_code, applied.stderr) == (0, "")
    assert f"{roles.service} may do what the service needs, and nothing else" in applied.stdout
    before = await acl(roles.owner_url)
    in_environment = replace(as_owner, environment={**as_owner.environment, "ECI_PAY_SERVICE_ROLE": roles.service})
    again = await in_environment.run("migrate", "--json")
    assert again.json == {"applied": [], "sample_payments": 0, "service_role": roles.service}
    assert await acl(roles.owner_url) == before
    charged = await as_service.run(
        "charge", "--order-id=1", "--user-id=7", "--amount=10", "--method=UPI", "--idempotency-key=k"
    )
    assert (charged.exit_code, charged.stderr) == (0, "")
    diagnosis = (await as_service.run("doctor", "--json")).json["findings"]
    found = {each["check"]: each["verdict"] for each in diagnosis}
    assert (found["rights"], found["powers"], found["schema"]) == ("ok", "ok", "ok")


async def test_who_serves_can_change_neither_the_schema_nor_what_was_written(roles: Roles) -> None:
    await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    await query(roles.service_url, PAYMENT)
    await query(roles.service_url, TRAIL)
    version = (await query(roles.owner_url, "SHOW server_version_num"))[0]["server_version_num"]
    statements = [
        *(change for way, change in CHANGES.items() if "merge" not in way or int(str(version)) >= 150000),
        "UPDATE transactions SET description = 'another'",
        "DELETE FROM transactions",
        "TRUNCATE transactions",
        "BEGIN; LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE",
        "DELETE FROM payments",
        "TRUNCATE payments CASCADE",
        "DELETE FROM refunds",
        "UPDATE schema_migrations SET checksum = 'x'",
        "INSERT INTO schema_migrations (version, name, checksum) VALUES (9999, 'x', 'x')",
        "DELETE FROM schema_migrations",
        "ALTER TABLE transactions DISABLE TRIGGER ALL",
        "ALTER TABLE payments ADD COLUMN mine text",
        "ALTER TABLE payments DROP CONSTRAINT payments_refund_within_capture",
        "CREATE TRIGGER mine AFTER INSERT ON payments EXECUTE FUNCTION refuse_change_of_audit_trail()",
        "CREATE RULE mine AS ON INSERT TO transactions DO INSTEAD NOTHING",
        "DROP TRIGGER transactions_append_only ON transactions",
        "CREATE OR REPLACE FUNCTION refuse_change_of_audit_trail() RETURNS trigger LANGUAGE sql AS 'SELECT NULL'",
        "DROP FUNCTION refuse_change_of_audit_trail() CASCADE",
        "DROP TABLE transactions",
        "DROP INDEX idx_payments_order_id",
        "CREATE TABLE mine (a integer)",
        "CREATE SCHEMA mine",
        "SET session_replication_role = replica",
        "SELECT setval('transactions_transaction_log_id_seq', 1)",
        "SELECT nextval('payments_payment_id_seq')",
        f"SET ROLE {roles.owner}",
    ]
    rows = "SELECT *, (SELECT count(*) FROM payments) AS payments FROM transactions"
    before = await query(roles.owner_url, rows)
    for statement in statements:
        words = await refused(roles.service_url, statement)
        assert words.startswith(("permission denied", "must be owner of")), (statement, words)
    assert await query(roles.owner_url, rows) == before


async def test_what_is_too_much_is_taken_away_from_the_role_and_from_everybody(roles: Roles) -> None:
    await migrate(roles.owner_url, bundled_migrations())
    await query(roles.owner_url, "GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC")
    await query(roles.owner_url, "GRANT CREATE ON SCHEMA public TO PUBLIC")
    await query(roles.owner_url, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {roles.quoted}")
    await query(roles.owner_url, f"GRANT UPDATE (status) ON transactions TO {roles.quoted} WITH GRANT OPTION")
    changes = await privilege_changes(roles.owner_url, roles.service)
    assert f"REVOKE CREATE ON SCHEMA public FROM PUBLIC, {roles.quoted}" in changes
    await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    assert await privilege_changes(roles.owner_url, roles.service) == []
    for statement in ("UPDATE transactions SET status = 'FAILED'", "CREATE TABLE mine ()", "TRUNCATE totals"):
        assert "permission denied" in await refused(roles.service_url, statement)
    everybodys = "SELECT relname FROM pg_class, aclexplode(relacl) WHERE grantee = 0 AND relname = 'transactions'"
    assert await query(roles.owner_url, everybodys) == []


async def test_a_role_that_is_not_there_or_that_privileges_do_not_bind_is_refused_before_anything_is_migrated(
    roles: Roles, as_owner: CommandLine, server_url: str
) -> None:
    superuser = psycopg.conninfo.conninfo_to_dict(server_url).get("user") or "postgres"
    for role, words in (
        ("nobody there", 'there is no role "nobody there": the administrator has to make it first'),
        (roles.owner, f'"{roles.owner}" may act as the role that migrates'),
        (superuser, f'"{superuser}" is a superuser'),
    ):
        result = await as_owner.run("migrate", "--service-role", str(role))
        assert (result.exit_code, result.stdout) == (CONFLICT, "")
        assert result.stderr.startswith(f"error: {words}")
        assert_no_traceback(result)
    assert await acl(roles.owner_url) == []


async def test_what_comes_with_another_role_cannot_be_taken_away_and_is_told(roles: Roles, books: Books) -> None:
    await migrate(roles.owner_url, bundled_migrations())
    group = f"eci_pay_group_{os.getpid()}"
    await books.rows(f"CREATE ROLE {group}")
    await books.rows(f"GRANT {group} TO {roles.quoted}")
    try:
        await query(roles.owner_url, f"GRANT DELETE ON refunds TO {group}")
        with pytest.raises(Exception, match="still may DELETE on TABLE refunds"):
            await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    finally:
        await query(roles.owner_url, f"REVOKE ALL ON refunds FROM {group}")
        await books.rows(f"DROP ROLE {group}")


@pytest.mark.parametrize(
    ("grant", "words"),
    [
        ("GRANT {superuser} TO {role}", "is a superuser, or may act as one"),
        ("GRANT pg_execute_server_program TO {role}", "use the server's files and programs"),
        ("ALTER ROLE {role} REPLICATION", "may replicate"),
    ],
)
async def test_a_role_that_could_pass_privileges_by_is_refused(
    roles: Roles, books: Books, as_service: CommandLine, grant: str, words: str
) -> None:
    await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    await books.rows(f"ALTER ROLE {roles.quoted} NOINHERIT")
    await books.rows(grant.format(role=roles.quoted, superuser=await books.value("SELECT quote_ident(current_user)")))
    with pytest.raises(MigrationError, match=words):
        await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    diagnosis = (await as_service.run("doctor", "--json")).json["findings"]
    (powers,) = [each for each in diagnosis if each["check"] == "powers"]
    assert (powers["verdict"], words in powers["message"]) == ("warning", True)


async def test_what_a_role_may_have_by_set_role_is_too_much_and_does_not_help(roles: Roles, books: Books) -> None:
    await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    group = f"eci_pay_group_{os.getpid()}"
    await books.rows(f"CREATE ROLE {group}")
    await books.rows(f"ALTER ROLE {roles.quoted} NOINHERIT")
    await books.rows(f"GRANT {group} TO {roles.quoted}")
    try:
        await query(roles.owner_url, f"GRANT INSERT ON refunds TO {group}")
        await query(roles.owner_url, f"REVOKE INSERT ON refunds FROM {roles.quoted}")
        changes = await privilege_changes(roles.owner_url, roles.service)
        assert f"GRANT SELECT, INSERT, UPDATE ON TABLE refunds TO {roles.quoted}" in changes
        await query(roles.owner_url, f"GRANT UPDATE ON transactions TO {group}")
        with pytest.raises(MigrationError, match="still may UPDATE on TABLE transactions"):
            await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    finally:
        await query(roles.owner_url, f"REVOKE ALL ON refunds, transactions FROM {group}")
        await books.rows(f"DROP ROLE {group}")


async def test_a_dry_run_prints_the_privileges_too(roles: Roles, as_owner: CommandLine) -> None:
    await migrate(roles.owner_url, bundled_migrations())
    dry = await as_owner.run("migrate", "--dry-run", "--service-role", roles.service)
    assert f"GRANT SELECT, INSERT ON TABLE transactions TO {roles.quoted};\n" in dry.stdout
    assert "0 migrations would be applied" in dry.stderr
    refusal = await refused(roles.service_url, "SELECT FROM payments")
    assert refusal == "permission denied for table payments"


async def test_the_start_says_that_the_owner_has_to_migrate(roles: Roles, as_service: CommandLine) -> None:
    """Whoever serves finds no schema, one without privileges, an older, the right and a newer one."""
    serve = ("serve", "--port=0")
    empty = await as_service.run(*serve)
    assert (empty.exit_code, "run `eci-pay migrate` as the tables' owner" in empty.stderr) == (UNAVAILABLE, True)
    older = bundled_migrations()[:-1]
    await migrate(roles.owner_url, older)
    ungranted = await as_service.run(*serve)
    assert ungranted.exit_code == UNAVAILABLE
    assert "permission denied for table schema_migrations: the owner of the tables has to run" in ungranted.stderr
    await migrate(roles.owner_url, older, service_role=roles.service)
    behind = await as_service.run(*serve)
    newest = bundled_migrations()[-1].name
    assert f"the database lacks {newest}: run `eci-pay migrate` as the tables' owner" in behind.stderr
    assert behind.exit_code == UNAVAILABLE
    by_itself = await as_service.run("migrate")
    assert by_itself.exit_code == CONFLICT
    assert f"{newest}: " in by_itself.stderr
    assert "migrations run as the owner of the tables" in by_itself.stderr
    await migrate(roles.owner_url, bundled_migrations(), service_role=roles.service)
    assert (await as_service.run("migrate")).stdout.startswith("the schema is at version")
    await query(roles.owner_url, "INSERT INTO schema_migrations VALUES (9999, '9999_later.sql', 'x')")
    assert await check_schema(roles.service_url, bundled_migrations()) == ["9999_later.sql"]
