"""The commands `api-key ...`: who may call the HTTP API, and what for."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.deferred import QuickGroup
from cli.outbox import parse_age
from cli.output import JsonOption
from cli.runtime import run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.access import ApiKey, Scope

api_key = typer.Typer(
    name="api-key",
    cls=QuickGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="API keys: who may call the HTTP API, and what for.",
    epilog="Example: eci-pay api-key create order-service --scope payments:charge --scope payments:read",
)


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.add_typer(api_key)


@api_key.command(epilog="Example: eci-pay api-key create order-service --scope payments:charge --expires 90d")
def create(
    name: Annotated[str, typer.Argument(help="The caller; several keys of one name are one caller.")],
    scope: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="payments:charge, payments:refund, payments:read, payments:write, metrics:read or admin; may be given "
            "more than once.",
        ),
    ],
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="Such as 90d from now, or a UTC date or instant.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key, and show it: this once, for only its hash is kept."""
    scopes = {_scope(given) for given in scope}
    expires_at = None if expires is None else _instant(expires)
    key, token = run_use_case(lambda service: service.api_keys.create(name=name, scopes=scopes, expires_at=expires_at))
    if output.Mode.json:
        output.print_json({**_json(key), "key": token})
        return
    until = f", until {_shown(key.expires_at)} UTC" if key.expires_at else ""
    output.note(f"API key {key.key_id} of {key.name}, for {', '.join(key.scopes)}{until}; it is not shown again:")
    print(token)


@api_key.command("list", epilog="Example: eci-pay api-key list --json")
def list_keys(as_json: JsonOption = False) -> None:
    """List all keys, without their secrets."""
    keys = run_use_case(lambda service: service.api_keys.list())
    if output.Mode.json:
        output.print_json([_json(key) for key in keys])
        return
    rows = [
        (
            key.key_id,
            output.shown(key.name),
            key.state(datetime.now(UTC)),
            "\n".join(key.scopes),
            output.shown(key.created_by),
            _shown(key.expires_at),
            _shown(key.last_used_at),
        )
        for key in keys
    ]
    headings = ("Key", "Caller", "State", "Scopes", "Made by", "Expires", "Last used")
    output.console().print(output.table(headings, rows))
    output.note(f"{output.counted(len(keys), 'key')}; times are UTC, the last use is told to the hour")


@api_key.command(epilog="Example: eci-pay api-key revoke 3f9a0c2b7d1e")
def revoke(
    key_id: Annotated[
        str, typer.Argument(metavar="KEY", help="Its id, as `api-key list` shows it, or the key itself.")
    ],
    as_json: JsonOption = False,
) -> None:
    """End a key, for good."""
    key = run_use_case(lambda service: service.api_keys.revoke(key_id))
    if output.Mode.json:
        output.print_json(_json(key))
    else:
        output.note(
            f"API key {key.key_id} of {key.name} is revoked; servers may take it for as long as they remember it "
            "(ECI_PAY_API_KEY_REMEMBER_SECONDS)"
        )


def _scope(text: str) -> "Scope":
    from eci_pay.access import Scope

    try:
        return Scope(text)
    except ValueError:
        raise errors.InvalidRequest(f"--scope: {text} is none of {', '.join(Scope)}") from None


def _instant(text: str) -> datetime:
    from eci_pay.requests import parse_instant

    return parse_instant(text, "--expires") if "-" in text else datetime.now(UTC) + parse_age(text)


def _json(key: "ApiKey") -> dict[str, object]:
    told = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(key).items()}
    return {**told, "state": key.state(datetime.now(UTC))}


def _shown(instant: datetime | None) -> str:
    return f"{instant:%Y-%m-%d %H:%M}" if instant else ""
