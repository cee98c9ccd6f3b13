"""The command that examines what this service needs and talks to."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from cli import output
from cli.output import JsonOption
from cli.runtime import run, settings_of_command
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.doctor import Diagnosis

EXIT_FAULT = 1
EXIT_UNAVAILABLE = 5

_STYLE_OF_VERDICT = {"ok": "green", "warning": "yellow", "fault": "red"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: eci-pay doctor --json")(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """Examine the settings, the database and all that this service talks to."""
    from eci_pay.doctor import diagnose, of_invalid_settings

    try:
        settings = settings_of_command()
    except errors.SettingsInvalid as error:
        diagnosis = of_invalid_settings(error)
    else:
        diagnosis = run(diagnose(settings))
    _print(diagnosis)
    if diagnosis.database_reached is False:
        raise typer.Exit(EXIT_UNAVAILABLE)
    if diagnosis.has_fault:
        raise typer.Exit(EXIT_FAULT)


def _print(diagnosis: "Diagnosis") -> None:
    if output.Mode.json:
        output.print_json(asdict(diagnosis))
        return
    rows = [
        (
            f"[{_STYLE_OF_VERDICT[finding.verdict]}]{finding.verdict}[/]",
            finding.check,
            output.shown("\n".join(filter(None, (finding.message, finding.remedy and f"-> {finding.remedy}")))),
        )
        for finding in diagnosis.findings
    ]
    output.console().print(output.table(("", "Check", "Finding"), rows))
