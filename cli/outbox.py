"""The commands `outbox ...`: the messages that other services are told, and those that did not get through."""

import json
import math
import re
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.deferred import QuickGroup
from cli.output import JsonOption
from cli.prompts import confirm
from cli.relaying import peer_of
from cli.runtime import run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from rich.table import Table

    from eci_pay.outbox import Retried
    from eci_pay.views import MessagePage, MessageView, OutboxStats

EXIT_LEFT_ALONE = 3
LIMIT_MAX = 1000
OLDER_THAN_DAYS_MAX = 36_500
RETRY_IDS_MAX = 1000
ERROR_SHOWN_LENGTH_MAX = 80

_SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

PeerOption = Annotated[str | None, typer.Option("--peer", metavar="PEER", help="order, inventory or notification.")]
OvertakenOption = Annotated[
    bool, typer.Option("--overtaken", help="Also those whose peer has been told of later changes since.")
]

outbox = typer.Typer(
    name="outbox",
    cls=QuickGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Messages to other services, and their delivery.",
    epilog="Example: eci-pay outbox list --dead",
)


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.add_typer(outbox)


@outbox.command("list", epilog="Example: eci-pay outbox list --dead --peer order")
def list_messages(
    dead: Annotated[bool, typer.Option("--dead", help="Only those that are given up.")] = False,
    pending: Annotated[bool, typer.Option("--pending", help="Only those that are still to be delivered.")] = False,
    peer: PeerOption = None,
    limit: Annotated[int, typer.Option(min=1, max=LIMIT_MAX)] = 20,
    cursor: Annotated[str | None, typer.Option("--cursor", help="Where the page before ended.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List messages that are not delivered, oldest first."""
    from eci_pay.messages import Destination
    from eci_pay.requests import ID_MAX, parse_message_id

    destinations = tuple(Destination) if peer is None else (peer_of(peer),)
    after = parse_message_id(cursor, "cursor") if cursor is not None and cursor.strip("0") else 0
    page = run_use_case(
        lambda service: service.outbox.page(
            destinations=destinations,
            pending=pending or not dead,
            dead=dead or not pending,
            after=ID_MAX if after is None else after,
            count_max=limit,
        )
    )
    _print_page(page)


@outbox.command(epilog="Example: eci-pay outbox show 1042")
def show(
    message_id: Annotated[str, typer.Argument(metavar="MESSAGE_ID")],
    as_json: JsonOption = False,
) -> None:
    """Show one message: what it says, and what came of its deliveries."""
    from eci_pay.requests import parse_message_id

    wanted = parse_message_id(message_id)
    _print_message(run_use_case(lambda service: service.outbox.by_id(wanted)))


@outbox.command(epilog="Example: eci-pay outbox retry --peer order --dead")
def retry(
    message_ids: Annotated[list[str] | None, typer.Argument(metavar="MESSAGE_ID")] = None,
    peer: PeerOption = None,
    dead: Annotated[bool, typer.Option("--dead", help="With --peer: all that are given up.")] = False,
    overtaken: OvertakenOption = False,
    as_json: JsonOption = False,
) -> None:
    """Deliver dead messages after all, or pending ones now."""
    if bool(message_ids) == (peer is not None) or (peer is not None) != dead:
        raise errors.InvalidRequest("give MESSAGE_IDs, or --peer with --dead")
    missing: list[str] = []
    if peer is not None:
        destination = peer_of(peer)
        results = run_use_case(lambda service: service.outbox.retry_dead(destination, overtaken=overtaken))
    else:
        results, missing = _retry_named(message_ids or [], overtaken=overtaken)
    _print_retried(results)
    if missing:
        raise errors.MessageNotFound(f"there is no message {', '.join(missing)}")
    if not all(result.requeued for result in results):
        raise typer.Exit(EXIT_LEFT_ALONE)


def _retry_named(texts: list[str], *, overtaken: bool) -> "tuple[list[Retried], list[str]]":
    """What was done with those that exist, and the others."""
    from eci_pay.requests import parse_message_id

    if len(texts) > RETRY_IDS_MAX:
        raise errors.InvalidRequest(f"at most {RETRY_IDS_MAX} messages at once")
    wanted = {text: parse_message_id(text) for text in texts}
    known = sorted({message_id for message_id in wanted.values() if message_id is not None})
    results = run_use_case(lambda service: service.outbox.retry(known, overtaken=overtaken))
    found = {result.message_id for result in results}
    return results, [text for text, message_id in wanted.items() if message_id not in found]


@outbox.command(epilog="Example: eci-pay outbox purge --older-than 30d")
def purge(
    older_than: Annotated[str, typer.Option("--older-than", metavar="TIME", help="Such as 90d, 12h or 30m.")],
    dead: Annotated[bool, typer.Option("--dead", help="Those that were given up instead; wants --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete messages that were delivered longer ago than that."""
    age = parse_age(older_than)
    if dead and not yes:
        confirm("Delete dead messages? Nobody will be told what they say.", to="delete dead messages")
    deleted = run_use_case(lambda service: service.outbox.purge(age, dead=dead))
    if output.Mode.json:
        output.print_json({"deleted": deleted})
    else:
        print(f"deleted {deleted:,} {'dead' if dead else 'delivered'} messages")


@outbox.command(epilog="Example: eci-pay outbox stats --json")
def stats(as_json: JsonOption = False) -> None:
    """Count the messages that are not delivered, by peer, and tell how old the oldest are."""
    _print_stats(run_use_case(lambda service: service.outbox.stats()))


def parse_age(text: str) -> timedelta:
    """A number with a unit: s, m, h, d or w; raises InvalidRequest."""
    found = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip().lower())
    seconds = int(found[1]) * _SECONDS_OF_UNIT[found[2]] if found else math.inf
    if seconds > OLDER_THAN_DAYS_MAX * _SECONDS_OF_UNIT["d"]:
        raise errors.InvalidRequest(f"{text}: is no time such as 90d, 12h or 30m")
    return timedelta(seconds=seconds)


def _print_page(page: "MessagePage") -> None:
    if output.Mode.json:
        output.print_json(page.model_dump(mode="json"))
        return
    rows = [
        (
            str(message.message_id),
            str(message.payment_id),
            message.destination,
            message.event,
            message.state.value,
            str(message.attempts),
            f"{message.next_attempt_at:%Y-%m-%d %H:%M:%S}" if message.next_attempt_at else "",
            output.shown((message.last_error or "")[:ERROR_SHOWN_LENGTH_MAX]),
        )
        for message in page.messages
    ]
    headings = ("Message", "Payment", "Peer", "Event", "State", "Deliveries", "Next (UTC)", "Last error")
    output.console().print(output.table(headings, rows))
    output.note(f"{len(page.messages)} messages")
    if page.next_cursor:
        output.note(f"next page: --cursor {page.next_cursor}")


def _print_message(message: "MessageView") -> None:
    if output.Mode.json:
        output.print_json(message.model_dump(mode="json"))
        return
    facts = [
        ("State", message.state.value),
        ("Peer", message.destination),
        ("Event", message.event),
        ("Payment", f"{message.payment_id} (its message {message.sequence})"),
        ("Says", output.shown(json.dumps(message.payload, ensure_ascii=False))),
        ("Deliveries", message.attempts),
        ("Created", _instant(message.created_at)),
        ("First tried", _instant(message.first_attempt_at)),
        ("Next", _instant(message.next_attempt_at)),
        ("Delivered", _instant(message.delivered_at)),
        ("Dead since", _instant(message.dead_at)),
        ("Last error", output.shown(message.last_error)),
        ("Request", output.shown(message.request_id)),
        ("Trace", message.traceparent),
    ]
    output.console().print(output.facts(facts, title=f"Message {message.message_id}"))


def _print_retried(results: "list[Retried]") -> None:
    if output.Mode.json:
        output.print_json([asdict(result) for result in results])
        return
    for result in results:
        if result.delivered:
            output.note(f"message {result.message_id}: was delivered")
        elif result.in_delivery:
            output.note(f"message {result.message_id}: is in delivery now")
        elif not result.requeued:
            output.note(
                f"message {result.message_id}: message {result.overtaken_by}, of a later change of the same payment, "
                "went to the same peer meanwhile: --overtaken sends it nevertheless"
            )
    print(f"requeued {sum(result.requeued for result in results):,} of {len(results):,} messages")


def _print_stats(stats: "tuple[OutboxStats, ...]") -> None:
    if output.Mode.json:
        output.print_json([each.model_dump(mode="json") for each in stats])
    else:
        output.console().print(stats_table(stats))


def stats_table(stats: "tuple[OutboxStats, ...]") -> "Table":
    """A row for each service that is told of payments."""
    rows = [
        (
            each.destination,
            f"{each.pending:,}",
            f"{each.in_delivery:,}",
            output.duration(each.oldest_pending_seconds),
            f"{each.dead:,}",
            output.duration(each.oldest_dead_seconds),
        )
        for each in stats
    ]
    headings = ("Peer", "Pending", "In delivery", "Oldest pending", "Dead", "Oldest dead")
    return output.table(headings, rows, right=headings[1:])


def _instant(instant: datetime | None) -> str | None:
    return f"{instant:%Y-%m-%d %H:%M:%S} UTC" if instant else None
