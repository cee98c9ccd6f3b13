"""The command that serves HTTP."""

from typing import Annotated

import typer

from cli.runtime import run, settings_of_server
from eci_pay import errors


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: eci-pay serve --port 8086 --workers 2")(serve)


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8086,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 1,
) -> None:
    """Serve the HTTP API until SIGTERM, then finish what has begun."""
    from eci_pay.service import open_database
    from server.run import check_access, run_server

    settings = settings_of_server()
    check_access(settings.eci_pay_auth, host)
    run(open_database(settings))  # says what is wrong before any worker starts
    try:
        run_server(settings, host=host, port=port, workers=workers)
    except SystemExit as stop:
        if stop.code:
            raise errors.Unavailable(f"the server could not start on {host}:{port}") from None
        raise
