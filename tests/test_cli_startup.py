"""What the command line imports before it knows what it is asked: as little as Typer lets it."""

import asyncio
import pkgutil
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import typer
from typer.main import get_group

import cli
from cli.commands import COMMANDS
from cli.deferred import DeferredCommand
from tests.support import COMMAND, COMMAND_TIMEOUT_SECONDS, CommandLine

HEAVY = {
    *("aiohttp", "asyncio", "httpx", "prometheus_client", "psycopg", "psycopg_pool", "pydantic", "pydantic_settings"),
    *("rich", "sqlalchemy", "sqlmodel", "starlette", "stripe", "structlog", "uvicorn"),
}
SHOWING = {"asyncio", "psycopg", "psycopg_pool", "pydantic", "pydantic_settings"}
START = {"cli", "cli.main", "cli.commands", "cli.deferred"}
HELP = [
    ["--help"],
    [],
    ["no-such-command"],
    *([name, "--help"] for name in COMMANDS),
    ["outbox", "list", "--help"],
    ["settlement", "export", "--help"],
]


async def imported(command_line: CommandLine, *arguments: str) -> set[str]:
    """The modules that a command imports, from the first line of its script to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", str(COMMAND), *arguments),
        cwd=command_line.directory,
        env=command_line.full_environment(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
        _, stderr = await process.communicate()
    lines = [line for line in stderr.decode().splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def heavy(modules: set[str]) -> set[str]:
    """The heavy packages among them."""
    return HEAVY & {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
async def test_help_imports_nothing_heavy(command_line: CommandLine, arguments: list[str]) -> None:
    modules = await imported(command_line, *arguments)
    assert "typer" in modules
    assert heavy(modules) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []], ids=" ".join)
async def test_the_overview_imports_no_command(command_line: CommandLine, arguments: list[str]) -> None:
    modules = await imported(command_line, *arguments)
    assert {module for module in modules if module.partition(".")[0] in ("cli", "eci_pay", "server")} == START


async def test_a_payment_is_shown_without_what_only_a_server_needs(command_line: CommandLine) -> None:
    charge = ("charge", "--order-id=1", "--user-id=7", "--amount=10", "--method=UPI")
    assert (await command_line.run(*charge)).exit_code == 0
    assert heavy(await imported(command_line, "show", "1")) == {*SHOWING, "rich"}
    assert heavy(await imported(command_line, "show", "1", "--json")) == SHOWING


async def test_a_shell_that_completes_a_name_waits_for_nothing_heavy(command_line: CommandLine) -> None:
    for words, last, completed in (("eci-pay sh", 1, "show"), ("eci-pay outbox pu", 2, "purge")):
        completing = {"_ECI_PAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(last)}
        shell = replace(command_line, environment={**command_line.environment, **completing})
        assert heavy(await imported(shell)) == set()
        assert (await shell.run()).stdout.split() == [completed]


async def test_a_shell_completes_the_options_of_a_command(command_line: CommandLine) -> None:
    completing = {"_ECI_PAY_COMPLETE": "complete_bash", "COMP_WORDS": "eci-pay outbox purge --o", "COMP_CWORD": "3"}
    shell = replace(command_line, environment={**command_line.environment, **completing})
    assert (await shell.run()).stdout.split() == ["--older-than"]


def test_the_table_of_commands_says_what_they_say_themselves() -> None:
    registered: dict[str, tuple[str, str | None]] = {}
    for found in pkgutil.iter_modules(cli.__path__, "cli."):
        module = import_module(found.name)
        if hasattr(module, "register"):
            group = typer.Typer()
            module.register(group)
            registered |= {name: (found.name, command.help) for name, command in get_group(group).commands.items()}
    assert registered == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_deferred_command_is_summed_up_as_the_one_that_it_stands_for(name: str) -> None:
    deferred = DeferredCommand(name, *COMMANDS[name])
    command = deferred.load()
    for length in (20, 45, 200):
        assert deferred.get_short_help_str(length) == command.get_short_help_str(length)
    assert (command.name, command.hidden) == (name, False)
