"""All commands, none of which is imported before it is needed: `--help` and a shell that completes a command's name
know them from the table below."""

from typing import Annotated, Any

import typer

from cli.deferred import DeferredCommand, QuickGroup

COMMANDS = {
    "serve": ("cli.serving", "Serve the HTTP API until SIGTERM, then finish what has begun."),
    "relay": (
        "cli.relaying",
        "Deliver messages to the Order, Inventory and Notification services until SIGTERM.",
    ),
    "peers": (
        "cli.relaying",
        "Run stand-ins of the Order, Inventory and Notification services, and show what they are told.",
    ),
    "recover": (
        "cli.recovering",
        "Ask the gateway what became of payments and refunds whose outcome is unknown, and settle them, until SIGTERM.",
    ),
    "reconcile": (
        "cli.reconcile",
        "Check the books, and compare them with the gateway's settlement file; `reconcile history` lists the runs.",
    ),
    "charge": ("cli.payments", "Charge an order, once."),
    "refund": ("cli.payments", "Refund a payment, whole or in part."),
    "show": ("cli.payments", "Show a payment with its refunds and its history."),
    "list": ("cli.payments", "List payments, newest first."),
    "cancel": ("cli.payments", "Cancel a PENDING or FAILED payment, for good."),
    "stats": ("cli.stats", "Sum up the payments created lately, and what is left to do."),
    "doctor": ("cli.doctor", "Examine the settings, the database and all that this service talks to."),
    "migrate": ("cli.maintenance", "Bring the database to this release's schema."),
    "expire-keys": ("cli.maintenance", "Delete idempotency keys that are finished and older than 24 hours."),
    "recount": ("cli.maintenance", "Count the books, and put right the totals in the metrics that differ from them."),
    "demo": (
        "cli.demo",
        "Place orders, charge, retry, decline, refund, reconcile: on a database of its own, dropped at the end.",
    ),
    "api-key": ("cli.api_keys", "API keys: who may call the HTTP API, and what for."),
    "outbox": ("cli.outbox", "Messages to other services, and their delivery."),
    "settlement": ("cli.settlement", "Settlement files of the simulated gateway."),
}
"""Each command's module and what it says of itself, which the tests hold to what the module says."""


class DeferredCommands(QuickGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (module, summary) in COMMANDS.items():
            self.add_command(DeferredCommand(name, module, summary))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"eci-pay {version('eci-pay')}")
        raise typer.Exit


app = typer.Typer(
    name="eci-pay",
    cls=DeferredCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 declined, 2 invalid, 3 conflict, 4 not found, 5 unavailable, 6 outcome unknown.",
)


@app.callback()
def eci_pay(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The payment service of ECI: charge, refund and query payments."""
