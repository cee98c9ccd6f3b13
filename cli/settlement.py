"""The commands `settlement ...`: settlement files to try a reconciliation with."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import output
from cli.deferred import QuickGroup
from cli.output import JsonOption
from cli.runtime import run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.settlement_export import Exported

STANDARD_OUTPUT = "-"

settlement = typer.Typer(
    name="settlement",
    cls=QuickGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Settlement files of the simulated gateway.",
    epilog="Example: eci-pay settlement export --date 2026-11-22 --output settlement.csv",
)


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.add_typer(settlement)


@settlement.callback()
def _group() -> None:
    """Keeps the name of its only command."""


@settlement.command(epilog="Example: eci-pay settlement export --date 2026-11-22 --output settlement.csv")
def export(
    day: Annotated[str, typer.Option("--date", metavar="DAY", help="Such as 2026-11-22, in UTC.")],
    file: Annotated[str, typer.Option("--output", metavar="FILE", help="- is standard output.")] = STANDARD_OUTPUT,
    file_format: Annotated[Literal["csv", "jsonl"], typer.Option("--format")] = "csv",
    as_json: JsonOption = False,
) -> None:
    """Write what the simulated gateway settled on a day, as its settlement file."""
    from eci_pay.table_files import FileFormat

    wanted = _parse_day(day)
    with written(file) as write:
        exported = run_use_case(lambda service: service.settlements.export(wanted, FileFormat(file_format), write))
    _print_exported(exported, to_file=file != STANDARD_OUTPUT)


def _parse_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise errors.InvalidRequest(f"--date: {text}: is no day such as 2026-11-22") from None


@contextmanager
def written(file: str) -> Iterator[Callable[[str], object]]:
    """Writes text to a file, which is replaced at the end or stays as it was, or to standard output. Raises
    InvalidRequest where the file cannot be made."""
    if file == STANDARD_OUTPUT:
        yield lambda text: sys.stdout.buffer.write(text.encode())
        return
    path = Path(file).resolve()
    if path.exists() and not path.is_file():
        raise errors.InvalidRequest(f"{file}: is no file")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        stream = part.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise errors.InvalidRequest(f"{file}: cannot be written: {error.strerror}") from None
    try:
        with stream:
            yield stream.write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _print_exported(exported: "Exported", *, to_file: bool) -> None:
    from eci_pay.money import plain

    sums = {
        currency: {name: plain(amount, currency) for name, amount in asdict(each).items()}
        for currency, each in sorted(exported.sums.items())
    }
    if output.Mode.json and to_file:
        output.print_json({"lines": exported.lines, "sums": sums})
        return
    output.note(f"{exported.lines:,} lines")
    for currency, each in sums.items():
        output.note(f"{currency} {each['charged']} charged, {each['refunded']} refunded, {each['fees']} in fees")
