"""Commands about the database: migrate, expire-keys, recount."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.output import JsonOption
from cli.runtime import run, run_use_case, settings_of_command
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.migrations import MigrationState
    from eci_pay.service import PaymentService


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.command(epilog="Example: eci-pay migrate --status")(migrate)
    app.command("expire-keys", epilog="Example: eci-pay expire-keys --dry-run")(expire_keys)
    app.command(epilog="Example: eci-pay recount --dry-run")(recount)


def migrate(
    status: Annotated[bool, typer.Option("--status", help="Only tell which migrations are applied.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the SQL that would run.")] = False,
    with_sample_data: Annotated[
        bool, typer.Option("--with-sample-data", help="Fill an empty database with samples.")
    ] = False,
    service_role: Annotated[
        str | None,
        typer.Option(
            help="Give the role that serves the privileges it needs, and no others. Default: ECI_PAY_SERVICE_ROLE.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the database to this release's schema."""
    from eci_pay import migrations
    from eci_pay.service import database_url

    if sum((status, dry_run, with_sample_data)) > 1:
        raise errors.InvalidRequest("--status, --dry-run and --with-sample-data exclude each other")
    settings = settings_of_command()
    role = settings.eci_pay_service_role if service_role is None else service_role
    bundled = migrations.bundled_migrations()

    async def show_status() -> None:
        states = await migrations.migration_states(await database_url(settings), bundled)
        _print_states(states)

    async def show_sql() -> None:
        url = await database_url(settings)
        pending = await migrations.pending_migrations(url, bundled)
        changes = [] if role is None else await migrations.privilege_changes(url, role)
        if output.Mode.json:
            scripts = [(m.name, m.text) for m in pending] + [("privileges", change) for change in changes]
            output.print_json([{"name": name, "sql": text} for name, text in scripts])
        else:
            print("\n".join(f"-- {m.name}\n{m.text}" for m in pending), end="")
            print("".join(f"{change};\n" for change in changes), end="")
        output.note(f"{len(pending)} migrations would be applied")
        if role is not None:
            output.note(f"{len(changes)} privileges of {role} would change, beside those on new tables")

    async def apply() -> None:
        url = await database_url(settings)
        applied = await migrations.migrate(url, bundled, service_role=role)
        loaded = await migrations.load_sample_data(url) if with_sample_data else 0
        if output.Mode.json:
            output.print_json({"applied": [m.name for m in applied], "sample_payments": loaded, "service_role": role})
            return
        for migration in applied:
            print(f"applied {migration.name}")
        if with_sample_data:
            print(f"loaded {loaded} sample payments")
        print(f"the schema is at version {bundled[-1].version}")
        if role is not None:
            print(f"{role} may do what the service needs, and nothing else")

    run(show_status() if status else show_sql() if dry_run else apply())


def _print_states(states: list["MigrationState"]) -> None:
    if output.Mode.json:
        output.print_json(
            [
                {
                    "version": state.version,
                    "name": state.name,
                    "applied_at": state.applied_at.isoformat() if state.applied_at else None,
                    "fault": state.fault,
                }
                for state in states
            ]
        )
    else:
        rows = [
            (
                str(state.version),
                state.name,
                f"{state.applied_at:%Y-%m-%d %H:%M:%S}" if state.applied_at else "pending",
                state.fault or "",
            )
            for state in states
        ]
        output.console().print(output.table(("Version", "File", "Applied", "Fault"), rows))
    faults = [state.fault for state in states if state.fault]
    if faults:
        raise errors.MigrationError("; ".join(faults))


def expire_keys(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete idempotency keys that are finished and older than 24 hours."""
    if dry_run:
        expired = run_use_case(lambda service: service.keys.count())
        _print_count("expired", expired, f"{expired:,} keys would be deleted")
        return
    deleted = run_use_case(_delete_keys)
    _print_count("deleted", deleted, f"deleted {deleted:,} expired keys")


def _print_count(name: str, count: int, sentence: str) -> None:
    if output.Mode.json:
        output.print_json({name: count})
    else:
        print(sentence)


async def _delete_keys(service: "PaymentService") -> int:
    """With a progress bar where somebody watches."""
    if not sys.stderr.isatty() or output.Mode.json:
        return await service.keys.delete()
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Deleting expired keys", total=await service.keys.count())
        return await service.keys.delete(lambda total: progress.update(bar, completed=total))


def recount(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what differs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Count the books, and put right the totals in the metrics that differ from them."""
    corrections = run_use_case(lambda service: service.totals.recount(dry_run=dry_run))
    if output.Mode.json:
        told = [{**asdict(each), "amount": float(each.amount)} for each in corrections]
        output.print_json({"corrected": not dry_run, "corrections": told})
    elif not corrections:
        print("the totals are what the books tell")
    else:
        rows = [(each.metric, each.label, f"{each.count:+,}", f"{each.amount:+,.2f}") for each in corrections]
        headings = ("Total", "Of", "Number", "Amount")
        output.console().print(output.table(headings, rows, right=headings[2:]))
        print("nothing was changed" if dry_run else "put right")
