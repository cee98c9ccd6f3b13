"""The commands `settlement ...`: settlement files to try a reconciliation with."""

from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import output
from cli.deferred import QuickGroup
from cli.files import STANDARD_STREAM, written
from cli.output import JsonOption
from cli.runtime import run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.settlement_export import Exported

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
    file: Annotated[str, typer.Option("--output", metavar="FILE", help="- is standard output.")] = STANDARD_STREAM,
    file_format: Annotated[Literal["csv", "jsonl"], typer.Option("--format")] = "csv",
    as_json: JsonOption = False,
) -> None:
    """Write what the simulated gateway settled on a day, as its settlement file."""
    from eci_pay.table_files import FileFormat

    wanted = _parse_day(day)
    with written(file) as write:
        exported = run_use_case(lambda service: service.settlements.export(wanted, FileFormat(file_format), write))
    _print_exported(exported, to_file=file != STANDARD_STREAM)


def _parse_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise errors.InvalidRequest(f"--date: {text}: is no day such as 2026-11-22") from None


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
