"""Commands about the delivery of messages: relay, and stand-ins for those who take them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.output import JsonOption
from cli.runtime import on_stop, run, settings_of_command, settings_of_server, until_stopped
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.lanes import Tally
    from eci_pay.messages import Destination
    from eci_pay.settings import Settings
    from server.stand_ins import Received

DELAY_SECONDS_MAX = 3600.0


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.command(epilog="Example: eci-pay relay --once")(relay)
    app.command(epilog="Example: eci-pay peers --fail-rate 0.2 --down inventory")(peers)


def relay(
    once: Annotated[bool, typer.Option("--once", help="Deliver what is due, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Deliver messages to the Order, Inventory and Notification services until SIGTERM."""
    from eci_pay.messages import service_urls

    settings = settings_of_command() if once else settings_of_server()
    if not service_urls(settings):
        raise errors.InvalidRequest(
            "nobody to tell: set ORDER_SERVICE_URL, INVENTORY_SERVICE_URL or NOTIFICATION_SERVICE_URL"
        )
    if once:
        _print_tally(*run(_drain(settings), busy=True))
    else:
        run(_relay(settings), busy=True)


async def _drain(settings: "Settings") -> "tuple[Mapping[Destination, Tally], dict[str, int]]":
    """What was done, and how many messages are left."""
    from eci_pay.relay import connected_relay
    from eci_pay.service import open_database, payment_service

    async with (
        payment_service(settings, await open_database(settings)) as service,
        connected_relay(settings, service.outbox) as relay,
    ):
        on_stop(relay.stop)
        tallies = await relay.drain()
        return tallies, {each.destination: each.pending for each in await service.outbox.stats()}


async def _relay(settings: "Settings") -> None:
    from eci_pay.background import background_tasks
    from eci_pay.messages import service_urls
    from eci_pay.service import open_database, payment_service

    async with payment_service(settings, await open_database(settings)) as service:
        async with background_tasks(settings, service, relays=True):
            output.note(f"delivering to {', '.join(f'{name} {url}' for name, url in service_urls(settings).items())}")
            await until_stopped()
        output.note("stopped")


def _print_tally(tallies: "Mapping[Destination, Tally]", pending: "Mapping[str, int]") -> None:
    rows = [(name.value, tally.delivered, tally.failed, tally.dead, pending[name]) for name, tally in tallies.items()]
    if output.Mode.json:
        keys = ("peer", "delivered", "failed", "dead", "pending")
        output.print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    cells = [(name, *(f"{number:,}" for number in numbers)) for name, *numbers in rows]
    headings = ("Peer", "Delivered", "Failed", "Dead", "Still pending")
    output.console().print(output.table(headings, cells, right=headings[1:]))


def peers(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65533, help="Of order; inventory and notification have the next. 0: free ones.")
    ] = 8091,
    fail_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="This part of the requests gets 503.")] = 0.0,
    delay: Annotated[float, typer.Option(min=0.0, max=DELAY_SECONDS_MAX, help="Seconds before each answer.")] = 0.0,
    down: Annotated[list[str] | None, typer.Option(metavar="PEER", help="Does not run at all; repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run stand-ins of the Order, Inventory and Notification services, and show what they are told."""
    from eci_pay.messages import Destination
    from server.stand_ins import StandIns, running

    settings_of_command()
    absent = {peer_of(name) for name in down or ()}
    ports = {name: port and port + number for number, name in enumerate(Destination) if name not in absent}
    stand_ins = StandIns(fail_rate=fail_rate, delay_seconds=delay, on_received=_print_received)

    async def serve() -> None:
        try:
            async with running(stand_ins, ports, host=host) as urls:
                for name, url in urls.items():
                    output.note(f"export {name.upper()}_SERVICE_URL={url}")
                await until_stopped()
        except OSError as error:
            raise errors.Unavailable(f"the stand-ins could not start on {host}: {error}") from None

    run(serve())


def peer_of(name: str) -> "Destination":
    """The peer of a name on the command line; raises InvalidRequest."""
    from eci_pay.messages import Destination

    try:
        return Destination(name.lower())
    except ValueError:
        raise errors.InvalidRequest(f"{name}: is no peer: {', '.join(Destination)}") from None


def _print_received(received: "Received") -> None:
    import json
    from dataclasses import asdict

    if output.Mode.json:
        line = json.dumps(asdict(received))
    else:
        repeated = " (repeated)" if received.repeated else ""
        line = output.printable(
            f"{received.at} {received.destination:12} {received.status} message {received.idempotency_key}{repeated}: "
            f"{received.method} {received.path} {json.dumps(received.body, ensure_ascii=False)}"
        )
    print(line, flush=True)
