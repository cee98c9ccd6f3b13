"""The command `reconcile`: finds every difference between our books and the gateway's, and repairs what is certain."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.main import get_group

from cli import output
from cli.files import STANDARD_STREAM, opened, written
from cli.output import JsonOption
from cli.prompts import agrees, require_terminal
from cli.reconcile_output import difference_writer, print_history, print_outcome, print_plan
from cli.runtime import operator, run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.differences import Difference, Report
    from eci_pay.reconciliation import Job
    from eci_pay.repairs import Repair, Repaired
    from eci_pay.service import PaymentService

EXIT_DIFFERENCES = 1
OTHERS = ("history", "close")
HISTORY_MAX = 1000
FILE_NAME_LENGTH_MAX = 500


class _WithOthers(TyperCommand):
    """`reconcile history` and `reconcile close` are commands of their own; files of such names are `./history`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Where Typer begins with a command."""
        name = args[0] if args else ""
        if name not in OTHERS:
            return super().make_context(info_name, args, parent=parent, **extra)
        group = typer.Typer(rich_markup_mode=None)
        group.command("history", epilog="Example: eci-pay reconcile history --limit 7")(history)
        group.command("close", epilog="Example: eci-pay reconcile close 42")(close)
        command = get_group(group).commands[name]
        return command.make_context(f"{info_name} {name}", args[1:], parent=parent, **extra)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(cls=_WithOthers, epilog="Example: eci-pay reconcile settlement.csv --report settlement.html")(reconcile)


def reconcile(
    file: Annotated[
        str | None,
        typer.Argument(metavar="SETTLEMENT_FILE|-", help="What the gateway settled; - reads standard input."),
    ] = None,
    period_from: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DATE", help="The period's begin (UTC date or instant); else the file's first day."
        ),
    ] = None,
    period_to: Annotated[
        str | None, typer.Option("--to", metavar="DATE", help="Its end, exclusive; else after the file's last day.")
    ] = None,
    file_format: Annotated[Literal["auto", "csv", "jsonl"], typer.Option("--format")] = "auto",
    fix: Annotated[bool, typer.Option("--fix", help="Repair what is certain, after asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --fix: only show what would be repaired.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fix: do not ask.")] = False,
    report_file: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE.html", help="Write a report that a browser shows and prints."),
    ] = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write every difference, one a line.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the books, and compare them with the gateway's settlement file; `reconcile history` lists the runs."""
    if (dry_run or yes) and not fix:
        raise errors.InvalidRequest("--dry-run and --yes go with --fix")
    if STANDARD_STREAM in (report_file, csv_file):
        raise errors.InvalidRequest("--report and --csv write files")
    for written_file in (report_file, csv_file):
        if file and written_file and _is_same(file, written_file):
            raise errors.InvalidRequest(f"{written_file}: is the settlement file itself")
    if fix and not (dry_run or yes):
        require_terminal(to="repair")
    from eci_pay.reconciliation import Job
    from eci_pay.requests import parse_instant
    from eci_pay.table_files import FileFormat, TableFile

    start = None if period_from is None else parse_instant(period_from, "--from")
    end = None if period_to is None else parse_instant(period_to, "--to")
    with ExitStack() as stack:
        table = None
        if file is not None:
            name = output.printable(file)[-FILE_NAME_LENGTH_MAX:]
            table = TableFile(stack.enter_context(opened(file)), name, FileFormat(file_format))
        differences = stack.enter_context(_differences_written(csv_file))
        write_report = stack.enter_context(written(report_file)) if report_file else None
        session = _Session(
            job=Job(operator=operator(), file=table, made_at=_made_at(file), period_from=start, period_to=end),
            bytes_total=_size(file),
            on_difference=differences,
            fix=fix,
            dry_run=dry_run,
            yes=yes,
        )
        report = run_use_case(session.run, changes=fix and not dry_run)
        if write_report:
            from cli.reconcile_report import report_html

            for piece in report_html(report):
                write_report(piece)
    for warning in (*(table.warnings if table else ()), *report.warnings):
        output.note(f"warning: {warning}")
    print_outcome(report, session.repairs, session.made)
    if not report.is_clean:
        raise typer.Exit(EXIT_DIFFERENCES)


@dataclass(kw_only=True)
class _Session:
    """One run of the command while the service is open."""

    job: "Job"
    bytes_total: int | None
    on_difference: "Callable[[Difference], None]"
    fix: bool
    dry_run: bool
    yes: bool
    repairs: "list[Repair]" = field(default_factory=list)
    made: "list[Repaired]" = field(default_factory=list)

    async def run(self, service: "PaymentService") -> "Report":
        """Reconciles, and repairs what is agreed to."""
        from eci_pay.reconciliation import Watch

        with _progress(self.bytes_total, with_file=self.job.file is not None) as (on_bytes, on_books):
            watch = Watch(on_bytes=on_bytes, on_books=on_books, on_difference=self.on_difference)
            report, self.repairs = await service.reconciliation.run(self.job, watch)
        if not (self.fix and self.repairs):
            return report
        print_plan(report, self.repairs)
        if self.dry_run or not (self.yes or agrees(f"Make {output.counted(len(self.repairs), 'repair')}?")):
            output.note("nothing was repaired")
            return report
        self.made = await service.reconciliation.repair(report, self.repairs)
        return replace(report, repaired=sum(each.findings for each in self.made))


def history(
    limit: Annotated[int, typer.Option(min=1, max=HISTORY_MAX)] = 20,
    before: Annotated[
        int | None, typer.Option("--before", metavar="RUN", min=1, max=2**63 - 1, help="Only runs before that one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the reconciliations, the latest first."""
    runs = run_use_case(lambda service: service.reconciliation.history(before=before or 2**63 - 1, count_max=limit))
    print_history(runs)


def close(
    payment_id: Annotated[str, typer.Argument(metavar="PAYMENT_ID")],
    as_json: JsonOption = False,
) -> None:
    """End what reconciliations have left open of a payment, because you have settled it by hand."""
    from eci_pay.requests import parse_payment_id

    number = parse_payment_id(payment_id)
    closed = 0
    if number is not None:
        closed = run_use_case(lambda service: service.reconciliation.close(number, operator=operator()))
    if not closed:
        raise errors.RecoveryNotFound(f"no reconciliation has left anything open of payment {payment_id}")
    if output.Mode.json:
        output.print_json({"closed": closed})
    else:
        output.note(f"closed {output.counted(closed, 'open operation')} of payment {payment_id}")


def _is_same(file: str, other: str) -> bool:
    return os.path.exists(file) and os.path.exists(other) and os.path.samefile(file, other)


def _made_at(file: str | None) -> datetime | None:
    """When a file was written last: it cannot have what happened after that."""
    if file is None or not os.path.isfile(file):
        return None
    return datetime.fromtimestamp(os.path.getmtime(file), UTC)


def _size(file: str | None) -> int | None:
    """How many bytes are to be read, where that is known."""
    return os.path.getsize(file) if file is not None and os.path.isfile(file) else None


@contextmanager
def _progress(
    bytes_total: int | None, *, with_file: bool
) -> "Iterator[tuple[Callable[[int], None], Callable[[float], None]]]":
    """Two bars where somebody watches: of the file and of the books."""
    if not sys.stderr.isatty() or output.Mode.json:
        yield (lambda _: None), (lambda _: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        reading = progress.add_task("Reading the file", total=bytes_total, visible=with_file)
        checking = progress.add_task("Checking the books", total=1.0)
        yield (
            lambda done: progress.update(reading, completed=done),
            lambda part: progress.update(checking, completed=part),
        )


@contextmanager
def _differences_written(file: str | None) -> "Iterator[Callable[[Difference], None]]":
    if file is None:
        yield lambda _: None
        return
    with written(file) as write:
        yield difference_writer(write)
