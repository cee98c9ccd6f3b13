"""A migration runs while the release before serves: it neither keeps charges waiting nor takes away what that one uses.

`.squawk.toml` says which rules of squawk count; what it cannot see is compared before and after.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from eci_pay.migrations import Migration, bundled_migrations, migrate
from tests.previous_release import PreviousRelease
from tests.test_migrations import query, written

CHECKOUT = Path(__file__).parent.parent
SQUAWK = Path(sys.executable).parent / "squawk"

LANDED = {
    "0006_relay.sql": {"constraint-missing-not-valid", "require-concurrent-index-creation"},
    "0007_recovery.sql": {"require-concurrent-index-creation"},
    "0010_upkeep.sql": {"require-concurrent-index-deletion", "renaming-object"},
}
"""Which rules were broken before there were any. 0.1.0, the first release, has all of these files: they have only ever
run on empty tables."""

ALONE = re.compile(
    r"(CREATE (UNIQUE )?INDEX CONCURRENTLY|DROP INDEX CONCURRENTLY|ALTER TABLE \w+ VALIDATE CONSTRAINT) [^;]*;?\s*"
)
"""What may stand outside a transaction: it waits for a lock without a bound, so no charge may wait behind it."""

_COLUMNS = """
    SELECT format('%%s.%%s', c.relname, a.attname) AS name, format_type(a.atttypid, a.atttypmod) AS type,
           a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS is_wanted
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
"""
_FILES = """
    SELECT relname AS name, pg_relation_filenode(oid) AS file FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
"""


def broken_rules(text: str, directory: Path, name: str = "0099_new.sql") -> set[str]:
    """What squawk says of a migration."""
    file = directory / name
    file.write_text(text)
    is_alone = text.startswith("-- no-transaction")
    told = subprocess.run(
        [
            SQUAWK,
            f"--config={CHECKOUT / '.squawk.toml'}",
            "--reporter=json",
            *([] if is_alone else ["--assume-in-transaction"]),
            file,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return {str(each["rule_name"]) for each in json.loads(told.stdout)}


async def faults(url: str, migrations: list[Migration]) -> set[str]:
    """What the migrations take from those who use the schema as it is."""
    columns = {row["name"]: row for row in await query(url, _COLUMNS)}
    files = {row["name"]: row["file"] for row in await query(url, _FILES)}
    await migrate(url, migrations)
    columns_now = {row["name"]: row for row in await query(url, _COLUMNS)}
    files_now = {row["name"]: row["file"] for row in await query(url, _FILES)}
    found = {f"{name} is gone or renamed" for name in columns.keys() - columns_now.keys()}
    found |= {f"{table} was rewritten" for table in files.keys() & files_now.keys() if files[table] != files_now[table]}
    for name, column in columns_now.items():
        before = columns.get(name)
        if before is not None and before["type"] != column["type"]:
            found.add(f"{name} has another type")
        is_of_old_table = str(name).split(".")[0] in files
        if is_of_old_table and column["is_wanted"] and not (before and before["is_wanted"]):
            found.add(f"{name} wants a value that the release before does not give")
    return found


@pytest.fixture
async def released_url(empty_database_url: str, previous_release: PreviousRelease) -> str:
    """A database as the release before has made it, with sample payments."""
    await migrate(empty_database_url, previous_release.migrations())
    async with await psycopg.AsyncConnection.connect(empty_database_url, autocommit=True) as connection:
        await connection.execute((previous_release.directory / "eci_pay/sql/sample_data.sql").read_bytes())
    return empty_database_url


def test_no_migration_breaks_a_rule(tmp_path: Path) -> None:
    found = {file.name: broken_rules(file.text, tmp_path, file.name) for file in bundled_migrations()}
    assert {name: rules for name, rules in found.items() if rules} == LANDED
    for migration in bundled_migrations():
        if not migration.in_transaction:
            statement = re.sub("^--.*\n", "", migration.text, flags=re.MULTILINE).strip()
            assert ALONE.fullmatch(statement), migration.name


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("CREATE INDEX i ON payments (amount);", "require-concurrent-index-creation"),
        ("DROP INDEX idx_payments_status;", "require-concurrent-index-deletion"),
        ("ALTER TABLE payments ADD COLUMN c uuid DEFAULT gen_random_uuid();", "adding-field-with-default"),
        ("ALTER TABLE payments ADD COLUMN c integer NOT NULL;", "adding-required-field"),
        ("ALTER TABLE payments ALTER COLUMN reference SET NOT NULL;", "adding-not-nullable-field"),
        ("ALTER TABLE payments ALTER COLUMN attempt TYPE bigint;", "changing-column-type"),
        ("ALTER TABLE payments RENAME COLUMN reference TO other;", "renaming-column"),
        ("ALTER TABLE payments RENAME TO others;", "renaming-table"),
        ("ALTER TABLE payments DROP COLUMN reference;", "ban-drop-column"),
        ("DROP TABLE bulk_runs;", "ban-drop-table"),
        ("ALTER TABLE payments ADD CONSTRAINT c CHECK (amount > 1);", "constraint-missing-not-valid"),
        (
            "ALTER TABLE refunds ADD CONSTRAINT f FOREIGN KEY (payment_id) REFERENCES payments;",
            "adding-foreign-key-constraint",
        ),
        ("ALTER TABLE payments ADD CONSTRAINT u UNIQUE (reference);", "disallowed-unique-constraint"),
        (
            "ALTER TABLE payments ADD CONSTRAINT c CHECK (amount > 1) NOT VALID;\n"
            "ALTER TABLE payments VALIDATE CONSTRAINT c;",
            "constraint-missing-not-valid",
        ),
    ],
)
def test_what_would_keep_charges_waiting_breaks_a_rule(tmp_path: Path, statement: str, rule: str) -> None:
    assert rule in broken_rules(statement, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "CREATE TABLE things (id bigint PRIMARY KEY, name text);\nCREATE INDEX i ON things (name);",
        "ALTER TABLE payments ADD COLUMN c varchar(20), ADD COLUMN d integer NOT NULL DEFAULT 0;",
        "ALTER TABLE payments ADD CONSTRAINT c CHECK (amount > 1) NOT VALID;",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS i ON payments (amount)",
        "-- no-transaction\nALTER TABLE payments VALIDATE CONSTRAINT c",
    ],
)
def test_what_charges_do_not_wait_for_breaks_none(tmp_path: Path, text: str) -> None:
    assert broken_rules(text, tmp_path) == set()


async def test_the_release_before_finds_all_that_it_uses_and_no_table_is_rewritten(released_url: str) -> None:
    assert await faults(released_url, bundled_migrations()) == set()


async def test_what_the_release_before_would_miss_is_found(
    released_url: str, previous_release: PreviousRelease, tmp_path: Path
) -> None:
    bad = """
        ALTER TABLE payments DROP COLUMN reference;
        ALTER TABLE refunds ALTER COLUMN gateway_response TYPE text;
        ALTER TABLE outbox ADD COLUMN c timestamptz DEFAULT clock_timestamp();
        ALTER TABLE bulk_runs ADD COLUMN d integer NOT NULL DEFAULT 0;
        ALTER TABLE bulk_runs ALTER COLUMN d DROP DEFAULT;
        ALTER TABLE payments ALTER COLUMN previous_status SET NOT NULL;
    """
    await query(released_url, "UPDATE payments SET previous_status = 'FAILED'")
    known = {migration.name: migration.text for migration in previous_release.migrations()}
    folder = bundled_migrations(written(tmp_path / "m", {**known, "9999_bad.sql": bad}))
    assert await faults(released_url, folder) == {
        "payments.reference is gone or renamed",
        "refunds.gateway_response has another type",
        "outbox was rewritten",
        "bulk_runs.d wants a value that the release before does not give",
        "payments.previous_status wants a value that the release before does not give",
    }
