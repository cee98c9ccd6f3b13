"""Migrations: from any version to the newest, once each, by several processes at a time, or not at all."""

import asyncio
from collections import Counter
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from eci_pay import migrations
from eci_pay.errors import MigrationError, SchemaOutdated, Unavailable
from eci_pay.migrations import bundled_migrations, check_schema, migrate
from tests.support import CommandLine, until
from tests.test_schema import EVERYTHING, TABLES, new_database, schema_of

ALL_TABLES = (*TABLES, "schema_migrations")
NAMES = [migration.name for migration in bundled_migrations()]
FIRST = {"0001_first.sql": "CREATE TABLE things (id bigint PRIMARY KEY, label text);\n"}
CONCURRENTLY = {
    **FIRST,
    "0002_index.sql": (
        "-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS idx_things_label ON things (label);\n"
    ),
}

_CUT_OFF = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE '%%CREATE INDEX%%' AND wait_event_type = 'Lock'
"""


@pytest.fixture
def empty_command_line(empty_database_url: str, tmp_path: Path) -> CommandLine:
    """The installed command on an empty database."""
    return CommandLine({"DATABASE_URL": empty_database_url}, tmp_path)


def written(folder: Path, texts: dict[str, str]) -> Path:
    """The folder, holding these migrations and no others."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return folder


async def query(url: str, text: str, *parameters: object) -> list[dict[str, object]]:
    """The rows of a query, on a connection of its own."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        cursor = await connection.execute(text.encode(), parameters)
        return await cursor.fetchall() if cursor.description else []


async def applied_names(url: str) -> list[object]:
    """What the database's record says."""
    return [row["name"] for row in await query(url, "SELECT name FROM schema_migrations ORDER BY version")]


async def tables(url: str) -> list[str]:
    """The names of all tables."""
    rows = await query(
        url, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    )
    return sorted(str(row["relname"]) for row in rows)


async def test_an_empty_database_gets_every_file_in_order_and_then_nothing(empty_database_url: str) -> None:
    bundled = bundled_migrations()
    assert await migrate(empty_database_url, bundled) == bundled
    assert await applied_names(empty_database_url) == NAMES == sorted(NAMES)
    assert await migrate(empty_database_url, bundled) == []
    assert await check_schema(empty_database_url, bundled) == []


@pytest.mark.parametrize("version", range(1, len(NAMES)))
async def test_every_earlier_version_is_brought_to_the_same_schema(
    server_url: str, database_url: str, version: int
) -> None:
    bundled = bundled_migrations()
    async with new_database(server_url) as url:
        await migrate(url, bundled[:version])
        with pytest.raises(SchemaOutdated, match=NAMES[version]):
            await check_schema(url, bundled)
        assert await migrate(url, bundled) == bundled[version:]
        assert await schema_of(url, EVERYTHING, ALL_TABLES) == await schema_of(database_url, EVERYTHING, ALL_TABLES)


async def test_four_migrations_at_once_apply_each_file_once(empty_database_url: str) -> None:
    bundled = bundled_migrations()
    runs = await asyncio.gather(*(migrate(empty_database_url, bundled) for _ in range(4)))
    assert Counter(migration.name for run in runs for migration in run) == Counter(NAMES)
    assert await applied_names(empty_database_url) == NAMES


async def test_two_migrate_commands_at_once_apply_each_file_once(empty_command_line: CommandLine) -> None:
    results = await asyncio.gather(*(empty_command_line.run("migrate", "--json") for _ in range(2)))
    assert [(result.exit_code, result.stderr) for result in results] == [(0, ""), (0, "")]
    assert Counter(name for result in results for name in result.json["applied"]) == Counter(NAMES)


async def test_a_file_that_changed_after_it_was_applied_is_an_error_that_names_it(
    empty_database_url: str, tmp_path: Path
) -> None:
    await migrate(empty_database_url, bundled_migrations(written(tmp_path / "m", FIRST)))
    changed = {"0001_first.sql": FIRST["0001_first.sql"] + "-- and more\n", "0002_second.sql": "CREATE TABLE more ();"}
    with pytest.raises(MigrationError, match=r"0001_first\.sql"):
        await migrate(empty_database_url, bundled_migrations(written(tmp_path / "m", changed)))
    renamed = {"0001_other.sql": FIRST["0001_first.sql"]}
    with pytest.raises(MigrationError, match=r"0001_other\.sql.*0001_first\.sql"):
        await migrate(empty_database_url, bundled_migrations(written(tmp_path / "m", renamed)))
    assert await tables(empty_database_url) == ["schema_migrations", "things"]


async def test_a_changed_file_is_no_newer_schema_and_stops_the_start_too(
    empty_database_url: str, tmp_path: Path
) -> None:
    await migrate(empty_database_url, bundled_migrations(written(tmp_path / "m", FIRST)))
    changed = bundled_migrations(written(tmp_path / "m", {"0001_first.sql": "CREATE TABLE things ();"}))
    with pytest.raises(MigrationError, match=r"0001_first\.sql"):
        await check_schema(empty_database_url, changed)


async def test_a_newer_schema_is_an_error_for_migrate_and_a_warning_for_the_start(database_url: str) -> None:
    await query(database_url, "INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', 'x')")
    assert await check_schema(database_url, bundled_migrations()) == ["9999_future.sql"]
    with pytest.raises(MigrationError, match=r"9999_future\.sql"):
        await migrate(database_url, bundled_migrations())


async def test_a_database_without_any_migration_is_outdated(empty_database_url: str) -> None:
    with pytest.raises(SchemaOutdated, match="eci-pay migrate"):
        await check_schema(empty_database_url, bundled_migrations())


async def test_a_failing_migration_is_named_leaves_nothing_of_itself_and_can_be_mended(
    empty_database_url: str, tmp_path: Path
) -> None:
    broken = {**FIRST, "0002_broken.sql": "CREATE TABLE halfway (); SELECT 1 / 0;", "0003_later.sql": "SELECT 1;"}
    with pytest.raises(MigrationError, match=r"0002_broken\.sql: division by zero"):
        await migrate(empty_database_url, bundled_migrations(written(tmp_path / "m", broken)))
    assert await tables(empty_database_url) == ["schema_migrations", "things"]
    assert await applied_names(empty_database_url) == ["0001_first.sql"]
    mended = bundled_migrations(written(tmp_path / "m", {**broken, "0002_broken.sql": "CREATE TABLE whole ();"}))
    assert [migration.version for migration in await migrate(empty_database_url, mended)] == [2, 3]


async def test_two_concurrent_runs_build_an_index_concurrently(empty_database_url: str, tmp_path: Path) -> None:
    folder = bundled_migrations(written(tmp_path / "m", CONCURRENTLY))
    async with asyncio.timeout(30):
        runs = await asyncio.gather(*(migrate(empty_database_url, folder) for _ in range(2)))
    assert sorted(len(run) for run in runs) == [0, 2]
    assert await index_is_valid(empty_database_url)


async def test_a_migration_that_waits_for_a_table_does_not_keep_others_from_it(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TRY_SECONDS", 0.1)
    monkeypatch.setattr(migrations, "LOCK_PAUSE_SECONDS", 0.2)
    texts = {"0001_t.sql": "CREATE TABLE t (a int)", "0002_column.sql": "ALTER TABLE t ADD COLUMN b int"}
    folder = bundled_migrations(written(tmp_path / "m", texts))
    await migrate(empty_database_url, folder[:1])
    async with await psycopg.AsyncConnection.connect(empty_database_url) as reader:
        await reader.execute(b"SELECT a FROM t")
        migrating = asyncio.create_task(migrate(empty_database_url, folder))

        async def waits() -> bool:
            waiting = "SELECT pid FROM pg_locks WHERE relation = 't'::regclass AND NOT granted"
            return await query(empty_database_url, waiting) != []

        await until(waits)
        async with asyncio.timeout(5):
            assert await query(empty_database_url, "SELECT a FROM t") == []
        assert not migrating.done()
    assert [migration.version for migration in await migrating] == [2]


async def test_a_migration_that_is_the_victim_of_a_deadlock_is_run_again(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_PAUSE_SECONDS", 0.1)
    texts = {
        "0001_tables.sql": "CREATE TABLE a (x int); CREATE TABLE b (x int)",
        "0002_columns.sql": "ALTER TABLE a ADD COLUMN y int; ALTER TABLE b ADD COLUMN y int",
    }
    folder = bundled_migrations(written(tmp_path / "m", texts))
    await migrate(empty_database_url, folder[:1])
    async with await psycopg.AsyncConnection.connect(empty_database_url) as writer:
        await writer.execute("SET deadlock_timeout = '60s'")  # so that it is not the one that is chosen
        await writer.execute("INSERT INTO b VALUES (1)")
        migrating = asyncio.create_task(migrate(empty_database_url, folder))
        await until(lambda: query(empty_database_url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        await writer.execute("INSERT INTO a VALUES (1)")
    assert [migration.version for migration in await migrating] == [2]


async def test_a_file_without_a_transaction_runs_again_where_its_record_was_lost(
    empty_database_url: str, tmp_path: Path
) -> None:
    folder = bundled_migrations(written(tmp_path / "m", CONCURRENTLY))
    await migrate(empty_database_url, folder)
    await query(empty_database_url, "DELETE FROM schema_migrations WHERE version = 2")
    assert [migration.version for migration in await migrate(empty_database_url, folder)] == [2]
    assert await index_is_valid(empty_database_url)


async def test_an_index_whose_building_was_cut_off_is_valid_after_the_next_run(
    empty_database_url: str, tmp_path: Path
) -> None:
    folder = bundled_migrations(written(tmp_path / "m", CONCURRENTLY))
    await migrate(empty_database_url, folder[:1])
    async with await psycopg.AsyncConnection.connect(empty_database_url) as writer:
        await writer.execute("INSERT INTO things VALUES (1)")  # the building waits for it to commit
        building = asyncio.create_task(migrate(empty_database_url, folder))
        await until(lambda: query(empty_database_url, _CUT_OFF))
        with pytest.raises(Unavailable, match=r"0002_index\.sql"):
            await building
    await migrate(empty_database_url, folder)
    assert await index_is_valid(empty_database_url)


async def index_is_valid(url: str) -> object:
    """Whether the index of CONCURRENTLY can be used."""
    (row,) = await query(url, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_things_label'::regclass")
    return row["indisvalid"]


async def test_a_run_that_waits_too_long_for_another_gives_up(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_MAX_SECONDS", 0.2)
    async with await psycopg.AsyncConnection.connect(empty_database_url) as other:
        await other.execute("SELECT pg_advisory_lock(%s)", (migrations.LOCK_ID,))
        with pytest.raises(Unavailable, match="another migration"):
            await migrate(empty_database_url, bundled_migrations())
    assert await migrate(empty_database_url, bundled_migrations()) == bundled_migrations()


@pytest.mark.parametrize("name", ["1_short.sql", "0001-dash.sql", "0001_Upper.sql", "0001_.sql", "first.sql"])
def test_a_file_whose_name_does_not_fit_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(MigrationError, match=name):
        bundled_migrations(written(tmp_path / "m", {name: "SELECT 1;"}))


def test_two_files_of_one_version_are_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match=r"0001_a\.sql and 0001_b\.sql"):
        bundled_migrations(written(tmp_path / "m", {"0001_b.sql": "", "0001_a.sql": "", "0002_c.sql": ""}))


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", {**FIRST, "README.md": "", "__init__.py": ""})
    assert [migration.name for migration in bundled_migrations(folder)] == ["0001_first.sql"]


def test_a_checkout_with_windows_line_ends_has_the_same_checksums(tmp_path: Path) -> None:
    texts = {migration.name: migration.text for migration in bundled_migrations()}
    crlf = bundled_migrations(
        written(tmp_path / "m", {name: text.replace("\n", "\r\n") for name, text in texts.items()})
    )
    assert [migration.checksum for migration in crlf] == [migration.checksum for migration in bundled_migrations()]
    changed = bundled_migrations(written(tmp_path / "m", {name: text + "-- x" for name, text in texts.items()}))
    assert {migration.checksum for migration in changed}.isdisjoint(migration.checksum for migration in crlf)


async def test_status_and_dry_run_tell_what_is_pending_and_change_nothing(
    empty_command_line: CommandLine, empty_database_url: str
) -> None:
    await migrate(empty_database_url, bundled_migrations()[:2])
    tables_before = await tables(empty_database_url)
    status, dry_run, plain, sql = await asyncio.gather(
        empty_command_line.run("migrate", "--status", "--json"),
        empty_command_line.run("migrate", "--dry-run", "--json"),
        empty_command_line.run("migrate", "--status"),
        empty_command_line.run("migrate", "--dry-run"),
    )
    assert [bool(state["applied_at"]) for state in status.json] == [version < 2 for version in range(len(NAMES))]
    assert [pending["name"] for pending in dry_run.json] == NAMES[2:]
    assert (plain.exit_code, sql.exit_code) == (0, 0)
    assert plain.stdout.count("pending") == len(NAMES) - 2
    assert all(migration.text in sql.stdout for migration in bundled_migrations()[2:])
    assert await applied_names(empty_database_url) == NAMES[:2]
    assert await tables(empty_database_url) == tables_before


async def test_status_and_dry_run_of_an_empty_database_leave_it_empty(
    empty_command_line: CommandLine, empty_database_url: str
) -> None:
    results = await asyncio.gather(*(empty_command_line.run("migrate", how) for how in ("--status", "--dry-run")))
    assert [result.exit_code for result in results] == [0, 0]
    assert await tables(empty_database_url) == []


async def test_the_command_says_which_file_is_wrong(command_line: CommandLine, database_url: str) -> None:
    await query(database_url, "INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', 'x')")
    for arguments in (["migrate"], ["migrate", "--status"], ["migrate", "--dry-run"]):
        result = await command_line.run(*arguments)
        assert (result.exit_code, "9999_future.sql" in result.stderr) == (3, True)
        assert "Traceback" not in result.stderr
