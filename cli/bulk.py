"""Refunds and charges from a file: `refund --batch` and `charge --batch`."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, assert_never

import typer

from cli import output
from cli.files import STANDARD_STREAM, opened
from cli.prompts import confirm
from cli.runtime import EXIT_INTERRUPTED, on_stop, operator, run_with_service
from eci_pay import errors

if TYPE_CHECKING:
    from pathlib import Path

    from cli.bulk_results import ResultsFile
    from eci_pay.bulk_files import BulkFile, BulkKind
    from eci_pay.bulk_plans import Plan
    from eci_pay.bulk_runs import Report, Result
    from eci_pay.service import PaymentService

EXIT_NOT_ALL_DONE, EXIT_TOO_LATE, EXIT_UNAVAILABLE = 1, 3, 5

BatchOption = Annotated[str | None, typer.Option("--batch", metavar="FILE|-", help="CSV or JSON Lines, a row each.")]
ResultsOption = Annotated[
    str | None, typer.Option("--results", metavar="FILE", help="Of --batch; FILE.results.csv if left out.")
]
ConcurrencyOption = Annotated[
    int | None, typer.Option("--concurrency", metavar="N", min=1, max=100, help="Of --batch: rows at a time; 16.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Of --batch: only check the file, and say what it asks.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """What `--batch` is given, and what wants it."""

    file: str | None
    results: str | None
    concurrency: int | None
    dry_run: bool

    def check(self, *, single: bool, single_named: str) -> None:
        """Raises InvalidRequest where what names a `single` row is given beside a file, or these options without."""
        if self.file is not None and single:
            raise errors.InvalidRequest(f"--batch excludes {single_named}")
        if self.file is None and (self.results is not None or self.concurrency is not None or self.dry_run):
            raise errors.InvalidRequest("--results, --concurrency and --dry-run want --batch")


def run_batch(kind: "BulkKind", options: BatchOptions, *, yes: bool) -> None:
    """Validates a file, asks, does its rows, and ends with the exit code of what came of them."""
    from cli.bulk_results import results_of, results_path

    assert options.file is not None
    path = None if options.dry_run else results_path(options.file, options.results)
    with _safe_to_repeat():
        plan = _plan(kind, options.file)
        if path is None:
            _print_plan(plan)
            return
        with results_of(plan.file, path) as results:
            if not yes and plan.begun_before < len(plan.tasks):
                confirm(_question(plan), to=f"{kind} them")
            report = run_with_service(
                lambda service: _run(service, plan, results, options.concurrency), changes=True, busy=True
            )
    with suppress(OSError):  # the process's end tells of it, and must not hide what came of the rows
        _print_report(report, path)
    _advise(report)
    raise typer.Exit(exit_code(report))


def _plan(kind: "BulkKind", name: str) -> "Plan":
    file = _read(kind, name)
    plan = run_with_service(lambda service: service.bulk.plan(file))
    for warning in (*file.warnings, *plan.warnings):
        output.note(f"warning: {warning}")
    return plan


def _read(kind: "BulkKind", name: str) -> "BulkFile":
    from eci_pay.bulk_files import read_bulk_file

    with opened(name) as stream:
        return read_bulk_file(kind, stream, "standard input" if name == STANDARD_STREAM else output.printable(name))


async def _run(service: "PaymentService", plan: "Plan", results: "ResultsFile", concurrency: int | None) -> "Report":
    """Ends early, but in order, on SIGINT and SIGTERM."""
    from eci_pay.bulk_runs import CONCURRENCY_DEFAULT

    await service.bulk.check_clock()
    run = await service.bulk.begin(plan, operator=operator())
    on_stop(run.stop)
    # Others may have begun rows since the plan, while somebody thought.
    results.begin(await run.begun_before())
    with _progress(plan) as advance:

        def on_row(result: "Result") -> None:
            results.add(result)
            advance(result)

        report = await run(concurrency=concurrency or CONCURRENCY_DEFAULT, on_row=on_row)
    results.complete(report)
    return report


@contextmanager
def _progress(plan: "Plan") -> Iterator["Callable[[Result], None]"]:
    """A bar where somebody watches; that they have gone stops nothing."""
    if not sys.stderr.isatty() or output.Mode.json:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    from eci_pay.bulk_runs import Outcome

    progress = Progress(console=Console(stderr=True), transient=True)
    bar = progress.add_task(f"{plan.file.kind.capitalize()}s", total=len(plan.tasks))
    with suppress(OSError):
        progress.start()
    try:
        yield lambda result: progress.update(bar, advance=result.outcome is not Outcome.BEGUN)
    finally:
        with suppress(OSError):
            progress.stop()


@contextmanager
def _safe_to_repeat() -> Iterator[None]:
    """Says so where the database was away, the results were lost or somebody has interrupted it, whenever that was."""
    try:
        yield
    except (errors.Unavailable, errors.OutputLost) as error:
        error.add_note(_hint())
        raise
    except typer.Exit as stop:
        if stop.exit_code == EXIT_INTERRUPTED:
            output.note(_hint())
        raise


def _hint() -> str:
    return f"safe to run again: {shlex.join(['eci-pay', *sys.argv[1:]])}"


def _question(plan: "Plan") -> str:
    """Such as: Refund 120 payments, 45,300.00 INR and 12.00 USD?"""
    from eci_pay.bulk_files import BulkKind
    from eci_pay.bulk_plans import sums_by_currency

    to_do = plan.to_do
    sums = " and ".join(f"{amount:,.2f} {currency}" for currency, amount in sums_by_currency(to_do).items())
    noun = "payment" if plan.file.kind is BulkKind.REFUND else "order"
    count = len({task.order_id for task in to_do})
    others = _others(plan)
    asked = f"{count:,} {noun}{'' if count == 1 else 's'}, {sums}" if to_do else "nothing"
    return f"{plan.file.kind.capitalize()} {asked}{f' ({others})' if others else ''}?"


def _others(plan: "Plan") -> str:
    """What a run does not do, or would not, as the books are."""
    counts = {"were begun before": plan.begun_before, "would be refused": plan.would_be_refused}
    return ", ".join(f"{count:,} rows {what}" for what, count in counts.items() if count)


def _print_plan(plan: "Plan") -> None:
    """What a run would do."""
    from eci_pay.bulk_plans import sums_by_currency

    to_do = plan.to_do
    if output.Mode.json:
        output.print_json(
            {
                "kind": plan.file.kind,
                "file": plan.file.name,
                "file_hash": plan.file.digest,
                "rows": len(plan.tasks),
                "begun_before": plan.begun_before,
                "would_be_refused": plan.would_be_refused,
                "to_do": [
                    {
                        "currency": currency,
                        "count": sum(task.currency == currency for task in to_do),
                        "sum": float(amount),
                    }
                    for currency, amount in sums_by_currency(to_do).items()
                ],
            }
        )
    else:
        print(_question(plan).rstrip("?"))


def _print_report(report: "Report", path: "Path") -> None:
    sums = report.sums()
    if output.Mode.json:
        output.print_json(
            {
                "kind": report.plan.file.kind,
                "file": report.plan.file.name,
                "file_hash": report.plan.file.digest,
                "first_run_at": report.first_run_at.isoformat(),
                "end": report.end,
                "rows": len(report.results),
                "outcomes": [
                    {"outcome": each.outcome, "currency": each.currency, "count": each.count, "sum": float(each.sum)}
                    for each in sums
                ],
                "results_file": output.printable(str(path)),
            }
        )
        return
    rows = [(each.outcome.value, f"{each.count:,}", f"{each.sum:,.2f}", each.currency) for each in sums]
    output.console().print(output.table(("Outcome", "Rows", "Sum", "Currency"), rows, right=("Rows", "Sum")))
    output.note(f"results: {path}")


def _advise(report: "Report") -> None:
    """Says what is to be done about rows that are not done."""
    from eci_pay.bulk import TOO_LATE
    from eci_pay.bulk_runs import End, Outcome

    outcomes = {each.outcome for each in report.sums()}
    if Outcome.UNKNOWN in outcomes:
        output.note("unknown rows: `eci-pay recover` asks the gateway what became of those that have begun")
    if report.end is End.TOO_LATE:
        output.note(f"stopped: the file's first run began at {report.first_run_at:%Y-%m-%d %H:%M:%S} UTC. {TOO_LATE}")
        return
    if report.end is End.UNAVAILABLE:
        output.note("stopped: the database or the gateway is out of order")
    if outcomes & {Outcome.UNKNOWN, Outcome.UNAVAILABLE, Outcome.NOT_TRIED}:
        output.note(_hint())
    if report.end is End.INTERRUPTED:
        output.note("interrupted")


def exit_code(report: "Report") -> int:
    """The exit code of a run: by why it ended early, or else by what came of its rows."""
    from eci_pay.bulk_runs import End, Outcome

    outcomes = {result.outcome for result in report.results}
    match report.end:
        case End.TOO_LATE:
            return EXIT_TOO_LATE
        case End.INTERRUPTED:
            return EXIT_INTERRUPTED
        case End.UNAVAILABLE:
            return EXIT_UNAVAILABLE
        case End.COMPLETE if Outcome.UNAVAILABLE in outcomes:
            return EXIT_UNAVAILABLE
        case End.COMPLETE:
            return EXIT_NOT_ALL_DONE if outcomes - {Outcome.DONE, Outcome.REPLAYED} else 0
        case _:
            assert_never(report.end)
