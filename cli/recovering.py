"""The command that settles what was left without an outcome."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.output import JsonOption
from cli.runtime import run, run_use_case, settings_of_server, until_stopped
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.recovery import Look
    from eci_pay.service import PaymentService
    from eci_pay.settings import Settings

EXIT_OVERDUE = 6


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: eci-pay recover --once")(recover)


def recover(
    once: Annotated[bool, typer.Option("--once", help="Look at what is due, and end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what has no outcome.")] = False,
    close: Annotated[
        int | None,
        typer.Option("--close", metavar="RECOVERY", help="End a LATE one that you have put right by hand.", min=1),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the gateway what became of payments and refunds whose outcome is unknown, and settle them, until SIGTERM."""
    if once + dry_run + (close is not None) > 1:
        raise errors.InvalidRequest("--once, --dry-run and --close exclude each other")
    if close is not None:
        _close(close)
        return
    if not (once or dry_run):
        run(_recover(settings_of_server()))
        return

    async def use(service: "PaymentService") -> "tuple[list[Look], list[Look]]":
        looks = await service.recovery.run_once() if once else await service.recovery.open()
        return looks, await service.recovery.overdue()

    looks, overdue = run_use_case(use)
    _print_looks(looks)
    if overdue:
        output.note(f"{len(overdue)} outcomes have been unknown for too long")
        raise typer.Exit(EXIT_OVERDUE)


def _close(recovery_id: int) -> None:
    if not run_use_case(lambda service: service.recovery.close(recovery_id)):
        raise errors.RecoveryNotFound(f"no recovery {recovery_id} waits for being put right by hand")
    if output.Mode.json:
        output.print_json({"closed": recovery_id})
    else:
        output.note(f"recovery {recovery_id} is closed")


async def _recover(settings: "Settings") -> None:
    from eci_pay.background import background_tasks
    from eci_pay.service import open_database, payment_service

    async with payment_service(settings, await open_database(settings)) as service:
        async with background_tasks(settings, service, recovers=True):
            output.note("recovering")
            await until_stopped()
        output.note("stopped")


def _print_looks(looks: "list[Look]") -> None:
    if output.Mode.json:
        output.print_json([asdict(look) for look in looks])
        return
    rows = [
        (
            str(look.recovery_id or ""),
            str(look.payment_id),
            str(look.refund_id or ""),
            look.state.value,
            str(look.looks),
            output.duration(look.age_seconds),
            output.shown(look.result),
        )
        for look in looks
    ]
    headings = ("Recovery", "Payment", "Refund", "State", "Looks", "Unknown for", "Result")
    output.console().print(output.table(headings, rows))
    output.note(f"{len(looks)} outcomes")
