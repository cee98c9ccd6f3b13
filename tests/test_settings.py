"""Settings: what the environment may say, and what is told where it says something else."""

import os
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from eci_pay.errors import SettingsInvalid
from eci_pay.settings import load_settings
from tests.support import CommandLine

SECRET = "hunter2secret"
OURS = ("DATABASE_URL", "LOG_LEVEL", "SERVICE_NAME", "ORDER_SERVICE_URL", "INVENTORY_SERVICE_URL")


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*OURS, *(name for name in os.environ if name.upper().startswith("ECI_PAY_"))]:
        monkeypatch.delenv(name, raising=False)


def test_an_empty_environment_is_valid_and_means_the_embedded_database() -> None:
    settings = load_settings()
    assert settings.database_url is None
    assert (settings.log_level, settings.service_name, settings.eci_pay_gateway) == (
        "INFO",
        "payment-service",
        "simulated",
    )


def test_variables_that_are_set_to_nothing_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for name in ("LOG_LEVEL", "ECI_PAY_DATA_DIR", "ECI_PAY_DATABASE_POOL_SIZE"):
        monkeypatch.setenv(name, "")
    settings = load_settings()
    assert (settings.log_level, settings.eci_pay_data_dir, settings.eci_pay_database_pool_size) == ("INFO", None, 10)


def test_an_empty_database_url_is_a_fault_and_not_a_private_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(SettingsInvalid, match="DATABASE_URL: is set but empty"):
        load_settings()


def test_the_environment_is_read_and_then_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ECI_PAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ECI_PAY_PREPARE_STATEMENTS", "false")
    monkeypatch.setenv("ECI_PAY_LOCK_TIMEOUT_SECONDS", "0")
    monkeypatch.setenv("ECI_PAY_NOBODY_KNOWS", "1")
    settings = load_settings()
    assert settings.embedded_data_dir() == tmp_path
    assert (settings.eci_pay_prepare_statements, settings.eci_pay_lock_timeout_seconds) == (False, 0)
    with pytest.raises(ValidationError):
        settings.log_level = "DEBUG"  # type: ignore[misc]


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ada:{SECRET}@db.example:5432/books",
        f"postgres://ada:{SECRET}@db.example/books?sslmode=require",
        f"postgresql+psycopg://ada:{SECRET}@db.example/books",
        f"postgresql://ada:{SECRET}@one.example,two.example/books?target_session_attrs=read-write",
        f"host=db.example user=ada password={SECRET} dbname=books",
    ],
)
def test_every_spelling_of_the_database_url_is_taken_and_never_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    settings = load_settings()
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url.replace("postgresql+psycopg://", "postgresql://")
    for shown in (str(settings), repr(settings), settings.model_dump_json()):
        assert SECRET not in shown


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://ada:{SECRET}@db.example/books",
        f"postgresql+asyncpg://ada:{SECRET}@db.example/books",
        f"postgresql://ada:{SECRET}@db.example/books?nonsense=1",
        f"postgresql://ada:{SECRET}@[db.example/books",
        f"ada:{SECRET}@db.example",
    ],
)
def test_a_database_url_that_is_none_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(SettingsInvalid) as told:
        load_settings()
    (fault,) = told.value.faults
    assert fault.startswith("DATABASE_URL: ")
    assert SECRET not in "".join(traceback.format_exception(told.value)) + repr(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOG_LEVEL", "LOUD"),
        ("ECI_PAY_LOG_FORMAT", "xml"),
        ("ECI_PAY_GATEWAY", "none"),
        ("ECI_PAY_DATABASE_POOL_SIZE", "0"),
        ("ECI_PAY_DATABASE_POOL_SIZE", "201"),
        ("ECI_PAY_DATABASE_POOL_SIZE", "ten"),
        ("ECI_PAY_DATABASE_POOL_TIMEOUT_SECONDS", "0"),
        ("ECI_PAY_DATABASE_QUEUE_MAX", "0"),
        ("ECI_PAY_PREPARE_STATEMENTS", "maybe"),
        ("ECI_PAY_LOCK_TIMEOUT_SECONDS", "-1"),
        ("ECI_PAY_STATEMENT_TIMEOUT_SECONDS", "nan"),
        ("ECI_PAY_STATEMENT_TIMEOUT_SECONDS", "inf"),
        ("ECI_PAY_SEND_DEADLINE_SECONDS", "0"),
        ("ECI_PAY_SEND_DEADLINE_SECONDS", "nan"),
        ("ECI_PAY_SEND_DEADLINE_SECONDS", "inf"),
        ("ECI_PAY_SETTLE_RETRY_SECONDS", "inf"),
        ("ECI_PAY_EXPIRE_KEYS_INTERVAL_SECONDS", "0"),
        ("ECI_PAY_BODY_MAX_BYTES", "10"),
        ("ECI_PAY_HEADERS_MAX_BYTES", "10"),
        ("ECI_PAY_READ_TIMEOUT_SECONDS", "0"),
        ("ECI_PAY_KEEP_ALIVE_SECONDS", "0"),
        ("ECI_PAY_CONNECTIONS_MAX", "0"),
        ("ECI_PAY_REQUESTS_MAX", "0"),
        ("ECI_PAY_CORS_ORIGINS", "*"),
        ("ECI_PAY_CORS_ORIGINS", "https://shop.example/"),
        ("ECI_PAY_CORS_ORIGINS", "https://Shop.example"),
        ("ECI_PAY_CORS_ORIGINS", "https://shop.example,,https://desk.example"),
        ("ECI_PAY_CORS_ORIGINS", "shop.example"),
        ("ECI_PAY_CORS_ORIGINS", "null"),
        ("ECI_PAY_CORS_ORIGINS", "https://ada:s3cret@shop.example"),
        ("ECI_PAY_SHUTDOWN_TIMEOUT_SECONDS", "0"),
        ("ECI_PAY_SIMULATED_LATENCY_SECONDS", "-0.1"),
    ],
)
def test_a_value_that_cannot_work_is_one_fault_that_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid) as told:
        load_settings()
    (fault,) = told.value.faults
    assert fault.startswith(f"{name}: ")


async def test_a_command_with_wrong_settings_ends_with_a_line_per_fault(tmp_path: Path) -> None:
    environment = {
        "DATABASE_URL": f"mysql://ada:{SECRET}@db.example/books",
        "LOG_LEVEL": "LOUD",
        "ECI_PAY_DATABASE_POOL_SIZE": "0",
    }
    for command in (["serve"], ["migrate"], ["show", "1"]):
        result = await CommandLine(environment, tmp_path).run(*command)
        assert result.exit_code == 2
        assert result.stdout == ""
        for name in environment:
            assert sum(f"{name}: " in line for line in result.stderr.splitlines()) == 1
        assert SECRET not in result.stderr
        assert "Traceback" not in result.stderr
